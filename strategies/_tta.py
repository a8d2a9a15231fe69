"""What test-time adaptation strategies share: how a trained model becomes one that adapts, and back.

A learn experience trains the source model as usual. The first adapt experience after it (or after the start, for
weights from elsewhere) takes that model as the source; all further ones go on from where the last one ended, with the
same optimizer state, as if there were no boundary. Dropout is off while adapting, unless `training_mode` asks for it.

Robustness: pixels that are not finite are taken as 0; a batch whose loss is not finite changes nothing; an empty batch
is answered with no rows. Several processes: batch statistics, selections and gates are those of the whole batch.
Shapes: B images of a batch (of this process), C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat import Experience, Kind, Strategy
from clplat.components.memory import gathered
from clplat.components.norms import Statistics, batch_of, make_adaptable, set_statistics

EVALUATION_BATCH = 512  # images whose statistics normalise at evaluation: part of the figure, so no setting for speed


def mended(inputs: Tensor) -> Tensor:
    """`inputs` with what is not finite as 0, laid out."""
    return laid_out(inputs.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))


def laid_out(inputs: Tensor) -> Tensor:
    """Images in the layout that convolutions are fastest in; anything else as it is."""
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs


class TTA(Strategy):
    """Base: plain training in learn experiences; `_adapt` in the others, in which only `_chosen` parameters train."""

    kinds = frozenset({Kind.LEARN, Kind.ADAPT})
    unshardable = "it adapts while it predicts, and sets whole normalisation layers"
    statistics: ClassVar[Statistics] = "batch"  # of batch normalisation while adapting
    share: float = 1.0  # of the batch in them
    changes_images: bool = False  # in `_adapt`, by what has no meaning for texts

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        self.norms = make_adaptable(self.model)
        self.adapting = False  # this and the next follow from the experiences met, which a resume replays
        self._entering = False
        self._schedule, self._warmup = self.schedule, self.warmup
        self._trained: list[bool] = []

    def _chosen(self) -> Iterable[nn.Parameter]:
        """Parameters that adapt, but for those that the user froze."""
        return ()

    def _adapt(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Predictions (B, C) for x (B, ...) before it changes anything, and the loss to step on, if any."""
        raise NotImplementedError

    def faults(self, experiences: Sequence[Experience], started: bool) -> list[str]:
        reads_tokens = getattr(getattr(self.model, "backbone", None), "reads_tokens", False)
        if not (self.changes_images and reads_tokens and any(e.kind is Kind.ADAPT for e in experiences)):
            return []
        return [
            f"strategy: {type(self).__name__} adapts by changed images, which texts have not (valid: tent, eata, sar)"
        ]

    # --- hooks --------------------------------------------------------------------------------------------------------

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        adapting = experience.kind is Kind.ADAPT
        self._entering = adapting and not self.adapting
        if self._entering:
            self._trained = [p.requires_grad for p in self.model.parameters()]
            chosen = {id(p) for p in self._chosen()}
            for p in self.model.parameters():
                p.requires_grad_(p.requires_grad and id(p) in chosen)
        elif self.adapting and not adapting:
            for p, trained in zip(self.model.parameters(), self._trained, strict=True):
                p.requires_grad_(trained)
        self.adapting = adapting
        self.schedule, self.warmup = ("constant", 0.0) if adapting else (self._schedule, self._warmup)
        set_statistics(self, self.statistics if adapting else None, self.share)
        by_batch = adapting and self.norms > 0 and self.statistics in ("batch", "blend")
        self.evaluation_batch = EVALUATION_BATCH if by_batch else None

    def begin(self, experience: Experience) -> None:
        if self.adapting:
            self.model.eval()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        with batch_of(shared=self.world_size > 1):
            return self.mean(F.cross_entropy(self.model(x), y, reduction="none"))

    def adapt_step(self, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = mended(inputs)
        if self._whole(x) == 0:
            with torch.no_grad():
                return self.model(x)
        with batch_of(shared=self.world_size > 1):
            predictions, loss = self._adapt(x)
        if loss is None or not self._finite(loss):
            return predictions.detach()
        return predictions.detach(), loss

    # --- the batch of all processes -----------------------------------------------------------------------------------

    def _whole(self, x: Tensor) -> int:
        """Images of the batch over all processes."""
        return len(x) if self.world_size == 1 else self.global_batch

    def _all(self, rows: Tensor) -> Tensor:
        """Those of the whole batch, of this process's rows (B, ...)."""
        return rows if self.world_size == 1 else gathered({"labels": rows.detach()})["labels"]

    def _own(self, rows: Tensor) -> Tensor:
        """This process's rows of those of the whole batch."""
        return rows.tensor_split(self.world_size)[self.rank]

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over processes."""
        if self.world_size > 1:
            values = values.clone()
            torch.distributed.all_reduce(values)
        return values

    def _finite(self, loss: Tensor) -> bool:
        """Whether it is so on all processes."""
        return not self._sum((~loss.detach().isfinite()).float())

    def _mean_of(self, losses: Tensor, chosen: Tensor) -> Tensor | None:
        """Mean of `losses` (B,) where `chosen` (B,) bool, over all processes; None where none is."""
        count = int(self._sum(chosen.sum()))
        return losses[chosen].sum() * (self.world_size / count) if count else None
