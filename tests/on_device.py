"""What the tests of a device share: streams that can be moved to one, strategies that draw on it, counted copies."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clplat import Data, Experience, Kind, Stream
from clplat.strategies.er import ER
from clplat.strategies.naive import Naive
from clplat.streams.images import flip_crop
from clplat.testing.streams import TinyStream

HERE = Path(__file__)
DEVICE = os.environ.get(
    "CLPLAT_TEST_DEVICE", "cuda"
)  # cpu: the tests of a device run on the CPU, to show that they run
WHY_NONE = None if DEVICE == "cpu" or torch.cuda.is_available() else "no GPU: torch.cuda.is_available() is False"


class Tiny(Stream):
    """The conformance suite's stream, whose own form stays on the CPU.

    Args:
        kinds: joined by commas.
        seed: of the samples.
    """

    def __init__(self, *, kinds: str, seed: int = 0, data_root: str | None = None) -> None:
        tiny = TinyStream({Kind(kind) for kind in kinds.split(",")}, seed=seed, repeat=2)
        names = [field.name for field in dataclasses.fields(Experience)]
        plain = [Experience(**{name: getattr(e, name) for name in names}) for e in tiny]
        super().__init__(plain, num_classes=tiny.num_classes, input_shape=tiny.input_shape)
        self.answers = tiny.answers


class Pictures(Stream):
    """One experience of 96 images in bytes, mirrored and moved in training.

    Args:
        seed: of the images.
    """

    def __init__(self, *, seed: int = 0, data_root: str | None = None) -> None:
        drawn = torch.Generator().manual_seed(seed)
        data = Data(
            torch.randint(256, (96, 3, 8, 8), generator=drawn, dtype=torch.uint8),
            torch.randint(4, (96,), generator=drawn),
        )
        seen = Experience(0, "pictures", Kind.LEARN, data, classes=(0, 1, 2, 3))
        super().__init__(
            [seen], num_classes=4, input_shape=(3, 8, 8), normalize=([0.5] * 3, [0.25] * 3), augment=flip_crop
        )


class Noisy(ER):
    """Replay whose inputs get noise of the device's own generator."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return super().training_step((x + 0.1 * torch.randn_like(x), y), batch_idx)


class Told(Naive):
    """Fine-tuning that tells whether its processes are joined by NCCL."""

    def measurements(self) -> dict[str, float]:
        return {"nccl": float(torch.distributed.get_backend() == "nccl")}


def config(output: Path, device: str = DEVICE, **keys: Any) -> dict[str, Any]:
    """Of a run of naive on `Pictures` on a device; keys stand for its own."""
    own = {
        "strategy": "naive", "stream": f"{HERE}:Pictures", "seed": 1, "output": str(output),
        "backbone": {"name": "vit_micro", "patch_size": 2, "dim": 8, "depth": 2, "heads": 2}, "head": "linear",
        "loop.batch_size": 4, "loop.checkpoint_seconds": None, "loop.representation": False,
        "tracking.enabled": False, "fabric.accelerator": device,
    }  # fmt: skip
    return own | keys


def copies(work: Callable[[], Any]) -> int:
    """How often `work` copies from the host's memory to the device's, as the device's profiler sees it."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if DEVICE != "cpu":
        kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as seen:
        work()
        if DEVICE != "cpu":
            torch.cuda.synchronize()
    return sum(event.name.startswith("Memcpy HtoD") for event in seen.events() or ())
