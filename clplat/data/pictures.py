"""Pictures of any mode to grey or RGB pixels, scaled by their true range: 8 bits a channel, or 16 where they have them.

Told apart: 1 bit, grey, palette, RGB, CMYK, YCbCr, HSV and 16-bit grey; opaque alpha channels; the turn that EXIF asks
for; the bits that a TIFF says it has. Refused, since what is meant can't be known: transparent pixels, several frames,
32-bit and floating-point pixels, and 16 bits that leave the upper ones unused throughout, as cameras of 12 bits do.

Shapes: N pictures, H rows, W columns, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clplat.data.on_disk import Member, Place
from clplat.errors import MissingError, UserError
from clplat.inputs import Inputs

_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBA", "La", "RGBa")
WHITE = 65535  # of 16 bits
_ORIENTATION, _EXCHANGED = 0x0112, range(5, 9)  # EXIF's tag, and its values that exchange height and width
Fit = Callable[[Any], Any]  # a Pillow image to one of the wanted size


def pixels(image: Any, name: str, *, grey: bool = False, fit: Fit | None = None) -> np.ndarray:
    """(H, W, C) uint8 in [0, 255] or uint16 in [0, 65535], C = 1 if grey, else 3.

    Args:
        image: of Pillow, opened.
        name: of the picture, for messages.
        fit: resizes or cuts it.

    Raises:
        UserError: a picture that can be read in several ways.
        MissingError: one that is cut short or damaged.
    """
    from PIL import ImageOps, UnidentifiedImageError

    _check_frames(image, name)
    try:
        bits = _bits(image, name)
        image = ImageOps.exif_transpose(image)
        deep = image.mode.startswith("I;16")
        if not deep and image.mode not in _MODES:
            what = f"{name} has pixels of mode {image.mode}, whose range or colours are not known"
            raise UserError(f"stream: {what} (valid: grey of 1, 8 or 16 bits, palette, RGB, CMYK, YCbCr, HSV)")
        image = image.convert("F") if deep else _opaque(image, name).convert("L" if grey else "RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, EOFError) as error:
        raise MissingError(f"stream: {name} can't be read ({error}): replace it by a whole picture") from error
    array = np.asarray(image if fit is None else fit(image))
    if deep:
        array = (array * (65535 / (2**bits - 1))).round().clip(0, 65535).astype(np.uint16)
    array = array if array.ndim == 3 else array[..., None]
    return array if grey or array.shape[-1] == 3 else array.repeat(3, -1)


def as_bytes(picture: np.ndarray, name: str) -> Tensor:
    """(C, H, W) uint8 of the `pixels` of a published set's picture.

    Raises:
        UserError: they have 16 bits.
    """
    if picture.dtype != np.uint8:
        raise UserError(f"stream: {name} has 16 bits (valid: 8, as the set is published)")
    return channels_first(picture[None])[0]


def _check_frames(image: Any, name: str) -> None:
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a phone's MPO has a preview as second frame
        raise UserError(f"stream: {name} has {image.n_frames} frames (valid: one picture a file)")


def read_picture(path: Place, *, grey: bool = False, fit: Fit | None = None) -> np.ndarray:
    """`pixels` of the picture in a file, or in one within a tar file. Raises as it does."""
    with _opened(path) as image:
        return pixels(image, str(path), grey=grey, fit=fit)


def read_head(path: Place) -> tuple[int, int, bool]:
    """Height and width of the picture in a file as `read_picture` gives it without a fit, and whether it has 16 bits;
    most formats are not decoded for it. Raises as `read_picture` does, as far as that tells."""
    with _opened(path) as image:
        _check_frames(image, str(path))
        turned = image.getexif().get(_ORIENTATION) in _EXCHANGED
        height, width = image.size if turned else image.size[::-1]
        return height, width, image.mode.startswith("I;16")


@contextmanager
def _opened(path: Place) -> Iterator[Any]:
    """A picture's file, opened by Pillow."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(BytesIO(path.content()) if isinstance(path, Member) else path) as image:
            yield image
    except FileNotFoundError:
        raise MissingError(f"stream: {path} is missing: put the picture there") from None
    except (UnidentifiedImageError, OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise MissingError(f"stream: {path} can't be read ({error}): replace it by a whole picture") from error


def stacked(*parts: Sequence[np.ndarray], key: str = "stream.size", scale: float | None = None) -> list[Tensor]:
    """Each part's pictures as (N, C, H, W): bytes, or floats in [0, 1] where a picture of any part has 16 bits.

    Args:
        parts: (H, W, C) uint8 or uint16 pixels of each picture.
        key: of the configuration that resizes.
        scale: what is white in those of 16 bits, > 0; None: 65535, and refused where two bits are unused in all.
    """
    shapes, deep = {a.shape for part in parts for a in part}, [a for part in parts for a in part if a.dtype != np.uint8]
    white = agreed(shapes, max((int(a.max()) for a in deep), default=None), key, scale)
    tables = [np.stack(part if white is None else [in_floats(a, white) for a in part]) for part in parts]
    return [channels_first(table) for table in tables]


def agreed(shapes: Iterable[tuple[int, ...]], highest: int | None, key: str, scale: float | None) -> float | None:
    """What is white in the pictures of 16 bits of a data set; None where none has so many. Raises as `stacked` does.

    Args:
        shapes: (H, W, C) that its pictures have.
        highest: largest number in those of 16 bits; None: there are none.
        key, scale: as in `stacked`.
    """
    found = sorted(shapes)
    if scale is not None and not scale > 0:
        raise UserError(f"stream.scale: {scale} is out of range (valid: > 0, or null)")
    if len(found) > 1:
        raise UserError(f"{key}: images of {len(found)} shapes, {found[0]} to {found[-1]} (give a size)")
    if highest is None:
        if scale is not None:
            raise UserError(f"stream.scale: {scale} has no meaning for pictures of 8 bits (valid: null)")
        return None
    if scale is None and 0 < highest < WHITE // 4:
        what = f"the pictures of 16 bits reach at most {highest}, not {WHITE}"
        valid = f"the number that is white, as {2 ** highest.bit_length() - 1}, or {WHITE}"
        raise UserError(f"stream.scale: {what} (valid: {valid})")
    return scale or WHITE


def in_floats(picture: np.ndarray, white: float) -> np.ndarray:
    """Pixels of 8 bits, or of 16 in which `white` is white, as 32-bit floats in [0, 1]."""
    return picture / np.float32(255 if picture.dtype == np.uint8 else white)


def channels_first(images: np.ndarray) -> Tensor:
    """(N, H, W) or (N, H, W, C) to (N, C, H, W), in one piece of memory."""
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.require(images, requirements=["C", "W"]))


def measured(images: Tensor | Inputs) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of images (N, C, H, W), bytes or in [0, 1], as floats in [0, 1]."""
    # The sums of bytes do not depend on their order.
    white, exact = (255, torch.int64) if images.dtype == torch.uint8 else (1, torch.float64)
    sums = torch.zeros(2, images.shape[1], dtype=exact)
    for part in images.split(256):
        wide = part.to(exact)
        sums += torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])
    mean, square = sums.double() / (images.numel() / images.shape[1]) / torch.tensor([[white], [white**2]])
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    return mean.tolist(), torch.where(deviation > 1e-6, deviation, 1.0).tolist()


def middle(side: int) -> Fit:
    """The shorter side scaled to `side` pixels, and the middle cut out."""

    def fit(image: Any) -> Any:
        from torchvision.transforms import functional as T

        return T.center_crop(T.resize(image, side, T.InterpolationMode.BICUBIC), [side, side])

    return fit


def squeezed(side: int) -> Fit:
    """Height and width scaled to `side` pixels, each by its own factor."""
    return lambda image: image.resize((side, side))


def cropped(side: int) -> Fit:
    """The middle, after the shorter side is scaled to 8/7 of it, as is usual for ImageNet; of that size: as it is."""

    def fit(image: Any) -> Any:
        if image.size == (side, side):
            return image
        scale = side * 8 // 7 / min(image.size)
        width, height = (max(round(n * scale), side) for n in image.size)
        left, top = round((width - side) / 2), round((height - side) / 2)
        return image.resize((width, height), 2).crop((left, top, left + side, top + side))  # 2: bilinear

    return fit


FITS: dict[str, Callable[[int], Fit]] = {"middle": middle, "squeezed": squeezed, "cropped": cropped}


def stretched(images: Tensor, side: int) -> Tensor:
    """Bytes (N, C, H, W), C 1 or 3, as bytes (N, 3, side, side): scaled, bilinear; grey in three equal channels."""
    found = images.float()
    if tuple(found.shape[-2:]) != (side, side):
        found = F.interpolate(found, (side, side), mode="bilinear", align_corners=False, antialias=True)
    return found.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


def _bits(image: Any, name: str) -> int:
    """Bits of a grey pixel that comes in 16: those a TIFF names, else 16. (sBIT of a PNG is of values scaled to 16.)

    Raises:
        UserError: colours of 16 bits that use the lower ones alone, of which Pillow reads the upper 8.
    """
    if ";16" in str(getattr(image, "tile", "")) and not image.mode.startswith("I;16"):
        highest = max(high for _, high in (band.getextrema() for band in image.split()))
        if 0 < highest < 16:
            what = f"{name} has 16 bits a channel and uses the lower 12 alone, of which 4 would be read"
            raise UserError(f"stream: {what} (valid: colours scaled to 16 bits or 8, or grey)")
    return int(image.tag_v2.get(258, (16,))[0]) if image.format == "TIFF" and image.mode.startswith("I;16") else 16


def _opaque(image: Any, name: str) -> Any:
    """The image without an alpha channel that hides nothing."""
    if not image.has_transparency_data:
        return image
    image = image.convert({"La": "LA"}.get(image.mode, "RGBA")).convert("RGBA")
    if image.getchannel("A").getextrema()[0] < 255:
        raise UserError(
            f"stream: {name} has transparent pixels (valid: opaque ones: put it on the background you mean)"
        )
    return image
