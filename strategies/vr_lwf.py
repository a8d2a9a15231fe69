"""VR-LwF (also LwF-VR): the CLIP before this experience says how near the new images are to sentences of random words.

Source   Ding et al., "Don't Stop Learning: Towards Continual Learning for the CLIP Model", 2022, arXiv:2207.09248. Its
         abstract and a review were read, its equations and constants could not be; they are those of LwF-VR, the
         baseline by that name of Zheng et al., "ZSCL", ICCV 2023, arXiv:2303.06628.
Checked  by reading Thunderbeee/ZSCL through notes on it; it was not run.
    V: n random sentences [begin, ids, end], drawn anew for each experience;   Z = g(V; θ_old)
    S = c f(x'; θ) Zᵀ,  S̄ = c f(x'; θ_old) Zᵀ        (B, n), x' images of this experience, drawn apart from x
    L_img = T² mean_b H(softmax(S̄_b/T), softmax(S_b/T)),   L_txt the same over the columns, softmax over the batch
    loss = CE(c f(x) g(w)ᵀ, y; smoothed) + λ_i L_img + λ_t L_txt        w the prompts of this experience's classes
Differs  what begins and ends a text is not among the random words, as it may be in the code. L_txt is over the batch of
         all processes. The code's λ is 5 where classes come in turn. Z is the teacher's on both sides, so that the text
         tower learns by the first term alone; whether the paper's own has a part in S is not known.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat import Data, Experience, Frozen, Kind, Strategy, require
from clplat.components.gradients import of_all
from clplat.components.losses import cross_entropy
from clplat.components.precision import wide
from clplat.components.stored import CHUNK
from clplat.data.batches import rounds
from clplat.errors import UserError
from clplat.strategy import evaluating


class VRLwF(Strategy):
    """Distillation over a replayed vocabulary, for a model with an image and a text tower. B images, n sentences.

    Args:
        sentences: n ≥ 1.
        length: random words of a sentence, ≥ 1; its first and last token are those of the stream's first prompt.
        temperature: T > 0.
        image_weight: λ_i ≥ 0.
        text_weight: λ_t ≥ 0; with both 0 this is plain fine-tuning.
        label_smoothing: of the first term, in [0, 1).
        optimizer: sgd, adam or adamw; made anew for each experience.
        lr: learning rate, > 0.
        schedule: of the learning rate within an experience; cosine ends at 0.
        warmup: share of an experience's steps over which the rate rises linearly from 0, in [0, 1].
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:2207.09248"
    unshardable = ""
    searched = {"lr": (1e-7, 1e-3, "log"), "image_weight": (0.1, 10.0, "log"), "text_weight": (0.1, 10.0, "log")}
    needs_classes = True
    whole_batch = "a sentence is compared with the images of a batch"
    model: Any
    seed: Tensor
    taken: Tensor

    def __init__(
        self,
        *,
        model: nn.Module,
        sentences: int = 1000,
        length: int = 10,
        temperature: float = 2.0,
        image_weight: float = 1.0,
        text_weight: float = 1.0,
        label_smoothing: float = 0.2,
        optimizer: Literal["sgd", "adam", "adamw"] = "adamw",
        lr: float = 1e-5,
        schedule: Literal["constant", "cosine"] = "cosine",
        warmup: float = 0.1,
        **base,
    ):
        super().__init__(model=model, optimizer=optimizer, lr=lr, schedule=schedule, warmup=warmup, **base)
        backbone = self.model.backbone
        if not hasattr(backbone, "text_features"):
            raise UserError("backbone: has no text tower that reads random sentences (valid: clip)")
        require("sentences", sentences, sentences >= 1, "≥ 1")
        require("length", length, 1 <= length <= backbone.context - 2, f"1 to {backbone.context - 2}")
        require("temperature", temperature, temperature > 0, "> 0")
        require("image_weight", image_weight, image_weight >= 0, "≥ 0")
        require("text_weight", text_weight, text_weight >= 0, "≥ 0")
        require("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "in [0, 1)")
        self.sentences, self.length, self.temperature = sentences, length, temperature
        self.image_weight, self.text_weight, self.label_smoothing = image_weight, text_weight, label_smoothing
        self.teacher: Any = Frozen(self.model)
        # Z: no buffer, which DDP by default sends to all processes in every forward pass.
        self.anchors = nn.Parameter(torch.zeros(sentences, backbone.embed_dim), requires_grad=False)
        self.register_buffer("seed", torch.randint(2**31, ()))  # equal on all processes, which were seeded alike
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))  # images distilled on in this experience
        self._classes, self._data = list[int](), cast(Data | None, None)  # of this experience

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self._classes = sorted(experience.classes)

    @torch.no_grad()
    def begin(self, experience: Experience) -> None:
        self.teacher.take(self.model)
        self.taken.zero_()
        read, sentences = self.teacher.model.backbone.text_features, self._vocabulary(experience.index)
        self.anchors.copy_(torch.cat([read(part) for part in sentences.split(CHUNK)]))

    def _vocabulary(self, index: int) -> Tensor:
        """V (n, length + 2): uniform over the tokens but the two that begin and end a prompt."""
        prompt = self.model.classes[0]
        ends = [int(prompt[0]), int(prompt[prompt >= 0][-1])]
        words = torch.tensor([i for i in range(self.model.backbone.vocabulary) if i not in ends])
        draw = torch.Generator().manual_seed(int(self.seed) + index)
        drawn = words[torch.randint(len(words), (self.sentences, self.length), generator=draw)]
        return F.pad(F.pad(drawn, (1, 0), value=ends[0]), (0, 1), value=ends[1]).to(prompt.device)

    def training_data(self, experience: Experience) -> Data:
        self._data = super().training_data(experience)
        return self._data

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        classes = torch.tensor(self._classes, device=y.device)
        targets, smooth = torch.searchsorted(classes, y), self.label_smoothing
        logits = self.model.among(x, classes)  # (B, C)
        loss = self.mean(F.cross_entropy(logits, targets, reduction="none", label_smoothing=smooth))
        if not (self.image_weight or self.text_weight):
            return loss
        images = self._drawn()
        with torch.no_grad():
            target = self._similarities(self.teacher.model, images)
        found, t = self._similarities(self.model, images), self.temperature  # (B, n)
        by_image = self.mean(cross_entropy(found / t, target / t))
        columns, aims = (of_all(rows, self.world_size).T / t for rows in (found, target))  # (n, B of all processes)
        by_text = cross_entropy(columns, aims).mean()
        return loss + t**2 * (self.image_weight * by_image + self.text_weight * by_text)

    def _drawn(self) -> Tensor:
        """x' (B, ...): this process's share of the next images, which come round shuffled, not augmented."""
        assert self._data is not None
        device, whole = self._data.inputs.device, self.global_batch
        places = rounds(len(self._data), int(self.taken), whole, int(self.seed), device)
        self.taken += whole
        with evaluating(self):
            return self.prepare(self._data.batch(places.tensor_split(self.world_size)[self.rank])[0])

    def _similarities(self, model: Any, images: Tensor) -> Tensor:
        """S (B, n), in single precision at least."""
        features = model.backbone.features(images)
        with torch.autocast(features.device.type, enabled=False):
            return wide(model.backbone.scale() * features) @ self.anchors.T

    def end(self, experience: Experience) -> None:
        self._data = None
