"""DP-HNET, this project's specification of it: a recurrent network generates the weights piece after piece.

Source   the idea: Chandra, Varshney, Srijith, Gupta, "Continual Learning with Dependency Preserving Hypernetworks",
         WACV 2023, arXiv:2209.07712, of which only abstract and introduction could be read. From them: weights made by
         a recurrent network layer after layer, so that they depend on one another; a regulariser and a growth of
         its own. Cell, equations of both, sizes and every default here are OUR CHOICE: name runs `dph-spec`, and do
         not report them as the paper's.
    h_k, s_k = LSTM([e_t; c_k], h_{k−1}, s_{k−1}) from zeros,   piece k = V h_k + b
    loss = CE(f(x; ω_t), y) + β · (1/m) Σ_j ( Σ_i F_ji (ω*_ji − h(e_j; θ)_i)² + ρ Σ_k ‖h*_jk − h_jk‖² )
    F_j: diagonal of the empirical Fisher information of f at ω_j, on task j at its end, scaled to mean 1
    growth: after every G tasks the cell, V and the c_k freeze; a new cell also takes the frozen one's h_k. j runs over
    the tasks of the present cell: those of frozen ones stay bit for bit.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat import Experience, require
from clplat.components.fisher import mean_squared_gradient
from clplat.components.generated import GeneratedClassifier
from clplat.components.hypernetwork import Recurrent
from clplat.strategies._hypernet import Hypernet
from clplat.strategy import evaluating


def fisher(model: GeneratedClassifier, slot: int, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean over samples of the squared gradient of the cross-entropy by ω, (n,); inputs (b, ...), labels (b,)."""

    def loss(omega: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return model.losses_by(omega, x, y, slot).mean()

    return mean_squared_gradient(loss, model.omega(slot).detach(), inputs, labels)


class DPHNet(Hypernet):
    """Recurrent hypernetwork (project specification). All rows of the head are generated from the start.

    Args:
        layerwise: a piece is a whole tensor of the target, with a V of its own: hidden · |ω| numbers in all. Otherwise
            pieces are `chunk` numbers each and share V.
        chunk: numbers of ω in a piece, ≥ 1; has no effect layerwise.
        chunk_embedding: numbers of each c_k, ≥ 0.
        hidden: numbers of h_k, ≥ 1.
        fisher_samples: samples of a task that F is estimated on; 0 takes F = 1, the regulariser of `hnet`.
        hold_states: ρ ≥ 0, weight of the hidden states in the regulariser.
        grow_every: G ≥ 1, tasks after which a new cell is added; null never does.
        held_outputs: stored: ω*_j of all old tasks are computed once a task and kept, (t − 1) |ω| numbers. recomputed:
            they are made again in each step.
    """

    paper = "arXiv:2209.07712"
    fisher: Tensor

    def __init__(
        self,
        *,
        layerwise: bool = False,
        chunk: int = 8000,
        chunk_embedding: int = 32,
        hidden: int = 64,
        fisher_samples: int = 200,
        hold_states: float = 0.0,
        grow_every: int | None = None,
        held_outputs: Literal["stored", "recomputed"] = "stored",
        **base,
    ):
        super().__init__(held_outputs=held_outputs, **base)
        require("held_outputs", held_outputs, held_outputs in ("stored", "recomputed"), "stored or recomputed")
        require("chunk", chunk, chunk >= 1, "≥ 1")
        require("chunk_embedding", chunk_embedding, chunk_embedding >= 0, "≥ 0")
        require("hidden", hidden, hidden >= 1, "≥ 1")
        require("fisher_samples", fisher_samples, fisher_samples >= 0, "≥ 0")
        require("hold_states", hold_states, hold_states >= 0, "≥ 0")
        require("grow_every", grow_every, grow_every is None or grow_every >= 1, "≥ 1, or null")
        self.fisher_samples, self.grow_every = fisher_samples, grow_every
        sizes = [s.shape.numel() for s in self.target.slices] if layerwise else chunk
        size, from_zero = self.target.size, self.target.rank > 0
        self.register_buffer("fisher", torch.zeros(0, size))  # of each task, (T, n)
        self._generate(Recurrent(size, self.embedding, sizes, chunk_embedding, hidden, hold_states**0.5, from_zero))

    def grow(self, experience: Experience) -> None:
        met, generator = len(self.model.codes), self.model.generator
        assert isinstance(generator, Recurrent)
        new = experience.task not in self.model.slots
        if new and self.grow_every and met and met % self.grow_every == 0:
            generator.extend()
        if new and self.fisher_samples:
            self.fisher = torch.cat([self.fisher, self.fisher.new_zeros(1, self.fisher.shape[1])])
        super().grow(experience)

    def end(self, experience: Experience) -> None:
        """Every process estimates F on the same samples, evenly spaced, so that all agree."""
        super().end(experience)
        assert experience.train is not None
        if not self.fisher_samples:
            return
        count = len(experience.train)
        chosen = torch.linspace(0, count - 1, min(count, self.fisher_samples), device=self.fisher.device).long()
        raw, labels = experience.train.batch(chosen)
        assert labels is not None
        with evaluating(self):
            found = fisher(self.model, self.model.current, self.prepare(raw), labels)
        mean = found.mean()
        self.fisher[self.model.current] = found / mean if mean > 0 else torch.ones_like(found)

    def _importance(self, slots: list[int]) -> Tensor | None:
        if not self.fisher_samples:
            return None
        held = self.fisher[slots]
        return F.pad(held, (0, self.model.generator.width - held.shape[1]), value=1.0)
