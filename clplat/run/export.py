"""A run's network in the formats of others.

safetensors   model.safetensors: tensors `backbone.…` and `head.…` of the network, adapters merged into its layers
hf            what transformers saves of a language model or of CLIP, adapters merged, with the run's tokenizer
peft          low-rank adapters beside a pretrained model, as peft reads them (`peft_folder.py`)
onnx          the network from what the stream holds to logits (`onnx_graph.py`)

All with learner.json: the network's parts and their options, preprocessing, classes, and the classes of each task.
Only a network that predicts as the learner does, by itself, is written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clplat.adapters.lora import plain_state
from clplat.backbones._weights import transposed_layers
from clplat.backbones.base import Classifier
from clplat.config.settings import Config
from clplat.data.tokens import load_tokenizer
from clplat.errors import UserError
from clplat.files import to_json, write_atomic
from clplat.run.build import build_model
from clplat.run.learner import Learner, actions, size
from clplat.run.onnx_graph import onnx_graph
from clplat.run.peft_folder import peft_folder
from clplat.strategy import evaluating

_PROBES = 8  # inputs on which network and learner are compared


def export(learner: Learner, config: Config, to: str, dest: Path) -> Path:
    """Write the network of a learner to the folder `dest`, which must be new or empty; returns it.

    Raises:
        UserError: an unknown format, one that is not defined for this network, or a learner that predicts by more than
            its network.
    """
    if to not in WRITERS:
        raise UserError(f"to: {to!r} is unknown (valid: {', '.join(WRITERS)})")
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise UserError(f"dest: {dest} is there already (valid: a new or an empty folder)")
    with learner.predicting():
        network = _network(learner, config, "export")
        write = WRITERS[to](learner, network, config)  # refuses before anything is written
    _check_same(learner, network, config.strategy.name, "export")
    dest.mkdir(parents=True, exist_ok=True)
    write(dest)
    write_atomic(dest / "learner.json", to_json(_facts(learner, config), indent=1))
    return dest


def network_of(learner: Learner, config: Config, command: str) -> Classifier:
    """A network that predicts as the learner does, by itself, with the weights that the learner predicts with.

    Args:
        command: what asks for it, for messages.

    Raises:
        UserError: a learner that predicts by more than its network.
    """
    with learner.predicting():
        network = _network(learner, config, command)
    _check_same(learner, network, config.strategy.name, command)
    return network


def _facts(learner: Learner, config: Config) -> dict[str, Any]:
    model: Any = learner.model
    parts = {key: {"name": part.name, **part.options} for key, part in (("backbone", config.backbone),
             ("head", config.head)) if key == "backbone" or model.backbone.needs_head}  # fmt: skip
    tasks = {str(e.task): sorted({c for o in learner.of_run.experiences if o.task == e.task for c in o.classes})
             for e in learner.of_run.experiences} if learner.of_run.task_known else {}  # fmt: skip
    words = getattr(model, "classes", torch.empty(0)).tolist()
    return {"strategy": config.strategy.name, **parts, "preprocessing": learner.of_run.preprocessing.to_dict(),
            "classes": learner.of_run.classes, "tasks": tasks, "class_tokens": words}  # fmt: skip


def _network(learner: Learner, config: Config, command: str) -> Classifier:
    """A network as the configuration names it, with the learner's weights, which predicts as the learner does."""
    name = config.strategy.name
    if not isinstance(learner.model, Classifier):
        what = f"{name} has no network of its own: it generates one for each task"
        raise UserError(f"{command}: {what} (valid: clplat.load)")
    network = build_model(config, *size(learner.of_run.facts), answers=actions(learner.of_run.facts))
    for experience in learner.of_run.met:
        network.grow(experience)
    state = {k: v for k, v in learner.model.state_dict().items() if not k.startswith("backbone.")}
    state |= {f"backbone.{k}": v for k, v in plain_state(learner.model.backbone).items()}
    own = network.state_dict()  # what is empty beside it is a part that was merged into a layer
    try:
        network.load_state_dict({k: v for k, v in state.items() if k in own or v.numel()})
    except RuntimeError as error:
        what = f"{name} has changed the network ({' '.join(str(error).split())[:120]})"
        raise UserError(f"{command}: {what} (valid: clplat.load)") from error
    return network.eval()


def _check_same(learner: Learner, network: Classifier, name: str, command: str) -> None:
    """Refuse a learner that predicts otherwise than its network."""
    inputs = probe(learner)
    with evaluating(network), evaluating(learner), torch.no_grad():
        for task in sorted({e.task for e in learner.of_run.met}) if learner.of_run.task_known else [None]:
            told = () if task is None else (task,)
            ours, theirs = learner.predict(inputs, *told), network.predict(inputs, *told)
            if ours.shape != theirs.shape or not torch.allclose(ours.float(), theirs.float(), rtol=1e-3, atol=1e-3):
                raise UserError(f"{command}: {name} predicts by more than its network (valid: clplat.load)")


def probe(learner: Learner) -> Tensor:
    """Prepared inputs of the right shape, drawn."""
    draw, (shape, _) = torch.Generator().manual_seed(0), size(learner.of_run.facts)
    if not learner.of_run.preprocessing.ids:
        return torch.rand(_PROBES, *shape, generator=draw)
    ids = torch.randint(3, getattr(learner.model.backbone, "vocabulary", 256), (_PROBES, *shape), generator=draw)
    if len(shape) == 2:
        ids[:, 1] = -1  # of all classes
    return ids


Writer = Callable[[Path], None]


def _safetensors(learner: Learner, network: Classifier, config: Config) -> Writer:
    from safetensors.torch import save

    tensors = {k: v.to("cpu", copy=True).contiguous() for k, v in network.state_dict().items()}
    return lambda dest: write_atomic(dest / "model.safetensors", save(tensors))


def _transformers(learner: Learner, network: Classifier, config: Config) -> Writer:
    """By transformers' own way of saving; its Conv1D get their layout back."""
    from transformers import PreTrainedModel

    net: Any = getattr(network.backbone, "net", None)
    if not isinstance(net, PreTrainedModel) or network.backbone.needs_head:
        name = type(network.backbone).__name__
        raise UserError(f"to: hf is defined for language models and CLIP of transformers, not for {name} (valid: "
                        "safetensors)")  # fmt: skip
    turned = {f"{name}.weight" for name in transposed_layers(net)}
    state = {k: v.detach().T.contiguous() if k in turned else v for k, v in net.state_dict().items()}
    text = learner.of_run.preprocessing.text
    speech: Any = None if text is None or text["tokenizer"] == "bytes" else load_tokenizer(text["tokenizer"])

    def write(dest: Path) -> None:
        net.save_pretrained(dest, state_dict=state)
        if speech is not None and speech.whole is not None:
            speech.whole.save_pretrained(dest)
        elif speech is not None:
            speech.inner.save(str(dest / "tokenizer.json"))

    return write


WRITERS: dict[str, Callable[[Learner, Classifier, Config], Writer]] = {
    "safetensors": _safetensors,
    "hf": _transformers,
    "peft": peft_folder,
    "onnx": lambda learner, network, _: onnx_graph(learner, network, probe(learner)),
}
