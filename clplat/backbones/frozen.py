"""Any backbone, frozen, whose features are kept in a file: computed once for all runs that read the same inputs.

    f(x) = kept[SHA(x)], or else features(x), which is kept from then on

What is kept is found by the content of the input as it reaches the backbone, in a file named by all that features
follow from, weights included. So what was kept is never of other weights, whatever the stream, the seed or the
strategy.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from clplat.backbones.base import Backbone, require
from clplat.config import discovery
from clplat.data.datasets import find_root
from clplat.errors import ClplatError, UserError

KEY = 16  # bytes of the digest of an input


class Frozen(Backbone):
    """A backbone that stays in evaluation mode and whose parameters are not trained. Its layers can't be adapted.

    Args:
        net: the backbone.
        made: what it was made of, beside its weights: named in the file of its features.
        folder: of files of features; None keeps none.
    """

    fixed = True  # to whoever would train copies of all parameters

    def __init__(self, net: Backbone, made: str, folder: Path | None) -> None:
        super().__init__()
        self.net, self.made, self.folder = net.eval().requires_grad_(False), made, folder
        self.embed_dim, self.reads_tokens = net.embed_dim, net.reads_tokens  # type: ignore[misc]
        self.expects = net.expects
        # It is they that normalise; to who asks, this one does.
        self.register_buffer("input_mean", net.input_mean, persistent=False)
        self.register_buffer("input_std", net.input_std, persistent=False)
        self._kept: _Kept | None = None
        self._weights: tuple[tuple[int, int], ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        if self.folder is None:
            return tuple(self.net.notes)
        kept = self._file()
        said = f"backbone.cache: features of {len(kept)} inputs are kept in {kept.path}; times are without theirs"
        return (*self.net.notes, said)

    @property
    def blocks(self) -> list[nn.Module]:
        """None: an input whose features are kept runs no block."""
        return []

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.net.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        return self.features(inputs)  # the inner one normalises

    @torch.no_grad()
    def features(self, inputs: Tensor) -> Tensor:
        if any(p.requires_grad for p in self.net.parameters()) or any(m.training for m in self.net.modules()):
            raise UserError("backbone: frozen, but this strategy trains or adapts it (valid: backbone.base by itself)")
        with torch.autocast(inputs.device.type, enabled=False):
            if self.folder is None:
                return self.net(inputs).float()
            found: Tensor = _Looked.apply(inputs, self)
            return found

    def looked_up(self, inputs: Tensor) -> Tensor:
        """Features (B, D) of inputs (B, ...), from the file where they are there."""
        kept, keys = self._file(), _digests(inputs)
        if any(key not in kept for key in keys):
            # All of the batch, so that a kernel sees as many rows as who asks chose.
            kept.add(keys, self.net(inputs).float().cpu())
        return kept.rows(keys).to(inputs.device)

    def _file(self) -> _Kept:
        """That of the weights as they are now."""
        tensors = [*self.net.parameters(), *self.net.buffers()]
        version = tuple((t.data_ptr(), t._version) for t in tensors)
        if self._kept is None or version != self._weights:
            assert self.folder is not None
            digest = hashlib.sha256(f"{self.made} {tensors[0].device.type} {torch.__version__}".encode())
            for name, tensor in sorted([*self.net.named_parameters(), *self.net.named_buffers()]):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(_bytes(tensor))
            self._kept = _Kept.of(self.folder / f"{digest.hexdigest()[:32]}.features", self.embed_dim)
            self._weights = version
        return self._kept


class _Looked(torch.autograd.Function):
    """`Frozen.looked_up` as one operation: gradients of single samples (`vmap`, `grad`) see no number inside it."""

    @staticmethod
    def forward(inputs: Tensor, net: Frozen) -> Tensor:
        return net.looked_up(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], inputs: Tensor, net: Frozen) -> tuple[Tensor, int]:
        """Inputs of shape (groups, b, ...), all of them as one batch."""
        assert in_dims[0] is not None
        rows = inputs.movedim(in_dims[0], 0)
        return _Looked.apply(rows.flatten(0, 1), net).unflatten(0, rows.shape[:2]), 0


class _Kept:
    """Features (D,) by digest of their input: records of a digest, D floats of 32 bits and their checksum.

    A record that its checksum does not fit is as if it were not there.
    """

    _open: dict[Path, _Kept] = {}  # of this process: runs after each other read a file once  # noqa: RUF012

    def __init__(self, path: Path, width: int) -> None:
        self.path, self.record = path, np.dtype([("key", f"V{KEY}"), ("features", "<f4", width), ("sum", "<u4")])
        self.table: dict[bytes, Tensor] = {}
        if path.is_file():
            whole = path.stat().st_size // self.record.itemsize
            held = np.fromfile(path, self.record, whole)
            held = held[[_sum(row) == kept for row, kept in zip(held["features"], held["sum"], strict=True)]]
            self._note([key.tobytes() for key in held["key"]], torch.from_numpy(held["features"].copy()))

    @classmethod
    def of(cls, path: Path, width: int) -> _Kept:
        """That of the file at `path`, read once by this process."""
        return cls._open.setdefault(path, cls(path, width)) if path not in cls._open else cls._open[path]

    def __deepcopy__(self, memo: Any) -> _Kept:
        return self  # a teacher's backbone is the same one

    def __len__(self) -> int:
        return len(self.table)

    def __contains__(self, key: bytes) -> bool:
        return key in self.table

    def rows(self, keys: list[bytes]) -> Tensor:
        """Features (B, D) of inputs that are all kept."""
        return torch.stack([self.table[key] for key in keys])

    def add(self, keys: list[bytes], features: Tensor) -> None:
        """Keep what is new of `features` (B, D); the file grows by whole records, by one process at a time."""
        new = {key: row for row, key in enumerate(keys) if key not in self.table}
        records = np.zeros(len(new), self.record)
        records["key"] = [np.void(key) for key in new]
        records["features"] = features[list(new.values())].numpy()
        records["sum"] = [_sum(row) for row in records["features"]]
        self._note(list(new), torch.from_numpy(records["features"].copy()))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX)
                size = handle.seek(0, 2)  # as it is now that no other process writes
                handle.truncate(size - size % self.record.itemsize)  # what a crash cut off
                handle.write(records.tobytes())
        except OSError as error:
            raise UserError(f"backbone.cache: {self.path} can't be written ({error.strerror})") from error

    def _note(self, keys: list[bytes], features: Tensor) -> None:
        self.table.update(zip(keys, features, strict=True))


def frozen(
    input_shape: tuple[int, ...],
    base: str = "timm",
    base_options: dict[str, Any] | None = None,
    cache: str | None = None,
) -> Backbone:
    """Any backbone with a head, frozen: only the head is trained, and features can be kept from run to run.

    Args:
        input_shape: of one sample.
        base: name of the backbone.
        base_options: its options.
        cache: folder, relative to the data root or else to here, where features are kept by weights and input, so that
            arms, seeds and later runs compute them once; 4 D bytes for each input in the file and in memory, erased
            samples included: it is a copy of the data, and goes with them. Null: keeps none.

    Raises:
        UserError: as the backbone does; one that makes its own logits.
        MissingError: as the backbone does.
    """
    headed = base != "frozen" and discovery.has_head(discovery.find("backbones", base))
    require("base", base, headed, "a backbone whose logits come from a head, and not frozen itself")
    try:
        net: Backbone = discovery.load("backbones", base)(input_shape, **(base_options or {}))
    except ClplatError as error:
        faults = (f.replace("backbone.", "backbone.base_options.", 1) for f in error.faults)
        raise type(error)(*faults) from error
    folder = None if cache is None else (find_root(None) or Path()) / Path(cache).expanduser()
    return Frozen(net, json.dumps([base, base_options, input_shape], sort_keys=True), folder)


def _sum(features: np.ndarray) -> int:
    return zlib.crc32(features.tobytes())


def _digests(inputs: Tensor) -> list[bytes]:
    """Of each of inputs (B, ...)."""
    kind = f"{inputs.dtype}".encode()
    return [hashlib.blake2b(_bytes(row), digest_size=KEY, key=kind).digest() for row in inputs.cpu()]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
