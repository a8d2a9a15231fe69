"""All metrics of a run from its record, with a reason for each that could not be measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from clplat.metrics import adaptation, anytime, general, matrix, online, perplexity, returns, unlearning
from clplat.metrics.adaptation import ReturnCurve
from clplat.metrics.anytime import Evaluation
from clplat.metrics.catalogue import METRICS
from clplat.metrics.matrix import Matrix
from clplat.metrics.record import ExperienceRecord, RunRecord
from clplat.metrics.rows import Rows
from clplat.metrics.unlearning import Request
from clplat.stream import Kind

UNMEASURED = "a score it needs was not measured"


def summarize(record: RunRecord, rows: Rows | None = None) -> tuple[dict[str, float | None], dict[str, str]]:
    """Every metric of the group "metrics" in the catalogue, and a reason for each that is None.

    Args:
        record: of a finished run or of one under way; counts what has finished.
        rows: what is known of its matrix from an earlier call.

    Returns:
        (name → value or None, name → reason for each None).
    """
    run = _Run(record, rows or Rows())
    table: dict[str, Callable[[], float | str]] = {}
    for part in (_learning, _references, _anytime, _erasure, _online, _adaptation, _sequences, _general, _domains):
        table |= part(run)
    values: dict[str, float | None] = {}
    why: dict[str, str] = {}
    for name in (n for n, info in METRICS.items() if info.group == "metrics"):
        result = table[name]()
        if isinstance(result, float) and math.isfinite(result):
            values[name] = result
        else:
            values[name], why[name] = None, result if isinstance(result, str) else UNMEASURED
    return values, why


def per_experience(record: RunRecord, rows: Rows | None = None) -> dict[str, float]:
    """What to log after an experience: every metric that has a value by now, under the summary's names.

    Besides: `accuracy/<experience name>` for each test set measured in the last row, `general/<name>` and
    `perplexity/<name>` of sets that no experience learns, the last experience's `representation/<name>` values,
    `online_error/<domain>` of what was adapted to in it, and `return/<name>` in each of several environments after
    acting in one. Arguments are those of `summarize`.
    """
    values, _ = summarize(record, rows)
    logged = {name: value for name, value in values.items() if value is not None}
    last = record.matrix[-1] if record.matrix else []
    logged |= {f"accuracy/{e.name}": float(a) for e, a in zip(record.experiences, last, strict=False) if a is not None}
    latest = record.representation[-1] if record.representation else {}
    newest = [s for s in online.segments_of(record) if s.experience == record.online[-1]["experience"]]
    logged |= {f"online_error/{s.domain}": s.error for s in newest if s.experience == len(record.matrix) - 2}
    after = record.returns[-1] if record.returns else {}
    if after.get("experience") == len(record.matrix) - 2:
        logged |= {f"return/{record.experiences[int(j)].name}": g for j, g in after.get("after", {}).items()}
    logged |= general.latest(record)
    return logged | {f"representation/{k}": float(v) for k, v in latest.items() if v is not None}


def per_request(record: RunRecord) -> list[dict[str, float | None]]:
    """For each request done, `index` of its experience and the terms of the metrics of erasure; None: not defined."""
    run = _Run(record, Rows())
    terms = unlearning.per_request(run.scores, run.requests, run.sizes, run.forgets)
    return [
        {"index": q.index, **{k: v if math.isfinite(v) else None for k, v in t.items()}}
        for q, t in zip(run.requests, terms, strict=True)
    ]


class _Run:
    """A record as the pure functions take it: arrays, and the columns that count."""

    def __init__(self, record: RunRecord, rows: Rows) -> None:
        experiences = record.experiences
        self.record = record
        self.kinds = [e.kind for e in experiences]  # of the whole stream; a list, since a member's hash is slow
        self.finished = max(len(record.matrix) - 1, 0)
        done = list(enumerate(experiences))[: self.finished]
        self.learned = [j for j, e in done if e.kind is Kind.LEARN and e.test_samples > 0]
        self.sizes = {j: experiences[j].test_samples for j in self.learned}
        self.forgets = [j for j, e in done if e.kind is Kind.FORGET]
        self.requests = [
            Request(j, experiences[j].test_samples, dict(experiences[j].erases), _taught_again(experiences, j))
            for j in self.forgets
            if experiences[j].test_samples > 0
        ]
        erased = {j for q in self.requests for j in q.erased}
        self.whole = [j for j in self.learned if j not in erased]
        rows.take(record.matrix, len(experiences), self.sizes, self.requests)
        self.scores, self.kept, self.active, self.pooled = rows.scores, rows.kept, rows.active, rows.pooled

    def lacking(self, kind: Kind) -> str:
        """Why there is nothing of a kind to measure."""
        if kind not in self.kinds:
            return f"the stream has no {kind} experience"
        return f"no {kind} experience with data to score has finished"


def _learning(run: _Run) -> dict[str, Callable[[], float | str]]:
    """Metrics of the accuracy matrix alone."""
    last = len(run.scores) - 1
    past = [j for j in run.whole if j + 1 < last]
    none_learned = None if run.learned else run.lacking(Kind.LEARN)
    whole = None if run.whole else "every learned test set is erased, in part or as a whole"
    followed = None if past else "no experience has finished after a learned one"
    preceded = None if any(j > 0 for j in run.learned) else "no learned experience has one before it"
    final = [j for j in run.learned if run.active[-1, j]]
    erased = None if final else "everything learned is erased"
    pooled = "scores are 1 / perplexity, over tokens" if run.record.perplexity else None
    after_learning = [j + 1 for j in run.learned]
    return {
        "average_accuracy": lambda: none_learned or erased or matrix.average_accuracy(run.kept, final),
        "average_incremental_accuracy": lambda: (
            none_learned or matrix.average_incremental_accuracy(run.kept[after_learning], run.active[after_learning])
        ),
        "sample_accuracy": lambda: none_learned or erased or pooled or float(run.pooled[last]),
        "average_incremental_sample_accuracy": lambda: (
            none_learned or pooled or float(np.mean(run.pooled[after_learning][run.active[after_learning].any(axis=1)]))
        ),
        "forgetting": lambda: none_learned or whole or followed or matrix.forgetting(run.scores, run.whole),
        "backward_transfer": lambda: (
            none_learned or whole or followed or matrix.backward_transfer(run.scores, run.whole)
        ),
        "forward_transfer": lambda: none_learned or preceded or matrix.forward_transfer(run.scores, run.learned),
        "transfer": lambda: none_learned or preceded or matrix.transfer(run.scores, run.learned),
        "average": lambda: none_learned or matrix.average(run.scores, run.learned),
        "last": lambda: none_learned or matrix.last(run.scores, run.learned),
        "plasticity": lambda: none_learned or matrix.plasticity(run.scores, run.learned),
        "stability": lambda: none_learned or whole or followed or matrix.stability(run.scores, run.whole),
    }


def _references(run: _Run) -> dict[str, Callable[[], float | str]]:
    """Metrics that compare with another run on the same stream."""
    rows = run.record.reference
    width = run.scores.shape[1]
    fault = None
    if not run.learned:
        fault = run.lacking(Kind.LEARN)
    elif rows is None:
        fault = "no reference run is set (key `reference`)"
    elif not rows or any(len(row) != width for row in rows):
        fault = "the reference run has another number of experiences"
    elif len(rows) < max(run.learned) + 2:
        fault = "the reference run stopped before this one"
    if fault is not None or rows is None:
        return dict.fromkeys(("relative_plasticity", "intransigence"), lambda: fault or UNMEASURED)
    reference = _array(rows, width)
    zero = "the reference run learned nothing" if matrix.plasticity(reference, run.learned) == 0 else None
    return {
        "relative_plasticity": lambda: zero or matrix.relative_plasticity(run.scores, reference, run.learned),
        "intransigence": lambda: matrix.intransigence(run.scores, reference, run.learned),
    }


def _anytime(run: _Run) -> dict[str, Callable[[], float | str]]:
    """Metrics of evaluations inside experiences."""
    record, names = run.record, ("average_anytime_accuracy", "worst_case_accuracy", "minimum_accuracy", "stability_gap")
    evaluations = [Evaluation(v["step"], v["experience"], _array([v["scores"]], run.scores.shape[1])[0])
                   for v in record.anytime]  # fmt: skip
    fault = None if Kind.LEARN in run.kinds else run.lacking(Kind.LEARN)
    if not evaluations:
        none = fault or "no evaluation ran inside an experience (loop.eval_every is not set, or exceeds its steps)"
        return dict.fromkeys(names, lambda: none)
    begun = max([run.finished - 1, *(v.experience for v in evaluations)])
    taken = {j for e in record.experiences[: begun + 1] for j, _ in e.erases}
    met = [j for j, e in enumerate(record.experiences[: begun + 1])
           if e.kind is Kind.LEARN and e.test_samples > 0 and j not in taken]  # fmt: skip
    if fault or not met:
        unmet = fault or "every learned test set is erased, in part or as a whole"
        return dict.fromkeys(names, lambda: unmet)
    ended = [j for j in met if j < run.finished]
    within = [v for v in evaluations if v.experience < run.finished]
    followed = None if any(j + 1 < run.finished for j in ended) else "no experience has finished after a learned one"
    inside = any(j < v.experience for j in ended for v in within)
    gap = followed or (None if inside else "no evaluation ran inside an experience after a learned one")
    return {
        "average_anytime_accuracy": lambda: anytime.average_anytime_accuracy(evaluations, met),
        "worst_case_accuracy": lambda: (
            anytime.worst_case_accuracy(run.scores, within, ended) if ended else run.lacking(Kind.LEARN)
        ),
        "minimum_accuracy": lambda: followed or anytime.minimum_accuracy(run.scores, within, ended),
        "stability_gap": lambda: gap or anytime.stability_gap(run.scores, within, ended),
    }


def _erasure(run: _Run) -> dict[str, Callable[[], float | str]]:
    """Metrics of forget experiences."""
    scores, requests, sizes = run.scores, run.requests, run.sizes
    fault = None if requests else run.lacking(Kind.FORGET)
    later = any(q.later(len(scores)) for q in requests)
    keeps = None
    if any(sum(n for j, n in sizes.items() if j < q.index) == 0 for q in requests):
        keeps = "nothing was learned before a request"
    elif any(_left(q, requests, sizes) <= 0 for q in requests):
        keeps = "a request leaves nothing of what was learned"
    elif any(q.erased and sum(q.erased.values()) != q.samples for q in requests):
        keeps = "the test set of a request is only partly contained in those learned before it"
    return {
        "forget_accuracy": lambda: fault or unlearning.forget_accuracy(scores, requests),
        "retain_accuracy": lambda: fault or keeps or unlearning.retain_accuracy(scores, requests, sizes),
        "forget_drop": lambda: fault or unlearning.forget_drop(scores, requests, run.forgets),
        "h_mean": lambda: fault or keeps or unlearning.h_mean(scores, requests, sizes, run.forgets),
        "h_step": lambda: fault or keeps or unlearning.h_step(scores, requests, sizes),
        "retention_loss": lambda: fault or keeps or unlearning.retention_loss(scores, requests, sizes),
        "relapse": lambda: (
            fault or (unlearning.relapse(scores, requests) if later else "no experience has finished after a request")
        ),
    }


def _taught_again(experiences: list[ExperienceRecord], index: int) -> int | None:
    """The first learn experience after request `index` with a class that it erased as a whole."""
    erased = set(experiences[index].classes)
    return next((j for j, e in enumerate(experiences[index:], index) if e.kind is Kind.LEARN and erased & {*e.classes}),
                None)  # fmt: skip


def _left(q: Request, requests: list[Request], sizes: dict[int, int]) -> int:
    """Test samples learned before request `q` and not erased by it or an earlier one."""
    erased = sum(sum(g.erased.values()) for g in requests if g.index <= q.index)
    return sum(n for j, n in sizes.items() if j < q.index) - erased


def _online(run: _Run) -> dict[str, Callable[[], float | str]]:
    """Metrics of adapt experiences."""
    entries = [r for r in run.record.online if r["seen"] > 0]
    segments = online.segments_of(run.record)
    fault = None if segments else run.lacking(Kind.ADAPT)
    single = None if len({s.round for s in segments}) > 1 else "no second round has finished"
    unsaid = None if any(s.severity for s in segments) else "the stream states no severity"
    experiences = run.record.experiences if segments else []
    before = next((i for i, e in enumerate(experiences) if e.kind is Kind.ADAPT), 0)
    clean = [j for j, e in enumerate(experiences)
             if e.test_samples > 0 and (e.kind is Kind.ADAPT or (e.kind is Kind.LEARN and j < before))]  # fmt: skip
    unscored = None if clean else "no clean test set is scored"
    after = run.scores[-1, clean] if len(run.scores) else np.array([])
    return {
        "online_error": lambda: (
            fault or adaptation.online_error([r["correct"] for r in entries], [r["seen"] for r in entries])
        ),
        "last_round_error": lambda: fault or single or online.last_round_error(segments),
        "round_drift": lambda: fault or single or online.round_drift(segments),
        "hardest_error": lambda: fault or unsaid or online.hardest_error(segments),
        "source_accuracy": lambda: fault or unscored or float(after.mean()),
        "source_drop": lambda: fault or unscored or float((run.scores[before, clean] - after).mean()),
    }


def _curves(run: _Run, entries: list[dict[str, Any]]) -> list[ReturnCurve] | str:
    """A curve for each interact experience that has finished, or why one is missing."""
    curves: list[ReturnCurve] = []
    for entry in entries:
        facts = run.record.experiences[entry["experience"]]
        if facts.return_bounds is None:
            return f"{facts.name}: no return_bounds to normalise by"
        if not entry["evaluations"]:
            return f"{facts.name}: no return was measured"
        steps, returns = zip(*entry["evaluations"], strict=True)
        low, high = facts.return_bounds
        curves.append(ReturnCurve(low, high, entry["before"], steps, returns))
    return curves or run.lacking(Kind.INTERACT)


def _adaptation(run: _Run) -> dict[str, Callable[[], float | str]]:
    """Metrics of interact experiences."""
    found = _curves(run, run.record.returns)
    curves, fault = ([], found) if isinstance(found, str) else (found, None)
    entry = None if all(c.before is not None for c in curves) else "the return on entry was not measured"
    unmet = "a normalised return of 0.9 was never measured"
    met = adaptation.steps_to_score(curves) if curves else math.nan
    return {
        "dip_area": lambda: fault or entry or adaptation.dip_area(curves),
        "steps_to_90": lambda: fault or (unmet if math.isnan(met) else met),
        "probe_td_error": lambda: _probed(run, "td_error", max),
        "probe_return_error": lambda: _probed(run, "return_error", lambda values: values[-1]),
        "normalized_return": lambda: fault or adaptation.normalized_return(curves),
        "initial_dip": lambda: fault or entry or adaptation.initial_dip(curves),
        "recovery_fraction": lambda: fault or entry or adaptation.recovery_fraction(curves),
    }


def _sequences(run: _Run) -> dict[str, Callable[[], float | str]]:
    """Metrics of several environments, one after the other."""
    entries = run.record.returns
    found = _curves(run, entries)
    curves, fault = ([], found) if isinstance(found, str) else (found, None)
    if fault is None and len(curves) < 2:
        fault = "no second environment has finished"
    rows = [[(entry.get("after") or {}).get(str(e["experience"])) for e in entries] for entry in entries]
    low, high = (np.array([getattr(c, bound) for c in curves]) for bound in ("random", "expert"))
    scores = (_array(rows, len(entries)) - low) / (high - low) if fault is None else np.array([])
    alone = fault or _reference_curves(run, curves)
    return {
        "final_return": lambda: fault or returns.final_return(scores),
        "return_forgetting": lambda: fault or returns.return_forgetting(scores),
        "return_forward_transfer": lambda: (
            alone if isinstance(alone, str) else returns.return_forward_transfer(curves, alone)
        ),
    }


def _reference_curves(run: _Run, curves: list[ReturnCurve]) -> list[ReturnCurve] | str:
    """Those of the reference run in the same environments, or why they can't be compared with."""
    entries = run.record.reference_returns
    if entries is None:
        return "no reference run is set (key `reference`)"
    own = [e["experience"] for e in run.record.returns]
    if [e["experience"] for e in entries[: len(own)]] != [run.record.experiences[i].name for i in own]:
        return "the reference run has other environments, or stopped before this one"
    found = _curves(run, [e | {"experience": i} for e, i in zip(entries, own, strict=False)])
    if isinstance(found, str):
        return found
    if [c.steps[-1] for c in found] != [c.steps[-1] for c in curves]:
        return "the reference run took another number of steps in an environment"
    if any(returns.area(c) >= 1 for c in found):
        return "the reference run is at the expert's return throughout: nothing is left to gain"
    return found


def _probed(run: _Run, name: str, of: Callable[[list[float]], float]) -> float | str:
    """`of` what the probe found in each experience that has one, averaged; or why there is nothing."""
    if fault := run.lacking(Kind.INTERACT):
        return fault
    found = [[e[name] for e in entry.get("probe", []) if name in e] for entry in run.record.returns]
    values = [of(v) for v in found if v]
    return sum(values) / len(values) if values else "no recorded transitions are kept to measure it on"


def _general(run: _Run) -> dict[str, Callable[[], float | str]]:
    """Metrics of sets that no experience learns."""
    found = general.table(run.record) or {}
    few = None if run.finished else "no experience has finished"

    def of(metric: Callable[[Matrix], float], what: str) -> Callable[[], float | str]:
        rows = [list(row) for row in zip(*found.get(what, {}).values(), strict=True)]
        values = _array(rows, len(rows[0])) if rows else None
        return lambda: few or metric(values) if values is not None else general.NONE

    return {
        "general_accuracy": of(general.general_accuracy, "accuracy"),
        "general_drop": of(general.general_drop, "accuracy"),
        "general_perplexity": of(general.general_perplexity, "perplexity"),
        "general_perplexity_ratio": of(general.general_perplexity_ratio, "perplexity"),
    }


def _domains(run: _Run) -> dict[str, Callable[[], float | str]]:
    """Metrics of domains whose scores are 1 / perplexity."""
    fault = None if run.record.perplexity else "scores of this stream are no perplexities"
    fault = fault or (None if run.learned else run.lacking(Kind.LEARN))
    followed = None if len(run.learned) > 1 else "no second domain has finished"
    alone = (perplexity.zero_shot_perplexity, perplexity.continual_perplexity, perplexity.last_perplexity)
    several = (perplexity.perplexity_forgetting, perplexity.perplexity_backward_transfer,
               perplexity.perplexity_forward_transfer)  # fmt: skip
    with np.errstate(divide="ignore", over="ignore"):
        values = 1 / (run.scores if fault is None else run.scores[:0])

    def of(metric: Callable[[Matrix, list[int]], float]) -> Callable[[], float | str]:
        return lambda: fault or (followed if metric in several else None) or metric(values, run.learned)

    return {metric.__name__: of(metric) for metric in (*alone, *several)}


def _array(rows: list[list[float | None]], width: int) -> Matrix:
    """Rows of scores as a float array (rows, `width`), NaN for None."""
    return np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=float).reshape(-1, width)
