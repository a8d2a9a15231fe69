"""The audit of requests to forget: what a model knows of the erased data before and after each, measured in the loop.

Around each forget experience the loop calls `before` and `after`. They score samples of what is erased and of what
is kept (`sets`) with the model before an unbroken sequence of requests (`original`) and after the request
(`unlearned`), and try to learn the erased samples again on copies of the weights (`sandbox`). What they find is written
to `RUN_DIR/audit/<index>/`, one file of scores and one of numbers for each model; nothing of it is state of the run,
which ends in the same learner, bit for bit, with or without. A resumed run writes the same files again.

    original.safetensors, unlearned.safetensors     <set>.logits (n, C), <set>.labels, <set>.rows, <set>.source (n,)
    original.json, unlearned.json                   sizes, model_sha256, probe, relearn

`rows` are those of the data set's tensor, `source` the experience that the samples come from: two runs on one stream
score the same samples, so that an oracle can be compared with afterwards, sample by sample (`clplat.report.evidence`).

Shapes: n samples of a set, C classes of the stream, D features.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clplat.components.filed import content
from clplat.components.shards import whole
from clplat.components.state import rng_state, set_rng_state, sha256
from clplat.config.settings import AuditSettings
from clplat.erasure.audit.sandbox import relearn
from clplat.erasure.audit.sets import SETS, Piece, draw, sets_of
from clplat.files import to_json, write_atomic
from clplat.metrics.membership import erased_loss_auc, scored
from clplat.metrics.relearning import probe_accuracy
from clplat.strategy import Strategy, evaluating
from clplat.stream import Answers, Data, Experience, Kind, Stream

FOLDER = "audit"
MASKED = -torch.inf


@dataclass(frozen=True)
class Subject:
    """A learner to be audited, and where and how it is scored.

    Args:
        part: of each experience that held-out samples are taken from, test or valid.
        batch_size: samples scored at once.
        precision: the context in which the learner predicts.
        rank, world_size: this process's share of the batches.
        run_dir: where the findings go; None writes nowhere.
    """

    strategy: Strategy
    stream: Stream
    settings: AuditSettings
    part: str
    batch_size: int
    device: torch.device
    precision: Callable[[], AbstractContextManager[Any]]
    rank: int
    world_size: int
    run_dir: Path | None


def before(subject: Subject, experience: Experience) -> None:
    """Score the model that a sequence of requests is made to, on the sets of each of them; collective under DDP."""
    if not _audited(subject, experience):
        return
    experiences, at = subject.stream.experiences, experience.index
    if at and experiences[at - 1].kind is Kind.FORGET:
        return  # within a sequence
    sequence = list(takewhile(lambda e: e.kind is Kind.FORGET, experiences[at:]))
    with _apart(subject):
        for request, found in zip(sequence, _measure(subject, [e.index for e in sequence]), strict=True):
            _write(subject, request.index, "original", *found)


def after(subject: Subject, experience: Experience) -> dict[str, float]:
    """Score the model that a request has left; what is to be logged of it. Collective under DDP."""
    if not _audited(subject, experience):
        return {}
    with _apart(subject):
        ((scores, numbers),) = _measure(subject, [experience.index])
        erased = draw(sets_of(subject.stream.experiences, experience.index)["erased"], subject.settings.samples, 0)
        if subject.settings.relearn_steps and erased:
            numbers["relearn"] = _relearn(subject, erased[0])
        _write(subject, experience.index, "unlearned", scores, numbers)
    return _logged(scores, numbers)


def _audited(subject: Subject, experience: Experience) -> bool:
    """Whether there is anything to score: text that is written has no scores of classes."""
    answers = subject.stream.answers
    writes = isinstance(answers, Answers) and answers.new_tokens > 0
    return subject.settings.enabled and experience.kind is Kind.FORGET and not writes


def logits_of(subject: Subject, data: Data, task: int) -> Tensor:
    """Logits (n, C) of the model as it is now, on the CPU; −inf for classes without a row. Collective under DDP."""
    with _apart(subject):
        return _score(subject, data, task)["logits"]


@contextmanager
def _apart(subject: Subject) -> Iterator[None]:
    """Evaluation mode and precision; afterwards all random states are what they were."""
    state = rng_state()
    try:
        with evaluating(subject.strategy), subject.precision():
            yield
    finally:
        set_rng_state(state)


def _measure(subject: Subject, requests: Sequence[int]) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """For each request, scores of all its sets and numbers about the model, as it is now."""
    most, part, experiences = subject.settings.samples, subject.part, subject.stream.experiences
    full = [sets_of(experiences, index, part) for index in requests]
    drawn = [{s: draw(sets[s], most, k) for k, s in enumerate(SETS)} for sets in full]
    table = _Table(subject, [p for sets in drawn for pieces in sets.values() for p in pieces])
    writes, found = subject.run_dir is not None, []
    state = whole(content(subject.strategy.state_dict(keep_vars=True)), keep=writes)
    digest = sha256(state) if writes else None
    for sets, chosen in zip(full, drawn, strict=True):
        looked_up = {name: table.look_up(pieces) for name, pieces in chosen.items() if pieces}
        features = {name: entry.pop("features") for name, entry in looked_up.items() if "features" in entry}
        scores = {f"{name}.{key}": value for name, entry in looked_up.items() for key, value in entry.items()}
        numbers = {
            "sizes": {s: sum(len(p.data) for p in sets[s]) for s in SETS},
            "scored": {s: sum(len(p.data) for p in chosen[s]) for s in SETS},
            "model_sha256": digest,
            "probe": _probe(scores, features),
        }
        found.append((scores, numbers))
    return found


class _Table:
    """Logits and features of samples, each scored once however many sets hold it.

    Args:
        subject: whose strategy is scored.
        pieces: of all sets.
    """

    def __init__(self, subject: Subject, pieces: Sequence[Piece]) -> None:
        grouped: dict[tuple[int, int, int], list[Piece]] = {}
        for piece in pieces:
            grouped.setdefault(self._key(piece), []).append(piece)
        self.rows: dict[tuple[int, int, int], Tensor] = {}
        self.values: dict[tuple[int, int, int], dict[str, Tensor]] = {}
        for key, members in grouped.items():
            rows = torch.cat([p.data.row_ids() for p in members]).unique()
            data = dataclasses.replace(members[0].data, rows=rows)
            self.rows[key], self.values[key] = rows.cpu(), _score(subject, data, members[0].task)

    @staticmethod
    def _key(piece: Piece) -> tuple[int, int, int]:
        return id(piece.data.inputs), id(piece.data.world), piece.task

    def look_up(self, pieces: Sequence[Piece]) -> dict[str, Tensor]:
        """What is known of all samples of `pieces`, in their order, with their labels, rows and sources."""
        parts: dict[str, list[Tensor]] = {}
        for piece in pieces:
            key, rows = self._key(piece), piece.data.row_ids().cpu()
            at = torch.searchsorted(self.rows[key], rows)
            for name, values in self.values[key].items():
                parts.setdefault(name, []).append(values[at])
            parts.setdefault("labels", []).append(piece.data.targets().cpu())
            parts.setdefault("rows", []).append(rows)
            parts.setdefault("source", []).append(torch.full((len(rows),), piece.source))
        return {name: torch.cat(values) for name, values in parts.items()}


@torch.no_grad()
def _score(subject: Subject, data: Data, task: int) -> dict[str, Tensor]:
    """Logits (n, C) of all samples of `data`, and features (n, D) if there are any, on the CPU.

    Every process scores its share of the batches; each sample is in one share only, and the shares are added up.
    """
    size, world, device = subject.strategy.evaluation_batch or subject.batch_size, subject.world_size, subject.device
    mine: dict[str, list[tuple[int, Tensor]]] = {"logits": [], "features": []}
    parts = torch.arange(len(data), device=data.inputs.device).split(size)[subject.rank :: world]
    coming = data.ahead(parts)
    for k, positions in enumerate(parts):
        inputs, at = _inputs(subject, coming.subset(positions)), (k * world + subject.rank) * size
        mine["logits"].append((at, _logits(subject, inputs, task)))
        mine["features"] += [(at, f) for f in _features(subject, inputs)]
    gathered = {k: _gathered(parts, len(data), device, world) for k, parts in mine.items()}
    return {k: v for k, v in gathered.items() if v is not None}


def _inputs(subject: Subject, data: Data) -> Tensor:
    return subject.stream.prepare(data.all()[0].to(subject.device), False)


def _logits(subject: Subject, inputs: Tensor, task: int) -> Tensor:
    """(b, C) logits, −inf for classes without a row; what is no class score has no column."""
    predict = subject.strategy.predict
    logits = predict(inputs, task) if subject.stream.task_known else predict(inputs)
    if logits.ndim != 2:
        return inputs.new_zeros(len(inputs), 0)
    missing = subject.stream.num_classes - logits.shape[1]
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    logits = subject.stream.among(logits, task if subject.stream.task_known else None)
    return torch.nn.functional.pad(logits, (0, max(missing, 0)), value=MASKED)


def _features(subject: Subject, inputs: Tensor) -> list[Tensor]:
    """[(b, D) features], or [] where the model offers none of that shape."""
    features = getattr(subject.strategy.model, "features", None)
    found = features(inputs) if callable(features) else None
    return [found.float()] if isinstance(found, Tensor) and found.ndim == 2 else []


def _gathered(parts: list[tuple[int, Tensor]], total: int, device: torch.device, world: int) -> Tensor | None:
    """All processes' parts (first row, values) put together, (total, width), on the CPU; None where there are none."""
    facts = torch.tensor([parts[0][1].shape[1], int(parts[0][1].dtype == torch.float64)] if parts else [-1, 0],
                         device=device)  # fmt: skip
    if world > 1:
        torch.distributed.all_reduce(facts, torch.distributed.ReduceOp.MAX)
    width, double = facts.tolist()
    if width < 0:
        return None
    whole = torch.zeros(total, width, dtype=torch.float64 if double else torch.float32, device=device)
    for at, values in parts:
        whole[at : at + len(values)] = values
    if world > 1:
        torch.distributed.all_reduce(whole)  # every row is that of one process, and zeros of the others
    return whole.cpu()


def _probe(scores: dict[str, Tensor], features: dict[str, Tensor]) -> float | None:
    """Accuracy on the erased test samples of a linear classifier fitted anew on the model's features; None: no such."""
    if not {"erased", "erased_test"} <= features.keys():
        return None
    fit = [s for s in ("erased", "retained") if s in features]
    x, y = torch.cat([features[s] for s in fit]), torch.cat([scores[f"{s}.labels"] for s in fit])
    return probe_accuracy(x.numpy(), y.numpy(), features["erased_test"].numpy(), scores["erased_test.labels"].numpy())


def _relearn(subject: Subject, piece: Piece) -> dict[str, Any]:
    """The curve of relearning, and the settings that another one must share to be compared."""
    settings, strategy, size = subject.settings, subject.strategy, len(piece.data)
    count = min(settings.relearn_samples, size)
    positions = torch.linspace(0, size - 1, count, device=piece.data.inputs.device).long()
    data = piece.data.subset(positions)
    lr = strategy.lr if settings.relearn_lr is None else settings.relearn_lr
    inputs, labels = _inputs(subject, data), data.targets().to(subject.device)
    task = piece.task if subject.stream.task_known else None
    among = subject.stream.among
    found = relearn(strategy, inputs, labels, task, steps=settings.relearn_steps, lr=lr, among=among)
    facts = {"optimizer": strategy.optimizer_name, "momentum": strategy.momentum, "lr": lr}
    return found | {"settings": facts | {"samples": count, "steps": settings.relearn_steps},
                    "positions": positions.tolist(), "tolerance": settings.tolerance}  # fmt: skip


def _write(subject: Subject, index: int, model: str, scores: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Both files of a model, from process 0; the numbers last, so that they stand for the scores too."""
    from safetensors.torch import save

    if subject.run_dir is None:
        return
    folder = audit_dir(subject.run_dir, index)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{model}.safetensors", save({k: v.contiguous() for k, v in scores.items()}))
    write_atomic(folder / f"{model}.json", to_json(numbers, indent=1))


def audit_dir(run_dir: Path, index: int) -> Path:
    """Folder of the audit of the request at `index`."""
    return run_dir / FOLDER / f"{index:03d}"


def _logged(scores: dict[str, Tensor], numbers: dict[str, Any]) -> dict[str, float]:
    """Scalars for the log: accuracies on the samples scored, AUC of the loss attack, what the probe finds."""
    arrays = {name: values.numpy() for name, values in scores.items()}
    found = {
        f"audit/accuracy_{name}": float((arrays[f"{name}.logits"].argmax(1) == arrays[f"{name}.labels"]).mean())
        for name in SETS
        if scored(arrays, name)
    }
    if math.isfinite(attack := erased_loss_auc(arrays)):
        found["audit/loss_auc"] = attack
    if numbers["probe"] is not None:
        found["audit/probe_accuracy"] = numbers["probe"]
    return found
