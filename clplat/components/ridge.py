"""Ridge regression kept as sums, from which samples can be taken out again.

    A = Σ x xᵀ,   B = Σ x yᵀ,   W = (A + γI)⁻¹ B = argmin ‖XW − Y‖² + γ‖W‖²        rows x of X, one-hot rows y of Y

Learning adds to the sums and forgetting subtracts, so W is that of the samples that are left, whatever came when. γ is
added at solve time only. Everything is float64, W is found by Cholesky, and nothing is ever added to make that succeed.

Sources  Zhuang et al., "ACIL", NeurIPS 2022, arXiv:2205.14922; Zhuang et al., "G-ACIL", arXiv:2403.15706 (batches of
         any kind); Hager, "Updating the inverse of a matrix", SIAM Review 1989 (the Woodbury identity).

Shapes: n rows of a batch, d features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.components.sums import Sums
from clplat.errors import UserError
from clplat.strategy import require

BLOCK = 512  # columns of a symmetric matrix that are updated at a time; all rows above them are left out
SMALL = 8  # a request of at most d/SMALL rows is answered through the inverse, where that is kept
TOLERANCE = 1e-10  # relative error of W that an answer through the inverse may have; above it W is solved for anew
MANTISSA = 53  # integers below 2**53 are exact in float64, and so is any sum of them, in any order


class Ridge(Sums):
    """The sums, and W (d, C). A class without a sample predicts −inf.

    Args:
        width: d.
        gamma: γ > 0.
        bits: features are multiples of 2^-bits (see `rounded`), so that sums have no rounding error: what was added
            can be taken out without a trace. None for any features; sums then carry rounding errors.
        inverse: also keep (A + γI)⁻¹, d² numbers, which answers small requests in 4nd² instead of d³/3 operations.
        per_class: also keep A of each class, C d² numbers, which takes a class out without its data.
    """

    gram: Tensor
    cross: Tensor
    weight: Tensor
    counts: Tensor
    known: Tensor
    inverse: Tensor
    class_grams: Tensor

    def __init__(
        self, width: int, gamma: float, *, bits: int | None = None, inverse: bool = False, per_class: bool = False
    ) -> None:
        super().__init__()
        require("width", width, width >= 1, "≥ 1")
        require("gamma", gamma, 0 < gamma < math.inf, "> 0")
        require("bits", bits, bits is None or 0 <= bits <= 26, "0..26, or null")
        self.width, self.gamma, self.bits, self.keep_inverse, self.per_class = width, gamma, bits, inverse, per_class
        zeros: dict[str, Any] = {"dtype": torch.float64}
        self.register_buffer("gram", torch.zeros(width, width, **zeros))  # A; only the lower triangle is kept up
        self.register_buffer("cross", torch.zeros(width, 0, **zeros))  # B
        self.register_buffer("weight", torch.zeros(width, 0, **zeros))  # W
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))  # (C,) samples in the sums
        self.register_buffer("known", torch.zeros(0, dtype=torch.bool))  # (C,) had a sample when W was found
        self.register_buffer("inverse", torch.zeros(0, 0, **zeros))  # (A + γI)⁻¹, or empty
        self.register_buffer("class_grams", torch.zeros(0, width, width, **zeros))  # (C, d, d), or empty

    def grow(self, classes: int) -> None:
        """Columns for classes 0 … `classes` − 1: zeros, which is exact, since their columns of B are zero."""
        new = classes - len(self.counts)
        if new > 0:
            self.cross, self.weight = F.pad(self.cross, (0, new)), F.pad(self.weight, (0, new))
            self.counts, self.known = F.pad(self.counts, (0, new)), F.pad(self.known, (0, new))
            if self.per_class:
                self.class_grams = F.pad(self.class_grams, (0, 0, 0, 0, 0, new))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, C) of features (n, d); −inf for classes that W was found without."""
        return (x @ self.weight).masked_fill(~self.known, -torch.inf)

    def rounded(self, x: Tensor) -> Tensor:
        """Features (n, d) as they enter the sums."""
        return x if self.bits is None else torch.round(x * 2.0**self.bits) * 2.0**-self.bits

    # --- learning -----------------------------------------------------------------------------------------------------

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples of this process: features (n, d), labels (n,) int64. W stays as it is."""
        self._add(self.gram, self.class_grams, x, y, 1)
        self.cross.addmm_(x.T, self._one_hot(y))
        self.counts += torch.bincount(y, minlength=len(self.counts))

    def close(self) -> None:
        """Bring the sums together on every process, and solve for W. Raises as `solve` does."""
        self.gather()
        self.solve()

    def solve(self) -> None:
        """W, and the inverse where it is kept and good enough to answer with.

        Raises:
            UserError: `gamma` is too small for a Cholesky factor, or `bits` too fine for exact sums; W is as it was.
        """
        self._solve(self.gram, self.cross, self.counts)

    def _solve(self, gram: Tensor, cross: Tensor, counts: Tensor) -> None:
        if self.bits is not None:
            largest, room = float(gram.diagonal().max()), 2.0 ** (MANTISSA - 2 * self.bits)
            if largest >= room:  # no entry of A, and no part of its sum, is larger than the largest on the diagonal
                valid = math.floor((MANTISSA - math.log2(largest)) / 2)
                raise UserError(
                    f"strategy.bits: {self.bits} is too fine for exact sums up to {largest:.3g} (valid: ≤ {valid}, or "
                    "null for sums with rounding errors)"
                )
        factor = self._factor(gram, self.gamma)
        self.weight, self.known = torch.cholesky_solve(cross, factor).contiguous(), counts > 0
        self.inverse = self.inverse.new_zeros(0, 0)
        if self.keep_inverse:
            self.inverse = torch.cholesky_inverse(factor).contiguous()
            if not self._error(gram, cross) < TOLERANCE / 4:  # too ill-conditioned to answer through it
                self.inverse = self.inverse.new_zeros(0, 0)

    def _factor(self, gram: Tensor, gamma: float) -> Tensor:
        """Cholesky factor of A + γI."""
        matrix = gram.clone()
        matrix.diagonal().add_(gamma)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if info or not factor.diagonal().isfinite().all():
            raise UserError(
                f"strategy.gamma: {gamma} leaves A + γI without a Cholesky factor in float64: raise it (or the "
                "features are not finite, or samples were taken out that had not been put in)"
            )
        return factor

    def error(self, held: Ridge, gamma: float) -> float:
        """Mean squared error, on the samples in `held`, of the W that the samples here have with γ = `gamma`.

        Of sums alone: ‖Y − XW‖² = n − 2 ⟨W, B⟩ + ⟨W, A W⟩ for n one-hot labels, A and B of `held`. W stays as it is.

        Raises:
            UserError: `gamma` is too small for a Cholesky factor.
        """
        w = torch.cholesky_solve(self.cross, self._factor(self.gram, gamma))
        n = held.counts.sum()
        return float((n - 2 * (w * held.cross).sum() + (w * times(held.gram, w)).sum()) / (n * w.shape[1]))

    # --- forgetting ---------------------------------------------------------------------------------------------------

    def remove(self, x: Tensor, y: Tensor, classes: Sequence[int] = ()) -> None:
        """Take out samples that are in the sums, and solve for W; all processes pass the same. All or nothing.

        Args:
            x, y: features (n, d) as they were added, labels (n,).
            classes: taken out as a whole besides, without data, by the statistics of each class.

        Raises:
            UserError: more samples of a class than there are, or what is left has no Cholesky factor: the samples are
                not those that were added. Nothing is changed.
        """
        counts = self.counts - torch.bincount(y, minlength=len(self.counts))
        counts[list(classes)] = 0
        if (counts < 0).any():
            c = int((counts < 0).nonzero()[0])
            raise UserError(f"request: erases more samples of class {c} than are learned ({int(self.counts[c])})")
        if not classes and len(self.inverse) and len(x) <= self.width // SMALL:
            if len(x):
                self.settle(*self.answer(x, y, counts))
            return
        gram, cross = self.gram - self.class_grams[list(classes)].sum(0) if classes else self.gram.clone(), self.cross
        self._add(gram, self.class_grams[:0], x, y, -1)
        cross = (cross - x.T @ self._one_hot(y)).masked_fill(counts == 0, 0.0)
        if not counts.any():
            gram.zero_()
        self._solve(gram, cross, counts)
        self._commit(gram, cross, counts, x, y)

    def answer(self, x: Tensor, y: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
        """W without the samples, through the inverse R; what `settle` needs to bring the sums and R up to date.

        V = R Xᵀ,   S = I − X V = L Lᵀ,   W ← W − V S⁻¹ (Y − X W)
        """
        turned = x.T.contiguous()
        v = self.inverse @ turned  # (d, n)
        s = torch.eye(len(x), dtype=x.dtype, device=x.device) - x @ v
        factor, info = torch.linalg.cholesky_ex((s + s.T) / 2)
        if info:
            raise UserError("request: these samples are not among those learned (I − X R Xᵀ has no Cholesky factor)")
        residual = self._one_hot(y) - x @ self.weight
        self.known = counts > 0
        self.weight = (self.weight - v @ torch.cholesky_solve(residual, factor)).masked_fill(~self.known, 0.0)
        return x, y, counts, v, factor

    def settle(self, x: Tensor, y: Tensor, counts: Tensor, v: Tensor, factor: Tensor) -> None:
        """Take the samples out of the sums and of the inverse, R ← R + V S⁻¹ Vᵀ; then see how good W is.

        Where its error is above `TOLERANCE` (the inverse drifts), W and the inverse are solved for anew.
        """
        half = torch.linalg.solve_triangular(factor, v.T, upper=False)  # (n, d): V S⁻¹ Vᵀ = halfᵀ half
        self.inverse.addmm_(half.T, half)
        self._add(self.gram, self.class_grams[:0], x, y, -1)
        cross = (self.cross - x.T @ self._one_hot(y)).masked_fill(counts == 0, 0.0)
        self._commit(self.gram, cross, counts, x, y)
        if not self._error(self.gram, self.cross) < TOLERANCE:
            self.solve()

    def _commit(self, gram: Tensor, cross: Tensor, counts: Tensor, x: Tensor, y: Tensor) -> None:
        self.gram, self.cross, self.counts = gram, cross, counts
        if self.per_class:
            self._add(self.gram[:0], self.class_grams, x, y, -1)
            self.class_grams[counts == 0] = 0

    def _error(self, gram: Tensor, cross: Tensor) -> float:
        """Relative error of W, seen along one fixed random direction u of its columns: ‖R((A + γI)Wu − Bu)‖ / ‖Wu‖."""
        draw = torch.Generator().manual_seed(0)
        u = torch.randn(cross.shape[1], 1, dtype=torch.float64, generator=draw).to(cross.device)
        w = self.weight @ u
        off = self.inverse @ (times(gram, w) + self.gamma * w - cross @ u)
        size = float(w.norm())
        return float(off.norm()) / size if size else float(off.norm())

    def condition_bound(self) -> float:
        """Upper bound of the condition of A + γI: (γ + λ) / γ, λ the largest eigenvalue of A by power iteration."""
        v = torch.ones(self.width, 1, dtype=torch.float64, device=self.gram.device)
        for _ in range(8):
            v = times(self.gram, v / v.norm().clamp(min=torch.finfo(v.dtype).tiny))
        return (self.gamma + float(v.norm())) / self.gamma

    # --- parts --------------------------------------------------------------------------------------------------------

    def _one_hot(self, y: Tensor) -> Tensor:
        return F.one_hot(y, len(self.counts)).to(self.cross.dtype)

    def _add(self, gram: Tensor, class_grams: Tensor, x: Tensor, y: Tensor, sign: int) -> None:
        """Add ± the products of rows to A and to the matrices of their classes, where these are given."""
        add_products(gram, x, sign)
        for c in y.unique().tolist() if len(class_grams) else ():
            add_products(class_grams[c], x[y == c], sign)

    def _sums(self) -> Iterator[Tensor]:
        for matrix in (self.gram, *self.class_grams):
            yield from (part for part, _, _ in lower(matrix))
        yield from (self.cross, self.counts)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        kept = state_dict.get(f"{prefix}inverse")
        if kept is not None:
            self.inverse = self.inverse.new_zeros(kept.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def lower(matrix: Tensor) -> Iterator[tuple[Tensor, int, int]]:
    """Blocks (view, first row, first column) that cover the lower triangle of a matrix (d, d), or of none (0, d)."""
    for start in range(0, len(matrix), BLOCK):
        end = min(start + BLOCK, len(matrix))
        yield matrix[start:end, :end], start, end


def add_products(matrix: Tensor, x: Tensor, sign: int) -> None:
    """Add ± xᵀx to the lower triangle of a symmetric matrix (d, d), in little more than half the operations."""
    for part, start, end in lower(matrix):
        part.addmm_(x[:, start:end].T, x[:, :end], alpha=sign)


def times(matrix: Tensor, v: Tensor) -> Tensor:
    """Product (d, k) of a symmetric matrix, of which the lower triangle is read, and v (d, k)."""
    out = torch.zeros_like(v)
    for part, start, end in lower(matrix):
        square = part[:, start:end].tril()
        out[start:end] += part[:, :start] @ v[:start] + square @ v[start:end]
        out[:start] += part[:, :start].T @ v[start:end]
        out[start:end] += square.tril(-1).T @ v[start:end]
    return out
