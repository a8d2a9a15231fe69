"""What a run has measured: filled by the loop, read by metrics, summary, tracking and report. Holds plain numbers.

Indices: E experiences; row i of the accuracy matrix is after i experiences, column j is test set j.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from clplat.stream import Kind


@dataclass
class ExperienceRecord:
    """Facts of one experience.

    Args:
        erases: of a forget experience: (index of an earlier learn experience, how many of its test samples are in this
            one's test set) for each that shares any; see `clplat.metrics.erasure`.
        late: a request made after the stream's end.
        domain, severity, round, title: as `clplat.stream.Experience` has them.
    """

    name: str
    kind: Kind
    train_samples: int
    test_samples: int
    classes: tuple[int, ...] = ()
    task: int = 0
    return_bounds: tuple[float, float] | None = None
    erases: tuple[tuple[int, int], ...] = ()
    domain: str = ""
    severity: int = 0
    round: int = 0
    late: bool = False
    title: str = ""


@dataclass
class RunRecord:
    """All measurements of a run so far.

    Args:
        experiences: of the whole stream, run or not.
        matrix: (E + 1) rows of E scores in [0, 1] or None where not measured; rows are added as the run goes.
        anytime: evaluations inside experiences: {"step", "experience", "scores": E scores or None}.
        online: for each adapt experience run: {"experience", "correct", "seen"}, predictions before adaptation; where
            it mixes several parts also {"correct/<part>", "seen/<part>"} of each.
        returns: for each interact experience run: {"experience", "before": return at entry or None,
            "evaluations": [[env_step, mean return], ...]}, and where the stream has several environments "after":
            {index of an experience as text: mean return in its environment when this one has ended}.
        general: before the first experience and after each, of what no experience learns: {"accuracy": {set: score in
            [0, 1]}, "perplexity": {text: ≥ 1}}, each where the stream has such; None: infinite.
        representation: for each experience run: {"dormant_fraction", "effective_rank", "weight_norm",
            "gradient_norm"}, None where not measured.
        cost: totals: see clplat.metrics.cost.
        reference: matrix of the reference run, or None.
        reference_returns: `interaction` of the reference run's summary, or None; see clplat.metrics.interaction.
        ledger: an event for each experience begun: see clplat.erasure.ledger.
        class_names: name of each class id, where the stream has names.
        perplexity: whether scores are 1 / perplexity.
        notes: what the stream said of how it read its data: what was held out, cut or left out.
    """

    experiences: list[ExperienceRecord]
    matrix: list[list[float | None]] = field(default_factory=list)
    anytime: list[dict[str, Any]] = field(default_factory=list)
    online: list[dict[str, Any]] = field(default_factory=list)
    returns: list[dict[str, Any]] = field(default_factory=list)
    general: list[dict[str, dict[str, float | None]]] = field(default_factory=list)
    representation: list[dict[str, float | None]] = field(default_factory=list)
    cost: dict[str, float | int | None] = field(default_factory=dict)
    reference: list[list[float | None]] | None = None
    reference_returns: list[dict[str, Any]] | None = None
    ledger: list[dict[str, Any]] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    perplexity: bool = False
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, none of them shared with the record."""
        # What grows with the stream's square is copied in rows: `asdict` goes number by number.
        plain = asdict(replace(self, experiences=[], matrix=[], anytime=[], reference=None))
        plain["experiences"] = [dict(vars(e)) for e in self.experiences]
        plain["matrix"] = [list(row) for row in self.matrix]
        plain["anytime"] = [{**point, "scores": list(point["scores"])} for point in self.anytime]
        plain["reference"] = None if self.reference is None else [list(row) for row in self.reference]
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> RunRecord:
        """Inverse of `to_dict` after a trip through JSON."""
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in plain.items() if k in known}
        values["experiences"] = [
            ExperienceRecord(**{**e, "kind": Kind(e["kind"]), "classes": tuple(e["classes"]),
                                "return_bounds": tuple(e["return_bounds"]) if e["return_bounds"] else None,
                                "erases": tuple((j, n) for j, n in e.get("erases", ()))})
            for e in plain["experiences"]
        ]  # fmt: skip
        return cls(**values)
