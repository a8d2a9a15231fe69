"""Groups of an adapter's factors, as `LoRA.groups` gives them: their norms, and the proximal step of these norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def group_norms(groups: Sequence[Sequence[Tensor]]) -> Tensor:
    """‖G_l‖ of each group of tensors, (groups,); where a tensor is zero its gradient is zero, not NaN."""
    return torch.stack([torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(g)))) for g in groups])


@torch.no_grad()
def shrink(groups: Sequence[Sequence[Tensor]], by: float) -> None:
    """G_l ← max(0, 1 − by / ‖G_l‖) G_l in place: the proximal step of by · Σ_l ‖G_l‖. Zero where ‖G_l‖ ≤ by."""
    for group, norm in zip(groups, group_norms(groups), strict=True):
        torch._foreach_mul_(list(group), torch.clamp(1 - by / norm.clamp(min=torch.finfo(norm.dtype).tiny), min=0))
