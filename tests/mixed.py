"""A stream that mixes all four kinds, and one small strategy that handles them; used to test the loop itself.

Named as a user would: `--strategy tests/mixed.py:Mixed --stream tests/mixed.py:MixedStream`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat import Data, Experience, Kind, Strategy, Stream
from clplat.components.memory import Reservoir

MIXED = Path(__file__)
CENTRES = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 3.0], [0.0, -3.0]])


class Corridor:
    """Stand on a line at 0; going right pays 1 a step; an episode ends after 8 steps."""

    def reset(self, *, seed: int | None = None) -> tuple[Tensor, dict[str, Any]]:
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        self.position, self.time = 0.1 * torch.rand(1, generator=generator).item(), 0
        return self._observation(), {}

    def step(self, action: int) -> tuple[Tensor, float, bool, bool, dict[str, Any]]:
        move = 1.0 if action == 1 else -1.0
        self.position, self.time = self.position + 0.1 * move, self.time + 1
        return self._observation(), move, False, self.time >= 8, {}

    def _observation(self) -> Tensor:
        return torch.tensor([self.position, self.time / 8])


class MixedStream(Stream):
    """learn two classes, learn two more, forget the first, adapt to shifted inputs, interact.

    Args:
        samples: per class.
        seed: of the samples.
    """

    def __init__(self, *, samples: int = 40, seed: int = 0, data_root: str | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(4).repeat_interleave(samples)
        inputs = CENTRES[labels] + 0.5 * torch.randn(len(labels), 2, generator=generator)
        test = CENTRES[labels] + 0.5 * torch.randn(len(labels), 2, generator=generator)

        def rows(*classes: int) -> Tensor:
            return torch.cat([(labels == c).nonzero()[:, 0] for c in classes])

        def part(*classes: int) -> dict[str, Any]:
            return {
                "train": Data(inputs, labels, rows(*classes)),
                "test": Data(test, labels, rows(*classes)),
                "classes": classes,
            }

        shifted = Data(test, labels, rows(2, 3, 1), world=lambda x: x + 0.3)
        super().__init__(
            [
                Experience(0, "first", Kind.LEARN, **part(0, 1)),
                Experience(1, "second", Kind.LEARN, **part(2, 3)),
                Experience(2, "erase-0", Kind.FORGET, **part(0), request=("class:0",)),
                Experience(3, "shifted", Kind.ADAPT, train=shifted, classes=(1, 2, 3)),
                Experience(
                    4, "corridor", Kind.INTERACT, train=None, environment=Corridor, env_steps=64, return_bounds=(-8, 8)
                ),
            ],
            num_classes=4,
            input_shape=(2,),
        )


class MixedLearn(Stream):
    """The learn experiences of the mixed stream, in double precision."""

    def __init__(self, *, seed: int = 0, data_root: str | None = None) -> None:
        parts = MixedStream(seed=seed).experiences[:2]
        doubled = [
            dataclasses.replace(e, **{p: dataclasses.replace(d, inputs=d.inputs.double()) for p in ("train", "test")
                                      if (d := getattr(e, p)) is not None})
            for e in parts
        ]  # fmt: skip
        super().__init__(doubled, num_classes=4, input_shape=(2,))


class Mixed(Strategy):
    """Handles every kind in the simplest way that does something.

    Args:
        memory: samples and transitions kept.
    """

    kinds = frozenset({Kind.LEARN, Kind.FORGET, Kind.ADAPT, Kind.INTERACT})
    paper = "none: a test"

    def __init__(self, *, memory: int = 30, **base: Any) -> None:
        super().__init__(**base)
        self.memory = Reservoir(memory)
        self.transitions = Reservoir(memory)
        self.dropout = torch.nn.Dropout(0.2)
        self.policy = torch.nn.Linear(2, 2)

    def training_step(self, batch: tuple[Tensor, Tensor] | None, batch_idx: int) -> Tensor:
        if batch is None:
            observations, taken = self.transitions.sample(8)
            wanted = (observations[:, 2] > 0).long()  # the action that paid
            return F.cross_entropy(self.policy(observations[:, :2]), torch.where(wanted == 1, taken, 1 - taken))
        x, y = batch
        new = y
        if len(self.memory):
            mx, my = self.memory.sample(8)
            x, y = torch.cat([x, self.prepare(mx)]), torch.cat([y, my])
        self.memory.add(self.raw, new)
        return self.mean(F.cross_entropy(self.model(self.dropout(x)), y, reduction="none"))

    def forget_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        probability = F.softmax(self.model(x), 1).gather(1, y[:, None])
        return -torch.log1p(-probability.clamp(max=0.999)).mean()

    def adapt_step(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(inputs)
        entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        return logits.detach(), entropy

    def act(self, observation: Tensor, explore: bool) -> int:
        logits = self.policy(observation)
        if explore:
            return int(torch.distributions.Categorical(logits=logits).sample())
        return int(logits.argmax())

    def observe(self, transition: Any) -> int:
        row = torch.cat([transition.observation, torch.tensor([transition.reward])])
        self.transitions.add(row[None], torch.tensor([transition.action]))
        return 1 if len(self.transitions) >= 16 else 0


def mixed_config(output: Path) -> dict[str, Any]:
    """Configuration of the mixed stream of all four kinds, with extra evaluations."""
    return {
        "name": "mixed",
        "strategy": {"name": f"{MIXED}:Mixed"},
        "stream": {"name": f"{MIXED}:MixedStream"},
        "backbone": {"name": "mlp", "hidden": [16]},
        "loop": {"max_epochs": 2, "batch_size": 8, "eval_every": 7, "checkpoint_seconds": None},
        "audit": {"keep_scores": True},
        "tracking": {"enabled": False},
        "output": str(output),
        "seed": 1,
    }
