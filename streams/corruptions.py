"""Corruptions: images as they degrade, unlabelled and in order, for adapting at test time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from clplat.data.corruptions.constants import EXTRA, NAMES, ORDERS, STANDARD
from clplat.data.corruptions.order import Visit, sample_order, visits
from clplat.data.corruptions.published import FOLDERS
from clplat.data.corruptions.sources import Made, Published
from clplat.data.datasets import find_root, load_images, stratified_split
from clplat.errors import MissingError, UserError
from clplat.stream import Data, Experience, Kind, Stream
from clplat.streams.digits import read_digits
from clplat.streams.images import CLASS_NAMES, flip_crop

DATASETS = ("digits", "cifar10", "cifar100", "mnist", "fashion_mnist", "notmnist", "svhn", "pacs32", "imagenet")
ORDER_NAMES = ("continual", "recurring", "gradual", "gradual_full", "correlated", "mixed", "mixed_correlated")
SETS = {"standard": STANDARD, "extra": EXTRA, "all": NAMES}


@dataclass(frozen=True, eq=False)
class _Base:
    """Clean images: training and test, (N, C, H, W) uint8 and (N,) int64."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    class_names: tuple[str, ...]


class Corruptions(Stream):
    """Test images under the common corruptions, made as they are needed, to be predicted and then adapted to.

    Inputs stay in [0, 1], so that a method may change pixels; a model that wants them normalised does so inside. Labels
    serve for scoring and never reach the strategy. What is random in a picture depends on the seed, the corruption, its
    severity and the number of the picture, so every round and every method sees the same ones.

    Args:
        seed: of corruptions, samples and order; null takes the run's seed.
        data_root: folder of data sets; null is $CLPLAT_DATA. digits needs none.
        dataset: whose test images; cifar10, cifar100 and others are read from `<data root>/<dataset>/`.
        order: continual: one corruption after the other. recurring: that ten times over. gradual: severity rises to 5
            and falls for each corruption, only falls for the first (CoTTA). gradual_full: both for all (RMT).
            correlated: continual, labels in runs. mixed: all corruptions in one shuffled experience. mixed_correlated.
        corruptions: standard (15), extra (4), all, or a list of names in the order they come.
        published_order: 0 to 9: the standard corruptions in one of the ten orders of CoTTA; null keeps their order.
        severity: 1 to 5; gradual orders take all.
        rounds: times that all is visited, ≥ 1; null is 10 for recurring, else 1.
        samples: images of each corruption, the same ones for all, drawn by seed, ≥ 1; null takes all.
        shuffle: the images of a corruption; else they keep their order (as CoTTA and TENT do).
        concentration: of the Dirichlet draws that put labels in runs, ≥ 0 (0: class after class).
        constants: cifar or imagenet, or auto: cifar below 128 pixels.
        source: put a learn experience with the clean training images first.
        augment: of its batches; flip_crop mirrors them and moves them by up to 4 pixels.
        clean: clean test images scored after every experience, ≥ 0; null takes all. They are the test set of the first
            experience, so their accuracy before adaptation stands in the first rows of the accuracy matrix.
        published: read the published files instead of making images: `<data root>/CIFAR-10-C`, `CIFAR-100-C`,
            `ImageNet-C`. With ImageNet there is no training data, and clean images if `imagenet/val` has them.

    Raises:
        UserError: an option out of range.
        MissingError: the data set is not there; says what to put where.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARN, Kind.ADAPT})

    def __init__(
        self,
        *,
        seed: int | None = None,
        data_root: str | None = None,
        dataset: Literal[
            "digits", "cifar10", "cifar100", "mnist", "fashion_mnist", "notmnist", "svhn", "pacs32", "imagenet"
        ] = "digits",
        order: Literal[
            "continual", "recurring", "gradual", "gradual_full", "correlated", "mixed", "mixed_correlated"
        ] = "continual",
        corruptions: Literal["standard", "extra", "all"] | list[str] = "standard",
        published_order: int | None = None,
        severity: int = 5,
        rounds: int | None = None,
        samples: int | None = None,
        shuffle: bool = True,
        concentration: float = 0.1,
        constants: Literal["auto", "cifar", "imagenet"] = "auto",
        source: bool = True,
        augment: Literal["none", "flip_crop"] = "none",
        clean: int | None = None,
        published: bool = False,
    ) -> None:
        options = dict(locals())
        faults = _faults(options)
        if faults:
            raise UserError(*faults)
        seed, root = seed or 0, find_root(data_root)
        names = SETS[corruptions] if isinstance(corruptions, str) else tuple(corruptions)
        if published_order is not None:
            names = ORDERS[published_order]
        plan = visits(order, names, severity, rounds or (10 if order == "recurring" else 1))
        base = _base(dataset, data_root, needed=not published or source)
        images: Made | Published
        if published:
            images = Published(_folder(root, dataset), _segments(plan), samples, seed)
        else:
            assert base is not None
            frost = root / "frost" if root is not None and (root / "frost").is_dir() else None
            images = Made(base.test, samples, seed, None if constants == "auto" else constants, frost)
        clean_test = _clean(base, images, root, clean)
        count = _classes(images, base)
        experiences = _adapted(images, plan, shuffle, concentration if "correlated" in order else None, seed)
        sample, _ = images.visit(plan[0], np.arange(1)).batch(torch.arange(1))
        super().__init__(
            _finished(experiences, base.train if base and source else None, count, clean_test),
            num_classes=count,
            input_shape=tuple(sample.shape[1:]),
            class_names=base.class_names if base and base.class_names else [str(c) for c in range(count)],
            augment=flip_crop if augment == "flip_crop" else None,
        )
        self.origin = {"fit": "cropped" if dataset == "imagenet" else "none"}


def _segments(plan: list[Visit]) -> list[tuple[str, int]]:
    """Every (corruption, severity) that is visited, once."""
    return list(dict.fromkeys(s for visit in plan for s in visit.segments))


def _folder(root: Path | None, dataset: str) -> Path:
    if root is None:
        name = FOLDERS[dataset]
        raise MissingError(
            f"data_root: not set, and so there is no {name}: give --data_root DIR, or set CLPLAT_DATA, to the folder "
            f"that holds {name}/"
        )
    return root / FOLDERS[dataset]


def _classes(images: Made | Published, base: _Base | None) -> int:
    """Classes of the data set, as far as its labels tell."""
    if isinstance(images, Published) and images.classes:
        return len(images.classes)
    highest = [int(images.labels.max()), *([int(base.train[1].max()), int(base.test[1].max())] if base else [])]
    return max(highest) + 1


def _clean(base: _Base | None, images: Made | Published, root: Path | None, count: int | None) -> Data | None:
    """The clean test set, or so many of it, evenly spaced."""
    data = None if base is None else Data(*base.test)
    if data is None and isinstance(images, Published) and images.classes and root is not None:
        data = images.clean_files(root / "imagenet" / "val")
    if data is None or count == 0:
        return None
    return data if count is None else data.subset(torch.linspace(0, len(data) - 1, min(count, len(data))).long())


def _adapted(
    images: Made | Published, plan: list[Visit], shuffle: bool, strength: float | None, seed: int
) -> list[Experience]:
    """An experience for each visit."""
    found = []
    for index, visit in enumerate(plan):
        several = len(visit.segments) > 1
        order = sample_order(
            images.labels,
            len(visit.segments),
            shuffle=shuffle or several,
            concentration=strength,
            seed=seed,
            index=index,
        )
        domain, severity = visit.segments[0]
        found.append(
            Experience(
                index=index,
                name=visit.name,
                kind=Kind.ADAPT,
                train=images.visit(visit, order),
                domain="" if several else domain,
                severity=severity,
                round=visit.round,
            )
        )
    return found


def _finished(
    experiences: list[Experience], train: tuple[Tensor, Tensor] | None, classes: int, clean: Data | None
) -> list[Experience]:
    """With all classes known from the start, the learn experience if asked for, and the clean test set on the first."""
    if train is not None:
        learn = Experience(index=0, name="source", kind=Kind.LEARN, train=Data(*train))
        experiences = [learn, *(dataclasses.replace(e, index=e.index + 1) for e in experiences)]
    experiences = [dataclasses.replace(e, classes=tuple(range(classes))) for e in experiences]
    return [dataclasses.replace(experiences[0], test=clean), *experiences[1:]]


def _base(dataset: str, data_root: str | None, needed: bool) -> _Base | None:
    """The clean images; None where they are not there and not needed."""
    if dataset == "imagenet":
        return None
    if dataset != "digits":
        try:
            train, test = load_images(dataset, data_root)
        except MissingError:
            if needed:
                raise
            return None
        names = tuple(CLASS_NAMES[dataset].split()) if dataset in CLASS_NAMES else ()
        return _Base((train.images, train.labels), (test.images, test.labels), names)
    table = read_digits()
    images = torch.from_numpy(np.round(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8))
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    parts = (torch.from_numpy(r) for r in stratified_split(labels.numpy(), test_share=0.2, random_state=0))
    first, second = ((images[rows], labels[rows]) for rows in parts)
    return _Base(first, second, ())


def _faults(options: dict[str, Any]) -> list[str]:
    """One line for each option out of range, or without a meaning in the order."""
    found: list[str] = []

    def check(key: str, holds: bool, valid: str) -> None:
        if not holds:
            found.append(f"stream.{key}: {options[key]!r} is out of range (valid: {valid})")

    choices = (("dataset", DATASETS), ("order", ORDER_NAMES), ("constants", ("auto", "cifar", "imagenet")),
               ("augment", ("none", "flip_crop")))  # fmt: skip
    for key, valid in choices:
        check(key, options[key] in valid, ", ".join(valid))
    names, published = options["corruptions"], options["published_order"]
    if isinstance(names, str):
        check("corruptions", names in SETS, ", ".join(SETS) + ", or a list of names")
    else:
        known = len(names) > 0 and set(names) <= set(NAMES) and len(set(names)) == len(names)
        check("corruptions", known, "each once, of " + ", ".join(NAMES))
    check("published_order", published is None or published in range(10), "0 to 9, or null")
    if published is not None and names != "standard":
        found.append("stream.published_order: it orders the standard corruptions (valid: stream.corruptions standard)")
    if options["published"]:
        check("dataset", options["dataset"] in FOLDERS, ", ".join(FOLDERS) + " with stream.published")
    elif options["dataset"] == "imagenet":
        found.append("stream.dataset: imagenet is read from published files (valid: with stream.published true)")
    if options["dataset"] == "imagenet" and options["source"]:
        found.append("stream.source: imagenet has no training data here (valid: false)")
    check("severity", options["severity"] in range(1, 6), "1 to 5")
    correlated, gradual = "correlated" in options["order"], options["order"].startswith("gradual")
    idle = (
        ("severity", 5, not gradual, "an order that is not gradual"),
        ("concentration", 0.1, correlated, "order correlated or mixed_correlated"),
        ("shuffle", True, not options["order"].startswith("mixed"), "an order that is not mixed"),
        ("constants", "auto", not options["published"], "published false"),
        ("augment", "none", options["source"], "source true"),
    )
    found += [f"stream.{key}: {options[key]!r} has no meaning here (valid: {default!r}; used with {where})"
              for key, default, used, where in idle if not used and options[key] != default]  # fmt: skip
    check("seed", options["seed"] is None or options["seed"] >= 0, "≥ 0")
    for key in ("rounds", "samples"):
        check(key, options[key] is None or options[key] >= 1, "≥ 1, or null")
    check("clean", options["clean"] is None or options["clean"] >= 0, "≥ 0, or null")
    check("concentration", options["concentration"] >= 0, "≥ 0")
    return found
