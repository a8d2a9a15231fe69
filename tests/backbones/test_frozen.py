"""The frozen backbone: features are those of the backbone it is made of, computed once for all that read them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clplat
from clplat.backbones.base import Classifier
from clplat.backbones.frozen import KEY, Frozen, _Kept, frozen
from clplat.backbones.heads import Linear
from clplat.config.resolve import resolve
from clplat.errors import MissingError, UserError
from clplat.run.build import build
from clplat.strategies.naive import Naive
from clplat.streams.digits import Digits

SHAPE = (1, 8, 8)
OPTIONS: dict[str, Any] = {"base": "slim_resnet18", "base_options": {"width": 2}}


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that a network was run on, and no file of features open but those of the test."""
    from clplat.backbones import cnn

    rows, plain = list[int](), cnn.ResNet.features

    def features(self: cnn.ResNet, inputs: Tensor) -> Tensor:
        rows.append(len(inputs))
        return plain(self, inputs)

    monkeypatch.setattr(cnn.ResNet, "features", features)
    monkeypatch.setattr(_Kept, "_open", {})
    return rows


def made(folder: Path | None = None, seed: int = 0) -> Frozen:
    torch.manual_seed(seed)
    net = frozen(SHAPE, **OPTIONS, cache=None if folder is None else str(folder))
    assert isinstance(net, Frozen)
    return net.train()


def test_features_are_those_of_the_backbone_in_evaluation(tmp_path: Path) -> None:
    x = torch.rand(5, *SHAPE)
    for net in (made(), made(tmp_path)):
        assert torch.equal(net(x), net.net.eval()(x))
        assert torch.equal(net.features(x), net(x))
        assert net.embed_dim == net.net.embed_dim
        assert not any(p.requires_grad for p in net.parameters())
        assert not any(m.training for m in net.net.modules())


def test_an_input_is_run_once_whatever_it_comes_with(count: list[int], tmp_path: Path) -> None:
    x, net = torch.rand(6, *SHAPE), made(tmp_path)
    first = net(x[:4])
    assert torch.equal(net(x[[3, 1, 1]]), first[[3, 1, 1]])
    assert count == [4]
    mixed = net(x[2:])
    assert torch.equal(mixed[:2], first[2:])
    assert torch.equal(copy.deepcopy(net)(x), torch.cat([first, mixed[2:]]))
    assert count == [4, 4]  # all of a batch that holds new ones
    net(x.double().float() + 1e-6)
    assert sum(count) == 14


def test_features_come_from_the_file_in_another_process(count: list[int], tmp_path: Path) -> None:
    x = torch.rand(4, *SHAPE)
    first = made(tmp_path)(x)
    _Kept._open.clear()
    again = made(tmp_path)
    assert torch.equal(again(x), first)
    assert count == [4]
    assert "features of 4 inputs" in again.notes[-1]


def test_other_weights_other_features(count: list[int], tmp_path: Path) -> None:
    x, net = torch.rand(4, *SHAPE), made(tmp_path)
    before = net(x)
    assert not torch.equal(made(tmp_path, seed=1)(x), before)
    weights = copy.deepcopy(net.state_dict())
    net.load_state_dict({name: t * 2 if t.is_floating_point() else t for name, t in weights.items()})
    assert not torch.equal(net(x), before)  # loaded after it was first asked
    net.load_state_dict(weights)
    assert torch.equal(net(x), before)
    assert count == [4, 4, 4]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", ["cut", "bit"])
def test_a_damaged_record_is_computed_anew(damage: str, count: list[int], tmp_path: Path) -> None:
    x = torch.rand(4, *SHAPE)
    first = made(tmp_path)(x)
    (file,) = tmp_path.iterdir()
    held = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(held[:-3])
    else:
        held[KEY + 1] ^= 1
        file.write_bytes(held)
    for runs in (2, 2):
        _Kept._open.clear()
        assert torch.equal(made(tmp_path)(x), first)
        assert len(count) == runs


def test_only_a_head_is_trained() -> None:
    net = made()
    model = Classifier(net, Linear(net.embed_dim, 3))
    learner = Naive(model=model, lr=0.1)
    learner.training_step((torch.rand(4, *SHAPE), torch.tensor([0, 1, 2, 0])), 0).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("how", ["trained", "training"])
def test_a_backbone_that_is_changed_behind_its_back_is_refused(how: str) -> None:
    net = made()
    if how == "trained":
        next(net.net.parameters()).requires_grad_(True)
    else:
        next(m for m in net.net.modules() if isinstance(m, torch.nn.BatchNorm2d)).train()
    with pytest.raises(UserError, match="backbone: frozen, but this strategy trains or adapts it"):
        net(torch.rand(4, *SHAPE))


def test_faults_name_the_option(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"backbone\.base: 'language_model' is out of range"):
        frozen((2, 8), base="language_model")
    with pytest.raises(UserError, match=r"backbone\.base: 'frozen'"):
        frozen(SHAPE, base="frozen")
    with pytest.raises(UserError, match=r"backbone\.base_options\.width: 0"):
        frozen(SHAPE, base="slim_resnet18", base_options={"width": 0})
    with pytest.raises(MissingError, match=r"backbone\.base_options\.weights"):
        frozen((3, 8, 8), base="timm", base_options={"weights": "nowhere/at/all.safetensors"})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"backbone\.cache: .*\.features can't be written"):
        made(tmp_path / "file")(torch.rand(2, *SHAPE))
    made(tmp_path / "none")
    assert not (tmp_path / "none").exists()  # nothing is made where nothing runs
    for wrong, said in {"widht": "no such key (did you mean width", "width": "'two' is not an int"}.items():
        with pytest.raises(UserError) as error:
            resolve(backbone={"name": "frozen", "base": "slim_resnet18", "base_options": {wrong: "two"}})
        assert [f for f in error.value.faults if f"backbone.base_options.{wrong}: " in f and said in f]


def test_arms_of_a_run_share_features_and_a_kept_one_learns_as_one_that_is_not(
    count: list[int], tmp_path: Path
) -> None:
    backbone: dict[str, Any] = {"name": "frozen", **OPTIONS}
    settings: dict[str, Any] = {
        "stream": {"name": "digits", "experiences": 2, "train_per_class": 4, "test_per_class": 2},
        "loop": {"max_epochs": 2, "batch_size": 8, "representation": False},
        "tracking": {"enabled": False},
    }
    kept = backbone | {"cache": str(tmp_path / "features")}
    figures = {}
    for name, how, strategy in (("a", kept, "er"), ("b", kept, "acil"), ("c", kept, "lwf"), ("d", backbone, "er")):
        before = sum(count)
        result = clplat.run(strategy=strategy, backbone=how, output=str(tmp_path / name), quiet=True, **settings)
        summary = json.loads((Path(result.run_dir) / "summary.json").read_text())
        figures[name] = summary["accuracy_matrix"], sum(count) - before
    assert figures["a"][1] > 0
    assert figures["c"][1] == 0
    assert figures["a"][0] == figures["d"][0]


class Flipped(Digits):
    """Augments."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.augment = torch.fliplr


@pytest.mark.parametrize(
    ("strategy", "stream", "fault"),
    [
        ("naive", Flipped, "augmented inputs are new ones each time"),
        ("bn_adapt", Digits, "BNAdapt adapts the backbone"),
    ],
)
def test_what_has_other_features_each_time_is_not_kept(
    strategy: str, stream: type[Digits], fault: str, tmp_path: Path
) -> None:
    parts: dict[str, Any] = {"strategy": strategy, "stream": stream, "backbone": {"name": "frozen", **OPTIONS}}
    build(resolve(**parts))
    parts["backbone"]["cache"] = str(tmp_path)
    with pytest.raises(UserError, match=rf"backbone\.cache: {fault}"):
        build(resolve(**parts))


def test_processes_that_write_side_by_side_keep_the_records_of_both(count: list[int], tmp_path: Path) -> None:
    x, nets = torch.rand(6, *SHAPE), []
    for _ in range(2):
        nets.append(made(tmp_path))
        nets[-1]._file()
        _Kept._open.clear()  # as if each were of a process of its own
    first = [nets[0](x[:2]), nets[1](x[2:4]), nets[0](x[4:])]
    _Kept._open.clear()
    assert torch.equal(made(tmp_path)(x), torch.cat(first))
    assert count == [2, 2, 2]


def test_erased_samples_are_relearned_by_what_stands_on_the_features(tmp_path: Path) -> None:
    """The audit trains copies of all parameters but those of the network, which a learner on features does not have."""
    result = clplat.run(
        strategy={"name": "finetune_retained", "memory": 40}, backbone={"name": "frozen", **OPTIONS}, head="linear",
        stream={"name": "unlearning", "base": "digits", "unit": "class", "count": 1, "size": 2}, output=str(tmp_path),
        loop={"max_steps": 20}, audit={"relearn_steps": 3, "relearn_lr": 0.5}, tracking={"enabled": False}, seed=0,
    )  # fmt: skip
    (file,) = Path(result.run_dir).glob("audit/*/unlearned.json")
    relearned = json.loads(file.read_text())["relearn"]
    assert relearned["why"] is None
    assert len(relearned["accuracies"]) > 1


@pytest.mark.parametrize("name", ["ewc", "mas"])
def test_gradients_of_single_samples_are_those_of_features_that_are_not_kept(name: str, tmp_path: Path) -> None:
    """EWC and MAS ask for them by vmap, in which an input has no content to look it up by."""
    scores = [
        clplat.run(
            strategy=name, backbone={"name": "frozen", **OPTIONS, "cache": cache}, stream="digits",
            loop={"max_steps": 4}, tracking={"enabled": False}, output=str(tmp_path / str(i)), seed=0,
        ).accuracy_matrix
        for i, cache in enumerate([None, str(tmp_path / "kept")])
    ]  # fmt: skip
    torch.testing.assert_close(*map(torch.tensor, scores), atol=0.01, rtol=0)
