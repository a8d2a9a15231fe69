"""What a backbone offers to every strategy, whatever its family, and the model made of a backbone and a head.

Shapes: B samples of a batch, D features, C classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

from clplat.errors import UserError
from clplat.stream import Actions, Answers, Experience, Statistics, only

Role = Literal["attention", "ffn"]
Normalize = Literal["none", "imagenet", "half"]
Projection = Literal["query", "key", "value", "qkv", "output"]

# Mean and standard deviation of the channels of images in [0, 1] that pretrained weights were trained with.
_CHANNELS: dict[str, Statistics] = {
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "half": ([0.5], [0.5]),
}

# What the linear layers of an attention are called, over the families of timm and transformers, in small letters; key
# and value of one latent vector are fused, too.
_PROJECTIONS: dict[str, Projection] = {
    **dict.fromkeys(("q", "q_proj", "query", "q_lin", "wq", "q_a_proj", "q_b_proj", "query_global"), "query"),
    **dict.fromkeys(("query_proj", "pos_query_proj", "pos_q_proj"), "query"),
    **dict.fromkeys(("k", "k_proj", "key", "k_lin", "wk", "key_global", "key_proj", "pos_key_proj", "pos_proj"), "key"),
    **dict.fromkeys(
        ("v", "v_proj", "value", "v_lin", "wv", "value_global", "v_proj_current", "v_proj_delayed", "value_proj"),
        "value",
    ),
    **dict.fromkeys(("qkv", "qkv_proj", "query_key_value", "c_attn", "wqkv", "in_proj_qkv", "in_proj_qkvz"), "qkv"),
    "in_proj": "qkv",
    **dict.fromkeys(("kv_proj", "kv_a_proj_with_mqa", "kv_b_proj"), "qkv"),
    **dict.fromkeys(("o", "o_proj", "out_proj", "proj", "dense", "c_proj", "out_lin", "wo", "output"), "output"),
    **dict.fromkeys(("o_a_proj", "o_b_proj"), "output"),
}


@dataclass
class States:
    """What the blocks put out in the last forward pass within `Backbone.recorded`.

    Args:
        outputs: one a block, in order: (B, P, D) tokens of a transformer, (B, ...) otherwise. Blocks may differ in B:
            CLIP's towers read images and prompts.
        valid: one a block, (B, P) bool: which positions are tokens and which padding; None where there is none.
    """

    outputs: list[Tensor]
    valid: Sequence[Tensor | None] | None = None


class Backbone(nn.Module, ABC):
    """Inputs to features. A subclass sets `embed_dim` and writes `features` and `blocks`."""

    embed_dim: int
    needs_head: ClassVar[bool] = True  # whether logits come from a head of clplat.backbones.heads
    reads_tokens: ClassVar[bool] = False  # whether inputs are texts in token ids
    shardable: ClassVar[bool] = False  # whether its weights may be split over processes (fabric.strategy fsdp)
    narrowable: ClassVar[bool] = False  # whether its weights may be in half precision (fabric.precision bf16-true)
    computes_in: torch.dtype | None = None  # type of its weights, where features are in single precision all the same
    residual: bool = False  # whether its blocks each add to one stream of states, read at a text's last token
    input_mean: Tensor | None
    input_std: Tensor | None
    expects: Statistics | None = None  # what its weights were trained with, where that is known
    notes: Sequence[str] = ()  # what it does to its inputs beside that: lines that are said when a run starts

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("input_mean", None, persistent=False)
        self.register_buffer("input_std", None, persistent=False)

    def normalizing(self, how: Normalize | None, channels: int, own: Statistics | None = None) -> Self:
        """Itself, which from now on normalises inputs (B, channels, H, W) in [0, 1] first.

        Args:
            how: by the statistics of "imagenet", by a "half", or "none"; None takes `own`.
            own: what its weights were trained with, where that is known. Grey images take the mean over its channels.
        """
        valid = get_args(Normalize)
        require("normalize", how, how is None or how in valid, f"{', '.join(valid)}, or null")
        require("normalize", how, how != "imagenet" or channels == 3, "none or half for images without three channels")
        if own is not None and len(own[0]) not in (1, channels):
            own = [sum(own[0]) / len(own[0])], [sum(own[1]) / len(own[1])]
        self.expects = own
        chosen = own if how is None else _CHANNELS.get(how)
        if chosen is not None:
            mean, std = (torch.tensor(values).view(-1, 1, 1) for values in chosen)
            self.register_buffer("input_mean", mean, persistent=False)
            self.register_buffer("input_std", std, persistent=False)
        return self

    def narrowed(self, dtype: torch.dtype) -> Self:
        """Itself, with its parameters in `dtype`, a half precision; buffers (positions, say) stay as they are."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        self.computes_in = dtype
        return self

    @abstractmethod
    def features(self, inputs: Tensor) -> Tensor:
        """Features (B, D) of prepared inputs (B, ...), D = `embed_dim`."""

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The repeated parts in the order they are run; each puts out an activation tensor, or a tuple it comes first
        in."""

    @property
    def stacks(self) -> list[list[nn.Module]]:
        """The blocks of each of its towers: one list, where they are all run one after the other."""
        return [self.blocks] if self.blocks else []

    def role(self, name: str) -> Role | None:
        """What the linear layer at dotted `name` does, or None where it is not meant to be adapted."""
        return None

    def layers(self, role: Role) -> dict[str, nn.Linear]:
        """Adaptable linear layers of one role, keyed by their dotted names within the backbone, in order.

        Empty where the family has no such role. A layer that carries an adapter is under the name it had before, and
        the adapter's factors are none of them.

        Raises:
            UserError: `role` is neither "attention" nor "ffn".
        """
        require("role", role, role in get_args(Role), f"one of {', '.join(get_args(Role))}")
        named = ((n, m) for n, m in self.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in n)
        plain = ((name.removesuffix(".base_layer"), layer) for name, layer in named)
        return {name: layer for name, layer in plain if self.role(name) == role}

    def offered(self) -> str:
        """What there is to adapt, for the message of who asked for layers of a role that there is not."""
        if roles := [role for role in get_args(Role) if self.layers(role)]:
            return f" (it has: {', '.join(roles)})"
        convolutions = any(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) for m in self.modules())
        return " (its layers are convolutions, and linear ones alone can be adapted)" if convolutions else ""

    def projection(self, name: str) -> Projection | None:
        """Which projection of an attention the linear layer at dotted `name` is; None for any other layer.

        By its own name, or the one of what it is wrapped in.
        """
        if self.role(name) != "attention":
            return None
        outer, _, leaf = name.lower().rpartition(".")
        return _PROJECTIONS.get(leaf) or _PROJECTIONS.get(outer.rpartition(".")[2])

    def alike(self, name: str) -> bool:
        """Whether the layer at dotted `name` reads the same in every process, whatever samples it has."""
        return False

    @contextmanager
    def recorded(self) -> Iterator[States]:
        """Outputs of the blocks, with their gradients, in the last forward pass made while this is entered.

        Works for a pass by `torch.func.functional_call` too. There is nothing in it before such a pass.
        """
        states, found = States([]), dict[int, Tensor]()

        def note(number: int, _module: nn.Module, _inputs: object, output: Any) -> None:
            found[number] = output[0] if isinstance(output, tuple) else output
            if number == len(blocks) - 1:
                states.outputs, states.valid = [found[i] for i in range(len(blocks))], self.positions()

        blocks = self.blocks
        handles = [block.register_forward_hook(partial(note, i)) for i, block in enumerate(blocks)]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    def positions(self) -> Sequence[Tensor | None] | None:
        """`States.valid` of the last forward pass; None where inputs are not padded."""
        return None

    def assemble(self, head: Head | None, answers: Answers | Actions | None) -> Classifier:
        """The model that strategies hold.

        Args:
            head: None where `needs_head` is False.
            answers: what a stream tells of its answers or actions; None where it has none, or none is at hand.

        Raises:
            UserError: it does not fit what the stream tells.
        """
        assert head is not None
        return Classifier(self, head)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.input_mean is not None and self.input_std is not None:
            inputs = (inputs - self.input_mean) / self.input_std
        if self.computes_in is None:
            return self.features(inputs)
        return self.features(inputs.to(self.computes_in) if inputs.is_floating_point() else inputs).float()


def at_least_one(read: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of rows (B, ...) to rows that also takes none, which transformers' attention does not.

    A row of zeros stands in where B is 0, as in a process that an epoch's last batch leaves without a sample, and what
    is found of it is dropped.
    """

    @wraps(read)
    def filled(*args: Any) -> Tensor:
        if all(a.shape[0] for a in args if isinstance(a, Tensor)):  # `len` would fix it where a graph is taken
            return read(*args)
        return read(*(a.new_zeros(1, *a.shape[1:]) if isinstance(a, Tensor) else a for a in args))[:0]

    return filled


class Head(nn.Module, ABC):
    """Features to logits. Its rows may grow; growing in the same order gives the same structure.

    Args:
        in_features: D, > 0.
        num_classes: classes of the whole stream, > 0.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        require("in_features", in_features, in_features > 0, "> 0", group="head")
        require("num_classes", num_classes, num_classes > 0, "> 0 (this stream has no classes)", group="head")
        self.in_features, self.num_classes = in_features, num_classes
        self.classes_of: dict[int, set[int]] = {}  # by task; follows from the experiences grown for

    @abstractmethod
    def forward(self, features: Tensor, task: int | None = None) -> Tensor:
        """Logits (B, C) for features (B, D); `task` only where the stream declares it known."""

    def predict(self, features: Tensor, task: int | None = None) -> Tensor:
        """Logits (B, C) in evaluation, where a head decides otherwise than in training."""
        return self(features, task)

    def grow(self, experience: Experience) -> None:
        """Make room for the classes of `experience`; does nothing where they all have theirs. Uses no data."""
        bad = [c for c in experience.classes if not 0 <= c < self.num_classes]
        if bad:
            raise UserError(
                f"stream: class {bad[0]} of '{experience.name}' is out of range (valid: 0..{self.num_classes - 1})"
            )
        self.classes_of.setdefault(experience.task, set()).update(experience.classes)


class Classifier(nn.Module):
    """A backbone and a head.

    Args:
        backbone: gives features (B, D).
        head: gives logits (B, C) from them; its `in_features` is the backbone's `embed_dim`.
    """

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    @property
    def num_classes(self) -> int:
        """C of the whole stream; 0 where its answers are free text."""
        return self.head.num_classes

    def forward(self, inputs: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Logits (B, C) for prepared inputs (B, ...)."""
        return self.head(self.backbone(inputs), task)

    def tasks_of(self, labels: Tensor) -> Tensor | None:
        """The task (B,) of samples with labels (B,), where the head has rows for each task; else None."""
        tell = getattr(self.head, "tasks_of", None)
        return None if tell is None else tell(labels)

    def features(self, inputs: Tensor) -> Tensor:
        """Features (B, D) for prepared inputs (B, ...)."""
        return self.backbone(inputs)

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        """Logits (B, C) in evaluation (see `Head.predict`); where a task is told, −∞ for classes that it has not."""
        logits = self.head.predict(self.backbone(inputs), task)
        own = self.head.classes_of.get(task, ()) if task is not None else ()
        return only(logits, sorted(own)) if own else logits

    def grow(self, experience: Experience) -> None:
        """Make room in the head for the classes of `experience`."""
        self.head.grow(experience)


def require(key: str, value: object, holds: bool, valid: str, group: str = "backbone") -> None:
    """Refuse an option out of range, naming it, its value and the valid range."""
    if not holds:
        raise UserError(f"{group}.{key}: {value!r} is out of range (valid: {valid})")


def image_shape(input_shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    """(channels, height, width) of `input_shape`; UserError where it is no image."""
    if len(input_shape) != 3 or math.prod(input_shape) <= 0:
        shape = tuple(input_shape)
        raise UserError(f"backbone: {name} takes images (channels, height, width), but the stream's inputs are {shape}")
    channels, height, width = input_shape
    return channels, height, width
