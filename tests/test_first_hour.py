"""The first hour with one's own: from the wheel, in an empty folder of an empty home, by commands and in a notebook.

A strategy and data of one's own (arrays, a folder of pictures, a listing of them), a sweep, exports, a report and a
server; and at each step the figure that one counts oneself is the run's own. The wheel lies unpacked before the
libraries of the tests; neither the checkout nor a variable of clplat's is seen.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file
from test_served_model import served
from test_wheel import installed, wheel  # noqa: F401 - fixtures
from test_wheel import pytestmark as of_a_wheel

pytestmark = [*of_a_wheel, pytest.mark.timeout(600)]  # a minute of work, of which a busy machine makes five

NOTEBOOK = [
    '''
import json
import numpy as np
import onnxruntime
from pathlib import Path
from PIL import Image
import clplat

class Slower(clplat.Strategy):
    """Fine-tuning whose loss is scaled.

    Args:
        scale: > 0.
    """

    kinds = frozenset({clplat.Kind.LEARN})
    paper = "none"

    def __init__(self, *, scale: float = 0.5, **base):
        super().__init__(**base)
        self.scale = scale

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.scale * self.mean(self.losses(x, y))

def tell(what, **figures):
    print(json.dumps({"what": what, **figures}))
''',
    """
data = np.load("points.npz")
train, test = ((data[f"{part}_inputs"], data[f"{part}_labels"]) for part in ("train", "test"))
mine = clplat.run(strategy=Slower, stream={"name": "arrays", "train": train, "test": test, "experiences": 2})
mine
""",
    """
learner = clplat.load(mine.run_dir, strategy=Slower)
right = learner(test[0]).ids.numpy() == test[1]
tell("arrays", run_dir=str(mine.run_dir), row=[float(right[test[1] // 2 == i].mean()) for i in range(2)])
mine.frame()
""",
    """
files = sorted(Path("pictures/test").glob("*/*.png"))
listed = []
for path in ("pictures", "pictures.csv"):
    stream = {"name": "images", "path": path, "experiences": 3}
    listed.append(clplat.run(strategy="er", stream=stream, backbone="cnn", loop={"max_steps": 4}))
    said = clplat.load(listed[-1].run_dir)([Image.open(file) for file in files])
    right = np.array([name == file.parent.name for name, file in zip(said.names, files)])
    row = [float(right[[f.parent.name == c for f in files]].mean()) for c in ("blue", "green", "red")]
    tell(path, run_dir=str(listed[-1].run_dir), row=row)
""",
    """
study = clplat.sweep("study.yaml")
tell("sweep", value=study.best_value, output="searched")
""",
    """
folder = clplat.export(mine.run_dir, to="onnx", strategy=Slower)
graph = onnxruntime.InferenceSession(folder / "model.onnx")
right = graph.run(None, {"inputs": test[0].astype(np.float32)})[0].argmax(1) == test[1]
tell("onnx", run_dir=str(mine.run_dir), row=[float(right[test[1] // 2 == i].mean()) for i in range(2)])
""",
    """
page = clplat.report(*listed, dest="report")
frame = clplat.compare([mine]).frame().set_index("metric")
tell("compared", run_dir=str(mine.run_dir), average=float(frame.loc["average_accuracy", "mean"]))
clplat.list("strategies")
""",
]
EXECUTE = """
import nbclient, nbformat
book = nbformat.v4.new_notebook()
import json, sys
book.cells = [nbformat.v4.new_code_cell(source) for source in json.load(open(sys.argv[1]))]
nbclient.NotebookClient(book, timeout=250, kernel_name="python3").execute()
nbformat.write(book, sys.argv[2])
"""


@pytest.fixture(scope="module")
def home(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:  # noqa: F811
    """A folder with data of one's own and nothing else, and an environment in which clplat is the wheel."""
    folder = tmp_path_factory.mktemp("first_hour")
    draw = np.random.default_rng(0)
    centres, labels = draw.normal(size=(4, 6)) * 2, np.arange(4).repeat(30)
    points = {f"{part}_inputs": centres[labels] + draw.normal(size=(120, 6)) for part in ("train", "test")}
    np.savez(folder / "points.npz", **points, train_labels=labels, test_labels=labels)
    rows = [("path", "label", "split")]
    for part, count in (("train", 8), ("test", 5)):
        for place, name in enumerate(("red", "green", "blue")):
            (folder / "pictures" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 150, (16, 16, 3))
                pixels[..., place] += 100
                rows.append((f"pictures/{part}/{name}/{i}.png", name, part))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / rows[-1][0])
    with open(folder / "pictures.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    study = {"strategy": "er", "stream": {"name": "arrays", "path": "points.npz", "experiences": 2, "validation": 0.2},
             "output": "searched", "loop": {"max_steps": 6},
             "sweep": {"trials": 2, "space": {"strategy.lr": {"low": 0.001, "high": 0.1, "log": True}}}}  # fmt: skip
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    (folder / "home").mkdir()
    return folder, {
        "PATH": os.environ["PATH"],
        "HOME": str(folder / "home"),
        "PYTHONPATH": str(installed),
        "OMP_NUM_THREADS": "1",
    }


def python(home: tuple[Path, dict[str, str]], *argv: str) -> str:
    folder, environment = home
    done = subprocess.run(
        [sys.executable, *argv], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def last_row(run_dir: Path) -> list[float]:
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "complete"
    row = summary["accuracy_matrix"][-1]
    assert max(row) > 0
    return row


def shares(found: Any, labels: Any) -> list[float]:
    """Of what is right of the classes of either experience."""
    return [float((found == labels)[labels // 2 == i].mean()) for i in range(2)]


def test_own_strategy_and_arrays_by_commands_and_served(home: tuple[Path, dict[str, str]]) -> None:
    folder, environment = home
    assert "run it:" in python(home, "-m", "clplat", "new", "strategy", "mine")
    stream = ["--stream", "arrays", "--stream.path", "points.npz", "--stream.experiences", "2"]
    python(home, "-m", "clplat", "run", "--strategy", "mine.py", *stream, "--tracking.model", "true")
    (run_dir,) = (p.parent for p in folder.glob("runs/*/*/summary.json") if p.parent.parent.name.startswith("mine"))
    assert f"exported: {folder / 'out'}" in python(
        home, "-m", "clplat", "export", str(run_dir), "--dest", str(folder / "out")
    )
    data, tensors = np.load(folder / "points.npz"), load_file(folder / "out" / "model.safetensors")
    hidden = data["test_inputs"]
    *layers, head = [
        (tensors[k], tensors[k.replace("weight", "bias")]) for k in sorted(tensors) if k.endswith("weight")
    ]
    for weight, bias in layers:
        hidden = np.maximum(hidden @ weight.T + bias, 0)
    logits = hidden @ head[0].T + head[1]
    assert shares(logits.argmax(1), data["test_labels"]) == pytest.approx(last_row(run_dir))
    sent = json.dumps({"inputs": data["test_inputs"].tolist()}).encode()
    with served(str(run_dir / "model"), "", folder, environment) as address:
        request = urllib.request.Request(address, sent, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            said = np.array([row["id"] for row in json.load(answer)["predictions"]])
    assert shares(said, data["test_labels"]) == pytest.approx(last_row(run_dir))


def test_own_data_sweep_export_and_report_in_a_notebook(home: tuple[Path, dict[str, str]]) -> None:
    folder, _ = home
    (folder / "cells.json").write_text(json.dumps(NOTEBOOK))
    python(home, "-c", EXECUTE, "cells.json", "done.ipynb")
    cells = json.loads((folder / "done.ipynb").read_text())["cells"]
    printed = "".join("".join(o["text"]) for c in cells for o in c["outputs"] if o.get("name") == "stdout")
    told = {f["what"]: f for f in map(json.loads, (line for line in printed.splitlines() if line.startswith("{")))}
    assert told.keys() == {"arrays", "pictures", "pictures.csv", "sweep", "onnx", "compared"}
    for figures in told.values():
        if "row" in figures:
            assert figures["row"] == pytest.approx(last_row(folder / figures["run_dir"]))
    assert told["pictures"]["row"] == told["pictures.csv"]["row"]  # of the same pictures
    row = last_row(folder / told["compared"]["run_dir"])
    assert told["compared"]["average"] == pytest.approx(sum(row) / 2)
    trials = [json.loads(f.read_text()) for f in folder.glob("searched/**/summary.json")]
    assert len(trials) == 2
    assert told["sweep"]["value"] == max(t["metrics"]["average_accuracy"] for t in trials)
    assert (folder / "report" / "report.html").is_file()
    # One line of progress a run, which says at the end what came out; then the result as a table.
    shown = [o for o in cells[1]["outputs"] if o["output_type"] == "display_data"]
    assert len(shown) == 1
    assert "average accuracy" in "".join(shown[0]["data"]["text/plain"])
    assert "<table" in "".join(cells[1]["outputs"][-1]["data"]["text/html"])
