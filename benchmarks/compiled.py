"""A step with the blocks of the backbone compiled (`fabric.compile`), next to one without: where it pays.

Compiling itself, a minute or so, is in the turn that is not counted. ViT-tiny and MiniLM as in `real.py`.
"""

from __future__ import annotations

import copy
import sys

from benchmarks.in_turn import Ours, compare
from benchmarks.real import ENCODER, encoder, folder, vit
from benchmarks.timing import Row


def rows(quick: bool = False) -> list[Row]:
    """A row for each model; `quick` takes a small ViT."""
    from clplat.run.compiling import compile_passes
    from clplat.strategies.naive import Naive

    found, path = [], None if quick else folder(ENCODER)
    made = [("vit_tiny", *vit(quick)), *([("minilm", *encoder(path, quick))] if path is not None else [])]
    for name, pair, work in made:
        plain = Ours(Naive(model=copy.deepcopy(pair.model), lr=1e-4), work)
        compile_passes(pair.model.backbone)
        found.append(compare(f"step, {name}, compiled", Ours(Naive(model=pair.model, lr=1e-4), work), plain))
        print(f"{found[-1].name}: {found[-1].median:.3f}", file=sys.stderr, flush=True)
    return found
