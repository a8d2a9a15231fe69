"""A run of every stream and backbone family, asked in a fresh process: the summary's last row comes of raw inputs."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import ask
from PIL import Image
from test_loaded import last_row, run
from texts import LABELS, write_sets

import clplat
from clplat.config.resolve import resolve
from clplat.run import checkpoint
from clplat.run.build import build_stream
from clplat.stream import Stream

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
SMALL = {"train_per_class": 20, "test_per_class": 8}
MLP = {"name": "mlp", "hidden": [16]}
CNN = {"name": "cnn", "width": 8}


def held_out(result: Any) -> list[tuple[torch.Tensor, list[int], int]]:
    """Inputs as the run's stream holds them, labels and task of each test set."""
    stream: Stream = build_stream(resolve(config=result.run_dir / "config.yaml"))
    return [(*(e.test.all()[0], e.test.targets().tolist()), e.task) for e in stream if e.test is not None]


def as_held(result: Any, folder: Path, told: bool = False) -> None:
    """The last row comes of what the stream holds."""
    tests = held_out(result)
    said = ask(result.run_dir, [(x.numpy(), t if told else None) for x, _, t in tests], folder)
    last_row(result, said, [y for _, y, _ in tests])


def squares(count: int, size: int, seed: int, white: int = 255) -> tuple[np.ndarray, np.ndarray]:
    """Colour pictures (N, size, size, 3) of four classes, told by their mean colour, and labels (N,)."""
    draw, labels = np.random.default_rng(seed), np.arange(count) % 4
    colours = np.array([[0.8, 0.2, 0.2], [0.2, 0.8, 0.2], [0.2, 0.2, 0.8], [0.7, 0.7, 0.1]])[labels]
    noise = draw.uniform(-0.2, 0.2, (count, size, size, 3))
    shown = (colours[:, None, None] + noise).clip(0, 1) * white
    return shown.astype(np.uint8 if white == 255 else np.uint16), labels


# --- arrays and pictures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", ["class", "domain", "rotated", "permuted"])
def test_digits_in_other_guises(scenario: str, tmp_path: Path) -> None:
    if scenario == "domain":  # digits have none: the task is told instead
        stream = {"name": "digits", "scenario": "task", **SMALL}
        result = run(tmp_path, strategy="naive", stream=stream, backbone=MLP, head="taskwise")
        return as_held(result, tmp_path, told=True)
    stream = {"name": "digits", "scenario": scenario, "experiences": 3, **SMALL}
    return as_held(run(tmp_path, strategy="naive", stream=stream, backbone=MLP), tmp_path)


TASKWISE = [{"name": "hnet", "hidden": [8]}, {"name": "dp_hnet", "hidden": 8}, {"name": "lwf"}]


@pytest.mark.parametrize("strategy", TASKWISE, ids=lambda s: s["name"])
@pytest.mark.parametrize("backbone", [MLP, {"name": "vit_micro"}], ids=lambda b: b["name"])
def test_strategies_that_are_told_the_task(strategy: Any, backbone: Any, tmp_path: Path) -> None:
    result = run(tmp_path, strategy=strategy, stream={"name": "digits", "scenario": "task", **SMALL},
                 backbone=backbone, loop={"max_steps": 20})  # fmt: skip
    as_held(result, tmp_path, told=True)


@pytest.mark.parametrize("white", [255, 4095])
def test_arrays_in_the_layout_and_range_of_the_file(white: int, tmp_path: Path) -> None:
    (train, labels), (test, tested) = squares(80, 10, 0, white), squares(40, 10, 1, white)
    file = tmp_path / "squares.npz"
    np.savez(file, train_inputs=train, train_labels=labels, test_inputs=test, test_labels=tested)
    stream = {"name": "arrays", "path": str(file), "experiences": 2} | ({} if white == 255 else {"scale": white})
    result = run(tmp_path, strategy="er", stream=stream, backbone=CNN)
    rows = [np.isin(tested, c) for c in ((0, 1), (2, 3))]
    last_row(result, ask(result.run_dir, [(test[r], None) for r in rows], tmp_path), [tested[r].tolist() for r in rows])
    as_held(result, tmp_path)


@pytest.mark.parametrize("normalize", ["dataset", None])
def test_pictures_in_files_of_other_sizes(normalize: str | None, tmp_path: Path) -> None:
    """Fitted by the run, and normalised by it or by the backbone."""
    paths: dict[int, list[Path]] = {}
    for part, seed in (("train", 0), ("test", 1)):
        for number, (picture, label) in enumerate(zip(*squares(40, 24, seed), strict=True)):
            folder = tmp_path / "own" / part / f"class_{label}"
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{number:03d}.png"
            Image.fromarray(picture).resize((24 + number % 3, 26)).save(path)
            paths.setdefault(int(label), []).append(path) if part == "test" else None
    stream = {"name": "images", "path": str(tmp_path / "own"), "size": 16, "experiences": 2, "normalize": normalize}
    backbone = {"name": "vit_micro"} if normalize else {"name": "resnet20", "normalize": "imagenet"}
    result = run(tmp_path, strategy="naive", stream=stream, backbone=backbone, loop={"max_steps": 20})
    tests = [(paths[a] + paths[b], [a] * 10 + [b] * 10) for a, b in ((0, 1), (2, 3))]
    said = ask(result.run_dir, [([str(p) for p in files], None) for files, _ in tests], tmp_path)
    last_row(result, said, [y for _, y in tests])
    assert set(said[0]["names"]) <= {f"class_{i}" for i in range(4)}


@pytest.mark.parametrize("backbone", ["resnet20", "timm"])
def test_a_known_set_as_its_file_has_it(backbone: str, tmp_path: Path) -> None:
    for part, seed in (("train", 0), ("test", 1)):
        images, labels = squares(80, 32, seed)
        (tmp_path / "cifar10").mkdir(exist_ok=True)
        np.savez(tmp_path / "cifar10" / f"{part}.npz", images=images, labels=labels)
    model = {"name": "timm", "model": "resnet10t"} if backbone == "timm" else {"name": backbone}
    result = run(tmp_path, strategy="naive", stream={"name": "images", "experiences": 2}, backbone=model,
                 data_root=str(tmp_path), loop={"max_steps": 5})  # fmt: skip
    rows = [np.isin(labels, c) for c in ((0, 1), (2, 3))]
    said = ask(result.run_dir, [(images[r], None) for r in rows], tmp_path)
    last_row(result, said, [labels[r].tolist() for r in rows])


@pytest.mark.parametrize("strategy", ["tent", "bn_adapt", "cotta", "source"])
def test_corruptions_after_adapting(strategy: str, tmp_path: Path) -> None:
    stream = {"name": "corruptions", "corruptions": ["gaussian_noise", "contrast"], "samples": 64}
    as_held(run(tmp_path, strategy=strategy, stream=stream, backbone=CNN, loop={"max_steps": 20}), tmp_path)


@pytest.mark.parametrize("deep", [False, True])
def test_huggingface_pictures_and_numbers(deep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package, as the run alone reads the set."""
    pictures, labels = squares(80, 20, 0)
    shown = [Image.fromarray(p) for p in pictures] if not deep else (pictures[:, ::5, ::5] / 255).tolist()

    class Split(dict):  # type: ignore[type-arg]
        column_names = ("image", "label")
        features = {"label": types.SimpleNamespace(names=["red", "green", "blue", "yellow"])}  # noqa: RUF012

    split, module = Split(image=shown, label=labels.tolist()), types.ModuleType("datasets")
    module.__version__ = "4.1.0"  # type: ignore[attr-defined]
    module.load_dataset = lambda name, config: {"train": split, "test": split}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    stream = {"name": "huggingface", "dataset": "some/set", "experiences": 2} | ({} if deep else {"size": 12})
    result = run(tmp_path, strategy="er", stream=stream, backbone=CNN)
    if deep:
        return as_held(result, tmp_path)
    for number, picture in enumerate(shown):
        picture.save(tmp_path / f"{number:03d}.png")
    rows = [np.flatnonzero(np.isin(labels, c)) for c in ((0, 1), (2, 3))]
    said = ask(result.run_dir, [([str(tmp_path / f"{i:03d}.png") for i in r], None) for r in rows], tmp_path)
    last_row(result, said, [labels[r].tolist() for r in rows])
    assert {n for s in said for n in s["names"]} <= {"red", "green", "blue", "yellow"}
    return None


@pytest.mark.parametrize("strategy", ["retrain", "random_labels", "gradient_ascent"])
def test_unlearning_keeps_the_preprocessing_of_its_base(strategy: str, tmp_path: Path) -> None:
    options = {"experiences": 2, **SMALL}
    stream = {"name": "unlearning", "base_options": options, "count": 1, "positions": "end"}
    as_held(run(tmp_path, strategy=strategy, stream=stream, backbone=MLP), tmp_path)


def test_avalanche(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples as its transformations left them; with a stand-in for the library (its import takes 10 s)."""
    pictures, labels = squares(80, 8, 0)
    left = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    samples = [(x, int(c), 0) for x, c in zip(left, labels, strict=True)]

    def Squares() -> types.SimpleNamespace:
        parts = [[s for s in samples if s[1] in classes] for classes in ((2, 0), (1, 3))]
        stream = [types.SimpleNamespace(dataset=part, task_labels=[0]) for part in parts]
        return types.SimpleNamespace(train_stream=stream, test_stream=stream)

    library = types.ModuleType("avalanche.benchmarks")
    library.Squares = Squares  # type: ignore[attr-defined]
    for name, module in (("avalanche", types.ModuleType("avalanche")), ("avalanche.benchmarks", library)):
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["avalanche"].benchmarks = library  # type: ignore[attr-defined]
    result = run(tmp_path, strategy="er", stream={"name": "avalanche", "benchmark": "Squares"}, backbone=CNN)
    as_held(result, tmp_path)
    with pytest.raises(clplat.UserError, match="pictures: Avalanche's transformations are code"):
        clplat.load(result.run_dir)(Image.new("RGB", (8, 8)))


# --- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("candidates", ["all", "prompt"])
def test_texts_to_choose_answers_for(family: str, candidates: str, tmp_path: Path) -> None:
    sets = write_sets(tmp_path / "sets")
    stream = {"name": "text", "benchmark": "jsonl", "path": str(sets), "tasks": ["color", "size"],
              "candidates": candidates}  # fmt: skip
    backbone = {"name": "language_model", "dim": 16, "depth": 1, "heads": 2, "family": family}
    strategy = {"name": "naive", "optimizer": "adamw", "lr": 1e-2}
    result = run(tmp_path, strategy=strategy, stream=stream, backbone=backbone, loop={"max_steps": 40, "batch_size": 4})
    asked: list[Any] = [([f"{task} {i}?" for i in range(6)], number) for number, task in enumerate(LABELS)]
    if candidates == "all":
        asked = [(texts, None) for texts, _ in asked]
    said = ask(result.run_dir, asked, tmp_path)
    for (answers, share), s in zip(zip(LABELS.values(), result.accuracy_matrix[-1], strict=True), said, strict=True):
        right = [name == answers[i % len(answers)] for i, name in enumerate(s["names"])]
        assert np.mean(right) == pytest.approx(share)
    last_row(result, said, [y for _, y, _ in held_out(result)])


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_answers_that_are_written(family: str, tmp_path: Path) -> None:
    sets = write_sets(tmp_path / "sets")
    stream = {"name": "text", "benchmark": "jsonl", "path": str(sets), "tasks": ["size"],
              "evaluate": "generate", "max_answer": 8}  # fmt: skip
    backbone = {"name": "language_model", "dim": 32, "depth": 1, "heads": 2, "family": family}
    result = run(tmp_path, strategy={"name": "naive", "optimizer": "adamw", "lr": 1e-2}, stream=stream,
                 backbone=backbone, loop={"max_steps": None, "max_epochs": 40, "batch_size": 4})  # fmt: skip
    said = ask(result.run_dir, [([f"size {i}?" for i in range(6)], None)], tmp_path)
    last_row(result, said, [y for _, y, _ in held_out(result)])
    assert set(said[0]["names"]) & set(LABELS["size"])


def test_images_for_clip(tmp_path: Path) -> None:
    """As the sets' files have them, at their own size; grey ones too."""
    parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, grey in (("mnist", True), ("cifar10", False)):
        (tmp_path / name).mkdir()
        for part, seed in (("train", 0), ("test", 1)):
            images, labels = squares(80, 28 if grey else 32, seed)
            parts[name] = (images[..., 0] if grey else images, labels)
            np.savez(tmp_path / name / f"{part}.npz", images=parts[name][0], labels=labels)
    stream = {"name": "clip", "tasks": ["mnist", "cifar10"], "image_size": 32}
    backbone = {"name": "clip", "dim": 16, "depth": 1, "heads": 2}
    result = run(tmp_path, strategy="naive", stream=stream, backbone=backbone, data_root=str(tmp_path),
                 loop={"max_steps": 30})  # fmt: skip
    said = ask(result.run_dir, [(x, None) for x, _ in parts.values()], tmp_path)
    last_row(result, said, [parts["mnist"][1].tolist(), (parts["cifar10"][1] + 4).tolist()])
    as_held(result, tmp_path)


# --- environments -------------------------------------------------------------------------------------------------


def test_an_agent_acts_in_the_environment_itself(tmp_path: Path) -> None:
    """In gymnasium's own environment, in its units, from the seeds of the run's last evaluation."""
    gymnasium = pytest.importorskip("gymnasium", reason="needs the extra rl")
    from clplat.run.interaction import _seed

    loop = {"max_steps": None, "eval_episodes": 2, "eval_every": 150}
    result = run(tmp_path, strategy={"name": "sac", "batch": 16, "random_steps": 30},
                 stream={"name": "rl", "env": "Pendulum-v1", "env_steps": 150},
                 backbone={"name": "actor_critic", "actor_hidden": [8], "critic_hidden": [8]}, loop=loop)  # fmt: skip
    learner, environment, total = clplat.load(result.run_dir), gymnasium.make("Pendulum-v1"), 0.0
    for episode in range(2):
        observation, done = environment.reset(seed=_seed(1, 0, -1 - episode))[0], False
        while not done:
            action = learner(observation)
            assert action.dtype == np.float32
            observation, reward, terminated, truncated, _ = environment.step(action)
            total, done = total + float(reward), terminated or truncated
    state, _ = checkpoint.load_newest(result.run_dir / "checkpoints")
    assert state is not None
    assert total / 2 == pytest.approx(state["record"]["returns"][0]["evaluations"][-1][1])
    assert learner(np.stack([observation] * 3)).shape == (3, 1)
