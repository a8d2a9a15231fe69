"""The order in which the classes of a data set come: as they are, drawn, listed, or as a file says.

Source   for files: the streams of FoMo-in-Flux (Roth et al., "A Practitioner's Guide to Continual Multimodal
         Pretraining", NeurIPS 2024, arXiv:2408.14471), which are such lists: by zero-shot performance, by frequency of
         the concept in pretraining data, by similarity of concepts, by year of the data set, at random; and in reverse.
Differs  accuracies, frequencies and embeddings come from the user, since none follows from the data. What the published
         lists are sorted by is told by their names alone: that those by similarity are walks, each step to the most
         similar class left, is how they look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clplat.data.tokens import read_json
from clplat.data.worlds import generator
from clplat.errors import UserError

_LISTED = "a list of classes, or an object of a number, or of a list of numbers, for each"


def named_order(choice: object) -> bool:
    """Whether `choice` is a word or a file, and so no list of labels."""
    return choice in ("sequential", "shuffled") or (isinstance(choice, str) and choice.endswith(".json"))


def class_order(
    choice: str | Sequence[int], labels: Sequence[int], names: Sequence[str], seed: int, backwards: bool = False
) -> np.ndarray:
    """Labels (C,) int64 in the order in which they come.

    Args:
        choice: sequential, shuffled, all labels, or a .json file (see `ScenarioStream`).
        labels: those that the data have, sorted.
        names: of each label, in order of label; labels without one are called by their number.
        backwards: turn it round.

    Raises:
        UserError: a list or a file does not have each class once, or is no order.
        MissingError: the file is not there, or not whole.
    """
    present = np.array(labels, dtype=np.int64)
    if choice == "sequential":
        found = present
    elif choice == "shuffled":
        found = generator(seed, "class_order").permutation(present)
    elif isinstance(choice, str):
        found = _of_file(Path(choice).expanduser(), present, names, seed)
    else:
        _complete(str(choice), choice, present)
        found = np.array(choice, dtype=np.int64)
    return found[::-1].copy() if backwards else found


def chain(vectors: np.ndarray, first: int) -> np.ndarray:
    """Rows (C,) of `vectors` (C, D) from `first` on, each followed by the most similar one left, by their cosine.

    The lowest row of several that are equally similar.

    >>> chain(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0]]), 0).tolist()
    [0, 2, 3, 1]
    """
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found, left = [first], np.ones(len(units), dtype=bool)
    for _ in range(len(units) - 1):
        left[found[-1]] = False
        similar = np.where(left, units @ units[found[-1]], -np.inf)
        found.append(int(similar.argmax()))
    return np.array(found)


def _of_file(file: Path, present: np.ndarray, names: Sequence[str], seed: int) -> np.ndarray:
    content = read_json(file)
    if not isinstance(content, list | dict):
        raise UserError(f"stream.class_order: {file} holds a {type(content).__name__} (valid: {_LISTED})")
    said = dict(enumerate(names))
    called = [said.get(label, str(label)) for label in present.tolist()]
    twice = next((name for name, count in Counter(called).items() if count > 1 and name in content), None)
    if twice is not None:
        raise UserError(
            f"stream.class_order: {file} has {twice!r}, which {called.count(twice)} classes are called (valid: labels, "
            "in a list of numbers)"
        )
    number = dict(zip(called, present.tolist(), strict=True))
    own = [c if type(c) is int else number.get(c) if isinstance(c, str) else None for c in content]
    if None in own:
        stranger = list(content)[own.index(None)]
        raise UserError(f"stream.class_order: {file} has {stranger!r}, which is no class of the data")
    _complete(str(file), own, present)
    if isinstance(content, list):
        return np.array(own, dtype=np.int64)
    order = np.sort(np.array(own, dtype=np.int64))
    value = dict(zip(own, content.values(), strict=True))
    values = _numbers(file, [value[label] for label in order.tolist()])
    if values.ndim == 1:
        return order[values.argsort(kind="stable")]
    return order[chain(values, int(generator(seed, "class_order").integers(len(order))))]


def _numbers(file: Path, values: list[Any]) -> np.ndarray:
    """(C,) or (C, D) float64."""
    try:
        found = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        found = np.array(np.nan)
    if found.ndim not in (1, 2) or not np.isfinite(found).all():
        raise UserError(
            f"stream.class_order: {file} does not give each class a finite number, or a list of them of one length"
        )
    if found.ndim == 2 and not found.any(1).all():
        raise UserError(f"stream.class_order: {file} has a class of zeros alone, which is similar to none")
    return found


def _complete(what: str, order: Sequence[Any], present: np.ndarray) -> None:
    if sorted(order) != present.tolist():
        some = present.tolist()
        valid = f"each of {some} once" if len(some) <= 20 else f"each of the {len(some)} labels once"
        raise UserError(f"stream.class_order: {what} is not an order (valid: {valid})")
