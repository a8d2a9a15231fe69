"""SVD-orthogonal: full fine-tuning of each weight outside its own leading singular directions.

Source   Nayak et al., "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", ICLR 2026,
         arXiv:2504.07097.
Checked  against peft 0.21 (tuner `osf`, Apache-2.0), whose forward and projected gradients are the same.
    before task t ≥ 2:  W = U_h S_h V_hᵀ + U_l S_l V_lᵀ                k of r singular values are high, r = min(o, d)
        I = mean_i cos(x_i, W x_i) on data of task t−1, divided by its mean over the layers
        k = ⌊ρ r⌋,   ρ = least + I (target − least), cut to [0, 1]
    gradients:  dU_l ← (I − U_h U_hᵀ) dU_l,   dV_l ← (I − V_h V_hᵀ) dV_l,   dS_l free
    after each step the same projections of U_l and V_l, since Adam's steps leave the space that gradients lie in
    after the task:     W ← U_h S_h V_hᵀ + U_l S_l V_lᵀ
Differs  the paper writes G ← G − U_h (U_hᵀ G V_h) V_hᵀ, which leaves more free (`block: paper`); all code has what is
         above. Cosines are taken over the first min(o, d) features of input and output, as code does; negative ones
         count as 0. They are taken when a task ends, so that no sample of it is kept, and of text at all positions,
         padding included. The research scripts compute W without gradients to its factors, which so stay as they are,
         and `unload` of peft's tuner drops what a task learned: neither is followed. Which layers the paper splits is
         not known in full: here all of the blocks; the scripts leave out cross-attention, and train what they do not
         split, which here is frozen after the first task (`train_rest`). Their growing rank counts in max(o, d), so
         that a wide FFN soon is frozen whole; `ranks: linear` counts in r.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat import Experience, Kind, Strategy, require
from clplat.backbones.base import Classifier, Role
from clplat.errors import UserError
from clplat.run.evaluation import evaluating

Block = Literal["factored", "paper"]


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """cos(x_i, y_i) of inputs (..., d) and outputs (..., o), over their first min(o, d) features: (...)."""
    features = min(x.shape[-1], y.shape[-1])
    return F.cosine_similarity(_wide(x[..., :features]), _wide(y[..., :features]), dim=-1)


def normalized(importance: Tensor) -> Tensor:
    """Importances (L,) of the layers, negative ones taken as 0, with mean 1; all 1 where there is none."""
    importance = importance.double().clamp(min=0)
    return importance / importance.mean() if importance.any() else torch.ones_like(importance)


def kept_rank(fraction: float, rank: int) -> int:
    """k = ⌊ρ r⌋ in [0, r]; a ρ that is short of a whole k by rounding only counts as that k."""
    return int(min(max(fraction, 0.0), 1.0) * rank + 1e-9)


class SplitLinear(nn.Linear):
    """A linear layer that can be split in a frozen part and factors of the rest: o outputs, d inputs, p = r − k.

    Unsplit it is the layer it was made of, with the very same parameters. Split, `weight` is U_h S_h V_hᵀ and the rest
    is `left` (o, p) = U_l, `scale` (p,) = S_l, `right` (p, d) = V_lᵀ. With `block` "paper" all of W stays in `weight`,
    which is trained. Takes its sizes from the state that is loaded.

    Args:
        base: the layer whose parameters it takes.
        block: the part of an update that is removed.
    """

    # U_h (o, k) and V_h (d, k), or U_l and V_l as they were, where these are fewer and span the complement; S_h (k,).
    left: nn.Parameter
    scale: nn.Parameter
    right: nn.Parameter
    left_basis: nn.Parameter
    right_basis: nn.Parameter
    high: nn.Parameter
    _PARTS = ("left", "scale", "right", "left_basis", "right_basis", "high")

    def __init__(self, base: nn.Linear, block: Block) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.block = base.in_features, base.out_features, block
        self.weight, self.bias = base.weight, base.bias
        for part in self._PARTS:
            self._hold(part, _wide(base.weight).new_zeros(0))

    def _hold(self, part: str, value: Tensor, trained: bool = False) -> None:
        """Set a part. Parameters, not buffers, which DDP by default sends to all processes in every forward pass."""
        setattr(self, part, nn.Parameter(value.contiguous(), requires_grad=trained))

    @property
    def kept(self) -> int:
        """k; 0 while it is not split, and where nothing of it is trained."""
        if self.block == "paper":
            return len(self.high)
        return min(self.in_features, self.out_features) - len(self.scale) if len(self.scale) else 0

    def forward(self, input: Tensor) -> Tensor:
        out = F.linear(input, self.weight, self.bias)  # (..., o)
        if not len(self.scale):
            return out
        return out + F.linear(F.linear(input.to(self.right.dtype), self.right) * self.scale, self.left).to(out.dtype)

    @torch.no_grad()
    def split(self, kept: int) -> float:
        """Protect the leading k = `kept` directions; returns σ_k − σ_{k+1} over σ_1 (1 where all or none are kept)."""
        weight = _wide(self.weight)
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)  # (o, r), (r,), (r, d)
        k, r = kept, len(s)
        if self.block == "paper":
            parts = {"left_basis": u[:, :k], "right_basis": vt[:k].T, "high": s[:k]}
        else:
            parts = {"left": u[:, k:], "scale": s[k:], "right": vt[k:]}
            for side, basis in (("left_basis", u), ("right_basis", vt.T)):
                parts[side] = basis[:, k:] if self._by_complement(len(basis), k) else basis[:, :k]
            low = (u[:, k:] * s[k:]) @ vt[k:]
            self.weight.copy_(weight - low)
        for part, value in parts.items():
            self._hold(part, value, part in ("left", "scale", "right"))
        self.weight.requires_grad_(self.block == "paper" and k < r)
        return float((s[k - 1] - s[k]) / s[0]) if 0 < k < r and s[0] else 1.0

    @torch.no_grad()
    def merge(self) -> None:
        """Put the factors back into `weight`, which may learn again."""
        if len(self.scale):
            self.weight.copy_(_wide(self.weight) + (self.left * self.scale) @ self.right)
        self.weight.requires_grad_(True)
        for part in self._PARTS:
            self._hold(part, self.scale.new_zeros(0))

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Remove from the gradients what would change the protected part."""
        if self.block == "paper":
            if len(self.high) and self.weight.grad is not None:
                self.weight.grad -= self._protected(_wide(self.weight.grad)).to(self.weight.dtype)
        elif len(self.scale) and self.left.grad is not None and self.right.grad is not None:
            self._outside(self.left.grad, self.left_basis)
            self._outside(self.right.grad.T, self.right_basis)

    @torch.no_grad()
    def project(self) -> None:
        """Remove from the weights what has entered the protected part."""
        if self.block == "paper":
            if len(self.high):
                moved = self._protected(_wide(self.weight)) - (self.left_basis * self.high) @ self.right_basis.T
                self.weight -= moved.to(self.weight.dtype)
        elif len(self.scale):
            self._outside(self.left, self.left_basis)
            self._outside(self.right.T, self.right_basis)

    def _protected(self, matrix: Tensor) -> Tensor:
        """U_h (U_hᵀ M V_h) V_hᵀ of M (o, d)."""
        return self.left_basis @ (self.left_basis.T @ matrix @ self.right_basis) @ self.right_basis.T

    def _by_complement(self, size: int, kept: int) -> bool:
        """Whether the projection on a side of `size` is by U_l U_lᵀ, which is I − U_h U_hᵀ on a side of r, for less."""
        rank = min(self.in_features, self.out_features)
        return size == rank and rank - kept < kept

    def _outside(self, columns: Tensor, basis: Tensor) -> None:
        """Project columns (o or d, p) in place."""
        inside = basis @ (basis.T @ columns)
        if self._by_complement(len(basis), self.kept):
            columns.copy_(inside)
        else:
            columns -= inside

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for part in self._PARTS:  # absent in the state of a model that was never split
            value = state_dict.setdefault(prefix + part, self.scale.new_zeros(0))
            self._hold(part, torch.empty_like(value, device=self.weight.device), getattr(self, part).requires_grad)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _wide(tensor: Tensor) -> Tensor:
    """In single precision at least: in bfloat16 singular vectors are orthogonal to 6e-4 only."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class SVDOrthogonal(Strategy):
    """Constrained full fine-tuning. The first experience is learned without constraint, by all that may be trained.

    Args:
        block: what an update must not have: factored, any part in the span of U_h or of V_h; paper, only the part that
            lies in both.
        ranks: what is preserved of each weight: adaptive, by its importance; constant, `target_retention` of its rank;
            linear, `retention_per_task` · (t − 1) of its rank in task t = 1, 2, ...
        least_retention: share of a rank that is preserved at importance 0, in [0, 1]; of adaptive ranks.
        target_retention: share of a rank that is preserved at mean importance, in [0, 1], so about the mean share.
        retention_per_task: ≥ 0; of linear ranks.
        importance_samples: of a finished experience, by which its layers' importance is measured, ≥ 1.
        roles: of the layers that are split.
        train_rest: what else of the backbone learns from the second experience on: none of it, norms (its
            one-dimensional parameters, so biases too), or all of it, unprotected. The head always learns.
        optimizer: sgd, adam or adamw; made anew for each experience.
        lr: learning rate, > 0.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:2504.07097"
    model: Classifier

    def __init__(
        self,
        *,
        model: Classifier,
        block: Block = "factored",
        ranks: Literal["adaptive", "constant", "linear"] = "adaptive",
        least_retention: float = 0.1,
        target_retention: float = 0.8,
        retention_per_task: float = 0.07,
        importance_samples: int = 128,
        roles: list[Role] = ["attention", "ffn"],  # noqa: B006
        train_rest: Literal["none", "norms", "all"] = "none",
        optimizer: Literal["sgd", "adam", "adamw"] = "adamw",
        lr: float = 5e-5,
        **base,
    ):
        super().__init__(model=model, optimizer=optimizer, lr=lr, **base)
        require("block", block, block in ("factored", "paper"), "factored or paper")
        require("ranks", ranks, ranks in ("adaptive", "constant", "linear"), "adaptive, constant or linear")
        require("least_retention", least_retention, 0 <= least_retention <= 1, "in [0, 1]")
        require("target_retention", target_retention, 0 <= target_retention <= 1, "in [0, 1]")
        require("retention_per_task", retention_per_task, retention_per_task >= 0, "≥ 0")
        require("importance_samples", importance_samples, importance_samples >= 1, "≥ 1")
        require("train_rest", train_rest, train_rest in ("none", "norms", "all"), "none, norms or all")
        self.ranks, self.train_rest, self.importance_samples = ranks, train_rest, importance_samples
        self.least, self.target, self.per_task = least_retention, target_retention, retention_per_task
        self._met = 0  # experiences; follows from those met
        self._rest = [n for n, p in self.model.backbone.named_parameters() if p.requires_grad]
        self._layers = self._replace(roles, block)
        self.importance = [1.0] * len(self._layers)  # of each layer, by the last experience that ended
        self.facts: dict[str, float] = {}

    def _replace(self, roles: list[Role], block: Block) -> list[SplitLinear]:
        """Make the layers of these roles ones that can be split, but for those that the user froze."""
        backbone, found = self.model.backbone, list[SplitLinear]()
        named = {name: layer for role in roles for name, layer in backbone.layers(role).items()}
        require("roles", roles, bool(named), "roles of which the backbone has layers")
        for name, layer in named.items():
            if type(layer) is not nn.Linear:  # some are read by the module above them, past their own forward pass
                raise UserError(f"strategy.roles: {name} is a {type(layer).__name__}; only plain linear layers split")
            if layer.weight.requires_grad:
                path, _, leaf = name.rpartition(".")
                found.append(SplitLinear(layer, block))
                setattr(backbone.get_submodule(path), leaf, found[-1])
                self._rest.remove(f"{name}.weight")
        return found

    # --- life of an experience ------------------------------------------------------------------------------------

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self._met += 1

    def begin(self, experience: Experience) -> None:
        if self._met < 2:
            return
        for name in self._rest:
            parameter = self.model.backbone.get_parameter(name)
            learns = self.train_rest == "all" or (self.train_rest == "norms" and parameter.ndim == 1)
            parameter.requires_grad_(learns)
        kept, gaps = self._kept(), list[float]()
        for layer, k in zip(self._layers, kept, strict=True):
            gaps.append(layer.split(k))
        total = sum(min(layer.weight.shape) for layer in self._layers)
        self.facts = {"preserved_fraction": sum(kept) / max(total, 1), "smallest_gap": min(gaps, default=1.0)}

    def _kept(self) -> list[int]:
        """k of each layer."""
        if self.ranks == "adaptive":
            fractions = [self.least + i * (self.target - self.least) for i in self.importance]
        else:
            share = self.target if self.ranks == "constant" else self.per_task * (self._met - 1)
            fractions = [share] * len(self._layers)
        return [kept_rank(f, min(layer.weight.shape)) for f, layer in zip(fractions, self._layers, strict=True)]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        return self.mean(self.losses(x, y))

    def on_after_backward(self) -> None:
        for layer in self._layers:
            layer.project_gradients()

    def after_step(self) -> None:
        for layer in self._layers:
            layer.project()

    def end(self, experience: Experience) -> None:
        for layer in self._layers:
            layer.merge()
        if self.ranks == "adaptive" and self._layers:
            self.importance = self._measure(experience)

    @torch.no_grad()
    def _measure(self, experience: Experience) -> list[float]:
        """Importance of each layer, by samples evenly spaced in the experience's data."""
        assert experience.train is not None
        total = torch.zeros(len(self._layers), dtype=torch.float64, device=self._layers[0].weight.device)

        def note(index: int, layer: SplitLinear, x: Tensor) -> None:
            total[index] += cosines(x, F.linear(x, layer.weight)).mean()

        hooks = [
            layer.register_forward_pre_hook(lambda module, given, index=i: note(index, module, given[0]))
            for i, layer in enumerate(self._layers)
        ]
        try:
            with evaluating(self):
                size = len(experience.train)
                rows = torch.arange(min(size, self.importance_samples), device=experience.train.inputs.device)
                raw, _ = experience.train.batch(positions := rows * size // len(rows))
                # Not features alone, which pass by a decoder, or CLIP's text.
                self.losses(self.prepare(raw), experience.train.targets()[positions])
        finally:
            for hook in hooks:
                hook.remove()
        found = normalized(total)
        if self.world_size > 1:  # the same to the last bit, so that all processes keep the same ranks
            torch.distributed.broadcast(found, 0)
        return found.tolist()

    def measurements(self) -> dict[str, float]:
        return self.facts

    def get_extra_state(self) -> dict[str, Any]:
        return {"importance": self.importance, "facts": self.facts}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.importance, self.facts = list(state["importance"]), dict(state["facts"])
