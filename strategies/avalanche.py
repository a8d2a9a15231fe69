"""Avalanche's plugins inside clplat's loop: EWC, LwF, MAS, RWalk, GEM, A-GEM and replay, as avalanche-lib has them.

Source   Lomonaco et al., "Avalanche: an End-to-End Library for Continual Learning", CLVision 2021, arXiv:2104.00405;
         avalanche-lib 0.6.0 (MIT).
    loss = CE(f(x; θ), y) + what the plugin adds; GEM and A-GEM then project the gradient
Differs  a plugin sees an experience's inputs prepared but not augmented. Plugins get no more than what these seven
         read; one that asks for more stops the run. SynapticIntelligencePlugin is not offered: on a CPU it is plain
         fine-tuning (its old weights are views of the new ones); `si` is clplat's own.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clplat import Experience, Kind, Strategy
from clplat.errors import UserError

PLUGINS: dict[str, tuple[str, dict[str, Any]]] = {  # class, and values for the arguments that have no default
    "ewc": ("EWCPlugin", {"ewc_lambda": 1.0}),
    "lwf": ("LwFPlugin", {}),
    "mas": ("MASPlugin", {}),
    "rwalk": ("RWalkPlugin", {}),
    "gem": ("GEMPlugin", {"patterns_per_experience": 256, "memory_strength": 0.5}),
    "agem": ("AGEMPlugin", {"patterns_per_experience": 256, "sample_size": 256}),
    "replay": ("ReplayPlugin", {}),
}
# What a plugin keeps from step to step. A-GEM and replay keep data sets and a live iterator, which can't be saved.
STATE: dict[str, tuple[str, ...]] = {
    "ewc": ("saved_params", "importances"),
    "lwf": (),
    "mas": ("params", "importance"),
    "rwalk": ("checkpoint_params", "checkpoint_loss", "checkpoint_scores", "iter_importance", "exp_scores",
              "exp_params", "exp_importance", "exp_penalties"),
    "gem": ("memory_x", "memory_y", "memory_tid"),
}  # fmt: skip


class _Seen(SimpleNamespace):
    """What a plugin takes for Avalanche's strategy (or an experience of it), with the attributes it was given only."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and inspection ask for these
            raise AttributeError(name)
        raise UserError(f"strategy.plugin: it reads '{name}', which clplat does not offer to Avalanche's plugins")


class Avalanche(Strategy):
    """One of Avalanche's plugins. Needs `pip install clplat[avalanche]`; one process, loop.accumulate 1.

    A run with agem or replay can't be resumed inside a stream, and says so at its start. With replay the batches come
    from Avalanche's loader (new and replayed samples), the number of steps from clplat's loop.

    Args:
        plugin: which one.
        options: arguments of the plugin's class, such as ewc_lambda of ewc or alpha and temperature of lwf.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:2104.00405"
    replays = True

    def __init__(
        self,
        *,
        plugin: Literal["ewc", "lwf", "mas", "rwalk", "gem", "agem", "replay"] = "ewc",
        options: dict[str, Any] | None = None,
        **base,
    ):
        super().__init__(**base)
        self._name, self._plugin = plugin, _make(plugin, options or {})
        self._seen = _Seen(
            clock=_Seen(train_exp_counter=0, train_iterations=0),
            _criterion=nn.CrossEntropyLoss(),
            train_mb_size=0,
            loss=None,
        )
        self._batches: Iterator[Any] | None = None
        self._before: nn.Module | None = None
        self._lost = False

    # --- the loop's hooks, each calling Avalanche's at the same point of a step ------------------------------------

    def grow(self, experience: Experience) -> None:
        self._before = copy.deepcopy(self.model) if self._name == "lwf" else None  # the structure LwF's teacher has
        super().grow(experience)

    def begin(self, experience: Experience) -> None:
        _refuse_several(self.world_size)
        if self._name not in STATE and experience.index == 0:
            warnings.warn(f"Avalanche's {self._name} can't be saved: this run is not resumable", stacklevel=2)
        self._refuse_lost()
        self._show(experience)
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        for name in STATE.get(self._name, ()):
            _expand(getattr(self._plugin, name), shapes)
        self._seen.dataloader = None
        self._call("before_training")
        self._call("before_training_exp")
        loader = self._seen.dataloader
        self._batches = None if loader is None else _endless(loader)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self._seen.optimizer = super().configure_optimizers()
        return self._seen.optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self._refuse_lost()
        if any(p.grad is not None for p in self.model.parameters()):
            raise UserError(
                "loop.accumulate: must be 1 with strategy avalanche, whose plugins take their own gradients"
            )
        seen = self._seen
        x, y = batch  # (B, ...), (B,)
        seen.train_mb_size = max(seen.train_mb_size, len(x))
        if self._batches is not None:
            x, y = (t.to(x.device) for t in next(self._batches)[:2])
        seen.device, seen.model = x.device, self.model
        seen.mbatch, seen.mb_x = [x, y, torch.zeros_like(y)], x
        self._call("before_training_iteration")
        seen.optimizer.zero_grad()
        seen.mb_output = self.model(x)
        seen.loss = seen._criterion(seen.mb_output, y)
        self._call("before_backward")
        return seen.loss

    def on_after_backward(self) -> None:
        self._call("after_backward")

    def after_step(self) -> None:
        self._call("after_training_iteration")
        self._seen.clock.train_iterations += 1
        self._seen.loss = self._seen.mb_output = None  # or the graph would live on

    def end(self, experience: Experience) -> None:
        self._show(experience)
        self._call("after_training_exp")
        self._seen.clock.train_exp_counter += 1
        self.zero_grad()  # plugins leave gradients behind
        self.train()

    def _call(self, hook: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            getattr(self._plugin, hook)(self._seen)

    def _show(self, experience: Experience) -> None:
        """The experience as Avalanche's data set."""
        from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_tensor_classification_dataset

        assert experience.train is not None
        inputs, labels = experience.train.all()[0], experience.train.targets()
        self.eval()
        inputs = self.prepare(inputs)
        self.train()
        data = _make_taskaware_tensor_classification_dataset(inputs, labels, task_labels=0, targets=labels.tolist())
        self._seen.experience, self._seen.adapted_dataset = _Seen(dataset=data), data
        self._seen.device, self._seen.model = inputs.device, self.model

    # --- state ------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        clock = self._seen.clock
        state: dict[str, Any] = {"experience": clock.train_exp_counter, "iterations": clock.train_iterations}
        state["batch_size"] = self._seen.train_mb_size
        if self._name in STATE:
            state["plugin"] = {name: _pack(getattr(self._plugin, name)) for name in STATE[self._name]}
        if self._name == "lwf":
            lwf = self._plugin.lwf
            classes = {task: sorted(known) for task, known in lwf.prev_classes_by_task.items()}
            teacher = None if lwf.prev_model is None else dict(lwf.prev_model.state_dict())
            state["plugin"] = {"expcount": lwf.expcount, "classes": classes, "teacher": teacher}
        return state

    def set_extra_state(self, state: dict[str, Any]) -> None:
        clock, self._seen.train_mb_size = self._seen.clock, state["batch_size"]
        clock.train_exp_counter, clock.train_iterations = state["experience"], state["iterations"]
        if "plugin" not in state:
            self._lost = clock.train_iterations > 0
        elif self._name == "lwf":
            self._restore_lwf(state["plugin"])
        else:
            device = next(self.model.parameters()).device
            for name, value in state["plugin"].items():
                setattr(self._plugin, name, _unpack(value, device, wrap=self._name != "gem"))

    def _restore_lwf(self, state: dict[str, Any]) -> None:
        lwf, teacher = self._plugin.lwf, state["teacher"]
        lwf.expcount = state["expcount"]
        lwf.prev_classes_by_task.update({task: set(known) for task, known in state["classes"].items()})
        if teacher is not None:  # after an experience it has the shape of the model, inside one that of the last model
            shapes = {name: t.shape for name, t in teacher.items()}
            grown = all(t.shape == shapes[name] for name, t in self.model.state_dict().items())
            lwf.prev_model = copy.deepcopy(self.model if grown else self._before)
            lwf.prev_model.load_state_dict(teacher)

    def _refuse_lost(self) -> None:
        if self._lost:
            raise UserError(f"resume: Avalanche's {self._name} keeps what can't be saved; start the run anew")


def _refuse_several(processes: int) -> None:
    if processes > 1:
        raise UserError(
            f"fabric.devices: {processes} is out of range (Avalanche's plugins run in one process; "
            "clplat's own er, ewc, lwf and si run in several)"
        )


def _make(name: str, options: dict[str, Any]) -> Any:
    """Avalanche's plugin with these arguments."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _refuse_several(torch.distributed.get_world_size())  # in these the import alone fails, with a traceback
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from avalanche.training import plugins
    except ImportError as error:
        raise UserError(
            f"strategy: avalanche needs avalanche-lib ({error}; install it with `pip install 'clplat[avalanche]'`)"
        ) from error
    cls_name, required = PLUGINS[name]
    cls = getattr(plugins, cls_name)
    valid = list(inspect.signature(cls).parameters)
    unknown = [key for key in options if key not in valid]
    if unknown:
        near = difflib.get_close_matches(unknown[0], valid, n=1) or valid
        raise UserError(f"strategy.options.{unknown[0]}: no such argument of {cls_name} (nearest: {', '.join(near)})")
    try:
        return cls(**{**required, **options})
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"strategy.options: {cls_name} refuses {options!r} ({error})") from error


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _expand(value: Any, shapes: dict[str, torch.Size], key: str = "") -> None:
    """Give Avalanche's parameter data zeros for new rows; its own way is one that torch is removing."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _expand(inner, shapes, name)
    elif key in shapes and value.shape != shapes[key]:
        old = value.data
        value.reset_like(shapes[key])
        value.data[tuple(slice(n) for n in old.shape)] = old


def _pack(value: Any) -> Any:
    """Avalanche's parameter data, in dicts, as tensors."""
    if isinstance(value, dict):
        return {key: _pack(inner) for key, inner in value.items()}
    return value if value is None or isinstance(value, Tensor) else value.data


def _unpack(value: Any, device: torch.device, *, wrap: bool) -> Any:
    """Inverse of `_pack`; `wrap` makes Avalanche's ParamData of tensors."""
    from avalanche.training.utils import ParamData

    if isinstance(value, dict):
        return {key: _unpack(inner, device, wrap=wrap) for key, inner in value.items()}
    if value is None:
        return None
    tensor = value.to(device, copy=True)
    return ParamData("restored", init_tensor=tensor, device=device) if wrap else tensor
