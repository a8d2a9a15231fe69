"""Images: well-known image sets from the data root, as any scenario, held as bytes and normalised a batch at a time."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clplat.data.datasets import ImageSet, load_images
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


class Images(ScenarioStream):
    """Image sets: CIFAR-10 and -100, MNIST, Fashion-MNIST, notMNIST, SVHN, Omniglot (28x28), PACS (32x32, 4 domains).

    Args:
        seed: of everything drawn; null takes the run's seed.
        data_root: folder of data sets; null is $CLPLAT_DATA.
        dataset: which; read from `<data root>/<dataset>/train.npz` and `test.npz`. A list unites sets of images of one
            shape, each with its own classes, in that order; they are normalised alike.
        labels: fine, or coarse for the superclasses of cifar100.
        normalize: by mean and standard deviation of the dataset or of imagenet (three channels), or none: in [0, 1].
        augment: of training batches. flip_crop: mirrored with probability 1/2, and moved by up to 4 pixels.
        download: let torchvision fetch what is missing into the data root.

    Raises:
        MissingError: the set is not there; says what to put where.
    """

    def __init__(
        self,
        *,
        seed: int | None = None,
        data_root: str | None = None,
        dataset: Literal["cifar10", "cifar100", "mnist", "fashion_mnist", "notmnist", "svhn", "omniglot", "pacs32"]
        | list[str] = "cifar10",
        labels: Literal["fine", "coarse"] = "fine",
        normalize: Literal["dataset", "imagenet", "none"] = "dataset",
        augment: Literal["none", "flip_crop"] = "none",
        download: bool = False,
        **scenario: Any,
    ) -> None:
        names: list[str] = list(dataset) if isinstance(dataset, list) else [dataset]
        options = (*(("dataset", name, tuple(STATISTICS)) for name in names), ("labels", labels, ("fine", "coarse")),
                   ("normalize", normalize, ("dataset", "imagenet", "none")),
                   ("augment", augment, ("none", "flip_crop")))  # fmt: skip
        faults = [f"stream.{k}: {v!r} is unknown (valid: {', '.join(ok)})" for k, v, ok in options if v not in ok]
        if not names or len(set(names)) < len(names):
            faults.append(f"stream.dataset: {names} is empty or names a set twice (valid: a set, or distinct ones)")
        if faults:
            raise UserError(*faults)
        train, test, class_names = _united({name: load_images(name, data_root, download) for name in names})
        what = " + ".join(names)
        if normalize == "imagenet" and train.images.shape[1] != 3:
            raise UserError(f"stream.normalize: 'imagenet' needs three channels, {what} has one (valid: dataset, none)")
        domains = "domain" in train.extra and "domain" in test.extra
        source = Source(
            (train.images, _labels(train, what, labels)),
            (test.images, _labels(test, what, labels)),
            train_domains=train.extra["domain"] if domains else None,
            test_domains=test.extra["domain"] if domains else None,
            class_names=class_names,
            domain_names=DOMAIN_NAMES[what].split() if what in DOMAIN_NAMES else (),
            normalize={"dataset": _statistics(names), "imagenet": IMAGENET, "none": None}[normalize],
            augment=flip_crop if augment == "flip_crop" else None,
        )
        super().__init__(source, seed=seed, **scenario)


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
        numbers = [f"{name}_{c}" for c in range(int(train.labels.max()) + 1)]
        names += CLASS_NAMES[name].split() if name in CLASS_NAMES else numbers
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

    One gather for the batch, on its device. Images come normalised, so the border is their mean colour.
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
