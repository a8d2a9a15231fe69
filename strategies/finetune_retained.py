"""Fine-tuning on retained data: go on training without what is to be erased, and let forgetting do the rest.

Source   the baseline FT of Warnecke et al., "Machine Unlearning of Features and Labels", NDSS 2023, arXiv:2108.11577.
    request: epochs over the retained samples kept,  loss = CE(f(x; θ), y)
Differs  the retained data are a class-balanced memory filled while learning; `memory: null` keeps all, as there.
"""

from __future__ import annotations

from torch import Tensor

from clplat import Data, Experience, Kind
from clplat.strategies._rehearsal import Rehearsal


class FinetuneRetained(Rehearsal):
    """Plain training; a request is answered by training on what is kept of the rest. Shapes: B samples of a batch."""

    kinds = frozenset({Kind.LEARN, Kind.FORGET})
    paper = "arXiv:2108.11577"
    unshardable = ""
    replays = True
    erasure = "approximate: training goes on without the erased data; no guarantee beyond what is measured"

    def training_data(self, experience: Experience) -> Data:
        return self.memory.data() if experience.kind is Kind.FORGET else super().training_data(experience)

    def forget_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """As in learning: the batch is of retained data."""
        return self.training_step(batch, batch_idx)
