"""What strategies share that answer a request by batches of retained samples, each beside as many to erase.

learn:    loss = mean CE over the batch and samples replayed from a memory
request:  the batches run over the memory less what is erased; samples to erase come round beside them
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from clplat import Data, Experience, Frozen, Kind, Strategy, require
from clplat.backbones.base import Classifier
from clplat.components.memory import ClassBalanced
from clplat.components.stored import class_ids
from clplat.data.batches import rounds, some_of_each


class Paired(Strategy):
    """Plain training, and requests with an optimizer of their own. B samples of the memory and B to erase in a step.

    An epoch of a request runs over the memory's samples, and those to erase come round as often as that needs. A
    memory with nothing left gives epochs over the samples to erase.

    Args:
        memory: samples kept of all classes learned, in equal parts, ≥ the classes to be kept.
        shots: samples per class (in all where answers are free text) that a request uses, of the memory and of what it
            erases, drawn for each request anew; null takes all.
        missing: classes that leave no sample in the memory.
        replay_batch: samples of the memory, per process, added to each batch when learning, ≥ 0.
        forget_optimizer: of a request.
        forget_lr: learning rate of a request, > 0.
        forget_weight_decay: of a request, ≥ 0.
        forget_schedule: of a request's learning rate.
    """

    kinds = frozenset({Kind.LEARN, Kind.FORGET})
    searched = {"forget_lr": (1e-3, 0.1, "log")}
    model: Classifier
    replays = True
    data_access = "the samples to erase, and a memory of retained ones"
    compares: ClassVar[bool] = False  # a request with `before`, a frozen copy of the model as it was before it

    def __init__(
        self,
        *,
        memory: int = 500,
        shots: int | None = None,
        missing: list[int] = [],  # noqa: B006
        replay_batch: int = 0,
        forget_optimizer: Literal["sgd", "adam", "adamw"] = "adamw",
        forget_lr: float = 1e-2,
        forget_weight_decay: float = 0.05,
        forget_schedule: Literal["constant", "cosine"] = "cosine",
        **base,
    ):
        super().__init__(**base)
        require("shots", shots, shots is None or shots >= 1, "≥ 1, or null")
        require("replay_batch", replay_batch, replay_batch >= 0, "≥ 0")
        require("forget_lr", forget_lr, forget_lr > 0, "> 0")
        require("forget_weight_decay", forget_weight_decay, forget_weight_decay >= 0, "≥ 0")
        classes = self.model.num_classes
        valid = f"classes 0 to {classes - 1}" if classes else "[] where answers are free text"
        require("missing", missing, all(0 <= c < classes for c in missing), valid)
        kept = classes - len(set(missing))
        require("memory", memory, memory >= max(kept, 1), f"≥ {max(kept, 1)}, one for each class to be kept")
        self.memory, self.shots, self.missing, self.replay_batch = ClassBalanced(memory), shots, missing, replay_batch
        self.own = {
            Kind.LEARN: (self.optimizer_name, self.lr, self.weight_decay, self.schedule, self.warmup),
            Kind.FORGET: (forget_optimizer, forget_lr, forget_weight_decay, forget_schedule, 0.0),
        }
        self.seed = torch.initial_seed() % 2**31  # of the order in which samples to erase come, and of `shots`
        self.request = 0  # number of the last one, from 1
        self.epoch, self.drawn = -1, 0  # of this request: epochs begun, samples to erase drawn so far
        self._erased: Data | None = None  # what this request erases
        self.before: Frozen | None = None  # of the request under way, or the last one

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.optimizer_name, self.lr, self.weight_decay, self.schedule, self.warmup = self.own[experience.kind]
        self.request += experience.kind is Kind.FORGET
        if self.compares:
            self.before = Frozen(self.model) if experience.kind is Kind.FORGET else None

    def begin(self, experience: Experience) -> None:
        if experience.kind is Kind.FORGET:
            self.memory.erase(experience)
            self.epoch, self.drawn = -1, 0

    def training_data(self, experience: Experience) -> Data:
        """Of a request: what is retained, with what is to be erased beside it."""
        if experience.kind is Kind.LEARN:
            return super().training_data(experience)
        self._erased = self._few(super().training_data(experience))
        self._retains = len(self.memory) > 0
        return self._few(self.memory.data()) if self._retains else self._erased

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        if self.replay_batch and len(self.memory):
            mx, my, *_ = self.memory.sample(self.replay_batch)
            x, y = torch.cat([x, self.prepare(mx)]), torch.cat([y, my])
        return self.mean_loss(x, y)

    def end(self, experience: Experience) -> None:
        self._erased = None
        if experience.kind is Kind.LEARN:
            data = super().training_data(experience)
            missing = torch.tensor(self.missing, dtype=torch.int64, device=data.inputs.device)
            self.memory.fill(data.subset((~torch.isin(class_ids(data.targets()), missing)).nonzero()[:, 0]))
        elif self.before is not None:
            self.before.take(self.model)  # what it knew of what was erased goes

    def measurements(self) -> dict[str, float]:
        return {"retained_samples": float(len(self.memory))}

    def get_extra_state(self) -> dict[str, Any]:
        return {"seed": self.seed, "epoch": self.epoch, "drawn": self.drawn}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seed, self.epoch, self.drawn = state["seed"], state["epoch"], state["drawn"]

    # --- the batches of a request -----------------------------------------------------------------------------------

    def _pair(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> tuple[Tensor, Tensor, int]:
        """Inputs (2 B, ...) and labels (2 B,): those of the batch, retained, and the next to erase; then B."""
        self.epoch += batch_idx == 0
        x, y = batch  # (B, ...), (B,)
        if not self._retains:
            return x, y, 0
        fx, fy = self._next(self.global_batch)
        return torch.cat([x, self.prepare(fx)]), torch.cat([y, fy]), len(y)

    def _next(self, count: int) -> tuple[Tensor, Tensor]:
        """This process's part of the next `count` samples to erase, as stored: shuffled anew in each round."""
        assert self._erased is not None
        found = self._part(self._erased, self.drawn, count)
        self.drawn += count
        return found

    def _part(self, data: Data, drawn: int, count: int) -> tuple[Tensor, Tensor]:
        """This process's part of the `count` samples of `data` that come round after `drawn` ones, as stored."""
        positions = rounds(len(data), drawn, count, self._draw, data.inputs.device)
        raw, labels = data.batch(positions.tensor_split(self.world_size)[self.rank])
        assert labels is not None
        return raw, labels

    def _few(self, data: Data) -> Data:
        if self.shots is None:
            return data
        return data.subset(some_of_each(class_ids(data.targets()), self.shots, self._draw))

    @property
    def _draw(self) -> int:
        return self.seed * 1009 + self.request
