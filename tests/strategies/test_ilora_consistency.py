"""I-LoRA: the distance between fast and slow."""

import torch
from small_ilora import make
from torch import nn

from clplat import Experience, Kind
from clplat.backbones.base import States
from clplat.backbones.clip import clip
from clplat.backbones.language_model import language_model
from clplat.components.per_parameter import trainable
from clplat.components.states import distance
from clplat.strategies.ilora import ILoRA
from clplat.stream import Answers

# --- consistency ------------------------------------------------------------------------------------------------------


def test_forms_of_the_distance():
    torch.manual_seed(0)
    p, s = (States([torch.randn(4, 3, 5), torch.randn(4, 3, 5)]) for _ in range(2))
    (one,), (other,), (both,) = distance(p, s, "one_sided"), distance(s, p, "one_sided"), distance(p, s, "mse")
    torch.testing.assert_close(one + other, both)
    by_code = [(a - torch.where(a > b, a, b)).square().mean() for a, b in zip(p.outputs, s.outputs, strict=True)]
    torch.testing.assert_close(one.mean(), sum(by_code) / 3)  # of three states, the first of which is the same in both
    assert distance(p, p, "mse")[0].tolist() == distance(p, p, "one_sided")[0].tolist() == [0.0] * 4
    leaf = p.outputs[0].requires_grad_()
    distance(p, s, "one_sided")[0].sum().backward()
    assert (leaf.grad[leaf >= s.outputs[0]] == 0).all()
    assert (leaf.grad[leaf < s.outputs[0]] != 0).all()


def test_padding_does_not_count():
    torch.manual_seed(0)
    p, s = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    (plain,) = distance(States([p]), States([s]), "mse")
    for left in (True, False):
        pad = lambda t: torch.cat([torch.randn(2, 4, 5), t][:: 1 if left else -1], 1)  # noqa: B023, E731
        valid = torch.cat([torch.zeros(2, 4), torch.ones(2, 3)][:: 1 if left else -1], 1).bool()
        (padded,) = distance(States([pad(p)], [valid]), States([pad(s)], [valid]), "mse")
        torch.testing.assert_close(padded, plain)


def clip_model(classes=5):
    torch.manual_seed(0)
    prompts = torch.tensor([[1, 7 + c, 2, -1] if c % 2 else [1, 7 + c, 9, 2] for c in range(classes)])
    backbone = clip((3, 8, 8), dim=16, depth=1, heads=2, patch_size=4, vocabulary=30)
    return backbone.assemble(None, Answers(prompts, 2, 30, 0))


def test_each_tower_counts_by_the_mean_over_its_own_batch():
    """CLIP: 6 images and 5 prompts, whose padding does not count; by the blocks' outputs, in both forms."""
    net = clip_model()
    strategy = ILoRA(model=net, memory=6, dropout=0.0, rank=2)
    x, y = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 0, 3, 4, 2])
    strategy.grow(Experience(0, "a", Kind.LEARN, None, classes=(0, 1, 2, 3, 4)))
    for p in strategy.slow.parameters():
        p.data += 0.1 * torch.randn_like(p)
    strategy.memory.add(x, y)
    strategy.global_batch = 6
    found = {}
    for form in ("mse", "one_sided"):
        strategy.consistency = form
        found[form] = strategy._replay(strategy.memory)[1]
    states = []
    for slow in (False, True):
        with net.backbone.recorded() as seen, torch.no_grad():
            strategy.slow.losses(net, x, y) if slow else net.losses(x, y)
        states.append(seen.outputs)
    assert [len(h) for h in states[0]] == [6, 5]
    real = (net.classes >= 0).float()
    for form, value in found.items():
        (image, text) = (t - f for f, t in zip(*states, strict=True))
        image, text = ((g.relu() if form == "one_sided" else g).square() for g in (image, text))
        expected = image.mean() + ((text.mean(2) * real).sum(1) / real.sum(1)).mean()
        torch.testing.assert_close(value, expected / 3)


def test_equal_copies_have_no_distance_without_dropout(model, experiences):
    stream = experiences(2)
    for dropout in (0.0, 0.5):
        strategy = make(model(), dropout=dropout, rank=4)
        strategy.grow(stream[0])
        for _, b in strategy.adapters.factors("fast").values():
            nn.init.normal_(b)
        strategy.slow.update(strategy.model, 0.0)
        x, y = stream[0].train.all()
        strategy.memory.add(x, y)
        strategy.global_batch = 12
        gap = strategy._replay(strategy.memory)[1].item()
        assert (gap == 0) == (dropout == 0)
        assert strategy.model.training


def text_model(dtype):
    torch.manual_seed(0)
    backbone = language_model((2, 9), dim=16, depth=2, heads=2, vocabulary=30, dtype=dtype)
    return backbone.assemble(None, Answers(torch.tensor([[5, 1], [6, 1]]), end=1, vocabulary=30, new_tokens=0))


def replayed(net, steps=0.01):
    """Loss and distance of four samples, the slow parameters `steps` away from the fast ones."""
    strategy = ILoRA(model=net, memory=4, dropout=0.0, rank=2)
    strategy.grow(Experience(0, "a", Kind.LEARN, None, classes=(0, 1)))
    generator = torch.Generator().manual_seed(1)
    for p in trainable(net).values():
        p.data = torch.randn(p.shape, generator=generator) / 4
    strategy.slow.update(net, 0.0)
    for p in strategy.slow.parameters():
        p.data += steps * torch.randn(p.shape, generator=generator)
    inputs = torch.full((4, 2, 9), -1, dtype=torch.int32)
    inputs[:, 0, :5] = torch.arange(20).view(4, 5) + 2
    strategy.memory.add(inputs, torch.tensor([0, 1, 0, 1]))
    strategy.global_batch = 4
    loss, gap = strategy._replay(strategy.memory)
    with torch.autocast("cpu", enabled=False):  # as the loop's backward passes are
        (loss + gap).backward()
    return loss.detach(), gap.detach(), [p.grad for p in trainable(net).values()]


def test_the_distance_is_that_of_single_precision_whatever_the_run_s():
    """Rounding of states to bfloat16 is more than what the slow parameters differ by, and not 0 for equal ones."""
    exact = replayed(text_model("float32"), steps=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = replayed(text_model("float32"), steps=1e-4)
        assert replayed(text_model("float32"), steps=0.0)[1] == 0
    torch.testing.assert_close(mixed, exact, atol=0, rtol=0)
    half = text_model("bfloat16")
    wide = text_model("float32")
    wide.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in half.state_dict().items()})
    torch.testing.assert_close(replayed(half, steps=1e-4), replayed(wide, steps=1e-4), atol=1e-9, rtol=1e-5)
