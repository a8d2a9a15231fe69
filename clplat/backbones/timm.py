"""Any image model of timm, convolutional or transformer, without its classifier and with its own preprocessing.

Source   Wightman, "PyTorch Image Models", doi:10.5281/zenodo.4414861; each model's paper is named in timm.
Differs  images are scaled in batches, after what the stream does to them: pixels stay floats in [0, 1], which timm's
         transforms of files round to bytes.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clplat.backbones import _weights
from clplat.backbones._inputs import Fit, Interpolation, Preprocessing, fitted
from clplat.backbones.base import Backbone, Normalize, Role, image_shape, require
from clplat.data.tokens import read_json
from clplat.errors import MissingError, UserError

# What the modules of an attention and of an FFN are called, over the families of timm.
_ATTENTION = re.compile(r"attn|attn_in|attn_out|cross_attn|self_attn|xca|e_mhsa|factoratt_crpe\d*|token_mixer")
_FFN = re.compile(r"mlp\d*|mlp_in|mlp_tokens|mlp_channels|ffn")
_REFUSALS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, ZeroDivisionError)


class Timm(Backbone):
    """A model of timm without its classifier: features are what its classifier is given.

    Args:
        net: with `num_classes` 0.
        shape: (channels, height, width) of what it is given.
        fit: how images are brought to that size first; None where they come in it.

    Raises:
        Exception: as `net` does where it can't take images of `shape`.
    """

    def __init__(self, net: Any, shape: tuple[int, int, int], fit: Fit | None = None) -> None:
        super().__init__()
        self.net, self.fit = net, fit
        for candidates in (_grouped(net), _stages(net)):
            self._blocks, self.embed_dim = _tried(net, shape, candidates)
            if self._blocks:
                break

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers as timm groups them, else its stages; none where those put out lists of tensors."""
        return [self.net.get_submodule(name) for name in self._blocks]

    def role(self, name: str) -> Role | None:
        """By the names of timm's modules; what makes an attention's position biases is in no role."""
        inside = next((name[len(b) + 5 :] for b in self._blocks if name.startswith(f"net.{b}.")), "")
        *outer, leaf = inside.split(".")
        first = next((i for i, part in enumerate(outer) if _ATTENTION.fullmatch(part)), None)
        if first is None:
            return "ffn" if any(_FFN.fullmatch(part) for part in outer) else None
        return None if any("mlp" in part or "pos" in part for part in [*outer[first:], leaf]) else "attention"

    def features(self, inputs: Tensor) -> Tensor:
        return _pooled(self.net, inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.fit is not None:
            inputs = self.fit(inputs, bounded=self.input_mean is not None)
        return super().forward(inputs)


def timm(
    input_shape: tuple[int, ...],
    model: str | None = None,
    weights: str = "random",
    image_size: int | None = None,
    interpolation: Interpolation | None = None,
    crop: float | None = None,
    normalize: Normalize | None = None,
) -> Backbone:
    """Any image model of timm by name, convolutional or transformer, with the preprocessing of its weights.

    Args:
        input_shape: (channels, height, width).
        model: timm's name, with or without the tag of its weights; null: as the config.json beside the weights says.
        weights: "random"; "pretrained" (of `model`: the hub's cache, or else the hub); a .safetensors file, or a folder
            with model.safetensors and timm's config.json; or the name of such a repository on the hub.
        image_size: side in pixels that images are brought to, ≥ 1; null: what the weights were trained with, and for
            random ones the size that the stream has. Images that have it are taken as they are.
        interpolation: how they are scaled; null: as the weights need, bicubic for random ones.
        crop: share of the scaled image's side that is kept, in (0, 1]; null: as the weights need, 1 for random ones.
        normalize: images in [0, 1] first, by imagenet or by a half; null: as the weights need.

    Raises:
        UserError: an unknown name, options out of range, images that the model can't take, a file that does not fit.
        MissingError: the weights are neither here nor reachable; says which file to put where.
    """
    channels, height, width = image_shape(input_shape, "timm")
    require("image_size", image_size, image_size is None or image_size >= 1, "≥ 1, or null")
    require("crop", crop, crop is None or 0 < crop <= 1, "in (0, 1], or null")
    source = _source(model, weights)
    own = None if weights == "random" else Preprocessing.of(source.known)
    size = (height, width) if own is None else own.size
    size = size if image_size is None else (image_size, image_size)
    if image_size is None and own is not None and size[0] != size[1]:
        raise UserError(
            f"backbone.image_size: null takes the model's {size[0]}x{size[1]}, but only squares are offered"
        )
    fit = fitted((height, width), size, own, interpolation, crop)
    try:
        net, unused = source.built(channels, size)
        backbone = Timm(net, (channels, *size), fit)
    except _REFUSALS as error:
        if isinstance(error, UserError | MissingError):
            raise
        side, why = source.known["input_size"][1], " ".join(str(error).split())[:160]
        raise UserError(
            f"backbone.image_size: {source.name} can't take images of {size[0]}x{size[1]} ({why}; valid: its own "
            f"{side}, for one)"
        ) from error
    if fit is not None:
        backbone.notes = (f"backbone: images of {height}x{width} are {fit}",)
    backbone.notes = (*backbone.notes, *source.notes, *unused)
    return backbone.normalizing(normalize, channels, None if own is None else own.statistics)


@dataclass(frozen=True)
class _Source:
    """A model's name without a tag, timm's `pretrained_cfg` of its weights, and the file of these or None."""

    name: str
    known: dict[str, Any]
    file: Path | None = None
    notes: tuple[str, ...] = ()

    def built(self, channels: int, size: tuple[int, int]) -> tuple[Any, list[str]]:
        """timm's model without its classifier, and notes of what the weights hold beside it.

        The classifier is made first, as large as the weights have it, so that these must fit as a whole.

        Raises:
            UserError: they do not fit.
            Exception: as timm does where the model can't take images of `size`.
        """
        from timm.models import create_model

        sized: dict[str, Any] = {"img_size": size} if self.known.get("fixed_input_size") else {}
        make = partial(create_model, self.name, in_chans=channels, **sized)
        if self.file is None:
            return make(num_classes=0), []
        state = _weights.read(str(self.file))
        names = self.known.get("classifier") or ()
        first = state.get(f"{names if isinstance(names, str) else next(iter(names), '')}.weight")
        classes = (self.known.get("num_classes") or 0) if first is None else len(first)
        # Without `source`, which would have timm look for the weights itself.
        overlay = {**self.known, "state_dict": state, "num_classes": classes, "label_offset": 0, "source": ""}
        try:
            with _listening() as told:
                net: Any = make(pretrained=True, pretrained_cfg=overlay, num_classes=classes)
        except _REFUSALS as error:
            make(num_classes=0)  # raises where it is the images that do not fit
            lines = [line.strip() for line in str(error).splitlines()]
            why = next((line for line in lines if "(s) in state_dict" in line or "size mismatch" in line), lines[0])
            raise UserError(f"backbone.weights: {self.file} does not fit {self.name}: {why[:200]}") from error
        absent = [line for line in told if line.startswith(("Missing keys", "Unable to convert"))]
        if absent:  # of a family that timm itself does not load strictly
            raise UserError(f"backbone.weights: {self.file} does not fit {self.name}: {absent[0][:200]}")
        net.pretrained_cfg = net.default_cfg = self.known  # not the one that holds all tensors once more
        if classes:
            net.reset_classifier(0)
        _weights.note(net, "backbone.weights", str(self.file))
        return net, [f"backbone.weights: {line[:200]}" for line in told if line.startswith("Unexpected keys")]


@contextmanager
def _listening() -> Iterator[list[str]]:
    """Gathers what timm says while it loads, instead of printing it: of tensors that have no place, say."""
    told, logger = list[str](), logging.getLogger("timm.models._builder")

    def keep(record: logging.LogRecord) -> bool:
        told.append(record.getMessage())
        return False

    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addFilter(keep)
    try:
        yield told
    finally:
        logger.removeFilter(keep)
        logger.setLevel(level)


def _source(model: str | None, weights: str) -> _Source:
    """Where the weights are, and what is known of them."""
    if weights in ("random", "pretrained"):
        if model is None:
            raise UserError(f"backbone.model: null, but weights {weights} name no model (valid: a name of timm's)")
        name = known(model)
        return _Source(name, _registered(model), None if weights == "random" else Path(from_hub(model)))
    file = _weights.locate(weights, "backbone.weights")
    config = file.parent / "config.json"
    held = read_json(config) if config.is_file() else {}
    held = held if isinstance(held, dict) else {}
    said = held.get("architecture", held.get("timm"))
    if model is None and not isinstance(said, str):
        raise UserError(f"backbone.model: null, but {config} names none as its architecture (valid: a name of timm's)")
    name = known(str(said) if model is None else model)
    if isinstance(said, str) and name != said.partition(".")[0]:
        # Some models have tensors of the same names and shapes, and compute something else.
        raise UserError(f"backbone.model: {model!r}, but {config} says {said!r} (null takes that)")
    own = held.get("pretrained_cfg", held)
    found = _registered(str(said) if model is None else model)
    notes = () if own else (f"backbone: no config.json beside {file}; images are prepared as for timm's {name}",)
    if isinstance(own.get("input"), int):
        own = {**own, "input_size": [3, own["input"], own["input"]]}
    stated = {k: own[k] for k in ("input_size", "interpolation", "crop_pct", "crop_mode", "num_classes") if k in own}
    if (statistics := _weights.statistics(str(file))) is not None:
        stated |= {"mean": statistics[0], "std": statistics[1]}
    return _Source(name, {**found, **stated}, file, notes)


def _registered(model: str) -> dict[str, Any]:
    """timm's `pretrained_cfg` of a model, by its tag or of its default weights."""
    from timm.models import PretrainedCfg, get_pretrained_cfg

    return (get_pretrained_cfg(model) or PretrainedCfg()).to_dict()


def known(model: str, files: Iterable[str] | None = None, kind: str = "model") -> str:
    """Name without its tag of a model of timm.

    Args:
        model: as the user wrote it.
        files: of timm, whose models alone are meant; None: all.
        kind: of model, for the message.

    Raises:
        UserError: there is none; names the nearest.
    """
    from timm.models import list_models, list_pretrained

    arch, _, tag = model.partition(".")
    names = list_models() if files is None else [name for file in files for name in list_models(module=file)]
    if arch not in names:
        near = difflib.get_close_matches(arch, names, n=3, cutoff=0.5) or names[:3]
        raise UserError(f"backbone.model: timm has no {kind} {model!r} (nearest: {', '.join(near)})")
    tagged = list_pretrained(f"{arch}.*")
    if tag and model not in tagged:
        near = difflib.get_close_matches(model, tagged, n=3, cutoff=0.0)
        raise UserError(f"backbone.model: {arch!r} has no weights {tag!r} (nearest: {', '.join(near) or 'none'})")
    return arch


def from_hub(model: str) -> str:
    """Path of the weights of `model` in the hub's cache, fetched if they are not there."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
    from timm.models import get_pretrained_cfg

    found = get_pretrained_cfg(model)
    if found is None or not found.hf_hub_id:
        raise UserError(f"backbone.weights: the hub has none for {model!r}; give the path of a .safetensors file")
    repo, file, put = found.hf_hub_id, "model.safetensors", f"weights/{found.hf_hub_id.split('/')[-1]}.safetensors"
    with suppress(LocalEntryNotFoundError):
        return hf_hub_download(repo, file, local_files_only=True)
    try:
        # One request first: without a network the download itself would try again for half a minute.
        get_hf_file_metadata(hf_hub_url(repo, file), timeout=10)
        return hf_hub_download(repo, file)
    except (HTTPError, OSError) as error:
        raise MissingError(
            f"backbone.weights: those of {model!r} are not in the hub's cache and can't be fetched here "
            f"({type(error).__name__}); fetch https://huggingface.co/{repo}/resolve/main/{file} where there is a "
            f"network, put it at {put} and give --backbone.weights {put}"
        ) from error


def _pooled(net: Any, images: Tensor) -> Tensor:
    """What the classifier of `net` is given, (B, D)."""
    return net.forward_head(net.forward_features(images), pre_logits=True)


def _grouped(net: Any) -> list[str]:
    """Names of the layers by which timm groups parameters, in the order of the modules; none where it does not say."""
    groups = net.group_matcher(coarse=False) if hasattr(net, "group_matcher") else {}
    if not isinstance(groups, dict):
        return []
    listed = [p for found in groups.values() for p in ([(found, None)] if isinstance(found, str) else found)]
    # What has a fixed place in timm's order, or no number, is no layer that is repeated.
    patterns = [re.compile(pattern) for pattern, place in listed if place is None]
    numbered = [pattern for pattern in patterns if pattern.groups]
    return [name for name, _ in net.named_modules() if any(pattern.fullmatch(name) for pattern in numbered)]


def _stages(net: Any) -> list[str]:
    """Names of the modules from which timm takes features of each scale."""
    there = dict(net.named_modules())
    return [name for info in getattr(net, "feature_info", ()) if (name := info.get("module", "")) in there and name]


def _tried(net: Any, shape: tuple[int, int, int], names: Sequence[str]) -> tuple[list[str], int]:
    """Those of the modules `names` that one image runs, in that order, and how many features it has.

    No modules where one of them runs more than once, or puts out no tensor, alone or first in a tuple.
    """
    ran, fit = list[str](), list[bool]()

    def note(name: str, _module: nn.Module, _inputs: object, output: Any) -> None:
        ran.append(name)
        fit.append(isinstance(output[0] if isinstance(output, tuple) else output, Tensor))

    handles = [net.get_submodule(name).register_forward_hook(partial(note, name)) for name in names]
    try:
        with torch.no_grad():
            features = _pooled(net.eval(), torch.zeros(1, *shape))
    finally:
        net.train()
        for handle in handles:
            handle.remove()
    if features.dim() != 2:
        raise ValueError(f"its features are of shape {tuple(features.shape)}")
    return (ran if all(fit) and len(set(ran)) == len(ran) else []), features.shape[1]
