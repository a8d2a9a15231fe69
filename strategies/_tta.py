"""What test-time adaptation strategies share: how a trained model becomes one that adapts, and back.

A learn experience trains the source model as usual. The first adapt experience after it (or after the start, for
weights from elsewhere) takes that model as the source; all further ones go on from where the last one ended, with the
same optimizer state, as if there were no boundary. Dropout and the like are off while adapting.

Robustness: pixels that are not finite are taken as 0; a batch whose loss is not finite changes nothing; an empty batch
is answered with no rows. Several processes: batch statistics, selections and gates are those of the whole batch.
Shapes: B images of a batch (of this process), C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat import Experience, Kind, Strategy, require
from clplat.components.ema import Frozen
from clplat.components.per_parameter import PerParameter, trainable
from clplat.errors import UserError
from clplat.strategies._norms import Statistics, batch_of, make_adaptable, norm_affine, set_statistics


def entropy(logits: Tensor) -> Tensor:
    """H(softmax(z)) of each row (B,), in nats; classes masked by -inf count as impossible."""
    return cross_entropy(logits, logits)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """−Σ_k softmax(t)_k log softmax(z)_k of each row (B,), both logits (B, C)."""
    log = logits.log_softmax(1)
    return -(target.softmax(1) * log.masked_fill(log.isneginf(), 0.0)).sum(1)


def mended(inputs: Tensor) -> Tensor:
    """`inputs` with what is not finite as 0, laid out."""
    return laid_out(inputs.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))


def laid_out(inputs: Tensor) -> Tensor:
    """Images in the layout that convolutions are fastest in; anything else as it is."""
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs


@torch.no_grad()
def copy_into(target: nn.Module, source: nn.Module) -> None:
    """Give `target`, of the same structure, the parameters and buffers of `source`."""
    for part in (nn.Module.parameters, nn.Module.buffers):
        for mine, theirs in zip(part(target), part(source), strict=True):
            mine.copy_(theirs)


class TTA(Strategy):
    """Base: plain training in learn experiences; `_adapt` in the others, in which only `_chosen` parameters train."""

    kinds = frozenset({Kind.LEARN, Kind.ADAPT})
    statistics: ClassVar[Statistics] = "batch"  # of batch normalisation while adapting
    share: float = 1.0  # of the batch in them

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


class Stepping(TTA):
    """Base of those that take gradient steps while adapting.

    Args:
        adapt_optimizer: for adapting; `optimizer`, `lr` and so on are for learning.
        adapt_lr: ≥ 0.
        adapt_momentum: of sgd, in [0, 1).
        nesterov: whether that momentum is Nesterov's.
        reset: when to go back to the source model and empty the optimizer: never, before each experience (which tells
            the method where a domain begins), or before each batch.
    """

    def __init__(
        self,
        *,
        adapt_optimizer: Literal["sgd", "adam"] = "adam",
        adapt_lr: float = 0.001,
        adapt_momentum: float = 0.9,
        nesterov: bool = False,
        reset: Literal["never", "experience", "batch"] = "never",
        **base: Any,
    ) -> None:
        super().__init__(**base)
        require("adapt_optimizer", adapt_optimizer, adapt_optimizer in ("sgd", "adam"), "sgd or adam")
        require("adapt_lr", adapt_lr, adapt_lr >= 0, "≥ 0")
        require("adapt_momentum", adapt_momentum, 0 <= adapt_momentum < 1, "in [0, 1)")
        require("nesterov", nesterov, not nesterov or adapt_momentum > 0, "false without adapt_momentum")
        require("reset", reset, reset in ("never", "experience", "batch"), "never, experience or batch")
        self.adapt_optimizer, self.adapt_lr, self.adapt_momentum = adapt_optimizer, adapt_lr, adapt_momentum
        self.nesterov, self.reset_at = nesterov, reset
        self.kept: dict[str, Any] = self._start()  # tensors and plain values that go on from batch to batch
        self._moments: dict[str, Any] | None = None  # the optimizer's state between two adapt experiences
        self._stepper: torch.optim.Optimizer | None = None

    def _start(self) -> dict[str, Any]:
        """`kept` before the first batch."""
        return {}

    def _take_source(self) -> None:
        """The model as it is now becomes the source."""
        raise NotImplementedError

    def _restore_source(self) -> None:
        """The model becomes the source again."""
        raise NotImplementedError

    def _reset(self) -> None:
        """Back to the source model, as if no batch had been seen."""
        self._restore_source()
        self.kept, self._moments = self._start(), None
        if self._stepper is not None:
            self._stepper.state.clear()

    def begin(self, experience: Experience) -> None:
        super().begin(experience)
        if self._entering:
            self._take_source()
            self.kept, self._moments = self._start(), None
        elif self.adapting and self.reset_at == "experience":
            self._reset()

    def adapt_step(self, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.reset_at == "batch":
            self._reset()
        return super().adapt_step(inputs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if not self.adapting:
            return super().configure_optimizers()
        chosen = [p for p in self.model.parameters() if p.requires_grad]
        if self.adapt_optimizer == "adam":
            stepper: torch.optim.Optimizer = torch.optim.Adam(chosen, lr=self.adapt_lr)
        else:
            momentum, nesterov = self.adapt_momentum, self.nesterov
            stepper = torch.optim.SGD(chosen, lr=self.adapt_lr, momentum=momentum, nesterov=nesterov)
        if self._moments is not None:
            stepper.load_state_dict(self._moments)
        self._stepper = stepper
        return stepper

    def end(self, experience: Experience) -> None:
        if self.adapting and self._stepper is not None:
            self._moments = self._stepper.state_dict()
        super().end(experience)

    def get_extra_state(self) -> dict[str, Any]:
        return {"kept": self.kept, "moments": self._moments}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.kept, self._moments = dict(state["kept"]), state["moments"]


class Taught(Stepping):
    """Base of those in which a slow copy of the model, the teacher, predicts, in evaluation as well.

    A subclass makes `teacher`, and moves it after each step. Its augmentations are for images in [0, 1].
    """

    source: Frozen  # the model before the first batch
    teacher: Frozen
    seed: Tensor

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        self.source = Frozen(self.model)
        self._met = False  # an input
        self.register_buffer("seed", torch.randint(2**31, ()))  # equal on all processes, which were seeded alike

    def _take_source(self) -> None:
        copy_into(self.source.model, self.model)
        copy_into(self.teacher.model, self.model)

    def _restore_source(self) -> None:
        copy_into(self.model, self.source.model)
        copy_into(self.teacher.model, self.source.model)

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        if self.adapting:
            self.source.grow(self.model)
            self.teacher.grow(self.model)

    def adapt_step(self, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not self._met and inputs.numel():
            self._met = True  # once: looking makes a GPU wait
            low, high = (float(end) for end in mended(inputs).aminmax())
            if self.rank == 0 and (low < -1e-3 or high > 1 + 1e-3):
                warnings.warn(
                    f"{type(self).__name__}: inputs reach from {low:.3g} to {high:.3g}, and augmentations cut off what "
                    "is outside [0, 1]: normalise in the model (backbone.normalize), not in the stream",
                    stacklevel=2,
                )
        return super().adapt_step(inputs)

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        if not self.adapting:
            return super().predict(inputs, task)
        model: Any = self.teacher.model
        return getattr(model, "predict", model)(inputs, task)


def refuse_without_norms(strategy: Strategy) -> None:
    """UserError where there is nothing for `strategy` to adapt."""
    if not norm_affine(strategy.model):
        raise UserError(f"strategy: {type(strategy).__name__} adapts normalisation layers, which this backbone has not")


class NormStepping(Stepping):
    """Base of those that adapt the gains and offsets of normalisation layers only, whose source values they keep."""

    source: PerParameter

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        refuse_without_norms(self)
        self.source = PerParameter(nn.Module())

    def _chosen(self) -> Iterable[nn.Parameter]:
        return norm_affine(self.model)

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        if self.adapting:
            self.source.grow(self.model)

    def _pairs(self) -> list[tuple[nn.Parameter, Tensor]]:
        """What adapts, and its value in the source model."""
        mine = trainable(self.model)
        return list(zip(mine.values(), self.source.of(mine), strict=True))

    @torch.no_grad()
    def _take_source(self) -> None:
        for mine, source in self._pairs():
            source.copy_(mine)

    @torch.no_grad()
    def _restore_source(self) -> None:
        for mine, source in self._pairs():
            mine.copy_(source)
