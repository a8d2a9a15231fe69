"""CODA-Prompt: prompts that are sums of components, weighed by how much a query attends to each.

Source   Smith et al., "CODA-Prompt: COntinual Decomposed Attention-based Prompting for Rehearsal-Free Continual
         Learning", CVPR 2023, arXiv:2211.13218, equations 3 to 7.
Checked  against GT-RIPL/CODA-Prompt models/zoo.py (6417d4f).
    α_m = cos(q(x) ⊙ A_m, K_m),   p = Σ_m α_m P_m = [P_K; P_V],   in each of the first L blocks
    loss = CE over the experience's classes + μ Σ_blocks (Ω(P) + Ω(K) + Ω(A)),   Ω(T) = mean((T Tᵀ − I)²)
    Each experience learns components of its own, which begin orthogonal to all before them; these are frozen.
Differs  components an experience are given, for the paper's 100 in all over the tasks to come. New rows come from a QR
         decomposition (the code's Gram-Schmidt is exact as long as earlier rows stay orthogonal); those for which no
         direction is left are drawn at random, of length 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat import Experience, require
from clplat.adapters.prefixes import Prefix
from clplat.strategies._prompted import Prompted, by_block


class CODAPrompt(Prompted):
    """Prompt components with attention. M components in all.

    Args:
        blocks: L ≥ 1, of the backbone, from the first.
        length: n ≥ 1, keys and as many values of a prompt (the paper's length counts both).
        components: of each experience, ≥ 1.
        orthogonality: μ ≥ 0 (the paper has 0.1; the authors' later code 0, with components that begin orthogonal).
    """

    paper = "arXiv:2211.13218"
    unshardable = ""
    searched = {"orthogonality": (0.0, 0.5)}

    def __init__(self, *, blocks: int = 5, length: int = 4, components: int = 10, orthogonality: float = 0.0, **base):
        super().__init__(**base)
        require("length", length, length >= 1, "≥ 1")
        require("components", components, components >= 1, "≥ 1")
        require("orthogonality", orthogonality, orthogonality >= 0, "≥ 0")
        self.blocks, self.length, self.components, self.orthogonality = blocks, length, components, orthogonality
        self.prompts = nn.ParameterList()  # P of each experience: (M_t, L, 2, n, D)
        self.keys, self.attention = nn.ParameterList(), nn.ParameterList()  # K and A: (M_t, L, D)
        self._prefix(blocks)

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        for parts, shape in zip(
            self._parts(), ((2, self.length, self.width), (self.width,), (self.width,)), strict=True
        ):
            past = torch.cat([*parts]) if len(parts) else torch.empty(0, self.blocks, *shape)
            parts.requires_grad_(False)
            new = [apart(past[:, i].detach().flatten(1).cpu().float(), self.components) for i in range(self.blocks)]
            rows = torch.stack(new, dim=1).unflatten(2, shape)  # (M_t, L, ...)
            parts.append(nn.Parameter(rows.to(self.present.device)))

    def _parts(self) -> tuple[nn.ParameterList, ...]:
        return self.prompts, self.keys, self.attention

    def _prefixes_for(self, query: Tensor) -> Sequence[Prefix]:
        if not self.keys:
            return []  # nothing was learned yet
        p, k, a = (torch.cat([*parts]) for parts in self._parts())
        asked = F.normalize(torch.einsum("bd,mld->bmld", query, a), dim=3)
        weights = torch.einsum("bmld,mld->bml", asked, F.normalize(k, dim=2))  # α
        return by_block(torch.einsum("bml,mlknd->blknd", weights, p))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.orthogonality:
            tables = [torch.cat([*parts]).flatten(2) for parts in self._parts()]
            loss = loss + self.orthogonality * sum(overlap(table[:, i]) for table in tables for i in range(self.blocks))
        return loss


def overlap(rows: Tensor) -> Tensor:
    """Ω of rows (M, d)."""
    return (rows @ rows.T - torch.eye(len(rows), device=rows.device)).square().mean()


def apart(past: Tensor, count: int) -> Tensor:
    """Rows (count, d) of length 1, orthogonal to each other and to rows (M, d), as far as there are directions left."""
    rows, free = torch.randn(count, past.shape[1]), max(past.shape[1] - len(past), 0)
    basis = torch.linalg.qr(past.T).Q
    for _ in range(2):  # the second time takes what rounding left
        rows[:free] -= rows[:free] @ basis @ basis.T
    return torch.cat([torch.linalg.qr(rows[:free].T).Q.T, F.normalize(rows[free:], dim=1)])
