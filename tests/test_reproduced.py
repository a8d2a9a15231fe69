"""docs/reproduced.md: published figures against results that are checked in."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import reproduced  # noqa: E402

from clplat.config.resolve import experiments  # noqa: E402
from clplat.metrics.catalogue import METRICS  # noqa: E402

SETTING = "gs_lora/fashion_reduced"


def arms(folder: Path, content: Any) -> list[reproduced.Arm]:
    (folder / "made_up").mkdir(exist_ok=True)
    (folder / "made_up" / "results.json").write_text(json.dumps(content))
    return reproduced.arms(folder)


@pytest.mark.parametrize(
    ("values", "metric", "published", "said"),
    [
        ([0.90, 0.92, 0.94], "h_mean", 0.95, "reached"),  # within 0.92 ± 0.05
        ([0.90, 0.92, 0.94], "h_mean", 0.98, "not reached"),
        ([0.90, 0.92, 0.94], "online_error", 0.88, "reached"),
        ([0.90, 0.92, 0.94], "online_error", 0.86, "not reached"),
        ([0.90, 0.92], "h_mean", 0.92, "not reached"),  # two seeds have no interval
        ([0.90, 0.92], "h_mean", 0.91, "reached"),
        ([], "h_mean", 0.5, "not run here"),
    ],
)
def test_what_counts_as_reached(tmp_path: Path, values: list[float], metric: str, published: float, said: str) -> None:
    runs = {"ours": {str(seed): {metric: value} for seed, value in enumerate(values)}} if values else {}
    claim = {"experiment": SETTING, "runs": ["ours"], "metric": metric, "value": published}
    assert reproduced.outcome(claim, arms(tmp_path, {"experiment": SETTING, "runs": runs}))[0] == said


def test_figures_of_another_setting_or_of_some_of_the_runs_do_not_count(tmp_path: Path) -> None:
    known = arms(tmp_path, {"experiment": SETTING, "runs": {"order1": {"0": {"h_mean": 1.0}}}})
    claim = {"experiment": SETTING, "runs": ["order1", "order2"], "metric": "h_mean", "value": 0.5}
    assert reproduced.outcome(claim, known)[0] == "not run here"
    assert reproduced.outcome({**claim, "runs": ["order1"], "experiment": "olora/long"}, known)[0] == "not run here"


def test_what_results_do_not_say_is_not_recorded(tmp_path: Path) -> None:
    (row,) = reproduced.measured_rows(arms(tmp_path, {"runs": {"er": {"0": {"average_accuracy": 0.5}}}}))
    assert row == ["not recorded (made_up)", "`er`", "0", "average accuracy", "0.500", "not recorded", "not recorded"]
    run = {"name": "x/er", "seed": 3, "git_commit": "0123456789", "metrics": {"average_accuracy": 0.5}}
    (row,) = reproduced.measured_rows(arms(tmp_path, {"experiment": SETTING, "runs": [run]}))
    assert row[:4] == [f"`clplat run {SETTING}`", "`er`", "3", "average accuracy"]
    assert row[5] == "`0123456`"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"experiment": "no/such", "runs": {}}, "'no/such' is not shipped"),
        ({"er": {}}, "no runs"),
        ({"runs": {"er": {"first": {}}}}, "'first' is no seed"),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, content: Any, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        arms(tmp_path, content)


def test_published_figures_are_of_runs_and_metrics_that_there_are_and_say_where_from() -> None:
    for claims in reproduced.published().values():
        for claim in claims:
            assert set(claim) == {"experiment", "runs", "metric", "value", "what", "source"}
            assert METRICS[claim["metric"]].higher_is_better is not None
            assert 0 < claim["value"] < 1
            file = yaml.safe_load(experiments()[claim["experiment"]].read_text())
            assert set(claim["runs"]) <= set(file["runs"])


def test_every_results_file_that_is_checked_in_is_read() -> None:
    folders = {arm.folder for arm in reproduced.arms()}
    assert folders == {f.parent.name for f in (ROOT / "experiments").glob("*/results*.json")}
