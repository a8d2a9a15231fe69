"""What strategies share that take gradient steps at test time: an optimizer that goes on over experiences, and resets.

Shapes: B images of a batch.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clplat import Experience, require
from clplat.components.rounding import only_rounding
from clplat.strategies._tta import TTA

_WATCHED = 3  # first steps whose gradient is looked at; a GPU waits for it


def drops(module: nn.Module) -> bool:
    """Whether it is a layer that drops some of its inputs, or paths, in training."""
    share = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "drop_prob", 0.0)
    return isinstance(share, float | int) and share > 0


class Stepping(TTA):
    """Base of those that take gradient steps while adapting.

    Args:
        adapt_optimizer: for adapting; `optimizer`, `lr` and so on are for learning.
        adapt_lr: ≥ 0.
        adapt_momentum: of sgd, in [0, 1).
        nesterov: whether that momentum is Nesterov's.
        reset: when to go back to the source model and empty the optimizer: never, before each experience (which tells
            the method where a domain begins), or before each batch.
        training_mode: whether the model drops while adapting what it drops in training, as the authors' code lets it.
    """

    searched = {"adapt_lr": (1e-5, 0.1, "log")}

    def __init__(
        self,
        *,
        adapt_optimizer: Literal["sgd", "adam"] = "adam",
        adapt_lr: float = 0.001,
        adapt_momentum: float = 0.9,
        nesterov: bool = False,
        reset: Literal["never", "experience", "batch"] = "never",
        training_mode: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        require("adapt_optimizer", adapt_optimizer, adapt_optimizer in ("sgd", "adam"), "sgd or adam")
        require("adapt_lr", adapt_lr, adapt_lr >= 0, "≥ 0")
        require("adapt_momentum", adapt_momentum, 0 <= adapt_momentum < 1, "in [0, 1)")
        require("nesterov", nesterov, not nesterov or adapt_momentum > 0, "false without adapt_momentum")
        require("reset", reset, reset in ("never", "experience", "batch"), "never, experience or batch")
        self.adapt_optimizer, self.adapt_lr, self.adapt_momentum = adapt_optimizer, adapt_lr, adapt_momentum
        has_any = any(drops(m) for m in self.model.modules())
        require("training_mode", training_mode, not training_mode or has_any, "false: this backbone drops nothing")
        self.nesterov, self.reset_at, self.training_mode = nesterov, reset, training_mode
        self.kept: dict[str, Any] = self._start()  # tensors and plain values that go on from batch to batch
        self._moments: dict[str, Any] | None = None  # the optimizer's state between two adapt experiences
        self._stepper: torch.optim.Optimizer | None = None
        self._watched = 0  # steps

    def _start(self) -> dict[str, Any]:
        """`kept` before the first batch."""
        return {}

    def _take_source(self) -> None:
        """The model as it is now becomes the source."""
        raise NotImplementedError

    def _restore_source(self) -> None:
        """The model becomes the source again."""
        raise NotImplementedError

    def _reset(self) -> None:
        """Back to the source model, as if no batch had been seen."""
        self._restore_source()
        self.kept, self._moments = self._start(), None
        if self._stepper is not None:
            self._stepper.state.clear()

    def begin(self, experience: Experience) -> None:
        super().begin(experience)
        if self._entering:
            self._take_source()
            self.kept, self._moments = self._start(), None
        elif self.adapting and self.reset_at == "experience":
            self._reset()
        if self.adapting and self.training_mode:
            for module in filter(drops, self.modules()):
                module.train()

    def adapt_step(self, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.reset_at == "batch":
            self._reset()
        return super().adapt_step(inputs)

    def on_after_backward(self) -> None:
        if not self.adapting or self._watched >= _WATCHED or not self.adapt_lr:
            return
        self._watched, step = self._watched + 1, self._watched + 1
        norm = only_rounding(self.model.parameters())
        if norm is not None and self.rank == 0:
            self._watched = _WATCHED  # said once
            moves = "nothing moves" if self.adapt_optimizer == "sgd" else "Adam makes whole steps of it"
            warnings.warn(
                f"{type(self).__name__}: the gradient of step {step} is rounding, of norm {norm:.1g}, and "
                f"{moves}: the loss is at its minimum, as where teacher and model are one or predictions are certain",
                stacklevel=2,
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if not self.adapting:
            return super().configure_optimizers()
        chosen = [p for p in self.parameters() if p.requires_grad]  # of the model, and what a subclass has beside it
        if self.adapt_optimizer == "adam":
            stepper: torch.optim.Optimizer = torch.optim.Adam(chosen, lr=self.adapt_lr)
        else:
            momentum, nesterov = self.adapt_momentum, self.nesterov
            stepper = torch.optim.SGD(chosen, lr=self.adapt_lr, momentum=momentum, nesterov=nesterov)
        if self._moments is not None:
            stepper.load_state_dict(self._moments)
        self._stepper = stepper
        return stepper

    def end(self, experience: Experience) -> None:
        if self.adapting and self._stepper is not None:
            self._moments = self._stepper.state_dict()
        super().end(experience)

    def get_extra_state(self) -> dict[str, Any]:
        return {"kept": self.kept, "moments": self._moments}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.kept, self._moments = dict(state["kept"]), state["moments"]
