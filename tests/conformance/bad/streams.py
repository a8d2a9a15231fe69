"""Streams that break one rule each; the attribute `fails` names the check that must find it."""

from typing import Any

import torch
from torch import Tensor

from clplat import Data, Experience, Kind, Stream


def points(seed: int, n: int = 12) -> tuple[Tensor, Tensor]:
    """Inputs (n, 4) and labels (n,) of two classes."""
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)), torch.arange(n) % 2


class _Two(Stream):
    """Two experiences with the same two classes."""

    def __init__(self, *, seed: int | None = None, data_root: str | None = None) -> None:
        super().__init__([self._made(0), self._made(1)], num_classes=2, input_shape=(4,))

    def _made(self, index: int, **other: Any) -> Experience:
        parts = {"train": Data(*points(index)), "test": Data(*points(index + 10))}
        return Experience(index, f"part_{index}", Kind.LEARN, **({"classes": (0, 1)} | parts | other))


class SilentOption(_Two):
    """Takes an option that its documentation does not name."""

    fails = "options"

    def __init__(self, *, seed: int | None = None, data_root: str | None = None, samples: int = 12) -> None:
        super().__init__(seed=seed)
        assert samples


class OneName(_Two):
    """Calls all experiences alike."""

    fails = "names"

    def _made(self, index: int, **other: Any) -> Experience:
        return Experience(index, "part", Kind.LEARN, Data(*points(index)), Data(*points(index + 10)), classes=(0, 1))


class UndeclaredKind(_Two):
    """Declares that it only adapts."""

    fails = "names"
    kinds = frozenset({Kind.ADAPT})


class OtherShape(_Two):
    """Says another shape than it has."""

    fails = "shapes"

    def __init__(self, *, seed: int | None = None, data_root: str | None = None) -> None:
        super().__init__()
        self.input_shape = (2, 2)


class ShortLabels(_Two):
    """Has too few labels."""

    fails = "shapes"

    def _made(self, index: int, **other: Any) -> Experience:
        inputs, labels = points(index)
        return super()._made(index, train=Data(inputs, labels[:-1], torch.arange(11)))


class MoreClasses(_Two):
    """Trains on a class that it does not name."""

    fails = "classes"

    def _made(self, index: int, **other: Any) -> Experience:
        return super()._made(index, classes=(0,))


class LabelBeyond(_Two):
    """Counts its classes from 1."""

    fails = "classes"

    def _made(self, index: int, **other: Any) -> Experience:
        inputs, labels = points(index)
        return super()._made(index, train=Data(inputs, labels + 1), classes=(1, 2))


class SharedRows(_Two):
    """Tests on rows that it trains on."""

    fails = "held_out"

    def _made(self, index: int, **other: Any) -> Experience:
        inputs, labels = points(index)
        rows = torch.arange(8)
        return super()._made(index, train=Data(inputs, labels, rows), test=Data(inputs, labels, rows + 4))


class CopiedTest(_Two):
    """Tests the second experience on copies of samples of the first."""

    fails = "held_out"

    def _made(self, index: int, **other: Any) -> Experience:
        return super()._made(index, test=Data(*points(0)) if index else Data(*points(10)))


class GlobalDraws(_Two):
    """Draws its samples from torch's global generator."""

    fails = "seed"

    def _made(self, index: int, **other: Any) -> Experience:
        return super()._made(index, train=Data(torch.randn(12, 4), torch.arange(12) % 2))


class OwnClock(_Two):
    """Gives other samples each time it is made."""

    fails = "seed"
    made = 100

    def _made(self, index: int, **other: Any) -> Experience:
        OwnClock.made += 1
        return super()._made(index, train=Data(*points(OwnClock.made)))


class RandomOrder(_Two):
    """Arranges its samples by chance."""

    fails = "order"

    def arrange(self, data: Data, order: Tensor, batch_size: int) -> Tensor:
        return order[torch.randperm(len(order))]


class LosesSamples(_Two):
    """Leaves a sample out of each epoch."""

    fails = "order"

    def arrange(self, data: Data, order: Tensor, batch_size: int) -> Tensor:
        return order[1:]


class NoisyWorld(_Two):
    """Has a world that is never the same."""

    fails = "order"

    def _made(self, index: int, **other: Any) -> Experience:
        return super()._made(index, train=Data(*points(index), None, lambda x: x + torch.randn_like(x)))


class WritesInPlace(_Two):
    """Prepares inputs where they are stored."""

    fails = "prepare"

    def prepare(self, inputs: Tensor, training: bool) -> Tensor:
        return inputs.mul_(0.5)


class NoisyEvaluation(_Two):
    """Augments in evaluation too."""

    fails = "prepare"

    def prepare(self, inputs: Tensor, training: bool) -> Tensor:
        return inputs + torch.randn_like(inputs)
