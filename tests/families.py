"""Tiny streams for models that know their classes by words, and the models: CLIP, a decoder, an encoder-decoder; and an
encoder of texts with a head, whose stream tells ids of classes alone.

Shapes: N samples of a pool, L tokens of a prompt, C = 4 classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clplat import Data, Experience, Kind, Stream
from clplat.backbones.clip import clip
from clplat.backbones.heads import Growing
from clplat.backbones.language_model import language_model
from clplat.backbones.text_encoder import text_encoder
from clplat.run.build import seed_everything
from clplat.stream import Answers
from clplat.testing import Subject

CLASSES, END, IDS, LENGTH, SIDE, PER_CLASS = 4, 2, 40, 9, 16, 6
WORDS = torch.tensor([[5, 6, END], [7, END, -1], [8, 9, END], [10, 5, END]])  # of each class, (C, A)


class Told(Stream):
    """Two experiences of two classes, and then, if asked for, one of them to forget; half of each class to test.

    Args:
        inputs: (N, ...), PER_CLASS of each class in turn.
        forget: the class to erase at the end; None: none.
        labels: (N, A) where answers are free text; None: class ids.
    """

    def __init__(self, inputs: torch.Tensor, forget: int | None, labels: torch.Tensor | None = None) -> None:
        ids = torch.arange(len(inputs)) // PER_CLASS
        given = ids if labels is None else labels
        test = torch.arange(len(inputs)) % 2 == 0

        def part(classes: tuple[int, ...]) -> dict[str, Any]:
            mine = torch.isin(ids, torch.tensor(classes))
            train, held = (Data(inputs, given, (mine & half).nonzero()[:, 0]) for half in (~test, test))
            return {"train": train, "test": held, "classes": classes if labels is None else ()}

        made = [Experience(k, f"e{k}", Kind.LEARN, task=k, **part((2 * k, 2 * k + 1))) for k in range(2)]
        if forget is not None:
            named, erased = ((f"class:{forget}",), (forget,)) if labels is None else (("experience:e0",), (0, 1))
            asked = {"request": named, "task": forget // 2}
            made.append(Experience(2, "forget", Kind.FORGET, **part(erased), **asked))
        classes = WORDS if labels is None else WORDS[:0, :0]
        super().__init__(made, num_classes=len(classes), input_shape=tuple(inputs.shape[1:]))
        self.answers = Answers(classes, END, IDS, new_tokens=0 if labels is None else 3)

    def score(self, predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Free text is right if each token is."""
        if labels.ndim == 1:
            return super().score(predictions, labels)
        written = labels.masked_fill(labels == END, -1)[:, : predictions.shape[1]]
        return (written == predictions[:, : written.shape[1]]).all(1).float()


class Sorted:
    """The `writing` of texts: what asks for an answer in other words is its tokens, sorted.

    Args:
        score: the stream's.
    """

    def __init__(self, score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.score = score

    def rewriting(self, labels: torch.Tensor, form: str, most: float) -> tuple[torch.Tensor, torch.Tensor]:
        """All of the samples, (B,), and inputs (B, 2, A)."""
        prompts = labels.sort(descending=True).values.int()
        return torch.arange(len(labels)), torch.stack([prompts, torch.full_like(prompts, -1)], 1)


def pictures(forget: int | None = None) -> Told:
    """Images (3, SIDE, SIDE) of four colours."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.arange(CLASSES * PER_CLASS) // PER_CLASS
    colour = torch.randn(CLASSES, 3, generator=draw)[ids]
    return Told(colour[:, :, None, None] + 0.1 * torch.randn(len(ids), 3, SIDE, SIDE, generator=draw), forget)


def texts(forget: int | None = None, free: bool = False, named: bool = False) -> Told:
    """Prompts whose first word tells the class, of 4 to LENGTH tokens.

    Args:
        free: answers are token ids, and no classes.
        named: a prompt names two classes to choose from, its own and the other of its experience.
    """
    draw = torch.Generator().manual_seed(0)
    ids = torch.arange(CLASSES * PER_CLASS) // PER_CLASS
    prompts = torch.randint(20, IDS, (len(ids), LENGTH), generator=draw)
    prompts[:, 0] = 12 + ids
    prompts[torch.arange(LENGTH) >= torch.randint(4, LENGTH + 1, (len(ids), 1), generator=draw)] = -1
    choice = torch.full_like(prompts, -1)
    if named:
        choice[:, 0], choice[:, 1] = ids // 2 * 2, ids // 2 * 2 + 1
    stream = Told(torch.stack([prompts, choice], 1).int(), forget, WORDS[ids] if free else None)
    stream.writing = Sorted(stream.score) if free else None
    return stream


def labelled(forget: int | None = None) -> Told:
    """Texts as in `texts`, whose classes have no words."""
    stream = texts(forget)
    stream.answers = Answers(torch.empty(0, 0, dtype=torch.int64), END, IDS)
    return stream


def adapting(family: str, learns: bool) -> Stream:
    """All test sets of a family's stream to adapt to, after its experiences if it `learns`."""
    told = ALL[family]()
    data = Data(told[0].test.inputs, told[0].test.labels)
    last = Experience(2 * learns, "adapt", Kind.ADAPT, data, classes=tuple(range(CLASSES)))
    stream = Stream([*(told if learns else ()), last], num_classes=CLASSES, input_shape=told.input_shape)
    stream.answers = told.answers
    return stream


STREAMS = {"clip": pictures, "llama": texts, "t5": texts}  # of models whose classes are words
ALL = {**STREAMS, "encoder": labelled}


def model(family: str, stream: Stream, **options: Any) -> Any:
    """The tiny model of a family, with random weights, for a stream."""
    depth = 2 if family == "encoder" else 1
    size = {"dim": 16, "depth": depth, "heads": 2, "vocabulary": IDS, **options}
    if family == "clip":
        return clip(stream.input_shape, **size).assemble(None, stream.answers)
    if family == "encoder":
        backbone = text_encoder(stream.input_shape, **size)
        return backbone.assemble(Growing(backbone.embed_dim, CLASSES), stream.answers)
    return language_model(stream.input_shape, family=family, **size).assemble(None, stream.answers)


@dataclass
class OnFamily(Subject):
    """A strategy on the tiny model and stream of a family, without dropout, which processes draw apart."""

    family: str = ""

    def stream(self, *args: Any, **how: Any) -> Any:
        return ALL[self.family]()

    def build(self, stream: Any, seed: int = 0, **options: Any) -> Any:
        seed_everything(seed)
        made = model(self.family, stream)
        for module in made.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        return self.cls(model=made, **(options or self.options()))
