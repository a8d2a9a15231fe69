"""What is done to trained weights when an experience ends: each method's invariants, and its place in the loop."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import clplat
from clplat import Experience, Kind
from clplat.backbones.base import Classifier
from clplat.backbones.cnn import slim_resnet18
from clplat.backbones.heads import Growing
from clplat.backbones.mlp import mlp
from clplat.components.merging._base import Merge
from clplat.components.merging.breadcrumbs import Breadcrumbs, middle
from clplat.components.merging.dynamic_ema import FALLBACK, DynamicEMA, rate
from clplat.components.merging.lines import LiNeS, factors
from clplat.components.merging.somf import SOMF, concrete, masked
from clplat.errors import Interrupted, UserError
from clplat.run import checkpoint
from clplat.run.saving import restore, snapshot
from clplat.strategies.er import ER
from clplat.strategies.naive import Naive

SMALL: dict[str, Any] = {
    "stream": {"name": "digits", "experiences": 3},
    "strategy": {"name": "er", "lr": 0.05, "memory": 20, "replay_batch": 4},
    "backbone": {"name": "mlp", "hidden": [6, 6]},
    "loop": {"batch_size": 16, "max_steps": 4, "eval_samples": 20, "representation": False},
    "tracking": {"enabled": False},
}
OPTIONS = {"lines": {"alpha": 0.25}, "breadcrumbs": {"keep": 0.5}, "somf": {"steps": 3}, "dynamic_ema": {}}


def learner(backbone: Any = None, cls: Any = Naive) -> Any:
    """A strategy of four classes in float64, grown for two of them."""
    torch.manual_seed(0)
    backbone = mlp((3,), hidden=[4, 4, 4]) if backbone is None else backbone
    strategy = cls(model=Classifier(backbone, Growing(backbone.embed_dim, 4)), lr=0.1)
    strategy.grow(Experience(0, "first", Kind.LEARN, None, classes=(0, 1)))
    return strategy.double()


def trained(strategy: Any, merge: Merge) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """States of the model before an experience, as learned (all values moved at random), and merged."""
    strategy.grow(Experience(1, "second", Kind.LEARN, None, classes=(2, 3)))
    strategy.double()
    before = copy.deepcopy(strategy.model.state_dict())
    merge.begin(strategy)
    with torch.no_grad():
        for value in strategy.model.state_dict().values():
            value += torch.rand_like(value) - 0.5 if value.is_floating_point() else 7
    learned = copy.deepcopy(strategy.model.state_dict())
    merge.end(strategy)
    return before, learned, strategy.model.state_dict()


def shares(before: dict[str, Tensor], learned: dict[str, Tensor], merged: dict[str, Tensor]) -> dict[str, Tensor]:
    """(θ − θ_before) / (θ_learned − θ_before), by name."""
    return {n: (merged[n] - before[n]) / (learned[n] - before[n]) for n in before if before[n].is_floating_point()}


# --- LiNeS --------------------------------------------------------------------------------------------------------


def test_lines_scales_blocks_in_their_order_to_the_last_at_full_strength() -> None:
    found = shares(*trained(learner(), LiNeS(alpha=0.2)))
    expected = {"backbone.net.0": 0.2, "backbone.net.1": 0.6, "backbone.net.2": 1.0, "head": 1.0}
    for name, share in found.items():
        wanted = next(value for prefix, value in expected.items() if name.startswith(prefix))
        torch.testing.assert_close(share, torch.full_like(share, wanted), msg=name)


def test_lines_scales_what_is_outside_the_blocks_by_alpha_and_statistics_with_their_layer() -> None:
    before, learned, merged = trained(learner(slim_resnet18((1, 8, 8), width=2)), LiNeS(alpha=0.2))
    found = shares(before, learned, merged)
    for name, wanted in (
        ("backbone.conv1.weight", 0.2),
        ("backbone.bn1.running_var", 0.2),
        ("backbone.layer1.0.conv1.weight", 0.2),
        ("backbone.layer1.1.bn1.running_mean", 0.2 + 0.8 / 7),
        ("backbone.layer4.1.bn2.running_var", 1.0),
        ("head.weight", 1.0),
    ):
        torch.testing.assert_close(found[name], torch.full_like(found[name], wanted), msg=name)
    name = "backbone.bn1.num_batches_tracked"
    assert torch.equal(merged[name], learned[name])  # an integer


def test_lines_at_its_limits() -> None:
    before, learned, merged = trained(learner(), LiNeS(alpha=0.0, beta=0.0))
    assert all(torch.equal(merged[n], before[n]) for n in before if n.startswith("backbone"))
    assert torch.equal(merged["head.weight"], learned["head.weight"])
    assert len(learned["head.weight"]) == 4  # new rows, which have no weights before
    _, learned, merged = trained(learner(), LiNeS(alpha=1.0, beta=0.0))
    torch.testing.assert_close(merged, learned)
    assert factors(1, 0.2, 0.8) == [1.0]


def test_lines_counts_each_tower_and_refuses_blocks_that_share_weights() -> None:
    strategy = learner()
    backbone = strategy.model.backbone
    backbone.net[2][0].weight = backbone.net[1][0].weight
    assert "share weights" in LiNeS().faults(strategy)[0]
    assert "no blocks" in LiNeS().faults(learner(mlp((3,), hidden=[])))[0]

    class Towers(type(backbone)):  # type: ignore[misc]
        stacks = property(lambda self: [[self.net[0]], [self.net[1], self.net[2]]])

    two = learner()
    two.model.backbone.__class__ = Towers
    found = shares(*trained(two, LiNeS(alpha=0.2)))
    assert [round(float(found[f"backbone.net.{i}.0.bias"].mean()), 12) for i in range(3)] == [1.0, 0.2, 1.0]


# --- Breadcrumbs --------------------------------------------------------------------------------------------------


def test_breadcrumbs_masks_both_tails_of_each_layer_and_rescales_nothing() -> None:
    before, learned, merged = trained(learner(), Breadcrumbs(alpha=0.5, keep=0.5, drop_top=0.25))
    for name in (n for n in before if n.startswith("backbone")):
        change, left = (learned[name] - before[name]).flatten(), (merged[name] - before[name]).flatten()
        kept = left != 0
        assert kept.sum() == int(0.5 * len(change)), name
        torch.testing.assert_close(left[kept], 0.5 * change[kept], rtol=1e-9, atol=1e-12)
        order = change.abs().argsort(descending=True)
        top = int(0.25 * len(change))
        assert not kept[order[:top]].any()
        assert kept[order[top : top + int(kept.sum())]].all()
    assert torch.equal(merged["head.weight"], learned["head.weight"])


def test_breadcrumbs_by_rows() -> None:
    change = torch.tensor([[5.0, -4.0, 3.0, -2.0, 1.0], [0.1, 0.2, 0.3, 0.4, 0.5]])
    assert middle(change, 0.4, 0.2).tolist() == [[False, True, True, False, False], [False, False, True, True, False]]
    merge = Breadcrumbs(alpha=1.0, keep=0.4, drop_top=0.2, per="row")
    found = merge.merged(learner(), {"a": change})["a"]
    assert found.tolist() == [[0, -4, 3, 0, 0], [0, 0, change[1, 2].item(), change[1, 3].item(), 0]]


def test_breadcrumbs_at_its_limits() -> None:
    before, _, merged = trained(learner(), Breadcrumbs(alpha=1.0, keep=0.0))
    assert all(torch.equal(merged[n], before[n]) for n in before if n.startswith("backbone"))
    _, learned, merged = trained(learner(), Breadcrumbs(alpha=1.0, keep=1.0, drop_top=0.0))
    torch.testing.assert_close(merged, learned)


# --- SOMF ---------------------------------------------------------------------------------------------------------


def test_the_mask_is_rescaled_to_a_mean_of_one() -> None:
    change = torch.tensor([1.0, -2.0, 3.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(masked(change, torch.full_like(change, 0.3)), change)
    one = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    assert masked(change, one).tolist() == [0, -8, 0, 0]
    assert masked(change, torch.zeros_like(change)).tolist() == [0, 0, 0, 0]  # not NaN
    half = torch.full((4,), 0.5, dtype=torch.float64)
    assert torch.equal(concrete(torch.zeros_like(half), half, 0.5), half)
    logit = torch.tensor([0.7], dtype=torch.float64)
    torch.testing.assert_close(concrete(logit, torch.full_like(logit, 0.5), 0.5), (logit / 0.5).sigmoid())


def remembering() -> Any:
    strategy = learner(cls=ER)
    strategy.memory.add(torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 2)
    return strategy


def test_somf_without_steps_or_past_leaves_what_was_learned() -> None:
    for strategy, steps in ((remembering(), 0), (learner(cls=ER), 5)):
        _, learned, merged = trained(strategy, SOMF(steps=steps))
        torch.testing.assert_close(merged, learned)


def test_somf_trains_a_mask_that_gives_up_what_harms_the_past() -> None:
    """One block as a plain sum: the first entry's change harms the past, the second's has no effect on it."""
    backbone = mlp((2,), hidden=[1])
    strategy = learner(backbone, ER)
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(8, 1)
    strategy.memory.add(x, torch.zeros(8, dtype=torch.int64))
    with torch.no_grad():
        backbone.net[0][0].weight.copy_(torch.tensor([[1.0, 1.0]]))
        backbone.net[0][0].bias.fill_(1.0)
        strategy.model.head.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    merge = SOMF(steps=50, lr=0.1)
    merge.begin(strategy)
    head = strategy.model.head.weight.detach().clone()
    with torch.no_grad():
        backbone.net[0][0].weight.sub_(0.5)
    merge.end(strategy)
    weight = backbone.net[0][0].weight.detach() - 1
    assert weight[0, 0] > weight[0, 1]  # less of the harmful change is left
    torch.testing.assert_close(weight.sum(), torch.tensor(-1.0, dtype=torch.float64))  # the mask's mean is one
    assert torch.equal(head, strategy.model.head.weight)
    assert all(p.grad is None for p in strategy.parameters())
    assert merge.losses[1] < merge.losses[0]
    assert not merge.past
    assert not merge.before


def test_somf_halves_its_rate_by_a_cosine_and_draws_anew_for_each_experience(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, draws = list[float](), list[Tensor]()
    step, rand = torch.optim.Adam.step, torch.rand

    def stepping(self: Any, *arguments: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    def drawing(*arguments: Any, **options: Any) -> Tensor:
        draws.append(rand(*arguments, **options))
        return draws[-1]

    monkeypatch.setattr(torch.optim.Adam, "step", stepping)
    monkeypatch.setattr(torch, "rand", drawing)
    strategy, merge = remembering(), SOMF(steps=2, lr=0.1)
    for _ in range(2):
        merge.begin(strategy)
        merge.end(strategy)
    assert rates == pytest.approx([0.1, 0.05] * 2)
    first, second = draws[: len(draws) // 2], draws[len(draws) // 2 :]
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_somf_needs_a_memory() -> None:
    assert "keeps none" in SOMF().faults(learner())[0]
    assert not SOMF().faults(learner(cls=ER))


# --- dynamic EMA --------------------------------------------------------------------------------------------------


def test_the_rate_by_hand() -> None:
    def of(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    now, slow, gradient, earlier = of(3.0, -1.0), of(1.0, 1.0), of(0.5, -1.5), of(-1.5, 2.0)
    # a = 2 + 2, b = 0.5 + 1.5, c = 2 + 3.5
    torch.testing.assert_close(rate(now, slow, gradient, earlier), of(2 * 3 / (4 * 5.5))[0])
    moved = of(1.0, -2.0)
    torch.testing.assert_close(rate(now, slow, gradient, earlier, moved), of(1 - 3 * 3 / (4 * 5.5))[0])
    assert rate(now, slow, gradient, None).isnan()
    assert rate(now, now, gradient, earlier).isnan()  # a = 0
    assert rate(now, slow, gradient, gradient).isnan()  # c = 0
    assert rate(now, slow, gradient, earlier, 9 * moved).isnan()  # β above 1


def test_dynamic_ema_follows_each_tensor_and_takes_its_place_at_the_end() -> None:
    strategy, merge = learner(), DynamicEMA()
    merge.begin(strategy)
    weight = strategy.model.head.weight
    slow, gradients, rates = weight.detach().clone(), [], []
    for _ in range(4):
        for p in strategy.parameters():
            p.grad = torch.randn_like(p)
        merge.before_step(strategy)
        gradients.append(weight.grad.clone())
        with torch.no_grad():
            for p in strategy.parameters():
                p -= 0.3 * p.grad
        merge.after_step(strategy)
        found = rate(weight.detach(), slow, gradients[-1], gradients[-2] if len(gradients) > 1 else None)
        rates.append(FALLBACK if found.isnan() else float(found))
        slow = slow + rates[-1] * (weight.detach() - slow)
    assert rates[0] == FALLBACK
    assert rates[1] != FALLBACK
    merge.end(strategy)
    torch.testing.assert_close(weight.detach(), slow)
    assert merge.state()["slow"] == {}
    assert merge.measurements()["fallback_share"] < 1


# --- in the loop --------------------------------------------------------------------------------------------------


def last_weights(runner: Any) -> dict[str, Tensor]:
    return copy.deepcopy(runner.strategy.model.state_dict())


@pytest.mark.parametrize("name", ["breadcrumbs", "dynamic_ema"])
def test_it_is_called_around_a_learn_experience_alone(name: str, make_runner: Any, monkeypatch: Any) -> None:
    runner, calls = make_runner(of=SMALL | {"merge": {"name": name, **OPTIONS[name]}}), []
    for owner, hooks in ((runner.merge, ("begin", "end")), (runner.strategy, ("begin", "end"))):
        for hook in hooks:
            original = getattr(type(owner), hook)

            def spy(self: Any, *args: Any, told: Any = (owner is runner.merge, hook), original: Any = original) -> Any:
                calls.append((runner.progress.experience, *told))
                return original(self, *args)

            monkeypatch.setattr(type(owner), hook, spy)
    runner.run()
    first = [(0, False, "begin"), (0, False, "end")]  # skip: 1
    others = [(n, *rest) for n in (1, 2) for rest in ((True, "begin"), (False, "begin"), (True, "end"), (False, "end"))]
    assert calls == first + others
    plain = make_runner(of=SMALL)
    plain.run()
    assert runner.record.matrix[:2] == plain.record.matrix[:2]
    moved = last_weights(runner), last_weights(plain)
    assert not torch.equal(moved[0]["backbone.net.0.0.weight"], moved[1]["backbone.net.0.0.weight"])


@pytest.mark.parametrize("name", OPTIONS)
def test_killed_within_an_experience_and_resumed_it_is_the_same(name: str, make_runner: Any) -> None:
    config = SMALL | {"merge": {"name": name, **OPTIONS[name]}}
    straight = make_runner(of=config)
    straight.run()
    first = make_runner(of=config)
    update = first._update

    def stopping(loss: Any) -> None:
        update(loss)
        first.stop_requested = first.progress.total_steps == 7  # the third step of the second experience

    first._update = stopping
    states: list[Any] = []
    first.save = lambda: states.append(checkpoint.take(snapshot(first), None))
    with pytest.raises(Interrupted):
        first.run()
    torch.manual_seed(12345)
    second = make_runner(of=config)
    torch.manual_seed(12345)
    restore(second, unpacked(states[-1]))
    second.run()
    a, b = last_weights(straight), last_weights(second)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert straight.record.matrix == second.record.matrix


def unpacked(taken: Any) -> Any:
    """A state through the form in which checkpoints hold it."""
    return checkpoint.unflatten(taken.plain, {n: t.clone() for n, t in taken.tensors.items()})


@pytest.mark.parametrize(
    ("name", "strategy", "said"),
    [
        ("lines", "acil", "merge: lines has no meaning for ACIL: its classifier is solved"),
        ("lines", "hnet", "merge: lines has no meaning for HNet: its weights are generated"),
        ("dynamic_ema", "gdumb", "begins anew at each experience"),
        ("breadcrumbs", {"name": "lora", "where": "ffn"}, "trains factors of a change"),
        ("somf", "naive", "somf trains its mask on past samples, and Naive keeps none"),
    ],
)
def test_what_has_no_meaning_is_refused_before_anything_runs(
    name: str, strategy: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        clplat.run(SMALL | {"strategy": strategy, "merge": name}, output=str(tmp_path), quiet=True)
    (fault,) = caught.value.faults
    assert said in fault
    assert "valid: " in fault
    assert not list(tmp_path.iterdir())


def test_options_are_checked_like_those_of_other_parts(tmp_path: Path) -> None:
    for merge, said in (
        ({"name": "lines", "alpha": 1.5}, "merge.alpha: 1.5 is out of range (valid: in [0, 1])"),
        ({"name": "lines", "alfa": 0.5}, "did you mean merge.alpha"),
        ({"name": "line"}, "merge: unknown name 'line' (did you mean lines"),
        ({"name": "lines", "skip": 3}, "no learn experience comes after the first 3"),
    ):
        with pytest.raises(UserError) as caught:
            clplat.run(SMALL | {"merge": merge}, output=str(tmp_path), quiet=True)
        assert said in str(caught.value.faults)


def test_a_merge_of_the_users_own_is_named_by_its_file(tmp_path: Path) -> None:
    file = tmp_path / "halved.py"
    file.write_text(HALVED)
    merge = {"name": f"{file}:Halved", "share": 0.5}
    found = clplat.run(SMALL | {"merge": merge}, output=str(tmp_path / "runs"), quiet=True)
    config = yaml.safe_load((Path(found.run_dir) / "config.yaml").read_text())
    assert config["merge"] == {**merge, "skip": 1}


HALVED = """
from clplat.components.merging._base import Anchored

class Halved(Anchored):
    \"\"\"Half of each change.\"\"\"
    def __init__(self, *, share: float = 0.1, **base):
        super().__init__(**base)
        self.share = share
    def merged(self, strategy, changes):
        return {name: self.share * change for name, change in changes.items()}
"""


def test_a_parameter_thawed_after_growth_is_refused() -> None:
    strategy, merge = learner(), LiNeS()
    weight: nn.Parameter = strategy.model.backbone.net[0][0].weight
    weight.requires_grad_(False)
    merge.begin(strategy)
    weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"thawed backbone\.net\.0\.0\.weight"):
        merge.end(strategy)
