"""Keys and values of one's own before those of a block's attention, in any backbone of torch's fused attention.

Source   Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021, arXiv:2101.00190; put
         before keys and values as they are projected, as prompt methods of continual learning do (arXiv:2204.04799).
    Attention(Q, [P_K; K], [P_V; V])

Shapes: B samples of a batch, D features, H heads of d numbers (D = H d), P tokens, n keys and values of a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clplat.backbones.base import Backbone, at_least_one
from clplat.errors import UserError

Prefix = tuple[Tensor, Tensor]  # P_K and P_V (B, n, D) of one block


class Prefixes:
    """Lets the first blocks of a backbone attend to prefixes as well, in every forward pass from now on.

    Args:
        backbone: whose blocks have an attention each.
        count: of the blocks that get prefixes, ≥ 1.
        make: prepared inputs (B, ...) → a prefix for each of them, or for none; may run the backbone, which is without
            prefixes meanwhile.

    Raises:
        UserError: the backbone has no attention, or fewer blocks. In the first pass: a block's attention has other
            keys than D numbers a token, or is not computed by torch's scaled_dot_product_attention.
    """

    def __init__(self, backbone: Backbone, count: int, make: Callable[[Tensor], Sequence[Prefix]]) -> None:
        if not backbone.layers("attention"):
            raise UserError(f"backbone: has no attention that prefixes could go before{backbone.offered()}")
        if not 1 <= count <= len(backbone.blocks):
            has = len(backbone.blocks)
            raise UserError(f"strategy: prefixes for {count} blocks, but the backbone has {has} (valid: 1 to {has})")
        self._make, self._now, self._resting = make, list[Prefix](), False
        self._wrap(backbone)
        for number, block in enumerate(backbone.blocks[:count]):
            self._wrap_block(number, block)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """The backbone as it is without prefixes."""
        before, self._resting = self._resting, True
        now, self._now = self._now, []
        try:
            yield
        finally:
            self._resting, self._now = before, now

    def _wrap(self, backbone: Backbone) -> None:
        forward = backbone.forward

        @at_least_one
        def prefixed(inputs: Tensor) -> Tensor:
            if self._resting:
                return forward(inputs)
            with self.resting():
                found = list(self._make(inputs))
            self._now = found
            try:
                return forward(inputs)
            finally:
                self._now = []

        backbone.forward = prefixed  # type: ignore[method-assign]

    def _wrap_block(self, number: int, block: nn.Module) -> None:
        forward = block.forward

        def prefixed(*args: Any, **kwargs: Any) -> Any:
            if number >= len(self._now):
                return forward(*args, **kwargs)
            with _Prepending(*self._now[number]) as attention:
                output = forward(*args, **kwargs)
            if attention.calls != 1:
                what = f"block {number} calls torch's scaled_dot_product_attention {attention.calls} times, not once"
                raise UserError(f"backbone: {what}: prefixes can't be put before its keys")
            return output

        block.forward = prefixed


class _Prepending(TorchFunctionMode):
    """While entered, attention sees `keys` and `values` (B, n, D) first."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.calls = keys, values, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **more: Any,
    ) -> Tensor:  # fmt: skip
        count = self.keys.shape[1]
        if is_causal:
            tokens = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
            attn_mask = tokens.tril()
        if attn_mask is not None:
            attn_mask = F.pad(attn_mask, (count, 0), value=True if attn_mask.dtype == torch.bool else 0.0)
        key = torch.cat([self._of_heads(self.keys, key), key], dim=2)
        value = torch.cat([self._of_heads(self.values, value), value], dim=2)
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **more)

    @staticmethod
    def _of_heads(prefix: Tensor, like: Tensor) -> Tensor:
        """(B, n, D) as (B, H, n, d), like a block's own (B, H, P, d)."""
        batch, heads, _, width = like.shape
        if prefix.shape[0] != batch or prefix.shape[2] != heads * width:
            own = f"{heads} heads of {width} keys or values for {batch} sequences"
            what = f"{own}, not {prefix.shape[2]} for {prefix.shape[0]}"
            raise UserError(f"backbone: an attention has {what}: windows and grouped queries take no prefixes")
        return prefix.to(like.dtype).reshape(batch, -1, heads, width).transpose(1, 2)
