"""Sweeps with a made-up objective: the plan's faults, the choice, and workers that die."""

import json
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from sweeping import BASE, SPACE, objective, write

import clplat
from clplat.cli import main
from clplat.config.resolve import resolve
from clplat.errors import MissingError, UserError
from clplat.launchers.jobs import lost
from clplat.sweep.plan import nested, read_plan
from clplat.sweep.store import open_study
from clplat.sweep.study import sweep
from clplat.sweep.trials import enqueue, work
from clplat.sweep.workers import employ


def test_the_room_is_the_function(tmp_path):
    """`clplat.sweep(...)`, and `clplat.sweep.study` beside it."""
    result = clplat.sweep(write(tmp_path, {"trials": 2}), run=objective, quiet=True)
    assert len(result.trials) == 2
    assert clplat.sweep.study.sweep is sweep


def test_finds_the_best_and_writes_a_configuration_that_runs(tmp_path, capsys):
    seen = []

    def run(config, run_dir):
        seen.append((config, run_dir))
        return objective(config, run_dir)

    result = sweep(write(tmp_path, {"trials": 12, "seeds": [0, 4], "give_up": "never"}), run=run)
    assert len(result.trials) == 12
    assert len(seen) == 24
    assert all(c["loop"]["evaluate_on"] == "valid" for c, _ in seen)
    assert len({d for _, d in seen}) == 24
    assert {c["seed"] for c, _ in seen} == {0, 4}
    assert all(1e-4 <= c["strategy"]["lr"] <= 1e-1 and c["strategy"]["name"] == "naive" for c, _ in seen)
    assert all(isinstance(c["loop"]["batch_size"], int) for c, _ in seen)
    values = [t["value"] for t in result.trials]
    assert result.best_value == max(values)
    expected = max(sum(objective(c, d)["metrics"]["average_accuracy"] for c, d in seen[i : i + 2]) / 2
                   for i in range(0, 24, 2))  # fmt: skip
    assert result.best_value == pytest.approx(expected)

    best = yaml.safe_load(result.best_config.read_text())
    assert "sweep" not in best
    assert "evaluate_on" not in best["loop"]  # the final run is on test data
    assert best["loop"]["batch_size"] == result.best_params["loop.batch_size"]
    assert best["strategy"] == {"name": "naive", "lr": result.best_params["strategy.lr"]}
    facts = json.loads((result.folder / "sweep.json").read_text())
    assert facts["evaluated_on"] == "valid"
    assert facts["best"]["value"] == result.best_value
    assert len(facts["trials"]) == 12
    assert facts["front"] == result.front == []  # of one metric there is none
    assert "run it: clplat run" in capsys.readouterr().out


def test_a_result_is_shown_in_a_line_and_as_a_frame(tmp_path):
    result = sweep(write(tmp_path), run=objective, quiet=True)
    said = repr(result)
    assert "\n" not in said
    assert f"of 4 trials; run it: {result.best_config}" in said
    frame = result.frame()
    assert frame["value"].max() == result.best_value
    best = frame.loc[frame["value"].idxmax()]
    assert {k: best[k] for k in result.best_params} == result.best_params
    assert result._repr_html_().count("<tr") == 5


def test_smaller_is_better_where_asked(tmp_path):
    result = sweep(write(tmp_path, {"metric": "forgetting", "direction": "minimize"}), quiet=True,
                   run=lambda c, d: {"metrics": {"forgetting": c["loop"]["batch_size"] / 100}})  # fmt: skip
    assert result.best_value == min(t["value"] for t in result.trials)


def test_a_second_call_adds_only_what_is_missing(tmp_path):
    path = write(tmp_path)
    sweep(path, run=objective, quiet=True)
    sweep(path, trials=6, run=objective, quiet=True)
    result = sweep(path, trials=8, run=objective, quiet=True, join=True)
    assert len(result.trials) == 8
    assert len({t["params"]["strategy.lr"] for t in result.trials}) == 8


def test_one_worker_alone_draws_the_same_values_each_time(tmp_path):
    drawn = []
    for name in ("a", "b"):
        result = sweep(write(tmp_path, {"study": name}), run=objective, quiet=True)
        drawn.append([t["params"] for t in result.trials])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_samplers(tmp_path, sampler):
    space = {**SPACE, "strategy.kind": {"choices": ["a", None, 3]}, "strategy.p": {"low": 0, "high": 1.0, "step": 0.25}}
    section = {"sampler": sampler, "trials": 12, "space": space}
    result = sweep(write(tmp_path, section), run=objective, quiet=True)
    assert {t["params"]["strategy.p"] for t in result.trials} <= {0, 0.25, 0.5, 0.75, 1}
    assert {t["params"]["strategy.kind"] for t in result.trials} <= {"a", None, 3}


def test_a_failing_trial_is_told_and_does_not_end_the_search(tmp_path, capsys):
    calls = []

    def run(config, run_dir):
        calls.append(run_dir)
        if len(calls) == 2:
            raise FloatingPointError("loss is inf")
        if len(calls) == 3:
            return {"metrics": {"average_accuracy": None}, "why_null": {"average_accuracy": "no learn experience"}}
        return objective(config, run_dir)

    result = sweep(write(tmp_path), run=run)
    assert [t["state"] for t in result.trials] == ["complete", "fail", "fail", "complete"]
    assert result.trials[1]["reason"] == "FloatingPointError: loss is inf"
    assert "no learn experience" in result.trials[2]["reason"]
    assert "failed (FloatingPointError" in capsys.readouterr().out


def test_no_success_at_all_is_the_users_to_mend(tmp_path):
    def run(config, run_dir):
        raise UserError("strategy.rank: 99 is out of range")

    with pytest.raises(UserError, match=r"none of 4 trials succeeded: UserError: strategy\.rank: 99"):
        sweep(write(tmp_path), run=run, quiet=True)


def test_an_interrupted_trial_is_given_back_and_goes_on_in_its_folder(tmp_path):
    seen = []

    def run(config, run_dir):
        seen.append((config, run_dir))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return objective(config, run_dir)

    path = write(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        sweep(path, run=run, quiet=True)
    result = sweep(path, run=run, quiet=True)
    assert seen[1] == seen[2]
    assert [t["state"] for t in result.trials].count("complete") == 4
    assert [t["repeat_of"] for t in result.trials if t["repeat_of"] is not None] == [1]


def test_missing_data_end_the_search_at_once(tmp_path):
    def run(config, run_dir):
        raise MissingError("stream: put it there")

    with pytest.raises(MissingError):
        sweep(write(tmp_path), run=run, quiet=True)


# --- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "changes", "keys", "fault"),
    [
        ({}, {"loop": {"evaluate_on": "test"}}, [], "test labels"),
        ({}, {"loop.evaluate_on": "test"}, [], "test labels"),
        ({}, {}, ["--loop.evaluate_on", "test"], "test labels"),
        ({}, {}, ["--loop.evaluate_on=test"], "test labels"),
        ({"space": {"loop.evaluate_on": {"choices": ["test", "valid"]}}}, {}, [], "is not searched"),
        ({"space": {"seed": {"low": 0, "high": 9}}}, {}, [], "is not searched"),
        ({"space": {"stream.experiences": {"low": 2, "high": 9}}}, {}, [], "is not searched"),
        ({"space": {}}, {}, [], r"sweep\.space: is empty"),
        ({"space": ["strategy.lr"]}, {}, [], r"sweep\.space: \['strategy\.lr'\] is not a mapping"),
        ({"space": {"strategy.lr": {"low": 1, "high": 0}}}, {}, [], "low 1 is not below high 0"),
        ({"space": {"strategy.lr": {"low": 0, "high": 1, "log": True}}}, {}, [], r"valid with log: > 0"),
        ({"space": {"strategy.lr": {"low": "x", "high": 1}}}, {}, [], r"lr\.low: 'x' is not a number"),
        (
            {"space": {"strategy.lr": {"lo": 0, "high": 1}}},
            {},
            [],
            r"lr\.lo: no such key \(valid: low, high",
        ),
        ({"space": {"strategy.lr": 3}}, {}, [], r"3 is not \{low"),
        ({}, {}, ["--strategy.lr", "0.1"], r"is searched, so --strategy\.lr has no effect"),
        ({"metric": "average_acuracy"}, {}, [], "did you mean average_accuracy"),
        ({"direction": "up"}, {}, [], r"'up' is not valid \(valid: maximize, minimize\)"),
        ({"sampler": "cma"}, {}, [], "valid: auto, tpe, gp, nsgaii, random, grid"),
        ({"trials": 0}, {}, [], r"sweep\.trials: 0 is out of range"),
        ({"seeds": 3}, {}, [], r"sweep\.seeds: 3 is not a list"),
        ({"grace_seconds": -1}, {}, [], r"grace_seconds: -1 is out of range"),
        ({"sampeler": "tpe"}, {}, [], r"sweep\.sampeler: no such key"),
        (
            {"pruner": "asha"},
            {},
            [],
            r"sweep\.pruner: 'asha' is not valid \(valid: none, hyperband",
        ),
        ({"pruner": "median", "metric": ["plasticity", "stability"]}, {}, [], r"two metrics: Optuna prunes by one"),
        (
            {"pruner": "median", "metric": "train_flops"},
            {},
            [],
            r"sweep\.pruner: median needs a metric; train",
        ),
        ({"sampler": ["tpe"]}, {}, [], r"\['tpe'\] is not valid \(valid: auto"),
        ({"metric": [["average_accuracy"]]}, {}, [], r"sweep\.metric: \['average_accuracy'\] is not the name of a"),
        ({"metric": "dormant_fraction"}, {}, [], r"sweep\.metric: 'dormant_fraction' is no figure of a whole run"),
        ({"metric": ["plasticity", "plasticity"]}, {}, [], r"sweep\.metric: plasticity is named twice"),
        ({"metric": []}, {}, [], r"sweep\.metric: 0 metrics are named \(valid: one, or a list of two\)"),
        ({"metric": ["plasticity", "stability", "forgetting"]}, {}, [], r"sweep\.metric: 3 metrics are named"),
        ({"metric": ["plasticity", "stability"], "direction": ["maximize"]}, {}, [], r"direction: 1 for 2 metrics"),
        ({"metric": ["plasticity", "forgetting"], "direction": ["maximize"] * 2}, {}, [], r"worst forgetting \(valid"),
        ({"metric": ["plasticity", "stability"], "choose": "knee"}, {}, [], r"valid: balanced, plasticity, stability"),
        ({"choose": "balanced"}, {}, [], r"sweep\.choose: has no meaning with one metric"),
        ({"metric": "weight_norm"}, {}, [], r"'weight_norm' is no figure of a whole run"),
        ({"sampler": "grid"}, {}, [], r"sweep\.space\.strategy\.lr: a grid needs \{choices: \[\.\.\.\]\}, or a step"),
        ({"metric": "forgetting", "direction": "maximize"}, {}, [], r"worst forgetting \(valid: minimize\)"),
        ({"seeds": [0, 0]}, {}, [], r"sweep\.seeds: \[0, 0\] names a seed twice"),
        ({"held_out": [3, 3]}, {}, [], r"sweep\.held_out: \[3, 3\] names a seed twice"),
        ({"held_out": [0]}, {}, [], r"sweep\.held_out: 0 is one of sweep\.seeds, by which is chosen"),
        ({"give_up": "soon"}, {}, [], r"sweep\.give_up: 'soon' is not valid \(valid: median, never\)"),
        ({"study": ["a"]}, {}, [], r"sweep\.study: \['a'\] is not a name"),
        ({"space": {"strategy.lr": {"choices": []}}}, {}, [], r"lr\.choices: \[\] is not a list of plain values"),
        ({"space": {"strategy.lr": {"choices": [1, 1]}}}, {}, [], r"lr\.choices: \[1, 1\] names a value twice"),
        ({"space": {"strategy.lr": {}}}, {}, [], r"lr\.low: None is not a number"),
        ({"space": {"strategy.lr": {"low": 0.1, "high": 0.1}}}, {}, [], "low 0.1 is not below high 0.1"),
        ({"space": {"strategy.lr": {"low": 0, "high": ".inf"}}}, {}, [], r"lr\.high: '.inf' is not a number"),
        ({"space": {"strategy.lr": {"low": 0.0, "high": float("nan")}}}, {}, [], r"lr\.high: nan is not a number"),
        ({"space": {"loop.batch_size": {"low": 8, "high": 64, "step": 2.5}}}, {}, [], r"step: 2.5 is out of range"),
        ({"space": {"loop.batch_size": {"low": 8, "high": 64, "step": 0}}}, {}, [], r"step: 0 is out of range"),
        ({"space": {"loop.batch_size": {"low": 8, "high": 64, "step": 9}}}, {}, [], r"does not lead from 8 to 64"),
    ],
)
def test_faults(tmp_path, section, changes, keys, fault):
    with pytest.raises(UserError, match=fault):
        sweep(write(tmp_path, section, **changes), keys, run=objective)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("section", "changes", "fault"),
    [
        ({}, {"stream": "digits"}, r"validation data: loop\.evaluate_on: .* no validation data"),
        ({"space": {"strategy.memry": {"low": 1, "high": 9}}}, {}, r"^sweep\.space\.strategy\.memry: no such key"),
        ({"space": {"strategy.lr": {"low": -1.0, "high": 0.1}}}, {}, r"^sweep\.space\.strategy\.lr: -1\.0"),
        ({"space": {"strategy": {"choices": ["er", "eer", "naive"]}}}, {}, r"^sweep\.space\.strategy: .*'eer'"),
        ({"space": {"loop.batch_size": {"choices": [8, "x", 9]}}}, {}, r"^sweep\.space\.loop\.batch_size: 'x'"),
        ({"space": {"loop.batch_size": {"low": 1, "high": 9}}}, {"loop": 3}, r"^loop: 3 is not a mapping"),
        ({"metric": "forget_accuracy"}, {}, r"^sweep\.metric: forget_accuracy needs forget experiences"),
        ({"metric": [["average_accuracy"]]}, {}, r"^sweep\.metric: "),
        ({"metric": ["plasticity", "h_mean"]}, {}, r"^sweep\.metric: h_mean needs forget experiences"),
        ({}, {"runs": {"a": {}}}, r"^runs: .* several runs"),
    ],
)
def test_what_would_fail_in_every_trial_is_refused_before_the_first(tmp_path, capsys, section, changes, fault):
    path = write(tmp_path, section, **{"stream": {"name": "digits", "validation": 0.1}, **changes})
    with pytest.raises(UserError, match=fault):
        sweep(path)
    assert not (tmp_path / "runs").exists()
    assert main(["validate", str(path)]) == 2
    assert re.search(fault, capsys.readouterr().err.removeprefix("clplat: "))


def test_validate_builds_the_trials_of_a_sweep(tmp_path, capsys):
    path = write(tmp_path, {"seeds": [0, 1]}, stream={"name": "digits", "validation": 0.1})
    assert main(["validate", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: no faults (a sweep: 4 trials, 2 seed(s) each, average_accuracy)\n"


def test_the_direction_is_what_is_better_of_the_metric(tmp_path):
    assert read_plan(write(tmp_path, {"metric": "forgetting"}), [], None).directions == ["minimize"]
    assert read_plan(write(tmp_path), [], None).directions == ["maximize"]


def test_all_faults_are_told_at_once(tmp_path):
    section = {"trials": 0, "direction": "up", "space": {"seed": {"low": 1, "high": 2}}}
    with pytest.raises(UserError) as caught:
        read_plan(write(tmp_path, section), [], None)
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize("rate", [{"low": 1, "high": 0.1}, {"low": -1, "high": 0.1}])
def test_a_bad_range_hides_no_bad_key_of_the_space_or_beside_it(tmp_path, capsys, rate):
    """A range that is none, and one that only the strategy refuses."""
    space = {"strategy.lr": rate, "strategy.nope": {"low": 0.1, "high": 1}, "strategy.mom": {"low": 2, "high": 3}}
    stream, loop = {"name": "digits", "validation": 0.1}, {"max_epoch": 3} if rate["low"] > 0 else {}
    assert main(["validate", str(write(tmp_path, {"space": space}, stream=stream, loop=loop))]) == 2
    said = [line.removeprefix("clplat: ").partition(": ")[0] for line in capsys.readouterr().err.splitlines()]
    assert sorted(said) == sorted(["sweep.space." + key for key in space] + ["loop.max_epoch"] * len(loop))


def test_a_file_without_a_sweep_section(tmp_path):
    path = tmp_path / "demo.yaml"
    path.write_text(yaml.safe_dump(BASE))
    with pytest.raises(UserError, match="has no `sweep:` section"):
        sweep(path, run=objective)


def test_joining_wants_the_same_study(tmp_path):
    path = write(tmp_path)
    with pytest.raises(UserError, match=r"no study 'demo' in .* to join"):
        sweep(path, run=objective, join=True)
    sweep(path, run=objective, quiet=True)
    other = write(tmp_path, {"space": {"strategy.lr": {"low": 0.0, "high": 1.0}}})
    with pytest.raises(UserError, match="has another configuration or space"):
        sweep(other, run=objective)


def test_nested_keys():
    assert nested({"strategy": "er"}, {"strategy.lr": 1}) == {"strategy": {"name": "er", "lr": 1}}
    assert nested({"strategy": {"name": "er", "memory": 5}}, {"strategy": "naive"}) == {"strategy": {"name": "naive"}}
    assert nested({"loop.batch_size": 3}, {"loop.batch_size": 4}) == {"loop.batch_size": 4}
    base = {"loop": {"max_epochs": 1}}
    assert nested(base, {"loop.max_epochs": 2}) == {"loop": {"max_epochs": 2}}
    assert base == {"loop": {"max_epochs": 1}}


# --- several workers ----------------------------------------------------------------------------------------------

WORKER = """
    import sys, time
    from clplat.sweep.study import sweep

    def run(config, run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        with open(run_dir / "begun", "a") as file:
            file.write("x")
        time.sleep(float(sys.argv[2]))
        return {"metrics": {"average_accuracy": config["strategy"]["lr"]}}

    sweep(sys.argv[1], run=run, quiet=True)
"""


def worker(path: Path, seconds: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(WORKER), str(path), str(seconds)])


def one_database(tmp_path: Path, kind: str) -> str:
    return str(tmp_path / "study.log") if kind == "journal" else f"sqlite:///{tmp_path}/study.db"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["journal", "database"])
def test_the_trial_of_a_killed_worker_is_repeated_once_in_its_folder(tmp_path, kind):
    path = write(tmp_path, {"trials": 6, "grace_seconds": 3, "storage": one_database(tmp_path, kind)})
    doomed = worker(path, 600)
    folder = tmp_path / "runs" / "demo"
    end = time.monotonic() + 60
    while not list(folder.glob("trial-0000/seed-0/begun")):
        assert time.monotonic() < end, "the first worker never began"
        time.sleep(0.1)
    others = [worker(path, 0.3), worker(path, 0.3)]
    time.sleep(0.5)
    doomed.kill()
    doomed.wait()
    assert [other.wait(120) for other in others] == [0, 0]
    trials = json.loads((folder / "sweep.json").read_text())["trials"]
    complete = [t for t in trials if t["state"] == "complete"]
    assert len(complete) == 6
    repeated = [t for t in trials if t["repeat_of"] is not None]
    assert [t["repeat_of"] for t in repeated] == [0]
    assert repeated[0]["params"] == trials[0]["params"]
    assert repeated[0]["folder"] == trials[0]["folder"]
    assert (folder / "trial-0000" / "seed-0" / "begun").read_text() == "xx"
    assert all(f.read_text() == "x" for f in folder.glob("trial-000[1-9]/seed-0/begun"))


HELPER = """
    import os, time

    def run(config, run_dir):
        run_dir.mkdir(parents=True)
        (run_dir / "pid").write_text(str(os.getpid()))
        time.sleep(1)
        return {"metrics": {"average_accuracy": 0.5}}
"""


@pytest.mark.slow
def test_workers_started_here_share_the_trials(tmp_path, monkeypatch):
    (tmp_path / "slow_objective.py").write_text(textwrap.dedent(HELPER))
    monkeypatch.syspath_prepend(tmp_path)
    import slow_objective

    result = sweep(write(tmp_path, {"trials": 6}), workers=2, run=slow_objective.run, quiet=True)
    assert [t["state"] for t in result.trials].count("complete") == 6
    assert len({p.read_text() for p in result.folder.glob("*/*/pid")}) == 2


def test_the_trial_of_a_worker_that_was_lost_on_another_machine_goes_on_at_once(tmp_path):
    """Its badge tells whose it was: neither its process nor its silence can."""
    plan = read_plan(write(tmp_path, {"trials": 2, "grace_seconds": 10_000}), [], None)
    study = open_study(plan, 0)
    enqueue(study, plan, {"strategy.lr": 0.02, "loop.batch_size": 16}, "default")

    def launch(workers, told):
        trial = study.ask()
        trial.set_user_attr("worker", f"{workers[0].badge}@elsewhere/1:2:3")
        told()
        assert study.get_trials()[0].state.name == "RUNNING"
        yield 0, lost("went away")
        assert [t.state.name for t in study.get_trials()] == ["FAIL", "WAITING"]
        work(study, plan, objective, badge=workers[1].badge)
        yield 1, {}

    employ(study, plan, 1, objective, launch, lambda: None)
    _, again, other = study.get_trials()
    assert (again.state.name, again.user_attrs["repeat_of"], again.user_attrs["repeats"]) == ("COMPLETE", 0, 1)
    assert again.params == {"strategy.lr": 0.02, "loop.batch_size": 16}
    assert other.user_attrs["folder"] != again.user_attrs["folder"]


def test_a_worker_that_is_queued_again_finds_its_own_trial(tmp_path):
    plan = read_plan(write(tmp_path, {"trials": 1, "grace_seconds": 10_000}), [], None)
    study = open_study(plan, 0)
    study.ask().set_user_attr("worker", "badge@elsewhere/1:2:3")
    work(study, plan, objective, badge="badge")
    assert [t.state.name for t in study.get_trials()] == ["FAIL", "COMPLETE"]


def test_workers_that_end_before_they_take_a_trial_end_the_sweep(tmp_path):
    plan = read_plan(write(tmp_path), [], None)

    def launch(workers, told):
        for number in range(9):
            assert len(workers) == number + 1
            yield number, lost("failed: no module")

    with pytest.raises(UserError, match=r"workers end before they take a trial \(its process failed: no module\)"):
        employ(open_study(plan, 0), plan, 1, objective, launch, lambda: None)


def test_the_same_values_are_not_paid_for_twice(tmp_path, capsys):
    """Three values of one key in twelve trials: three runs, and the others say whose figure they take."""
    ran = []

    def run(config, run_dir):
        ran.append(config["loop"]["batch_size"])
        return objective(config, run_dir)

    path = write(tmp_path, {"trials": 12, "space": {"loop.batch_size": {"choices": [16, 32, 64]}}})
    result = sweep(path, run=run)
    assert sorted(ran) == [16, 32, 64]
    assert len(result.trials) == 12
    assert result.best_params == {"loop.batch_size": 32}
    assert capsys.readouterr().out.count("not run again") == 9


def test_what_is_searched_is_of_the_part_that_a_flag_names_and_the_best_file_has_the_flags(tmp_path):
    file = write(tmp_path, strategy={"name": "naive", "lr": 0.5, "momentum": 0.1})
    flags = ["--strategy", "er", "--strategy.memory", "7", "--loop.max_epochs=3"]
    plan = read_plan(file, flags, None)
    assert plan.base["strategy"] == {"name": "er", "memory": 7}
    assert plan.base["loop"]["max_epochs"] == 3
    trial = resolve(plan.keys, config=plan.config({"strategy.lr": 0.02}, 0, "t"))
    assert (trial.strategy.name, trial.strategy.options["lr"], trial.strategy.options["memory"]) == ("er", 0.02, 7)
    same = read_plan(file, ["--strategy", "naive"], None)
    assert same.base["strategy"] == {"name": "naive", "lr": 0.5, "momentum": 0.1}
