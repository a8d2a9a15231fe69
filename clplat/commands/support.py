"""What each strategy was seen to do, from recorded tests: `clplat list strategies --support`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Column → what was seen in the conformance suite, or on networks of a family.
COLUMNS = {
    "resume": "a run that is stopped at any step and gone on with ends in the same bits",
    "processes": "two processes end where one does that has their batches together, to 1e-5",
    "fewer_processes": "one process goes on with what two have begun, and ends where one does, to 1e-5",
    "accumulation": "two batches a step end where one of their size does, to 1e-5",
    "mixed": "in bf16-mixed losses end within 5 % of those in 32-true and a tenth of what was learned; what is kept is "
    "in 32 bits",
    "fsdp": "two processes that share the weights out end where one does, to 1e-5",
    "compile": "with passes compiled by torch (aot_eager) a run ends where a plain one does, to 1e-5",
    "convolutional": "the suite passes on a small EfficientNet of timm",
    "transformer": "the suite passes on a small ViT of timm",
    "text_encoder": "the suite passes on a small BERT with a head",
    "clip": "it runs on a small CLIP, classes being words",
    "decoder": "it runs on a small Llama, classes being words",
    "encoder_decoder": "it runs on a small T5, classes being words",
}


def recorded() -> dict[str, dict[str, Any]]:
    """Strategy → column → true where it was seen, or why it is not."""
    found: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("support.json").read_text(encoding="utf-8"))
    return found


def reasons(rows: dict[str, dict[str, Any]]) -> list[str]:
    """All reasons there are, in the order in which a table meets them; a cell is known by its number, from 1."""
    return list(dict.fromkeys(why for cells in rows.values() for why in cells.values() if why is not True))


def cell(row: dict[str, Any], column: str, known: Sequence[str]) -> str:
    """`yes`, the number of the reason, or `?` where nothing was recorded."""
    value = row.get(column)
    return "?" if value is None else "yes" if value is True else str(known.index(value) + 1)


def shown(names: Sequence[str]) -> str:
    """The matrix as lines: a row for each strategy, and the reasons by number."""
    rows = {name: recorded().get(name, {}) for name in names}
    known, first = reasons(rows), max(map(len, names), default=0)
    lines = ["  ".join([" " * first, *COLUMNS])]
    lines += [
        "  ".join([name.ljust(first), *(cell(row, c, known).ljust(len(c)) for c in COLUMNS)]).rstrip()
        for name, row in rows.items()
    ]
    lines += ["", *(f"{name.ljust(max(map(len, COLUMNS)))}  {what}" for name, what in COLUMNS.items()), ""]
    lines += [f"{number:>3}  {why}" for number, why in enumerate(known, 1)]
    if not all(rows.values()):
        lines.append("  ?  not recorded (clplat check NAME looks at it)")
    return "\n".join(lines)
