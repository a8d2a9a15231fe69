"""Runs on a device: what the CPU gives, exact resume, data and augmentation that stay there, NCCL with one process.

`make gpu` runs them. Without a GPU they are skipped; with CLPLAT_TEST_DEVICE=cpu they run there, to show that they run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from on_device import DEVICE, HERE, WHY_NONE, Pictures, config, copies
from torch import Tensor

import clplat
from clplat.errors import Interrupted
from clplat.run.loop import Runner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NONE is not None, reason=str(WHY_NONE))]
AGENT = {"backbone": {"name": "actor_critic", "actor_hidden": [8], "critic_hidden": [8]}, "head": "growing"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # kind: the kinds of the stream, and what handles them
    "learn": ("learn", {"strategy": {"name": "er", "memory": 12, "replay_batch": 4}}),
    "forget": ("learn,forget", {"strategy": "gradient_ascent", "audit.samples": 8, "audit.relearn_steps": 1}),
    "adapt": ("adapt", {"strategy": {"name": "tent", "adapt_optimizer": "sgd", "adapt_lr": 0.01}}),
    "interact": ("interact", {"strategy": "bc", "loop.eval_episodes": 2, **AGENT}),
}


@pytest.fixture(autouse=True)
def whole_mantissas() -> Iterator[None]:
    """Convolutions of a GPU would else round their inputs to 10 bits."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def tensors(run_dir: Path) -> dict[str, Tensor]:
    return {k: v for k, v in clplat.load(run_dir).state_dict().items() if isinstance(v, Tensor)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_each_kind_is_that_of_the_cpu(kind: str, tmp_path: Path) -> None:
    kinds, keys = KINDS[kind]
    stream = {"name": f"{HERE}:Tiny", "kinds": kinds}
    there, here = (
        clplat.run(config(tmp_path / str(n), device, stream=stream, **keys), quiet=True)
        for n, device in enumerate((DEVICE, "cpu"))
    )
    found, expected = tensors(there.run_dir), tensors(here.run_dir)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if "seed" in name or "generator" in name:
            continue  # of a device's own
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert there.accuracy_matrix == here.accuracy_matrix
    assert [e["kind"] for e in there.summary["experiences"]][-1] == kind


@pytest.mark.parametrize("stop_at", [17])
def test_a_resumed_run_is_the_run_bit_for_bit(stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's own random numbers and the optimizer's moments go on."""
    keys = {"strategy": {"name": f"{HERE}:Noisy", "memory": 12, "replay_batch": 4, "optimizer": "adamw"}}
    straight = clplat.run(config(tmp_path / "a", **keys), quiet=True)
    between = Runner._between_steps

    def asking(self: Runner, experience: Any) -> None:
        self.stop_requested = self.progress.total_steps >= stop_at
        between(self, experience)

    with monkeypatch.context() as patched:
        patched.setattr(Runner, "_between_steps", asking)
        with pytest.raises(Interrupted):
            clplat.run(config(tmp_path / "b", **keys), quiet=True)
    (summary,) = (tmp_path / "b").rglob("summary.json")
    torch.manual_seed(12345)
    resumed = clplat.resume(summary.parent, quiet=True)
    assert same(tensors(resumed.run_dir), tensors(straight.run_dir))


def test_data_and_augmentation_are_on_the_device_and_no_batch_is_copied_there(make_runner: Any) -> None:
    """Three times as many steps of one epoch copy as often."""
    if copies(lambda: torch.zeros(8).to(DEVICE)) != (DEVICE != "cpu"):
        pytest.skip("the profiler sees no copies to the device here")
    met = []

    def steps(count: int) -> int:
        runner = make_runner(of=config(Path("unused"), **{"loop.max_steps": count}))
        augment = runner.stream.augment
        runner.stream.augment = lambda images: met.append(images) or augment(images)
        return copies(runner.run)

    assert steps(8) == steps(24)
    assert {images.device.type for images in met} == {DEVICE}
    assert len(met) == 32
    stream = Pictures().to(torch.device(DEVICE))
    assert {t.device.type for t in (stream[0].train.inputs, stream[0].train.labels)} == {DEVICE}


def test_one_process_of_nccl_is_the_run_without_it(tmp_path: Path) -> None:
    """gloo on the CPU."""
    keys = {"strategy": f"{HERE}:Told", "loop.max_steps": 6}
    joined = clplat.run(config(tmp_path / "a", **keys, **{"fabric.strategy": "ddp"}), quiet=True)
    alone = clplat.run(config(tmp_path / "b", **keys | {"strategy": "naive"}), quiet=True)
    torch.testing.assert_close(tensors(joined.run_dir), tensors(alone.run_dir), rtol=1e-5, atol=1e-7)
    lines = [json.loads(line)["metrics"] for line in (joined.run_dir / "metrics.jsonl").read_text().splitlines()]
    told = [line["strategy/nccl"] for line in lines if "strategy/nccl" in line]
    assert told == [float(DEVICE != "cpu")]


def test_bf16_mixed_steps_are_near_those_in_32_bits(tmp_path: Path) -> None:
    """Parameters stay in 32 bits; a step differs by what 8 bits of mantissa lose of its gradient."""
    keys = {"loop.max_steps": 1, "strategy.lr": 0.5}
    runs = [
        clplat.run(config(tmp_path / precision, **keys, **{"fabric.precision": precision}), quiet=True)
        for precision in ("bf16-mixed", "32-true")
    ]
    found, expected = (tensors(run.run_dir) for run in runs)
    assert {value.dtype for value in found.values()} == {value.dtype for value in expected.values()}
    assert not same(found, expected)
    step = max(float((value - found[name]).abs().max()) for name, value in expected.items())
    moved = tensors(clplat.run(config(tmp_path / "none", **keys | {"strategy.lr": 1e-30}), quiet=True).run_dir)
    largest = max(float((value - moved[name]).abs().max()) for name, value in expected.items())
    assert step <= 0.1 * largest, (step, largest)
