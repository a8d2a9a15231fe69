"""All metrics of a record, and why some are missing."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clplat.files import to_json
from clplat.metrics import METRICS, per_experience, summarize
from clplat.metrics.record import ExperienceRecord, RunRecord
from clplat.metrics.rows import Rows
from clplat.stream import Kind

NAMES = {n for n, info in METRICS.items() if info.group == "metrics"}
L, F, A, I = Kind.LEARN, Kind.FORGET, Kind.ADAPT, Kind.INTERACT


def record(kinds, matrix=(), **more):
    """A record whose experiences have 100 test samples each, but for interact ones."""
    experiences = [ExperienceRecord(f"e{i}", k, 10, 0 if k is I else 100) for i, k in enumerate(kinds)]
    return RunRecord(experiences, matrix=[list(row) for row in matrix], **more)


LEARN = record([L, L], [[0.1, 0.1], [0.9, 0.2], [0.5, 0.8]])


def test_learning():
    values, why = summarize(LEARN)
    expected = {"average_accuracy": 0.65, "average_incremental_accuracy": 0.775, "forgetting": 0.4, "stability": 0.6,
                "backward_transfer": -0.4, "forward_transfer": 0.1, "plasticity": 0.85,
                "transfer": 0.2, "average": 0.6, "last": 0.65, "sample_accuracy": 0.65,
                "average_incremental_sample_accuracy": 0.775}  # fmt: skip
    assert {k: v for k, v in values.items() if v is not None} == pytest.approx(expected)
    assert "loop.eval_every is not set" in why["worst_case_accuracy"]
    assert why["forget_accuracy"] == "the stream has no forget experience"
    assert why["online_error"] == "the stream has no adapt experience"
    assert why["initial_dip"] == "the stream has no interact experience"
    assert "`reference`" in why["intransigence"]


kinds_lists = st.lists(st.sampled_from([L, F, A, I]), min_size=1, max_size=5)
cells = st.one_of(st.none(), st.floats(0, 1))


@settings(deadline=None)
@given(kinds_lists, st.data())
def test_every_name_has_a_value_in_range_or_a_reason(kinds, data):
    """Any mix of kinds, any cell unmeasured, stopped anywhere."""
    n = len(kinds)
    rows = data.draw(st.integers(0, n + 1))
    draw_row = st.lists(cells, min_size=n, max_size=n)
    run = record(kinds, [data.draw(draw_row) for _ in range(rows)])
    run.reference = data.draw(st.one_of(st.none(), st.lists(draw_row, max_size=n + 1)))
    for i, e in enumerate(run.experiences):
        if e.kind is F:
            learned = [j for j in range(i) if kinds[j] is L]
            e.erases = tuple((j, data.draw(st.integers(1, 100))) for j in data.draw(st.permutations(learned))[:1])
        if e.kind is I and i < rows - 1:
            e.return_bounds = data.draw(st.one_of(st.none(), st.just((0.0, 2.0))))
            run.returns.append({"experience": i, "before": data.draw(cells), "evaluations": [[5, 1.0], [10, 2.0]],
                                "after": {str(j): data.draw(cells) for j in range(n)}})  # fmt: skip
        if e.kind is A and i < rows - 1:
            run.online.append({"experience": i, "correct": data.draw(st.integers(0, 9)), "seen": 9})
        if data.draw(st.booleans()) and i < rows:
            run.anytime.append({"step": i, "experience": i, "scores": data.draw(draw_row)})
    values, why = summarize(run)
    assert set(values) == NAMES
    assert set(why) == {k for k, v in values.items() if v is None}
    assert all(why.values())
    for name, value in values.items():
        info = METRICS[name]
        if value is not None:
            assert info.lowest is None or value >= info.lowest - 1e-9, name
            assert info.highest is None or value <= info.highest + 1e-9, name
            assert set(info.kinds) <= set(kinds), name
    again = RunRecord.from_dict(json.loads(to_json(run.to_dict())))
    assert summarize(again) == (values, why)


def test_a_run_under_way_is_measured_by_what_has_finished():
    full = record([L, L, L], [[0.1] * 3, [0.9, 0.2, 0.2], [0.5, 0.8, 0.3]])
    values, _ = summarize(full)
    assert values["average_accuracy"] == pytest.approx(0.65)
    assert values["forgetting"] == pytest.approx(0.4)
    assert values["forward_transfer"] == pytest.approx(0.1)  # not yet of the third
    first, why = summarize(record([L, L], [[0.1, 0.1], [0.9, 0.2]]))
    assert first["average_accuracy"] == pytest.approx(0.9)
    assert why["forgetting"] == "no experience has finished after a learned one"
    none, why = summarize(record([L, L]))
    assert set(none.values()) == {None}
    assert why["average_accuracy"] == "no learn experience with data to score has finished"


def test_what_was_not_measured_is_said():
    values, why = summarize(record([L, L], [[None, None], [0.9, None], [0.5, 0.8]]))
    assert values["forgetting"] == pytest.approx(0.4)
    assert why["forward_transfer"] == "a score it needs was not measured"


def test_a_large_test_set_counts_by_its_samples_in_one_figure_and_once_in_the_other():
    run = record([L, L], LEARN.matrix)
    run.experiences[0].test_samples = 300
    values, _ = summarize(run)
    assert values["average_accuracy"] == pytest.approx(0.65)
    assert values["sample_accuracy"] == pytest.approx((300 * 0.5 + 100 * 0.8) / 400)
    assert values["average_incremental_sample_accuracy"] == pytest.approx((0.9 + 230 / 400) / 2)


def test_an_adaptation_counts_against_what_was_learned():
    run = record([L, A], [[0.1, 0.1], [0.9, 0.4], [0.6, 0.7]], online=[{"experience": 1, "correct": 60, "seen": 100}])
    values, _ = summarize(run)
    assert values["average_accuracy"] == pytest.approx(0.6)
    assert values["average_incremental_accuracy"] == pytest.approx(0.9)  # rows after learn experiences only
    assert values["forgetting"] == pytest.approx(0.3)
    assert values["online_error"] == pytest.approx(0.4)


def erasing(erases):
    """Learn, learn, forget: 100 test samples each, the request's accuracy falls from 0.8 to 0."""
    run = record([L, L, F], [[0.1] * 3, [0.9, 0.1, 0.5], [0.8, 0.9, 0.8], [0.4, 0.8, 0.0]])
    run.experiences[2].erases = erases
    run.experiences[2].test_samples = sum(n for _, n in erases) or 100
    return run


def test_an_erased_test_set_leaves_the_averages():
    values, _ = summarize(erasing(((0, 100),)))
    assert values["average_accuracy"] == pytest.approx(0.8)
    assert values["average_incremental_accuracy"] == pytest.approx((0.9 + 0.85) / 2)
    assert values["forgetting"] == pytest.approx(0.1)  # of the second test set; losing the first was asked for
    assert values["plasticity"] == pytest.approx(0.9)  # it was learned all the same


def test_of_a_test_set_erased_in_part_the_rest_counts():
    values, why = summarize(erasing(((0, 50),)))
    assert values["average_accuracy"] == pytest.approx((0.8 + 0.8) / 2)  # 40 hits on the 50 that are left
    assert values["retain_accuracy"] == values["sample_accuracy"] == pytest.approx((40 + 80) / 150)
    assert values["forget_drop"] == pytest.approx(0.8)
    assert values["h_mean"] == pytest.approx(0.8)
    assert values["forgetting"] == pytest.approx(0.1)
    assert why["relapse"] == "no experience has finished after a request"


def test_a_request_for_training_samples_takes_no_test_sample():
    values, _ = summarize(erasing(()))
    assert values["average_accuracy"] == pytest.approx(0.6)
    assert values["retain_accuracy"] == pytest.approx(0.6)
    assert values["forgetting"] == pytest.approx((0.5 + 0.1) / 2)


def test_all_erased():
    run = record([L, F], [[0.1, 0.1], [0.9, 0.9], [0.0, 0.0]])
    run.experiences[1].erases = ((0, 100),)
    values, why = summarize(run)
    assert why["average_accuracy"] == "everything learned is erased"
    assert why["retain_accuracy"] == "a request leaves nothing of what was learned"
    assert why["forgetting"] == "every learned test set is erased, in part or as a whole"
    assert values["forget_accuracy"] == 0
    assert values["average_incremental_accuracy"] == pytest.approx(0.9)


def test_references():
    reference = [[0.1, 0.1], [1.0, 0.2], [0.9, 1.0]]
    LEARN_WITH = RunRecord(LEARN.experiences, matrix=LEARN.matrix, reference=reference)
    values, _ = summarize(LEARN_WITH)
    assert values["relative_plasticity"] == pytest.approx(0.85)
    assert values["intransigence"] == pytest.approx(0.15)
    for wrong, reason in [([[0.1]], "another number"), (reference[:2], "stopped before"), ([], "another number")]:
        LEARN_WITH.reference = wrong
        assert reason in summarize(LEARN_WITH)[1]["intransigence"]
    LEARN_WITH.reference = [[0.0, 0.0]] * 3
    values, why = summarize(LEARN_WITH)
    assert why["relative_plasticity"] == "the reference run learned nothing"
    assert values["intransigence"] == pytest.approx(-0.85)


def test_anytime():
    evaluations = [
        {"step": 1, "experience": 0, "scores": [0.5, 0.1]},
        {"step": 2, "experience": 1, "scores": [0.3, 0.5]},
    ]
    values, _ = summarize(RunRecord(LEARN.experiences, matrix=LEARN.matrix, anytime=evaluations))
    assert values["average_anytime_accuracy"] == pytest.approx((0.5 + 0.4) / 2)
    assert values["minimum_accuracy"] == pytest.approx(0.3)
    assert values["worst_case_accuracy"] == pytest.approx((0.3 + 0.8) / 2)
    assert values["stability_gap"] == pytest.approx(0.2)


def test_anytime_leaves_out_what_is_erased():
    run = erasing(((0, 50),))
    run.anytime = [{"step": 1, "experience": 1, "scores": [0.0, 0.6, 0.0]}]
    values, _ = summarize(run)
    assert values["average_anytime_accuracy"] == pytest.approx(0.6)
    assert values["minimum_accuracy"] == pytest.approx(0.8)


def test_anytime_counts_the_experience_under_way():
    """The run stopped within its second experience: that test set has been met, and not yet learned."""
    run = record([L, L], LEARN.matrix[:2], anytime=[{"step": 9, "experience": 1, "scores": [0.5, 0.7]}])
    values, why = summarize(run)
    assert values["average_anytime_accuracy"] == pytest.approx(0.6)
    assert values["worst_case_accuracy"] == pytest.approx(0.9)
    assert why["minimum_accuracy"] == "no experience has finished after a learned one"


def test_returns():
    run = record([I, I], [[None, None]] * 3)
    run.returns = [{"experience": 0, "before": 100.0, "evaluations": [[10, 60.0], [20, 150.0]]},
                   {"experience": 1, "before": None, "evaluations": [[10, 100.0]]}]  # fmt: skip
    assert summarize(run)[1]["normalized_return"] == "e0: no return_bounds to normalise by"
    for e in run.experiences:
        e.return_bounds = (0.0, 200.0)
    values, why = summarize(run)
    assert values["normalized_return"] == pytest.approx((0.75 + 0.5) / 2)
    assert why["initial_dip"] == "the return on entry was not measured"
    run.returns[1]["before"] = 100.0
    assert summarize(run)[0]["initial_dip"] == pytest.approx(0.1)
    run.returns[1]["evaluations"] = []
    assert summarize(run)[1]["normalized_return"] == "e1: no return was measured"


def test_per_experience_is_what_to_log():
    run = RunRecord(LEARN.experiences, matrix=[*LEARN.matrix[:2], [0.5, None]])
    run.representation = [{"dormant_fraction": 0.5}, {"dormant_fraction": 0.25, "effective_rank": None}]
    logged = per_experience(run)
    assert logged["accuracy/e0"] == 0.5
    assert "accuracy/e1" not in logged
    assert logged["representation/dormant_fraction"] == 0.25
    assert "representation/effective_rank" not in logged
    assert logged["forgetting"] == pytest.approx(0.4)
    assert all(isinstance(v, float) for v in logged.values())
    assert set(logged) - NAMES == {"accuracy/e0", "representation/dormant_fraction"}
    assert per_experience(record([L])) == {}


def test_a_class_taught_again_has_not_relapsed():
    run = record([L, F, L], [[0.1] * 3, [0.9, 0.9, 0], [0.5, 0.0, 0], [0.9, 0.9, 0.9]])
    assert summarize(run)[0]["relapse"] == pytest.approx(0.9)
    for e in run.experiences:
        e.classes = (3, 4)
    values, why = summarize(run)
    assert values["relapse"] is None
    assert why["relapse"] == "no experience has finished after a request"


def acted(after, **more):
    """A record of two environments whose returns lie between 0 and 200."""
    run = record([I, I], [[None, None]] * 3, **more)
    for e in run.experiences:
        e.return_bounds = (0.0, 200.0)
    run.returns = [{"experience": 0, "before": 0.0, "evaluations": [[10, 100.0], [20, 200.0]], "after": after[0]},
                   {"experience": 1, "before": 100.0, "evaluations": [[20, 200.0]], "after": after[1]}]  # fmt: skip
    return run


def test_several_environments_by_hand():
    run = acted([{"0": 200.0, "1": 50.0}, {"0": 50.0, "1": 200.0}])
    run.reference_returns = [{"experience": "e0", "before": 0.0, "evaluations": [[10, 100.0], [20, 200.0]]},
                             {"experience": "e1", "before": 0.0, "evaluations": [[20, 100.0]]}]  # fmt: skip
    values, why = summarize(run)
    assert values["final_return"] == pytest.approx((0.25 + 1) / 2)
    assert values["return_forgetting"] == pytest.approx((0.75 + 0) / 2)  # the last environment counts with 0
    assert values["return_forward_transfer"] == pytest.approx((0 + (0.75 - 0.25) / (1 - 0.25)) / 2)
    assert {"return/e0": 50.0, "return/e1": 200.0}.items() <= per_experience(run).items()
    run.reference_returns[1]["evaluations"] = [[10, 100.0]]
    assert "another number of steps" in summarize(run)[1]["return_forward_transfer"]
    run.reference_returns[1] |= {"before": 200.0, "evaluations": [[20, 200.0]]}
    assert "nothing is left to gain" in summarize(run)[1]["return_forward_transfer"]
    del run.reference_returns[1]
    assert "other environments" in summarize(run)[1]["return_forward_transfer"]
    run.reference_returns = None
    assert "key `reference`" in summarize(run)[1]["return_forward_transfer"]
    assert why.keys().isdisjoint(["final_return", "return_forgetting", "return_forward_transfer"])


def test_one_environment_is_no_sequence():
    run = record([I], [[None]] * 2)
    run.experiences[0].return_bounds = (0.0, 1.0)
    run.returns = [{"experience": 0, "before": 0.0, "evaluations": [[10, 1.0]]}]
    for name in ("final_return", "return_forgetting", "return_forward_transfer"):
        assert summarize(run)[1][name] == "no second environment has finished"
    assert summarize(LEARN)[1]["final_return"] == "the stream has no interact experience"


def test_returns_that_were_not_measured_elsewhere_are_said():
    run = acted([None, None])
    assert summarize(run)[1]["final_return"] == "a score it needs was not measured"


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_rows_known_from_before_change_no_number(data):
    """After each experience, with and without them; requests erase a part or the whole of what was learned."""
    kinds = data.draw(st.lists(st.sampled_from([L, F]), min_size=2, max_size=6))
    full, shares = record(kinds), st.sampled_from([None, 0.0, 0.25, 0.5, 1.0])
    for i, kind in enumerate(kinds):
        before = [j for j in range(i) if kinds[j] is L]
        if kind is F and before:
            full.experiences[i].erases = ((data.draw(st.sampled_from(before)), data.draw(st.sampled_from([50, 100]))),)
    rows = Rows()
    for _ in range(len(kinds) + 1):
        full.matrix.append([data.draw(shares) for _ in kinds])
        assert repr(per_experience(full, rows)) == repr(per_experience(full))
    full.experiences.append(ExperienceRecord("late", L, 10, 100))  # a column more, and another last row
    full.matrix = [[*row, 0.5] for row in full.matrix]
    assert repr(summarize(full, rows)) == repr(summarize(full))


def test_a_row_known_from_before_is_not_read_again():
    rows, run = Rows(), record([L, L], [[0.1, 0.1], [0.9, 0.2]])
    per_experience(run, rows)
    run.matrix[1][0] = 0.0
    run.matrix.append([0.5, 0.8])
    assert rows.scores[1, 0] == 0.9
    assert per_experience(run, rows)["plasticity"] == pytest.approx((0.9 + 0.8) / 2)
