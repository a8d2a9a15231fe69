"""torchrun: a killed process restarts the group, and the run goes on; on fewer processes with the same batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import clplat
from clplat.config.resolve import resolve
from clplat.config.settings import FabricSettings
from clplat.errors import UserError
from clplat.lightning import Fabric
from clplat.run import elastic
from clplat.run.launch import make_fabric
from clplat.run.rundir import make_run_dir

# torchrun's own store keeps addresses of the attempt before, and the next sometimes takes them (pytorch issue 135712).
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
# The second process of the first attempt is killed in the second experience, two steps after a checkpoint.
KILLED = """
import os, shutil, signal
from clplat.strategies.naive import Naive

calls = []

class Killed(Naive):
    '''Fine-tuning.'''

    def training_step(self, batch, batch_idx):
        calls.append(batch_idx)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT"), os.environ.get("RANK")
        if attempt == ("0", "1") and len(calls) == 18:
            shutil.copytree("torchrun", "copy")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_process_restarts_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    config = {
        "strategy": f"{tmp_path / 'killed.py'}:Killed", "stream": {"name": "digits", "experiences": 2}, "seed": 3,
        "backbone": {"name": "mlp", "hidden": []}, "loop": {"max_steps": 12, "batch_size": 16, "checkpoint_every": 4},
        "fabric": {"devices": 2, "accelerator": "cpu"}, "tracking": {"enabled": False}, "name": "run",
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"output": "torchrun"}))
    straight = clplat.run(config, output=str(tmp_path / "straight"), quiet=True)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    ended = subprocess.run(
        [sys.executable, *torchrun, "-m", "clplat", "run", "config.yaml", "--quiet"], cwd=tmp_path, text=True,
        env=os.environ | ENVIRONMENT, capture_output=True, timeout=250, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "copy").is_dir()  # so that one was killed
    (folder,) = (tmp_path / "torchrun" / "run").iterdir()
    found = json.loads((folder / "summary.json").read_text())
    assert found["status"] == "complete"
    assert (found["metrics"], found["accuracy_matrix"]) == (straight.metrics, straight.accuracy_matrix)
    expected = clplat.load(straight.run_dir).state_dict()
    again = clplat.load(folder).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in expected.items())

    # What was left when it was killed, gone on with by a group of one.
    for key, value in {"TORCHELASTIC_RUN_ID": "later", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0",
                       "LOCAL_RANK": "0", "GROUP_RANK": "0"}.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    (left,) = (tmp_path / "copy" / "run").iterdir()
    alone = clplat.resume(left, quiet=True)
    assert alone.summary["stream_notes"][-1] == "on 1 process from step 16 on, where it was 2"
    weights = clplat.load(left).state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)


def test_machines_that_nothing_names_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert not elastic.from_outside(1)
    with pytest.raises(UserError, match=r"fabric\.num_nodes: 2, but nothing says where the other machines are"):
        make_fabric(FabricSettings(accelerator="cpu", num_nodes=2))
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert elastic.from_outside(2)


def test_fewer_processes_share_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(["--strategy", "naive", "--fabric.devices", "4", "--loop.batch_size", "6"])
    assert elastic.shared(config) is config
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    for there, batch in (("3", 8), ("2", 12), ("1", 24)):
        monkeypatch.setenv("WORLD_SIZE", there)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", there)
        now = elastic.shared(config)
        assert (now.fabric.devices, now.fabric.num_nodes, now.loop.batch_size) == (int(there), 1, batch)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert elastic.shared(config) is config
    config.loop.batch_size = 7
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"loop\.batch_size: 7 on each of 4 processes can't be shared by the 3"):
        elastic.shared(config)


def test_nothing_that_processes_held_is_counted_twice_or_left_out() -> None:
    def held(number: float) -> dict[str, object]:
        online, losses = {"correct": number, "seen": 10.0}, [torch.tensor(number), torch.tensor(0.0)]
        return {"rng": number, "online": online, "losses": losses, "predictions": {"rows": torch.tensor([number])}}

    three = [held(n) for n in (1.0, 2.0, 4.0)]
    for world in (1, 2, 3, 4):
        each = [elastic.inherited(three, rank, world) for rank in range(world)]
        assert sum(own["online"]["correct"] for own in each) == 7
        assert sum(own["online"]["seen"] for own in each) == 30
        assert sorted(float(p["rows"]) for own in each for p in own["predictions"]) == [1, 2, 4]
    assert elastic.inherited(three, 1, 3) == {**three[1], "predictions": [three[1]["predictions"]]}
    assert elastic.inherited(three, 0, 2)["losses"] == [torch.tensor(2.5), torch.tensor(0.0)]


def test_a_job_of_torchrun_finds_the_run_that_it_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    config = resolve(["--strategy", "naive", "--output", str(tmp_path)])
    first, second = (make_run_dir(config) for _ in range(2))
    elastic.mark(first)  # outside of torchrun it leaves nothing
    assert elastic.begun(fabric, config) is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    elastic.mark(first)
    assert elastic.begun(fabric, config) is None
    for folder, job in ((first, "a"), (second, "b")):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        elastic.mark(folder)
    assert elastic.begun(fabric, config) == second
    assert elastic.begun(fabric, resolve(["--strategy", "naive", "--seed", "1", "--output", str(tmp_path)])) is None
    longer = resolve(["--strategy", "naive", "--loop.max_epochs", "2", "--output", str(tmp_path)])
    assert elastic.begun(fabric, longer) is None
    for job, run in (("a", first), ("c", None)):  # another job has begun another one, or none
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        assert elastic.begun(fabric, config) == run
