"""A run's network as one ONNX file: from what its stream holds to logits, normalisation inside.

inputs   (N, ...) float32: numbers as the stream holds them, integers divided by what is white (learner.json);
         of text int64 token ids (N, 2, L), filled with -1 at the end
logits   (N, C) float32, in the order of the classes of learner.json
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clplat.backbones.base import Classifier
from clplat.errors import MissingError, UserError
from clplat.files import write_atomic
from clplat.preprocessing import Preprocessing
from clplat.run.learner import Learner

_TOLERANCE = 1e-4  # of logits, between torch and onnxruntime


class _Graph(nn.Module):
    """Preparation and prediction."""

    def __init__(self, preprocessing: Preprocessing, network: Classifier) -> None:
        super().__init__()
        self.preprocessing, self.network = preprocessing, network

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network.predict(self.preprocessing.prepare(inputs))


def onnx_graph(learner: Learner, network: Classifier, probe: Tensor) -> Callable[[Path], None]:
    """What writes the network, after onnxruntime has given the logits of `probe` (n, ...) by it.

    Raises:
        UserError: predictions depend on more than a sample's inputs, or torch can't write this network in ONNX.
        MissingError: what writes and reads ONNX is not installed.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - what torch writes it with
    except ImportError as error:
        raise MissingError(f"to: onnx needs {error.name}; install it: pip install 'clplat[onnx]'") from error
    if learner.of_run.task_known or learner.of_run.preprocessing.choices:
        raise UserError("to: onnx takes inputs alone, but this run was told the task (valid: safetensors, or hf)")
    if not network.backbone.needs_head or learner.evaluation_batch is not None:
        why = "predicts by its batch's statistics" if network.backbone.needs_head else "answers in words"
        which = "networks with a head that predict each sample alone"
        raise UserError(f"to: onnx is defined for {which}, and this one {why} (valid: safetensors, or hf)")
    graph = _Graph(learner.of_run.preprocessing, network).eval()
    body = _written(graph, probe)
    with torch.no_grad():
        expected = graph(probe)
    session = onnxruntime.InferenceSession(body, providers=["CPUExecutionProvider"])
    for part in (probe, probe[:1]):
        (found,) = session.run(["logits"], {"inputs": part.numpy()})
        if not torch.allclose(torch.from_numpy(found), expected[: len(part)], rtol=_TOLERANCE, atol=_TOLERANCE):
            raise UserError("to: onnx: onnxruntime gives other logits than torch for this network (valid: safetensors)")
    return lambda dest: write_atomic(dest / "model.onnx", body)


def _written(graph: nn.Module, probe: Tensor) -> bytes:
    """The file."""
    shapes = ({0: torch.export.Dim("N", min=1)},)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # what its optimizer can't fold is no fault
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # what torch's own parts say of one another
            made: Any = torch.onnx.export(
                graph, (probe,), input_names=["inputs"], output_names=["logits"], dynamic_shapes=shapes, dynamo=True,
                verbose=False,
            )  # fmt: skip
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        why = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"to: onnx: torch can't write this network in ONNX ({why}) (valid: safetensors)") from error
    return made.model_proto.SerializeToString()
