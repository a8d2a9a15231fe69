"""O-LoRA: each task learns in an adapter of its own, whose inputs' directions are kept apart from those of the past.

Source   Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", Findings of EMNLP 2023,
         arXiv:2310.14152, equations 6 to 9.
Checked  by reading the penalty in cmnfriend/O-LoRA src/uie_trainer_lora.py (MIT); its trainer was not run.
    h = W x + s Σ_{i≤t} B_i A_i dropout(x)
    loss = CE(f(x), y) + λ1 Σ_layers Σ_{i<t} Ω(A_i, A_t) + λ2 Σ_layers (‖A_t‖_F + ‖B_t‖_F)
    Ω(P, A) = Σ |P Aᵀ|, entry by entry
Differs  the paper squares the entries (`penalty: squared`) and writes of the other factor; this is what the code that
         gave its published logs does, λ2 and its unsquared norms included. With accumulation both losses are divided,
         not only the first. Their gradients are clipped to a norm of 1, which is the loop's (`loop.clip_norm: 1`) and
         not on by itself. A head beside the adapters is not protected. Not to be confused with peft's initialisation of
         the same name.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clplat import Experience, require
from clplat.strategies._lora import Adapted


def overlap(past: Tensor, new: Tensor, penalty: str) -> Tensor:
    """Ω of past (L, R, d) and new (L, r, d) factors, summed over the L layers; `penalty` abs or squared."""
    with torch.autocast(new.device.type, enabled=False):  # what is left of an overlap is less than bfloat16 rounds
        products = past @ new.mT  # (L, R, r)
    return products.abs().sum() if penalty == "abs" else products.square().sum()


class OLoRA(Adapted):
    """One adapter for each experience, all in use, of which the last one learns. The backbone is frozen.

    Args:
        orthogonality: λ1 ≥ 0, weight of the overlap with past adapters: one value for each experience, the last one
            for all after it. A sum over layers and entries, so that it does not carry over between backbones.
        shrinkage: λ2 ≥ 0, weight of the new factors' norms; one value for each experience, as above.
        penalty: abs or squared entries.
    """

    paper = "arXiv:2310.14152"
    unshardable = ""
    plain_passes = True

    def __init__(
        self,
        *,
        orthogonality: list[float] = [0.5],  # noqa: B006
        shrinkage: list[float] = [0.0],  # noqa: B006
        penalty: Literal["abs", "squared"] = "abs",
        **base,
    ):
        super().__init__(**base)
        for name, values in (("orthogonality", orthogonality), ("shrinkage", shrinkage)):
            require(name, values, bool(values) and min(values) >= 0, "one value ≥ 0 or more")
        require("penalty", penalty, penalty in ("abs", "squared"), "abs or squared")
        self.orthogonality, self.shrinkage, self.penalty = orthogonality, shrinkage, penalty
        # Past and new A of layers with the same number of inputs, stacked; made when a step first asks for them.
        self._pairs: list[tuple[Tensor, list[Tensor]]] | None = None

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        names = list(self.adapters.adapters)
        self.adapters.add(f"task{len(names)}")
        self.adapters.use(*names, f"task{len(names)}", train=f"task{len(names)}")
        self._pairs = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        task = len(self.adapters.adapters) - 1
        first, second = (values[min(task, len(values) - 1)] for values in (self.orthogonality, self.shrinkage))
        loss = super().training_step(batch, batch_idx)
        if first:
            loss = loss + first * self._overlap()
        if second:
            # A norm's gradient at B = 0, where B starts, is 0.
            loss = loss + second * sum(torch.linalg.vector_norm(p) for p in self._new())
        return loss

    def _new(self) -> list[Tensor]:
        """A and B of every layer, of the adapter that learns."""
        return list(self.adapters.parameters_of(self.adapters.trained[0]))

    def _overlap(self) -> Tensor:
        """Σ over layers and past adapters of Ω."""
        if self._pairs is None:
            self._pairs = self._stacked()
        parts = [overlap(past, torch.stack(new), self.penalty) for past, new in self._pairs]
        return torch.stack(parts).sum() if parts else torch.zeros((), device=self._new()[0].device)

    def _stacked(self) -> list[tuple[Tensor, list[Tensor]]]:
        *past, now = (self.adapters.factors(name) for name in self.adapters.adapters)
        if not past:
            return []
        groups: dict[int, list[str]] = {}
        for name, (a, _) in now.items():
            groups.setdefault(a.shape[1], []).append(name)
        found: list[tuple[Tensor, list[Tensor]]] = []
        for names in groups.values():
            rows = torch.stack([torch.cat([factors[name][0] for factors in past]) for name in names])
            if not rows.any(dim=2).all():
                raise RuntimeError("an adapter of a past task is empty: what it learned has been lost")
            found.append((rows, list[Tensor](now[name][0] for name in names)))
        return found

    @torch.no_grad()
    def measurements(self) -> dict[str, float]:
        norms = [torch.linalg.vector_norm(b) for _, b in self.adapters.factors(self.adapters.trained[0]).values()]
        return {"overlap": float(self._overlap()), "up_norm": float(torch.stack(norms).mean())}
