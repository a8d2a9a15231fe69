"""Statistics against SciPy, grouping of runs, and the console table."""

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clplat.errors import UserError
from clplat.report import compare
from clplat.report.numbers import show_estimate
from clplat.report.tables import console_comparison, plain

reals = st.floats(-1, 1, allow_nan=False).map(lambda v: round(v, 4))
samples = st.lists(reals, min_size=3, max_size=12).filter(lambda v: np.std(v) > 1e-3)


def run(strategy="er", seed=0, accuracy=0.5, status="complete", stream="digits", **config):
    plain_config = {"strategy": {"name": strategy}, "stream": {"name": stream, "seed": None}, "seed": seed, **config}
    return {
        "strategy": strategy, "stream": stream, "backbone": "mlp", "seed": seed, "status": status,
        "experiences": [{"name": "a", "kind": "learn"}], "config": plain_config,
        "metrics": {"average_accuracy": accuracy, "forgetting": None}, "cost": {"train_seconds": 2.0},
    }  # fmt: skip


def one_stream(runs):
    (groups,) = compare.split_streams(runs)
    return groups


@given(samples)
@settings(deadline=None, max_examples=60)
def test_interval_is_scipys(values):
    found = compare.estimate(values)
    assert found.n == len(values)
    np.testing.assert_allclose([found.mean, found.sd], [np.mean(values), np.std(values, ddof=1)], atol=1e-12)
    if len(values) == 2:
        assert (found.low, found.high, found.seeds) == (None, None, tuple(values))
        return
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    np.testing.assert_allclose([found.low, found.high], [low, high], rtol=1e-9, atol=1e-12)


@given(samples)
@settings(deadline=None, max_examples=60)
def test_t_test_is_scipys(values):
    assert math.isclose(compare.t_test(values), stats.ttest_1samp(values, 0).pvalue, rel_tol=1e-9)


@given(st.lists(reals, min_size=2, max_size=8))
@settings(deadline=None, max_examples=40)
def test_sign_flips_are_scipys(values):
    def statistic(x, axis):
        return np.round(np.abs(np.mean(x, axis=axis)), 12)

    ours = compare.sign_flip_test(values)
    theirs = stats.permutation_test(
        (np.array(values),), statistic, permutation_type="samples", alternative="greater", n_resamples=np.inf
    )
    assert math.isclose(ours, theirs.pvalue, rel_tol=1e-9)


def test_sign_flips_enumerate_every_pattern():
    values = [0.3, 0.1, -0.2, 0.4]
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in itertools.product((1, -1), repeat=4)
    ]
    assert compare.sign_flip_test(values) == sum(s >= 0.6 - 1e-9 for s in sums) / 16
    assert compare.sign_flip_test([0.1, 0.2, 0.3, 0.4, 0.5]) == 2 / 2**5


def test_many_pairs_are_drawn_close_to_the_exact_value():
    values = np.random.default_rng(1).normal(0.02, 0.05, 20)
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    exact = np.mean(np.abs(sums) >= abs(values.sum()) - 1e-12)
    assert compare.sign_flip_test(values) == pytest.approx(exact, abs=0.006)
    assert compare.sign_flip_test(values) == compare.sign_flip_test(values)


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=8))
def test_holm_keeps_order_and_bounds(p_values):
    corrected = compare.holm(p_values)
    order = np.argsort(p_values)
    assert all(c >= p for c, p in zip(corrected, p_values, strict=True))
    assert all(np.diff(np.array(corrected)[order]) >= 0)
    assert max(corrected) <= 1
    assert corrected[order[0]] == min(1, len(p_values) * min(p_values))


def test_holm_by_hand():
    assert compare.holm([0.01, None, 0.04, 0.03]) == [
        pytest.approx(0.03),
        None,
        pytest.approx(0.06),
        pytest.approx(0.06),
    ]


def test_small_samples_have_no_interval_and_no_p_value():
    assert compare.estimate([]) == compare.Estimate(0)
    assert compare.estimate([None, 0.5]) == compare.Estimate(1, 0.5)
    assert compare.t_test([0.1]) is None
    assert compare.t_test([0.1, 0.1, 0.1]) is None
    assert compare.t_test([0.0, 0.0]) == 1.0
    assert compare.sign_flip_test([]) is None


def test_an_interval_ends_where_the_metric_does():
    runs = [run("er", s, v) for s, v in enumerate((0.99, 0.9, 0.98))]
    found = one_stream(runs)[0].estimate("average_accuracy")
    assert found.high == 1
    assert found.low < 0.9
    assert found.half_width is None
    assert show_estimate(found) == f"0.957 [{found.low:.3f}, 1.000]"
    free = compare.estimate((0.99, 0.9, 0.98))
    assert free.high > 1
    assert (found.mean, found.low) == (free.mean, free.low)


def test_two_seeds_stand_for_themselves_and_are_not_tested():
    runs = [run("er", s, v) for s, v in ((0, 0.55), (1, 0.69))] + [run("naive", s, 0.1) for s in (0, 1)]
    er, naive = one_stream(runs)
    found = compare.paired(er, naive, "average_accuracy")
    assert (found.p_value, found.p_permutation, found.difference.low) == (None, None, None)
    assert found.reason == "2 shared seeds, and a paired test needs 3 or more"
    assert show_estimate(er.estimate("average_accuracy")) == "0.620 (0.550, 0.690)"
    assert show_estimate(naive.estimate("average_accuracy")) == "0.100"


def test_pairs_are_matched_by_seed_not_by_order():
    a = [run("er", s, v) for s, v in ((0, 0.5), (1, 0.7), (2, 0.9), (3, 0.8))]
    b = [run("naive", s, v) for s, v in ((2, 0.8), (1, 0.5), (0, 0.4), (9, 0.0))]
    er, naive = one_stream(a + b)
    found = compare.paired(er, naive, "average_accuracy")
    assert found.difference.n == 3
    assert found.difference.mean == pytest.approx((0.1 + 0.2 + 0.1) / 3)
    assert found.p_value == pytest.approx(stats.ttest_rel([0.5, 0.7, 0.9], [0.4, 0.5, 0.8]).pvalue)


def test_a_pair_of_single_runs_is_not_tested():
    (found,) = compare.against_best(one_stream([run("er", 0, 0.9), run("naive", 0, 0.5)]), "average_accuracy")
    assert found.p_holm is None
    assert "1 shared seed," in found.reason
    assert found.difference.mean == pytest.approx(0.4)


def test_best_follows_the_direction_of_the_metric():
    runs = [run("er", s, 0.9) for s in (0, 1)] + [run("naive", s, 0.5 + s / 9) for s in (0, 1)]
    for r in runs:
        r["metrics"]["forgetting"] = 0.1 if r["strategy"] == "er" else 0.4
    groups = one_stream(runs)
    assert compare.against_best(groups, "average_accuracy")[0].first == "er"
    assert compare.against_best(groups, "forgetting")[0].first == "er"


def test_seed_name_and_place_do_not_split_a_group():
    runs = [run(seed=s, name=f"n{s}", output=f"o{s}", stream="digits") for s in range(3)]
    for r in runs:
        r["config"]["stream"]["seed"] = r["seed"]
    (group,) = one_stream(runs)
    assert len(group.counted) == 3


def test_options_split_groups_and_name_them():
    runs = [run(seed=s, loop={"max_epochs": e}) for e in (1, 5) for s in (0, 1)]
    assert [g.label for g in one_stream(runs)] == ["er (max_epochs 1)", "er (max_epochs 5)"]


def test_a_part_from_a_file_is_named_without_its_folders():
    (group,) = one_stream([run("/some/where/mine.py:Mine")])
    assert group.label == group.strategy == "mine.py:Mine"


def test_streams_are_never_mixed():
    runs = [run(stream="digits"), run(stream="text"), run("naive", stream="digits")]
    assert [[g.strategy for g in groups] for groups in compare.split_streams(runs)] == [["er", "naive"], ["er"]]
    longer = run(stream="digits")
    longer["config"]["stream"]["experiences"] = 10
    assert len(compare.split_streams([run(), longer])) == 2


def test_incomplete_and_repeated_runs_do_not_enter_means():
    runs = [run(seed=0, accuracy=0.1), run(seed=0, accuracy=0.5), run(seed=1, accuracy=0.7),
            run(seed=2, accuracy=0.0, status="failed")]  # fmt: skip
    (group,) = one_stream(runs)
    assert group.values("average_accuracy") == {0: 0.5, 1: 0.7}
    (group,) = one_stream([run(seed=0, accuracy=0.3, status="interrupted")])
    assert group.estimate("average_accuracy").mean == 0.3


def test_aggregate_is_none_safe():
    runs = [run(seed=s, accuracy=v) for s, v in ((0, 0.5), (1, None), (2, float("nan")), (3, 0.7))]
    ((group, found),) = compare.aggregate(runs).items()
    assert group.label == "er"
    assert found["average_accuracy"].n == 2
    assert found["average_accuracy"].mean == pytest.approx(0.6)
    assert found["forgetting"] == compare.Estimate(0)
    assert found["train_seconds"].sd == 0


def test_load_summaries_names_every_bad_directory(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "summary.json").write_text('{"strategy": ')
    with pytest.raises(UserError) as caught:
        compare.load_summaries([tmp_path / "empty", tmp_path / "torn", tmp_path / "absent"])
    assert len(caught.value.faults) == 3
    assert "no summary.json" in caught.value.faults[0]


def test_a_killed_run_without_summary_counts_as_interrupted(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run()["config"]))
    (found,) = compare.load_summaries([tmp_path])
    assert found["status"] == "interrupted"
    assert found["strategy"] == "er"
    (tmp_path / "summary.json").write_text(json.dumps({"strategy": "x", "status": "complete"}))
    assert compare.load_summaries([tmp_path])[0]["strategy"] == "x"


def test_console_comparison_states_numbers_and_test():
    runs = [run("er", s, v) for s, v in enumerate((0.90, 0.91, 0.93))]
    runs += [run("naive", s, v) for s, v in enumerate((0.50, 0.55, 0.52))]
    text = " ".join(plain(console_comparison(runs)).split())
    assert "0.913 ± 0.038" in text
    assert (
        "Paired t-test over shared seeds on average accuracy (Holm-corrected), er minus naive: +0.390 [0.324, 0.456]"
        in text
    )
    assert "n = 3" in text


def test_console_comparison_of_single_seeds_says_once_that_nothing_is_tested():
    text = " ".join(plain(console_comparison([run("er"), run("naive"), run("ewc")])).split())
    assert text.count("a paired test needs 3 or more") == 1
    assert "No paired test on average accuracy" in text


def test_console_comparison_survives_markup_in_names():
    assert "[bold]x" in plain(console_comparison([run("[bold]x")]))


def test_comparing_imports_no_torch():
    code = ("import sys, clplat.report.tables as t; "
            "t.console_comparison([{'strategy': 'a', 'stream': 's', 'seed': 0}]); "
            "import clplat.report; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
