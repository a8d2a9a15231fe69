"""Who normalises inputs, the stream or the network: one of them, once, and as the network's weights need it."""

from __future__ import annotations

from collections.abc import Sequence

from clplat.backbones.base import Backbone
from clplat.stream import Statistics, Stream

_SLACK = 0.05  # by which images in [0, 1] may leave it, as resampling by splines does


def agree(stream: Stream, backbone: Backbone) -> list[str]:
    """Faults of how inputs are normalised. Where the backbone does it, the stream's own default is left out.

    Notes of what was decided, of what else the backbone does to its inputs, and of weights that get other inputs than
    they were trained with, join `stream.notes`.
    """
    stream.notes = (*stream.notes, *backbone.notes)
    if backbone.input_mean is None or backbone.input_std is None:
        if backbone.expects is not None and not _same(stream.normalize, backbone.expects):
            needs = _said(backbone.expects)
            note = f"backbone.normalize: none, but the weights were trained on images normalised by {needs}"
            stream.notes = (*stream.notes, f"{note}, and the stream gives {_said(stream.normalize)}")
        return []
    own = backbone.input_mean.flatten().tolist(), backbone.input_std.flatten().tolist()
    faults, notes = list[str](), list[str]()
    if stream.normalize is not None and not _same(stream.normalize, own):
        if stream.normalize_asked:
            what = f"stream.normalize: images would be normalised twice, here by {_said(stream.normalize)} and in the"
            faults.append(f"{what} backbone by {_said(own)} (valid: none, or backbone.normalize none)")
        else:
            notes.append(f"stream.normalize: none, since the backbone normalises by {_said(own)}")
    if backbone.expects is not None and not _same(own, backbone.expects):
        what = f"backbone.normalize: by {_said(own)}, but the weights were trained with {_said(backbone.expects)}"
        notes.append(f"{what} (null takes that)")
    stream.leave_normalization()
    low, high = stream.input_range or (0.0, 1.0)
    if low < -_SLACK or high > 1 + _SLACK:
        what = f"backbone.normalize: takes images in [0, 1], but the stream's inputs reach from {low:g} to {high:g}"
        faults.append(f"{what} (valid: none, or inputs in [0, 1], as by stream.scale)")
    stream.notes = (*stream.notes, *notes)
    return faults


def _same(one: Statistics | None, other: Statistics | None) -> bool:
    """Whether two normalisations are one, to the digits that are published; by one number means by it each channel."""
    if one is None or other is None:
        return one is other
    return all(
        (len(a) == len(b) or 1 in (len(a), len(b)))
        and all(abs(x - y) < 1e-3 for x, y in zip(_spread(a, len(b)), _spread(b, len(a)), strict=True))
        for a, b in zip(one, other, strict=True)
    )


def _spread(values: Sequence[float], size: int) -> list[float]:
    return list(values) * size if len(values) == 1 else list(values)


def _said(statistics: Statistics | None) -> str:
    """In words: none, or mean and deviation of each channel."""
    if statistics is None:
        return "none"
    mean, std = ("/".join(f"{v:.3g}" for v in values) for values in statistics)
    return f"mean {mean}, deviation {std}"
