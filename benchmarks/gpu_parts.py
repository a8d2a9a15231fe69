"""The parts of `python -m benchmarks.gpu`: each gives its figures one by one, so that one cut off keeps what it has.

Weights are random and data are drawn, so that nothing is downloaded. In small every part runs on tiny models, which
shows on a CPU that it runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor

from benchmarks.in_turn import Work, compare
from benchmarks.timing import paired

Found = Iterator[dict[str, Any]]
TESTS = Path(__file__).parents[1] / "tests" / "test_gpu.py"
LIMIT = 1 / 0.97  # of the time of a step: 0.97 of the throughput
STATISTICS = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def tests(device: torch.device, small: bool) -> Found:
    """The tests that are marked `gpu`: runs of each kind, exact resume, data that stay on the device, NCCL, bf16."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:xdist", "-p", "no:cacheprovider",
                   f"--junit-xml={report}", str(TESTS)]  # fmt: skip
        done = subprocess.run(
            command, env={**os.environ, "CLPLAT_TEST_DEVICE": device.type}, cwd=TESTS.parents[1], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        if not report.is_file():
            raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-500:]}")
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            told = {kind: case.find(kind) for kind in ("failure", "error", "skipped")}
            kind, node = next(((k, n) for k, n in told.items() if n is not None), ("passed", None))
            why = "" if node is None else str(node.get("message"))
            yield {"name": case.get("name"), "outcome": kind, "why": why, "seconds": float(case.get("time") or 0)}


def _pictures(device: torch.device, small: bool, batch: int) -> tuple[tuple[Tensor, Tensor], tuple[int, ...]]:
    """Images in bytes with labels, for six steps, and their shape."""
    side, count = (32, 3 * 4) if small else (224, 6 * batch)
    drawn = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, side, side), generator=drawn, dtype=torch.uint8)
    return (images.to(device), torch.randint(100, (count,), generator=drawn).to(device)), (3, side, side)


def _images(device: torch.device, small: bool, name: str, compiled: bool, augmented: bool, batch: int) -> Found:
    """A network of timm in 32 bits and in bf16-mixed, fine-tuned."""
    from benchmarks.networks import Images, sides, with_head
    from clplat.backbones.timm import timm
    from clplat.streams.images import flip_crop

    data, shape = _pictures(device, small, batch)
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in STATISTICS)

    def prepare(x: Tensor) -> Tensor:
        x = (x.float() / 255 - mean) / std
        return flip_crop(x) if augmented else x

    stream: dict[str, Any] = {"normalize": STATISTICS, "augment": flip_crop if augmented else None}
    for precision in ("bf16-mixed",) if compiled else ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        pair = with_head(timm(shape, model=name), 100, Images, device)
        pair.prepare = prepare
        if compiled:  # the forward pass of the backbone and of the network, in place
            backend = "aot_eager" if small else "inductor"  # which compiles nothing, and needs no compiler
            pair.model.backbone.compile(backend=backend)
            pair.net.trunk.compile(backend=backend)
        work = Work(
            data, 100, 4 if small else batch, device, precision, rounds=1 if small else 5, seconds=15, stream=stream
        )
        how = f"{precision}{', compiled' * compiled}{', augmented on the device' * augmented}"
        limit = None if small or compiled else LIMIT
        yield compare(f"step, {name}, {how}", *sides(pair, "naive", work), limit).to_dict()


def vit(device: torch.device, small: bool) -> Found:
    return _images(device, small, "test_vit" if small else "vit_base_patch16_224", False, False, 64)


def resnet(device: torch.device, small: bool) -> Found:
    """With data and augmentation on the device."""
    return _images(device, small, "test_resnet" if small else "resnet50", False, True, 64)


def compiled(device: torch.device, small: bool) -> Found:
    """ViT-B/16, its forward pass compiled by torch on both sides; the first pair, which compiles, is not counted."""
    return _images(device, small, "test_vit" if small else "vit_base_patch16_224", True, False, 64)


def llama(device: torch.device, small: bool) -> Found:
    """Llama of 1.2 B parameters, frozen in bfloat16, with LoRA on queries and values: texts of 256 tokens."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from benchmarks.networks import prompts, sides, with_words

    own: dict[str, Any] = {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    }  # fmt: skip
    if small:
        own |= {"vocab_size": 2000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    with device:
        net = AutoModelForCausalLM.from_config(LlamaConfig(**own), dtype=torch.bfloat16)
    words = torch.tensor([[400 + k, 900 + k, 2] for k in range(4)])
    pair = with_words(net, words, 16 if small else 256)
    x, y = prompts(12 if small else 48, 16 if small else 256, 1000, len(words))
    work = Work(
        (x.to(device), y.to(device)), len(words), 4 if small else 8, device, "bf16-mixed", rounds=1 if small else 5,
        seconds=30, answers=pair.answers,
    )  # fmt: skip
    count = sum(p.numel() for p in net.parameters())
    name = f"step, Llama of {count / 1e9:.2g} B, LoRA, bf16-mixed"
    yield compare(name, *sides(pair, "lora", work), None if small else LIMIT).to_dict()


def cotta(device: torch.device, small: bool) -> Found:
    """Batches of CoTTA with 32 augmentations."""
    from benchmarks.cotta import rows

    return (row.to_dict() for row in rows(small, device))


def acu(device: torch.device, small: bool) -> Found:
    """A request of ACU's, answered and settled, next to solving anew for the samples left."""
    from benchmarks.acu import ERASED, LEARNED, WIDTH, Both

    learned, width = (1000, 128) if small else (LEARNED, WIDTH)
    with torch.no_grad():
        both = Both(learned, width, device)
        both.answer()  # sets up
        answered, settled, base, worst = list[float](), list[float](), list[float](), 0.0
        for _ in range(2 if small else 5):
            taken = both.answer()
            milliseconds, weight = both.by_hand()
            worst = max(worst, both.off(weight))
            for times, one in zip((answered, settled, base), (*taken, milliseconds), strict=True):
                times.append(one)
    what = f"request of {ERASED} of {learned}, d = {width}"
    note = f"heads differ by {worst:.1e} at most"
    yield paired(f"{what}: answered", "ms", answered, base, "ratio", None, note).to_dict()
    yield paired(f"{what}: settled", "ms", settled, base, "ratio").to_dict()


PARTS: dict[str, tuple[float, Callable[[torch.device, bool], Found]]] = {  # seconds of 480 that it may take
    "tests": (130, tests),
    "vit": (55, vit),
    "resnet": (45, resnet),
    "llama": (70, llama),
    "cotta": (35, cotta),
    "acu": (45, acu),
    "compile": (80, compiled),
}


def work(names: list[str], device: str, small: bool, connection: Any) -> None:
    """A process that does parts in order: sends (part, "row", figures) for each figure, then (part, "end", why not)."""
    if hasattr(os, "setsid"):
        os.setsid()  # so that what a part has started can be ended with it
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for name in names:
        why = None
        try:
            for row in PARTS[name][1](torch.device(device), small):
                connection.send((name, "row", row))
        except Exception as error:  # noqa: BLE001 - the other parts are to be measured all the same
            print(traceback.format_exc(), file=sys.stderr)
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        connection.send((name, "end", why))
        if device == "cuda":
            torch.cuda.empty_cache()
