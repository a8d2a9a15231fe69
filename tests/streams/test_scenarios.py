"""What each scenario gives each experience, for any labels and seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from clplat import Kind, Stream
from clplat.data.scenarios import ScenarioStream, Source
from clplat.errors import UserError

CLASSES, EACH, TEST_EACH = 6, 20, 4


def source(classes: int = CLASSES, each: int = EACH, *, step: int = 1, domains: int = 0, shape=(1, 4, 4)) -> Source:
    """Samples whose bytes are drawn, labels 0, step, 2·step, ... in mixed order."""
    rng = np.random.default_rng(7)

    def part(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = rng.permutation(np.repeat(np.arange(classes) * step, count))
        return torch.from_numpy(rng.integers(0, 256, (len(labels), *shape), dtype=np.uint8)), torch.from_numpy(labels)

    train, test = part(each), part(TEST_EACH)
    ids = [torch.from_numpy(rng.integers(0, domains, len(p[1]))) if domains else None for p in (train, test)]
    return Source(train, test, *ids)


def make(data: Source | None = None, **options) -> ScenarioStream:
    return ScenarioStream(data or source(), **options)


def rows(stream: Stream, part: str = "train") -> list[list[int]]:
    return [getattr(e, part).rows.tolist() for e in stream]


def same(one: Stream, other: Stream) -> bool:
    parts = ("train", "valid", "test")
    return one.class_names == other.class_names and all(
        [getattr(e, p) and getattr(e, p).rows.tolist() for e in one]
        == [getattr(e, p) and getattr(e, p).rows.tolist() for e in other]
        for p in parts
    )


OPTIONS = [
    {"experiences": 3},
    {"experiences": 3, "class_order": "shuffled", "validation": 0.25},
    {"experiences": 3, "scenario": "task", "class_order": "shuffled"},
    {"experiences": 3, "scenario": "permuted", "validation": 0.25},
    {"experiences": 3, "scenario": "rotated", "validation": 0.25},
    {"experiences": 3, "scenario": "domain", "validation": 0.25},
    {"experiences": 3, "blurry": 0.3, "disjoint": 0.5, "validation": 0.25},
    {"experiences": 8, "repetition": 0.5, "introduce": 3, "validation": 0.25},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_experiences_say_what_they_hold(options: dict) -> None:
    stream = make(source(domains=3), **options)
    assert len(stream) == options["experiences"]
    assert len({e.name for e in stream}) == len(stream)
    for i, experience in enumerate(stream):
        assert (experience.index, experience.task, experience.kind) == (i, i, Kind.LEARN)
        assert experience.classes == tuple(experience.train.targets().unique().tolist())
        assert all(0 <= c < stream.num_classes for c in experience.classes)
        assert experience.train.inputs is stream[0].train.inputs
        assert experience.train.labels is stream[0].train.labels
        assert experience.test.labels.min() >= 0
    assert stream.task_known == (options.get("scenario") == "task")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_seed_same_stream_whatever_the_global_generators_hold(options: dict) -> None:
    data = source(domains=3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = make(data, seed=3, **options)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    other = make(data, seed=3, **options)
    assert same(one, other)
    positions = torch.arange(5)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.train.batch(positions)[0], b.train.batch(positions)[0])


@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_another_seed_another_stream(options: dict) -> None:
    data = source(domains=3)
    assert not all(same(make(data, seed=0, **options), make(data, seed=s, **options)) for s in range(1, 4))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_new_classes_have_the_next_numbers(options: dict) -> None:
    met: set[int] = set()
    for experience in make(source(domains=3), seed=5, **options):
        new = set(experience.classes) - met
        assert new == set(range(len(met), len(met) + len(new)))
        met |= new


@settings(deadline=None, max_examples=40)
@given(
    classes=st.integers(1, 8),
    each=st.integers(3, 9),
    step=st.integers(1, 3),
    experiences=st.integers(1, 8),
    order=st.sampled_from(["sequential", "shuffled"]),
    blurry=st.sampled_from([0.0, 0.2, 0.5]),
    validation=st.sampled_from([0.0, 0.2, 0.5]),
    seed=st.integers(0, 3),
)
def test_each_sample_is_in_one_experience_and_one_part(
    classes: int, each: int, step: int, experiences: int, order: str, blurry: float, validation: float, seed: int
) -> None:
    experiences = min(experiences, classes)
    options = {"class_order": order, "blurry": blurry if experiences > 1 else 0.0, "validation": validation}
    stream = make(source(classes, each, step=step), experiences=experiences, seed=seed, **options)
    held = rows(stream, "valid") if validation else []
    used = [r for part in (*rows(stream), *held) for r in part]
    assert sorted(used) == list(range(classes * each))
    assert sorted(r for part in rows(stream, "test") for r in part) == list(range(classes * TEST_EACH))
    assert all(part == sorted(part) for part in rows(stream))


def test_labels_keep_their_meaning() -> None:
    data = source(step=3)
    stream = make(data, class_order="shuffled", experiences=3, seed=1)
    assert stream.class_names != tuple(sorted(stream.class_names, key=int))
    for experience in stream:
        for part, (_, original) in ((experience.train, data.train), (experience.test, data.test)):
            names = [stream.class_names[c] for c in part.targets().tolist()]
            assert names == [str(c) for c in original[part.rows].tolist()]


def test_class_order_as_a_list_and_first_classes() -> None:
    stream = make(class_order=[5, 3, 1, 0, 2, 4], first_classes=3, experiences=3)
    assert stream.class_names == ("5", "3", "1", "0", "2", "4")
    assert [e.title for e in stream] == ["5, 3, 1", "0, 2", "4"]
    assert [e.classes for e in stream] == [(0, 1, 2), (3, 4), (5,)]


def test_classes_that_do_not_divide_evenly_are_all_used() -> None:
    assert [len(e.classes) for e in make(experiences=4)] == [2, 2, 1, 1]


def test_blurry_share_of_each_class_is_elsewhere_and_spread_evenly() -> None:
    data = source(each=40)
    stream = make(data, experiences=3, blurry=0.3, seed=2)
    home = {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2}
    for name, where in home.items():
        counts = [int((data.train[1][e.train.rows] == name).sum()) for e in stream]
        assert counts[where] == 28
        assert [c for i, c in enumerate(counts) if i != where] == [6, 6]
    for i, experience in enumerate(stream):
        tested = set(data.test[1][experience.test.rows].tolist())
        assert tested == {c for c, where in home.items() if where == i}


def test_disjoint_classes_stay_whole() -> None:
    data = source(each=40)
    stream = make(data, experiences=3, blurry=0.3, disjoint=0.5, seed=2)
    in_how_many = [sum(bool((data.train[1][e.train.rows] == c).any()) for e in stream) for c in range(CLASSES)]
    assert sorted(in_how_many) == [1, 1, 1, 3, 3, 3]


def test_repetition_shares_a_class_out_over_its_experiences() -> None:
    data = source(each=60)
    stream = make(data, experiences=12, repetition=0.4, introduce=3, seed=4)
    counts = torch.stack([torch.bincount(data.train[1][e.train.rows], minlength=CLASSES) for e in stream])
    assert (counts.sum(0) == 60).all()
    times = (counts > 0).sum(0)
    assert (times > 1).all()
    assert times.float().mean() < 9
    for c in range(CLASSES):
        present = counts[:, c][counts[:, c] > 0]
        assert present.max() - present.min() <= 1
    first = [int((counts[:, c] > 0).nonzero()[0]) for c in range(CLASSES)]
    assert first == [0, 0, 1, 1, 2, 2]
    assert all(set(e.test.targets().tolist()) == set(e.classes) for e in stream)


def test_repetition_one_brings_every_class_back() -> None:
    stream = make(experiences=5, repetition=1.0, introduce=2)
    assert [len(e.classes) for e in stream] == [3, 6, 6, 6, 6]


def test_permuted_pixels_are_a_permutation_and_the_first_is_the_identity() -> None:
    data = source(shape=(3, 4, 5))
    stream = make(data, scenario="permuted", experiences=4)
    stored = data.train[0]
    assert torch.equal(stream[0].train.all()[0], stored)
    seen = [e.train.all()[0] for e in stream]
    for i in range(1, 4):
        assert seen[i].dtype == torch.uint8
        assert seen[i].shape == stored.shape
        assert torch.equal(seen[i].flatten(2).sort().values, stored.flatten(2).sort().values)
        order = stream[i].train.world.order
        assert torch.equal(seen[i].flatten(2), stored.flatten(2)[..., order])
        assert torch.equal(stream[i].test.all()[0].flatten(2), data.test[0].flatten(2)[..., order])
        assert not any(torch.equal(seen[i], seen[j]) for j in range(i))


def test_permuted_features() -> None:
    data = source(shape=(9,))
    stream = make(data, scenario="permuted", experiences=2)
    assert torch.equal(stream[1].train.all()[0].sort().values, data.train[0].sort().values)
    assert not torch.equal(stream[1].train.all()[0], data.train[0])


@pytest.mark.parametrize("shape", [(1, 5, 5), (2, 4, 4)])
@pytest.mark.parametrize("as_bytes", [True, False])
def test_rotation_by_quarter_turns_is_exact(shape: tuple[int, ...], as_bytes: bool) -> None:
    data = source(shape=shape)
    if not as_bytes:
        data = Source((data.train[0].float(), data.train[1]), (data.test[0].float(), data.test[1]))
    stream = make(data, scenario="rotated", experiences=4, max_angle=270)
    for turns, experience in enumerate(stream):
        expected = data.train[0].rot90(turns, (-2, -1))
        torch.testing.assert_close(experience.train.all()[0], expected, rtol=0, atol=0 if as_bytes else 1e-2)


def test_rotation_of_oblong_images_keeps_a_centred_disc() -> None:
    image = torch.zeros(1, 1, 9, 15, dtype=torch.uint8)
    y, x = torch.meshgrid(torch.arange(9) - 4, torch.arange(15) - 7, indexing="ij")
    image[0, 0][(x**2 + y**2) <= 9] = 255
    data = Source((image, torch.tensor([0])), (image, torch.tensor([0])))
    turned = make(data, scenario="rotated", experiences=2, max_angle=90)[1].train.all()[0]
    assert torch.equal(turned, image)


def test_domains_are_told_apart_and_not_known_at_test_time() -> None:
    data = source(domains=3)
    stream = make(data, scenario="domain", experiences=3)
    assert [e.name for e in stream] == ["domain_0", "domain_1", "domain_2"]
    for d, experience in enumerate(stream):
        assert set(data.train_domains[experience.train.rows].tolist()) == {d}
        assert set(data.test_domains[experience.test.rows].tolist()) == {d}
    assert sum(len(e.train) for e in stream) == CLASSES * EACH
    assert not stream.task_known
    assert make(data, scenario="domain", experiences=3, tell_task=True).task_known


def test_validation_is_stratified_and_the_same_for_all_guises_of_a_sample() -> None:
    stream = make(scenario="permuted", experiences=3, validation=0.25)
    assert torch.bincount(stream[0].valid.targets()).tolist() == [5] * CLASSES
    assert rows(stream)[0] == rows(stream)[1] == rows(stream)[2]
    assert stream[1].valid.world is stream[1].train.world


def test_validation_changes_nothing_else() -> None:
    plain, held = (make(class_order="shuffled", blurry=0.3, experiences=3, validation=v) for v in (0.0, 0.2))
    assert plain.class_names == held.class_names
    for a, b in zip(plain, held, strict=True):
        assert a.train.rows.tolist() == sorted(b.train.rows.tolist() + b.valid.rows.tolist())


def test_limits_per_class() -> None:
    data = source()
    stream = make(data, experiences=2, train_per_class=7, test_per_class=2)
    assert [len(e.train) for e in stream] == [21, 21]
    assert [len(e.test) for e in stream] == [6, 6]
    first = (data.train[1] == 0).nonzero().flatten()[:7]
    assert set(first.tolist()) <= set(stream[0].train.rows.tolist())


def test_batch_is_one_indexing_call_equal_to_single_samples() -> None:
    stream = make(scenario="rotated", experiences=3, max_angle=100)
    data = stream[1].train
    positions = torch.tensor([5, 0, 17, 5])
    singles = [data.batch(p[None]) for p in positions]
    calls = []

    class Indexing(TorchFunctionMode):
        """Notes what is indexed. (A patched Tensor.__getitem__ would make torch take 0-d tensors for sequences.)"""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.__getitem__:
                calls.append(args[0])
            return func(*args, **(kwargs or {}))

    with Indexing():
        inputs, labels = data.batch(positions)
    assert sum(t is data.inputs for t in calls) == 1
    assert torch.equal(inputs, torch.cat([x for x, _ in singles]))
    assert torch.equal(labels, torch.cat([y for _, y in singles]))


def test_prepare_scales_bytes_and_normalises() -> None:
    data = source(shape=(3, 4, 4))
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    stream = ScenarioStream(Source(data.train, data.test, normalize=(mean, std)))
    inputs = stream[0].train.all()[0]
    expected = (inputs / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(stream.prepare(inputs, training=False), expected)
    assert stream.input_shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experiences": 7}, r"stream\.experiences: 7 is more than the 6 classes \(valid: 1 to 6\)"),
        ({"experiences": 0}, r"stream\.experiences: 0 is out of range \(valid: ≥ 1\)"),
        ({"scenario": "klass"}, r"stream\.scenario: 'klass' is unknown \(valid: class, task"),
        ({"class_order": "random"}, r"stream\.class_order: 'random' is unknown"),
        ({"class_order": [0, 1, 2, 3, 4, 4]}, r"stream\.class_order: \[0, 1, 2, 3, 4, 4\] is not an order"),
        ({"first_classes": 5, "experiences": 3}, r"stream\.first_classes: 5 .*\(valid: 1 to 4\)"),
        ({"blurry": 1.0}, r"stream\.blurry: 1\.0 is out of range \(valid: in \[0, 1\)\)"),
        ({"validation": float("nan")}, r"stream\.validation: nan is out of range"),
        ({"blurry": 0.2, "scenario": "permuted"}, r"stream\.blurry: 0\.2 has no meaning here"),
        ({"blurry": 0.2, "repetition": 0.1}, r"stream\.blurry: 0\.2 has no meaning here"),
        ({"repetition": 0.2, "scenario": "task"}, r"stream\.repetition: 0\.2 has no meaning here"),
        ({"introduce": 2}, r"stream\.introduce: 2 has no meaning here"),
        ({"introduce": 4, "experiences": 3, "repetition": 0.5}, r"stream\.introduce: 4 is more than the 3 experiences"),
        ({"introduce": 7, "experiences": 9, "repetition": 0.5}, r"stream\.introduce: 7 is more than the 6 classes"),
        ({"class_order": "shuffled", "scenario": "rotated"}, r"stream\.class_order: 'shuffled' has no meaning here"),
        ({"max_angle": 90.0}, r"stream\.max_angle: 90\.0 has no meaning here"),
        ({"scenario": "domain"}, r"'domain' needs data with domain ids"),
        ({"train_per_class": 0}, r"stream\.train_per_class: 0 is out of range"),
        ({"seed": -1}, r"stream\.seed: -1 is out of range"),
        ({"repetition": 0.9, "introduce": 1, "experiences": 100}, r"experience \d+ gets none"),
    ],
    ids=str,
)
def test_refuses(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**options)


@pytest.mark.parametrize("experiences", [0, 7])
def test_all_faults_at_once(experiences: int) -> None:
    with pytest.raises(UserError) as caught:
        make(experiences=experiences, blurry=2.0, validation=-1.0, first_classes=0)
    named = sorted(f.split(":")[0] for f in caught.value.faults)
    assert named == ["stream.blurry", "stream.experiences", "stream.first_classes", "stream.validation"]


def test_refuses_more_experiences_than_domains_and_rotated_features() -> None:
    with pytest.raises(UserError, match=r"5 is more than the 3 domains \(valid: 1 to 3\)"):
        make(source(domains=3), scenario="domain")
    with pytest.raises(UserError, match=r"'rotated' needs images"):
        make(source(shape=(9,)), scenario="rotated")


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64), r"train labels \(4,\) float32 for 4 inputs"),
        (
            torch.zeros(3, dtype=torch.int64),
            torch.zeros(4, dtype=torch.int64),
            r"train labels \(3,\) int64 for 4 inputs",
        ),
        (torch.tensor([0, 1, 2, -1]), torch.zeros(4, dtype=torch.int64), r"train labels hold -1"),
        (
            torch.tensor([0, 1, 2, 3]),
            torch.tensor([0, 1, 2, 9]),
            r"test labels \[9\] are not among the training labels",
        ),
    ],
)
def test_refuses_labels_that_do_not_fit(train: torch.Tensor, test: torch.Tensor, message: str) -> None:
    inputs = torch.zeros(4, 2)
    with pytest.raises(UserError, match=message):
        ScenarioStream(Source((inputs, train), (inputs, test)), experiences=1)
