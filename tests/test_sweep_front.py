"""Two metrics, samplers by name, the default first: what a study tries, takes for the best, and says it gained."""

import json
import re
from pathlib import Path

import optuna
import pytest
import yaml
from sweeping import SPACE, objective, write

from clplat.sweep.objectives import choose, front
from clplat.sweep.plan import read_plan
from clplat.sweep.progress import Progress
from clplat.sweep.store import open_study
from clplat.sweep.study import sweep

UP = ["maximize", "maximize"]


def two(config, run_dir):
    """Plasticity grows with the rate and stability falls: each trial is on the front, unless the batch is not 32."""
    share = (config["strategy"]["lr"] - 1e-4) / 0.1
    loss = abs(config["loop"]["batch_size"] - 32) / 100
    return {"metrics": {"plasticity": share - loss, "stability": 1 - share**2 - loss}}


def test_the_front_is_what_nothing_is_better_than_in_both():
    points = [(1, 0), (0, 1), (0.5, 0.5), (0.4, 0.4), (0.5, 0.5), (0.5, 0.2)]
    assert front(points, UP) == [0, 2, 1]
    assert front(points, ["maximize", "minimize"]) == [0]
    assert front([(3,), (5,), (5,)], ["maximize"]) == [1]


def test_the_choice_of_a_front():
    points = [(1.0, 0.0), (0.9, 0.8), (0.0, 1.0)]
    names = ["plasticity", "stability"]
    assert choose(points, names, UP, "balanced") == 1
    assert choose(points, names, UP, "plasticity") == 0
    assert choose(points, names, UP, "stability") == 2
    assert choose([(0.5, 0.5)], names, UP, "balanced") == 0
    costly = [(0.9, 300.0), (0.8, 100.0), (0.2, 90.0)]  # each in widths of the front, or seconds would choose alone
    assert choose(costly, ["plasticity", "train_seconds"], ["maximize", "minimize"], "balanced") == 1


def test_two_metrics_give_a_front_with_a_configuration_for_each_point(tmp_path, capsys):
    path = write(tmp_path, {"metric": ["plasticity", "stability"], "trials": 10, "choose": "stability"})
    result = sweep(path, run=two)
    values = [tuple(t["values"]) for t in result.trials]
    assert [p["number"] for p in result.front] == front(values, UP)
    assert len(result.front) > 1
    for point in result.front:
        config = yaml.safe_load(Path(point["config"]).read_text())
        assert config["strategy"]["lr"] == point["params"]["strategy.lr"]
        assert "sweep" not in config
    facts = json.loads((result.folder / "sweep.json").read_text())
    assert facts["metrics"] == ["plasticity", "stability"]
    assert facts["front"] == result.front
    assert sorted(p["config"] for p in result.front) == sorted(map(str, (result.folder / "front").iterdir()))
    best = max(result.front, key=lambda p: p["values"][1])
    assert result.best_params == best["params"]
    assert yaml.safe_load(result.best_config.read_text())["strategy"]["lr"] == best["params"]["strategy.lr"]
    out = capsys.readouterr().out
    assert out.count("front: trial") == len(result.front)
    assert f"(stability of {len(result.front)} on the front)" in out
    (result.folder / "front" / "trial-0099.yaml").touch()  # of an earlier front, which a better trial has left behind
    again = sweep(path, run=two, quiet=True)
    assert sorted(p["config"] for p in again.front) == sorted(map(str, (result.folder / "front").iterdir()))


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsgaii"])
def test_samplers_take_two_metrics(tmp_path, sampler):
    section = {"metric": ["plasticity", "stability"], "sampler": sampler, "trials": 12}
    assert len(sweep(write(tmp_path, section), run=two, quiet=True).front) >= 1


def test_a_grid_is_its_points_and_the_default(tmp_path):
    space = {"loop.batch_size": {"low": 16, "high": 48, "step": 16}, "strategy.optimizer": {"choices": ["sgd", "adam"]}}
    ran = []

    def run(config, run_dir):
        ran.append((config["loop"]["batch_size"], config["strategy"]["optimizer"]))
        return objective(config, run_dir)

    sweep(write(tmp_path, {"sampler": "grid", "trials": None, "space": space} | {"trials": 6}), run=run, quiet=True)
    assert ran[0] == (32, "sgd")  # the default, which is a point of the grid
    assert sorted(ran) == sorted((b, o) for b in (16, 32, 48) for o in ("sgd", "adam"))


def test_the_number_of_trials_of_a_grid_is_that_of_its_points(tmp_path):
    path = write(tmp_path, {"sampler": "grid", "space": {"loop.batch_size": {"choices": [8, 16, 64]}}})
    config = yaml.safe_load(path.read_text())
    del config["sweep"]["trials"]
    path.write_text(yaml.safe_dump(config))
    result = sweep(path, run=objective, quiet=True)
    assert [t["params"]["loop.batch_size"] for t in result.trials] == [32, 8, 16, 64]  # the default is not of the grid


def test_the_default_is_the_first_trial_and_what_tuning_gained_is_said(tmp_path, capsys):
    def run(config, run_dir):
        return {"metrics": {"average_accuracy": config["loop"]["batch_size"] / 1000}}

    path = write(tmp_path, {"trials": 6, "space": {"loop.batch_size": {"low": 8, "high": 64}}})
    result = sweep(path, run=run)
    assert result.trials[0]["default"]
    assert result.trials[0]["params"] == {"loop.batch_size": 32}
    gained = result.best_value - 0.032
    said = f"default → best, on validation data: average_accuracy 0.0320 → {result.best_value:.4f} ({gained:+.4f})"
    assert said in capsys.readouterr().out
    assert said in (result.folder / "report.md").read_text()
    assert said in json.loads((result.folder / "sweep.json").read_text())["gain"]
    assert said[1:] in result.best_config.read_text().splitlines()[3]


def test_a_default_outside_of_the_space_is_tried_too_and_the_space_is_not_widened(tmp_path):
    seen = []

    def run(config, run_dir):
        seen.append(config["loop"]["batch_size"])
        return objective(config, run_dir)

    space = {"loop.batch_size": {"low": 40, "high": 64}, "strategy.lr": SPACE["strategy.lr"]}
    result = sweep(write(tmp_path, {"trials": 5, "space": space, "sampler": "tpe"}), run=run, quiet=True)
    assert seen[0] == 32
    assert result.trials[0]["params"] == {"loop.batch_size": 32, "strategy.lr": 0.1}
    assert all(40 <= b <= 64 for b in seen[1:])
    assert yaml.safe_load(result.best_config.read_text())["loop"]["batch_size"] == 32  # the objective's best


def test_without_a_default_the_study_says_that_the_gain_is_not_known(tmp_path, capsys):
    space = {"strategy.unheard_of": {"low": 0.0, "high": 1.0}}
    sweep(write(tmp_path, {"trials": 2, "space": space}), run=lambda c, d: {"metrics": {"average_accuracy": 0.5}})
    assert "what tuning gained is not known" in capsys.readouterr().out


def test_each_line_says_how_many_of_how_many_and_the_time_left(tmp_path, capsys):
    sweep(write(tmp_path, {"trials": 3}), run=objective)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trial ")]
    assert [line.partition("[")[2][:6] for line in lines] == ["1 of 3", "2 of 3", "3 of 3"]
    assert lines[0].endswith("left]")
    assert "(the default)" in lines[0]


def test_on_a_terminal_a_bar_says_how_many_of_how_many_and_the_time_left(tmp_path, monkeypatch, capsys):
    """In 60 columns, beside a name that would fill them."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to rich
    plan = read_plan(write(tmp_path, {"study": "[red]a name of a study that is quite long", "trials": 4}), [], None)
    study = open_study(plan, 0)
    with Progress(study, plan, quiet=False) as progress:
        for value in (0.5, 0.6):
            progress.began -= 40
            study.add_trial(optuna.trial.create_trial(value=value))
        progress.update()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    drawn = [line for line in re.split(r"[\r\n]+", plain) if "━" in line]
    assert re.fullmatch(r"\[red\]a name of a st… ━+ 0/4 0:00:00 *", drawn[0])
    assert re.fullmatch(r"\[red\]a name of a st… ━+[╺╸]?━+ 2/4 0:00:00 about 80 s left", drawn[-1])


def test_a_cost_is_a_metric_too(tmp_path):
    def run(config, run_dir):
        return {"metrics": {"average_accuracy": 0.5}, "cost": {"stored_bytes": config["loop"]["batch_size"]}}

    result = sweep(write(tmp_path, {"metric": ["average_accuracy", "stored_bytes"]}), run=run, quiet=True)
    assert [p["values"] for p in result.front] == [[0.5, min(t["values"][1] for t in result.trials)]]
