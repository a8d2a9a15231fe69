"""Heads: from features to logits, and how their rows grow with the classes met.

A class id is its position in the order of meeting, so a new class is a new last row. Each public class is one head,
under its lower-cased name.

Shapes: B samples of a batch, D features, C classes of the stream, S classes seen so far, T tasks, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.backbones import _weights
from clplat.backbones.base import Head, require
from clplat.errors import UserError
from clplat.stream import Experience

_LAST = (
    "linear",
    "fc",
    "head",
    "classifier",
    "head.fc",
    "last_linear",
)  # names that files give a classifier's last layer


def _rows(count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (count, D) and bias (count,) as nn.Linear starts them, with the device and type of `like` (·, D)."""
    layer = nn.Linear(like.shape[1], count, device=like.device, dtype=like.dtype)
    return layer.weight.detach(), layer.bias.detach()


def _append(old: nn.Parameter, new: Tensor) -> nn.Parameter:
    """`old` with rows added; the rows that were there keep their bits."""
    return nn.Parameter(torch.cat([old.detach(), new]), requires_grad=old.requires_grad)


def _last_layer(path: str) -> dict[str, Tensor]:
    """Weight and bias of the last layer in the .safetensors file that `path` names, by its usual names."""
    state = _weights.read(str(_weights.locate(path, "head.weights")), key="head.weights")
    found = [n for n in _LAST if f"{n}.weight" in state and f"{n}.bias" in state]
    if not found:
        raise UserError(f"head.weights: {path} has no last layer (valid: one named {', '.join(_LAST)})")
    return {part: state[f"{found[0]}.{part}"] for part in ("weight", "bias")}


def _seen(experience: Experience) -> int:
    """Rows that a head needs once `experience` has been met."""
    return max(experience.classes, default=-1) + 1


class Linear(Head):
    """One linear layer with a row for every class of the stream from the start.

    All rows compete, those of classes still to come, too: training holds them down until their classes are met. With
    `masked` and `growing` only classes met compete.

    Args:
        weights: "random"; or a .safetensors file of a whole classifier, whose last layer is taken, a folder with one as
            model.safetensors, or the name of such a repository on the hub.
    """

    def __init__(self, in_features: int, num_classes: int, weights: str = "random") -> None:
        super().__init__(in_features, num_classes)
        layer = nn.Linear(in_features, num_classes)
        self.weight, self.bias = layer.weight, layer.bias
        if weights != "random":
            _weights.fit(layer, _last_layer(weights), weights, spare=lambda name: False, key="head.weights")

    def forward(self, features: Tensor, task: int | None = None) -> Tensor:
        return F.linear(features, self.weight, self.bias)  # (B, C)


class Growing(Head):
    """One linear layer with a row for every class seen so far; new rows start as nn.Linear's do."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__(in_features, num_classes)
        self.weight = nn.Parameter(torch.empty(0, in_features))
        self.bias = nn.Parameter(torch.empty(0))

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        missing = _seen(experience) - len(self.weight)
        if missing > 0:
            weight, bias = _rows(missing, self.weight)
            self.weight, self.bias = _append(self.weight, weight), _append(self.bias, bias)

    def forward(self, features: Tensor, task: int | None = None) -> Tensor:
        return F.linear(features, self.weight, self.bias)  # (B, S)


class Masked(Linear):
    """A row for every class from the start; the logits of classes not seen so far are -inf, in training too.

    So no gradient reaches the rows of classes still to come. Losses that subtract logits (distillation by squared
    differences) or spread probability (label smoothing) are not finite with this head; `growing` serves those.
    """

    seen: Tensor

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__(in_features, num_classes)
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.seen[list(experience.classes)] = True

    def forward(self, features: Tensor, task: int | None = None) -> Tensor:
        return torch.where(self.seen, super().forward(features), -torch.inf)  # (B, C)


class Taskwise(Head):
    """Own rows for each task: logits (B, C) are finite for the classes of the sample's task and -inf elsewhere.

    For streams that tell the task at test time. In training a call without a task takes that of the last experience
    grown for; samples of several tasks (replayed ones, those of `joint`) have theirs given one by one, told by their
    classes (`tasks_of`). A task not met yet has no classes. Weight decay reaches the rows of all tasks.

    Raises:
        UserError: in evaluation no task is given.
    """

    rows: Tensor

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__(in_features, num_classes)
        self.weight = nn.Parameter(torch.empty(0, in_features))  # (R, D), in the order met
        self.bias = nn.Parameter(torch.empty(0))
        # (T, C) row of each class of each task; -1: none.
        self.register_buffer("rows", torch.empty(0, num_classes, dtype=torch.int64))
        self.current = -1

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.current = experience.task
        absent = self.rows.new_full((max(experience.task + 1 - len(self.rows), 0), self.num_classes), -1)
        self.rows = torch.cat([self.rows, absent])
        own = self.rows[experience.task]
        new = [c for c in experience.classes if own[c] < 0]
        if new:
            own[new] = torch.arange(len(self.weight), len(self.weight) + len(new), device=own.device)
            weight, bias = _rows(len(new), self.weight)
            self.weight, self.bias = _append(self.weight, weight), _append(self.bias, bias)

    def tasks_of(self, labels: Tensor) -> Tensor:
        """The task (B,) of each sample with labels (B,): the current one if it has its class, else one that has."""
        owner = self.rows.new_full((self.num_classes,), self.current)
        for task in sorted(self.classes_of, key=lambda t: t == self.current):
            owner[list(self.classes_of[task])] = task
        return owner[labels]

    def forward(self, features: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Logits (B, C) for features (B, D); `task` of all, or (B,) of each."""
        if task is None:
            if not self.training:
                raise UserError("head: taskwise needs the task of each test sample, which this stream does not tell")
            task = self.current
        if isinstance(task, Tensor):
            logits = F.pad(F.linear(features, self.weight, self.bias), (0, 1), value=-torch.inf)
            own = self.rows[task]  # (B, C)
            return logits.gather(1, own.where(own >= 0, logits.shape[1] - 1))
        if not 0 <= task < len(self.rows):
            return features.new_full((len(features), self.num_classes), -torch.inf)
        logits = F.linear(features, self.weight, self.bias)  # (B, R)
        # One more column, of -inf, is what row -1 points at. All rows take part, so that every parameter has a
        # gradient in every step, as DDP expects.
        return F.pad(logits, (0, 1), value=-torch.inf)[:, self.rows[task]]  # (B, C)


class Cosine(Head):
    """Cosine of features and class weights times a learnable scale, with a row for every class seen so far.

    Logits lie in [-scale, scale], which keeps new classes from outgrowing old ones.

    Source: Hou et al., "Learning a Unified Classifier Incrementally via Rebalancing", CVPR 2019, equation 3.

    Args:
        scale: η at the start, > 0 (the authors' code starts at 1).
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 10.0) -> None:
        super().__init__(in_features, num_classes)
        require("scale", scale, scale > 0, "> 0", group="head")
        self.weight = nn.Parameter(torch.empty(0, in_features))
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        missing = _seen(experience) - len(self.weight)
        if missing > 0:
            self.weight = _append(self.weight, _rows(missing, self.weight)[0])

    def forward(self, features: Tensor, task: int | None = None) -> Tensor:
        return self.scale * F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))  # (B, S)


class NCM(Growing):
    """Nearest class mean: trained as a growing linear layer, but predicts the class whose mean feature is nearest.

    After each learn experience the loop makes the means of the classes in its training data anew (for `joint`, of all
    seen); others stay as they were. A class without a mean has logit -inf.

    Source: Mensink et al., "Distance-based image classification", TPAMI 2013, equation 5; in continual learning:
    Rebuffi et al., "iCaRL", CVPR 2017, equation 2 (there over exemplars, renewed after each experience).
    """

    means: Tensor
    counts: Tensor

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__(in_features, num_classes)
        self.register_buffer("means", torch.empty(0, in_features))  # (S, D)
        self.register_buffer("counts", torch.empty(0, dtype=torch.int64))  # (S,) samples that each mean is over

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        missing = _seen(experience) - len(self.means)
        if missing > 0:
            self.means = torch.cat([self.means, self.means.new_zeros(missing, self.in_features)])
            self.counts = torch.cat([self.counts, self.counts.new_zeros(missing)])

    def renew(self, classes: Tensor) -> None:
        """Forget the means of `classes` (k,): the next `update` makes them anew."""
        self.counts[classes] = 0

    def let_go(self, classes: Sequence[int]) -> None:
        """Erase the means of `classes`: statistics of samples that a request erases. They are predicted no more."""
        self.means[list(classes)] = 0.0
        self.counts[list(classes)] = 0

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Take features (B, D) of samples with labels (B,), all below S, into the means."""
        sums = torch.zeros_like(self.means).index_add_(0, labels, features.to(self.means.dtype))
        added = torch.bincount(labels, minlength=len(self.counts))
        self.counts += added
        # mean ← mean + (sum − added · mean) / count, which stays near the mean however many samples there are.
        change = sums - added.unsqueeze(1) * self.means
        self.means += change / self.counts.clamp(min=1).unsqueeze(1)

    def predict(self, features: Tensor, task: int | None = None) -> Tensor:
        # By differences: |f|² − 2 f·m + |m|² loses all digits where the means lie close together.
        features = features.to(self.means.dtype)
        distances = torch.cdist(features, self.means, compute_mode="donot_use_mm_for_euclid_dist")  # (B, S)
        return distances.square().neg().masked_fill(self.counts == 0, -torch.inf)
