"""Real models through clplat and by hand: ViT-tiny and MiniLM, each naive, ER and LoRA.

ViT-tiny (digits, 17 tokens) starts from random weights, MiniLM from those of the data root's `weights/`, on random
texts of one length. Where they are not there its figures are left out, which is said.
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
from benchmarks.timing import Row

METHODS, LIMIT = ("naive", "er", "lora"), 1 / 0.97  # of the time of a step: 0.97 of the throughput
CPU = torch.device("cpu")
ENCODER = "minilm_l6"


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


def steps(name: str, make: Callable[[], tuple[Pair, Work]], quick: bool) -> list[Row]:
    """A row for each method, each with a model of its own."""
    found = []
    for method in METHODS:
        pair, work = make()
        both = sides(pair, method, work, replay=work.batch // 2)
        found.append(compare(f"step, {name}, {method}", *both, None if quick else LIMIT))
        print(f"{found[-1].name}: {found[-1].median:.3f}", file=sys.stderr, flush=True)
    return found


def rows(quick: bool = False) -> list[Row]:
    """A row for each model and method; `quick` takes small ones with random weights."""
    found, path = steps("vit_tiny", lambda: vit(quick), quick), None if quick else folder(ENCODER)
    if quick or path is not None:
        found += steps("minilm", lambda: encoder(path, quick), quick)
    return found
