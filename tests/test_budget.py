"""A budget of FLOPs: how many steps it buys, and that it can be kept or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mixed import MIXED, mixed_config

from clplat import Kind
from clplat.config.resolve import resolve
from clplat.config.settings import LoopSettings
from clplat.errors import Interrupted, UserError
from clplat.run import checkpoint, loop, summary
from clplat.run.budget import steps_bought
from clplat.run.build import build
from clplat.run.saving import restore

# GFLOPs of a step and GB of peak memory of FoMo-in-Flux's ViT-B/32, and the steps that its budget of 1420 steps of full
# fine-tuning gives a method in each of 20 updates; its other methods' steps are off by one or two, by their roundings.
PUBLISHED = {
    "full": (63394.7585, 46.59, 1420),
    "locked text": (57254.6, 37.58, 1949),
    "lora": (54479.3, 40.54, 1898),
    "ewc": (6276081.0, 47.21, 14),
    "si": (63394.8, 46.65, 1418),
}


@pytest.mark.parametrize(("flops", "memory", "steps"), PUBLISHED.values(), ids=PUBLISHED)
def test_the_published_budgets(flops: float, memory: float, steps: int) -> None:
    full, most, _ = PUBLISHED["full"]
    assert steps_bought(LoopSettings(max_flops=1420 * full, memory_ratio=memory / most), flops) == steps
    whole = 85 * 534772852898 * 0.8694  # which divides into 84.99999999999999
    assert steps_bought(LoopSettings(max_flops=whole, memory_ratio=0.8694), 534772852898) == 85


def _naive(make_runner: Any, **loop: Any) -> Any:
    """A runner of 80 samples an experience in batches of 8, trained on the first."""
    of = {"strategy": "naive", "backbone": {"name": "mlp", "hidden": [16]}, "stream": f"{MIXED}:MixedLearn", "seed": 1}
    loop = {"batch_size": 8, "max_epochs": 2, "checkpoint_seconds": None, **loop}
    runner = make_runner(of=of, **{f"loop.{key}": value for key, value in loop.items()})
    runner.strategy.double()
    runner._train(runner.stream[0])
    return runner


def test_an_experience_ends_when_the_budget_is_spent(make_runner: Any) -> None:
    whole = _naive(make_runner)
    flops = whole.flops_per_step
    assert whole.progress.steps == 20
    for options, steps in (
        ({"max_flops": 7.5 * flops}, 7),
        ({"max_flops": 7 * flops}, 7),
        ({"max_flops": 7.5 * flops, "memory_ratio": 2.5}, 3),
        ({"max_flops": 7.5 * flops, "accumulate": 2}, 3),
        ({"max_flops": 7.5 * flops, "max_steps": 4}, 4),
        ({"max_flops": 99 * flops}, 20),
    ):
        runner = _naive(make_runner, **options)
        assert runner.progress.steps == steps
        assert runner.spent["train_flops"] * runner.loop.memory_ratio <= runner.loop.max_flops


def test_processes_agree_on_what_a_step_costs(make_runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flops = _naive(make_runner).flops_per_step
    monkeypatch.setattr(loop.Runner, "all_processes", lambda run, counts: {"flops": 3 * counts["flops"]})
    runner = _naive(make_runner, max_flops=15 * flops)
    assert (runner.progress.steps, runner.flops_per_step) == (5, 3 * flops)


def test_learning_and_requests_have_a_budget_each_and_a_resumed_run_keeps_to_it(
    tmp_path: Path, make_runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_runner(**{"loop.stop_after": 4, "loop.eval_every": None})
    costs, taken = [], []
    original = loop.Runner._finish

    def note(run: Any, experience: Any) -> None:
        costs.append(run.flops_per_step)
        taken.append(run.progress.steps)
        original(run, experience)

    monkeypatch.setattr(loop.Runner, "_finish", note)
    plain.run()
    most = 6 * costs[0]
    budget = {"loop.max_flops": most, "loop.stop_after": 4, "loop.eval_every": None}
    expected = [*(int(most / cost) for cost in costs[:3]), taken[3]]
    assert len(set(expected)) == 4
    assert all(2 < bought < steps for bought, steps in zip(expected[:3], taken[:3], strict=True))
    taken.clear()
    whole = make_runner(**budget)
    whole.run()
    assert taken == expected
    assert costs[3] * expected[3] > most  # test data are adapted to as they come
    for number, experience in enumerate(whole.stream):
        whole.progress.experience = number
        assert whole.budgeted == (experience.kind in (Kind.LEARN, Kind.FORGET))

    taken.clear()
    first = make_runner(tmp_path, **budget)
    update = first._update

    def stopping(loss: Any) -> None:
        update(loss)
        first.stop_requested = first.progress.total_steps >= 9  # in the second, its steps counted

    first._update = stopping
    with pytest.raises(Interrupted):
        first.run()
    state, _ = checkpoint.load_newest(tmp_path / "checkpoints")
    second = make_runner(tmp_path, state["metrics_offset"], **budget)
    restore(second, state)
    second.run()
    assert taken == expected
    for name, value in whole.strategy.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second.strategy.state_dict()[name]), name


def test_a_budget_that_can_not_be_kept_is_refused(make_runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flops = _naive(make_runner).flops_per_step
    with pytest.raises(
        UserError, match=r"loop\.max_flops: .* buys 1 steps of first \(valid: ≥ .*, which is what 2 cost"
    ):
        _naive(make_runner, max_flops=1.9 * flops)
    assert _naive(make_runner, max_flops=2 * flops).progress.steps == 2
    monkeypatch.setattr(loop, "step_flops", lambda step: step() or 0)
    with pytest.raises(UserError, match=r"loop\.max_flops: 1e\+09, but no FLOPs are counted in a step of first"):
        _naive(make_runner, max_flops=1e9)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"strategy.schedule": "cosine"}, r"loop\.max_flops: 1e\+09 ends an .* step that strategy\.schedule would"),
        ({"strategy.warmup": 0.1}, r"loop\.max_flops: 1e\+09 ends an .* step that strategy\.warmup would"),
        ({"loop.max_flops": 0.0}, r"loop\.max_flops: 0\.0 is out of range \(valid: > 0\)"),
        ({"loop.memory_ratio": 0.0}, r"loop\.memory_ratio: 0\.0 is out of range \(valid: > 0\)"),
        ({"loop.max_flops": None, "loop.memory_ratio": 0.5}, r"loop\.memory_ratio: 0\.5 has no meaning here"),
    ],
)  # fmt: skip
def test_refuses(overrides: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        build(resolve(config=mixed_config(tmp_path), **{"loop.max_flops": 1e9, **overrides}))


def test_runs_without_a_budget_have_the_digest_they_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digested: list[dict[str, Any]] = []
    monkeypatch.setattr(summary, "to_json", lambda plain, **_: digested.append(plain) or "")
    for budget in (None, 1e9):
        summary.config_sha256(resolve(config=mixed_config(tmp_path), **{"loop.max_flops": budget}))
    assert [{"max_flops", "memory_ratio"} & plain["loop"].keys() for plain in digested] == [
        set(),
        {"max_flops", "memory_ratio"},
    ]
