"""Small sets of text tasks, and the data root's where it is at hand."""

import json
import os
from pathlib import Path

import pytest

LABELS = {"color": ("blue", "red"), "size": ("big", "red", "small")}

ROOT = os.environ.get("CLPLAT_DATA")
needs_data = pytest.mark.skipif(not ROOT or not Path(ROOT, "olora_text").is_dir(), reason="no olora_text at hand")


def write(folder: Path, part: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}.jsonl").write_text("\n".join(json.dumps(r) for r in rows))


def write_sets(folder: Path) -> Path:
    """Two tasks to choose in, which share a label, and one of free text with two right answers a sample."""
    for task, labels in LABELS.items():
        for part, count in (("train", 12), ("test", 6)):
            rows = [{"prompt": f"{task} {i}?", "answer": labels[i % len(labels)]} for i in range(count)]
            write(folder / task, part, rows)
    for part, count in (("train", 30), ("test", 4)):
        rows = [
            {"instruction": "Name it.", "input": f"thing {i}", "output": [f"t{i}", f"it is {i}"]} for i in range(count)
        ]
        write(folder / "free", part, rows)
    return folder
