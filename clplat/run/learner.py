"""The learner of a run without its stream: what `clplat.load` gives, to be asked about raw inputs.

Shapes: N samples, C classes, a numbers of an action.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from clplat.config.settings import Config
from clplat.data.environments import in_units
from clplat.data.raw import Raw
from clplat.errors import UserError
from clplat.metrics.record import ExperienceRecord, RunRecord
from clplat.metrics.text import normalized
from clplat.preprocessing import Preprocessing
from clplat.run.build import build_strategy
from clplat.run.filing import file_memories
from clplat.strategy import Strategy, evaluating
from clplat.stream import Actions, Experience, among

_NONE = "the checkpoint holds no preprocessing: it was written before checkpoints did"


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a learner says of N samples.

    Args:
        ids: (N,) int64 class ids, those of the stream; -1: no class, or text that is none.
        names: of each: its class, or the text that was written; None: no class.
        scores: (N, C) logits, −∞ for classes that are out of the question; None where text was written.
    """

    ids: Tensor
    names: list[str | None]
    scores: Tensor | None

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.names[:10])) + ", ..." * (len(self.names) > 10)
        return f"Predictions of {len(self)}: {shown}"


@dataclass(eq=False)
class OfRun:
    """What a loaded learner knows of its run. An object of its own, so that no name in it meets one of a strategy's.

    Args:
        facts: of the stream, as the checkpoint has them.
        experiences: of the run.
        met: those that the learner was grown for, without data.
        precision: that of the run.
    """

    facts: Mapping[str, Any]
    experiences: Sequence[ExperienceRecord]
    met: Sequence[Experience]
    precision: str

    def __post_init__(self) -> None:
        held = self.facts.get("preprocessing")
        self.preprocessing = Preprocessing(refused={"all": _NONE}) if held is None else Preprocessing.from_dict(held)
        self.raw = Raw(self.preprocessing)
        self.task_known: bool = self.facts.get("task_known", False)
        self.classes = tuple(self.facts["names"]) or tuple(map(str, range(self.facts["num_classes"])))

    @torch.no_grad()
    def ask(self, learner: Learner, inputs: Any, task: int | None, batch_size: int) -> Any:
        """See `Learner.forward`."""
        if self.preprocessing.acting is not None:
            return self._act(learner, inputs, task)
        self._check_task(task)
        held = self.raw.held(inputs, task)
        told = task if self.task_known else None
        size = learner.evaluation_batch or batch_size
        with evaluating(learner), self._in_precision(learner):
            parts = [learner.predict(self.prepared(learner, part), told).cpu() for part in held.split(size)]
        return self._named(torch.cat(parts) if parts else torch.empty(0, len(self.classes)))

    def prepared(self, learner: Learner, held: Tensor) -> Tensor:
        """What is predicted from, of samples as the stream holds them."""
        return self.preprocessing.prepare(held.to(learner.device))

    @contextlib.contextmanager
    def _in_precision(self, learner: Learner) -> Iterator[None]:
        """That of the run."""
        mixed = self.precision == "bf16-mixed"
        with torch.autocast(learner.device.type, torch.bfloat16, enabled=mixed):
            yield

    def _check_task(self, task: int | None) -> None:
        tasks = sorted({e.task for e in self.experiences if e.classes})
        if self.task_known and task not in tasks:
            raise UserError(f"task: {task} (valid: {', '.join(map(str, tasks))}; this run was told the task)")
        if not self.task_known and task is not None and not self.preprocessing.choices:
            raise UserError(f"task: {task} has no meaning here (valid: None; this run was told no task)")

    def _named(self, found: Tensor) -> Predictions:
        """Of logits (N, C), or of the ids (N, tokens) of written texts."""
        if found.is_floating_point():
            none = found.isneginf().all(1) if found.shape[1] else torch.ones(len(found), dtype=torch.bool)
            ids = found.argmax(1).masked_fill(none, -1) if found.shape[1] else none.long().neg()
            names = [None if i < 0 else self._name(i) for i in ids.tolist()]
            return Predictions(ids, names, found.float())
        texts = [self.raw.tokenizer.decode([i for i in row if i >= 0]).strip() for row in found.tolist()]
        known = {normalized(name): number for number, name in enumerate(self.classes)}
        ids = torch.tensor([known.get(normalized(text), -1) for text in texts], dtype=torch.int64)
        return Predictions(ids, list(texts), None)

    def _name(self, number: int) -> str:
        return self.classes[number] if number < len(self.classes) else str(number)

    def _act(self, learner: Learner, inputs: Any, task: int | None) -> np.ndarray:
        """What the policy does, without exploring."""
        acting = self.preprocessing.acting
        assert acting is not None
        bounds = list(zip(acting.get("low", ()), acting.get("high", ()), strict=True))
        if task is None and any(b != bounds[0] for b in bounds):
            raise UserError(f"task: None, but bounds of actions differ (valid: 0 to {len(bounds) - 1})")
        if task is not None and not 0 <= task < len(bounds):
            raise UserError(f"task: {task} (valid: 0 to {len(bounds) - 1})")
        observations, single = self.raw.observations(inputs)
        with evaluating(learner), self._in_precision(learner):
            chosen = np.asarray(learner.act(observations, False))
        if bounds:
            chosen = in_units(chosen, *(np.array(end, dtype=acting["dtype"]) for end in bounds[task or 0]))
        return chosen[0] if single else chosen


class Learner(Strategy):
    """A run's learner, of its strategy's class: a strategy that can be asked without its stream.

    Called, it takes raw inputs. `prepare` makes of them what `predict`, which gives logits, takes. Where a task is
    named, its classes alone are predicted, as in the run's evaluation. `of_run` is what it knows of its run.
    """

    of_run: OfRun
    classes: Any  # name of each class id; where a strategy has an attribute of this name it is that: `of_run.classes`

    def forward(self, inputs: Any, task: int | None = None, batch_size: int = 256) -> Any:
        """`Predictions` for raw inputs; of an agent, actions (a,) or (N, a) in the units of its environment,
        or in [-1, 1] where its stream does not tell them.

        Args:
            inputs: a sample or several, as the stream holds them or as it was made of them: arrays, tensors, Pillow's
                images, texts, one or a list; of an agent: an observation, or an array of several.
            task: of all of them, where the run was told it; of an agent the experience, where bounds differ.
            batch_size: samples at once, unless the strategy's predictions depend on it.

        Raises:
            UserError: inputs that can't be read as those of the run were; no task, or one that there is not.
        """
        return self.of_run.ask(self, inputs, task, batch_size)

    def prepare(self, raw: Any, task: int | None = None) -> Tensor:
        """Raw inputs, as for a call, to those (N, ...) that `predict` takes."""
        return self.of_run.prepared(self, self.of_run.raw.held(raw, task))

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        """As the strategy's; of a task that is named, its own classes only."""
        return among(super().predict(inputs, *_told(task)), task, self.of_run.experiences)

    def readout(self, features: Tensor, task: int | None = None) -> Tensor:
        """As the strategy's; of a task that is named, its own classes only."""
        return among(super().readout(features, *_told(task)), task, self.of_run.experiences)


def _told(task: int | None) -> tuple[int, ...]:
    """A task is not passed at all where none is told: a strategy need not know of any."""
    return () if task is None else (task,)


def size(facts: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    """Shape of a prepared sample, and how many classes there are."""
    return tuple(facts["input_shape"]), facts["num_classes"]


def actions(facts: Mapping[str, Any]) -> Actions | None:
    """What an agent is told of its actions."""
    return None if facts.get("actions") is None else Actions(facts["actions"])


def rebuilt(config: Config, state: dict[str, Any], run_dir: Path) -> Learner:
    """The learner of a checkpoint's state: built, grown as it was, its weights loaded; on the CPU."""
    facts = state["stream"]
    made = build_strategy(config, *size(facts), seed=config.seed, answers=actions(facts))
    record, progress = RunRecord.from_dict(state["record"]), state["progress"]
    met = [
        Experience(index, e.name, e.kind, train=None, classes=e.classes, task=e.task)
        for index, e in enumerate(record.experiences[: progress["experience"] + progress["begun"]])
    ]
    for experience in met:
        made.grow(experience)
    if config.loop.memory_on_disk:
        file_memories(made, run_dir, 0, goes_on=False)
    made.load_state_dict(state["strategy"])
    own = type(made)
    made.__class__ = type(own.__name__, (Learner, own), {"__module__": own.__module__, "__doc__": own.__doc__})
    learner = cast(Learner, made)
    learner.of_run = OfRun(facts, record.experiences, met, config.fabric.precision)
    if not hasattr(learner, "classes"):
        learner.classes = learner.of_run.classes
    return learner.eval()
