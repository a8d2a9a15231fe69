"""GDumb: a greedy, balanced memory, and a model that after each experience is trained from scratch on it alone.

Source   Prabhu, Torr, Dokania, "GDumb: A Simple Approach that Questions Our Progress in Continual Learning", ECCV 2020,
         algorithms 1 and 2.
Checked  by reading drimpossible/GDumb src/dataloader.py (4f412d7, MIT).
    greedy sampler:  (x, y) enters the memory if y is new or holds fewer than memory / (classes met); where it is full,
                     a random sample of the class that holds most leaves
    dumb learner:    θ ← θ_0, then epochs over the memory with CE(f(x; θ), y)
Differs  the sampler is algorithm 1; the code takes the first memory / (classes of the whole stream) of each class. No
         CutMix; optimizer and schedule are those of the settings (theirs: 256 epochs of SGD with warm restarts).
         Trained after each experience, as the paper would when it is asked. Head rows start as they were when added.
"""

from __future__ import annotations

from torch import Tensor

from clplat import Data, Experience, Kind, Strategy
from clplat.components.ema import Frozen
from clplat.components.memory import Greedy


class GDumb(Strategy):
    """Greedy sampler and dumb learner. B samples of a batch, which are remembered ones.

    An experience of classes that are all met leaves a full, balanced memory nearly as it is, and so is hardly learned.
    The loop's epochs, batches and steps count over the memory. θ_0 is what the model was built with: pretrained weights
    where it has some.

    Args:
        memory: samples kept in all (as stored: before augmentation), ≥ 1.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "doi:10.1007/978-3-030-58536-5_31"
    unshardable = ""
    needs_classes = True
    replays = True
    unmergeable = "it begins anew at each experience"

    def __init__(self, *, memory: int = 500, **base):
        super().__init__(**base)
        self.memory, self.initial = Greedy(memory), Frozen(self.model)

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.initial.grow(self.model)

    def begin(self, experience: Experience) -> None:
        assert experience.train is not None
        self.memory.fill(experience.train)
        self.initial.copy_to(self.model)

    def training_data(self, experience: Experience) -> Data:
        return self.memory.data()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        return self.mean_loss(x, y)
