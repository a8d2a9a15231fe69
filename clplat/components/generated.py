"""Networks whose weights another network generates: the target, and its generator with one embedding per task.

The target owns none of what is generated: a vector ω is cut into its parameters in each call
(`torch.func.functional_call`), nothing is copied into modules. Parameters that the user froze stay as they are.

Source   von Oswald et al., "Continual learning with hypernetworks", ICLR 2020, arXiv:1906.00695, sections 2 and 3.
Checked  against chrhenning/hypercl (Apache-2.0), by its defaults and the sizes that follow from them.

Shapes: T tasks, m of them in one call, B samples, C classes, D features, n generated numbers (|ω|).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clplat.backbones.base import Classifier, Head, Role
from clplat.components.hypernetwork import Generator
from clplat.errors import UserError
from clplat.stream import Experience, Kind


@dataclass(frozen=True)
class _Slice:
    """One generated tensor: its place in ω, and the parameters that take it (several where weights are tied).

    Args:
        start: constant that the generated numbers are added to: the value of a parameter that starts constant (1 for
            the gain of a normalisation), otherwise 0.
        rows: classes, if it has one row for each (a head's weight or bias), otherwise 0.
        base: name of the frozen weight that this tensor, times the next one, is added to (an adapter's factor).
    """

    names: tuple[str, ...]
    shape: torch.Size
    offset: int
    rows: int = 0
    base: str = ""

    @property
    def end(self) -> int:
        """The offset of what comes after it."""
        return self.offset + self.shape.numel()


class Target(nn.Module):
    """A classifier whose weights are an argument of each call.

    With `rank` 0 all its trainable parameters are generated. With a rank r > 0 the backbone is frozen as it is, and
    what is generated is the head, and for each linear layer of `role` two factors b (out, r) and a (r, in), which
    make its weight W + b a.

    Args:
        model: gets all rows of its head now, and loses the parameters that are generated.
        rank: of the adapters, ≥ 0.
        role: of the layers that get adapters.

    Raises:
        UserError: the backbone has no layers of that role, or the head has nothing to generate.
    """

    start: Tensor

    def __init__(self, model: Classifier, rank: int = 0, role: Role = "attention") -> None:
        super().__init__()
        self.classes = model.head.num_classes
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
        constants: list[float] = []
        for key, p in found.items():
            rows = self.classes if key in head and p.ndim and len(p) == self.classes else 0
            self._append(tuple(names[key]), p.shape, rows)
            values = p.detach().flatten()
            constants.append(float(values[0]) if p.numel() and bool((values == values[0]).all()) else 0.0)
        for name, layer in adapted.items():
            self._append((name,), torch.Size((layer.out_features, rank)), base=name)
            self._append((name,), torch.Size((rank, layer.in_features)), base=name)
            constants += [0.0, 0.0]
        if not head & found.keys() or hasattr(model.head, "renew"):
            raise UserError("head: a generated one has to predict by trained weights (valid: growing, linear)")
        self.register_buffer("start", torch.tensor(constants))
        self._moved = [i for i, c in enumerate(constants) if c]  # which tensors have a constant to add
        for owned in names.values():
            for name in owned:
                path, _, leaf = name.rpartition(".")
                self.get_submodule(path).register_parameter(leaf, None)

    def _freeze(self, rank: int, role: Role) -> dict[str, nn.Linear]:
        layers = self.model.backbone.layers(role)
        if not layers:
            raise UserError(f"strategy.role: the backbone has no {role!r} layers for adapters of rank {rank}")
        self.model.backbone.requires_grad_(False)
        return {f"model.backbone.{name}.weight": layer for name, layer in layers.items()}

    def _append(self, names: tuple[str, ...], shape: torch.Size, rows: int = 0, base: str = "") -> None:
        self.slices.append(_Slice(names, shape, self.size, rows, base))

    @property
    def size(self) -> int:
        """|ω|, the numbers that are generated."""
        return self.slices[-1].end if self.slices else 0

    def weights(self, omega: Tensor) -> dict[str, Tensor]:
        """Parameters by name, cut from ω (n,) in order."""
        parts = omega.split([s.shape.numel() for s in self.slices])
        tensors = [part.view(s.shape) for part, s in zip(parts, self.slices, strict=True)]
        for i in self._moved:
            tensors[i] = tensors[i] + self.start[i]
        found: dict[str, Tensor] = {}
        for i, s in enumerate(self.slices):
            if not s.base:
                found |= dict.fromkeys(s.names, tensors[i])
            elif s.base not in found:  # the first of the two factors
                found[s.base] = self.get_parameter(s.base) + tensors[i] @ tensors[i + 1]
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
        return functional_call(self, self.weights(omega) | buffers, (method, *args), tie_weights=False)

    def forward(self, method: str, *args: object) -> Tensor:
        return getattr(self.model, method)(*args)


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
        Head.grow(self.target.model.head, experience)  # refuses classes out of range; all rows are there
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
        """Generated weights of one task, (n,)."""
        return self.generator(self.codes[slot][None], self.levels[slot])[0]

    def forward(self, inputs: Tensor, task: int | None = None) -> Tensor:
        """Logits (B, C) by the weights of `task`, or of the one that learns; all -inf for a task not met."""
        slot = self.current if task is None else self.slots.get(task, -1)
        return self.of_slot(inputs, slot)

    def of_slot(self, inputs: Tensor, slot: int) -> Tensor:
        """As `forward`, by the task's place among those met; -1 stands for one not met."""
        if slot < 0:
            return inputs.new_full((len(inputs), self.target.classes), -torch.inf)
        return self.logits(self.omega(slot), inputs, slot)

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
