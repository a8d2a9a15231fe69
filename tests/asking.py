"""Asking a run's learner in a process of its own, where no stream is imported: `python asking.py RUN_DIR QUESTIONS`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

Question = tuple[Any, int | None]  # an array, texts, or paths of pictures; a task


def ask(run_dir: Path, questions: list[Question], folder: Path) -> list[dict[str, Any]]:
    """Class ids and names for the inputs of each question, as a new process finds them.

    Args:
        folder: for files.
    """
    plain = []
    for number, (inputs, task) in enumerate(questions):
        if isinstance(inputs, np.ndarray):
            np.save(folder / f"question_{number}.npy", inputs)
            inputs = f"question_{number}.npy"
        plain.append([inputs, task])
    (folder / "questions.json").write_text(json.dumps(plain, default=str))
    command = [sys.executable, __file__, str(run_dir), str(folder / "questions.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _read(inputs: Any, folder: Path) -> Any:
    if isinstance(inputs, str):
        return np.load(folder / inputs)
    if Path(inputs[0]).suffix == ".png":
        from PIL import Image

        return [Image.open(path) for path in inputs]
    return inputs


def _answer(run_dir: str, file: Path) -> None:
    import clplat

    learner, found = clplat.load(run_dir), []
    for inputs, task in json.loads(file.read_text()):
        said = learner(_read(inputs, file.parent), task)
        found.append({"ids": said.ids.tolist(), "names": said.names})
    assert not [m for m in sys.modules if m.startswith("clplat.streams.")], "a stream was imported"
    print(json.dumps(found))


if __name__ == "__main__":
    _answer(sys.argv[1], Path(sys.argv[2]))
