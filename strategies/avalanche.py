"""Avalanche's plugins inside clplat's loop: EWC, LwF, MAS, RWalk, GEM, A-GEM and replay, as avalanche-lib has them.

Source   Lomonaco et al., "Avalanche: an End-to-End Library for Continual Learning", CLVision 2021, arXiv:2104.00405;
         avalanche-lib 0.6.0 (MIT).
    loss = CE(f(x; θ), y) + what the plugin adds; GEM and A-GEM then project the gradient
Differs  a plugin sees an experience's inputs prepared but not augmented. Plugins get no more than what these seven
         read; one that asks for more stops the run. SynapticIntelligencePlugin is not offered: on a CPU it is plain
         fine-tuning (its old weights are views of the new ones); `si` is clplat's own.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clplat import Experience, Kind, Strategy
from clplat.components.plugins import STATE, Seen, dataset, endless, expand, make, refuse_several, restore, state_of
from clplat.errors import UserError


class Avalanche(Strategy):
    """One of Avalanche's plugins. Needs `pip install clplat[avalanche]`; one process, loop.accumulate 1.

    A run with agem or replay can't be resumed inside a stream, and says so at its start. With replay the batches come
    from Avalanche's loader (new and replayed samples), the number of steps from clplat's loop.

    Args:
        plugin: which one.
        options: arguments of the plugin's class, such as ewc_lambda of ewc or alpha and temperature of lwf.
    """

    kinds = frozenset({Kind.LEARN})
    unshardable = "Avalanche's plugins run in one process"
    paper = "arXiv:2104.00405"
    needs_classes = True
    replays = True
    reads_whole = True
    unmergeable = "Avalanche's plugins keep weights of their own"

    def __init__(
        self,
        *,
        plugin: Literal["ewc", "lwf", "mas", "rwalk", "gem", "agem", "replay"] = "ewc",
        options: dict[str, Any] | None = None,
        **base,
    ):
        super().__init__(**base)
        self._name, self._plugin = plugin, make(plugin, options or {})
        self._seen = Seen(
            clock=Seen(train_exp_counter=0, train_iterations=0),
            _criterion=nn.CrossEntropyLoss(),
            train_mb_size=0,
            loss=None,
        )
        self._batches: Iterator[Any] | None = None
        self._before: nn.Module | None = None
        self._lost = False

    # The loop's hooks, each calling Avalanche's at the same point of a step.

    def grow(self, experience: Experience) -> None:
        self._before = copy.deepcopy(self.model) if self._name == "lwf" else None  # the structure LwF's teacher has
        super().grow(experience)

    def begin(self, experience: Experience) -> None:
        refuse_several(self.world_size)
        if self._name not in STATE and experience.index == 0:
            warnings.warn(f"Avalanche's {self._name} can't be saved: this run is not resumable", stacklevel=2)
        self._refuse_lost()
        self._show(experience)
        expand(self._plugin, self._name, self.model)
        self._seen.dataloader = None
        self._call("before_training")
        self._call("before_training_exp")
        loader = self._seen.dataloader
        self._batches = None if loader is None else endless(loader)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self._seen.optimizer = super().configure_optimizers()
        return self._seen.optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self._refuse_lost()
        if any(p.grad is not None for p in self.model.parameters()):
            raise UserError(
                "loop.accumulate: must be 1 with strategy avalanche, whose plugins take their own gradients"
            )
        seen = self._seen
        x, y = batch  # (B, ...), (B,)
        seen.train_mb_size = max(seen.train_mb_size, len(x))
        if self._batches is not None:
            x, y = (t.to(x.device) for t in next(self._batches)[:2])
        seen.device, seen.model = x.device, self.model
        seen.mbatch, seen.mb_x = [x, y, torch.zeros_like(y)], x
        self._call("before_training_iteration")
        seen.optimizer.zero_grad()
        seen.mb_output = self.model(x)
        seen.loss = seen._criterion(seen.mb_output, y)
        self._call("before_backward")
        return seen.loss

    def on_after_backward(self) -> None:
        self._call("after_backward")

    def after_step(self) -> None:
        self._call("after_training_iteration")
        self._seen.clock.train_iterations += 1
        self._seen.loss = self._seen.mb_output = None  # or the graph would live on

    def end(self, experience: Experience) -> None:
        self._show(experience)
        self._call("after_training_exp")
        self._seen.clock.train_exp_counter += 1
        self.zero_grad()  # plugins leave gradients behind
        self.train()

    def _call(self, hook: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            getattr(self._plugin, hook)(self._seen)

    def _show(self, experience: Experience) -> None:
        """The experience as Avalanche's data set."""
        assert experience.train is not None
        inputs, labels = experience.train.all()[0], experience.train.targets()
        self.eval()
        inputs = self.prepare(inputs)
        self.train()
        data = dataset(inputs, labels)
        self._seen.experience, self._seen.adapted_dataset = Seen(dataset=data), data
        self._seen.device, self._seen.model = inputs.device, self.model

    def get_extra_state(self) -> dict[str, Any]:
        clock = self._seen.clock
        state: dict[str, Any] = {"experience": clock.train_exp_counter, "iterations": clock.train_iterations}
        state["batch_size"] = self._seen.train_mb_size
        return state | ({"plugin": state_of(self._plugin, self._name)} if self._name in STATE else {})

    def set_extra_state(self, state: dict[str, Any]) -> None:
        clock, self._seen.train_mb_size = self._seen.clock, state["batch_size"]
        clock.train_exp_counter, clock.train_iterations = state["experience"], state["iterations"]
        if "plugin" in state:
            restore(self._plugin, self._name, state["plugin"], self.model, self._before)
        else:
            self._lost = clock.train_iterations > 0

    def _refuse_lost(self) -> None:
        if self._lost:
            raise UserError(f"resume: Avalanche's {self._name} keeps what can't be saved; start the run anew")
