"""Images: well-known image sets from the data root, as any scenario, held as bytes and normalised a batch at a time."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clplat.data.datasets import CLASSES, ImageSet, find_path, load_images
from clplat.data.decoded import statistics
from clplat.data.folders import Pictures, read_pictures
from clplat.data.pictures import WHITE
from clplat.data.scenarios import ScenarioStream, Source
from clplat.errors import UserError

# Mean and standard deviation of the training images in [0, 1], per channel.
STATISTICS: dict[str, tuple[list[float], list[float]]] = {
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "cifar100": ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
    "mnist": ([0.1307], [0.3081]),
    "fashion_mnist": ([0.2860], [0.3530]),
    "notmnist": ([0.4266], [0.4589]),
    "omniglot": ([0.0783], [0.2331]),
    "pacs32": ([0.7642, 0.7445, 0.7157], [0.2891, 0.2924, 0.3163]),
    "svhn": ([0.4377, 0.4438, 0.4728], [0.1980, 0.2010, 0.1970]),
}
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
CLASS_NAMES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "fashion_mnist": "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle_boot",
    "notmnist": "A B C D E F G H I J",
    "pacs32": "dog elephant giraffe guitar horse house person",
}
DOMAIN_NAMES = {"pacs32": "photo art_painting cartoon sketch"}
_OWN = {"size": None, "grey": False, "scale": None, "test_share": 0.2, "in_memory": None, "workers": None}
_SETS = {"dataset": None, "labels": "fine", "download": False}  # options of these sets, where they are not used


class Images(ScenarioStream):
    """Image sets: CIFAR-10 and -100, MNIST, Fashion-MNIST, notMNIST, SVHN, Omniglot (28x28), PACS (32x32, 4 domains);
    or your own pictures, in folders or listed.

    Args:
        seed: of everything drawn; null takes the run's seed.
        data_root: folder of data sets; null is $CLPLAT_DATA.
        dataset: which; read from `<data root>/<dataset>/train.npz` and `test.npz`. A list unites sets of images of one
            shape, each with its own classes, in that order; they are normalised alike. null is cifar10, or `path`.
        path: your own: a folder of train/<class>/*.jpg and test/<class>/*.jpg; or of train/*.tar and test/*.tar, as
            WebDataset writes them; or a .csv or .parquet listing with the columns path, label, and if you have them
            split (train, test) and domain. Relative to here or the data root.
        size: side of your own in pixels, ≥ 1: the shorter side is scaled to it and the middle cut out; null: as they
            are, all of one size.
        grey: your own have one channel; otherwise three.
        scale: number that your own of 16 bits are divided by, > 0: the one that is white. null: 65535, refused where
            two bits are unused in all of them.
        test_share: in (0, 1), of each class's pictures, always the same, held out where your own have no test part.
        in_memory: false leaves your own in their files and decodes them as they are needed, which changes no result;
            null does so if they would take more than a quarter of the free memory.
        workers: threads that decode, ≥ 1, where they are not in memory; null: as many as processor cores, at most 8.
        labels: fine, or coarse for the superclasses of cifar100.
        normalize: by mean and standard deviation of the dataset or of imagenet (three channels), or none: in [0, 1].
            null: dataset, but none where the backbone normalises.
        augment: of training batches. flip_crop: mirrored with probability 1/2, and moved by up to 4 pixels.
        download: let torchvision fetch what is missing into the data root.

    Raises:
        UserError: an option out of range; pictures that can be read in several ways (see `clplat.data.pictures`).
        MissingError: the set or a picture is not there; says what to put where.
    """

    def __init__(
        self,
        *,
        seed: int | None = None,
        data_root: str | None = None,
        dataset: Literal["cifar10", "cifar100", "mnist", "fashion_mnist", "notmnist", "svhn", "omniglot", "pacs32"]
        | list[str]
        | None = None,
        path: str | None = None,
        size: int | None = None,
        grey: bool = False,
        scale: float | None = None,
        test_share: float = 0.2,
        labels: Literal["fine", "coarse"] = "fine",
        normalize: Literal["dataset", "imagenet", "none"] | None = None,
        augment: Literal["none", "flip_crop"] = "none",
        download: bool = False,
        in_memory: bool | None = None,
        workers: int | None = None,
        **scenario: Any,
    ) -> None:
        names: list[str] = list(dataset) if isinstance(dataset, list) else [dataset or "cifar10"]
        faults = _faults(names, {"labels": labels, "normalize": normalize, "augment": augment})
        own: dict[str, Any] = {"size": size, "grey": grey, "scale": scale, "test_share": test_share}
        own |= {"in_memory": in_memory, "workers": workers}
        faults += _own_faults(path, own, {"dataset": dataset, "labels": labels, "download": download})
        if faults:
            raise UserError(*faults)
        if path is None:
            found = _known(names, data_root, download, labels)
        else:
            found = read_pictures(find_path(path, data_root), **own)
        channels = found.train.images.shape[1]
        if normalize == "imagenet" and channels != 3:
            raise UserError(f"stream.normalize: 'imagenet' needs three channels, not {channels} (valid: dataset, none)")
        domains = "domain" in found.train.extra and "domain" in found.test.extra
        given = IMAGENET if normalize == "imagenet" else None
        if normalize in ("dataset", None):
            given = _statistics(names) if path is None else statistics(found.train.images)
        source = Source(
            (found.train.images, found.train.labels),
            (found.test.images, found.test.labels),
            train_domains=found.train.extra["domain"] if domains else None,
            test_domains=found.test.extra["domain"] if domains else None,
            class_names=found.classes,
            domain_names=found.domains,
            normalize=given,
            augment=flip_crop if augment == "flip_crop" else None,
        )
        super().__init__(source, seed=seed, **scenario)
        self.normalize_asked = normalize is not None
        self.notes = (*self.notes, *found.notes)
        deep = found.train.images.dtype != torch.uint8  # some of the pictures have 16 bits
        self.origin = {"fit": "none" if size is None else "middle"} | ({"white": scale or WHITE} if deep else {})


def _faults(names: list[str], options: dict[str, Any]) -> list[str]:
    """One line for each choice that there is not."""
    valid = {
        "labels": ("fine", "coarse"),
        "normalize": ("dataset", "imagenet", "none"),
        "augment": ("none", "flip_crop"),
    }
    asked = [("dataset", name, tuple(STATISTICS)) for name in names]
    asked += [(key, value, valid[key]) for key, value in options.items() if value is not None]
    faults = [f"stream.{key}: {v!r} is unknown (valid: {', '.join(ok)})" for key, v, ok in asked if v not in ok]
    if not names or len(set(names)) < len(names):
        faults.append(f"stream.dataset: {names} is empty or names a set twice (valid: a set, or distinct ones)")
    return faults


def _own_faults(path: str | None, own: dict[str, Any], sets: dict[str, Any]) -> list[str]:
    """One line for each option out of range, and for each that the other kind of source takes."""
    idle = dict(_OWN) if path is None else dict(_SETS)
    given, where = (own, "with stream.path") if path is None else (sets, "without stream.path")
    faults = [f"stream.{key}: {given[key]!r} has no meaning here (valid: {value!r}; used {where})"
              for key, value in idle.items() if given[key] != value]  # fmt: skip
    if own["size"] is not None and own["size"] < 1:
        faults.append(f"stream.size: {own['size']} is out of range (valid: ≥ 1, or null)")
    if own["workers"] is not None and own["workers"] < 1:
        faults.append(f"stream.workers: {own['workers']} is out of range (valid: ≥ 1, or null)")
    if not 0 < own["test_share"] < 1:
        faults.append(f"stream.test_share: {own['test_share']} is out of range (valid: in (0, 1))")
    return faults


def _known(names: list[str], data_root: str | None, download: bool, labels: str) -> Pictures:
    """Well-known sets; with coarse labels, whose names are not known."""
    train, test, classes = _united({name: load_images(name, data_root, download) for name in names})
    what = " + ".join(names)
    parts = [ImageSet(part.images, _labels(part, what, labels), part.extra) for part in (train, test)]
    domains = DOMAIN_NAMES[what].split() if what in DOMAIN_NAMES else []
    return Pictures(parts[0], parts[1], classes if labels == "fine" else [], domains, [])


def _united(sets: dict[str, tuple[ImageSet, ImageSet]]) -> tuple[ImageSet, ImageSet, list[str]]:
    """Training and test part of all sets, the classes of each after those of the one before, and their names."""
    if len(sets) == 1:
        ((name, (train, test)),) = sets.items()
        return train, test, CLASS_NAMES.get(name, "").split()
    shapes = {name: tuple(train.images.shape[1:]) for name, (train, _) in sets.items()}
    if len(set(shapes.values())) > 1:
        raise UserError(f"stream.dataset: images are {shapes} (valid: sets of images of one shape)")
    names: list[str] = []
    numbered: list[tuple[Tensor, Tensor]] = []
    for name, (train, test) in sets.items():
        numbered.append((train.labels + len(names), test.labels + len(names)))
        count = CLASSES.get(name) or int(train.labels.max()) + 1
        names += CLASS_NAMES[name].split() if name in CLASS_NAMES else [f"{name}_{c}" for c in range(count)]
    parts = [
        ImageSet(torch.cat([s[i].images for s in sets.values()]), torch.cat([n[i] for n in numbered]), {})
        for i in (0, 1)
    ]
    return parts[0], parts[1], names


def _statistics(names: list[str]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of sets of equal weight."""
    mean, std = torch.tensor([STATISTICS[n] for n in names], dtype=torch.float64).unbind(1)  # (sets, C) each
    spread = (std**2 + mean**2).mean(0) - mean.mean(0) ** 2
    return mean.mean(0).tolist(), spread.sqrt().tolist()


def _labels(part: ImageSet, dataset: str, which: str) -> Tensor:
    if which == "fine":
        return part.labels
    if "coarse" not in part.extra:
        raise UserError(f"stream.labels: 'coarse' is not known for {dataset} here (valid: fine)")
    return part.extra["coarse"]


def flip_crop(images: Tensor, padding: int = 4) -> Tensor:
    """Each image (B, C, H, W) mirrored with probability 1/2 and cut at random from its zero-padded self.

    One gather for the batch, on its device. The border is 0: the mean colour of normalised images, black in [0, 1].
    """
    count, channels, height, width = images.shape
    device = images.device
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1), device=device)
    mirrored = torch.rand(count, 1, device=device) < 0.5
    columns = torch.arange(width, device=device)
    columns = left + torch.where(mirrored, columns.flip(0), columns)  # (B, W)
    rows = top + torch.arange(height, device=device)  # (B, H)
    pixels = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]  # (B, H, W), in the padded image
    padded = F.pad(images, (padding,) * 4).flatten(2)
    return padded.gather(2, pixels.view(count, 1, -1).expand(-1, channels, -1)).view_as(images)
