"""Online errors by domain, round and severity; clean accuracy before and after."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clplat.metrics import per_experience, summarize
from clplat.metrics.online import (
    Segment,
    domain_errors,
    hardest_error,
    last_round_error,
    round_drift,
    round_errors,
    segments_of,
    table,
)  # fmt: skip
from clplat.metrics.record import ExperienceRecord, RunRecord
from clplat.stream import Kind

L, A = Kind.LEARN, Kind.ADAPT
segments = st.builds(
    Segment, st.sampled_from(["fog", "snow", "frost"]), st.integers(1, 5), st.integers(0, 3), st.integers(0, 10),
    st.integers(10, 20),
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(segments, min_size=1, max_size=30))
def test_by_a_loop(found):
    for rounds, key in ((True, "round"), (False, "domain")):
        groups = {}
        for s in found:
            groups.setdefault(getattr(s, key), []).append(1 - s.correct / s.seen)
        expected = {k: sum(v) / len(v) for k, v in groups.items()}
        if rounds:
            assert round_errors(found) == pytest.approx(list(expected.values()))
        else:
            assert domain_errors(found) == pytest.approx(expected)
    hardest = [s.error for s in found if s.severity == max(t.severity for t in found)]
    assert hardest_error(found) == pytest.approx(sum(hardest) / len(hardest))
    assert -1 <= round_drift(found) <= 1
    assert round_drift(found) == pytest.approx(last_round_error(found) - round_errors(found)[0])


def run(online: list[dict], matrix: list[list], clean: bool = True) -> RunRecord:
    """Source, fog and snow at severities 3 and 5, then both again."""
    names = [("fog", 3, 0), ("snow", 5, 0), ("fog", 3, 1), ("snow", 5, 1)]
    experiences = [ExperienceRecord("source", L, 100, 50 if clean else 0)]
    experiences += [
        ExperienceRecord(f"{n}_{r}", A, 10, 0, domain=n, severity=s, round=r) for n, s, r in names
    ]  # fmt: skip
    return RunRecord(experiences, matrix=matrix, online=online)


ONLINE = [{"experience": i + 1, "correct": c, "seen": 10} for i, c in enumerate((9, 6, 8, 5))]
ROWS = [[a, None, None, None, None] for a in (0.1, 0.9, 0.85, 0.8, 0.8, 0.7)]


def test_summary_of_a_recurring_stream():
    values, why = summarize(run(ONLINE, ROWS))
    expected = {"online_error": 0.3, "last_round_error": 0.35, "round_drift": 0.1, "hardest_error": 0.45,
                "source_accuracy": 0.7, "source_drop": 0.2}  # fmt: skip
    assert {k: values[k] for k in expected} == pytest.approx(expected)
    found = table(run(ONLINE, ROWS))
    assert found["error_by_domain"] == pytest.approx({"fog": 0.15, "snow": 0.45})
    assert found["error_by_round"] == pytest.approx([0.25, 0.35])
    assert [s["experience"] for s in found["segments"]] == ["fog_0", "snow_0", "fog_1", "snow_1"]
    assert not set(expected) & set(why)


def test_reasons_while_a_run_is_under_way():
    values, why = summarize(run(ONLINE[:1], ROWS[:3]))
    assert values["online_error"] == pytest.approx(0.1)
    assert values["source_drop"] == pytest.approx(0.05)
    assert why["round_drift"] == why["last_round_error"] == "no second round has finished"
    values, why = summarize(run([], ROWS[:2]))
    assert "no adapt experience with data to score has finished" in why["hardest_error"]
    assert table(run([], ROWS[:2])) is None
    values, why = summarize(run(ONLINE, [[None] * 5 for _ in ROWS], clean=False))
    assert why["source_accuracy"] == why["source_drop"] == "no clean test set is scored"
    plain = RunRecord(
        [ExperienceRecord("a", A, 5, 0)], [[None], [None]], online=[{"experience": 0, "correct": 1, "seen": 4}]
    )
    values, why = summarize(plain)
    assert values["online_error"] == 0.75
    assert why["hardest_error"] == "the stream states no severity"


def test_the_clean_test_set_may_stand_on_the_first_adapt_experience():
    record = RunRecord(
        [ExperienceRecord("fog", A, 10, 50, domain="fog", severity=5), ExperienceRecord("snow", A, 10, 0)],
        [[0.9, None], [0.8, None], [0.6, None]],
        online=[{"experience": 0, "correct": 5, "seen": 10}, {"experience": 1, "correct": 5, "seen": 10}],
    )
    values, _ = summarize(record)
    assert values["source_drop"] == pytest.approx(0.3)
    assert values["source_accuracy"] == pytest.approx(0.6)


def test_parts_of_a_mixed_experience_are_segments():
    entry = {"experience": 1, "correct": 9.0, "seen": 15, "correct/fog": 6.0, "seen/fog": 10, "correct/snow": 3.0,
             "seen/snow": 5, "correct/frost": 0.0, "seen/frost": 0.0}  # fmt: skip
    record = RunRecord(
        [ExperienceRecord("source", L, 9, 9), ExperienceRecord("mixed", A, 15, 0, severity=5)], [[0.1, None]] * 3,
        online=[entry],
    )  # fmt: skip
    found = segments_of(record)
    assert [(s.domain, s.severity, s.correct, s.seen) for s in found] == [("fog", 5, 6.0, 10), ("snow", 5, 3.0, 5)]
    assert summarize(record)[0]["online_error"] == pytest.approx(0.4)
    assert domain_errors(found) == pytest.approx({"fog": 0.4, "snow": 0.4})
    logged = per_experience(record)
    assert logged["online_error/fog"] == pytest.approx(0.4)
    assert RunRecord.from_dict(record.to_dict()).to_dict() == record.to_dict()
