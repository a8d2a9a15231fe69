"""What strategies share that learn prompts for a frozen backbone: a query, prefixes made from it, a loss of one task.

q = f(x) without prompts;   logits = head(f(x; prefixes(q)));   loss = CE over the classes of the experience
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat import Experience, Kind, Strategy
from clplat.adapters.prefixes import Prefix, Prefixes
from clplat.backbones.base import Classifier
from clplat.components.losses import own_losses
from clplat.errors import UserError
from clplat.strategy import evaluating


class Prompted(Strategy):
    """Base. A subclass makes prefixes from queries. B samples, D features, n keys and values, L blocks, C classes.

    Args:
        optimizer: sgd, adam or adamw; made anew for each experience.
        lr: learning rate, > 0.
    """

    kinds = frozenset({Kind.LEARN})
    searched = {"lr": (1e-4, 1e-1, "log")}
    needs_classes = True
    model: Classifier
    unmergeable = "it learns prompts, which are no weights of the model"
    present: Tensor

    def __init__(
        self, *, model: Classifier, optimizer: Literal["sgd", "adam", "adamw"] = "adam", lr: float = 1e-3, **base
    ):
        super().__init__(model=model, optimizer=optimizer, lr=lr, **base)
        if not model.backbone.needs_head:
            what = f"{type(model.backbone).__name__} answers in words, and prompts are learned beside a head"
            raise UserError(f"backbone: {what} (valid: vit, timm, text_encoder)")
        model.backbone.requires_grad_(False)
        self.width = model.backbone.embed_dim
        self.register_buffer("present", torch.zeros(model.num_classes, dtype=torch.bool))
        self._away: Tensor | None = None  # what draws a prompt's key to the queries of this pass

    def _prefix(self, blocks: int) -> None:
        """Put prefixes before the first blocks; called once, at the end of a constructor."""
        self.prefixes = Prefixes(self.model.backbone, blocks, self._made)

    def _prefixes_for(self, query: Tensor) -> Sequence[Prefix]:
        """Keys and values (B, n, D) for each block, for queries (B, D)."""
        raise NotImplementedError

    def _made(self, inputs: Tensor) -> Sequence[Prefix]:
        with torch.no_grad(), evaluating(self.model.backbone):
            query = self.model.backbone.forward(inputs)  # within a pass of it
        return self._prefixes_for(query)

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.present.zero_()
        self.present[list(experience.classes)] = True

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        losses = own_losses(self.model, x, y, self.present)
        if self._away is not None:
            losses, self._away = losses + self._away, None
        return self.mean(losses)


def uniform(*shape: int) -> torch.nn.Parameter:
    """A prompt or key as it begins, U(-1, 1)."""
    return torch.nn.Parameter(torch.empty(shape).uniform_(-1, 1))


def by_block(prompts: Tensor) -> list[Prefix]:
    """Prompts (B, L, 2, n, D) of samples as (P_K, P_V), each (B, n, D), of each block."""
    return [(p[:, 0], p[:, 1]) for p in prompts.unbind(1)]


def cosines(queries: Tensor, keys: Tensor) -> Tensor:
    """cos(q, k) (B, T) of queries (B, D) and keys (T, D)."""
    return F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T
