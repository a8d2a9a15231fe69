"""Digits: 1,797 handwritten digits of 8x8 pixels, shipped with scikit-learn, so that a run needs no download.

Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998 (its test part).
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clplat.data.datasets import stratified_split
from clplat.data.scenarios import ScenarioStream, Source
from clplat.errors import MissingError


class Digits(ScenarioStream):
    """Handwritten digits, 8x8 pixels in [0, 1], 10 classes: 1,437 training and 360 test samples, always the same ones.

    Args:
        seed: of everything drawn; null takes the run's seed.
        data_root: not needed, the data come with scikit-learn.
    """

    def __init__(self, *, seed: int | None = None, data_root: str | None = None, **scenario: Any) -> None:
        table = read_digits()
        images = torch.from_numpy(table[:, :-1].reshape(-1, 1, 8, 8) / np.float32(16))
        labels = torch.from_numpy(table[:, -1].astype(np.int64))
        # The split that train_test_split(test_size=0.2, stratify=labels, random_state=0) gives.
        train, test = (
            torch.from_numpy(rows) for rows in stratified_split(labels.numpy(), test_share=0.2, random_state=0)
        )
        source = Source((images[train], labels[train]), (images[test], labels[test]))
        super().__init__(source, seed=seed, **scenario)
        self.origin = {"white": 16}


def read_digits() -> np.ndarray:
    """(1797, 65) float32: 64 pixels from 0 to 16, row by row, then the digit.

    The file is read without importing scikit-learn, which takes more than a second.

    Raises:
        MissingError: scikit-learn is not installed whole.
    """
    spec = importlib.util.find_spec("sklearn")
    folders = (spec.submodule_search_locations or []) if spec else []
    path = next((p for f in folders if (p := Path(f, "datasets/data/digits.csv.gz")).is_file()), None)
    if path is None:
        raise MissingError("stream digits: sklearn/datasets/data/digits.csv.gz is missing: install scikit-learn again")
    with gzip.open(path, "rt", encoding="ascii") as lines:
        return np.loadtxt(lines, delimiter=",", dtype=np.float32)
