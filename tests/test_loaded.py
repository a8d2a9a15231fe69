"""A loaded learner: raw inputs in, the run's own predictions out, without the run's stream."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import ask
from PIL import Image

import clplat
from clplat import Kind, Strategy
from clplat.config.resolve import resolve
from clplat.data.raw import Raw
from clplat.errors import UserError
from clplat.preprocessing import Preprocessing
from clplat.run.build import build
from clplat.streams.digits import Digits

BASE: dict[str, Any] = {"tracking": {"enabled": False}, "fabric": {"accelerator": "cpu"}, "seed": 0}


def run(folder: Path, loop: dict[str, Any] | None = None, **config: Any) -> Any:
    loop = {"max_steps": 60, "checkpoint_seconds": None} | (loop or {})
    return clplat.run({**BASE, **config, "loop": loop, "output": str(folder)}, quiet=True)


def last_row(result: Any, said: list[dict[str, Any]], labels: list[list[int]]) -> None:
    """What was said is right as often as the run's last evaluation says, of which not all is alike."""
    shares = [np.mean(np.array(s["ids"]) == np.array(y)) for s, y in zip(said, labels, strict=True)]
    row = [value for value in result.accuracy_matrix[-1] if value is not None]
    assert shares == pytest.approx(row, abs=1e-9)
    assert max(row) > 0


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(tmp_path_factory.mktemp("digits"), strategy="er", stream={"name": "digits", "class_order": "shuffled"},
               backbone={"name": "mlp", "hidden": [32]})  # fmt: skip


@pytest.fixture
def learner(digits: Any) -> Any:
    return clplat.load(digits.run_dir)


def test_a_fresh_process_gets_the_last_row_from_raw_digits(digits: Any, tmp_path: Path) -> None:
    """Integers from 0 to 16 in the rows and columns of the file, where the stream holds floats with a channel."""
    tests = [e.test.all() for e in Digits(seed=0, class_order="shuffled")]
    raw: list[Any] = [((x[:, 0] * 16).byte().numpy(), None) for x, _ in tests]
    said = ask(digits.run_dir, raw, tmp_path)
    last_row(digits, said, [y.tolist() for _, y in tests])
    names = Digits(seed=0, class_order="shuffled").class_names
    assert all(s["names"] == [names[i] for i in s["ids"]] for s in said)


def test_every_form_of_an_input_is_the_same_input(learner: Any) -> None:
    x = Digits(seed=0)[0].test.all()[0][:5]
    whole = (x * 16).round()
    expected = learner(x)
    forms = [x.numpy(), x[:, 0].double(), whole.int(), whole[:, 0].numpy().astype(np.uint8), list(x),
             whole.permute(0, 2, 3, 1).long(), [row.numpy() for row in whole.short()], x.half()]  # fmt: skip
    for form in forms:
        assert torch.equal(learner(form).scores, expected.scores)
    torch.testing.assert_close(learner(x[2]).scores, expected.scores[2:3])
    assert torch.equal(learner.predict(learner.prepare(whole.byte())), expected.scores)
    pictures = [Image.fromarray((row[0] * 255).round().byte().numpy()) for row in x]
    torch.testing.assert_close(learner.prepare(pictures), x, rtol=0, atol=1 / 255)
    assert torch.equal(learner.prepare([p.convert("RGB") for p in pictures]), learner.prepare(pictures))
    assert copy.deepcopy(learner)(x).names == expected.names


def test_it_names_what_it_predicts(learner: Any) -> None:
    assert learner.classes == Digits(seed=0, class_order="shuffled").class_names
    said = learner(torch.rand(3, 8, 8))
    assert said.names == [learner.classes[i] for i in said.ids.tolist()]
    assert repr(said) == f"Predictions of 3: {', '.join(said.names)}"
    assert said.scores.shape == (3, 10)
    assert len(learner(torch.empty(0, 1, 8, 8))) == 0


@pytest.mark.parametrize(
    ("inputs", "fault"),
    [
        (
            torch.rand(2, 8, 8) * 16,
            r"float32 from .* whose range is not that of this run \(valid: pictures; int",
        ),
        (np.full((2, 8, 8), 200, np.uint8), r"uint8 from 200 to 200, whose range"),
        (np.full((2, 8, 8), -1), r"int64 from -1 to -1, whose range"),
        (torch.rand(2, 9, 9), r"float32 \(2, 9, 9\) \(valid: .*1x8x8\), one or several"),
        (torch.full((1, 8, 8), torch.nan), "hold NaN"),
        (["a digit"], "text, but this run does not take it"),
        ([Image.new("L", (8, 8)), "a digit"], "a list of pictures and text"),
        (Image.new("L", (9, 8)), r"picture 0 has 9x8 pixels, and this run scaled none \(valid: 8x8\)"),
        (object(), r"inputs: object \(valid: numbers"),
        ([np.zeros((8, 8)), np.zeros((9, 9))], "are of several shapes"),
    ],
    ids=["range", "white", "negative", "shape", "nan", "text", "mixed", "size", "object", "ragged"],
)
def test_what_cannot_be_read_as_the_run_did_is_refused(learner: Any, inputs: Any, fault: str) -> None:
    with pytest.raises(UserError, match=fault) as refused:
        learner(inputs)
    assert len(refused.value.faults) == 1


class Crowded(Strategy):
    """Has attributes and a method that are called as one may call those of a loaded learner."""

    kinds = frozenset({Kind.LEARN})
    paper = "none"

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        self.classes, self.facts, self.met = [3], {"own": 1.0}, "own"

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.mean(self._named(batch))

    def _named(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1], reduction="none")

    def measurements(self) -> dict[str, float]:
        return self.facts


def test_names_of_a_strategys_own_stay_what_they_are(tmp_path: Path) -> None:
    ran = clplat.run(strategy=Crowded, output=str(tmp_path), tracking={"enabled": False}, loop={"max_steps": 2},
                     quiet=True)  # fmt: skip
    learner: Any = clplat.load(ran.run_dir, strategy=Crowded)
    assert (learner.classes, learner.measurements(), learner.met) == ([3], {"own": 1.0}, "own")
    assert learner.of_run.classes == tuple(map(str, range(10)))
    assert learner(torch.rand(3, 8, 8)).scores.shape == (3, 10)
    assert learner._named((learner.prepare(torch.rand(2, 8, 8)), torch.tensor([0, 1]))).shape == (2,)


def test_a_task_is_refused_where_the_run_was_told_none(learner: Any) -> None:
    with pytest.raises(UserError, match="task: 1 has no meaning here"):
        learner(torch.rand(1, 8, 8), task=1)


def test_a_checkpoint_without_preprocessing_refuses_raw_inputs_and_predicts_prepared_ones(learner: Any) -> None:
    x = torch.rand(2, 1, 8, 8)
    expected = learner(x).scores
    learner.of_run.facts = {k: v for k, v in learner.of_run.facts.items() if k != "preprocessing"}
    learner.of_run.__post_init__()
    with pytest.raises(UserError, match="the checkpoint holds no preprocessing"):
        learner(x)
    assert torch.equal(learner.predict(x), expected)


def test_preprocessing_is_json() -> None:
    import json

    known = Digits(seed=0).preprocessing()
    assert Preprocessing.from_dict(json.loads(json.dumps(known.to_dict()))) == known
    assert known.white == 16


# --- tasks --------------------------------------------------------------------------------------------------------


def _by_task(folder: Path, **config: Any) -> Any:
    stream = {"name": "digits", "scenario": "task", "train_per_class": 30, "test_per_class": 10}
    return run(folder, stream=stream, **config)


@pytest.mark.parametrize("strategy", [{"name": "acil", "width": 64}, {"name": "hnet", "hidden": [8]}, {"name": "er"}],
                         ids=lambda s: s["name"])  # fmt: skip
def test_a_task_that_is_named_is_predicted_among_its_classes(strategy: dict[str, Any], tmp_path: Path) -> None:
    result = _by_task(tmp_path, strategy=strategy, backbone={"name": "mlp", "hidden": [16]})
    learner, stream = clplat.load(result.run_dir), build(resolve(config=result.run_dir / "config.yaml"))[0]
    for e in stream:
        x, y = e.test.all()
        said = learner(x, task=e.task)
        assert float((said.ids == y).double().mean()) == pytest.approx(result.accuracy_matrix[-1][e.index])
        assert set(said.ids.tolist()) <= set(e.classes)
        prepared = learner.prepare(x)
        logits = [learner.predict(prepared, e.task)]
        if learner.frozen_features:
            logits.append(learner.readout(learner.model.features(prepared), e.task))
        for found in logits:
            assert (~found.isneginf()).any(0).nonzero()[:, 0].tolist() == list(e.classes)
    for task in (None, 5):
        with pytest.raises(UserError, match=rf"task: {task} \(valid: 0, 1, 2, 3, 4; this run was told the task"):
            learner(x, task=task)


def test_a_stream_with_code_of_its_own_is_refused() -> None:
    class Own(Digits):
        def prepare(self, inputs: Any, training: bool) -> Any:
            return super().prepare(inputs, training) * 2

    with pytest.raises(UserError, match=r"Own\.prepare is code of its own.*\(valid: prepared ones"):
        Raw(Own(seed=0).preprocessing()).held(torch.rand(1, 8, 8))
    from clplat.streams.unlearning import Unlearning

    assert Raw(Unlearning(base=Digits(seed=0)).preprocessing()).held(torch.rand(8, 8)).shape == (1, 1, 8, 8)
    with pytest.raises(UserError, match=r"Own\.prepare is code"):
        Raw(Unlearning(base=Own(seed=0)).preprocessing()).held(torch.rand(8, 8))
    assert any(e.kind is Kind.FORGET for e in Unlearning(base=Digits(seed=0)))
