"""A run whose replay memory is in a file is the run that has it in memory, killed or not; and what it leaves there."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from killing import ENVIRONMENT

import clplat
from clplat.cli import main
from clplat.config.resolve import resolve
from clplat.errors import MissingError, UserError
from clplat.run import filing
from clplat.run.build import build, build_stream

LOOP = {"max_epochs": 1, "batch_size": 40, "checkpoint_every": 5, "representation": False}


def config(folder: Path, strategy: str = "er", on_disk: bool = True, **more: Any) -> dict[str, Any]:
    return {"strategy": {"name": strategy, "memory": 60}, "backbone": "mlp", "stream": {"name": "digits"}, "seed": 1,
            "loop": LOOP | {"memory_on_disk": on_disk}, "tracking": {"enabled": False}, "quiet": True, "name": "x",
            "output": str(folder), **more}  # fmt: skip


def same(one: Path, other: Path) -> None:
    """Two runs end alike: figures, weights, what is held and what it takes."""
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (one, other))
    assert a["accuracy_matrix"] == b["accuracy_matrix"]
    assert a["cost"]["stored_bytes"] == b["cost"]["stored_bytes"]
    first, second = clplat.load(one), clplat.load(other)
    weights = second.model.state_dict()
    assert all(torch.equal(t, weights[k]) for k, t in first.model.state_dict().items())
    for x, y in zip((*first.memory.everything(), *first.memory.sample(9)),
                    (*second.memory.everything(), *second.memory.sample(9)), strict=True):  # fmt: skip
        assert torch.equal(x.nan_to_num(), y.nan_to_num())  # logits of classes met later are NaN


@pytest.mark.parametrize("strategy", ["er", "derpp", "gdumb"])
def test_it_is_the_run_in_memory(tmp_path, strategy):
    plain = clplat.run(**config(tmp_path / "a", strategy, on_disk=False)).run_dir
    filed = clplat.run(**config(tmp_path / "b", strategy)).run_dir
    same(plain, filed)
    assert not (plain / "memory").exists()
    row = 64 * 4
    assert 60 * row <= (filed / "memory" / "memory.0.rows").stat().st_size <= 4 * 60 * row
    small, large = (sorted(f.glob("checkpoints/*/tensors.safetensors"))[-1].stat().st_size for f in (filed, plain))
    assert large - small > 55 * row  # which checkpoints do without
    moved = shutil.move(filed, tmp_path / "elsewhere")
    same(plain, moved)


def test_stopped_and_resumed(tmp_path, monkeypatch):
    straight = clplat.run(**config(tmp_path / "a")).run_dir
    from clplat.run.loop import Runner

    original = Runner._between_steps

    def stop(self, experience):
        self.stop_requested = self.progress.experience == 2 and self.progress.steps == 3
        original(self, experience)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_between_steps", stop)
        with pytest.raises(clplat.errors.Interrupted):
            clplat.run(**config(tmp_path / "b"))
    (folder,) = (tmp_path / "b" / "x").iterdir()
    away = shutil.move(folder / "memory", tmp_path / "away")
    with pytest.raises(MissingError, match=r"memory\.0\.rows is missing: put back the file of this run's memory"):
        clplat.resume(folder, quiet=True)
    shutil.rmtree(folder / "memory")
    shutil.move(away, folder / "memory")
    clplat.resume(folder, quiet=True)
    same(straight, folder)


KILLER = """
import os, signal, sys
import torch
from clplat.cli import main
countdown, backward = int(sys.argv[1]), torch.Tensor.backward

def counted(*args, **kwargs):
    global countdown
    countdown -= 1
    if countdown == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return backward(*args, **kwargs)

torch.Tensor.backward = counted
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("every", [5, None], ids=["every 5 steps", "beside the loop"])
def test_killed_it_resumes_exactly(tmp_path, every):
    own = config(tmp_path / "b")
    own["loop"] |= {"checkpoint_every": every, "checkpoint_seconds": None if every else 1e-3}
    del own["quiet"]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(own))
    straight = clplat.run({**own, "output": str(tmp_path / "a")}, quiet=True).run_dir
    command = [sys.executable, "-c", KILLER, "24"]  # in the third experience, four steps after a checkpoint
    done = subprocess.run([*command, "run", str(tmp_path / "c.yaml"), "--quiet"], env=ENVIRONMENT, timeout=200)
    assert done.returncode == -signal.SIGKILL
    (folder,) = (tmp_path / "b" / "x").iterdir()
    clplat.resume(folder, quiet=True)
    same(straight, folder)


@pytest.mark.slow
def test_two_processes(tmp_path):
    two = {"fabric": {"devices": 2, "accelerator": "cpu"}}
    plain = clplat.run(**config(tmp_path / "a", on_disk=False, **two)).run_dir
    filed = clplat.run(**config(tmp_path / "b", **two)).run_dir
    same(plain, filed)
    one, other = (filed / "memory" / f"memory.{rank}.rows" for rank in (0, 1))
    assert one.read_bytes() == other.read_bytes()


def test_what_is_erased_leaves_the_file_with_the_last_checkpoint_that_has_it(tmp_path):
    stream = {"name": "unlearning", "base": "digits", "requests": ["class:1"]}
    run_dir = clplat.run(**config(tmp_path, "finetune_retained", stream=stream)).run_dir

    def held(experience) -> int:
        content, (inputs, _) = (run_dir / "memory" / "memory.0.rows").read_bytes(), experience.train.all()
        return sum(x.numpy().tobytes() in content for x in inputs)

    made = build_stream(resolve(config=run_dir / "config.yaml"))
    assert made[-1].name.startswith("forget")
    assert held(made[-1]) == 0
    assert held(made[0]) > 0
    clplat.forget(run_dir, "class:5")
    asked = next(e for e in made if 5 in e.classes)
    five = asked.train.subset((asked.train.targets() == 5).nonzero()[:, 0])
    kept = sorted((run_dir / "checkpoints").iterdir())
    assert len(kept) == 2
    traces = json.loads((run_dir / "erasure.json").read_text())["traces"]
    assert any(t["path"] == "memory/memory.0.rows" for t in traces)
    assert main(["forget", str(run_dir), "--purge", "-q"]) == 0
    content = (run_dir / "memory" / "memory.0.rows").read_bytes()
    assert not any(x.numpy().tobytes() in content for x in five.all()[0])
    assert json.loads((run_dir / "erasure.json").read_text())["traces"] == []
    assert clplat.load(run_dir).memory.everything()[0].abs().sum() > 0


@pytest.mark.parametrize("strategy", ["naive", "icarl", "joint"])
def test_refused_where_there_is_no_such_memory(strategy):
    own = {"strategy": strategy, "backbone": "mlp", "stream": "digits", "loop": {"memory_on_disk": True}}
    with pytest.raises(UserError, match=r"loop\.memory_on_disk: true, but \w+ has no memory of samples .*\(valid: fal"):
        build(resolve(config=own))


def test_it_is_no_part_of_what_a_run_is_compared_by(tmp_path):
    from clplat.run.summary import config_sha256

    one, other = (resolve(config={"strategy": "er", "loop": {"memory_on_disk": held}}) for held in (True, False))
    assert config_sha256(one) == config_sha256(other)


def test_refused_where_processes_write_apart():
    own = {"strategy": "er", "backbone": "vit_micro", "stream": "digits", "loop": {"memory_on_disk": True},
           "fabric": {"strategy": "fsdp", "devices": 2, "accelerator": "cpu"}}  # fmt: skip
    with pytest.raises(UserError, match=r"loop\.memory_on_disk: true, but fabric\.strategy is fsdp.*\(valid: false\)"):
        build(resolve(config=own))


def test_files_of_another_number_of_processes_are_not_gone_on_with(tmp_path):
    given = config(tmp_path)
    del given["quiet"]
    own, fabric = resolve(config=given), SimpleNamespace(world_size=1, global_rank=0)
    _, strategy = build(own)
    filing.prepare(own, strategy, tmp_path, fabric, None)  # a run that begins takes the processes that there are
    with pytest.raises(UserError, match=r"2 processes have a file each, and 1 would go on \(valid: as many as before"):
        filing.prepare(own, strategy, tmp_path, fabric, {"processes": [{}, {}]})
