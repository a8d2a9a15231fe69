"""Linear layers split by their singular values: a part that is kept as it is, and factors of the rest that learn.

    W = U_h S_h V_hᵀ + U_l S_l V_lᵀ          k of r = min(o, d) singular values are high, o outputs, d inputs
    dU_l ← (I − U_h U_hᵀ) dU_l,   dV_l ← (I − V_h V_hᵀ) dV_l,   dS_l free            of gradients, and of the factors

Singular vectors are in single precision at least: in bfloat16 they are orthogonal to 6e-4 only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.adapters.replace import replaced
from clplat.backbones.base import Backbone, Role
from clplat.components.precision import wide

Block = Literal["factored", "paper"]


class SplitLinear(nn.Linear):
    """A linear layer that can be split in a frozen part and factors of the rest: o outputs, d inputs, p = r − k.

    Unsplit it is the layer it was made of, with the very same parameters. Split, `weight` is U_h S_h V_hᵀ and the rest
    is `left` (o, p) = U_l, `scale` (p,) = S_l, `right` (p, d) = V_lᵀ. With `block` "paper" all of W stays in `weight`,
    which is trained. Takes its sizes from the state that is loaded.

    Args:
        base: the layer whose parameters it takes.
        block: the part of an update that is removed.
    """

    # U_h (o, k) and V_h (d, k), or U_l and V_l as they were, where these are fewer and span the complement; S_h (k,).
    left: nn.Parameter
    scale: nn.Parameter
    right: nn.Parameter
    left_basis: nn.Parameter
    right_basis: nn.Parameter
    high: nn.Parameter
    _PARTS = ("left", "scale", "right", "left_basis", "right_basis", "high")

    def __init__(self, base: nn.Linear, block: Block) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.block = base.in_features, base.out_features, block
        self.weight, self.bias = base.weight, base.bias
        for part in self._PARTS:
            self._hold(part, wide(base.weight).new_zeros(0))

    def _hold(self, part: str, value: Tensor, trained: bool = False) -> None:
        """Set a part. Parameters, not buffers, which DDP by default sends to all processes in every forward pass."""
        # A copy, with the strides that a loaded one has: `contiguous` leaves those of a single row or column.
        value = value.clone(memory_format=torch.contiguous_format)
        setattr(self, part, nn.Parameter(value, requires_grad=trained))

    @property
    def kept(self) -> int:
        """k; 0 while it is not split, and where nothing of it is trained."""
        if self.block == "paper":
            return len(self.high)
        return min(self.in_features, self.out_features) - len(self.scale) if len(self.scale) else 0

    def forward(self, input: Tensor) -> Tensor:
        out = F.linear(input, self.weight, self.bias)  # (..., o)
        if not len(self.scale):
            return out
        return out + F.linear(F.linear(input.to(self.right.dtype), self.right) * self.scale, self.left).to(out.dtype)

    @torch.no_grad()
    def split(self, kept: int) -> float:
        """Protect the leading k = `kept` directions; returns σ_k − σ_{k+1} over σ_1 (1 where all or none are kept)."""
        weight = wide(self.weight)
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)  # (o, r), (r,), (r, d)
        k, r = kept, len(s)
        if self.block == "paper":
            parts = {"left_basis": u[:, :k], "right_basis": vt[:k].T, "high": s[:k]}
        else:
            parts = {"left": u[:, k:], "scale": s[k:], "right": vt[k:]}
            for side, basis in (("left_basis", u), ("right_basis", vt.T)):
                parts[side] = basis[:, k:] if self._by_complement(len(basis), k) else basis[:, :k]
            low = (u[:, k:] * s[k:]) @ vt[k:]
            self.weight.copy_(weight - low)
        for part, value in parts.items():
            self._hold(part, value, part in ("left", "scale", "right"))
        self.weight.requires_grad_(self.block == "paper" and k < r)
        return float((s[k - 1] - s[k]) / s[0]) if 0 < k < r and s[0] else 1.0

    @torch.no_grad()
    def merge(self) -> None:
        """Put the factors back into `weight`, which may learn again."""
        if len(self.scale):
            self.weight.copy_(wide(self.weight) + (self.left * self.scale) @ self.right)
        self.weight.requires_grad_(True)
        for part in self._PARTS:
            self._hold(part, self.scale.new_zeros(0))

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Remove from the gradients what would change the protected part."""
        if self.block == "paper":
            if len(self.high) and self.weight.grad is not None:
                self.weight.grad -= self._protected(wide(self.weight.grad)).to(self.weight.dtype)
        elif len(self.scale) and self.left.grad is not None and self.right.grad is not None:
            self._outside(self.left.grad, self.left_basis)
            self._outside(self.right.grad.T, self.right_basis)

    @torch.no_grad()
    def project(self) -> None:
        """Remove from the weights what has entered the protected part."""
        if self.block == "paper":
            if len(self.high):
                moved = self._protected(wide(self.weight)) - (self.left_basis * self.high) @ self.right_basis.T
                self.weight -= moved.to(self.weight.dtype)
        elif len(self.scale):
            self._outside(self.left, self.left_basis)
            self._outside(self.right.T, self.right_basis)

    def _protected(self, matrix: Tensor) -> Tensor:
        """U_h (U_hᵀ M V_h) V_hᵀ of M (o, d)."""
        return self.left_basis @ (self.left_basis.T @ matrix @ self.right_basis) @ self.right_basis.T

    def _by_complement(self, size: int, kept: int) -> bool:
        """Whether the projection on a side of `size` is by U_l U_lᵀ, which is I − U_h U_hᵀ on a side of r, for less."""
        rank = min(self.in_features, self.out_features)
        return size == rank and rank - kept < kept

    def _outside(self, columns: Tensor, basis: Tensor) -> None:
        """Project columns (o or d, p) in place."""
        inside = basis @ (basis.T @ columns)
        if self._by_complement(len(basis), self.kept):
            columns.copy_(inside)
        else:
            columns -= inside

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for part in self._PARTS:  # absent in the state of a model that was never split
            value = state_dict.setdefault(prefix + part, self.scale.new_zeros(0))
            self._hold(part, torch.empty_like(value, device=self.weight.device), getattr(self, part).requires_grad)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SplitLayers(list[SplitLinear]):
    """Those layers of a backbone that can be split, L of them. Holds no state itself: all of it is in the layers.

    Args:
        backbone: whose layers are replaced, in place, but for those whose weight the user froze.
        roles: of the layers.
        block: the part of an update that is removed.
    """

    def __init__(self, backbone: Backbone, roles: Sequence[Role], block: Block) -> None:
        trained = [n for n, p in backbone.named_parameters() if p.requires_grad]
        found = replaced(backbone, roles, lambda old: SplitLinear(old, block) if old.weight.requires_grad else None)
        super().__init__(found.values())
        self.backbone = backbone
        self._rest = [n for n in trained if n.rpartition(".")[0] not in found or not n.endswith(".weight")]

    def split(self, shares: Sequence[float]) -> dict[str, float]:
        """Protect a share of each layer's rank: what that is of all ranks, and the smallest gap behind a kept value."""
        ranks = [min(layer.weight.shape) for layer in self]
        kept = [kept_rank(share, r) for share, r in zip(shares, ranks, strict=True)]
        gaps = [layer.split(k) for layer, k in zip(self, kept, strict=True)]
        return {"preserved_fraction": sum(kept) / max(sum(ranks), 1), "smallest_gap": min(gaps, default=1.0)}

    def train_rest(self, which: Literal["none", "norms", "all"]) -> None:
        """Freeze what else of the backbone learns: all of it, all but one-dimensional parameters, or none."""
        for name in self._rest:
            parameter = self.backbone.get_parameter(name)
            parameter.requires_grad_(which == "all" or (which == "norms" and parameter.ndim == 1))

    def project_gradients(self) -> None:
        """Remove from all gradients what would change a protected part."""
        for layer in self:
            layer.project_gradients()

    def project(self) -> None:
        """Remove from all weights what has entered a protected part."""
        for layer in self:
            layer.project()

    def merge(self) -> None:
        """Put all factors back into the weights."""
        for layer in self:
            layer.merge()

    @torch.no_grad()
    def alignment(self, run: Callable[[], object]) -> Tensor:
        """Mean cosine (L,) of each layer's input and its output without bias, over what passes it during `run`."""
        total = torch.zeros(len(self), dtype=torch.float64, device=self[0].weight.device)

        def note(index: int, layer: SplitLinear, x: Tensor) -> None:
            total[index] += cosines(x, F.linear(x, layer.weight)).mean()

        hooks = [
            layer.register_forward_pre_hook(lambda module, given, index=i: note(index, module, given[0]))
            for i, layer in enumerate(self)
        ]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        return total


def kept_rank(fraction: float, rank: int) -> int:
    """k = ⌊ρ r⌋ in [0, r]; a ρ that is short of a whole k by rounding only counts as that k."""
    return int(min(max(fraction, 0.0), 1.0) * rank + 1e-9)


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """cos(x_i, y_i) of inputs (..., d) and outputs (..., o), over their first min(o, d) features: (...)."""
    features = min(x.shape[-1], y.shape[-1])
    return F.cosine_similarity(wide(x[..., :features]), wide(y[..., :features]), dim=-1)
