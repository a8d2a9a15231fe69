"""Arrays to inputs: which axis holds the channels, and which number is white."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clplat.data.arrays import as_inputs, channel_axis
from clplat.data.splits import first_per_class, places
from clplat.errors import UserError

RNG = np.random.default_rng(0)


def one(array, **how):
    made, notes, _ = as_inputs({"x": array}, **how)
    return made["x"], notes


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((9, 3, 32, 32), 1),
        ((9, 32, 32, 3), 3),
        ((9, 1, 8, 6), 1),
        ((9, 8, 6, 1), 3),
        ((9, 3, 4, 4), 1),
        ((9, 4, 4, 3), 3),
        ((9, 12, 7, 7), 1),  # feature maps
        ((9, 7, 7, 12), 3),
        ((9, 512, 1, 1), None),  # a square before, or one channel behind
        ((9, 3, 32, 3), None),
        ((9, 8, 8, 8), None),
        ((9, 5, 6, 7), None),
    ],
)
def test_channel_axis(shape, axis):
    assert channel_axis(shape) == axis


def test_both_layouts_give_the_same_images():
    first = RNG.integers(0, 256, (5, 3, 8, 6), dtype=np.uint8)
    inputs, notes = one(first.transpose(0, 2, 3, 1))
    assert torch.equal(inputs, one(first)[0])
    assert inputs.dtype == torch.uint8
    assert inputs.is_contiguous()
    assert notes == ["stream.layout: channels_last, by the sides of x (5, 8, 6, 3)"]
    assert one(first)[1] == []
    unclear = first[:, :, :, :3]
    with pytest.raises(UserError, match=r"stream\.layout: .*\(5, 3, 8, 3\) can't be told .*channels_last"):
        one(unclear)
    assert one(unclear, layout="channels_last")[0].shape == (5, 3, 3, 8)
    assert one(unclear, layout="channels_first")[0].shape == (5, 3, 8, 3)
    assert one(first[:, 0])[0].shape == (5, 1, 8, 6)
    with pytest.raises(UserError, match=r"stream\.layout: 'channels_last' has no meaning"):
        one(first[:, 0, 0].astype(np.float32), layout="channels_last")


WIDE = np.array([0, 255, 65535, 40000], np.uint16).reshape(1, 1, 2, 2)


@pytest.mark.parametrize(
    ("array", "scale", "expected"),
    [
        (WIDE, None, [0, 255 / 65535, 1, 40000 / 65535]),
        (WIDE // 16, 4095, [0, 15 / 4095, 1, 2500 / 4095]),
        (WIDE // 1024, None, r"stream\.scale: x are uint16 up to 63, not 65535 \(valid: .*as 63, or 65535"),
        (np.array([[[[0, 1], [1, 0]]]], np.uint8), None, r"stream\.scale: x are uint8 up to 1, not 255"),
        (np.array([[[[0, 1], [1, 0]]]], np.uint8), 1, [0, 1, 1, 0]),
        (np.array([[[[False, True], [True, False]]]]), None, [0, 1, 1, 0]),
        (WIDE.astype(np.int64) // 257, None, r"stream\.scale: x are int64 from 0 to 255, whose range is not known"),
        (WIDE.astype(np.int64) // 257, 255, [0, 0, 1, 155 / 255]),
        (np.array([[0, 7, -3, 2**24]]), None, [0, 7, -3, 2**24]),  # features
        (np.array([[0, 7, -3, 2**24 + 1]]), None, r"not exact in 32 bits"),
        (np.array([[0.5, 7, -3, 9]]), None, [0.5, 7, -3, 9]),
        (np.array([[0.5, 7, -3, 9]]), 2, [0.25, 3.5, -1.5, 4.5]),
        (np.array([[0.5, 7, -3, 9]], ">f8"), None, [0.5, 7, -3, 9]),  # another byte order
        (np.array([[0.5, 7, -3, 9]]), 0, r"stream\.scale: 0 is out of range"),
        (np.array([["a", "b"]]), None, r"x holds <U1 \(valid: numbers\)"),
        (np.arange(4.0), None, r"inputs differ: x \(\) float64"),
    ],
    ids=str,
)
def test_scaled_by_their_true_range(array, scale, expected):
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            one(array, scale=scale)
        return
    inputs, _ = one(array, scale=scale)
    assert inputs.dtype == torch.float32
    np.testing.assert_allclose(inputs.flatten(), np.array(expected, np.float32), rtol=1e-6)


def test_floats_beyond_one_are_taken_as_they_are_and_said():
    images = RNG.uniform(0, 255, (4, 3, 5, 5)).astype(np.float32)
    inputs, notes = one(images)
    assert torch.equal(inputs, torch.from_numpy(images))
    assert notes[0].startswith("stream.scale: x reach from ")
    assert one(images / 255)[1] == one(images - 128)[1] == one(images, scale=255)[1] == []


def test_what_the_user_holds_is_not_changed():
    images = RNG.uniform(0, 255, (4, 3, 5, 5)).astype(np.float32)
    kept = images.copy()
    one(images, scale=255)
    np.testing.assert_array_equal(images, kept)
    frozen = images.astype(np.uint8)
    frozen.flags.writeable = False
    assert one(frozen)[0].dtype == torch.uint8


@given(st.lists(st.integers(0, 2**62), min_size=1), st.lists(st.integers(0, 2**62)))
def test_places_of_ids_of_any_size(among, others):
    among, ids = list(dict.fromkeys(among)), [*among, *others]
    expected = [among.index(i) if i in among else -1 for i in ids]
    assert places(np.array(ids), np.array(among)).tolist() == expected


@given(
    st.lists(st.tuples(st.sampled_from([0, 3, 10**12]), st.sampled_from([0, 10**15])), min_size=1), st.integers(1, 3)
)
def test_first_per_class_and_domain_of_any_size(pairs, count):
    labels, domains = np.array(pairs).T
    expected = [i for i, pair in enumerate(pairs) if pairs[:i].count(pair) < count]
    assert first_per_class(labels, domains, count).tolist() == expected
