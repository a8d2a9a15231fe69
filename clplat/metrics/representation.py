"""State of the representation: dormant units, effective rank, norms.

Legend: n samples, D features, H units of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clplat.strategy import evaluating

# Modules of the activation files that are no unit-wise activation.
_NOT_UNITS = (nn.MultiheadAttention, nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d)
# Functions and methods that are one; a trailing underscore is the in-place form. Sigmoids are mostly gates.
_PIECEWISE = frozenset({"relu", "relu6", "leaky_relu", "rrelu", "prelu", "hardtanh", "hardswish"})
_SMOOTH = frozenset({"gelu", "silu", "mish", "elu", "selu", "celu", "softplus", "tanh"})
_FUNCTIONS = _PIECEWISE | _SMOOTH
_THRESHOLD = 0.025


def dormant_fraction(activations: Iterable[Tensor], threshold: float = _THRESHOLD) -> float:
    """Share of units that are dormant, over all layers; in [0, 1], lower is better.

        s_u = E_x |h_u(x)| / ((1/H) Σ_k E_x |h_k(x)|),   u dormant if s_u ≤ τ

    The expectation runs over samples and positions. In a layer that is zero throughout all units are dormant.

    Source: Sokar et al., "The dormant neuron phenomenon", ICML 2023, arXiv:2302.12902, definition 3.1; τ = 0.025.

    Args:
        activations: outputs of each layer: (n, H), (n, positions, H), or (n, H, height, width).
        threshold: τ ≥ 0.

    Returns:
        NaN if there is no layer.

    >>> round(dormant_fraction([torch.tensor([[1.0, 0.0, 2.0], [1.0, 0.0, -2.0]])]), 4)
    0.3333
    """
    activity = [_activity(h) for h in activations]
    return _share([_dormant(a, threshold) for a in activity])


def effective_rank(features: Tensor) -> float:
    """Effective rank of a feature matrix, not centred; in [1, min(n, D)], and 0 for a zero matrix; higher is better.

        exp(−Σ_k p_k ln p_k),   p_k = σ_k / Σ σ,   σ the singular values of the matrix (n, D)

    The singular values are roots of the eigenvalues of the smaller Gram matrix, in float64.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007, definition 1.

    Args:
        features: (n, D).

    Returns:
        NaN if a feature is not finite.

    >>> round(effective_rank(torch.eye(4)), 6)
    4.0
    """
    if not bool(torch.isfinite(features).all()):
        return float("nan")
    matrix = features.detach().double()
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()  # rounding leaves a zero eigenvalue on either side of it
    total = singular.sum()
    if total == 0:
        return 0.0
    p = singular / total
    return float(torch.special.entr(p).sum().exp())


def weight_norm(parameters: Iterable[Tensor]) -> float:
    """Euclidean norm of all numbers in `parameters`; ≥ 0. One synchronisation with the device.

    Source: Lyle et al., "Understanding plasticity in neural networks", ICML 2023, arXiv:2303.01486.

    >>> weight_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
    5.0
    """
    return float(_norm([p.detach() for p in parameters]))


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of the gradients that `parameters` hold; ≥ 0, 0 if there are none.

    A tensor () on their device, so that a mean over steps needs no synchronisation before its end.

    Source: Abbas et al., "Loss of plasticity in continual deep reinforcement learning", CoLLAs 2023, arXiv:2303.07507.

    >>> p = nn.Parameter(torch.zeros(2)); p.grad = torch.tensor([3.0, 4.0])
    >>> gradient_norm([p]).item()
    5.0
    """
    return _norm([p.grad for p in parameters if p.grad is not None])


def measure(model: nn.Module, inputs: Tensor, *, max_samples: int = 512) -> dict[str, float | None]:
    """Dormant fraction, effective rank and weight norm of a model, from one forward pass in evaluation mode.

    Units are those of activation modules (`nn.ReLU`, those of timm and transformers) and functions (`F.relu`,
    `Tensor.tanh`), one layer for each call. Of a 4-dimensional output axis 1 holds the units, of any other the last.
    Features are `model.features(inputs)`, or the outputs where the model has no such method, with all axes after the
    first taken together.

    Leaves the model and the random generators as they were. Calls no collective operation, unless weights are sharded.

    Args:
        model: the network.
        inputs: (n, ...) prepared, on the model's device.
        max_samples: leading samples that are used at most, ≥ 1.

    Returns:
        {"dormant_fraction", "effective_rank", "weight_norm"}; None for the first if the model applies no
        activation, for any that is not finite.
    """
    forward = getattr(model, "features", model)
    devices = [inputs.device] if inputs.is_cuda else []
    watch = _Watch()
    with torch.no_grad(), torch.random.fork_rng(devices=devices), evaluating(model), watch.hooked(model), watch:
        features = forward(inputs[:max_samples])
    found = {
        "dormant_fraction": _share(watch.dormant),
        "effective_rank": effective_rank(features.flatten(1)),
        "weight_norm": weight_norm(model.parameters()),
    }
    return {k: v if torch.isfinite(torch.tensor(v)) else None for k, v in found.items()}


class _Watch(TorchFunctionMode):
    """Notes which units are dormant in each activation that is applied while it is entered.

    A module's output counts rather than the calls within it: some are compositions of several functions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dormant: list[Tensor] = []
        self.depth = 0  # activation modules under way

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.depth == 0 and getattr(func, "__name__", "").rstrip("_") in _FUNCTIONS:
            self.note(output)
        return output

    @contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        """Hooks on the activation modules of `model`, removed at exit."""
        units = [m for m in model.modules() if _is_activation(m)]
        handles = [m.register_forward_pre_hook(self._enter) for m in units]
        handles += [m.register_forward_hook(self._leave) for m in units]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def note(self, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and output.ndim >= 2:
            self.dormant.append(_dormant(_activity(output.detach()), _THRESHOLD))

    def _enter(self, _module: nn.Module, _inputs: object) -> None:
        self.depth += 1

    def _leave(self, _module: nn.Module, _inputs: object, output: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.note(output)


def _is_activation(module: nn.Module) -> bool:
    """Whether its class stands in a file of activations: torch's, timm's or transformers'."""
    file = type(module).__module__.rpartition(".")[2]
    return file.startswith("activation") and not isinstance(module, _NOT_UNITS)


def _activity(output: Tensor) -> Tensor:
    """Mean absolute activation (H,) of the units of one layer."""
    units = 1 if output.ndim == 4 else output.ndim - 1
    others = [d for d in range(output.ndim) if d != units]
    # A norm sums in one pass, without a copy of an output that may be large.
    total = torch.linalg.vector_norm(output, ord=1, dim=others, dtype=torch.float32)
    return total / (output.numel() / output.shape[units])


def _dormant(activity: Tensor, threshold: float) -> Tensor:
    """(H,) 1 where s ≤ τ, else 0, NaN where not finite; no division, so a layer of zeros needs no case of its own."""
    return torch.where(activity.isfinite(), (activity <= threshold * activity.mean()).float(), torch.nan)


def _share(masks: list[Tensor]) -> float:
    return float(torch.cat(masks).mean()) if masks else float("nan")


def _norm(tensors: list[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(())
    parts: list[Any] = [t for t in tensors if hasattr(t, "to_local")]  # this process's, of sharded tensors
    if parts:
        total = _norm([t.to_local() for t in parts]).double().square()
        torch.distributed.all_reduce(total)
        others = _norm([t for t in tensors if not hasattr(t, "to_local")]).to(total.device)
        return (total + others.double().square()).sqrt().float()
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t.float()) for t in tensors]))
