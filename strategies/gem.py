"""GEM: a step that would raise the loss on any earlier experience is replaced by the nearest one that raises none.

Source   Lopez-Paz, Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, arXiv:1706.08840.
Checked  against facebookresearch/GradientEpisodicMemory model/gem.py (34c6b8e, CC BY-NC 4.0).
    g = ∇ CE(f(x; θ), y),   g_k = ∇ CE(f(m_k; θ), y_k)        x new, m_k all that is remembered of experience k
    where g·g_k < 0 for some k:   g ← g + Σ_k v_k g_k,   v = argmin_{v ≥ γ} ½ ‖g + Σ_k v_k g_k‖²
Differs  the quadratic program is solved exactly, by its active set (theirs adds 0.001 to the diagonal). The memory has
         room for `memory` samples in all, the same for each experience, drawn at random (theirs: the last ones). After
         clipping, which changes the length of g. With loop.accumulate g_k is taken at the first of the batches.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from clplat import Experience, Kind, Strategy, require
from clplat.components.gradients import as_vector, overwrite, second_gradient
from clplat.components.memory import ClassBalanced
from clplat.components.per_parameter import trainable


def nearest(gradient: Tensor, references: Tensor, margin: float = 0.0) -> Tensor:
    """`gradient` (P,), or where its product with one of `references` (K, P) is negative, g + Σ_k v_k g_k (P,).

    v minimises ½ vᵀ G Gᵀ v + (G g)ᵀ v over v ≥ margin; with u = v − margin ≥ 0 and G Gᵀ = U S Uᵀ these are non-negative
    least squares, ‖√S Uᵀ u + √S⁻¹ Uᵀ q‖² with q = G g + margin · G Gᵀ 1, which lies in the range of G.
    """
    g, rows = gradient.double(), references.double()
    products = rows @ g
    if bool((products >= 0).all()):
        return gradient
    gram = (rows @ rows.T).cpu().numpy()  # (K, K)
    values, vectors = np.linalg.eigh(gram)
    kept = values > values.max() * len(values) * np.finfo(np.float64).eps
    root, basis = np.sqrt(values[kept]), vectors[:, kept].T
    q = products.cpu().numpy() + margin * gram.sum(1)
    v = margin + nnls(root[:, None] * basis, -(basis @ q) / root)[0]
    return (g + torch.from_numpy(v).to(g) @ rows).to(gradient.dtype)


class GEM(Strategy):
    """Gradient episodic memory. B new samples, K earlier experiences, P numbers of all trainable parameters.

    A step takes K passes over the memory and K P numbers.

    Args:
        memory: samples kept in all, the same number of each experience (as stored: before augmentation), ≥ the number
            of experiences.
        margin: γ ≥ 0, least weight of each g_k where a step is replaced; above 0 steps lower the earlier losses.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:1706.08840"
    unshardable = "it projects whole gradients"
    replays = True
    reads_whole = True
    searched = {"margin": (0.0, 1.0)}

    def __init__(self, *, memory: int = 500, margin: float = 0.5, **base):
        super().__init__(**base)
        require("margin", margin, margin >= 0, "≥ 0")
        self.memory, self.margin = ClassBalanced(memory), margin  # with experiences for classes
        self._references: list[Tensor] = []  # the g_k of the step under way

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        if len(self.memory) and not self._references:
            inputs, of, labels, _ = self.memory.everything()
            for k in self.memory.held:
                loss = self.losses(self.prepare(inputs[of == k]), labels[of == k]).mean()
                self._references.append(second_gradient(loss, list(trainable(self.model).values()), self.world_size))
        return self.mean_loss(x, y)

    @torch.no_grad()
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._references:
            parameters = list(trainable(self.model).values())
            overwrite(parameters, nearest(as_vector(parameters), torch.stack(self._references), self.margin))
            self._references = []

    def end(self, experience: Experience) -> None:
        """Remember this experience; every process offers its part."""
        assert experience.train is not None
        data = experience.train
        part = torch.arange(len(data), device=data.inputs.device).tensor_split(self.world_size)[self.rank]
        inputs, labels = data.batch(part)
        assert labels is not None
        of = torch.full((len(part),), experience.index, device=part.device)
        self.memory.add(inputs, of, targets=labels, rows=data.row_ids()[part])
