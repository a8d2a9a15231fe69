"""MoRAM: each task adds rank-one experts to every layer, and a token's own projections choose which of them answer.

Source   Lu et al., "Little By Little: Continual Learning via Incremental Mixture of Rank-1 Associative Memory Experts",
         ICML 2026, arXiv:2506.21035; MoRA in its first two versions.
Checked  against Artificer-AI-Lab/MoRAM XTAIL/loralib/moram.py (Apache-2.0), whose layer gives the same outputs and
         gradients.
    an atom i of a layer is a key a_i (d,) and a value b_i (o,); R = r t of them after task t, of which r are trained
    p = A x,   s = p / ‖p‖,   w = softmax of the k largest s / τ, 0 elsewhere
    in evaluation also  w_i = 0 where s_i < δ, and the rest stays as it is
    y = W x + B (w ∘ p)
    loss = CE(f(x; θ), y) over the classes of this experience only
Differs  values that the text leaves open are those of the authors' script for CLIP, and so is the scale of 1: their
         code for language models halves what a task has learned when it stores it. Evaluation comes before atoms for
         the next task are added, which changes outputs although their values are 0. A new optimizer for each task. k is
         cut to R. A head without prompts has no text loss. Layers that are fused (query, key and value of a ViT of timm
         or of GPT-2) have one bank of atoms and one choice among them for all their parts, where theirs have three.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat import Experience, Kind, Strategy, require
from clplat.adapters.atoms import AtomLinear
from clplat.adapters.replace import replaced
from clplat.backbones.base import Classifier, Role
from clplat.components.sums import over_processes, world_size


def across_batch(logits: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Cross-entropy of each class over all processes' batch: logits (B, C), labels (B,); the sum over `classes`."""
    if world_size() == 1:
        return -logits.log_softmax(0).gather(1, labels[:, None]).sum() / classes
    largest = torch.cat([logits.detach(), logits.new_full((1, logits.shape[1]), -torch.inf)]).amax(0)  # (C,)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    log_sums = over_processes((logits - largest).exp().sum(0)).log() + largest
    counts = over_processes(F.one_hot(labels, logits.shape[1]).sum(0).to(logits.dtype))
    return (counts @ log_sums - over_processes(logits.gather(1, labels[:, None]).sum())) / classes


class MoRAM(Strategy):
    """Mixture of rank-one experts, without router, replay or task identity. The backbone is frozen.

    Args:
        rank: r ≥ 1, atoms that each experience adds to each layer.
        top: k, atoms of a layer that a token may activate, ≥ 2.
        temperature: τ > 0, of the scores, which lie in [-1, 1].
        threshold: δ, least score of an active atom in evaluation; -1 lets all pass, above 1 gives the backbone back.
        dropout: share of a layer's inputs that is dropped on the way to its keys in training, in [0, 1).
        roles: of the layers that get atoms.
        own_classes: let only the classes of this experience compete in the loss. In CLIP they always do so; in a
            language model none compete.
        text_loss: add each class's cross-entropy over the samples of a batch, the mean over the classes met;
            null: where the model has prompts, as CLIP, whose loss it is. Not for language models.
        optimizer: sgd, adam or adamw; made anew for each experience.
        lr: learning rate, > 0.
        beta2: decay of the squared gradients of adam and adamw, in [0, 1).
        schedule: of the learning rate within an experience; cosine ends at 0.
    """

    kinds = frozenset({Kind.LEARN})
    factored = True
    paper = "arXiv:2506.21035"
    unshardable = ""
    searched = {"lr": (5e-5, 5e-3, "log"), "temperature": (1e-3, 0.1, "log"), "threshold": (0.0, 0.5)}
    aliases = ("mora",)
    model: Classifier

    def __init__(
        self,
        *,
        model: Classifier,
        rank: int = 16,
        top: int = 16,
        temperature: float = 0.01,
        threshold: float = 0.2,
        dropout: float = 0.0,
        roles: list[Role] = ["attention", "ffn"],  # noqa: B006
        own_classes: bool = True,
        text_loss: bool | None = None,
        optimizer: Literal["sgd", "adam", "adamw"] = "adamw",
        lr: float = 5e-4,
        beta2: float = 0.9999,
        schedule: Literal["constant", "cosine"] = "cosine",
        **base,
    ):
        super().__init__(model=model, optimizer=optimizer, lr=lr, schedule=schedule, **base)
        require("rank", rank, rank >= 1, "≥ 1")
        require("top", top, top >= 2, "≥ 2")
        require("temperature", temperature, temperature > 0, "> 0")
        require("threshold", threshold, threshold >= -1, "≥ -1")
        require("dropout", dropout, 0 <= dropout < 1, "in [0, 1)")
        require("beta2", beta2, 0 <= beta2 < 1, "in [0, 1)")
        prompts = hasattr(model, "among")
        valid = "false or null for a model whose answers are text"
        require("text_loss", text_loss, not text_loss or not hasattr(model, "losses") or prompts, valid)
        self.added, self.beta2, self.own_classes = rank, beta2, own_classes
        self.text_loss = prompts if text_loss is None else text_loss
        self.whole_batch = "each class is compared over the samples of a batch" if self.text_loss else ""
        self._met: set[int] = set()  # classes; this and `_now` follow from the experiences met
        self._now: list[int] = []
        self.model.backbone.requires_grad_(False)
        made = replaced(self.model.backbone, roles, lambda old: AtomLinear(old, top, temperature, threshold, dropout))
        self._layers = list(made.values())

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self._now = sorted(experience.classes)
        self._met |= set(experience.classes)
        for layer in self._layers:
            layer.append(self.added)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        for group in optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (group["betas"][0], self.beta2)
        return optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        if self.text_loss and hasattr(self.model, "among"):
            return self._with_prompts(x, y)
        if hasattr(self.model, "losses") or not (self.text_loss or self.own_classes):
            return self.mean_loss(x, y)
        logits = own = self.model(x)  # (B, C)
        if self.own_classes:  # a head may have rows for classes to come, too
            others = sorted(set(range(logits.shape[1])) - set(self._now))
            own = logits.index_fill(1, torch.tensor(others, dtype=torch.int64, device=logits.device), -torch.inf)
        loss = self.mean(F.cross_entropy(own, y, reduction="none"))
        return loss + across_batch(logits, y, len(self._met)) if self.text_loss else loss

    def _with_prompts(self, x: Tensor, y: Tensor) -> Tensor:
        """Both losses of a model that has a prompt for each class. Those of other experiences have no sample here, so
        that nothing but the number of them is in the second loss.
        """
        model: Any = self.model
        now = torch.tensor(self._now, device=y.device)
        logits, own = model.among(x, now), torch.searchsorted(now, y)  # (B, K), (B,)
        text = across_batch(logits, own, len(self._met))
        return self.mean(F.cross_entropy(logits, own, reduction="none")) + text

    def measurements(self) -> dict[str, float]:
        return {"atoms": float(len(self._layers[0].keys) + len(self._layers[0].new_keys))}
