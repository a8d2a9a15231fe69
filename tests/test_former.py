"""A grid given again uses what is complete, goes on with what is partial, and nothing of another kind."""

import json
import os
from pathlib import Path

import pytest
import yaml

from clplat import api
from clplat.cli import main
from clplat.config.resolve import expand
from clplat.errors import Interrupted
from clplat.run import former as module
from clplat.run.former import former

GRID = {"stream": {"name": "digits", "experiences": 2}, "backbone": "mlp", "seeds": [0, 1],
        "loop": {"max_steps": 4, "representation": False}, "tracking": {"enabled": False},
        "runs": {"a": {"strategy": "naive"}, "b": {"strategy": {"name": "naive", "lr": 0.5}}}}  # fmt: skip


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({**GRID, "output": str(tmp_path / "runs")}))
    return path


def run_dirs(grid: Path) -> list[Path]:
    return sorted(f.parent for f in (grid.parent / "runs").rglob("config.yaml"))


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int, step: int) -> None:
    """Ask run `number` to stop after `step` steps, as Ctrl-C does."""
    from clplat.run.loop import Runner

    real, runs = Runner._between_steps, list[int]()

    def between(self, experience):
        if id(self) not in runs:
            runs.append(id(self))
            self.kept = runs
        self.stop_requested |= len(runs) == number and self.progress.total_steps == step
        real(self, experience)

    monkeypatch.setattr(Runner, "_between_steps", between)


def test_an_interrupted_grid_goes_on(grid, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, 2)
        assert main(["run", str(grid)]) == 130
    first = run_dirs(grid)
    err = capsys.readouterr().err.splitlines()
    assert len(first) == 3
    partial = next(d for d in first if json.loads((d / "summary.json").read_text())["status"] != "complete")
    assert err[-2].endswith(f"; go on: clplat run --resume {partial}")
    assert err[-1] == "clplat: run 3 of 4: the same command goes on here"
    before = {d: (d / "summary.json").read_bytes() for d in first if d != partial}

    assert main(["run", str(grid)]) == 0
    err = capsys.readouterr().err
    assert "clplat: 1 of 4 runs are gone on with (--fresh begins anew)" in err
    assert "clplat: 2 of 4 runs are complete already and used again (--fresh runs all anew)" in err
    assert f"[3/4] grid/b, seed 0: going on in {partial}" in err
    assert all(f"complete in {d}" in err for d in before)
    assert len(run_dirs(grid)) == 4
    assert {d: (d / "summary.json").read_bytes() for d in before} == before
    assert json.loads((partial / "summary.json").read_text())["status"] == "complete"

    assert main(["run", str(grid), "--fresh"]) == 0
    assert len(run_dirs(grid)) == 8


def test_only_the_same_configuration_counts(grid):
    (config, *_), (other, *_) = expand([], grid), expand(["--strategy.lr", "0.3"], grid)
    run = api.run_config(config, quiet=True).run_dir
    found = former(config)
    assert (found.run_dir, found.status) == (run, "complete")
    assert former(other) is None
    assert former(expand(["--audit.samples", "7"], grid)[0]) is None
    assert former(expand(["--tracking.experiment", "other"], grid)[0]).status == "complete"


def test_what_can_not_be_used_says_why(grid, monkeypatch):
    config = expand([], grid)[0]
    run = api.run_config(config, quiet=True).run_dir
    with monkeypatch.context() as patch:
        patch.setattr(module, "git_commit", lambda: "0" * 40)
        found = former(config)
        assert (found.status, found.reason[:24]) == ("unusable", "it is of git_commit " + str(_commit(run))[:4])
    source = Path(module.__file__)
    began = (run / "config.yaml").stat().st_mtime
    with monkeypatch.context() as patch:
        patch.setattr(module, "_sources", lambda folder: iter([source]))
        os.utime(run / "config.yaml", (0, 0))
        assert former(config).reason == f"{source} was changed since it began"
        os.utime(run / "config.yaml", (began, began))
    (run / "metrics.jsonl").write_text("")
    assert "metrics.jsonl is damaged" in former(config).reason


def _commit(run: Path) -> str | None:
    return json.loads((run / "summary.json").read_text())["git_commit"]


def test_the_sources_of_a_run_are_those_of_platform_and_user(grid, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("from clplat.strategies.naive import Naive\n\n\nclass Mine(Naive):\n    pass\n")
    config = expand(["--strategy", f"{mine}:Mine"], grid)[0]
    run = api.run_config(config, quiet=True).run_dir
    found = {path.name for path in module._sources(run)}
    assert {"mine.py", "loop.py", "er.py", "digits.py"} <= found
    later = (run / "config.yaml").stat().st_mtime + 10
    os.utime(mine, (later, later))
    assert former(config).reason == f"{mine} was changed since it began"


def test_a_single_run_stopped_names_its_folder_and_the_way_on(grid, monkeypatch):
    interrupt_at(monkeypatch, 1, 1)
    with pytest.raises(Interrupted, match=r"after step 1; go on: clplat run --resume .*/runs/grid/a/.*-0$"):
        api.run_config(expand([], grid)[0], quiet=True)
