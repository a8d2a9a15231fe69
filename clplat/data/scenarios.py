"""From one labelled data set to a stream: which samples, and in what guise, each experience gives.

Class-incremental, task-incremental and domain-incremental learning: van de Ven, Tuytelaars, Tolias, Three types of
incremental learning, Nature Machine Intelligence 4 (2022). Blurry boundaries: i-Blurry-N-M of Koh et al., Online
Continual Learning on Class Incremental Blurry Task Configuration with Anytime Inference, ICLR 2022 (N % disjoint
classes, M % of the other classes' samples elsewhere; the blurry-M of Bang et al., CVPR 2021, is N = 0). Repetition:
class-incremental with repetition, Hemati et al., CoLLAs 2023. Permuted pixels: Goodfellow et al., arXiv:1312.6211.
Rotated pixels: Lopez-Paz and Ranzato, NeurIPS 2017.

Everything is drawn from NumPy generators of its own, one a purpose, so that a stream depends on its options and seed
alone, and changing one option (a validation share, say) does not change what another one drew.

Shapes: N samples of a data set, n of an experience, B of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from clplat.data.orderings import class_order as ordered
from clplat.data.orderings import named_order
from clplat.data.splits import Rows, blurred, class_groups, first_per_class, hold_out, places, repeated
from clplat.data.worlds import generator, permutations, rotations
from clplat.errors import UserError
from clplat.inputs import Inputs
from clplat.stream import Data, Experience, Kind, Stream

Augment = Callable[[Tensor], Tensor]
SCENARIOS = ("class", "task", "domain", "permuted", "rotated")


@dataclass(frozen=True, eq=False)
class Source:
    """A labelled data set, held once, from which a scenario cuts experiences.

    Args:
        train: inputs (N, ...) as stored (uint8 images stay uint8), or `Inputs`, and labels (N,), integers.
        test: the same, held out.
        train_domains: (N,) domain id of each training sample, for the scenario `domain`.
        test_domains: (N,) of each test sample.
        class_names: name of each label, in order of label; empty takes the numbers.
        domain_names: name of each domain id, in order.
        normalize: (mean, std) per channel of inputs in [0, 1].
        augment: maps a prepared training batch to its augmentation.
    """

    train: tuple[Tensor | Inputs, Tensor]
    test: tuple[Tensor | Inputs, Tensor]
    train_domains: Tensor | None = None
    test_domains: Tensor | None = None
    class_names: Sequence[str] = ()
    domain_names: Sequence[str] = ()
    normalize: tuple[Sequence[float], Sequence[float]] | None = None
    augment: Augment | None = None


@dataclass(frozen=True)
class _Options:
    """The options of `ScenarioStream`, which explains them."""

    seed: int
    experiences: int
    scenario: str
    class_order: list[int] | str
    reverse_order: bool
    first_classes: int | None
    blurry: float
    disjoint: float
    repetition: float
    introduce: int | None
    max_angle: float
    validation: float
    train_per_class: int | None
    test_per_class: int | None


@dataclass(frozen=True, eq=False)
class _Ids:
    """Labels and domain ids of a source's samples, each (N,) int64."""

    train: np.ndarray
    test: np.ndarray
    train_domains: np.ndarray | None
    test_domains: np.ndarray | None


@dataclass(frozen=True, eq=False)
class _Piece:
    """One experience before it holds tensors; rows are of the train and test sets, sorted."""

    name: str
    train: Rows
    test: Rows
    world: Callable[[Tensor], Tensor] | None = None
    title: str = ""


class ScenarioStream(Stream):
    """A stream cut from one data set. Online learning is any of these with `loop.max_epochs` 1 and a small batch.

    Class ids are renumbered in the order in which a learner meets them; `class_names` keeps the data set's own.

    Args:
        source: the data set.
        seed: of everything drawn here; null takes the run's seed (0 when used from Python).
        experiences: how many, ≥ 1; with class and task at most one a class.
        scenario: class: new classes in each experience, task unknown at test time. task: the same, task known.
            domain: the same classes in each experience, from another of the data set's domains. permuted: the same
            samples, pixels in another fixed order in each experience (the first one unchanged). rotated: the same
            samples, turned by evenly spaced angles from 0 to max_angle.
        class_order: sequential, shuffled (by seed), all labels of the data set as a list, or a .json file: a list of
            all classes, by name or label; an object of a number for each, from the lowest to the highest of which they
            come (frequency in pretraining data; accuracy before training); or an object of a list of numbers for each
            (an embedding of its name): the first is drawn by seed, and after each comes the most similar one left, by
            cosine.
        reverse_order: turn class_order round (class, task).
        first_classes: classes in the first experience, ≥ 1 (50 for a B50 protocol); null shares all out evenly.
        blurry: share, in [0, 1), of each class's training samples that appear in other experiences, evenly (class).
        disjoint: share, in [0, 1], of the classes that stay in one experience although blurry is above 0.
        repetition: probability, in [0, 1], that a class met before is met again in an experience (class). A class's
            samples are shared out evenly over the experiences it appears in.
        introduce: experiences over which new classes arrive when repetition is above 0, ≥ 1; null takes all.
        max_angle: largest rotation in degrees, above 0, at most 360 (rotated).
        validation: share, in [0, 1), of each class's training samples held out in each experience.
        train_per_class: keep the first so many training samples of each class (and domain), ≥ 1; null keeps all.
        test_per_class: the same for test samples.
        tell_task: tell the task at test time in the other scenarios too.

    Raises:
        UserError: an option out of range, or one that the scenario does not use.
        MissingError: the file of an order is not there.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARN})

    def __init__(
        self,
        source: Source,
        *,
        seed: int | None = None,
        experiences: int = 5,
        scenario: Literal["class", "task", "domain", "permuted", "rotated"] = "class",
        class_order: list[int] | str = "sequential",
        reverse_order: bool = False,
        first_classes: int | None = None,
        blurry: float = 0.0,
        disjoint: float = 0.0,
        repetition: float = 0.0,
        introduce: int | None = None,
        max_angle: float = 180.0,
        validation: float = 0.0,
        train_per_class: int | None = None,
        test_per_class: int | None = None,
        tell_task: bool = False,
    ) -> None:
        options = _Options(
            0 if seed is None else seed, experiences, scenario, class_order, reverse_order, first_classes, blurry,
            disjoint, repetition, introduce, max_angle, validation, train_per_class, test_per_class,
        )  # fmt: skip
        ids = _ids(source)
        faults = _faults(options)
        if scenario in SCENARIOS and experiences >= 1:
            faults += _faults_with_data(options, ids, tuple(source.train[0].shape[1:]))
        if faults:
            raise UserError(*faults)
        present = np.unique(ids.train).tolist()
        order = ordered(class_order, present, source.class_names, options.seed, reverse_order)
        pieces = _cut(options, source, ids, order)
        empty = next((i for i, piece in enumerate(pieces) if not len(piece.train)), None)
        if empty is not None:
            what = f"is too many for {len(ids.train)} samples"
            raise UserError(f"stream.experiences: {experiences} {what}: experience {empty} gets none (valid: fewer)")
        met = _order_met(pieces, ids.train, order)
        super().__init__(
            _experiences(options, source, ids, pieces, met),
            num_classes=len(met),
            input_shape=tuple(source.train[0].shape[1:]),
            task_known=tell_task or scenario == "task",
            class_names=[_name(source.class_names, c, str(c)) for c in met.tolist()],
            normalize=source.normalize,
            augment=source.augment,
        )
        untaught = sum(int((places(ids.test[piece.test], met) < 0).sum()) for piece in pieces)
        if untaught:
            what = f"{untaught} test samples are left out: of classes that no training sample here has"
            self.notes = (f"stream.experiences: {what}",)


def _cut(options: _Options, source: Source, ids: _Ids, order: np.ndarray) -> list[_Piece]:
    """What each experience gets."""
    train = first_per_class(ids.train, ids.train_domains, options.train_per_class)
    test = first_per_class(ids.test, ids.test_domains, options.test_per_class)
    count, seed = options.experiences, options.seed
    if options.scenario == "permuted":
        shape = tuple(source.train[0].shape[1:])
        return [_Piece(name, train, test, world) for name, world in permutations(shape, count, seed)]
    if options.scenario == "rotated":
        return [_Piece(name, train, test, world) for name, world in rotations(count, options.max_angle)]
    if options.scenario == "domain" and ids.train_domains is not None and ids.test_domains is not None:
        return [
            _Piece(
                _name(source.domain_names, d, f"domain_{d}"),
                train[ids.train_domains[train] == d],
                test[ids.test_domains[test] == d],
            )
            for d in np.unique(ids.train_domains)[:count].tolist()
        ]
    pools = {c: train[ids.train[train] == c] for c in order.tolist()}
    groups = class_groups(order, options.introduce or count, options.first_classes)
    if options.repetition > 0:
        shares = repeated(pools, groups, count, options.repetition, generator(seed, "repetition"))
        prefix, taught = "repeat", [np.unique(ids.train[share]) for share in shares]
    elif options.blurry > 0:
        shares = blurred(pools, groups, options.blurry, options.disjoint, generator(seed, "blurry"))
        prefix, taught = "blurry", groups
    else:
        shares = [np.concatenate([pools[c] for c in group.tolist()]) for group in groups]
        prefix, taught = "split", groups
    tests = [test[np.isin(ids.test[test], classes)] for classes in taught]
    titles = [", ".join(_name(source.class_names, c, str(c)) for c in classes.tolist()) for classes in taught]
    return [_Piece(f"{prefix}_{i}", np.sort(share), tests[i], title=titles[i]) for i, share in enumerate(shares)]


def _experiences(
    options: _Options, source: Source, ids: _Ids, pieces: list[_Piece], met: np.ndarray
) -> list[Experience]:
    """With class ids numbered as in `met`; all share the source's inputs and one tensor of labels."""
    numbers = places(ids.train, met), places(ids.test, met)
    train, test = ((x, torch.from_numpy(n)) for (x, _), n in zip((source.train, source.test), numbers, strict=True))
    found = []
    for i, piece in enumerate(pieces):
        kept, held = piece.train, None
        if options.validation > 0:
            # The guises of one sample stay on one side of the split in all experiences.
            shared = options.scenario in ("permuted", "rotated")
            rng = generator(options.seed, "validation", 0 if shared else i)
            kept, held = hold_out(piece.train, ids.train, options.validation, rng)
        # A domain may hold test samples of a class that no chosen domain teaches.
        tested = piece.test[numbers[1][piece.test] >= 0]
        found.append(
            Experience(
                index=i,
                name=piece.name,
                kind=Kind.LEARN,
                train=Data(*train, torch.from_numpy(kept), piece.world),
                test=Data(*test, torch.from_numpy(tested), piece.world) if len(tested) else None,
                valid=None if held is None or not len(held) else Data(*train, torch.from_numpy(held), piece.world),
                classes=tuple(np.unique(numbers[0][piece.train]).tolist()),
                task=i,
                title=piece.title,
            )
        )
    return found


def _order_met(pieces: list[_Piece], labels: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Classes in the order met; within an experience as in `order`."""
    met: list[int] = []
    for piece in pieces:
        here = set(np.unique(labels[piece.train]).tolist()) - set(met)
        met += [c for c in order.tolist() if c in here]
    return np.array(met, dtype=np.int64)


def _name(names: Sequence[str], number: int, otherwise: str) -> str:
    return names[number] if number < len(names) else otherwise


def _ids(source: Source) -> _Ids:
    train, test = (
        _whole_numbers(f"{p} labels", getattr(source, p)[0], getattr(source, p)[1]) for p in ("train", "test")
    )
    unknown = np.setdiff1d(test, train).tolist()
    if unknown:
        raise UserError(
            f"stream: test labels {unknown[:5]} are not among the training labels (valid: the same classes)"
        )
    if source.train_domains is None and source.test_domains is None:
        return _Ids(train, test, None, None)
    if source.train_domains is None or source.test_domains is None:
        which = "training" if source.test_domains is None else "test"
        raise UserError(f"stream: domains are given of the {which} samples only (valid: of both, or of none)")
    domains = _whole_numbers("train domains", source.train[0], source.train_domains)
    tested = _whole_numbers("test domains", source.test[0], source.test_domains)
    unknown = np.setdiff1d(tested, domains).tolist()
    if unknown:
        raise UserError(f"stream: test domains {unknown[:5]} are not among the training domains (valid: the same)")
    return _Ids(train, test, domains, tested)


def _whole_numbers(what: str, inputs: Tensor | Inputs, ids: Tensor) -> np.ndarray:
    if ids.ndim != 1 or len(ids) != len(inputs) or ids.is_floating_point() or ids.is_complex():
        shape = f"{tuple(ids.shape)} {str(ids.dtype).removeprefix('torch.')}"
        raise UserError(f"stream: {what} {shape} for {len(inputs)} inputs (valid: one integer an input)")
    array = ids.numpy()  # torch has no minimum of unsigned integers
    if len(array) and not 0 <= (worst := int(array.min())) <= (worst := int(array.max())) < 2**63:
        raise UserError(f"stream: {what} hold {worst} (valid: 0 to 2⁶³ - 1)")
    return array.astype(np.int64)


# --- faults -----------------------------------------------------------------------------------------------------------


def _faults(options: _Options) -> list[str]:
    """One line for each option out of range, or without a meaning in the scenario."""
    found: list[str] = []

    def check(key: str, holds: bool, valid: str) -> None:
        if not holds:
            found.append(f"stream.{key}: {getattr(options, key)!r} is out of range (valid: {valid})")

    def only(key: str, unused: object, used: bool, where: str) -> None:
        if not used and (value := getattr(options, key)) != unused:
            found.append(f"stream.{key}: {value!r} has no meaning here (valid: {unused!r}; used with {where})")

    if options.scenario not in SCENARIOS:
        return [f"stream.scenario: {options.scenario!r} is unknown (valid: {', '.join(SCENARIOS)})"]
    if isinstance(options.class_order, str) and not named_order(options.class_order):
        valid = "sequential, shuffled, a .json file, or a list of all classes"
        return [f"stream.class_order: {options.class_order!r} is unknown (valid: {valid})"]
    check("seed", options.seed >= 0, "≥ 0")
    check("experiences", options.experiences >= 1, "≥ 1")
    for key in ("train_per_class", "test_per_class", "first_classes", "introduce"):
        check(key, (value := getattr(options, key)) is None or value >= 1, "≥ 1, or null")
    for key in ("blurry", "validation"):
        check(key, 0 <= getattr(options, key) < 1, "in [0, 1)")
    for key in ("disjoint", "repetition"):
        check(key, 0 <= getattr(options, key) <= 1, "in [0, 1]")
    check("max_angle", 0 < options.max_angle <= 360, "above 0, at most 360")

    grouped, by_class = options.scenario in ("class", "task"), options.scenario == "class"
    only("first_classes", None, grouped, "scenario class or task")
    only("class_order", "sequential", grouped, "scenario class or task")
    only("reverse_order", False, grouped, "scenario class or task")
    only("max_angle", 180.0, options.scenario == "rotated", "scenario rotated")
    only("repetition", 0.0, by_class, "scenario class")
    alone = by_class and options.repetition == 0 and options.experiences != 1
    only("blurry", 0.0, alone, "scenario class, repetition 0 and at least two experiences")
    only("disjoint", 0.0, options.blurry > 0, "blurry above 0")
    only("introduce", None, options.repetition > 0, "repetition above 0")
    return found


def _faults_with_data(options: _Options, ids: _Ids, shape: tuple[int, ...]) -> list[str]:
    """One line for each option that the data can't serve."""
    if not len(ids.train):
        return ["stream: the training set is empty (valid: at least one sample)"]
    if options.scenario in ("class", "task"):
        return _class_faults(options, np.unique(ids.train).tolist())
    if options.scenario == "rotated" and len(shape) != 3:
        return [f"stream.scenario: 'rotated' needs images (C, H, W), not {shape} (valid here: class, task, permuted)"]
    if options.scenario == "domain":
        count = 0 if ids.train_domains is None else len(np.unique(ids.train_domains))
        if count == 0:
            return ["stream.scenario: 'domain' needs data with domain ids (valid here: class, task, permuted, rotated)"]
        if options.experiences > count:
            return [f"stream.experiences: {options.experiences} is more than the {count} domains (valid: 1 to {count})"]
    return []


def _class_faults(options: _Options, present: list[int]) -> list[str]:
    found: list[str] = []
    key, groups = ("introduce", options.introduce) if options.introduce else ("experiences", options.experiences)
    first, classes = options.first_classes, len(present)
    most = min(classes, options.experiences) if options.introduce else classes
    if groups > most:
        what = f"{classes} classes" if most == classes else f"{most} experiences"
        found.append(f"stream.{key}: {groups} is more than the {what} (valid: 1 to {most})")
    elif first is not None and first >= 1:
        low, high = (classes, classes) if groups == 1 else (1, classes - groups + 1)
        if not low <= first <= high:
            what = f"does not fit {classes} classes in {groups} groups"
            found.append(f"stream.first_classes: {first} {what} (valid: {low} to {high})")
    return found
