"""MIR: what is replayed are the remembered samples whose loss a step on the new samples alone would raise most.

Source   Aljundi et al., "Online Continual Learning with Maximally Interfered Retrieval", NeurIPS 2019,
         arXiv:1908.04742, equations 1 and 2 (ER-MIR, criterion MI-1).
Checked  by reading optimass/Maximally_Interfered_Retrieval mir.py (35eda78, MIT).
    θᵛ = θ − lr ∇ L(f(x; θ), y)                       the step that would be taken, on new samples x alone
    m = the M of candidates · M drawn samples with the greatest  l(f(m; θᵛ), y_m) − l(f(m; θ), y_m)
    loss = L(f(x ∪ m; θ), y)                          one forward pass, mean over all B + M
Differs  any remembered sample may be drawn (the code leaves out those of the task under way, which it is told; with
         replacement here). Both losses of a candidate are in evaluation mode. The rate of the virtual step is
         `lr`, whatever schedule and momentum. Avalanche 0.6.0 leaves out the classes of the last batch of an
         experience in all of the next one, and so never replays those learned last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clplat import Kind, Strategy, require
from clplat.components.gradients import second_gradient
from clplat.components.losses import single_losses
from clplat.components.memory import Reservoir, gathered
from clplat.components.per_parameter import trainable
from clplat.strategy import evaluating


class MIR(Strategy):
    """Replay of the most interfered samples. B new samples, M replayed.

    Args:
        memory: samples kept in all, by reservoir sampling (as stored: before augmentation), ≥ 1.
        replay_batch: M, samples replayed in each step and process, ≥ 1.
        candidates: drawn for each sample that is replayed, ≥ 1; 1 is `er`.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:1908.04742"
    unshardable = "it takes a step on a copy of whole weights"
    replays = True

    def __init__(self, *, memory: int = 500, replay_batch: int = 32, candidates: int = 4, **base):
        super().__init__(**base)
        require("replay_batch", replay_batch, replay_batch >= 1, "≥ 1")
        require("candidates", candidates, candidates >= 1, "≥ 1")
        self.memory, self.replay_batch, self.candidates = Reservoir(memory), replay_batch, candidates

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        new = y
        if len(self.memory):
            mx, my = self._interfered(x, y)  # (M, ...), (M,)
            x, y = torch.cat([x, mx]), torch.cat([y, my])
        loss = self.mean_loss(x, y)
        self.memory.add(self.raw, new)
        return loss

    def _interfered(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The M prepared inputs and labels that the step on x (B, ...) would harm most, of those all processes draw."""
        raw, labels, *_ = self.memory.sample(self.candidates * self.replay_batch)
        inputs, parameters = self.prepare(raw), trainable(self.model)
        gradient = second_gradient(self.mean_loss(x, y), list(parameters.values()), self.world_size)
        steps = gradient.split([p.numel() for p in parameters.values()])
        virtual = {n: p.detach() - self.lr * g.view_as(p) for (n, p), g in zip(parameters.items(), steps, strict=True)}
        with torch.no_grad(), evaluating(self.model):
            after, before = (single_losses(self.model, inputs, labels, v) for v in (virtual, None))
        pool = {"inputs": inputs, "labels": labels, "rise": after - before}
        if self.world_size > 1:
            pool = gathered(pool)
        chosen = pool["rise"].topk(self.replay_batch * self.world_size).indices[self.rank :: self.world_size]
        return pool["inputs"][chosen], pool["labels"][chosen]
