"""FPF: the few tensors that change most from epoch to epoch are fine-tuned on a memory, now and then.

Source   Zhao et al., "Does Continual Learning Equally Forget All Parameters?", ICML 2023, arXiv:2304.04158. It was read
         through its abstract, summaries and the formula of d, which a third party quotes; no code is known.
    d_l(t, n) = ‖θ_l(t, n) − θ_l(t, n − 1)‖₁ / |θ_l|,   l a tensor, n an epoch of experience t;   S: the largest Σ_n d_l
    FPF       steps on the stream with replay;   then  θ_S ← θ_S − η ∂ [CE(f(m; θ), y_m) + α ‖f(m; θ) − z‖²] / ∂θ_S
    k-FPF     steps on the stream alone (`replay_batch: 0`), and the same passes at equal distances (`every`)
Differs  which tensors the paper fine-tunes, how many steps, at what rate and how often could not be read: how S is told
         from d, and the defaults, are ours. k is told by a distance in steps, since a stream need not say how long it
         is. When a pass comes the change since the epoch began counts, too; that of passes never does. In a pass the
         model is in evaluation mode: batch normalisation keeps its running statistics, and goes by them. The memory is
         a reservoir.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clplat import Experience, Kind, PerParameter, Reservoir, Strategy, require, second_gradient, trainable
from clplat.components.gradients import overwrite
from clplat.strategies.derpp import logit_distance
from clplat.strategy import evaluating, tasks_of


class FPF(Strategy):
    """Forgetting prioritised fine-tuning. B new samples, M replayed, P trainable tensors.

    Args:
        memory: samples kept in all, by reservoir sampling (as stored: before augmentation), ≥ 1.
        replay_batch: samples replayed in each step on the stream and process, ≥ 0; 0 for k-FPF.
        share: of the P tensors, rounded up, that a pass fine-tunes, in (0, 1].
        every: steps on the stream from one pass to the next, counted over all experiences, ≥ 1; null: none by steps.
        at_end: whether a pass is made when an experience ends.
        tune_steps: steps of a pass, ≥ 0; the rate falls from `lr` to 0 by a cosine. 0 makes this `er`.
        tune_batch: M, samples of each of them and process, ≥ 1.
        logit_weight: α ≥ 0, weight of the squared difference to z, a sample's logits in evaluation mode when it was
            stored; above 0 it needs classes.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:2304.04158"
    unshardable = "it ranks whole weights by how they change"
    searched = {"share": (0.03, 0.5, "log"), "logit_weight": [0.0, 0.1, 0.5]}
    replays = True
    drift: Tensor
    steps: Tensor

    def __init__(
        self,
        *,
        memory: int = 500,
        replay_batch: int = 32,
        share: float = 0.1,
        every: int | None = None,
        at_end: bool = True,
        tune_steps: int = 300,
        tune_batch: int = 32,
        logit_weight: float = 0.0,
        **base,
    ):
        super().__init__(**base)
        require("share", share, 0 < share <= 1, "in (0, 1]")
        require("every", every, every is None or every >= 1, "≥ 1, or null")
        require("tune_batch", tune_batch, tune_batch >= 1, "≥ 1")
        for name, value in (("replay_batch", replay_batch), ("tune_steps", tune_steps), ("logit_weight", logit_weight)):
            require(name, value, value >= 0, "≥ 0")
        self.memory, self.before = Reservoir(memory), PerParameter(self.model)
        self.replay_batch, self.share, self.every, self.at_end = replay_batch, share, every, at_end
        self.tune_steps, self.tune_batch, self.logit_weight = tune_steps, tune_batch, logit_weight
        self.register_buffer("drift", torch.zeros(len(trainable(self.model)), dtype=torch.float64))  # (P,) Σ d
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # on the stream

    def faults(self, experiences: Sequence[Experience], started: bool) -> list[str]:
        if not self.logit_weight or all(e.classes for e in experiences):
            return []
        return [f"strategy.logit_weight: {self.logit_weight}, but free text has no logits (valid: 0)"]

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.before.grow(self.model)

    def begin(self, experience: Experience) -> None:
        self.drift.zero_()
        self._measure(count=False)

    @torch.no_grad()
    def _measure(self, count: bool = True) -> None:
        """Add d since the last time, if it is to count, and begin anew from the weights as they are."""
        now = trainable(self.model)
        for place, (p, old) in enumerate(zip(now.values(), self.before.of(now), strict=True)):
            if count:
                self.drift[place] += (p - old).abs().double().mean()
            old.copy_(p)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 0:  # an epoch begins
            self._measure()
        x, y = batch  # (B, ...), (B,)
        both = batch
        if self.replay_batch and len(self.memory):
            mx, my, *_ = self.memory.sample(self.replay_batch)  # (M, ...), (M,)
            both = torch.cat([x, self.prepare(mx)]), torch.cat([y, my])
        with torch.no_grad():
            extras = {"logits": self._logits(x, y)} if self.logit_weight and self.memory.open else {}
        self.memory.add(self.raw, y, **extras)
        return self.mean_loss(*both)

    def _logits(self, x: Tensor, y: Tensor) -> Tensor:
        """(n, C), in evaluation mode."""
        task = tasks_of(self.model, y)
        with evaluating(self.model):
            return self.model(x) if task is None else self.model(x, task)

    def after_step(self) -> None:
        self.steps += 1
        if self.every is not None and self.steps % self.every == 0:
            self._tune()

    def end(self, experience: Experience) -> None:
        if self.at_end:
            self._tune()

    def _tune(self) -> None:
        """One pass. Under DDP each process draws its own samples, and gradients are averaged."""
        self._measure()
        learning = list(trainable(self.model).values())
        places = self.drift.argsort(descending=True, stable=True)[: math.ceil(self.share * len(learning))].tolist()
        if not places or not len(self.memory):
            return
        chosen = [learning[place] for place in places]  # S
        for place, parameter in enumerate(learning):
            parameter.requires_grad_(place in places)
        optimizer = self.configure_optimizers()
        for step in range(self.tune_steps):
            x, y, *z = self.memory.sample(self.tune_batch)
            x = self.prepare(x)
            with evaluating(self.model):
                loss = self.losses(x, y).mean()
            if z:
                loss = loss + self.logit_weight * logit_distance(self._logits(x, y), z[0])
            overwrite(chosen, second_gradient(loss, chosen, self.world_size))
            optimizer.param_groups[0]["lr"] = self.lr * (1 + math.cos(math.pi * step / self.tune_steps)) / 2
            optimizer.step()
        optimizer.zero_grad()
        for parameter in learning:
            parameter.requires_grad_(True)
        self._measure(count=False)
