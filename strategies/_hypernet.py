"""What the strategies that generate a target network's weights have in common: the loss, the regulariser, inference.

    loss of task t = CE(f(x; ω_t), y) + β · (1/m) Σ_j Σ_i F_ji (ω*_ji − h(e_j; θ + Δθ)_i)²,    ω_t = h(e_t; θ)

j runs over the m tasks met before (or a random part of them), ω*_j is h(e_j; θ) as it was before task t, F is 1 or an
importance, and Δθ is 0 or, with lookahead, the step that the optimizer would take from the first term alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clplat import Experience, Kind, Strategy, require
from clplat.backbones.base import Classifier, Role
from clplat.components.generated import GeneratedClassifier, Target
from clplat.components.held import Held, Way
from clplat.components.hypernetwork import Generator
from clplat.components.lookahead import add_gradient_ahead
from clplat.components.tasks import TaskTeller, of_slots, surest


class Hypernet(Strategy):
    """Common part of the strategies that generate weights. A subclass passes a generator to `_generate`.

    Args:
        beta: β ≥ 0, weight of the regulariser, a sum over all weights, so that it does not carry over between targets
            of different size; 0 trains the generator in sequence without any.
        lookahead: regularise at θ + Δθ, by a second backward pass, instead of at θ.
        held_outputs: factors: of the ω*_j only the generator's last layer and its inputs are kept, and ω is compared
            by them, at a cost that hardly grows with t (the same numbers but for rounding). stored: the ω*_j are
            computed once a task and kept, (t − 1) |ω| numbers. recomputed: they are made again in each step.
        sampled_tasks: old tasks, drawn anew in each step, that the regulariser runs over, ≥ 1; null takes all.
        own_rows: hold only the head's rows of a task's own classes; for a model that has a head.
        embedding: E ≥ 1, numbers of a task's embedding.
        rank: 0 generates every trainable parameter of the model, for which weights may not have been read; r > 0
            freezes the backbone and generates, as differences that start at 0, the head and adapters of rank r for the
            linear layers of `role`. Null takes 0, or 8 where the model answers in words and has no head.
        role: of the layers that get adapters; has no effect with rank 0.
        infer: how the task is found where it is not given. entropy: the task that predicts with least entropy (of text
            to be written, its first token). network: a copy of the backbone that learns to tell tasks apart, from
            samples in a memory.
        memory: samples kept for that network, ≥ 1; has no effect otherwise.
        replay_batch: of these, in each step, ≥ 1.
        optimizer: sgd, adam or adamw; made anew for each experience. The authors train with Adam throughout.
        lr: learning rate, > 0; generated weights diverge at the rates that suit weights trained directly.
    """

    kinds = frozenset({Kind.LEARN})
    unmergeable = "its weights are generated for each task"
    unshardable = "a network makes its weights, whole"
    searched = {"lr": (1e-4, 1e-2, "log"), "beta": (1e-4, 1.0, "log")}
    model: GeneratedClassifier

    def __init__(
        self,
        *,
        model: Classifier,
        beta: float = 0.01,
        lookahead: bool = False,
        held_outputs: Way = "factors",
        sampled_tasks: int | None = None,
        own_rows: bool = False,
        embedding: int = 32,
        rank: int | None = None,
        role: Role = "attention",
        infer: Literal["entropy", "network"] = "entropy",
        memory: int = 500,
        replay_batch: int = 32,
        optimizer: Literal["sgd", "adam", "adamw"] = "adam",
        lr: float = 1e-3,
        **base,
    ):
        super().__init__(model=model, optimizer=optimizer, lr=lr, **base)
        require("beta", beta, beta >= 0, "≥ 0")
        ways = ("stored", "recomputed") if own_rows else ("factors", "stored", "recomputed")
        require("held_outputs", held_outputs, held_outputs in ways, f"{', '.join(ways)}" + " with own_rows" * own_rows)
        require("sampled_tasks", sampled_tasks, sampled_tasks is None or sampled_tasks >= 1, "≥ 1, or null")
        require("embedding", embedding, embedding >= 1, "≥ 1")
        require("rank", rank, rank is None or rank >= 0, "≥ 0, or null")
        headed = model.backbone.needs_head
        require("own_rows", own_rows, headed or not own_rows, "false for a model without a head")
        require("infer", infer, infer in ("entropy", "network"), "entropy or network")
        require("replay_batch", replay_batch, replay_batch >= 1, "≥ 1")
        if headed and hasattr(model.head, "tasks_of"):
            self.notes = ("head: taskwise: each task's rows are generated, and its classes compete, as with any head",)
        self.beta, self.lookahead, self.embedding = beta, lookahead, embedding
        self.teller = TaskTeller(model.backbone, memory, replay_batch) if infer == "network" else None
        self.target = Target(model, (0 if headed else 8) if rank is None else rank, role)
        self.held = Held(held_outputs, own_rows, sampled_tasks)
        self._old: list[int] = []  # places of the tasks that are held, from the experiences met

    def _generate(self, generator: Generator) -> None:
        """Take `generator`, of `self.target.size` numbers, as the model's."""
        self.model = GeneratedClassifier(self.target, generator, self.embedding)
        del self.target  # it is the model's now

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        model, now = self.model, self.model.current
        if self.teller is not None:
            self.teller.grow(len(model.codes))
        # Parts of the generator below the present level are frozen, so that tasks made by them can't change.
        same = [s for s, level in enumerate(model.levels) if s != now and level == model.levels[now]]
        self._old = same if self.beta else []
        self.held.grow(model, self._old)

    def begin(self, experience: Experience) -> None:
        self.held.begin(self.model, self._old)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        loss = self.mean_loss(x, y)
        if self._old and not self.lookahead:
            loss = loss + self.beta * self._change()
        if self.teller is not None:
            loss = loss + self.teller.loss(x, self.raw, self.model.current, self.mean, self.prepare)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """With lookahead: add the regulariser's gradient at θ + Δθ. Every process computes it whole."""
        if self.lookahead and self._old:
            theta = [p for p in self.model.generator.parameters() if p.requires_grad]
            add_gradient_ahead(optimizer, theta, lambda: self.beta * self._change())

    def after_step(self) -> None:
        self.held.steps += 1

    def end(self, experience: Experience) -> None:
        self.model.average_statistics(self.world_size)

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        if task is not None or len(self.model.codes) < 2:
            return self.model(inputs, task)
        return surest(self.model, inputs) if self.teller is None else of_slots(self.model, inputs, self.teller(inputs))

    def measurements(self) -> dict[str, float]:
        return {"compression": self.model.compression}

    def _change(self) -> Tensor:
        """Mean over the old tasks, or those drawn in this step, of how far their outputs have moved; a scalar."""
        return self.held.change(self.model, self._old, self._importance)

    def _importance(self, slots: list[int]) -> Tensor | None:
        """F (m, width) of these old tasks, or None where all weights count alike."""
        return None
