"""Real models through clplat and by hand: steps of ViT-tiny, MiniLM and EfficientNet-Lite0, evaluation of the last two.

ViT-tiny (digits, 17 tokens) starts from random weights, the others from those of the data root's `weights/`, on random
texts of one length and random images. Where they are not there their figures are left out, which is said. Steps are of
naive, ER and LoRA, which does not apply to EfficientNet's convolutions.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.in_turn import Work, compare
from benchmarks.networks import Images, Pair, Texts, prompts, sides, with_head
from benchmarks.timing import Row, clock, paired
from clplat.run.allocation import keep_freed

METHODS, LIMIT = ("naive", "er", "lora"), 1 / 0.97  # of the time of a step: 0.97 of the throughput
EVALUATION = 1.03
CPU = torch.device("cpu")
ENCODER, CONVOLUTIONS = "minilm_l6", "efficientnet_lite0"


def folder(name: str) -> Path | None:
    """Where a model's weights are, if they are."""
    path = Path(os.environ.get("CLPLAT_DATA", ".data")) / "weights" / name
    if not (path / "model.safetensors").is_file():
        print(f"{path} is not there: its figures are left out", file=sys.stderr)
        return None
    return path


def vit(quick: bool) -> tuple[Pair, Work]:
    from benchmarks.hand import digits
    from clplat.backbones.vit import vit_tiny

    torch.manual_seed(0)
    x, y = digits()
    size = 64 if quick else 256
    pair = with_head(vit_tiny((1, 8, 8), depth=1 if quick else 12), 10, Images, CPU)
    return pair, Work((x[:size], y[:size]), 10, 32, CPU, rounds=1 if quick else 7)


def encoder(path: Path | None, quick: bool) -> tuple[Pair, Work]:
    from clplat.backbones.text_encoder import text_encoder

    torch.manual_seed(0)
    options: dict[str, Any] = {"vocabulary": 1000} if path is None else {"weights": str(path)}
    pair = with_head(text_encoder((2, 48), **options), 4, Texts, CPU)
    return pair, Work(prompts(32 if quick else 96, 48, 1000, 4), 4, 16, CPU, rounds=1 if quick else 5)


def convolutions(path: Path | None, quick: bool) -> tuple[Pair, Work]:
    """EfficientNet-Lite0 at its 224 pixels, whose weights want images about zero."""
    from clplat.backbones.timm import timm

    torch.manual_seed(0)
    size = 32 if path is None else 224
    options: dict[str, Any] = {"model": "test_efficientnet"} if path is None else {"weights": str(path)}
    pair = with_head(timm((3, size, size), **options), 10, Images, CPU)
    if path is not None:
        pair.prepare = lambda x: (x - 0.5) / 0.5
    drawn = torch.Generator().manual_seed(0)
    n = 16 if quick else 64
    data = torch.rand(n, 3, size, size, generator=drawn), torch.randint(10, (n,), generator=drawn)
    return pair, Work(data, 10, 8 if quick else 16, CPU, rounds=1 if quick else 5)


def steps(
    name: str, make: Callable[[], tuple[Pair, Work]], quick: bool, methods: tuple[str, ...] = METHODS
) -> list[Row]:
    """A row for each method, each with a model of its own."""
    found = []
    for method in methods:
        pair, work = make()
        both = sides(pair, method, work, replay=work.batch // 2)
        found.append(compare(f"step, {name}, {method}", *both, None if quick else LIMIT))
        print(f"{found[-1].name}: {found[-1].median:.3f}", file=sys.stderr, flush=True)
    return found


def evaluated(name: str, pair: Pair, work: Work, predict: Callable[[Any], Any], limit: float | None) -> Row:
    """Evaluation of all samples of `work` next to a loop over them, in which `predict` gives classes (B,)."""
    from clplat import Data, Experience, Kind, Stream
    from clplat.run.evaluation import Evaluator
    from clplat.strategies.naive import Naive

    (x, y), read = work.data, clock(CPU)
    test = Experience(0, "test", Kind.LEARN, None, test=Data(x, y), classes=tuple(range(work.classes)))
    stream = Stream([test], num_classes=work.classes, input_shape=tuple(x.shape[1:]))
    evaluator, strategy = Evaluator(stream, device=CPU, batch_size=work.batch), Naive(model=pair.model)
    times, right = ([], []), [0.0, 0.0]

    def ours() -> float:
        return float(evaluator(strategy)[0] or 0.0)

    @torch.no_grad()
    def by_hand() -> float:
        parts = zip(x.split(work.batch), y.split(work.batch), strict=True)
        return sum(float((predict(a) == b).float().sum()) for a, b in parts) / len(y)

    pair.net.eval()
    for number in range(work.rounds + 1):
        for side in (0, 1) if number % 2 else (1, 0):
            started = read()
            right[side] = (ours, by_hand)[side]()
            if number:
                times[side].append((read() - started) / len(y))
    note = f"{work.classes} classes; accuracy {right[0]:.3f} and {right[1]:.3f}"
    row = paired(name, "ms", *times, "ratio", limit, note)
    print(f"{row.name}: {row.median:.3f}", file=sys.stderr, flush=True)
    return row


def _by_head(name: str, pair: Pair, work: Work, quick: bool) -> Row:
    limit = None if quick else EVALUATION
    return evaluated(f"evaluation, a sample, {name}", pair, work, lambda x: pair.net(pair.prepare(x)).argmax(1), limit)


def rows(quick: bool = False) -> list[Row]:
    """A row for each model and method, and for evaluation; `quick` takes small ones with random weights."""
    keep_freed()  # as every run does; without it EfficientNet's steps take the system's time for pages, on both sides
    found, path = steps("vit_tiny", lambda: vit(quick), quick), None if quick else folder(ENCODER)
    if quick or path is not None:
        found += steps("minilm", lambda: encoder(path, quick), quick)
        found.append(_by_head("minilm", *encoder(path, quick), quick))
    path = None if quick else folder(CONVOLUTIONS)
    if quick or path is not None:
        found += steps("efficientnet", lambda: convolutions(path, quick), quick, ("naive", "er"))
        found.append(_by_head("efficientnet", *convolutions(path, quick), quick))
    return found
