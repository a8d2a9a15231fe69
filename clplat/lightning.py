"""Lightning's `Fabric` and `LightningModule`, imported without the four seconds that clplat has no use for.

Lightning imports torchmetrics, which imports torchvision, transformers, SciPy and matplotlib wherever they are
installed, for metrics that no training loop needs. Here torchmetrics is told, for the length of one import, that they
are absent; the thin copy that Lightning then holds is taken out of `sys.modules`, so that whoever imports
torchmetrics later gets the whole of it.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_utilities.core import imports
from lightning_utilities.core.imports import RequirementCache

_UNUSED = frozenset(
    [
        "matplotlib",
        "nltk",
        "regex",
        "scienceplots",
        "scipy",
        "sentencepiece",
        "torchaudio",
        "torchvision",
        "transformers",
    ]
)


@contextmanager
def _thin_torchmetrics() -> Iterator[None]:
    if "torchmetrics" in sys.modules or "lightning" in sys.modules:
        yield
        return
    check, package_available = RequirementCache._check_available, imports.package_available

    def without(self: RequirementCache) -> None:
        if self.requirement is not None and self.requirement.split(">")[0].strip() in _UNUSED:
            self.available, self.message = False, "not needed by clplat"
        else:
            check(self)

    RequirementCache._check_available = without  # type: ignore[method-assign]
    imports.package_available = lambda name: name not in _UNUSED and package_available(name)  # type: ignore[assignment]
    try:
        yield
    finally:
        RequirementCache._check_available = check  # type: ignore[method-assign]
        imports.package_available = package_available
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchmetrics"]:
            del sys.modules[name]


_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
_checked = os.environ.get(_CHECK)
with _thin_torchmetrics():
    from lightning import Fabric, LightningModule
# Lightning sets it so that notebooks can fork; we never fork, and Adam asks for the check at each step: 0.1 ms with it.
if _checked is None:
    os.environ.pop(_CHECK, None)

# What it says at start-up (processes, back ends) is not for the user of a run.
for _name in ("lightning.fabric", "lightning.pytorch", "lightning_utilities.core.rank_zero"):
    logging.getLogger(_name).setLevel(logging.WARNING)

__all__ = ["Fabric", "LightningModule"]
