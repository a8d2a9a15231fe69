import families
import numpy as np
import pytest
import torch

from clplat import Data, Experience, Kind
from clplat.backbones.base import Classifier
from clplat.backbones.cnn import slim_resnet18
from clplat.backbones.frozen import Frozen
from clplat.backbones.heads import Growing, Linear
from clplat.backbones.mlp import mlp
from clplat.backbones.vit import vit_micro
from clplat.errors import UserError
from clplat.strategies.naive import Naive
from clplat.strategies.rmu import RMU

SHAPE, CLASSES = (3, 8, 8), 4


def pool(per_class=6):
    """Images of four classes around distant means."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat_interleave(per_class)
    centres = torch.randn(CLASSES, *SHAPE, generator=draw)
    return Data(centres[labels] + 0.1 * torch.randn(len(labels), *SHAPE, generator=draw), labels)


def network(depth=5):
    torch.manual_seed(0)
    backbone = vit_micro(SHAPE, patch_size=4, dim=16, depth=depth, heads=2)
    return Classifier(backbone, Growing(backbone.embed_dim, CLASSES))


def experience(data):
    return Experience(0, "all", Kind.LEARN, data, classes=tuple(range(CLASSES)))


def begun(strategy, data, request_for):
    """A request for class 0, begun."""
    e = experience(data)
    strategy.train()
    strategy.grow(e)
    strategy.begin(e)
    strategy.end(e)
    gone = request_for(1, e, (0,))
    strategy.grow(gone)
    strategy.begin(gone)
    return gone


def outputs(net, block, x):
    """Independent: what a block puts out, by a hook of our own."""
    found = []
    handle = block.register_forward_hook(lambda _module, _inputs, output: found.append(output.detach().numpy()))
    with torch.no_grad():
        net(x)
    handle.remove()
    return found[0]


def test_the_loss_is_the_papers(request_for):
    data = pool()
    strategy = RMU(model=network(), memory=24, layer=2, steering=3.0, retain_weight=0.7)
    gone = begun(strategy, data, request_for)
    with torch.no_grad():
        for p in strategy.model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    strategy.double()
    strategy._prepare = lambda raw, augmented: raw.double()
    x, y = strategy.training_data(gone).all()
    x, y, strategy.global_batch = x[:4].double(), y[:4], 4
    raw, kept = strategy._part(strategy._kept, 0, 4)
    assert 0 not in kept
    direction = strategy._direction(16).numpy()
    assert (direction >= 0).all()
    assert np.linalg.norm(direction) == pytest.approx(1, abs=1e-6)
    now, before = strategy.model, strategy.before.model
    erased = outputs(now, now.backbone.blocks[2], x)  # (4, P, D)
    held = outputs(now, now.backbone.blocks[2], raw.double()), outputs(before, before.backbone.blocks[2], raw.double())
    expected = ((erased - 3.0 * direction) ** 2).sum(2).mean() + 0.7 * ((held[0] - held[1]) ** 2).sum(2).mean()
    assert strategy.forget_step((x, y), 0).item() == pytest.approx(expected, rel=1e-7)


def test_padding_is_no_token_and_the_answer_is_read():
    stream = families.texts(0, free=True)
    torch.manual_seed(0)
    strategy = RMU(model=families.model("llama", stream, depth=2), memory=4, layer=0)
    x, y = stream[0].train.all()
    states, real = strategy._states(strategy.model, x, y)
    assert real.sum(1).tolist() == ((x[:, 0] >= 0).sum(1) + (y >= 0).sum(1)).tolist()
    from clplat.strategies.rmu import distances

    found = distances(states.detach(), torch.zeros(states.shape[2]), real).numpy()
    for row, mask, value in zip(states.detach().numpy(), real.numpy() > 0, found, strict=True):
        assert (row[mask] ** 2).sum(1).mean() == pytest.approx(value, rel=1e-5)


def test_a_layer_without_tokens_is_one_token(request_for):
    strategy = RMU(model=Classifier(mlp((5,), [7, 6]), Linear(6, CLASSES)), memory=4, layer=1)
    states, real = strategy._states(strategy.model.eval(), torch.randn(3, 5), torch.zeros(3, dtype=torch.int64))
    assert (states.shape, real.tolist()) == ((3, 1, 6), [[1.0]] * 3)


def test_only_ffn_weights_of_three_blocks_move_and_all_train_again_after(request_for, answer):
    strategy = RMU(model=network(), memory=24, layer=3)
    data = pool()
    gone = begun(strategy, data, request_for)
    before = {n: p.detach().clone() for n, p in strategy.model.named_parameters()}
    answer(strategy, gone, epochs=2)
    moved = {n for n, p in strategy.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {f"backbone.net.blocks.{k}.mlp.{fc}.weight" for k in (1, 2, 3) for fc in ("fc1", "fc2")}
    assert all(p.requires_grad for p in strategy.model.parameters())


def test_what_the_user_froze_stays_frozen(request_for, answer):
    strategy_model = network()
    strategy_model.backbone.net.pos_embed.requires_grad_(False)
    strategy = RMU(model=strategy_model, memory=24, layer=3)
    answer(strategy, begun(strategy, pool(), request_for), epochs=1)
    assert not strategy_model.backbone.net.pos_embed.requires_grad


def test_the_direction_is_one_for_a_request_and_another_for_the_next(request_for):
    strategy = RMU(model=network(), memory=24)
    begun(strategy, pool(), request_for)
    first = strategy._direction(16)
    assert torch.equal(first, strategy._direction(16))
    strategy.request += 1
    assert not torch.equal(first, strategy._direction(16))


def test_learning_is_plain_training(drive, equal):
    stream = [experience(pool())]
    assert equal(drive(RMU(model=network()), stream).model, drive(Naive(model=network()), stream).model)


def test_activations_of_what_is_erased_come_near_the_direction_and_those_of_the_rest_stay(request_for, answer, drive):
    data = pool()
    strategy = RMU(model=network(), memory=24, layer=2, lr=0.05, forget_lr=0.01, steering=20.0)
    drive(strategy, [experience(data)], epochs=5)
    gone = request_for(1, experience(data), (0,))
    x = {name: data.inputs[rows] for name, rows in (("erased", data.labels == 0), ("kept", data.labels != 0))}
    block = strategy.model.backbone.blocks[2]
    strategy.eval()
    before = {name: outputs(strategy.model, block, inputs) for name, inputs in x.items()}
    answer(strategy, gone, epochs=30)
    strategy.eval()
    after = {name: outputs(strategy.model, block, inputs) for name, inputs in x.items()}
    aim = 20.0 * strategy._direction(16).numpy()

    def far(states, name):
        return ((states[name] - aim) ** 2).sum(2).mean()

    moved = {name: ((after[name] - before[name]) ** 2).sum(2).mean() for name in x}
    assert far(after, "erased") < 0.5 * far(before, "erased")
    assert moved["kept"] < 0.1 * moved["erased"]


def test_a_backbone_without_ffn_layers_is_refused_and_frozen_ones_are_noted():
    backbone = slim_resnet18((3, 8, 8))
    with pytest.raises(UserError, match="rmu needs FFN layers up to block"):
        RMU(model=Classifier(backbone, Growing(backbone.embed_dim, CLASSES)))
    kept = Frozen(network().backbone, "", None)
    with pytest.raises(UserError, match="rmu needs blocks"):
        RMU(model=Classifier(kept, Growing(kept.embed_dim, CLASSES)))
    assert not RMU(model=network()).notes
    frozen = network()
    frozen.backbone.requires_grad_(False)
    assert "requests will change nothing" in RMU(model=frozen).notes[0]


@pytest.mark.parametrize(("option", "value"), [("layer", 5), ("layer", -1), ("steering", 0), ("retain_weight", -1)])
def test_refuses_values_out_of_range(option, value):
    with pytest.raises(UserError, match=rf"strategy.{option}: {value} is out of range"):
        RMU(model=network(), **{option: value})
