"""Tiny streams that can be learned: Gaussian clouds, a request to forget, shifted inputs, a walk on a line.

Shapes: N samples of a pool, n of an experience; samples are (3, 4, 4), or (2,) where there is nothing but interacting.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clplat.data.transitions import Transitions, pack
from clplat.stream import Actions, Answers, Data, Experience, Kind, Stream
from clplat.testing.writing import END, IDS, TOKENS, Slate

CLASSES, IMAGE, OBSERVATION = 6, (3, 4, 4), (2,)
# Odd in sum, so that a last batch is short and does not divide evenly between two processes.
PER_CLASS = (13, 12)
WORDS = torch.tensor([[1, 3 + c, 2] for c in range(CLASSES)])  # what a model that answers in words calls each class
SAMPLES = 5  # that the second request names


class Shift:
    """What an adapt experience does to its inputs: a scale and an offset, the same for all samples."""

    def __init__(self, amount: float) -> None:
        self.amount = amount

    def __call__(self, inputs: Tensor) -> Tensor:
        return inputs * (1 + 0.2 * self.amount) + 0.3 * self.amount


class Walk:
    """A point on a line, moved by each action; standing at 0 pays best. Episodes are cut off after 8 steps.

    Observations are float32 arrays of `shape` whose first two numbers are position and time. An action is an integer
    (0 left, anything else right) or an array whose first number, cut to [-1, 1], is the move.

    Args:
        shape: of an observation, of two numbers at least.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.position, self.time = shape, 0.0, 0

    def reset(self, *, seed: int | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Start somewhere, as the seed says."""
        self.position, self.time = float(np.random.default_rng(seed).uniform(-1, 1)), 0
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move, and be paid."""
        values = np.asarray(action)
        if np.issubdtype(values.dtype, np.integer):
            move = -1.0 if values.flat[0] == 0 else 1.0
        else:
            move = float(np.clip(values.flat[0], -1, 1))
        self.position, self.time = self.position + 0.2 * move, self.time + 1
        return self._observation(), -abs(self.position), False, self.time >= 8, {}

    def _observation(self) -> np.ndarray:
        observation = np.zeros(math.prod(self.shape), dtype=np.float32)
        observation[:2] = self.position, self.time / 8
        return observation.reshape(self.shape)


class _Watched(Experience):
    """What a hook is given; notes in `peeks` when its test or validation data are asked for."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("test", "valid") and sys._getframe(1).f_globals.get("__name__") != "dataclasses":
            object.__getattribute__(self, "__dict__")["peeks"].append(name)
        return super().__getattribute__(name)


class _Source(Experience):
    """An experience of which strategies see a watched form."""

    def seen(self) -> Experience:
        shown = super().seen()
        watched = _Watched(**{f.name: getattr(shown, f.name) for f in dataclasses.fields(Experience)})
        watched.__dict__["peeks"] = self.__dict__["peeks"]
        return watched


class TinyStream(Stream):
    """A stream of the kinds that a strategy declares: learn, learn, forget, learn, forget, adapt, adapt, interact, less
    the kinds it lacks. Without learn there are two of each, for a model that has been trained on `source` before. The
    first request names a class, the second some samples that were learned last. Where there is nothing but interacting,
    it begins with transitions of random actions, without labels.

    Args:
        kinds: of the strategy.
        seed: of the samples.
        repeat: so many times the samples of each experience, ≥ 1.
        separate: each experience holds tensors of its own, zero but for its rows, and the test sets are noise; training
            data stay the same.
        mislabel: the labels of what is adapted to are wrong.
        writes: answers are free text, and there are no classes; of streams that are learned alone.
    """

    def __init__(
        self, kinds: Collection[Kind], *, seed: int = 0, repeat: int = 1, separate: bool = False,
        mislabel: bool = False, writes: bool = False,
    ) -> None:  # fmt: skip
        acts = set(kinds) == {Kind.INTERACT}
        self.shape, self.seed = OBSERVATION if acts else IMAGE, seed
        self.answers: Answers | Actions = Actions(1) if acts else Answers(WORDS, end=2, vocabulary=12)
        self.repeat, self.separate, self.mislabel, self.peeks = repeat, separate, mislabel, list[str]()
        self._centres = 0.6 * torch.randn(CLASSES, *self.shape, generator=torch.Generator().manual_seed(7))
        self.slate = Slate(WORDS, self._centres) if writes else None
        if writes:
            self.answers = Answers(WORDS[:0, :0], END, IDS, TOKENS)
        self.source = self._pool(seed, "source")
        self._pools = {name: self._pool(seed, name) for name in ("train", "test", "shifted", "held")}
        self._learned: list[Data] = []
        made, counts = [], dict.fromkeys(Kind, 0)
        for index, kind in enumerate(script(kinds)):
            number, counts[kind] = counts[kind], counts[kind] + 1
            experience = getattr(self, f"_{kind}")(index, number, Kind.LEARN in kinds)
            experience.__dict__["peeks"] = self.peeks
            made.append(experience)
        super().__init__(made, num_classes=0 if writes else CLASSES, input_shape=self.shape)
        self.writing = self.slate

    @property
    def probe(self) -> Tensor:
        """Inputs (150, ...) that no experience trains on."""
        return _table(self.source) + 0.1

    def tensors(self) -> list[Tensor]:
        """Every tensor of every experience."""
        parts = [d for e in self for d in (e.train, e.test) if d is not None]
        return [t for d in parts for t in (_table(d), d.labels, d.rows) if t is not None]

    def to(self, device: torch.device) -> Stream:
        """Move the data to `device`, which keeps experiences watched. Returns self."""
        if device.type != "cpu":
            raise ValueError("these streams are for the CPU")
        return self

    def score(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Accuracy; or which written answers are right."""
        return super().score(predictions, labels) if self.slate is None else self.slate.score(predictions, labels)

    def _pool(self, seed: int, name: str) -> Data:
        generator = torch.Generator().manual_seed(int.from_bytes(name.encode()[:4]) + 1009 * seed)
        sizes = torch.tensor([PER_CLASS[c % 2] * self.repeat for c in range(CLASSES)])
        labels = torch.arange(CLASSES).repeat_interleave(sizes)
        noise = torch.randn(len(labels), *self.shape, generator=generator)
        if name in ("test", "held") and self.separate:
            return Data(10 * noise, labels.flip(0))
        return Data(self._centres[labels] + noise, labels)

    def _part(self, pool: str, classes: tuple[int, ...], world: Shift | None = None) -> Data:
        data = self._pools[pool]
        rows = torch.isin(data.targets(), torch.tensor(classes)).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))]
        part = Data(data.inputs, data.labels, rows, world)
        if not self.separate:
            return part
        inputs, labels = torch.zeros_like(_table(data)), torch.zeros_like(data.targets())
        inputs[rows], labels[rows] = data.inputs[rows], data.targets()[rows]
        return Data(inputs, labels, rows, world)  # in the same rows, which a memory may keep

    def _learn(self, index: int, number: int, learns: bool) -> Experience:
        classes: tuple[int, ...] = (2 * number, 2 * number + 1)
        parts: dict[str, Any] = {"train": self._part("train", classes), "test": self._part("test", classes)}
        self._learned.append(parts["train"])
        if self.slate is not None:
            parts = {k: dataclasses.replace(d, labels=self.slate.labels(d.labels)) for k, d in parts.items()}
            classes = ()
        return _Source(index, f"learn_{number}", Kind.LEARN, **parts, classes=classes, task=number)

    def _forget(self, index: int, number: int, learns: bool) -> Experience:
        if number:  # samples are told apart by their rows, so they lie in the tensors that they were learned from
            data = self._learned[-1] if learns else self._part("train", (4, 5))
            data = data.subset((data.targets() == 4).nonzero()[:SAMPLES, 0])
            request = tuple(f"sample:{r}" for r in data.row_ids().tolist())
            return _Source(index, f"forget_{number}", Kind.FORGET, data, data, task=2, request=request)
        classes = (2 * number,)
        parts: dict[str, Any] = {"train": self._part("train", classes), "test": self._part("test", classes)}
        request = (f"class:{2 * number}",)
        return _Source(index, f"forget_{number}", Kind.FORGET, **parts, classes=classes, request=request)

    def _adapt(self, index: int, number: int, learns: bool) -> Experience:
        classes, shift = tuple(range(CLASSES)), Shift(number + 1)
        train, test = self._part("shifted", classes, shift), self._part("held", classes, shift)
        if self.mislabel:
            assert train.labels is not None
            train = dataclasses.replace(train, labels=(train.labels + 1) % CLASSES)
        return _Source(index, f"adapt_{number}", Kind.ADAPT, train, test, classes=classes)

    def _interact(self, index: int, number: int, learns: bool) -> Experience:
        offline = self._walked() if isinstance(self.answers, Actions) else None
        return _Source(
            index, f"interact_{number}", Kind.INTERACT, train=offline, classes=(0, 1),
            environment=lambda: Walk(self.shape), env_steps=24 * self.repeat, return_bounds=(-8.0, 0.0),
        )  # fmt: skip

    def _walked(self) -> Data:
        """Episodes of random actions, as packed transitions without labels."""
        generator, steps = np.random.default_rng([9, self.seed]), list[list[np.ndarray]]()
        for episode in range(4 * self.repeat):
            walk = Walk(self.shape)
            observation, done = walk.reset(seed=1000 + episode)[0], False
            while not done:
                action = generator.uniform(-1, 1, 1)
                following, reward, terminated, done, _ = walk.step(action)
                steps.append([observation, action, np.array(reward), following, np.array(terminated), np.array(done)])
                observation = following
        columns = [torch.from_numpy(np.stack(c)) for c in zip(*steps, strict=True)]
        return Data(pack(Transitions._make([*columns, torch.zeros(len(steps))])), None)


def script(kinds: Collection[Kind]) -> list[Kind]:
    """Kinds of the experiences, in order."""
    learn, forget, adapt, interact = Kind.LEARN, Kind.FORGET, Kind.ADAPT, Kind.INTERACT
    start = [learn, learn, forget, learn, forget] if learn in kinds else [forget, forget]
    return [kind for kind in [*start, adapt, adapt, interact] if kind in kinds]


def _table(data: Data) -> Tensor:
    """Inputs (N, ...), which these streams hold in memory."""
    assert isinstance(data.inputs, Tensor)
    return data.inputs
