"""Where a study is kept: what can't be used is told in one line."""

import json
import sqlite3
import subprocess
import sys

import pytest
from sweeping import objective, write

from clplat.cli import main
from clplat.errors import UserError
from clplat.sweep import trials
from clplat.sweep.owners import is_gone, me
from clplat.sweep.plan import read_plan
from clplat.sweep.store import open_study
from clplat.sweep.study import sweep


@pytest.mark.parametrize(
    ("storage", "fault"),
    [
        ("sqlite:////nowhere/at/all/study.db", r"^sweep\.storage: 'sqlite:////nowhere.*unable to open database file"),
        ("postgresql://localhost/none", r"^sweep\.storage: 'postgresql://.*(needs the Python package|can't be used)"),
        ("wrong://x", r"^sweep\.storage: 'wrong://x' can't be used: .*wrong"),
        ("{folder}", r"^sweep\.storage: .*can't be used: .*directory"),
        ("{folder}/text.log", r"^sweep\.storage: .* holds no study that can be read"),
        ("sqlite:///{folder}/text.log", r"^sweep\.storage: .*not a database"),
        ("{folder}/text.log/study.log", r"^sweep\.storage: .*can't be used"),
    ],
)
def test_a_storage_that_is_none(tmp_path, storage, fault):
    (tmp_path / "text.log").write_text("once upon a time, long ago in a far country\n" * 9)
    with pytest.raises(UserError, match=fault) as caught:
        sweep(write(tmp_path, {"storage": storage.replace("{folder}", str(tmp_path))}), run=objective, quiet=True)
    assert len(caught.value.faults) == 1
    assert "\n" not in caught.value.faults[0]


def test_a_locked_database(tmp_path):
    path = write(tmp_path, {"storage": f"sqlite:///{tmp_path}/study.db?timeout=0.05", "trials": 1})
    sweep(path, run=objective, quiet=True)
    holder = sqlite3.connect(tmp_path / "study.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError, match=r"^sweep\.storage: .* is locked by another program"):
        sweep(path, run=objective, quiet=True, trials=2)
    holder.execute("ROLLBACK")
    holder.close()
    assert len(sweep(path, run=objective, quiet=True, trials=2).trials) == 2


def test_a_study_of_another_number_of_metrics(tmp_path, capsys):
    sweep(write(tmp_path), run=objective, quiet=True)
    other = write(tmp_path, {"metric": ["plasticity", "stability"]})
    with pytest.raises(UserError, match=r"^sweep\.study: 'demo' in .* has another configuration or space"):
        sweep(other, run=objective)
    write(tmp_path, {"sampler": "cma"})
    assert main(["validate", str(other)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_study_that_no_sweep_made(tmp_path):
    import optuna

    study = optuna.create_study(study_name="demo", storage=f"sqlite:///{tmp_path}/study.db", direction="maximize")
    study.tell(study.ask(), 1.0)
    with pytest.raises(UserError, match="holds 1 trials that no sweep made"):
        sweep(write(tmp_path, {"storage": f"sqlite:///{tmp_path}/study.db"}), run=objective)


def test_a_process_is_known_by_its_number_and_its_beginning():
    mine = me()
    assert not is_gone(mine)
    machine, pid, began = mine.rsplit(":", 2)
    assert is_gone(f"{machine}:{pid}:1{began}")  # of the same number, and an earlier one
    assert not is_gone(f"elsewhere/1:{pid}:1{began}")
    code = "from clplat.sweep.owners import me; print(me())"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    name = other.stdout.readline().strip()
    other.stdout.close()
    other.kill()
    import os

    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(name)  # ended, and its parent has not looked yet
    other.wait()
    assert is_gone(name)


def test_a_trial_left_by_an_ended_process_is_taken_up_at_once(tmp_path):
    """No matter how long the grace: another command on the same machine looks for the process."""
    path = write(tmp_path, {"trials": 2, "grace_seconds": 10_000})
    code = "import os, sys; from clplat.sweep.study import sweep; sweep(sys.argv[1], run=lambda c, d: os._exit(9))"
    assert subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True).returncode == 9
    result = sweep(path, run=objective, quiet=True)
    assert [t["state"] for t in result.trials] == ["fail", "complete", "complete"]
    assert result.trials[1]["repeat_of"] == 0
    assert result.trials[1]["default"]
    assert json.loads((result.folder / "sweep.json").read_text())["trials"] == result.trials


def test_a_trial_whose_worker_died_while_it_gave_it_back_is_repeated_once(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "UNOWNED", 0.0)
    path = write(tmp_path, {"trials": 2})
    plan = read_plan(path, [], None)
    study = open_study(plan, 0)
    trials.enqueue(study, plan, {"strategy.lr": 0.05, "loop.batch_size": 16}, "default", default=True)
    trials.tell(study, study.ask().number, None)  # and did not come to queue it again
    for _ in range(2):
        trials.Reaper(study, plan)()
    study.add_trial(study.get_trials()[1])  # by another at the same time
    result = sweep(path, run=objective, quiet=True)
    assert [(t["state"], t["repeat_of"], t["default"]) for t in result.trials] == [
        ("fail", None, True), ("complete", 0, True), ("complete", None, False)
    ]  # fmt: skip


def test_a_storage_that_fails_is_no_fault_of_the_trial(tmp_path):
    """It is told, the trial goes back, and the same process goes on with it."""
    from sqlalchemy.exc import ProgrammingError

    def fails(config, run_dir):
        raise ProgrammingError("", {}, Exception("gone"))

    path = write(tmp_path, {"trials": 1, "storage": f"sqlite:///{tmp_path}/study.db"})
    with pytest.raises(UserError, match=r"^sweep\.storage: .* can't be used any more: gone \(the same command goes on"):
        sweep(path, run=fails, quiet=True)
    result = sweep(path, run=objective, quiet=True)
    assert [t["state"] for t in result.trials if t["repeat_of"] is not None] == ["complete"]
    assert [t["reason"] for t in result.trials] == [None] * len(result.trials)
