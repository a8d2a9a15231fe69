"""What a hypernetwork made for the tasks met before, and how far it has moved since.

    R = (1/m) Σ_j Σ_i F_ji (ω*_ji − h(e_j; θ)_i)²,   j over m tasks met before, ω*_j = h(e_j; θ*)

Source   von Oswald et al., "Continual learning with hypernetworks", ICLR 2020, arXiv:1906.00695, equation 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.components.ema import Frozen
from clplat.components.generated import GeneratedClassifier
from clplat.components.hypernetwork import Generator, factored_change, output_change

Way = Literal["factors", "stored", "recomputed"]


class Held(nn.Module):
    """The ω*_j, in one of three ways.

    Args:
        way: factors: only the generator's last layer and its inputs are kept, and ω is compared by them. stored: the
            ω*_j are computed once a task and kept. recomputed: they are made again in each step.
        own_rows: hold only the head's rows of a task's own classes; not by factors.
        sampled: tasks that R runs over, drawn anew in each step; None takes all.
    """

    outputs: Tensor

    def __init__(self, way: Way, own_rows: bool = False, sampled: int | None = None) -> None:
        super().__init__()
        self.way, self.own_rows, self.sampled = way, own_rows, sampled
        self.steps = 0  # taken so far; what is drawn follows from it
        self.register_buffer("outputs", torch.zeros(0, 0))  # (m, width), if stored
        self.register_buffer("rows", None, persistent=False)  # (m, width); follow from the classes of the tasks
        self.before: Frozen | None = None

    def grow(self, model: GeneratedClassifier, slots: Sequence[int]) -> None:
        """Make room for what `model` makes for the tasks at `slots`; for none, hold nothing."""
        self.outputs, self.before = self.outputs.new_zeros(0, 0), None
        if not slots:
            return
        if self.way == "stored":
            self.outputs = self.outputs.new_zeros(len(slots), model.generator.width)
        else:
            self.before = Frozen(model.generator)
        if self.own_rows:
            rows = model.target.own_rows(model.classes[list(slots)])
            self.rows = F.pad(rows, (0, model.generator.width - model.target.size), value=1.0)

    def begin(self, model: GeneratedClassifier, slots: Sequence[int]) -> None:
        """Note what `model` makes now, if that is stored."""
        if len(self.outputs):
            # With gradients on, as in the steps: torch has other kernels without, and R would not start at exactly 0.
            with torch.autocast(self.outputs.device.type, enabled=False):
                self.outputs.copy_(model.generator.outputs(*model.tasks(slots)).detach())

    def drawn(self, count: int) -> list[int]:
        """Which of `count` tasks R runs over in this step, the same in every process."""
        if self.sampled is None or self.sampled >= count:
            return list(range(count))
        generator = torch.Generator().manual_seed(self.steps)
        return torch.randperm(count, generator=generator)[: self.sampled].tolist()

    def change(
        self, model: GeneratedClassifier, slots: Sequence[int], weigh: Callable[[list[int]], Tensor | None]
    ) -> Tensor:
        """R over the tasks at `slots`, or those drawn of them; a scalar, in single precision under autocast, too.

        Args:
            weigh: F (m, width) of the tasks at these places; None: 1.
        """
        with torch.autocast(self.outputs.device.type, enabled=False):
            return self._change(model, slots, weigh)

    def _change(
        self, model: GeneratedClassifier, slots: Sequence[int], weigh: Callable[[list[int]], Tensor | None]
    ) -> Tensor:
        rows = self.drawn(len(slots))
        chosen = [slots[r] for r in rows]
        tasks, now, importance = model.tasks(chosen), model.generator, weigh(chosen)
        before = None if self.before is None else cast(Generator, self.before.model)
        if before is not None and self.way == "factors":
            with torch.no_grad():
                factors = before.factors(*tasks)
            return factored_change(now.factors(*tasks), factors, now.size)
        if before is None:
            held = self.outputs if len(rows) == len(slots) else self.outputs[rows]
        else:
            with torch.no_grad():
                held = before.outputs(*tasks)
        if self.own_rows:
            importance = self.rows[rows] if importance is None else importance * self.rows[rows]
        return output_change(now.outputs(*tasks), held, importance)

    def get_extra_state(self) -> int:
        return self.steps

    def set_extra_state(self, state: int) -> None:
        self.steps = state
