"""A stream is a sequence of experiences, and an experience is one of four kinds.

Shapes: N samples of a data set, n of an experience, B of a batch, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from clplat.inputs import Ahead, Inputs
from clplat.preprocessing import Preprocessing, input_range, normalized, tensors
from clplat.preprocessing import Statistics as Statistics
from clplat.writing import Writing


class Kind(StrEnum):
    """What an experience asks of the learner."""

    LEARN = "learn"  # labelled data: acquire it without losing the past
    FORGET = "forget"  # a request to erase: erase it, and only it
    ADAPT = "adapt"  # unlabelled test data in order: predict first, then adapt
    INTERACT = "interact"  # an offline data set, then an environment: act, collect, improve


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """Rows of tensors held once and shared by all experiences; a batch is one indexing call.

    Args:
        inputs: (N, ...) the whole data set, as stored (uint8 images stay uint8); or `Inputs`, which are read from
            where they are when a batch is asked for.
        labels: (N,) int64 class ids, or None where the learner may not see them.
        rows: (n,) int64 rows of this experience in their natural order; None means all N.
        world: what this experience does to a batch of stored inputs (a permutation, a rotation, a corruption);
            deterministic, part of the data, and so applied before anything the learner stores.
    """

    inputs: Tensor | Inputs
    labels: Tensor | None
    rows: Tensor | None = None
    world: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        for name in ("inputs", "labels", "rows"):
            held = (Tensor, Inputs) if name == "inputs" else Tensor
            if not isinstance(value := getattr(self, name), held) and (value is not None or name == "inputs"):
                what = f"Data: {name} are a {type(value).__name__}"
                raise TypeError(f"{what} (valid: a tensor, as torch.from_numpy makes one)")

    def __len__(self) -> int:
        return len(self.inputs) if self.rows is None else len(self.rows)

    def __repr__(self) -> str:
        of = "" if self.rows is None else f" of {len(self.inputs)}"
        shape, dtype = tuple(self.inputs.shape[1:]), str(self.inputs.dtype).removeprefix("torch.")
        labels, world = "labelled" if self.labels is not None else "unlabelled", ", changed" if self.world else ""
        return f"{type(self).__name__}({len(self)}{of} samples, {shape} {dtype}, {labels}{world})"

    def batch(self, positions: Tensor | slice) -> tuple[Tensor, Tensor | None]:
        """Inputs (B, ...) and labels (B,) at `positions` (B,) int64 in [0, n); a slice of them where rows are given."""
        rows: Any = positions if self.rows is None else self.rows[positions]
        inputs = self.inputs[rows]
        if self.world is not None:
            inputs = self.world(inputs)
        return inputs, None if self.labels is None else self.labels[rows]

    def all(self) -> tuple[Tensor, Tensor | None]:
        """The whole experience as one batch."""
        return self.batch(torch.arange(len(self), device=self.inputs.device))

    def ahead(self, parts: Iterable[Tensor | slice]) -> Data:
        """The same; inputs that are not in memory are read ahead for batches at `parts`, as `batch` takes them."""
        if isinstance(self.inputs, Tensor):
            return self
        coming: Any = parts if self.rows is None else map(self.rows.__getitem__, parts)
        return dataclasses.replace(self, inputs=Ahead(self.inputs, coming))

    def row_ids(self) -> Tensor:
        """Rows (n,) int64 of these samples in the data set."""
        return torch.arange(len(self.inputs), device=self.inputs.device) if self.rows is None else self.rows

    def targets(self) -> Tensor:
        """Labels (n,) of this experience's rows."""
        if self.labels is None:
            raise ValueError("these data carry no labels")
        return self.labels if self.rows is None else self.labels[self.rows]

    def part_names(self) -> tuple[str, ...]:
        """What an adapt experience mixes and is scored apart by (corruptions, say); empty: nothing."""
        return ()

    def parts(self, rows: Tensor) -> Tensor:
        """Which part each of `rows` (B,) belongs to, (B,) int64 into `part_names`."""
        raise NotImplementedError("these data have no parts")

    def unlabelled(self) -> Data:
        """The same rows without their labels."""
        return dataclasses.replace(self, labels=None)

    def subset(self, positions: Tensor) -> Data:
        """Rows at `positions` (m,) int64 in [0, n)."""
        return dataclasses.replace(self, rows=positions if self.rows is None else self.rows[positions])

    def to(self, device: torch.device, moved: dict[int, Any] | None = None) -> Data:
        """On `device`. `moved` maps id(tensor) to its copy, so that what experiences share is moved once."""
        moved = {} if moved is None else moved

        def move(tensor: Any) -> Any:
            if tensor is None or tensor.device == device:
                return tensor
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor.to(device)
            return moved[id(tensor)]

        return dataclasses.replace(self, inputs=move(self.inputs), labels=move(self.labels), rows=move(self.rows))


@dataclass(frozen=True, eq=False)
class Answers:
    """What a stream tells of its classes to a model that knows them by their words: a language model, or CLIP.

    Args:
        classes: (C, A) int64 token ids of the answer that each class stands for, or of the prompt that describes it,
            its end token included, padded with -1; (0, 0) where answers are free text, or class ids alone are asked.
        end: id of the token that ends an answer.
        vocabulary: token ids lie below this.
        new_tokens: tokens to generate at most in evaluation; 0 scores the answers of the classes instead.
        tasks: classes of each task, where a test sample's task is told; else ().
    """

    classes: Tensor
    end: int
    vocabulary: int
    new_tokens: int = 0
    tasks: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Actions:
    """What a stream of environments tells of its actions: `size` numbers, each in [-1, 1]."""

    size: int


class Transition(NamedTuple):
    """One step in an environment. `terminated` is the end of the task; `truncated` a time limit, which is none."""

    observation: Any
    action: Any
    reward: float
    next_observation: Any
    terminated: bool
    truncated: bool = False


class Environment(Protocol):
    """What an `interact` experience acts in; Gymnasium's environments fit as they are."""

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]: ...

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]: ...


@dataclass(frozen=True, eq=False, repr=False)
class Experience:
    """One piece of a stream.

    Args:
        index: position in the stream, from 0.
        name: short and unique within the stream.
        kind: what it asks of the learner.
        train: what the learner is given: labelled data (learn), the samples to erase (forget), test inputs in order
            (adapt), offline transitions or None (interact).
        test: held-out data scored after every experience, one column of the accuracy matrix; no strategy sees it.
        valid: held-out training data for hyper-parameter choice, or None.
        classes: class ids in `train`, sorted; known without touching the data, so that structure can grow from it.
        task: task id; reaches `predict` only where the stream declares it known at test time.
        environment: makes the environment of an `interact` experience.
        environments: how many of it step side by side, ≥ 1; more than one do so in processes of their own.
        env_steps: steps to take in it, over all that step side by side.
        probe: rows of recorded transitions that errors of the values are measured on; no strategy sees them.
        return_bounds: (random, expert) mean returns, which normalise the return; None leaves it raw.
        domain: what the inputs of an `adapt` experience come from (a corruption), for the record; "": several.
        severity: how far that is from the source, from 1; 0: unsaid.
        round: how often its domain came before in the stream.
        request: ids that a `forget` request names: class:N, sample:ROW, experience:NAME or user:N (`erasure.ledger`).
        title: what figures and tables call it, such as the names of its classes; "": its name.
    """

    index: int
    name: str
    kind: Kind
    train: Data | None
    test: Data | None = None
    valid: Data | None = None
    classes: tuple[int, ...] = ()
    task: int = 0
    environment: Callable[[], Environment] | None = None
    environments: int = 1
    env_steps: int = 0
    probe: Data | None = None
    return_bounds: tuple[float, float] | None = None
    request: tuple[str, ...] = ()
    domain: str = ""
    severity: int = 0
    round: int = 0
    title: str = ""

    def __repr__(self) -> str:
        sizes = [f"{len(d)} {k}" for k in ("train", "test", "valid") if (d := getattr(self, k)) is not None]
        sizes += [f"{self.env_steps} steps to act"] if self.environment is not None else []
        said = "; ".join([", ".join(sizes) or "no data", f"classes {_listed(self.classes) or 'none'}", *self.request])
        return f"Experience({self.index}, {self.name!r}, {self.kind}: {said})"

    def seen(self) -> Experience:
        """What a strategy may see of it: no test data, no labels of data that are to be adapted to."""
        hidden = self.train.unlabelled() if self.kind is Kind.ADAPT and self.train is not None else self.train
        return dataclasses.replace(self, test=None, train=hidden, probe=None)

    def to(self, device: torch.device, moved: dict[int, Any]) -> Experience:
        """Its data on `device` (see `Data.to`)."""
        parts = {k: getattr(self, k) for k in ("train", "test", "valid", "probe")}
        return dataclasses.replace(self, **{k: v.to(device, moved) for k, v in parts.items() if v is not None})


class Stream(Sequence[Experience]):
    """A sequence of experiences, and what they have in common.

    A stream file holds one subclass whose constructor takes its options, plus `seed` (None: the run's) and
    `data_root`, and hands the finished experiences to this constructor.

    Args:
        experiences: in order.
        num_classes: classes of the whole stream (0 where there are none).
        input_shape: of one sample as `prepare` returns it.
        task_known: whether `predict` is told the task id of a test sample (task-incremental evaluation).
        class_names: name of each class id, in order of class id.
        normalize: (mean, std) per channel of images in [0, 1]; None leaves inputs in [0, 1].
        augment: maps a prepared training batch to its augmentation; draws from torch's generator only.

    Raises:
        UserError: an input is NaN or infinite.
    """

    # Of a stream whose classes are words, or which is acted in; and of one of free text; set by its constructor.
    answers: Answers | Actions | None = None
    writing: Writing | None = None
    normalize_asked = False  # whether the user chose how it normalises, or it is the stream's own default
    # What was left out or cut: lines that are said when a run starts; set by its constructor.
    notes: Sequence[str] = ()
    # How its inputs were made of raw ones: fields of `Preprocessing`; set by its constructor.
    origin: Mapping[str, Any] = {}
    perplexity = False  # whether the score of a test set is 1 / perplexity
    # Sets that no experience learns, measured before the first and after each, by what is measured ("accuracy",
    # "perplexity"): streams whose experiences hold test data alone; set by its constructor.
    general: Mapping[str, Stream] = {}

    def __init__(
        self,
        experiences: Sequence[Experience],
        *,
        num_classes: int,
        input_shape: tuple[int, ...],
        task_known: bool = False,
        class_names: Sequence[str] = (),
        normalize: Statistics | None = None,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.experiences = tuple(experiences)
        self.input_range = input_range(_inputs(self.experiences))
        self.num_classes = num_classes
        self.input_shape = tuple(input_shape)
        self.task_known = task_known
        self.class_names = tuple(class_names)
        self.augment = augment
        self.normalize, self._mean_std = normalize, tensors(normalize, len(self.input_shape))

    def __len__(self) -> int:
        return len(self.experiences)

    def __getitem__(self, index: int) -> Experience:  # type: ignore[override]
        return self.experiences[index]

    def __iter__(self) -> Iterator[Experience]:
        return iter(self.experiences)

    def __repr__(self) -> str:
        kinds, names = ", ".join(dict.fromkeys(str(e.kind) for e in self)), _listed([e.name for e in self])
        head = f"{type(self).__name__}({len(self)} experiences ({kinds}), {self.num_classes} classes, inputs"
        return f"{head} {self.input_shape}: {names})"

    def among(self, logits: Tensor, task: int | None) -> Tensor:
        """Logits (B, C) with −∞ for the classes that `task` has not, so that a prediction is one among the task's own.

        As they are where no task is told, where its classes are not known, and where they are no class scores.
        """
        return among(logits, task, self.experiences)

    def prepare(self, inputs: Tensor, training: bool) -> Tensor:
        """Stored inputs to what a model takes: bytes to [0, 1], normalisation and, in training, augmentation."""
        inputs = normalized(inputs, self._mean_std)
        return self.augment(inputs) if training and self.augment is not None else inputs

    def preprocessing(self) -> Preprocessing:
        """What becomes of raw inputs, as data. A stream with a `prepare` of its own has code, which is no data."""
        parts = (d for e in self.experiences if e.kind is not Kind.INTERACT for d in (e.test, e.train, e.valid))
        held = next((d for d in parts if d is not None and len(d)), None)
        one = None if held is None else held.batch(torch.arange(1, device=held.inputs.device))[0]
        made: dict[str, Any] = {"shape": self.input_shape if one is None else tuple(one.shape[1:])}
        made |= {"acting": {}} if isinstance(self.answers, Actions) else {}
        refused = dict(self.origin.get("refused", {}))
        if one is not None and one.dtype == torch.uint8:
            made["white"] = 255
        elif one is not None:
            made["ids"] = not one.is_floating_point()
            low, high = self.input_range or (0.0, 0.0)
            if "white" not in self.origin and one.ndim > 3 and low >= 0 and high <= 1:
                made["white"] = 1
                refused.setdefault("pictures", "the run was made of numbers in [0, 1], not of pictures")
        if type(self).prepare is not Stream.prepare:
            refused["all"] = f"{type(self).__name__}.prepare is code of its own, which no checkpoint holds"
        return Preprocessing(**{"normalize": self.normalize, **made, **self.origin, "refused": refused})

    def leave_normalization(self) -> None:
        """From now on inputs stay in [0, 1]: the model normalises them."""
        self.normalize = self._mean_std = None

    def arrange(self, data: Data, order: Tensor, batch_size: int) -> Tensor:
        """Shuffled positions (n,) of one epoch over `data`, put in another order if that makes better batches."""
        return order

    def score(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Score in [0, 1] of each sample, (B,) float; here accuracy: logits (B, C) against labels (B,).

        Logits that are all −∞ (each known class is masked) predict nothing, so nothing is right.
        """
        return ((predictions.argmax(1) == labels) & ~predictions.isneginf().all(1)).float()

    def weights(self, labels: Tensor) -> Tensor:
        """What each of samples with these labels counts in the score of its test set, (B,); here all alike."""
        return torch.ones(len(labels), device=labels.device)

    def pooled(self, mean: float) -> float:
        """Score in [0, 1] of a test set, from the weighted mean of its samples' scores; here that."""
        return mean

    def to(self, device: torch.device) -> Stream:
        """Move the data to `device`, each shared tensor once. Returns self."""
        moved: dict[int, Any] = {}
        self.experiences = tuple(e.to(device, moved) for e in self.experiences)
        if self._mean_std is not None:
            self._mean_std = (self._mean_std[0].to(device), self._mean_std[1].to(device))
        for sets in self.general.values():
            sets.to(device)
        return self


class _Taught(Protocol):
    """What is known of an experience whose data are not at hand."""

    @property
    def task(self) -> int: ...
    @property
    def classes(self) -> tuple[int, ...]: ...


def among(logits: Tensor, task: int | None, experiences: Sequence[_Taught]) -> Tensor:
    """See `Stream.among`; `experiences` are those of the whole stream."""
    if task is None or logits.ndim != 2 or not logits.is_floating_point():
        return logits
    own = {c for e in experiences if e.task == task for c in e.classes}
    return only(logits, sorted(c for c in own if c < logits.shape[1])) if own else logits


def _listed(items: Sequence[Any]) -> str:
    """At most six, and how many there are more."""
    return ", ".join(map(str, items[:6])) + (f" and {len(items) - 6} more" if len(items) > 6 else "")


def _inputs(experiences: Sequence[Experience]) -> Iterator[tuple[str, Tensor | Inputs]]:
    """The stored inputs of each part, but for transitions, which their reader checks: a return not known yet is NaN."""
    for e in experiences:
        for part, data in (("training", e.train), ("test", e.test), ("validation", e.valid)):
            if data is not None and e.kind is not Kind.INTERACT:
                yield part, data.inputs


def only(logits: Tensor, classes: Sequence[int]) -> Tensor:
    """Logits (B, C) with −∞ for all but `classes`, each below C."""
    kept = torch.full_like(logits, -torch.inf)
    kept[:, classes] = logits[:, classes]
    return kept
