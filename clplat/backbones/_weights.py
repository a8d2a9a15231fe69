"""Pretrained weights from .safetensors files and transformers' folders of them; nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clplat.data.datasets import find_root
from clplat.data.tokens import find_folder, read_json
from clplat.errors import MissingError, UserError
from clplat.stream import Statistics


def find(path: str) -> Path:
    """The file at `path`, relative to here, the data root or its weights/; of a folder its model.safetensors."""
    file, root = Path(path).expanduser(), find_root(None)
    places = [file] if root is None else [file, root / file, root / "weights" / file]
    file = next((place for place in places if place.exists()), file)
    return file / "model.safetensors" if file.is_dir() else file


def locate(weights: str, key: str) -> Path:
    """The .safetensors file of `weights`: as `find` gives it, or of a repository of that name on the hub.

    Raises:
        MissingError: it is neither here nor reachable; says what to put where.
    """
    file = find(weights)
    if not file.exists() and file.suffix != ".safetensors":
        file = find_folder(weights, key, ("config.json", "model.safetensors")) / "model.safetensors"
    if not file.is_file():
        raise MissingError(f"{key}: no file at {file}; put the weights there, as .safetensors")
    return file


def statistics(weights: str) -> Statistics | None:
    """What the weights at path `weights` were trained with, where a config.json beside them says so; not if "random".

    Its keys are `mean` and `std`, at the top or in `pretrained_cfg` as timm writes them.

    Raises:
        UserError: they are no numbers for each channel.
        MissingError: the config.json is not whole.
    """
    config = find(weights).parent / "config.json"
    content = read_json(config) if weights != "random" and config.is_file() else None
    held = content.get("pretrained_cfg", content) if isinstance(content, dict) else None
    if not isinstance(held, dict) or not {"mean", "std"} <= held.keys():
        return None
    mean, std = held["mean"], held["std"]
    whole = isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) > 0
    if not whole or not all(isinstance(v, int | float) for v in mean + std) or min(std) <= 0:
        raise UserError(f"backbone.weights: {config} has mean {mean} and std {std} (valid: a number each a channel)")
    return mean, std


def read(path: str, key: str = "backbone.weights") -> dict[str, Tensor]:
    """Tensors of the .safetensors file that `find` gives, on the CPU. `key` is what asked for it, for the message.

    Raises:
        MissingError: there is no such file.
        UserError: it is no .safetensors file, or not a whole one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = find(path)
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
    note(module, key, source)


def whole_files(folder: Path) -> list[Path]:
    """The .safetensors files of a folder, sorted, none of them cut short or missing.

    Raises:
        MissingError: there is none, or one that model.safetensors.index.json names is not there.
        UserError: one is damaged.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise MissingError(f"backbone.weights: no .safetensors file in {folder}; put model.safetensors there")
    index = folder / "model.safetensors.index.json"
    named = sorted(set(read_json(index).get("weight_map", {}).values())) if index.is_file() else []
    absent = [name for name in named if not (folder / name).is_file()]
    if absent and not (folder / "model.safetensors").is_file():
        raise MissingError(f"backbone.weights: {folder / absent[0]} is missing, which {index.name} names: put it there")
    for file in files:
        try:
            safe_open(file, "pt").__exit__(None, None, None)  # reads the head, and compares sizes
        except (OSError, SafetensorError) as error:
            raise UserError(f"backbone.weights: {file} is damaged ({error}); copy it again") from error
    return files


def read_config(folder: Path, gguf: Path | None = None) -> Any:
    """transformers' configuration of a folder, or of its file `gguf`.

    Raises:
        MissingError: its config.json is missing or not whole.
        UserError: it is of no known kind.
    """
    from transformers import AutoConfig

    file = folder / "config.json" if gguf is None else gguf
    if gguf is None:
        read_json(file)
    inside = {} if gguf is None else {"gguf_file": gguf.name}
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **inside)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"backbone.weights: {file} is of no known kind ({str(error).splitlines()[0]})") from error


def read_folder(
    cls: Any, folder: Path, config: Any, dtype: torch.dtype, spare: Callable[[str], bool] = lambda name: False,
    gguf: Path | None = None,
) -> Any:  # fmt: skip
    """A model of transformers from its folder; every tensor of it must be there.

    Args:
        cls: transformers' class, with `from_pretrained`.
        config: transformers' configuration of the folder.
        spare: whether a tensor of the model may be missing, since it is not used.
        gguf: a file of the folder to read instead; what it holds in fewer bits is spread out to `dtype`.

    Raises:
        MissingError: no .safetensors file.
        UserError: one that is damaged, or that lacks a tensor.
    """
    from transformers.utils import logging

    if gguf is None and not any(f.name == "model.safetensors" for f in whole_files(folder)):
        read_json(folder / "model.safetensors.index.json")  # of a model in several files; names what is missing
    bars, loudness = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)  # what is wrong is told below
    how = {"use_safetensors": True} if gguf is None else {"gguf_file": gguf.name}
    try:
        net, report = cls.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, output_loading_info=True, **how
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"backbone.weights: {gguf or folder} can't be read ({str(error).splitlines()[0]})") from error
    finally:
        logging.set_verbosity(loudness)
        if bars:
            logging.enable_progress_bar()
    if absent := sorted(name for name in report["missing_keys"] if not spare(name)):
        raise UserError(
            f"backbone.weights: {gguf or folder} does not fit: lacks {absent[0]} (of {len(absent)} tensors)"
        )
    note(net, "backbone.weights", str(gguf or folder))
    return net


def untransposed(net: Any) -> Any:
    """`net` with each of transformers' Conv1D, whose weight is (in, out), as the linear layer of the same function."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(net.named_modules()):
        if isinstance(module, Conv1D):
            layer = nn.Linear(module.nx, module.nf, device="meta")  # draws nothing
            layer.weight, layer.bias = nn.Parameter(module.weight.detach().T.contiguous()), module.bias
            if (read := origin(module.weight)) is not None:
                layer.weight._origin = read  # type: ignore[attr-defined]
            net.set_submodule(name, layer)
    return net


def transposed_layers(net: Any) -> set[str]:
    """Names of the layers that `untransposed` put in the place of transformers' Conv1D."""
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    if not isinstance(net, PreTrainedModel):
        return set()
    with torch.device("meta"):
        fresh = type(net)(net.config)
    return {name for name, module in fresh.named_modules() if isinstance(module, Conv1D)}


def origin(parameter: nn.Parameter) -> tuple[str, str] | None:
    """Key and source that the values of a parameter were read from; None where they were drawn."""
    return getattr(parameter, "_origin", None)


def files_read(module: nn.Module) -> list[Path]:
    """The .safetensors files, in order, that any of its parameters was read from, whatever was loaded into it since."""
    named = dict.fromkeys(s for p in module.parameters() for s in getattr(p, "_sources", ()))
    places = [place for source in named for place in (Path(source), find(source))]
    inside = [f for place in places for f in (sorted(place.glob("*.safetensors")) if place.is_dir() else [place])]
    return list(dict.fromkeys(f for f in inside if f.suffix == ".safetensors" and f.is_file()))


def note(module: nn.Module, key: str, source: str) -> None:
    """Let the parameters know what they were read from."""
    for parameter in module.parameters():
        parameter._origin = key, source  # type: ignore[attr-defined]
        parameter._sources = (*getattr(parameter, "_sources", ()), source)  # type: ignore[attr-defined]
