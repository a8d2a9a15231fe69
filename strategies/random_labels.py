"""Random labels: teach what is to be erased under wrong labels.

Source   the baseline RL of Golatkar, Achille, Soatto, "Eternal Sunshine of the Spotless Net", CVPR 2020,
         arXiv:1911.04933; with replay as in Fan et al., "SalUn", ICLR 2024, arXiv:2310.12508.
    request: y' ~ uniform over the classes learned and not erased, other than y, once per sample
             loss = mean over B + M of CE(f(x ∪ m; θ), y' ∪ y_m)        x to erase, m replayed
Differs  public code draws y' anew at every access, from 0 … (number of erased classes − 1), or lets it be y.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from clplat import Data, Experience, Kind, require
from clplat.errors import UserError
from clplat.strategies._rehearsal import Rehearsal


def other_labels(labels: Tensor, choices: Tensor, generator: torch.Generator) -> Tensor:
    """For each of `labels` (n,) one of `choices` (k,), sorted and distinct, other than it; uniform. On the CPU.

    Raises:
        UserError: there is no other choice.
    """
    labels = labels.cpu()
    place = torch.searchsorted(choices, labels)  # (n,)
    present = torch.isin(labels, choices)
    room = len(choices) - present.long()
    if (room < 1).any():
        raise UserError(
            "strategy: random_labels needs a class that is learned, not erased, and other than the sample's"
        )
    drawn = (torch.rand(len(labels), dtype=torch.float64, generator=generator) * room).long()
    return choices[drawn + (present & (drawn >= place)).long()]


class RandomLabels(Rehearsal):
    """Plain training; a request is answered by training on wrong labels. B samples to erase, M replayed.

    Args:
        memory: samples kept in all for replay, ≥ the number of classes.
        replay_batch: M, retained samples learned beside each batch and process, ≥ 0; 0 only relabels.
    """

    kinds = frozenset({Kind.LEARN, Kind.FORGET})
    paper = "arXiv:1911.04933"
    unshardable = ""
    replays = True
    needs_classes = True
    erasure = "approximate: the erased data are taught under wrong labels; no guarantee beyond what is measured"

    def __init__(self, *, memory: int = 500, replay_batch: int = 32, **base):
        super().__init__(memory=memory, **base)
        require("replay_batch", replay_batch, replay_batch >= 0, "≥ 0")
        self.replay_batch = replay_batch
        self.generator = torch.Generator().manual_seed(torch.initial_seed())  # the same on all processes
        self.wrong = torch.empty(0, dtype=torch.int64)  # (n,) labels of the samples of the request under way
        self.active: set[int] = set()  # classes learned and not erased; `grow` is replayed on resume

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        classes = set(experience.classes)
        self.active = self.active - classes if experience.kind is Kind.FORGET else self.active | classes

    def begin(self, experience: Experience) -> None:
        super().begin(experience)
        if experience.kind is Kind.FORGET and experience.train is not None:
            choices = torch.tensor(sorted(self.active), dtype=torch.int64)
            self.wrong = other_labels(experience.train.targets(), choices, self.generator)

    def training_data(self, experience: Experience) -> Data:
        data = super().training_data(experience)
        if experience.kind is not Kind.FORGET or data.labels is None:
            return data
        labels = data.labels.clone()
        labels[data.row_ids()] = self.wrong.to(labels.device)
        return dataclasses.replace(data, labels=labels)

    def forget_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,) wrong labels
        if (replayed := self._replayed(self.replay_batch)) is not None:
            x, y = torch.cat([x, replayed[0]]), torch.cat([y, replayed[1]])
        return self.mean_loss(x, y)

    def end(self, experience: Experience) -> None:
        self.wrong = self.wrong[:0]

    def get_extra_state(self) -> dict[str, Any]:
        return {"wrong": self.wrong, "generator": self.generator.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.wrong = state["wrong"].cpu()
        self.generator.set_state(state["generator"].cpu())
