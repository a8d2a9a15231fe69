"""Linear layers with rank-one experts beside them, of which an input's own projections choose a few.

p = A x,   s = p / ‖p‖,   w = softmax of the k largest s / τ, 0 elsewhere; in evaluation 0 also where s < δ
y = W x + B (w ∘ p)          an atom is a key, row of A (R, d), and a value, column of B (o, R)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.components.precision import wide


def activations(p: Tensor, top: int, temperature: float, threshold: float) -> Tensor:
    """w ∘ p of projections p (..., R): signed, so that a key opposed to the input is never chosen.

    Args:
        top: k, atoms that are active at most, ≥ 1.
        temperature: τ > 0.
        threshold: δ, least s of an active atom; -1 for none, as in training.
    """
    s = F.normalize(p, dim=-1)
    if top >= p.shape[-1]:
        best, raw = s, p
    else:
        best, chosen = s.topk(top, dim=-1)
        raw = p.gather(-1, chosen)
    # Weights under 2e-22 are exactly 0: numbers too small to be normal ones make a CPU's step twice as long.
    z = F.threshold((best - best.detach().amax(-1, keepdim=True)) / temperature, -50.0, -torch.inf)
    out = z.softmax(-1) * raw  # (..., k): by the raw p, which keeps the input's magnitude
    if threshold > -1:
        out = out.masked_fill(best < threshold, 0.0)
    return out if top >= p.shape[-1] else torch.zeros_like(p).scatter(-1, chosen, out)


class AtomLinear(nn.Linear):
    """A frozen linear layer of d inputs and o outputs with a bank of rank-one experts.

    Keys (R, d) and values (o, R) are those of past tasks, `new_keys` (r, d) and `new_values` (o, r) the present one's.

    Args:
        base: the layer whose parameters it takes.
        top: k ≥ 1.
        temperature: τ > 0.
        threshold: δ of evaluation.
        dropout: share of the inputs that is dropped on the way to the keys in training, in [0, 1).
    """

    def __init__(self, base: nn.Linear, top: int, temperature: float, threshold: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.top, self.temperature, self.threshold, self.dropout = top, temperature, threshold, dropout
        like = wide(base.weight.new_zeros(0))
        self.keys = nn.Parameter(like.new_zeros(0, self.in_features), requires_grad=False)
        self.values = nn.Parameter(like.new_zeros(self.out_features, 0), requires_grad=False)
        self.new_keys, self.new_values = nn.Parameter(self.keys.clone()), nn.Parameter(self.values.clone())

    def forward(self, input: Tensor) -> Tensor:
        out = F.linear(input, self.weight, self.bias)  # (..., o)
        if not len(self.new_keys):
            return out
        with torch.autocast(input.device.type, enabled=False):  # τ = 0.01 makes rounding in bfloat16 100 times larger
            x = F.dropout(input.to(self.new_keys.dtype), self.dropout, self.training)
            p = F.linear(x, torch.cat([self.keys, self.new_keys]))  # (..., R)
            p = activations(p, self.top, self.temperature, -1.0 if self.training else self.threshold)
            change = F.linear(p, torch.cat([self.values, self.new_values], 1))
        return out + change.to(out.dtype)

    @torch.no_grad()
    def append(self, rank: int) -> None:
        """Freeze the atoms that are there; `rank` new ones with random keys and values of 0."""
        self.keys = nn.Parameter(torch.cat([self.keys, self.new_keys]), requires_grad=False)
        self.values = nn.Parameter(torch.cat([self.values, self.new_values], 1), requires_grad=False)
        self.new_keys = nn.Parameter(self.keys.new_empty(rank, self.in_features))
        nn.init.kaiming_uniform_(self.new_keys, a=math.sqrt(5))
        self.new_values = nn.Parameter(self.values.new_zeros(self.out_features, rank))
