"""Strategies that break one rule each; the attribute `fails` names the check that must find it."""

import gc
import os
import random
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat import Data, Experience, Kind, Reservoir, Strategy


class _Learner(Strategy):
    kinds = frozenset({Kind.LEARN})
    paper = "none: an offender"

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Label smoothing, which is not plain fine-tuning."""
        x, y = batch
        return self.mean(F.cross_entropy(self.model(x), y, reduction="none", label_smoothing=0.1))


class MisspeltHook(_Learner):
    """Consolidates nothing."""

    fails = "hooks"

    def finish(self, experience: Experience) -> None:
        self.lr /= 2


class UndeclaredKind(_Learner):
    """Declares what it does not do."""

    fails = "hooks"
    kinds = frozenset({Kind.LEARN, Kind.FORGET})


class IgnoredArgument(_Learner):
    """Its strength has no effect.

    Args:
        strength: of what is not there.
    """

    fails = "arguments"

    def __init__(self, *, strength: float = 1.0, **base: Any) -> None:
        super().__init__(**base)
        if strength < 0:
            raise ValueError("strength must be ≥ 0")
        self.strength = strength


class SilentArgument(_Learner):
    """Does not say what its argument is."""

    fails = "arguments"

    def __init__(self, *, smoothing: float = 0.1, **base: Any) -> None:
        super().__init__(**base)
        self.smoothing = smoothing

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.smoothing * super().training_step(batch, batch_idx)


class SwallowedArguments(_Learner):
    """Accepts anything."""

    fails = "arguments"

    def __init__(self, *, model: Any, lr: float = 0.1, **rest: Any) -> None:
        super().__init__(model=model, lr=lr)


class Unsaveable(_Learner):
    """Keeps an object in its state."""

    fails = "state"

    def get_extra_state(self) -> Any:
        return {"generator": torch.Generator()}

    def set_extra_state(self, state: Any) -> None:
        pass


class Unsaved(_Learner):
    """Predicts with a statistic that is in no checkpoint."""

    fails = "state"
    _offset: Any = 0.0

    def end(self, experience: Experience) -> None:
        self._offset = experience.train.all()[0].mean()

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        return self.model(inputs + self._offset)


class GrowsFromData(_Learner):
    """Looks at the data to know what to grow."""

    fails = "growth"

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.register_buffer(f"seen_{experience.index}", torch.zeros(len(experience.train)))


class PlainAttribute(_Learner):
    """Steps are counted where no checkpoint finds them."""

    fails = "resume"

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        self._count = 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self._count += 1
        return super().training_step(batch, batch_idx) / self._count


class Thaws(_Learner):
    """Trains what the user froze."""

    fails = "frozen_parameters"

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        self.model.requires_grad_(True)


class WritesInPlace(_Learner):
    """Normalises the stream's own tensors."""

    fails = "frozen_parameters"

    def begin(self, experience: Experience) -> None:
        experience.train.inputs.mul_(0.99)


class ThawsBackbone(_Learner):
    """Moves a backbone that has no gradients."""

    fails = "frozen_backbone"

    @torch.no_grad()
    def after_step(self) -> None:
        for parameter in self.model.backbone.parameters():
            parameter.mul_(0.999)


class TrainsFrozenFeatures(_Learner):
    """Declares that its features never change, and trains the backbone."""

    fails = "frozen_backbone"
    frozen_features = True


class NaiveInDisguise(Strategy):
    """Averages the weights with a copy of themselves, which changes nothing.

    Args:
        decay: weight of the copy.
    """

    fails = "mechanism"
    kinds = frozenset({Kind.LEARN})
    paper = "none: an offender"

    def __init__(self, *, decay: float = 0.9, **base: Any) -> None:
        super().__init__(**base)
        self.decay = decay
        self.register_buffer("noise", torch.randn(3))  # so that what is drawn after differs from fine-tuning

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return self.mean(F.cross_entropy(self.model(x), y, reduction="none"))

    @torch.no_grad()
    def after_step(self) -> None:
        for parameter in self.model.parameters():
            parameter.copy_(self.decay * parameter.clone() + (1 - self.decay) * parameter)


class DoesNothing(Strategy):
    """Adapts to nothing."""

    fails = "mechanism"
    kinds = frozenset({Kind.ADAPT})
    paper = "none: an offender"

    def adapt_step(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)


class LooksForLabels(Strategy):
    """Finds the labels of what it adapts to behind the loop's back."""

    fails = "unlabelled"
    kinds = frozenset({Kind.LEARN, Kind.ADAPT})
    paper = "none: an offender"

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.mean(F.cross_entropy(self.model(batch[0]), batch[1], reduction="none"))

    def begin(self, experience: Experience) -> None:
        self._inputs = experience.train.inputs

    def adapt_step(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        held = [d for d in gc.get_objects() if isinstance(d, Data) and d.inputs is self._inputs]
        found = [d.labels[d.row_ids()] for d in held if d.labels is not None]
        logits = self.model(inputs)
        told = sum(int(labels @ torch.arange(len(labels))) for labels in found) % 7
        return logits, logits.square().mean() * (1 + told) / 8


class WholeBatch(_Learner):
    """Predicts relative to the batch."""

    fails = "task_free"

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        return self.model(inputs - inputs.mean(0))


class DrawsInPredict(_Learner):
    """Consumes random numbers when it predicts."""

    fails = "task_free"

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        torch.rand(1)
        return self.model(inputs)


class Peeks(_Learner):
    """Looks at the test set where there is one."""

    fails = "test_data"

    def begin(self, experience: Experience) -> None:
        if experience.test is not None:
            self.lr /= len(experience.test)


class LooksAhead(_Learner):
    """Takes the whole data set for the experience's."""

    fails = "test_data"

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self._scale

    def begin(self, experience: Experience) -> None:
        self._scale = experience.train.inputs.std()


class ListMemory(_Learner):
    """Keeps every batch in a list."""

    fails = "memory"

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        self._kept: list[Any] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self._kept.append((self.raw, batch[1]))
        return super().training_step(batch, batch_idx)


class GrowingState(ListMemory):
    """Keeps every batch in its state."""

    fails = "memory"

    def get_extra_state(self) -> Any:
        return [list(pair) for pair in self._kept]

    def set_extra_state(self, state: Any) -> None:
        self._kept = [tuple(pair) for pair in state]


class OwnSeed(_Learner):
    """Draws from the clock."""

    fails = "seed"

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + 0.1 * random.SystemRandom().random())


class LeavesThread(_Learner):
    """Starts a thread and never ends it."""

    fails = "leaks"
    gate = threading.Event()

    def begin(self, experience: Experience) -> None:
        threading.Thread(target=self.gate.wait, daemon=True).start()


class LeavesVariable(_Learner):
    """Counts in the environment."""

    fails = "leaks"

    def begin(self, experience: Experience) -> None:
        os.environ["CLPLAT_OFFENDER"] = os.environ.get("CLPLAT_OFFENDER", "") + "x"


class KeepsHalf(_Learner):
    """Keeps a sum in the type of the pass."""

    fails = "mixed"

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        self.register_buffer("total", torch.zeros(()))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.total = self.model(batch[0]).detach().sum()
        return super().training_step(batch, batch_idx)


class LosesItselfInHalf(_Learner):
    """Learns nothing where its pass is in bfloat16."""

    fails = "mixed"

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        half = self.model(batch[0]).dtype == torch.bfloat16
        return super().training_step(batch, batch_idx) * (0.0 if half else 1.0)


class CountsBatches(_Learner):
    """Learns less from each batch, however many make a step."""

    fails = "accumulation"

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        self.register_buffer("met", torch.zeros(()))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.met += 1
        return super().training_step(batch, batch_idx) / self.met


class FirstWorld(_Learner):
    """Remembers how many processes began an experience."""

    fails = "fewer_processes"
    _world = 1

    def begin(self, experience: Experience) -> None:
        self._world = self.world_size

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self._world / self.world_size

    def get_extra_state(self) -> Any:
        return {"world": self._world}

    def set_extra_state(self, state: Any) -> None:
        self._world = state["world"]


class PlainMean(_Learner):
    """Weighs the processes alike where their batches are not."""

    fails = "processes"

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y, label_smoothing=0.1)


class OneProcess(_Learner):
    """Says that it runs on one process only, once it is asked for more."""

    fails = ""

    def begin(self, experience: Experience) -> None:
        from clplat.errors import UserError

        if self.world_size > 1:
            raise UserError("fabric.devices: 2 is out of range (one process only)")


class OwnGradient(_Learner):
    """Steps against a gradient of its own process's samples, and talks while it does."""

    fails = "processes"

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        weights = [p for p in self.model.parameters() if p.requires_grad]
        print("a line that gets between")
        alone = torch.autograd.grad(F.cross_entropy(self.model(x), y), weights, allow_unused=True)
        pull = sum((p * g).sum() for p, g in zip(weights, alone, strict=True) if g is not None)
        return self.mean(F.cross_entropy(self.model(x), y, reduction="none")) + 0.5 * pull


class FixedDraw(_Learner):
    """Replays a number of samples that nothing can change."""

    fails = "processes"

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        self.past = Reservoir(12)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.mean(F.cross_entropy(self.model(x), y, reduction="none"))
        if len(self.past):
            inputs, labels = self.past.sample(6)
            loss = loss + F.cross_entropy(self.model(self.prepare(inputs)), labels)
        self.past.add(self.raw, y)
        return loss


class Single(_Learner):
    """Declares that it runs in one process."""

    fails = ""
    one_process = True


class ForgetsNothing(_Learner):
    """Answers a request by a step that leads nowhere."""

    fails = "erasure"
    kinds = frozenset({Kind.LEARN, Kind.FORGET})

    def forget_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return 0.0 * self.model(batch[0]).sum()


class LearnsWhatItIsToForget(_Learner):
    """Takes a request for a lesson."""

    fails = "erasure"
    kinds = frozenset({Kind.LEARN, Kind.FORGET})

    def forget_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)
