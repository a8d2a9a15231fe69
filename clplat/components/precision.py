"""Single precision for what is small: differences, averages, singular vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """In single precision at least: in bfloat16 steps under 2⁻⁹ of a value round away."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
