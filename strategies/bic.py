"""BiC: replay and distillation, after which two numbers, fitted on held-out samples, take the bias from new classes.

Source   Wu et al., "Large Scale Incremental Learning", CVPR 2019, arXiv:1905.13260, equations 1 to 5.
Checked  by reading wuyuebupt/LargeScaleIncrementalLearning resnet.py (7f687a3) and aimagelab/mammoth models/bic.py
         (e75a491, MIT).
    loss = λ · mean KL( softmax(q_old/T) ‖ softmax(f/T) ) over old classes + (1 − λ) · CE(f(x; θ), y),   λ = O / (O + N)
    over new samples and exemplars, less a held-out part of both, balanced;  q_old: the model before, corrected as then
    on the held-out part:   α, β = argmin CE(q, y) + ridge/2 · ((α − 1)² + β²),   q_k = α f_k + β for the new classes k
Differs  α and β are found exactly (the problem is convex); the codes take epochs of gradient descent, with a ridge on
         β alone, so that α may have no minimum. Exemplars are drawn at random. A class that comes again is new.
         Mammoth's λ is 1 / tasks, which falls where the paper's rises; Avalanche 0.6.0 takes the softmax of the
         teacher over the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat import Data, Experience, Kind, Strategy, require
from clplat.components.ema import Frozen
from clplat.components.memory import ClassBalanced
from clplat.components.stored import CHUNK
from clplat.errors import UserError
from clplat.strategies.lwf import distillation
from clplat.strategies.ranpac import GOLDEN
from clplat.strategy import evaluating


def corrected(logits: Tensor, bias: Tensor, new: list[int]) -> Tensor:
    """Logits (B, C) with α z + β for the classes `new`; bias = (α, β)."""
    out = logits.clone()
    out[:, new] = (bias[0] * logits[:, new] + bias[1]).to(logits.dtype)
    return out


def fitted(logits: Tensor, labels: Tensor, new: list[int], ridge: float) -> Tensor:
    """(α, β), float64, that minimise the mean cross-entropy of logits (n, C), labels (n,), and the ridge."""
    z = logits.detach().double()  # (n, C)
    start = z.new_tensor([1.0, 0.0])
    bias = start.clone().requires_grad_()
    solver = torch.optim.LBFGS([bias], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(corrected(z, bias, new), labels) + ridge / 2 * (bias - start).square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    return bias.detach()


def apart(labels: Tensor, rows: Tensor, count: int) -> Tensor:
    """Which samples are held out, (n,) bool: `count` of each class, at most half of it, told by their rows."""
    order, chosen = (rows.long() * GOLDEN) % 2**32, torch.zeros_like(labels, dtype=torch.bool)
    for c in labels.unique().tolist():
        places = (labels == c).nonzero()[:, 0]
        chosen[places[order[places].argsort()[: min(count, len(places) // 2)]]] = True
    return chosen


class BiC(Strategy):
    """Bias correction. B samples of a batch, C classes, O old and N new ones.

    Args:
        memory: samples kept in all, the same number of each class (as stored: before augmentation), held-out ones
            among them.
        held_out: share of the memory that is not trained on, in (0, 1); each part has room for one sample a class.
        temperature: T > 0.
        ridge: > 0, holds α near 1 and β near 0.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:1905.13260"
    unshardable = ""
    searched = {"held_out": (0.05, 0.3), "temperature": (1.0, 5.0)}
    needs_classes = True
    replays = True
    bias: Tensor
    taught: Tensor

    def __init__(
        self, *, memory: int = 500, held_out: float = 0.1, temperature: float = 2.0, ridge: float = 0.1, **base
    ):
        super().__init__(**base)
        require("held_out", held_out, 0 < held_out < 1, "in (0, 1)")
        require("temperature", temperature, temperature > 0, "> 0")
        require("ridge", ridge, ridge > 0, "> 0")
        if hasattr(getattr(self.model, "head", None), "tasks_of"):
            raise UserError("head: taskwise keeps old and new classes apart: bic has no bias to correct")
        aside = max(1, round(memory * held_out))
        self.memory, self.held = ClassBalanced(memory - aside), ClassBalanced(aside)
        self.temperature, self.ridge = temperature, ridge
        self.register_buffer("bias", torch.tensor([1.0, 0.0], dtype=torch.float64))  # α, β of the last classes
        self.register_buffer("taught", torch.tensor([1.0, 0.0], dtype=torch.float64))  # of the teacher's
        self.teacher: Frozen | None = None
        self._old: list[int] = []  # these follow from the experiences met, which a resume replays
        self._new: list[int] = []
        self._before: list[int] = []

    def grow(self, experience: Experience) -> None:
        met = {*self._old, *self._new}
        if met:
            self.teacher = Frozen(self.model)
        self._before, self._new = self._new, sorted(experience.classes)
        self._old = sorted(met - {*self._new})
        super().grow(experience)

    def begin(self, experience: Experience) -> None:
        self.taught.copy_(self.bias)
        self.bias.copy_(self.bias.new_tensor([1.0, 0.0]))
        self.held.fill(self._parts(experience)[1])

    def training_data(self, experience: Experience) -> Data:
        return self.memory.joined(self._parts(experience)[0])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        logits = self.model(x)  # (B, C)
        losses = F.cross_entropy(logits, y, reduction="none")
        if self.teacher is not None and self._old:
            share = len(self._old) / (len(self._old) + len(self._new))  # λ
            target = corrected(self.teacher(x), self.taught, self._before)[:, self._old]
            losses = (1 - share) * losses + share * distillation(logits[:, self._old], target, self.temperature)
        return self.mean(losses)

    @torch.no_grad()
    def end(self, experience: Experience) -> None:
        """Fit the two numbers. Every process does it whole, so that all agree."""
        self.memory.fill(self._parts(experience)[0])
        if not self._old or not len(self.held):
            return
        inputs, labels, _ = self.held.everything()
        with evaluating(self):
            logits = [super(BiC, self).predict(self.prepare(part)) for part in inputs.split(CHUNK)]
        # A class that can't be predicted has a logit of −∞, whose product with a gradient of 0 would be none.
        self.bias.copy_(fitted(torch.cat(logits).clamp(min=-1e4), labels, self._new, self.ridge))

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        return corrected(super().predict(inputs, task), self.bias, self._new)

    def _parts(self, experience: Experience) -> tuple[Data, Data]:
        """What of an experience is trained on, and what is held out."""
        assert experience.train is not None
        data, count = experience.train, self.held.size // len({*self._old, *self._new})
        mask = apart(data.targets(), data.row_ids(), count)
        return data.subset((~mask).nonzero()[:, 0]), data.subset(mask.nonzero()[:, 0])
