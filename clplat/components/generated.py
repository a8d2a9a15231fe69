"""Networks whose weights another network generates: the target, and its generator with one embedding per task.

The target owns none of what is generated: a vector ω is cut into its parameters in each call
(`torch.func.functional_call`), nothing is copied into modules. Parameters that the user froze stay as they are.

Source   von Oswald et al., "Continual learning with hypernetworks", ICLR 2020, arXiv:1906.00695, sections 2 and 3.
Checked  against chrhenning/hypercl (Apache-2.0), by its defaults and the sizes that follow from them.

Shapes: T tasks, m of them in one call, B samples, C classes, D features, n generated numbers (|ω|).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from clplat.backbones._weights import origin
from clplat.backbones.base import Classifier, Head, Role
from clplat.components.hypernetwork import Generator
from clplat.errors import UserError
from clplat.stream import Experience, Kind


@dataclass(frozen=True)
class _Slice:
    """One generated tensor: its place in ω, and the parameters that take it (several where weights are tied).

    Args:
        rows: classes, if it has one row for each (a head's weight or bias), otherwise 0.
        base: name of the frozen weight that this tensor, times the next one, is added to (an adapter's factor).
        dtype: of the parameters; ω itself is in single precision.
    """

    names: tuple[str, ...]
    shape: torch.Size
    offset: int
    rows: int = 0
    base: str = ""
    dtype: torch.dtype = torch.float32

    @property
    def end(self) -> int:
        """The offset of what comes after it."""
        return self.offset + self.shape.numel()


class Target(nn.Module):
    """A classifier whose weights are an argument of each call.

    With `rank` 0 all its trainable parameters are generated; one that starts constant (1 for the gain of a
    normalisation) as the difference from that constant. With a rank r > 0 the backbone is frozen as it is, and what is
    generated is the head, where the model has one, and for each linear layer of `role` two factors b (out, r) and
    a (r, in), which make its weight W + b a: as differences from where they start, the head as it is, b = 0 and
    a ~ U(±1/√in) as LoRA has them, so that ω = 0 is the model that was given.

    Args:
        model: gets all rows of its head now, and loses the parameters that are generated.
        rank: of the adapters, ≥ 0.
        role: of the layers that get adapters.

    Raises:
        UserError: the backbone has no layers of that role, the head has nothing to generate, or with rank 0 weights
            were read that would not be used.
    """

    start: Tensor

    def __init__(self, model: Classifier, rank: int = 0, role: Role = "attention") -> None:
        super().__init__()
        self.rank, self.classes = rank, model.num_classes
        model.grow(Experience(0, "all classes", Kind.LEARN, None, classes=tuple(range(self.classes))))
        self.model = model
        adapted = self._freeze(rank, role) if rank else {}
        head = {id(p) for p in model.head.parameters()}
        names: dict[int, list[str]] = {}
        found: dict[int, nn.Parameter] = {}
        for name, p in self.named_parameters(remove_duplicate=False):
            if p.requires_grad:
                names.setdefault(id(p), []).append(name)
                found[id(p)] = p
        self.slices: list[_Slice] = []
        starts: list[Tensor] = []  # of each slice: one number, or all of them
        for key, p in found.items():
            rows = self.classes if key in head and p.ndim and len(p) == self.classes else 0
            self._append(tuple(names[key]), p.shape, rows, dtype=p.dtype)
            starts.append(p.detach().float().flatten() if rank else _constant(p))
        for name, layer in adapted.items():
            weight = layer.weight
            a = nn.init.kaiming_uniform_(torch.empty(rank, weight.shape[1]), a=math.sqrt(5))
            self._append((name,), torch.Size((weight.shape[0], rank)), base=name, dtype=weight.dtype)
            self._append((name,), a.shape, base=name, dtype=weight.dtype)
            starts += [torch.zeros(1), a.flatten()]
        self._check(model, list(found.values()))
        self.register_buffer("start", torch.cat(starts))
        self._starts = [len(s) for s in starts]
        self._moved = [bool(rank) or bool(s.any()) for s in starts]  # which tensors have something to be added to
        for owned in names.values():
            for name in owned:
                path, _, leaf = name.rpartition(".")
                self.get_submodule(path).register_parameter(leaf, None)

    def _freeze(self, rank: int, role: Role) -> dict[str, nn.Linear]:
        layers = self.model.backbone.layers(role)
        if not layers:
            offered = self.model.backbone.offered()
            raise UserError(f"strategy.role: the backbone has no {role!r} layers for adapters of rank {rank}{offered}")
        self.model.backbone.requires_grad_(False)
        return {f"model.backbone.{name}.weight": layer for name, layer in layers.items()}

    def _append(
        self, names: tuple[str, ...], shape: torch.Size, rows: int = 0, *, base: str = "", dtype: torch.dtype
    ) -> None:
        self.slices.append(_Slice(names, shape, self.size, rows, base, dtype))

    def _check(self, model: Classifier, generated: list[nn.Parameter]) -> None:
        head = {id(p) for p in model.head.parameters()}
        trained = any(id(p) in head for p in generated) and not hasattr(model.head, "renew")
        if isinstance(model.head, Head) and not trained:
            raise UserError("head: a generated one has to predict by trained weights (valid: growing, linear)")
        if not self.slices:
            raise UserError("strategy.rank: 0 finds no trainable weight to generate (valid: ≥ 1)")
        lost = next((read for p in generated if (read := origin(p)) is not None), None)
        if not self.rank and lost is not None:
            key, source = lost
            raise UserError(
                f"strategy.rank: 0 generates every weight, and would not use those of {key}: {source} (valid: ≥ 1, "
                f"which freezes the backbone as it is; or no {key})"
            )

    @property
    def size(self) -> int:
        """|ω|, the numbers that are generated."""
        return self.slices[-1].end if self.slices else 0

    def weights(self, omega: Tensor) -> dict[str, Tensor]:
        """Parameters by name, cut from ω (n,) in order."""
        parts = omega.split([s.shape.numel() for s in self.slices])
        places = zip(parts, self.start.split(self._starts), self._moved, self.slices, strict=True)
        tensors = [(part + start if moved else part).view(s.shape) for part, start, moved, s in places]
        found: dict[str, Tensor] = {}
        for i, s in enumerate(self.slices):
            if not s.base:
                found |= dict.fromkeys(s.names, tensors[i].to(s.dtype))
            elif s.base not in found:  # the first of the two factors
                found[s.base] = (self.get_parameter(s.base) + tensors[i] @ tensors[i + 1]).to(s.dtype)
        return found

    def own_rows(self, classes: Tensor) -> Tensor:
        """(T, n): 0 for the head's rows of classes that a task with `classes` (T, C) bool does not have, else 1."""
        mask = torch.ones(len(classes), self.size, device=classes.device)
        for s in self.slices:
            if s.rows:
                mask[:, s.offset : s.end] = classes.repeat_interleave(s.shape.numel() // s.rows, 1).float()
        return mask

    def call(self, method: str, omega: Tensor, buffers: dict[str, Tensor], *args: object) -> Tensor:
        """A method of the model with the weights ω (n,); `buffers` by name are read, and written in training."""
        with torch.autocast(omega.device.type, enabled=False):  # small changes of large weights
            weights = self.weights(omega)
        return functional_call(self, weights | buffers, (method, *args), tie_weights=False)

    def forward(self, method: str, *args: object) -> Tensor:
        return getattr(self.model, method)(*args)


def _constant(parameter: nn.Parameter) -> Tensor:
    """(1,): the value of a parameter that starts constant; 0 for any other."""
    values = parameter.detach().float().flatten()
    return values[:1] if len(values) and bool((values == values[0]).all()) else torch.zeros(1)


class GeneratedClassifier(nn.Module):
    """A target, the generator of its weights, and one embedding for each task met.

    Logits of classes that the task of the call does not have are -inf. What the target keeps in buffers (the running
    statistics of batch normalisation) is not generated: each task has its own.

    Args:
        target: owns no generated weight.
        generator: of `target.size` numbers.
        embedding: E ≥ 1, numbers of a task's embedding, drawn from N(0, 1).
    """

    classes: Tensor

    def __init__(self, target: Target, generator: Generator, embedding: int) -> None:
        super().__init__()
        self.target, self.generator, self.embedding = target, generator, embedding
        self.codes = nn.ParameterList()  # (E,) of each task
        self.statistics = nn.ModuleList()
        self.register_buffer("classes", torch.zeros(0, target.classes, dtype=torch.bool))
        # All three follow from the experiences met, which a resume replays.
        self.slots: dict[int, int] = {}  # task id → its place among the codes
        self.levels: list[int] = []  # the generator's level that each task is made at
        self.current = -1

    def grow(self, experience: Experience) -> None:
        """Make the task of `experience` the one that learns; a new one gets an embedding."""
        model = self.target.model
        if isinstance(model.head, Head):
            Head.grow(model.head, experience)  # refuses classes out of range; all rows are there
        else:
            model.grow(experience)
        if experience.task not in self.slots:
            self.slots[experience.task] = len(self.codes)
            self.codes.append(torch.randn(self.embedding))
            self.levels.append(self.generator.level)
            self.statistics.append(_Buffers(self.target))
            self.classes = torch.cat([self.classes, self.classes.new_zeros(1, self.target.classes)])
        self.current = self.slots[experience.task]
        self.classes[self.current, list(experience.classes)] = True
        for slot, code in enumerate(self.codes):
            code.requires_grad_(slot == self.current)

    @property
    def compression(self) -> float:
        """Numbers of the generator and of all embeddings, over those of one target; below 1 is a saving."""
        kept = sum(p.numel() for p in self.generator.parameters()) + sum(c.numel() for c in self.codes)
        return kept / self.target.size

    def tasks(self, slots: Sequence[int]) -> tuple[Tensor, int]:
        """Embeddings (m, E) of these tasks, all of one level, and that level."""
        return torch.stack([self.codes[s] for s in slots]), self.levels[slots[0]]

    def omega(self, slot: int) -> Tensor:
        """Generated weights of one task, (n,), in single precision under autocast, too."""
        code = self.codes[slot][None]
        with torch.autocast(code.device.type, enabled=False):
            return self.generator(code, self.levels[slot])[0]

    @property
    def writes(self) -> bool:
        """Whether the target predicts by text, not by scores of classes."""
        return getattr(self.target.model, "writes", False)

    def forward(self, inputs: Tensor, task: int | None = None) -> Tensor:
        """Logits (B, C) by the weights of `task`, or of the one that learns; all -inf for a task not met."""
        slot = self.current if task is None else self.slots.get(task, -1)
        return self.of_slot(inputs, slot)

    def of_slot(self, inputs: Tensor, slot: int) -> Tensor:
        """As `forward`, by the task's place among those met; -1 stands for one not met. Text (B, tokens) of a target
        that writes, empty for such a task."""
        if slot >= 0 and self.writes:
            return self.target.call("predict", self.omega(slot), self._of_task(slot), inputs)
        if slot >= 0:
            return self.logits(self.omega(slot), inputs, slot)
        shape = (len(inputs), 1 if self.writes else self.target.classes)
        return torch.full(shape, -1 if self.writes else -torch.inf, device=inputs.device)

    def losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Loss (B,) of each sample by the weights of the task that learns, as the target defines it."""
        return self.losses_by(self.omega(self.current), inputs, labels, self.current)

    def losses_by(self, omega: Tensor, inputs: Tensor, labels: Tensor, slot: int) -> Tensor:
        """Loss (B,) of each sample by the weights ω (n,), with the classes and statistics of a task."""
        if hasattr(self.target.model, "losses"):
            return self.target.call("losses", omega, self._of_task(slot), inputs, labels)
        return F.cross_entropy(self.logits(omega, inputs, slot), labels, reduction="none")

    def first_token(self, inputs: Tensor, slot: int) -> Tensor:
        """Logits (B, V) of the token that a target which writes begins its answer with, by a task's weights."""
        return self.target.call("first_token", self.omega(slot), self._of_task(slot), inputs)

    def logits(self, omega: Tensor, inputs: Tensor, slot: int) -> Tensor:
        """(B, C) by the weights ω (n,), with the classes and statistics of a task."""
        found = self.target.call("forward", omega, self._of_task(slot), inputs, 0)
        return found.masked_fill(~self.classes[slot], -torch.inf)

    def features(self, inputs: Tensor) -> Tensor:
        """Features (B, D) by the weights of the task that learns."""
        return self.target.call("features", self.omega(self.current), self._of_task(self.current), inputs)

    @torch.no_grad()
    def average_statistics(self, world_size: int) -> None:
        """Processes see other batches, and so keep other statistics of the task that learns: take the mean."""
        for value in self.statistics[self.current].buffers() if world_size > 1 else ():
            if value.is_floating_point():
                torch.distributed.all_reduce(value)
                value /= world_size

    def _of_task(self, slot: int) -> dict[str, Tensor]:
        held = self.statistics[slot]
        assert isinstance(held, _Buffers)
        return held.named()


class _Buffers(nn.Module):
    """A task's own copy of a target's buffers."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        for name, value in target.model.named_buffers(prefix="model"):
            self.register_buffer(name.replace(".", "/"), value.clone())  # a module's attribute name may not hold a dot

    def named(self) -> dict[str, Tensor]:
        return {name.replace("/", "."): value for name, value in self.named_buffers()}
