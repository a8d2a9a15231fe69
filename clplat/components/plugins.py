"""Plugins of avalanche-lib outside its own loop: made of options, shown what they read, and kept as tensors."""

from __future__ import annotations

import copy
import difflib
import inspect
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

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


class Seen(SimpleNamespace):
    """What a plugin takes for Avalanche's strategy (or an experience of it), with the attributes it was given only."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and inspection ask for these
            raise AttributeError(name)
        raise UserError(f"strategy.plugin: it reads '{name}', which clplat does not offer to Avalanche's plugins")


def make(name: str, options: dict[str, Any]) -> Any:
    """Avalanche's plugin with these arguments."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        refuse_several(torch.distributed.get_world_size())  # in these the import alone fails, with a traceback
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


def refuse_several(processes: int) -> None:
    """Refuse a run in several processes, which no plugin supports."""
    if processes > 1:
        raise UserError(
            f"fabric.devices: {processes} is out of range (Avalanche's plugins run in one process; "
            "clplat's own er, ewc, lwf and si run in several)"
        )


def dataset(inputs: Tensor, labels: Tensor) -> Any:
    """Inputs (n, ...) and labels (n,) as the library's data set."""
    from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_tensor_classification_dataset

    return _make_taskaware_tensor_classification_dataset(inputs, labels, task_labels=0, targets=labels.tolist())


def endless(loader: Any) -> Iterator[Any]:
    """Batches of a loader, over and over."""
    while True:
        yield from loader


def expand(plugin: Any, name: str, model: nn.Module) -> None:
    """Give what plugin `name` keeps of each parameter the rows by which `model` has grown."""
    shapes = {key: p.shape for key, p in model.named_parameters()}
    for attribute in STATE.get(name, ()):
        _add_rows(getattr(plugin, attribute), shapes)


def state_of(plugin: Any, name: str) -> dict[str, Any]:
    """What plugin `name`, one of `STATE`, keeps, in dicts of tensors and numbers."""
    if name != "lwf":
        return {attribute: _pack(getattr(plugin, attribute)) for attribute in STATE[name]}
    lwf = plugin.lwf
    classes = {task: sorted(known) for task, known in lwf.prev_classes_by_task.items()}
    teacher = None if lwf.prev_model is None else dict(lwf.prev_model.state_dict())
    return {"expcount": lwf.expcount, "classes": classes, "teacher": teacher}


def restore(plugin: Any, name: str, state: dict[str, Any], model: nn.Module, before: nn.Module | None) -> None:
    """Inverse of `state_of`.

    Args:
        model: as grown by now.
        before: as it was before it last grew; of lwf, whose teacher has its structure inside an experience.
    """
    if name != "lwf":
        device = next(model.parameters()).device
        for attribute, value in state.items():
            setattr(plugin, attribute, _unpack(value, device, wrap=name != "gem"))
        return
    lwf, teacher = plugin.lwf, state["teacher"]
    lwf.expcount = state["expcount"]
    lwf.prev_classes_by_task.update({task: set(known) for task, known in state["classes"].items()})
    if teacher is not None:  # after an experience it has the shape of the model, inside one that of the last model
        shapes = {key: t.shape for key, t in teacher.items()}
        grown = all(t.shape == shapes[key] for key, t in model.state_dict().items())
        lwf.prev_model = copy.deepcopy(model if grown else before)
        lwf.prev_model.load_state_dict(teacher)


def _add_rows(value: Any, shapes: dict[str, torch.Size], key: str = "") -> None:
    """Give Avalanche's parameter data zeros for new rows; its own way is one that torch is removing."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _add_rows(inner, shapes, name)
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
