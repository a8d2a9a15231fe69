"""Corruptions: images as they degrade, unlabelled and in order, for adapting at test time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from clplat.corruptions.constants import EXTRA, NAMES, ORDERS, STANDARD
from clplat.corruptions.data import Corrupted
from clplat.corruptions.order import Visit, sample_order, visits
from clplat.datasets import find_root, load_images, stratified_split
from clplat.errors import UserError
from clplat.stream import Data, Experience, Kind, Stream
from clplat.streams.digits import read_digits
from clplat.streams.images import CLASS_NAMES, flip_crop
from clplat.worlds import generator

DATASETS = ("digits", "cifar10", "cifar100", "mnist", "fashion_mnist", "notmnist", "svhn", "pacs32")
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
            "digits", "cifar10", "cifar100", "mnist", "fashion_mnist", "notmnist", "svhn", "pacs32"
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
    ) -> None:
        options = dict(locals())
        faults = _faults(options)
        if faults:
            raise UserError(*faults)
        seed, base = seed or 0, _base(dataset, data_root)
        names = SETS[corruptions] if isinstance(corruptions, str) else tuple(corruptions)
        if published_order is not None:
            names = ORDERS[published_order]
        turns = rounds or (10 if order == "recurring" else 1)
        plan = visits(order, names, severity, turns)
        root = find_root(data_root)
        frost = root / "frost" if root is not None and (root / "frost").is_dir() else None
        data = Corrupted(
            *base.test, seed=seed,
            family=None if constants == "auto" else constants, frost_folder=None if frost is None else str(frost),
        )  # fmt: skip
        chosen = _chosen(len(base.test[0]), samples, seed)
        strength = concentration if "correlated" in order else None
        experiences = _adapted(data, plan, chosen, shuffle, strength, seed)
        count = int(max(base.train[1].max(), base.test[1].max())) + 1
        super().__init__(
            _finished(experiences, base, count, source, clean),
            num_classes=count,
            input_shape=tuple(base.test[0].shape[1:]),
            class_names=base.class_names or [str(c) for c in range(count)],
            augment=flip_crop if augment == "flip_crop" else None,
        )


def _chosen(count: int, samples: int | None, seed: int) -> np.ndarray:
    """Images that are taken, in their order."""
    if samples is None or samples >= count:
        return np.arange(count)
    return np.sort(generator(seed, "adapt_samples").permutation(count)[:samples])


def _adapted(
    data: Corrupted, plan: list[Visit], chosen: np.ndarray, shuffle: bool, strength: float | None, seed: int
) -> list[Experience]:
    """An experience for each visit; `data` holds the images."""
    assert data.labels is not None
    labels, found = data.labels[torch.from_numpy(chosen)].numpy(), []
    for index, visit in enumerate(plan):
        several = len(visit.segments) > 1
        order = sample_order(labels, len(visit.segments), shuffle=shuffle or several, concentration=strength, seed=seed,
                             index=index)  # fmt: skip
        rows = torch.from_numpy(order // len(chosen) * len(data.inputs) + chosen[order % len(chosen)])
        domain, severity = visit.segments[0]
        found.append(
            Experience(
                index=index,
                name=visit.name,
                kind=Kind.ADAPT,
                train=dataclasses.replace(data, rows=rows, segments=visit.segments),
                domain="" if several else domain,
                severity=severity,
                round=visit.round,
            )
        )
    return found


def _finished(
    experiences: list[Experience], base: _Base, classes: int, source: bool, clean: int | None
) -> list[Experience]:
    """With all classes known from the start, the learn experience if asked for, and the clean test set on the first."""
    rows = None if clean is None else torch.linspace(0, len(base.test[0]) - 1, min(clean, len(base.test[0]))).long()
    held_out = None if clean == 0 else Data(*base.test, rows)
    if source:
        learn = Experience(index=0, name="source", kind=Kind.LEARN, train=Data(*base.train), classes=())
        experiences = [learn, *(dataclasses.replace(e, index=e.index + 1) for e in experiences)]
    every = tuple(range(classes))
    experiences = [dataclasses.replace(e, classes=every) for e in experiences]
    return [dataclasses.replace(experiences[0], test=held_out), *experiences[1:]]


def _base(dataset: str, data_root: str | None) -> _Base:
    if dataset != "digits":
        train, test = load_images(dataset, data_root)
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
    check("severity", options["severity"] in range(1, 6), "1 to 5")
    check("seed", options["seed"] is None or options["seed"] >= 0, "≥ 0")
    for key in ("rounds", "samples"):
        check(key, options[key] is None or options[key] >= 1, "≥ 1, or null")
    check("clean", options["clean"] is None or options["clean"] >= 0, "≥ 0, or null")
    check("concentration", options["concentration"] >= 0, "≥ 0")
    return found
