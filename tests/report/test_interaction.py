"""Interact runs in the report: returns since the hand-over, the dip, the probe, scores over runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from clplat.metrics import interaction
from clplat.metrics.record import ExperienceRecord, RunRecord
from clplat.report import write_report
from clplat.report.compare import load_summaries, split_streams
from clplat.report.figures import build_figures
from clplat.report.interaction import dip_table, scores
from clplat.report.spec import Bars, Heat, Lines
from clplat.stream import Kind

BOUNDS = (-1000.0, 0.0)
# strategy → return on entry and at steps 100 to 400, of seed 0; a seed adds 10
CURVES = {"wsrl": (-200.0, [-200.0, -300.0, -100.0, -150.0]), "sac": (-200.0, [-600.0, -500.0, -400.0, -300.0])}


def record(name: str, seed: int, bounds: tuple[float, float] | None = BOUNDS, experiences: int = 1) -> RunRecord:
    before, returns = CURVES[name]
    entry = {
        "before": before + 10 * seed,
        "evaluations": [[100 * (k + 1), g + 10 * seed] for k, g in enumerate(returns)],
        "probe": [{"env_step": 100 * (k + 1), "q": -5.0 - k, "td_error": 0.5 / (k + 1), "mc_return": -7.0,
                   "return_error": 2.0} for k in range(4)],
    }  # fmt: skip
    known = [ExperienceRecord(f"world {j}", Kind.INTERACT, 0, 0, return_bounds=bounds) for j in range(experiences)]
    return RunRecord(known, returns=[{"experience": j, **entry} for j in range(experiences)])


@pytest.fixture
def runs(fabricate: Any) -> Any:
    """Factory of run directories of both strategies, three seeds each."""

    def make(seeds: int = 3, **facts: Any) -> list[Path]:
        made = []
        for name in CURVES:
            for seed in range(seeds):
                folder = fabricate(strategy=name, seed=seed, kind="interact", log=False)
                summary = json.loads((folder / "summary.json").read_text())
                summary["interaction"] = interaction.table(record(name, seed, **facts))
                (folder / "summary.json").write_text(json.dumps(summary))
                made.append(folder)
        return made

    return make


def drawn(folders: list[Path]) -> dict[str, Any]:
    """The figures by name, of the only stream."""
    (groups,) = split_streams(load_summaries(folders))
    return {f.slug: f for f in build_figures(groups, {g: [] for g in groups})}


def test_what_the_summary_holds_is_the_curve_and_the_dip() -> None:
    (entry,) = interaction.table(record("wsrl", 0))
    assert entry["experience"] == "world 0"
    assert entry["return_bounds"] == list(BOUNDS)
    assert entry["dip"]["depth"] == pytest.approx(0.1)  # of normalised returns, at step 200
    assert entry["dip"]["steps"] == 300
    assert entry["dip"]["area"] == pytest.approx((0.5 * 0.1 + 0.5 * 0.1) / 4)
    (raw,) = interaction.table(record("sac", 0, bounds=None))
    assert raw["dip"]["depth"] == pytest.approx(400)
    assert raw["dip"]["steps"] is None
    assert interaction.table(RunRecord([])) is None


def test_returns_are_normalised_and_begin_at_the_hand_over(runs: Any) -> None:
    (panel,) = drawn(runs())["returns"].panels
    assert isinstance(panel, Lines)
    (wsrl, _) = panel.series
    assert list(wsrl.x) == [0, 100, 200, 300, 400]
    assert wsrl.y == pytest.approx([0.81, 0.81, 0.71, 0.91, 0.86])  # mean over seeds 0, 1, 2
    assert wsrl.low[0] < wsrl.y[0] < wsrl.high[0]
    assert (list(panel.marks), panel.mark_label) == ([0.0], "hand-over")


def test_returns_without_bounds_stay_as_they_are(runs: Any) -> None:
    figures = drawn(runs(bounds=None))
    assert figures["returns"].panels[0].series[0].y[0] == pytest.approx(-190)
    assert figures["returns"].title == "Return since the hand-over"
    assert [f"{b.value.mean:.0f}" for b in figures["scores-over-runs"].panels[1].bars] == ["-140", "-290"]


def test_the_probe_stands_next_to_the_return_of_the_data(runs: Any) -> None:
    error, value, apart = drawn(runs())["probe"].panels
    assert error.series[0].y == pytest.approx([0.5, 0.25, 0.5 / 3, 0.125])
    assert value.series[0].y == pytest.approx([-5, -6, -7, -8])
    assert list(value.levels) == [(-7.0, "return")]
    assert apart.series[0].y == pytest.approx([2.0] * 4)


def test_scores_over_runs_are_the_catalogued_statistics(runs: Any) -> None:
    profile, middle, better = drawn(runs())["scores-over-runs"].panels
    assert isinstance(profile, Lines)
    assert isinstance(middle, Bars)
    assert isinstance(better, Heat)
    (groups,) = split_streams(load_summaries(runs()))
    last = scores(groups[0], True, 1)
    assert sorted(last[:, 0]) == pytest.approx([0.85, 0.86, 0.87])
    assert [b.value.mean for b in middle.bars] == pytest.approx([0.86, 0.71])
    assert middle.bars[0].value.low <= 0.86 <= middle.bars[0].value.high
    assert better.values[0][1].mean == 1.0
    assert better.values[1][0].mean == 0.0
    assert better.values[0][0].mean is None
    assert profile.series[0].y[0] == 1.0
    assert profile.series[0].y[-1] == 0.0
    above = np.array(profile.series[1].y)
    assert above[np.array(profile.series[1].x) > 0.75].max() == 0.0


def test_one_seed_has_no_scores_over_runs(runs: Any) -> None:
    assert "scores-over-runs" not in drawn(runs(seeds=1))


def test_raw_returns_of_several_environments_are_not_added_up(runs: Any) -> None:
    figures = drawn(runs(experiences=2, bounds=None))
    assert "scores-over-runs" not in figures
    assert [p.title for p in figures["returns"].panels] == ["world 0", "world 1"]
    assert "scores-over-runs" in drawn(runs(experiences=2))


def test_the_dip_table_says_who_has_not_come_back(runs: Any) -> None:
    (groups,) = split_streams(load_summaries(runs()))
    table = dip_table(groups)
    assert "0.100" in table  # depth of wsrl, which all come back from after 300 steps
    assert "<td" in table
    assert ">300<" in table
    assert "3 of 3 not back" in table


def test_the_page_and_the_files_show_all_of_it(runs: Any, tmp_path: Path) -> None:
    page = write_report(runs(), tmp_path / "out", plots=True).read_text()
    for part in ("Normalised return since the hand-over", "hand-over</text>", "The dip after the hand-over",
                 "Values on recorded transitions", "Performance profile", "Probability of improvement"):  # fmt: skip
        assert part in page
    for slug in ("returns", "probe", "scores-over-runs"):
        assert (tmp_path / "out" / "figures" / f"{slug}.png").stat().st_size > 5_000
        assert (tmp_path / "out" / "figures" / f"{slug}.svg").exists()


def test_bars_below_zero_lie_left_of_it(runs: Any, tmp_path: Path) -> None:
    from clplat.report.svg import render

    bars = drawn(runs(bounds=None))["scores-over-runs"].panels[1]
    assert "−140 [" in render(bars, "alt")
    assert 'width="1.0"' not in render(bars, "alt")  # not the stump of a bar that ends left of its start


def test_runs_that_start_from_one_of_their_own_seed_repeat_each_other(runs: Any, fabricate: Any) -> None:
    """Their start.run are different folders, though of one configuration; of another one they are no repetitions."""
    starts = [fabricate(strategy="cql", seed=seed, log=False) for seed in (0, 1, 2)]
    other = fabricate(strategy="cql", seed=2, log=False, options={"penalty": 9.0})
    folders = runs()[:3]
    for folder, start in zip(folders, starts, strict=True):
        rewrite(folder, start)
    assert [len(g.counted) for g in split_streams(load_summaries(folders))[0]] == [3]
    rewrite(folders[2], other)
    assert sorted(len(g.counted) for g in split_streams(load_summaries(folders))[0]) == [1, 2]
    rewrite(folders[2], starts[0])  # of another seed than its own
    assert sorted(len(g.counted) for g in split_streams(load_summaries(folders))[0]) == [1, 2]


def rewrite(folder: Path, start: Path) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["start"] = {"run": str(start), "head": False}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
