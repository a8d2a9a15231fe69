"""Trying to learn erased samples again, on copies of the weights.

The learner itself serves as code only: its parameters are replaced by copies for the length of each call, and no
optimizer of the run, no gradient and no random state is touched.

Shapes: k samples relearned on, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from clplat.strategy import Strategy

Among = Callable[[Tensor, int | None], Tensor]


class _Predicting(nn.Module):
    """`predict` as a module's forward pass, so that it can be called with other parameters."""

    def __init__(self, strategy: Strategy, among: Among) -> None:
        super().__init__()
        self.strategy, self.among = strategy, among

    def forward(self, inputs: Tensor, task: int | None) -> Tensor:
        logits = self.strategy.predict(inputs) if task is None else self.strategy.predict(inputs, task)
        return self.among(logits, task)


def relearn(
    strategy: Strategy, inputs: Tensor, labels: Tensor, task: int | None, *, steps: int, lr: float,
    among: Among = lambda logits, task: logits,
) -> dict[str, Any]:  # fmt: skip
    """Accuracy on the samples while a copy of every parameter follows the gradient of their cross-entropy.

    By an optimizer of the strategy's kind (its momentum; no weight decay), all samples in each step, in evaluation
    mode, so that nothing is drawn and batch statistics stand still; frozen parameters are trained too: whoever wants
    the data back is not bound by what the strategy trains. The network in backbone `frozen` stays: a learner on
    features does not have it.

    Args:
        strategy: in evaluation mode.
        inputs: (k, ...) prepared.
        labels: (k,).
        task: for `predict`, or None.
        steps: at most; fewer where all samples are right before.
        lr: learning rate.
        among: puts −∞ to the classes that the task has not (see `Stream.among`).

    Returns:
        "accuracies": [a_0, ...] before each step and after the last; "why": None, or why it stopped before the first.
    """
    module = _Predicting(strategy, among)
    fixed = tuple(f"{name}." for name, part in module.named_modules() if getattr(part, "fixed", False))
    copies = {n: p.detach().clone() for n, p in module.named_parameters() if not n.startswith(fixed)}
    for copy in copies.values():
        copy.requires_grad_(copy.is_floating_point())
    trained = [c for c in copies.values() if c.requires_grad]
    state = copies | {n: b.detach().clone() for n, b in module.named_buffers() if not n.startswith(fixed)}
    optimizer = _optimizer(strategy, trained, lr) if trained else None
    accuracies: list[float] = []
    with torch.enable_grad():
        for step in range(steps + 1):
            logits = functional_call(module, state, (inputs, task))
            if why := _hopeless(logits, labels, optimizer):
                return {"accuracies": accuracies, "why": None if accuracies else why}
            accuracies.append(float((logits.argmax(1) == labels).double().mean()))
            if step == steps or accuracies[-1] == 1:
                break
            assert optimizer is not None
            optimizer.zero_grad()
            F.cross_entropy(logits.float() if logits.dtype == torch.bfloat16 else logits, labels).backward()
            optimizer.step()
    return {"accuracies": accuracies, "why": None}


def _optimizer(strategy: Strategy, trained: list[Tensor], lr: float) -> torch.optim.Optimizer:
    if strategy.optimizer_name == "sgd":
        return torch.optim.SGD(trained, lr=lr, momentum=strategy.momentum)
    return torch.optim.Adam(trained, lr=lr)


def _hopeless(logits: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer | None) -> str | None:
    """Why no gradient step can relearn the samples, or None."""
    if logits.ndim != 2:
        return "its predictions are no class scores"
    if int(labels.max()) >= logits.shape[1] or bool(logits.gather(1, labels[:, None]).isneginf().any()):
        return "it gives the erased classes no probability at all: no gradient leads back to them"
    if not bool(logits[:, labels.unique()].isfinite().all()):
        return "its predictions are not finite"
    if optimizer is None or not logits.requires_grad:
        return "its predictions have no gradient"
    return None
