"""Makes reference.npz: what the reference implementation gives for two pictures, with seeded draws.

    python tests/corruptions/make_reference.py FOLDER [OUT.npz]

FOLDER holds make_cifar_c.py and make_imagenet_c.py of hendrycks/robustness (Apache-2.0, ImageNet-C/create_c). Wants
numpy < 2, scipy, scikit-image, opencv-python-headless, Pillow, Wand with ImageMagick 6; no torch. What changed in these
packages since 2019 is bridged below; no line of a corruption is changed, but the side of the ImageNet generator is 64
instead of 224, to keep the file small.

Written with numpy 1.26.4, scipy 1.17.1, scikit-image 0.26.0, opencv 4.11.0, Pillow 13.0.0, Wand 0.7.2, ImageMagick
6.9.11-60.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import types
from pathlib import Path

import numpy as np

SEVERITIES = {"cifar": (1, 3, 5), "imagenet": (2, 5)}
SIDES = {"cifar": 32, "imagenet": 64}
FILES = {"cifar": "make_cifar_c.py", "imagenet": "make_imagenet_c.py"}
SEED = 2026
FROST, FROST_SIDE = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg"), 400


def picture(side: int, number: int) -> np.ndarray:
    """(side, side, 3) uint8: slopes, waves, a disk, a bar, a black and a white patch, fine grain."""
    rng = np.random.RandomState(number)
    y, x = np.mgrid[:side, :side] / side
    waves = rng.uniform(0.3, 3, (3, 3))
    image = np.stack([0.5 + 0.35 * np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in waves], -1)
    image[(x - 0.35) ** 2 + (y - 0.6) ** 2 < 0.05] = rng.uniform(0, 1, 3)
    image[abs(x - 0.75) < 0.06] = rng.uniform(0, 1, 3)
    image += 0.04 * rng.standard_normal(image.shape)
    image[: side // 8, : side // 4] = 0
    image[: side // 8, side // 4 : side // 2] = 1
    return (image.clip(0, 1) * 255).astype(np.uint8)


def write_frost(folder: Path) -> None:
    """Five stand-ins for the pictures of frost, under their names; what is in a file counts, not its name."""
    from PIL import Image

    for number, name in enumerate(FROST, 1):
        Image.fromarray(picture(FROST_SIDE, number)[: FROST_SIDE - 10 * number]).save(folder / name, format="PNG")


def load(folder: Path, family: str, side: int) -> dict[str, object]:
    """The functions of a generator."""
    import scipy.ndimage
    import skimage.color
    import skimage.filters
    import skimage.util.noise

    old = types.ModuleType("scipy.ndimage.interpolation")
    old.map_coordinates = scipy.ndimage.map_coordinates
    sys.modules["scipy.ndimage.interpolation"] = old
    source = (folder / FILES[family]).read_text().partition("# /////////////// End Distortions")[0]
    source = source.partition("# /////////////// Distortion Helpers ///////////////")[2]
    if family == "imagenet":
        source = re.sub(r"\b224\b", str(side), source)
        source = source.replace("mapsize=256", f"mapsize={1 << (side - 1).bit_length()}")
    source = "import warnings\nimport numpy as np\nfrom PIL import Image\n" + source.replace("np.float_", "np.float64")
    space: dict[str, object] = {}
    exec(compile(source, FILES[family], "exec"), space)
    gaussian = skimage.filters.gaussian

    def bridged(image, sigma, multichannel=False, **options):  # type: ignore[no-untyped-def]
        return gaussian(image, sigma=sigma, channel_axis=-1 if multichannel else None, **options)

    space["gaussian"] = bridged
    noise = skimage.util.noise.random_noise
    space["sk"].util.random_noise = lambda x, **o: noise(x, **o, rng=np.random.default_rng(SEED))
    return space


def main() -> None:
    from PIL import Image

    folder = Path(sys.argv[1]).resolve()
    out = Path(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).with_name("reference.npz")).resolve()
    found = {}
    frost = tempfile.TemporaryDirectory()
    write_frost(Path(frost.name))
    os.chdir(frost.name)  # where the generators look for it
    for family, side in SIDES.items():
        space = load(folder, family, side)
        names = re.findall(r"^d\['.*'\] = (\w+)", (folder / FILES[family]).read_text(), re.MULTILINE)
        for name in names:
            for severity in SEVERITIES[family]:
                np.random.seed(SEED)  # noqa: NPY002 - what the generators draw from
                image = Image.fromarray(picture(side, 0))
                found[f"{family}/{name}/{severity}"] = np.uint8(np.asarray(space[name](image, severity)))
    np.savez_compressed(out, **found)
    print(f"{len(found)} pictures, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
