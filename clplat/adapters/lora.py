"""LoRA on the adaptable linear layers of a backbone: named changes of low rank that can be added, trained, merged.

Source   Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685, section 4.1.
    h = W x + Σ_t s_t B_t A_t dropout(x),   s = alpha / r,   over the adapters t in use
    A (r, in) ~ U(±1/√in), B (out, r) = 0: a new adapter changes nothing

The layers are `peft`'s. What this adds is what its callers get wrong: adapters that are in use and not trained stay
frozen (`set_adapter` alone makes all of them trainable); a merge changes the base weights for good, at full scale, and
empties the adapter in the same breath, so that no saved state holds a change twice and none is lost by unloading; and
a layer that would never use its adapter is refused.

An adapted layer `net.fc1` keeps its name in `backbone.layers(role)`. In a state dict its own tensors are
`net.fc1.base_layer.weight`, `.bias`, the factors `net.fc1.lora_A.<adapter>.weight`, `net.fc1.lora_B.<adapter>.weight`;
`plain_state` gives the names and weights of the backbone without adapters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from clplat.backbones.base import Backbone, Projection, Role
from clplat.components.shards import parted
from clplat.errors import UserError
from clplat.strategy import require

Where = Literal["attention", "ffn", "both"]
Grouping = Literal["block", "lora", "matrix"]


class LoRA(nn.Module):
    """Named adapters of one backbone. Holds no tensor itself: factors live in the adapted layers.

    Make it in a strategy's constructor, after the model. It changes nothing until the first `add`, which belongs in
    `grow`, since it changes the structure: replayed on resume before weights are loaded. Which adapters are in use is
    part of this module's extra state.

    Args:
        backbone: whose layers are adapted, in place.
        where: role of the layers: attention, ffn, or both.
        rank: r ≥ 1 of an adapter, unless `add` says otherwise.
        alpha: scale of the change is alpha / r; > 0, None takes r, so that the scale is 1.
        dropout: share of a layer's inputs dropped on the way to A in training, in [0, 1).
        projections: of an attention's layers, those that are adapted; a fused one counts as each of its parts. Empty
            takes all.

    Raises:
        UserError: an option out of range; the backbone has no such layers; a layer's module bypasses it.
    """

    def __init__(
        self, backbone: Backbone, where: Where, *, rank: int = 8, alpha: float | None = None, dropout: float = 0.0,
        projections: Sequence[Projection] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        require("where", where, where in get_args(Where), f"one of {', '.join(get_args(Where))}")
        require("rank", rank, rank >= 1, "≥ 1")
        require("alpha", alpha, alpha is None or alpha > 0, "> 0, or null for the rank")
        require("dropout", dropout, 0 <= dropout < 1, "in [0, 1)")
        self._backbone = (backbone,)  # in a tuple, so that it is no submodule of this one
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        roles: tuple[Role, ...] = ("attention", "ffn") if where == "both" else (where,)
        found = {name: layer for role in roles for name, layer in backbone.layers(role).items()}
        attention = [name for name in found if backbone.role(name) == "attention"]
        if projections:
            fused = {"qkv"} if {"query", "key", "value"} & set(projections) else set()
            idle = {name for name in attention if backbone.projection(name) not in {*projections, *fused}}
            found = {name: layer for name, layer in found.items() if name not in idle}
        if not found or (attention and not set(attention) & found.keys()):
            of = f" that are {' or '.join(projections)}" if projections else ""
            names = ", ".join(sorted({name.rpartition(".")[2] for name in attention}))
            there = f" (it has: {names}; strategy.projections [] takes them all)" if names else backbone.offered()
            raise UserError(f"backbone: has no linear layers of role {' or '.join(roles)}{of} to adapt{there}")
        order = [name for name, _ in backbone.named_modules() if name in found]
        for name in order:
            if isinstance(backbone.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
                raise UserError(f"backbone: can't adapt {name}, which MultiheadAttention uses past its module")
        self.layers: tuple[str, ...] = tuple(order)  # dotted names within the backbone, in order
        # Whether all base weights may change, as the user left them: only then may a change be merged into them.
        self.mergeable = all(found[name].weight.requires_grad for name in order)
        self.blocks = {name: block_of(backbone, found[name]) for name in order}
        self.adapters: dict[str, int] = {}  # name → rank, in the order added
        self.active: tuple[str, ...] = ()
        self.trained: tuple[str, ...] = ()
        self.holds_a = False  # of what is trained A stays, as its caller filled it, and B alone learns
        self._empty: set[str] = set()  # merged and not trained since: B = 0
        self._resting: list[nn.Parameter] = []

    @property
    def backbone(self) -> Backbone:
        """The backbone that is adapted."""
        return self._backbone[0]

    def scale(self, adapter: str) -> float:
        """s = alpha / r of an adapter."""
        return 1.0 if self.alpha is None else self.alpha / self.adapters[adapter]

    # --- structure ----------------------------------------------------------------------------------------------------

    def add(self, adapter: str, rank: int | None = None, dropout: float | None = None) -> None:
        """Add an adapter to every layer: A random, B zero, frozen and not in use; does nothing where it exists.

        Its rank and dropout are those of this object, unless told. Uses no data, so it may be replayed. Its first call
        takes seconds: `peft` imports transformers.
        """
        require("adapter", adapter, bool(re.fullmatch(r"\w+", adapter)), "letters, digits and _")
        if adapter in self.adapters:
            return
        from peft import LoraConfig, inject_adapter_in_model

        size = self.rank if rank is None else rank
        require("rank", size, size >= 1, "≥ 1")
        config = LoraConfig(
            r=size,
            lora_alpha=size if self.alpha is None else self.alpha,  # type: ignore[arg-type]  # any number will do
            lora_dropout=self.dropout if dropout is None else dropout,
            target_modules="|".join(re.escape(name) for name in self.layers),
        )
        flags = [(p, p.requires_grad) for p in self.backbone.parameters()]
        inject_adapter_in_model(config, self.backbone, adapter)
        del self.backbone.peft_config  # a note of peft's, at which it warns when the next adapter comes
        for parameter, flag in flags:  # peft freezes all that it finds
            parameter.requires_grad_(flag)
        self.adapters[adapter] = size
        for parameter in self.parameters_of(adapter):  # small steps round away in half precision
            parameter.data = _wide(parameter.data)
        self.use(*self.active, train=self.trained)

    def remove(self, adapter: str) -> None:
        """Take an adapter out of every layer, and its change with it. Structure: call it from `grow`."""
        self._known(adapter)
        self.use(*(a for a in self.active if a != adapter), train=[a for a in self.trained if a != adapter])
        for layer in self._wrappers():
            layer.delete_adapter(adapter)
        del self.adapters[adapter]
        self._empty.discard(adapter)

    # --- which change the outputs, which learn ------------------------------------------------------------------------

    def use(self, *adapters: str, train: str | list[str] | tuple[str, ...] = ()) -> None:
        """Let these adapters, and no others, change the outputs; of them train those in `train` and freeze the rest."""
        trained = (train,) if isinstance(train, str) else tuple(train)
        self._known(*adapters, *trained)
        idle = [a for a in trained if a not in adapters]
        if idle:
            raise ValueError(f"adapter {idle[0]!r} can't be trained: it is not in use, and would get no gradient")
        if self.adapters:
            for layer in self._wrappers():
                layer.set_adapter(list(adapters), inference_mode=True)  # its other mode makes all in use trainable
        for adapter in trained:
            for a, b in self.factors(adapter).values():
                a.requires_grad_(not self.holds_a)
                b.requires_grad_(True)
        self.active, self.trained = tuple(adapters), trained
        self._empty -= set(trained)

    @contextmanager
    def using(self, *adapters: str) -> Iterator[None]:
        """Run with these adapters, all frozen, and then go back: a slow copy, a past task, or () for none."""
        active, trained = self.active, self.trained
        empty = set(self._empty)
        self.use(*adapters)
        try:
            yield
        finally:
            self.use(*active, train=trained)
            self._empty = empty

    def rest(self, model: nn.Module) -> None:
        """Freeze every parameter of `model` that is trained and is no factor of an adapter, until `wake`."""
        factors = {id(p) for adapter in self.adapters for p in self.parameters_of(adapter)}
        for parameter in model.parameters():
            if parameter.requires_grad and id(parameter) not in factors:
                parameter.requires_grad_(False)
                self._resting.append(parameter)

    def wake(self) -> None:
        """Undo all `rest` since the last `wake`; what the user froze stays frozen. Call it before anything grows."""
        for parameter in self._resting:
            parameter.requires_grad_(True)
        self._resting = []

    def base_layers(self) -> dict[str, nn.Linear]:
        """The adapted layers themselves, without what is beside them, by name."""
        found = zip(self.layers, self._wrappers(), strict=True)
        return {name: getattr(layer, "base_layer", layer) for name, layer in found}

    # --- the factors --------------------------------------------------------------------------------------------------

    def factors(self, adapter: str) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """(A (r, in), B (out, r)) of an adapter, the live parameters, by layer."""
        self._known(adapter)
        pairs = zip(self.layers, self._wrappers(), strict=True)
        return {name: (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight) for name, layer in pairs}

    def parameters_of(self, adapter: str) -> list[nn.Parameter]:
        """A and B of every layer in turn."""
        return [p for pair in self.factors(adapter).values() for p in pair]

    def groups(self, adapter: str, by: Grouping = "block") -> list[list[nn.Parameter]]:
        """The factors of an adapter as groups: one of each block, of each layer's pair (lora), or of each matrix.

        Layers outside any block are a group of their own each.
        """
        require("grouping", by, by in get_args(Grouping), f"one of {', '.join(get_args(Grouping))}")
        groups: dict[Any, list[nn.Parameter]] = {}
        for name, pair in self.factors(adapter).items():
            block = self.blocks[name]
            for kind, parameter in zip("AB", pair, strict=True):
                by_block = name if block is None else block
                key = by_block if by == "block" else name if by == "lora" else (name, kind)
                groups.setdefault(key, []).append(parameter)
        return list(groups.values())

    @torch.no_grad()
    def delta(self, adapter: str) -> dict[str, Tensor]:
        """The change s B A (out, in) of every layer's weight, scale included; float32 of narrower factors."""
        pairs = zip(self.factors(adapter).items(), self._wrappers(), strict=True)
        return {name: layer.scaling[adapter] * (_wide(b) @ _wide(a)) for (name, (a, b)), layer in pairs}

    @torch.no_grad()
    def merge(self, adapter: str) -> None:
        """Add the change to the base weights, zero B and freeze: outputs stay as they are, to rounding.

        The adapter stays, empty, until `use` trains it again; `reset` draws a new A for it.

        Raises:
            ValueError: the user froze a base weight (see `mergeable`).
        """
        if not self.mergeable:
            raise ValueError("a layer to merge into was frozen by the user: keep the adapter in use instead")
        bases = self.base_layers()
        for name, change in self.delta(adapter).items():
            weight = bases[name].weight
            weight.copy_((_wide(weight) + parted(change, weight)).to(weight.dtype))
        for _, b in self.factors(adapter).values():
            b.zero_()
        self.use(*self.active, train=[a for a in self.trained if a != adapter])
        self._empty.add(adapter)

    @torch.no_grad()
    def reset(self, adapter: str, slope: float = math.sqrt(5)) -> None:
        """Draw A anew, U(±√(6 / ((1 + slope²) in))), and zero B: the adapter's change is gone.

        The default slope gives U(±1/√in).
        """
        for a, b in self.factors(adapter).values():
            nn.init.kaiming_uniform_(a, a=slope)
            b.zero_()

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        """Give `target` the factors of `source`, which has the same rank."""
        for new, old in zip(self.parameters_of(target), self.parameters_of(source), strict=True):
            new.copy_(old)
        self._empty.discard(target)

    def weigh(self, adapter: str, weights: Iterable[Tensor]) -> None:
        """Scale the change of each layer by a number of its own, (), from now on, in place of s.

        Args:
            weights: one a layer; the caller keeps them in its state, and may train them.
        """
        self._known(adapter)
        for layer, weight in zip(self._wrappers(), weights, strict=True):
            layer.scaling[adapter] = weight

    # --- state --------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, list[str]]:
        for name, layer in zip(self.layers, self._wrappers() if self.adapters else (), strict=False):
            if layer.merged:
                raise RuntimeError(
                    f"{name} was merged past LoRA.merge: its weight and its factors hold the same change"
                )
        lists = {
            "adapters": self.adapters,
            "active": self.active,
            "trained": self.trained,
            "empty": sorted(self._empty),
        }
        return {key: list(names) for key, names in lists.items()}

    def set_extra_state(self, state: dict[str, list[str]]) -> None:
        """Take which adapters are in use. The factors are loaded by now, if this module was made after the model.

        Raises:
            UserError: other adapters than were grown; an adapter that was merged and still holds its change, which
                would count twice.
        """
        if state["adapters"] != list(self.adapters):
            raise UserError(
                f"adapters: the state has {state['adapters']}, the model was grown to {list(self.adapters)}"
            )
        for adapter in state["empty"]:
            if any(bool(b.any()) for _, b in self.factors(adapter).values()):
                raise UserError(f"adapters: {adapter!r} was merged, but its factors are not zero: it would count twice")
        self.use(*state["active"], train=state["trained"])
        self._empty = set(state["empty"])

    def _known(self, *adapters: str) -> None:
        for adapter in adapters:
            if adapter not in self.adapters:
                raise ValueError(f"no adapter {adapter!r} (there are: {', '.join(self.adapters) or 'none'})")

    def _wrappers(self) -> list[Any]:
        return [self.backbone.get_submodule(name) for name in self.layers]


def block_of(backbone: Backbone, layer: nn.Module) -> int | None:
    """Position in `backbone.blocks` of the block that holds `layer`; None where none does."""
    for position, block in enumerate(backbone.blocks):
        if any(module is layer for module in block.modules()):
            return position
    return None


@torch.no_grad()
def plain_state(backbone: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by the names they have without adapters, with the change of those in use in the weights.

    What another run can start from. Copies; the backbone stays as it is.
    """
    state = {k: v.clone() for k, v in backbone.state_dict().items() if isinstance(v, Tensor) and ".lora_" not in k}
    for name, layer in backbone.named_modules():
        if hasattr(layer, "get_delta_weight") and not layer.merged:
            weight = state[f"{name}.base_layer.weight"]
            for adapter in layer.active_adapters:
                change = layer.scaling[adapter] * (
                    _wide(layer.lora_B[adapter].weight) @ _wide(layer.lora_A[adapter].weight)
                )
                weight.copy_((_wide(weight) + change).to(weight.dtype))
    return {k.replace(".base_layer.", "."): v for k, v in state.items()}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
