"""SD-LoRA by itself: outputs, gradients and what becomes of a direction, by a plain computation in double precision."""

import dataclasses

import pytest
import torch

from clplat import Experience, Kind
from clplat.adapters.lora import plain_state
from clplat.backbones.base import Classifier
from clplat.backbones.heads import Growing
from clplat.backbones.mlp import mlp
from clplat.run.peft_folder import joined
from clplat.strategies.sd_lora import SDLoRA, product_norm

PLAIN = {"where": "ffn", "projections": [], "rank": 2, "alpha": 3.0, "dropout": 0.0, "optimizer": "sgd", "lr": 0.05}


def make(**options):
    torch.manual_seed(0)
    return SDLoRA(model=Classifier(mlp((5,), [7, 6]), Growing(6, 6)).double(), **(PLAIN | options))


def double(found):
    for e in found:
        object.__setattr__(e, "train", dataclasses.replace(e.train, inputs=e.train.inputs.double()))
    return found


def directions(strategy, adapter):
    """B A (out, in) of each layer, as it is stored."""
    return [(b @ a).detach().clone() for a, b in strategy.adapters.factors(adapter).values()]


def test_outputs_and_gradients_are_the_papers(experiences, drive):
    """The second task: past directions of length 1 times α, the new product times its own, cross-entropy of its own."""
    stream, strategy = double(experiences(2)), drive(make(), double(experiences(1)))
    strategy.train()
    strategy.grow(stream[1])
    generator = torch.Generator().manual_seed(5)
    for _, b in strategy.adapters.factors("task1").values():
        b.data.copy_(torch.randn(b.shape, generator=generator, dtype=b.dtype))
    x, y = stream[1].train.all()
    strategy.global_batch = len(x)
    loss = strategy.training_step((x, y), 0)
    loss.backward()
    past, old = directions(strategy, "task0"), [p.detach().clone().requires_grad_() for p in strategy.magnitudes[0]]
    new = [p.detach().clone().requires_grad_() for p in strategy.magnitudes[1]]
    pairs = [tuple(t.detach().clone().requires_grad_() for t in p) for p in strategy.adapters.factors("task1").values()]
    h = x
    for i, layer in enumerate(strategy.adapters.base_layers().values()):
        a, b = pairs[i]
        weight = layer.weight.detach() + old[i] * past[i] / past[i].square().sum().sqrt() + new[i] * b @ a
        h = (h @ weight.T + layer.bias.detach()).relu()
    logits = h @ strategy.model.head.weight.detach()[2:].T + strategy.model.head.bias.detach()[2:]
    expected = -logits.log_softmax(1)[torch.arange(len(y)), y - 2].mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    found = [*strategy.magnitudes[0], *strategy.magnitudes[1], *strategy.adapters.parameters_of("task1")]
    for mine, theirs in zip(found, [*old, *new, *(t for pair in pairs for t in pair)], strict=True):
        assert mine.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12)


def test_a_finished_task_has_directions_of_length_one_and_the_same_outputs(experiences, drive):
    stream, strategy, seen = double(experiences(1)), make(), {}
    x, inner = stream[0].train.all()[0], strategy.end

    def end(experience):
        seen["before"] = strategy.eval().predict(x).detach()
        seen["changes"] = strategy.adapters.delta("task0")
        inner(experience)

    strategy.end = end
    drive(strategy, stream)
    torch.testing.assert_close(strategy.eval().predict(x), seen["before"], rtol=0, atol=1e-12)
    for d, alpha, change in zip(
        directions(strategy, "task0"), strategy.magnitudes[0], seen["changes"].values(), strict=True
    ):
        torch.testing.assert_close(d.square().sum(), torch.ones((), dtype=d.dtype), rtol=0, atol=1e-12)
        torch.testing.assert_close(alpha.detach(), change.square().sum().sqrt(), rtol=0, atol=1e-12)


def test_a_new_task_starts_where_the_last_one_ended(experiences, drive):
    stream = double(experiences(2))
    strategy = drive(make(), stream[:1])
    x = stream[0].train.all()[0]
    before = strategy.eval().model.features(x).detach()
    strategy.grow(stream[1])
    torch.testing.assert_close(strategy.eval().model.features(x), before, rtol=0, atol=1e-12)
    assert [p.item() for p in strategy.magnitudes[1]] == [1.5, 1.5]  # alpha / r


def test_past_directions_stay_and_all_magnitudes_move(experiences, drive):
    stream = double(experiences(3))
    strategy = drive(make(), stream[:2])
    before = {name: directions(strategy, name) for name in ("task0", "task1")}
    alphas = [p.item() for group in strategy.magnitudes for p in group]
    drive(strategy, stream[2:])
    for name, kept in before.items():
        assert all(torch.equal(a, b) for a, b in zip(directions(strategy, name), kept, strict=True))
    now = [p.item() for group in strategy.magnitudes for p in group]
    assert all(abs(a - b) > 1e-6 for a, b in zip(alphas, now, strict=False))
    assert len(now) == len(alphas) + 2


def test_a_layer_that_learned_nothing_keeps_its_magnitude(experiences):
    strategy = make()
    (e,) = double(experiences(1))
    strategy.grow(e)
    strategy.end(e)
    assert [p.item() for p in strategy.magnitudes[0]] == [1.5, 1.5]
    assert not any(d.any() for d in directions(strategy, "task0"))


def test_merged_weights_have_the_magnitudes(experiences, drive):
    stream = double(experiences(2))
    strategy, x = drive(make(), stream), stream[0].train.all()[0]
    plain = mlp((5,), [7, 6]).double()
    plain.load_state_dict(plain_state(strategy.model.backbone))
    torch.testing.assert_close(plain(x), strategy.eval().model.features(x), rtol=0, atol=1e-12)
    wrapped = {n: m for n, m in strategy.model.backbone.named_modules() if hasattr(m, "active_adapters")}
    rank, scale, pairs = joined(wrapped)  # as peft has them in one adapter
    assert rank == 4
    for name, (a, b) in pairs.items():
        change = strategy.adapters.delta("task0")[name] + strategy.adapters.delta("task1")[name]
        torch.testing.assert_close(scale * b @ a, change, rtol=0, atol=1e-12)


def test_norm_of_a_product():
    a, b = torch.randn(2, 5), torch.randn(4, 2)
    torch.testing.assert_close(product_norm(a, b), (b.double() @ a.double()).norm(), rtol=1e-12, atol=0)


def test_measures_magnitudes(experiences, drive):
    strategy = make()
    strategy.grow(Experience(0, "e0", Kind.LEARN, None, classes=(0, 1)))
    assert strategy.measurements() == {"magnitude": pytest.approx(1.5), "past_magnitude": 0.0}
    drive(strategy := make(), double(experiences(2)))
    past = sum(abs(p.item()) for p in strategy.magnitudes[0]) / 2
    assert strategy.measurements()["past_magnitude"] == pytest.approx(past)


def test_resumes(experiences, resumes):
    assert resumes(make, double(experiences(3)))
