"""Metrics of predictions made while data arrive: by what the data come from, by round, by severity.

A segment is one adapt experience, or one part of an experience that mixes several. Its error is that of predictions
made when a batch arrives, before the learner adapts to that batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from clplat.metrics.matrix import _mean
from clplat.metrics.record import RunRecord


@dataclass(frozen=True)
class Segment:
    """Predictions on one stretch of data.

    Args:
        domain: what the data come from: a corruption.
        severity: how far that is from the source; 0: unsaid.
        round: how often the domain came before.
        correct: sum of the scores, in [0, seen].
        seen: samples predicted, > 0.
        experience: that it belongs to.
    """

    domain: str
    severity: int
    round: int
    correct: float
    seen: float
    experience: int = 0

    @property
    def error(self) -> float:
        """Share of the predictions that were wrong, in [0, 1]."""
        return 1 - self.correct / self.seen


def round_errors(segments: Sequence[Segment]) -> list[float]:
    """Error of each round: the mean over its segments, unweighted. One number a round, in [0, 1].

    Source: the tables of ten rounds in Wang et al., "CoTTA", CVPR 2022, arXiv:2203.13591.

    >>> round_errors([Segment("fog", 5, 0, 8, 10), Segment("snow", 5, 0, 6, 10), Segment("fog", 5, 1, 9, 10)])
    [0.3, 0.1]
    """
    return [round(e, 12) for e in _grouped(segments, lambda s: s.round).values()]


def domain_errors(segments: Sequence[Segment]) -> dict[str, float]:
    """Error under each domain: the mean over its segments, unweighted; in the order met.

    >>> domain_errors([Segment("fog", 5, 0, 8, 10), Segment("snow", 5, 0, 6, 10), Segment("fog", 5, 1, 9, 10)])
    {'fog': 0.15, 'snow': 0.4}
    """
    return {str(k): round(e, 12) for k, e in _grouped(segments, lambda s: s.domain).items()}


def last_round_error(segments: Sequence[Segment]) -> float:
    """Error of the last round; in [0, 1], lower is better.

    >>> last_round_error([Segment("fog", 5, 0, 8, 10), Segment("fog", 5, 1, 9, 10)])
    0.1
    """
    return round_errors(segments)[-1]


def round_drift(segments: Sequence[Segment]) -> float:
    """Error of the last round minus that of the first; in [−1, 1], lower is better.

        e_R − e_1

    Above 0 the learner gets worse at what it has met before: adaptation has done harm that lasts.

    Source: rounds compared in Wang et al., "CoTTA", CVPR 2022, arXiv:2203.13591; the number is this platform's.

    >>> round_drift([Segment("fog", 5, 0, 8, 10), Segment("fog", 5, 1, 9, 10)])
    -0.1
    """
    errors = round_errors(segments)
    return round(errors[-1] - errors[0], 12)


def hardest_error(segments: Sequence[Segment]) -> float:
    """Error on the segments of the highest severity, mean over them; in [0, 1], lower is better.

    Where severities rise and fall it tells what the mean over all segments hides.

    Source: Döbler et al., "RMT", CVPR 2023, arXiv:2211.13081 (gradual streams: the mean over severity 5).

    >>> hardest_error([Segment("fog", 1, 0, 9, 10), Segment("fog", 5, 0, 6, 10), Segment("fog", 5, 0, 8, 10)])
    0.3
    """
    highest = max(s.severity for s in segments)
    return round(_mean(s.error for s in segments if s.severity == highest), 12)


def _grouped(segments: Sequence[Segment], key: Callable[[Segment], Hashable]) -> dict[Hashable, float]:
    groups: dict[Hashable, list[float]] = {}
    for segment in segments:
        groups.setdefault(key(segment), []).append(segment.error)
    return {k: _mean(errors) for k, errors in groups.items()}


def segments_of(record: RunRecord) -> list[Segment]:
    """The segments that a run has finished, in order; without samples there is none."""
    found = []
    for entry in record.online:
        index = entry["experience"]
        e = record.experiences[index]
        parts = [key.partition("/")[2] for key in entry if key.startswith("seen/")]
        if not parts:
            found.append(Segment(e.domain or e.name, e.severity, e.round, entry["correct"], entry["seen"], index))
        found += [
            Segment(part, e.severity, e.round, entry[f"correct/{part}"], entry[f"seen/{part}"], index) for part in parts
        ]
    return [s for s in found if s.seen > 0]


def table(record: RunRecord) -> dict[str, Any] | None:
    """What `summary.json` holds under `adaptation`; None where nothing was adapted to."""
    segments = segments_of(record)
    if not segments:
        return None
    return {
        "segments": [
            {"experience": record.experiences[s.experience].name, "domain": s.domain, "severity": s.severity,
             "round": s.round, "error": s.error, "samples": int(s.seen)}
            for s in segments
        ],
        "error_by_domain": domain_errors(segments),
        "error_by_round": round_errors(segments),
    }  # fmt: skip
