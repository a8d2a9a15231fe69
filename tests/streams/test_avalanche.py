"""Avalanche benchmarks as streams: with stand-ins (its import takes 10 s), and once with the library itself."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clplat
from clplat.errors import MissingError, UserError
from clplat.streams.avalanche import Avalanche

CLASSES = [(7, 2), (4,), (0, 9)]


class Samples:
    """(inputs, label, task) like Avalanche's data sets; in evaluation mode inputs are as they are."""

    def __init__(self, labels: list[int], kind: str = "tensor", training: bool = True) -> None:
        self.labels, self.kind, self.training = labels, kind, training

    def eval(self) -> Samples:
        return Samples(self.labels, self.kind, training=False)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Any, int, int]:
        value = 10 * self.labels[i] + i + (100 if self.training else 0)
        if self.kind == "image":
            return Image.new("RGB", (5, 4), (value, 0, 0)), self.labels[i], 0
        return torch.full((2, 3), float(value)), self.labels[i], 0


def benchmark(classes=CLASSES, *, tasks: bool = False, tests=None, kind: str = "tensor") -> SimpleNamespace:
    def stream(groups: list, each: int) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(dataset=Samples([c for c in g for _ in range(each)], kind), task_labels=[i if tasks else 0])
            for i, g in enumerate(groups)
        ]

    return SimpleNamespace(train_stream=stream(classes, 5), test_stream=stream(tests or classes, 2))


def test_samples_are_read_once_in_evaluation_mode() -> None:
    stream = Avalanche(benchmark=benchmark())
    assert [len(e.train) for e in stream] == [10, 5, 10]
    assert [len(e.test) for e in stream] == [4, 2, 4]
    assert all(e.train.inputs is stream[0].train.inputs for e in stream)
    inputs, labels = stream[1].train.all()
    assert inputs[:, 0, 0].tolist() == [40.0, 41.0, 42.0, 43.0, 44.0]
    assert stream.class_names == ("2", "7", "4", "0", "9")
    assert labels.tolist() == [2] * 5
    assert [e.classes for e in stream] == [(0, 1), (2,), (3, 4)]
    assert [stream.class_names[c] for c in stream[2].test.targets().tolist()] == ["0", "0", "9", "9"]
    assert stream.input_shape == (2, 3)


def test_images_become_bytes() -> None:
    stream = Avalanche(benchmark=benchmark([(0, 1)], kind="image"))
    assert stream[0].train.inputs.dtype == torch.uint8
    assert stream.input_shape == (3, 4, 5)
    assert stream[0].train.inputs[7, :, 1, 1].tolist() == [17, 0, 0]


def test_task_is_known_where_the_labels_differ() -> None:
    assert not Avalanche(benchmark=benchmark()).task_known
    stream = Avalanche(benchmark=benchmark(tasks=True))
    assert stream.task_known
    assert [e.task for e in stream] == [0, 1, 2]


def test_one_test_set_for_all_is_shared_out_by_class() -> None:
    stream = Avalanche(benchmark=benchmark(tests=[(7, 2, 4, 0, 9)]))
    assert [set(e.test.targets().tolist()) for e in stream] == [{0, 1}, {2}, {3, 4}]
    assert sum(len(e.test) for e in stream) == 10


def test_validation_is_held_out() -> None:
    stream = Avalanche(benchmark=benchmark(), validation=0.2, seed=1)
    assert [len(e.valid) for e in stream] == [2, 1, 2]
    for experience, whole in zip(stream, Avalanche(benchmark=benchmark()), strict=True):
        both = experience.train.rows.tolist() + experience.valid.rows.tolist()
        assert sorted(both) == whole.train.rows.tolist()


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(UserError, match=r"3 training and 2 test experiences"):
        Avalanche(benchmark=benchmark(tests=[(7, 2), (4,)]))
    with pytest.raises(UserError, match=r"test labels \[5\] are not trained on"):
        Avalanche(benchmark=benchmark(tests=[(7, 2), (5,), (0, 9)]))
    with pytest.raises(UserError, match=r"stream\.validation: 1 is out of range"):
        Avalanche(benchmark=benchmark(), validation=1)
    with pytest.raises(UserError, match=r"stream\.options: has no meaning with a finished benchmark"):
        Avalanche(benchmark=benchmark(), options={"n_experiences": 2})
    mixed = benchmark()
    mixed.train_stream[1].dataset.kind = "image"
    with pytest.raises(UserError, match=r"samples of \(2, 3\) float32 and \(3, 4, 5\) uint8"):
        Avalanche(benchmark=mixed)


# --- by name ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Calls of a stand-in SplitMNIST, which seeds torch's global generator as the real one does."""
    made: list[dict] = []

    def SplitMNIST(n_experiences: int, *, seed: int | None = None, dataset_root: str | None = None):
        made.append({"n_experiences": n_experiences, "seed": seed, "dataset_root": dataset_root})
        torch.manual_seed(99)
        if n_experiences == 7:
            raise ValueError("7 does not divide 10")
        if n_experiences == 8:
            raise RuntimeError("Dataset not found")
        return benchmark()

    package, module = types.ModuleType("avalanche"), types.ModuleType("avalanche.benchmarks")
    package.benchmarks = module  # type: ignore[attr-defined]
    module.SplitMNIST = SplitMNIST  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "avalanche", package)
    monkeypatch.setitem(sys.modules, "avalanche.benchmarks", module)
    monkeypatch.delenv("CLPLAT_DATA", raising=False)
    return made


def test_seed_and_data_root_are_passed_on(calls: list[dict]) -> None:
    before = torch.get_rng_state()
    Avalanche(benchmark="SplitMNIST", options={"n_experiences": 3}, seed=4, data_root="/data")
    Avalanche(benchmark="SplitMNIST", options={"n_experiences": 3, "seed": 8})
    assert calls == [
        {"n_experiences": 3, "seed": 4, "dataset_root": "/data"},
        {"n_experiences": 3, "seed": 8, "dataset_root": None},
    ]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("SplitMINST", {}, UserError, r"'SplitMINST' is not in avalanche\.benchmarks \(nearest: SplitMNIST\)"),
        ("SplitMNIST", {}, UserError, r"stream\.options: missing a required argument.*\(valid for SplitMNIST: n_exp"),
        ("SplitMNIST", {"n_experiences": 3, "x": 1}, UserError, r"stream\.options: got an unexpected keyword"),
        ("SplitMNIST", {"n_experiences": 7}, UserError, r"SplitMNIST refuses .*7 does not divide 10"),
        ("SplitMNIST", {"n_experiences": 8}, MissingError, r"the data of SplitMNIST could not be had"),
    ],
)
def test_names_the_fault(calls: list[dict], name: str, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Avalanche(benchmark=name, options=options)


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "avalanche", None)
    monkeypatch.setitem(sys.modules, "avalanche.benchmarks", None)
    with pytest.raises(UserError, match=r"pip install 'clplat\[avalanche\]'"):
        Avalanche()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_benchmark_of_the_library_itself() -> None:
    pytest.importorskip("avalanche", reason="avalanche-lib is not installed: clplat[avalanche]")
    from avalanche.benchmarks import class_incremental_benchmark
    from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_tensor_classification_dataset

    rng = np.random.default_rng(0)
    inputs, labels = torch.from_numpy(rng.normal(size=(60, 1, 4, 4))).float(), torch.arange(60) % 6
    dataset = _make_taskaware_tensor_classification_dataset(inputs, labels)
    made = class_incremental_benchmark(
        {"train": dataset, "test": dataset}, num_experiences=3, class_order=[5, 0, 3, 1, 4, 2]
    )
    stream = Avalanche(benchmark=made)
    assert [sorted(stream.class_names[c] for c in e.classes) for e in stream] == [["0", "5"], ["1", "3"], ["2", "4"]]
    found = {}
    for experience in stream:
        for x, y in zip(*experience.train.all(), strict=True):
            found[tuple(x.flatten().tolist())] = int(stream.class_names[int(y)])
    assert found == {tuple(x.flatten().tolist()): int(y) for x, y in zip(inputs, labels, strict=True)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_takes_a_benchmark_of_the_library_as_its_stream(tmp_path: Path) -> None:
    """Given as it is to `clplat.run`: one experience a step of the benchmark, with its classes and samples."""
    pytest.importorskip("avalanche", reason="avalanche-lib is not installed: clplat[avalanche]")
    from avalanche.benchmarks import class_incremental_benchmark
    from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_tensor_classification_dataset

    inputs, labels = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 6
    dataset = _make_taskaware_tensor_classification_dataset(inputs, labels)
    order = [5, 0, 3, 1, 4, 2]
    made = class_incremental_benchmark({"train": dataset, "test": dataset}, num_experiences=3, class_order=order)
    plain: dict[str, Any] = {"tracking": {"enabled": False}, "loop": {"max_steps": 2}, "output": str(tmp_path)}
    result = clplat.run({**plain, "strategy": "naive", "backbone": "mlp"}, stream=made, quiet=True)
    learner = clplat.load(result.run_dir)
    met = [[learner.classes[c] for c in e.classes] for e in learner.of_run.experiences]
    assert [sorted(names) for names in met] == [sorted(map(str, order[i : i + 2])) for i in (0, 2, 4)]
    for j, names in enumerate(met):
        own = torch.isin(labels, torch.tensor([int(n) for n in names]))
        found = learner.predict(inputs[own])[:, : len(learner.classes)].argmax(1)
        right = [learner.classes[int(i)] == str(int(y)) for i, y in zip(found, labels[own], strict=True)]
        assert sum(right) / len(right) == pytest.approx(result.accuracy_matrix[-1][j])


def test_classes_and_tasks_of_any_size_are_numbered_densely() -> None:
    made = benchmark([(7, 10**12), (4,)], tasks=True)
    for experience, task in zip(made.train_stream, (10**15, 3), strict=True):
        experience.task_labels = [task]
    stream = Avalanche(benchmark=made)
    assert stream.class_names == ("7", str(10**12), "4")
    assert [e.classes for e in stream] == [(0, 1), (2,)]
    assert [e.task for e in stream] == [0, 1]
    made.train_stream[1].task_labels = [3, 5]
    with pytest.raises(UserError, match=r"experience 1 holds tasks \[3, 5\] \(valid: one task an experience"):
        Avalanche(benchmark=made)


def test_labels_are_not_cut_to_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Samples, "__getitem__", lambda self, i: (torch.zeros(2), self.labels[i] + 0.5, 0))
    with pytest.raises(UserError, match=r"label 7\.5 is no integer"):
        Avalanche(benchmark=benchmark())


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (Image.fromarray(np.eye(4, dtype=np.uint8) * 200), torch.eye(4)[None] * 200),
        (Image.fromarray(np.eye(4, dtype=np.uint16) * 65535), torch.eye(4)[None]),
        (Image.new("P", (2, 2)), torch.zeros(3, 2, 2)),
        (Image.fromarray(np.eye(4, dtype=np.uint16) * 4095), r"up to 4095, not 65535 \(valid: "),
        (np.full((4, 4, 3), 255, np.uint8), torch.full((3, 4, 4), 255.0)),
        (np.full((3, 4, 4), 65535, np.uint16), torch.ones(3, 4, 4)),
        (np.ones((3, 4, 4), np.int64), "int64 from 1 to 1, whose range is not known"),
        (np.ones((3, 4, 4), np.float64), torch.ones(3, 4, 4)),
        (np.ones((4, 5), np.float32), torch.ones(1, 4, 5)),
        (np.ones(7), torch.ones(7)),
        (torch.ones(7, dtype=torch.float64), torch.ones(7)),
        (np.ones((3, 5, 3)), r"the channels of \(3, 5, 3\) can't be told"),
    ],
    ids=[
        "image",
        "16_bits",
        "palette",
        "12_bits",
        "last",
        "words",
        "integers",
        "first",
        "grey",
        "row",
        "tensor",
        "odd",
    ],
)
def test_samples_of_every_sort(monkeypatch: pytest.MonkeyPatch, sample: Any, expected: Any) -> None:
    monkeypatch.setattr(Samples, "__getitem__", lambda self, i: (sample, self.labels[i], 0))
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            Avalanche(benchmark=benchmark())
        return
    inputs = Avalanche(benchmark=benchmark())[0].train.inputs
    assert inputs.dtype in (torch.uint8, torch.float32)
    assert torch.equal(inputs[3].float(), expected)


def test_twelve_bits_are_divided_by_what_is_white(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.fromarray(np.eye(4, dtype=np.uint16) * 4095)
    monkeypatch.setattr(Samples, "__getitem__", lambda self, i: (picture, self.labels[i], 0))
    stream = Avalanche(benchmark=benchmark(), scale=4095)
    assert torch.equal(stream[0].train.inputs[0], torch.eye(4)[None])
    assert stream.preprocessing().white == 4095
