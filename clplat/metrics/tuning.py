"""What training has done to a network, by its weights and by its passes: intruder dimensions, and tuning contribution.

Legend: n samples, D features of a token, r = min(rows, columns) of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

TOP, THRESHOLD = 10, 0.5  # k and ε of the paper
_GAP = 1e-4  # singular values that differ by less of the greater one have no directions of their own


def intruder_dimensions(before: Tensor, after: Tensor, top: int = TOP, threshold: float = THRESHOLD) -> int:
    """Leading singular directions of a matrix that are none of what it was; in [0, min(top, r)], lower is better.

        c_j = max_i |u_i(W_0) · u_j(W_1)|,   direction j ≤ k is an intruder if c_j < ε

    u are left singular vectors by falling singular values; in float64.

    Source: Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence", NeurIPS 2025,
    arXiv:2410.21228. Differs: where singular values of W_0 follow each other more closely than by one in 10⁴, vectors
    are arbitrary within their space, and c_j is the length of the projection on it; directions of W_1 without a
    singular value are not counted.

    Args:
        before: W_0.
        after: W_1, of the same shape.
        top: k ≥ 1.
        threshold: ε in (0, 1].

    >>> before = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> intruder_dimensions(before, before + torch.tensor([[0.0, 0.0], [0.0, 0.0], [9.0, 0.0]]))
    1
    """
    old, old_values, _ = torch.linalg.svd(before.double(), full_matrices=False)
    new, new_values, _ = torch.linalg.svd(after.double(), full_matrices=False)
    there = new_values[:top] > new_values[0] * max(after.shape) * torch.finfo(torch.float64).eps
    overlaps = (old.mT @ new[:, :top][:, there]).square()  # (r, k)
    apart = old_values[:-1] - old_values[1:] > _GAP * old_values[:-1]
    spaces = torch.cat([apart.new_zeros(1), apart]).cumsum(0)  # (r,) number of each direction's space
    lengths = torch.zeros_like(overlaps).index_add_(0, spaces, overlaps).amax(0).sqrt()
    return int((lengths < threshold).sum())


def tuning_contribution(
    blocks: Sequence[nn.Module], origins: Sequence[nn.Module], forward: Callable[[], Any], last: Tensor
) -> Tensor:
    """How much of what a tuned network adds to a text's last token comes from its tuning, (n,) in [0, 1].

        x_{l+1} = x_l + f_0(x_l) + (f − f_0)(x_l);   P = Σ_l f_0(x_l),   F = Σ_l (f − f_0)(x_l)
        TuCo = ‖F‖₁ / (‖P‖₁ + ‖F‖₁)   at the last token

    f is a block's output less its input, f_0 that of the same block before tuning, on the tuned network's states.
    Neither end is better; 0 where nothing was added. What changed outside the blocks is not seen.

    Source: Nuti, Franzmeyer, Henriques, "TuCo: Measuring the Contribution of Fine-Tuning to Individual Responses of
    LLMs", ICML 2025, arXiv:2506.23423. The paper could not be read in full (its definitions were), its code not at all.

    Args:
        blocks: of the tuned network, each taking states (n, P, D) first and giving them alone, or first.
        origins: the same blocks before tuning.
        forward: a pass of the tuned network over n texts.
        last: (n,) place of each text's last token.
    """
    sums: dict[str, Tensor] = {}

    def at_last(states: Any) -> Tensor:
        states = states[0] if isinstance(states, tuple) else states
        rows = states[torch.arange(len(last), device=states.device), last]  # (n, D)
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    def note(origin: nn.Module, _block: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        start = at_last(given[0] if given else named["hidden_states"])
        old = at_last(origin(*given, **named))
        for name, added in (("P", old - start), ("F", at_last(output) - old)):
            sums[name] = sums[name] + added if name in sums else added

    handles = [
        block.register_forward_hook(partial(note, origin), with_kwargs=True)
        for block, origin in zip(blocks, origins, strict=True)
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    tuned, trained = sums["F"].abs().sum(1), sums["P"].abs().sum(1)
    return tuned / (tuned + trained).clamp(min=torch.finfo(tuned.dtype).tiny)
