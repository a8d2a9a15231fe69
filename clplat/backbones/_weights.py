"""Pretrained weights from .safetensors files; nothing is ever unpickled."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from clplat.errors import MissingError, UserError


def read(path: str, key: str = "backbone.weights") -> dict[str, Tensor]:
    """Tensors of the .safetensors file at `path` ($VARIABLES and ~ are filled in); `key` asked for it.

    Raises:
        MissingError: there is no such file.
        UserError: it is no .safetensors file, or not a whole one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(os.path.expandvars(path)).expanduser()
    if file.suffix != ".safetensors":
        raise UserError(f"{key}: {path!r} is no .safetensors file (other formats can run code when read)")
    if not file.is_file():
        raise MissingError(f"{key}: no file at {file}; put the weights there, as .safetensors")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{key}: {file} is damaged ({error}); copy it again") from error


def fit(
    module: nn.Module, state: dict[str, Tensor], source: str, spare: Callable[[str], bool],
    key: str = "backbone.weights",
) -> None:  # fmt: skip
    """Load `state` into `module`, where every tensor must find its place.

    Args:
        module: takes the tensors.
        state: tensors by dotted name.
        source: where they come from, for the message.
        spare: whether a tensor that `module` has no place for may be left out (a classifier's, say).
        key: of the configuration that named the source.

    Raises:
        UserError: a tensor is missing, has no place, or has another shape.
    """
    own = module.state_dict()
    faults = [f"lacks {name}" for name in own if name not in state]
    faults += [f"has {name}, which the model does not" for name in state if name not in own and not spare(name)]
    faults += [
        f"{name} is {tuple(state[name].shape)}, the model's {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(f"{key}: {source} does not fit: {faults[0]}{more}")
    module.load_state_dict({name: state[name] for name in own})
