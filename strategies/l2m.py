"""L2M: a pool of low-rank changes of a frozen backbone; each sample is modulated by the one whose key is nearest.

Source   Schmied et al., "Learning to Modulate pre-trained Models in RL", NeurIPS 2023, arXiv:2306.14884.
    slot p(x) = argmax_p cos(q(x), k_p);   while a task is learned argmax_p ((cos(q(x), k_p) + 1) / 2) c_p
    c_p = 1 / (n_p + ε) / Σ_j 1 / (n_j + ε),   n_p the share of samples that chose p in the tasks before, ε = 10⁻⁶
    loss = CE over the experience's classes − λ cos(q(x), k_p(x));   A, B and k are trained
Differs  the paper modulates a decision transformer that acts; here a backbone with a head learns classes, and no agent
         is modulated (see experiments/continual_rl). q is the features of the unmodulated backbone, which costs a
         second pass (theirs: the mean of embedded states). Each A begins as LoRA's, U(±1/√width); their code counts all
         slots as inputs, so that it begins about 17 times smaller. n counts samples, theirs is the mean of batches'
         shares. A projection to query, key and value in one is changed as a whole, theirs have none. Optimizer anew for
         each experience, so that slots of the past do not move on by its momentum. The appendix could not be read:
         defaults are the code's (pool 30, rank 8, alpha 16, λ 0.5, rate 1e-4).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from clplat import Experience, require
from clplat.adapters.pool import Pool
from clplat.components.sums import Sums
from clplat.strategies._prompted import Prompted, cosines, uniform
from clplat.strategy import evaluating


class Selections(Sums):
    """How many samples have chosen each of P slots."""

    counts: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(size, dtype=torch.int64))

    def _sums(self) -> Iterator[Tensor]:
        yield self.counts


class L2M(Prompted):
    """A pool of modulations, without task identity. B samples, D features, P slots.

    Args:
        pool: P ≥ 1.
        rank: r ≥ 1 of a change.
        alpha: a change is scaled by alpha / r, > 0.
        pull: λ > 0, weight of the loss that draws keys to their queries, which nothing else depends on.
        optimizer: sgd, adam or adamw; made anew for each experience.
        lr: learning rate, > 0.
    """

    paper = "arXiv:2306.14884"
    unshardable = ""
    searched = {"lr": (1e-5, 1e-2, "log"), "pull": None}
    favour: Tensor

    def __init__(
        self,
        *,
        pool: int = 30,
        rank: int = 8,
        alpha: float = 16.0,
        pull: float = 0.5,
        optimizer: Literal["sgd", "adam", "adamw"] = "adamw",
        lr: float = 1e-4,
        **base,
    ):
        super().__init__(optimizer=optimizer, lr=lr, **base)
        require("pool", pool, pool >= 1, "≥ 1")
        require("rank", rank, rank >= 1, "≥ 1")
        require("alpha", alpha, alpha > 0, "> 0")
        require("pull", pull, pull > 0, "> 0")
        self.pull, self.keys, self.chosen = pull, uniform(pool, self.width), Selections(pool)
        self.register_buffer("favour", torch.full((pool,), 1 / pool))  # c
        self.pool = Pool(self.model.backbone, pool, rank, alpha / rank, self._choose)

    def _choose(self, inputs: Tensor) -> Tensor:
        """Slots (B,) of inputs, for a backbone that is not modulated."""
        with torch.no_grad(), evaluating(self.model.backbone):
            query = self.model.backbone.forward(inputs)  # (B, D); within a pass of it
        likeness = cosines(query, self.keys)  # (B, P)
        slots = ((likeness + 1) / 2 * self.favour if self.model.training else likeness).argmax(1)
        if self.model.training:  # measurements put the model alone into evaluation
            self._away = -self.pull * likeness.gather(1, slots[:, None])[:, 0]
            self.chosen.counts += torch.bincount(slots, minlength=len(self.keys))
        return slots

    def begin(self, experience: Experience) -> None:
        n = self.chosen.counts.double()
        self.favour.copy_((1 / (n / n.sum().clamp(min=1) + 1e-6)).float())
        self.favour /= self.favour.sum()
        self.chosen.open()

    def end(self, experience: Experience) -> None:
        self.chosen.gather()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        self.chosen.merge()

    def measurements(self) -> dict[str, float]:
        return {"slots_chosen": float((self.chosen.counts > 0).sum())}
