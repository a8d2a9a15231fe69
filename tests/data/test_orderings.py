"""Orders of classes that a file gives."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import clplat
from clplat.data.orderings import chain, class_order
from clplat.data.scenarios import ScenarioStream, Source
from clplat.errors import MissingError, UserError

NAMES = ("cat", "dog", "oak", "elm")


def _file(tmp_path: Path, content: object) -> str:
    (tmp_path / "order.json").write_text(json.dumps(content))
    return str(tmp_path / "order.json")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (["oak", "cat", "elm", "dog"], [2, 0, 3, 1]),
        ([3, 2, 1, 0], [3, 2, 1, 0]),
        (["oak", 0, "elm", 1], [2, 0, 3, 1]),
        ({"oak": 0.1, "cat": -3, "elm": 7, "dog": 0.1}, [0, 1, 2, 3]),  # of equal ones the lower label first
        ({"elm": 1, "oak": 2, "dog": 3, "cat": 4}, [3, 2, 1, 0]),
    ],
)
def test_lists_and_numbers(content, expected, tmp_path):
    file = _file(tmp_path, content)
    assert class_order(file, range(4), NAMES, 0).tolist() == expected
    assert class_order(file, range(4), NAMES, 0, backwards=True).tolist() == expected[::-1]
    samples = (torch.zeros(8, 2), torch.arange(8) % 4)
    stream = ScenarioStream(Source(samples, samples, class_names=NAMES), class_order=file, experiences=4)
    assert stream.class_names == tuple(NAMES[c] for c in expected)


def test_embeddings_are_walked_from_one_drawn_by_seed_to_the_most_similar_left(tmp_path):
    vectors = {"elm": [0.0, 2.0], "cat": [1.0, 0.0], "dog": [9.0, 1.0], "oak": [0.1, 1.0]}
    file, walks = _file(tmp_path, vectors), {0: [0, 1, 2, 3], 1: [1, 0, 2, 3], 2: [2, 3, 1, 0], 3: [3, 2, 1, 0]}
    found = [class_order(file, range(4), NAMES, seed).tolist() for seed in range(20)]
    assert {order[0] for order in found} == {0, 1, 2, 3}
    assert all(order == walks[order[0]] for order in found)
    assert found == [class_order(file, range(4), NAMES, seed).tolist() for seed in range(20)]


def test_a_walk_is_by_angles_alone():
    vectors = np.random.default_rng(0).normal(size=(12, 5))
    order = chain(vectors, 4)
    assert sorted(order.tolist()) == list(range(12))
    assert order.tolist() == chain(vectors * np.arange(1, 13)[:, None], 4).tolist()
    units = torch.nn.functional.normalize(torch.from_numpy(vectors))
    for step in range(1, 12):
        left = order[step:]
        assert left[int((units[left] @ units[order[step - 1]]).argmax())] == order[step]


def test_labels_without_names_are_called_by_their_number(tmp_path):
    assert class_order(_file(tmp_path, {"5": 2, "3": 9, "8": 1}), [3, 5, 8], (), 0).tolist() == [8, 5, 3]
    assert class_order("shuffled", [3, 5, 8], (), 1, True).tolist() == class_order("shuffled", [3, 5, 8], (), 1)[
        ::-1
    ].tolist()  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["cat", "dog", "oak"], r"stream\.class_order: .*order\.json is not an order \(valid: each of \[0, 1, 2,"),
        (["cat", "dog", "oak", "oak"], r"is not an order"),
        ({"cat": 1, "dog": 2, "oak": 3, "fir": 4}, r"has 'fir', which is no class of the data"),
        (["cat", "dog", "oak", True], r"has True, which is no class of the data"),
        ({"cat": 1, "dog": 2, "oak": 3, "elm": None}, r"does not give each class a finite number"),
        ({"cat": [1], "dog": [2], "oak": [3], "elm": [4, 5]}, r"does not give each class a finite number"),
        ({"cat": [1], "dog": [2], "oak": [3], "elm": [0]}, r"has a class of zeros alone"),
        ("cat", r"holds a str \(valid: a list of classes, or an object"),
    ],
    ids=str,
)  # fmt: skip
def test_refuses(content, message, tmp_path):
    with pytest.raises(UserError, match=message):
        class_order(_file(tmp_path, content), range(4), NAMES, 0)


def test_a_name_of_two_classes_and_a_file_that_is_not_there_are_refused(tmp_path):
    twice = ("cat", "dog", "cat", "elm")
    with pytest.raises(
        UserError, match=r"has 'cat', which 2 classes are called \(valid: labels, in a list of numbers\)"
    ):
        class_order(_file(tmp_path, ["cat", 1, "cat", 3]), range(4), twice, 0)
    assert class_order(_file(tmp_path, [2, "dog", 0, 3]), range(4), twice, 0).tolist() == [2, 1, 0, 3]
    with pytest.raises(MissingError, match=r"nowhere\.json is missing"):
        class_order("nowhere.json", range(4), NAMES, 0)


def test_the_command_line_tells_lists_words_and_files_apart(tmp_path):
    def names(order):
        loop = {"max_steps": 1, "checkpoint_seconds": None}
        result = clplat.run(
            strategy="naive", stream="digits", backbone="mlp", loop=loop, quiet=True, output=str(tmp_path / "runs"),
            tracking={"enabled": False}, **{"stream.class_order": order, "stream.experiences": 2},
        )  # fmt: skip
        return [e.get("title") for e in result.summary["experiences"]]

    backwards = ["9, 8, 7, 6, 5", "4, 3, 2, 1, 0"]
    assert names([*range(9, -1, -1)]) == names("[9, 8, 7, 6, 5, 4, 3, 2, 1, 0]") == backwards
    assert names(_file(tmp_path, {str(c): -c for c in range(10)})) == backwards
