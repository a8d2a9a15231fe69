"""DualPrompt: prompts that all tasks share in the first blocks, and one of each task behind them, found by its key.

Source   Wang et al., "DualPrompt: Complementary Prompting for Rehearsal-Free Continual Learning", ECCV 2022,
         arXiv:2204.04799, equations 2 to 6, by prefixes (Pre-T).
Checked  against GT-RIPL/CODA-Prompt models/zoo.py (6417d4f), its authors' reimplementation.
    blocks 1 … L_G: prefix g;   the next L_E blocks: prefix e_t
    training: t the experience, loss = CE over its classes + λ (1 − cos(q(x), k_t))
    prediction: t = argmax_t cos(q(x), k_t), of each sample by itself
Differs  the loss that draws keys is a mean over the batch (a sum there). Not reproduced of JH-LEE-KR/dualprompt-pytorch
         (7eb457d): one prompt for a whole batch in evaluation, and a reshape that gives samples each other's values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clplat import Experience, require
from clplat.adapters.prefixes import Prefix
from clplat.strategies._prompted import Prompted, by_block, cosines, uniform


class DualPrompt(Prompted):
    """General and expert prompts. Shapes: T experiences so far.

    Args:
        general: L_G ≥ 1, blocks that get the general prompt, from the first.
        expert: L_E ≥ 1, blocks behind them that get an expert's.
        general_length: keys, and as many values, of the general prompt in a block, ≥ 1.
        expert_length: those of an expert's, ≥ 1.
        pull: λ > 0, weight of the loss that draws a key to its queries, which nothing else depends on.
    """

    paper = "arXiv:2204.04799"
    unshardable = ""
    searched = {"pull": None}

    def __init__(
        self, *, general: int = 2, expert: int = 3, general_length: int = 5, expert_length: int = 20, pull: float = 1.0,
        **base,
    ):  # fmt: skip
        super().__init__(**base)
        for name, value in (("general", general), ("expert", expert), ("general_length", general_length),
                            ("expert_length", expert_length)):  # fmt: skip
            require(name, value, value >= 1, "≥ 1")
        require("pull", pull, pull > 0, "> 0")
        self.pull, self.expert_shape = pull, (expert, 2, expert_length, self.width)
        self.general = uniform(general, 2, general_length, self.width)
        self.experts, self.keys = nn.ParameterList(), nn.ParameterList()  # (L_E, 2, n, D) and (D,) of each experience
        self._prefix(general + expert)

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        for parts, shape in ((self.experts, self.expert_shape), (self.keys, (self.width,))):
            parts.requires_grad_(False)
            parts.append(uniform(*shape).to(self.present.device))

    def _prefixes_for(self, query: Tensor) -> Sequence[Prefix]:
        if not self.keys:
            return []  # nothing was learned yet
        likeness = cosines(query, torch.stack([*self.keys]))  # (B, T)
        if self.training:
            self._away = self.pull * (1 - likeness[:, -1])
            chosen = self.experts[-1].expand(len(query), *self.expert_shape)
        else:
            chosen = torch.stack([*self.experts])[likeness.argmax(1)]
        general = self.general.expand(len(query), *self.general.shape)
        return [*by_block(general), *by_block(chosen)]
