"""A memory of exemplars: of each class the samples whose running mean keeps nearest to the mean of all, best first.

    p_k = argmin_x ‖ μ − (φ(x) + Σ_{j<k} φ(p_j)) / k ‖       over the samples of a class that are not chosen yet

Source   Rebuffi et al., "iCaRL", CVPR 2017, arXiv:1611.07725, algorithms 4 and 5; herding is Welling's, ICML 2009.

Shapes: G classes at once, n samples of the largest, D features, m exemplars of a class.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from clplat.components.stored import Stored
from clplat.errors import UserError
from clplat.strategy import require
from clplat.stream import Data


def herd(features: list[Tensor], count: int) -> list[Tensor]:
    """Positions (m,) of the exemplars of each class, best first, from its features (n, D); m = min(count, n)."""
    sizes = torch.tensor([len(f) for f in features])
    padded = pad_sequence([f.double() for f in features], batch_first=True)  # (G, n, D)
    free = torch.arange(padded.shape[1]) < sizes[:, None]
    free = free.to(padded.device)  # (G, n)
    mean = padded.sum(1) / sizes[:, None].to(padded.device)  # (G, D) μ
    ahead, norms, order = torch.zeros_like(mean), padded.square().sum(2), []
    for _ in range(min(count, padded.shape[1])):
        ahead = ahead + mean  # k μ − Σ_{j<k} φ(p_j)
        distance = norms - 2 * (padded @ ahead[:, :, None])[:, :, 0]  # but for what all have in common
        chosen = distance.masked_fill(~free, torch.inf).argmin(1, keepdim=True)  # (G, 1)
        free = free.scatter(1, chosen, False)
        ahead = ahead - padded.gather(1, chosen[:, :, None].expand(-1, -1, padded.shape[2]))[:, 0]
        order.append(chosen)
    found = torch.cat(order, 1)
    return [row[:size] for row, size in zip(found, sizes.tolist(), strict=True)]


class Herded(Stored):
    """At most `size` samples, the same number of each class met, in the order they were chosen in.

    Args:
        size: samples kept in all, ≥ 1.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        require("memory", size, size >= 1, "≥ 1")
        self.size = size

    def __len__(self) -> int:
        return len(self.stored["labels"]) if self.stored else 0

    def _keep(self, kept: Tensor) -> None:
        self.stored = {name: t[kept] for name, t in self.stored.items()}

    def fill(self, data: Data, features: Callable[[Tensor], Tensor]) -> None:
        """Choose exemplars of the classes in `data`; of all others the first ones stay, as many as there is room for.

        Those held of a class that comes again are chosen from, too. Every process passes the same data.

        Args:
            features: (n, D) of inputs (n, ...) as stored.
        """
        inputs, labels = data.all()
        assert labels is not None
        offered = {"inputs": inputs, "labels": labels, "rows": data.row_ids()}
        pool = {name: torch.cat([self.stored[name], t]) if self.stored else t for name, t in offered.items()}
        places = {c: (pool["labels"] == c).nonzero()[:, 0] for c in pool["labels"].unique().tolist()}
        quota = self.size // len(places)
        if quota == 0:
            raise UserError(f"strategy.memory: {self.size} has no room for {len(places)} classes (valid: more)")
        new = labels.unique().tolist()
        found = herd([features(pool["inputs"][places[c]]) for c in new], quota)
        places |= {c: places[c][order] for c, order in zip(new, found, strict=True)}
        kept = torch.cat([rows[:quota] for rows in places.values()])
        self.stored = {name: t[kept] for name, t in pool.items()}
