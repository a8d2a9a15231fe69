"""CLIP protocols: image sets one after the other, their classes named by prompts, all of them scored at every stage.

Source   MTIL: Zheng et al., "ZSCL", ICCV 2023, arXiv:2303.06628 (11 sets, task told, two orders); X-TAIL: Xu et al.,
         "RAIL", NeurIPS 2024, arXiv:2406.18868 (10 sets, one label space, 16 images a class). Prompts of both: one a
         set, as Lu et al., "MoRAM", arXiv:2506.21035, lists them.
Differs  MTIL averages the features of several prompts a class when it evaluates; here it is one. The sets are read by
         torchvision, with its splits; where X-TAIL uses those of CoOp, Caltech101, EuroSAT and SUN397 have other rows
         here (a random fifth is held out, as MTIL does) and Caltech101 101 classes instead of 100. Images are drawn for
         each set by itself, so that one set's draw does not depend on the others'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from clplat.data.datasets import find_root, load_images
from clplat.data.pictures import as_bytes, middle, pixels, stretched
from clplat.data.tokens import check_different, encode_cached, load_tokenizer, padded, read_json
from clplat.data.worlds import generator
from clplat.errors import MissingError, UserError
from clplat.stream import Answers, Data, Experience, Kind, Stream
from clplat.streams.images import CLASS_NAMES

STATISTICS = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])  # CLIP's own
SMALL = ("mnist", "fashion_mnist", "cifar10", "notmnist")
MTIL = ("aircraft", "caltech101", "cifar100", "dtd", "eurosat", "flowers", "food101", "mnist", "pets", "cars", "sun397")
MTIL_2 = (
    "cars",
    "food101",
    "mnist",
    "pets",
    "flowers",
    "sun397",
    "aircraft",
    "caltech101",
    "dtd",
    "eurosat",
    "cifar100",
)
XTAIL = tuple(name for name in MTIL if name != "cifar100")
PROMPTS = {
    "aircraft": "a photo of a {}, a type of aircraft.",
    "caltech101": "a photo of a {}.",
    "cars": "a photo of a {}.",
    "cifar10": "a photo of a {}.",
    "cifar100": "a photo of a {}.",
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of the {} satellite location.",
    "fashion_mnist": "a photo of a {}, a type of clothing.",
    "flowers": "a photo of a {}, a type of flower.",
    "food101": "a photo of {}, a type of food.",
    "mnist": 'a photo of the number: "{}".',
    "notmnist": 'a photo of the letter: "{}".',
    "pets": "a photo of a {}, a type of pet.",
    "sun397": "a photo of a {}.",
}
# Set → torchvision's class, and what it is given for the training and the test part; one for a set without parts.
_TORCHVISION: dict[str, tuple[str, tuple[dict[str, Any], ...]]] = {
    "aircraft": ("FGVCAircraft", ({"split": "train"}, {"split": "test"})),
    "caltech101": ("Caltech101", ({},)),
    "cars": ("StanfordCars", ({"split": "train"}, {"split": "test"})),
    "dtd": ("DTD", ({"split": "train"}, {"split": "test"})),
    "eurosat": ("EuroSAT", ({},)),
    "flowers": ("Flowers102", ({"split": "train"}, {"split": "test"})),
    "food101": ("Food101", ({"split": "train"}, {"split": "test"})),
    "pets": ("OxfordIIITPet", ({"split": "trainval"}, {"split": "test"})),
    "sun397": ("SUN397", ({},)),
}


@dataclass(frozen=True, eq=False)
class _Set:
    """Labels (n,) of one set's training and test images, and how to read some of them: rows → (m, 3, S, S) bytes."""

    names: Sequence[str]
    labels: tuple[np.ndarray, np.ndarray]
    read: tuple[Callable[[np.ndarray], Tensor], Callable[[np.ndarray], Tensor]]


class Clip(Stream):
    """Image sets in turn for CLIP: few images a class, and every set's test images scored before and after it is met.

    Args:
        seed: of the images drawn; null takes the run's seed.
        data_root: folder of data sets; null is $CLPLAT_DATA.
        benchmark: small: MNIST, Fashion-MNIST, CIFAR-10, notMNIST, one label space, as an X-TAIL that runs anywhere.
            xtail, mtil: as published, each set where torchvision keeps it below the data root.
        order: of the sets of mtil, 1 or 2.
        tasks: names of sets in order; null takes the benchmark's.
        absent: what to do about a set that is not there: error, or skip it.
        shots: training images of each class, drawn, ≥ 1; null takes all (mtil as published; 5 in its few-shot form).
        test_per_class: test images of each class, drawn alike for every seed, ≥ 1; null takes all.
        image_size: side in pixels, ≥ 8; a larger image's shorter side is scaled to it and the middle cut out. Of
            small images 32 is their own.
        tokenizer: folder, name below weights/ of the data root or hub name; null takes that of the backbone's weights,
            and `bytes` (one token a byte) where these are random.
        download: let torchvision fetch what is missing into the data root.

    Raises:
        UserError: an option out of range, an unknown set.
        MissingError: a set is not there; says what to put where.
    """

    kinds = frozenset({Kind.LEARN})

    def __init__(
        self,
        *,
        seed: int | None = None,
        data_root: str | None = None,
        benchmark: Literal["small", "xtail", "mtil"] = "small",
        order: int = 1,
        tasks: list[str] | None = None,
        absent: Literal["error", "skip"] = "error",
        shots: int | None = 16,
        test_per_class: int | None = None,
        image_size: int = 32,
        tokenizer: str | None = None,
        download: bool = False,
    ) -> None:
        faults = [
            f"stream.{key}: {value!r} is out of range (valid: {valid})"
            for key, value, holds, valid in (
                ("order", order, order in (1, 2), "1 or 2"),
                ("shots", shots, shots is None or shots >= 1, "≥ 1, or null"),
                ("test_per_class", test_per_class, test_per_class is None or test_per_class >= 1, "≥ 1, or null"),
                ("image_size", image_size, image_size >= 8, "≥ 8"),
            )
            if not holds
        ]
        published = {"small": SMALL, "xtail": XTAIL, "mtil": MTIL if order == 1 else MTIL_2}[benchmark]
        chosen = list(published) if tasks is None else list(dict.fromkeys(tasks))
        if order == 2 and (benchmark != "mtil" or tasks is not None):
            faults.append(f"stream.order: {order} has no meaning here (valid: 1; used with mtil and tasks null)")
        if tasks is not None and (not tasks or len(chosen) < len(tasks)):
            faults.append(f"stream.tasks: {tasks} (valid: at least one name, each once; or null)")
        faults += [f"stream.tasks: {n!r} is unknown (valid: {', '.join(PROMPTS)})" for n in chosen if n not in PROMPTS]
        if faults:
            raise UserError(*faults)
        found, missing = _load(chosen, data_root, image_size, download, absent)
        names = [PROMPTS[name].format(label) for name, content in found.items() for label in content.names]
        experiences, groups = _experiences(found, 0 if seed is None else seed, shots, test_per_class)
        super().__init__(
            experiences,
            num_classes=len(names),
            input_shape=(3, image_size, image_size),
            task_known=benchmark == "mtil",
            class_names=names,
            normalize=STATISTICS,
        )
        self.origin = {"fit": "middle", "stretched": True}
        speech = load_tokenizer(tokenizer)
        behind = speech.behind if speech.end in speech.behind else (*speech.behind, speech.end)
        ids = [np.array([*speech.before, *row, *behind], np.int32) for row in encode_cached(speech, names)]
        notes = [f"{fault.partition(' is missing')[0]} is missing and left out" for fault in missing]
        for group in groups if self.task_known else [range(len(names))]:
            check_different([ids[c] for c in group], own := [names[c] for c in group])
            notes += [f"stream.tasks: {n!r} names {own.count(n)} classes, of which the first is predicted"
                      for n in dict.fromkeys(own) if own.count(n) > 1]  # fmt: skip
        self.notes = tuple(notes)
        self.answers = Answers(padded(ids).long(), speech.end, speech.size, 0, groups if self.task_known else ())


def _experiences(
    found: dict[str, _Set], seed: int, shots: int | None, test_per_class: int | None
) -> tuple[list[Experience], tuple[tuple[int, ...], ...]]:
    """One experience a set, and the classes of each; a set's classes follow those of the sets before it."""
    inputs: dict[str, list[Tensor]] = {"train": [], "test": []}
    labels: dict[str, list[Tensor]] = {"train": [], "test": []}
    groups: list[tuple[int, ...]] = []
    for name, content in found.items():
        first = sum(len(group) for group in groups)
        groups.append(tuple(range(first, first + len(content.names))))
        drawn = (
            _some(content.labels[0], shots, generator(seed, f"shots {name}")),
            _some(content.labels[1], test_per_class, generator(0, f"test {name}")),
        )
        for part, rows, own, read in zip(inputs, drawn, content.labels, content.read, strict=True):
            inputs[part].append(read(rows))
            labels[part].append(torch.from_numpy(own[rows] + first))
    table = {part: (torch.cat(inputs[part]), torch.cat(labels[part])) for part in inputs}
    made, ends = [], {part: np.cumsum([0, *map(len, inputs[part])]).tolist() for part in inputs}
    for i, name in enumerate(found):
        data = {part: Data(*table[part], torch.arange(ends[part][i], ends[part][i + 1])) for part in inputs}
        made.append(
            Experience(
                index=i,
                name=name,
                kind=Kind.LEARN,
                train=data["train"],
                test=data["test"],
                classes=groups[i],
                task=i,
            )
        )
    return made, tuple(groups)


def _some(labels: np.ndarray, count: int | None, rng: np.random.Generator) -> np.ndarray:
    """`count` rows of each class of labels (n,), or all it has; sorted."""
    if count is None:
        return np.arange(len(labels))
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:count] for c in np.unique(labels)]))


# --- sets -------------------------------------------------------------------------------------------------------------


def _load(
    names: Sequence[str], data_root: str | None, side: int, download: bool, absent: str
) -> tuple[dict[str, _Set], list[str]]:
    """The sets that are there, and a line for each that is not."""
    found: dict[str, _Set] = {}
    missing: list[str] = []
    for name in names:
        try:
            if name in _TORCHVISION:
                found[name] = _of_torchvision(name, data_root, side, download)
            else:
                found[name] = _of_arrays(name, data_root, side, download)
        except MissingError as error:
            missing += error.faults
    if missing and (absent == "error" or not found):
        raise MissingError(*missing)
    return found, missing


def _of_arrays(name: str, data_root: str | None, side: int, download: bool) -> _Set:
    """A set of `clplat.data.datasets`: small images at `side`, grey ones in three equal channels."""
    train, test = load_images(name, data_root, download)
    names = _cifar100_names(data_root) if name == "cifar100" else CLASS_NAMES.get(name, "").split()
    names = [_plain(n) for n in names] or [str(i) for i in range(int(train.labels.max()) + 1)]

    def read(images: Tensor, rows: np.ndarray) -> Tensor:
        return stretched(images[torch.from_numpy(rows)], side)

    return _Set(
        names,
        (train.labels.numpy(), test.labels.numpy()),
        (lambda rows: read(train.images, rows), lambda rows: read(test.images, rows)),
    )


def _cifar100_names(data_root: str | None) -> list[str]:
    """The names of CIFAR-100's classes, from `cifar100/meta.json` in the data root."""
    root = find_root(data_root)
    assert root is not None  # the images were found in it
    meta = read_json(root / "cifar100" / "meta.json")
    if "fine_label_names" not in meta:
        raise MissingError(f'{root}/cifar100/meta.json lacks names: put {{"fine_label_names": [100 names]}} there')
    return meta["fine_label_names"]


def _of_torchvision(name: str, data_root: str | None, side: int, download: bool) -> _Set:
    """A set that torchvision reads; of one without parts a random fifth, always the same, is held out."""
    import torchvision.datasets

    kind, parts = _TORCHVISION[name]
    root = find_root(data_root)
    if root is None:
        raise MissingError(f"data_root: not set, and so there is no {name}: give --data_root DIR, or set CLPLAT_DATA")
    try:
        read = [getattr(torchvision.datasets, kind)(str(root), download=download, **part) for part in parts]
    except (OSError, RuntimeError) as error:
        raise MissingError(
            f"stream.tasks: {name} is missing: put it below {root} as torchvision.datasets.{kind} lays it out "
            f"({' '.join(str(error).split())}); or --stream.download true, or --stream.absent skip"
        ) from error
    names = [_plain(n) for n in getattr(read[0], "classes", None) or read[0].categories]
    labels = [_labels(data) for data in read]
    rows = [np.arange(len(own)) for own in labels]
    if len(read) == 1:
        order = np.random.default_rng(42).permutation(rows[0])
        cut = len(order) - len(order) // 5
        read, rows = read * 2, [np.sort(order[:cut]), np.sort(order[cut:])]
        labels = [labels[0][part] for part in rows]
    return _Set(
        names,
        (labels[0], labels[1]),
        (lambda chosen: _stack(read[0], rows[0][chosen], side), lambda chosen: _stack(read[1], rows[1][chosen], side)),
    )


def _labels(data: Any) -> np.ndarray:
    """(n,) labels of a torchvision set, without reading its images where it has them in a list."""
    for place in ("_labels", "targets", "y"):
        if hasattr(data, place):
            return np.asarray(getattr(data, place), dtype=np.int64)
    return np.array([label for _, label in data._samples], dtype=np.int64)


def _stack(data: Any, rows: np.ndarray, side: int) -> Tensor:
    """Images (m, 3, side, side) as bytes: the shorter side scaled, the middle cut out."""
    images = torch.empty(len(rows), 3, side, side, dtype=torch.uint8)
    for place, row in enumerate(rows.tolist()):
        name = f"image {row} of {type(data).__name__}"
        images[place] = as_bytes(pixels(data[row][0], name, fit=middle(side)), name)
    return images


def _plain(name: str) -> str:
    """A class's name in words: without underscores and paths."""
    return name.strip("/").replace("_", " ").replace("/", " ")
