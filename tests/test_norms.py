"""Batch normalisation in training: one sample in a batch, and layers that can't be shared by processes."""

import pytest
import torch
from torch import nn

import clplat
from clplat.backbones.language_model import language_model
from clplat.backbones.text_encoder import text_encoder
from clplat.components.norms import BatchNorm, norm_affine, prepare_training
from clplat.errors import UserError


def test_a_last_batch_of_one_trains_and_is_told(tmp_path):
    digits = {"stream.experiences": 1, "stream.train_per_class": 5, "loop.batch_size": 7}  # 50 = 7 · 7 + 1
    with pytest.warns(UserWarning, match="a training batch holds one sample"):
        result = clplat.run(strategy="naive", stream="digits", backbone="cnn", quiet=True, output=str(tmp_path),
                            **{"tracking.enabled": False, "strategy.lr": 0.01}, **digits)  # fmt: skip
    state = clplat.load(result.run_dir).state_dict()
    assert all(v.isfinite().all() for v in state.values() if isinstance(v, torch.Tensor) and v.is_floating_point())


def test_one_sample_is_normalised_by_the_running_statistics():
    layer = nn.Sequential(nn.BatchNorm1d(3))
    layer[0].running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    still, x = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(1, 3)
    still.load_state_dict(layer.state_dict())
    prepare_training(layer, 1)
    assert isinstance(layer[0], BatchNorm)
    with pytest.warns(UserWarning, match="one sample"):
        out = layer.train()(x)
    assert torch.equal(out, still.eval()(x))
    assert torch.equal(layer[0].running_mean, still[0].running_mean)


def test_layers_that_processes_cant_share_are_refused():
    class Own(nn.BatchNorm1d):
        pass

    for layer in (Own(3), nn.BatchNorm1d(3, track_running_stats=False)):
        prepare_training(nn.Sequential(layer), 1)
        with pytest.raises(UserError, match=r"fabric\.devices: 2, but 0 \((Own|BatchNorm1d)\)"):
            prepare_training(nn.Sequential(layer), 2)


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_gains_and_offsets_of_layers_of_the_libraries_own(family):
    """Which the names of parameters tell in these families: norm in llama, layer_norm in t5, LayerNorm in bert."""
    small = {"dim": 8, "depth": 2, "heads": 2}
    made = text_encoder((2, 8), **small) if family == "bert" else language_model((2, 8), family=family, **small)
    called = [n for n, _ in made.named_parameters() if "norm" in n.lower()]
    assert {id(p) for p in norm_affine(made)} == {id(made.get_parameter(n)) for n in called}
    assert len(called) >= 5


def test_what_only_holds_or_is_called_after_normalisation_layers_is_none():
    class Scaled(nn.Module):
        def __init__(self, *children):
            super().__init__()
            self.weight, self.inside = nn.Parameter(torch.ones(2)), nn.ModuleList(children) if children else None

    class MyRMSNorm(Scaled):
        pass

    class LayerNormGate(Scaled):
        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(torch.ones(2))

    assert len(norm_affine(MyRMSNorm())) == 1
    assert norm_affine(nn.Sequential(Scaled(), MyRMSNorm(nn.Linear(2, 2)), LayerNormGate())) == []
