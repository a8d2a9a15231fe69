"""Text to token ids, once: what was tokenised is kept on disk under the tokenizer's and the text's hash.

A tokenizer is named like a model's weights: a folder, a name below weights/ of the data root, or a name on the hub; or
it is `bytes`, which needs no file: one token a byte of UTF-8.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from clplat.data.datasets import find_root
from clplat.errors import MissingError, UserError
from clplat.files import cache_folder, write_atomic

HUB_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
             "special_tokens_map.json", "chat_template.jinja")  # fmt: skip


class Tokenizer(Protocol):
    """What a stream of text needs of a tokenizer.

    Args:
        size: token ids lie below this.
        before: ids that its template puts before a text (the token that begins it, say).
        behind: ids that its template puts behind a text.
        end: id that ends an answer.
        fingerprint: equal for tokenizers that give the same ids.
    """

    size: int
    before: tuple[int, ...]
    behind: tuple[int, ...]
    end: int
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without the template's."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without begin, end and other marks."""
        ...

    def chat(self, prompt: str) -> str:
        """The whole text of a conversation that begins with `prompt`, up to where the answer is to follow."""
        ...


class Bytes:
    """One token a byte: byte b is id b + 3; 0 fills, 1 begins, 2 ends."""

    size: int = 259
    before: tuple[int, ...] = (1,)
    behind: tuple[int, ...] = ()
    end: int = 2
    fingerprint: str = "bytes"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Bytes of each text, plus 3."""
        return [[byte + 3 for byte in text.encode()] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of bytes plus 3; what is no UTF-8 becomes a replacement mark."""
        return bytes(i - 3 for i in ids if 3 <= i < 259).decode(errors="replace")

    def chat(self, prompt: str) -> str:
        """Refused: bytes know no conversation."""
        raise UserError(
            "stream.chat: true, but bytes have no chat template (valid: a tokenizer that has one, or false)"
        )


class _Library:
    """A tokenizer of the `tokenizers` library.

    Args:
        inner: of that library; it may bring a length to cut at or to pad to, which is left out.
        before: see `Tokenizer`.
        behind: see `Tokenizer`.
        whole: transformers' tokenizer around it, for its chat template; None where there is none.
    """

    def __init__(
        self, inner: Any, before: Sequence[int], behind: Sequence[int], end: int, whole: Any | None = None
    ) -> None:
        inner.no_truncation()
        inner.no_padding()
        self.inner, self.end, self.size, self.whole = inner, end, inner.get_vocab_size(), whole
        self.before, self.behind = tuple(before), tuple(behind)
        self.fingerprint = hashlib.sha256(inner.to_str().encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """As the library splits them, all texts at once."""
        return [found.ids for found in self.inner.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """As the library joins them."""
        return self.inner.decode([i for i in ids if i not in (*self.before, *self.behind, self.end)])

    def chat(self, prompt: str) -> str:
        """By the template that the tokenizer brings."""
        if self.whole is None or not self.whole.chat_template:
            raise UserError("stream.chat: true, but the tokenizer brings no chat template (valid: false)")
        said = [{"role": "user", "content": prompt}]
        return self.whole.apply_chat_template(said, tokenize=False, add_generation_prompt=True)


def load_tokenizer(name: str | None) -> Tokenizer:
    """The tokenizer called `name`; None is `bytes`.

    Raises:
        MissingError: no such folder or hub name, or no whole tokenizer in it; says what to put where.
        UserError: it has no token that ends an answer.
    """
    if name in (None, "bytes", "random"):
        return Bytes()
    from clplat.data import llama2c

    folder = find_folder(name, "stream.tokenizer", HUB_FILES)
    gguf = None if (folder / "tokenizer.json").is_file() else find_gguf(folder, "stream.tokenizer")
    config = {} if gguf else read_json(folder / "config.json")
    if llama2c.is_ours(config):
        files = sorted(folder.glob("tok*.json"))
        if not files:
            raise MissingError(f"stream.tokenizer: no tok*.json in {folder}; put the model's tokenizer there")
        begin, end = config.get("bos_token_id", 1), config.get("eos_token_id", 2)
        return _Library(llama2c.tokenizer(files[0]), [begin], [], end)
    from transformers import AutoTokenizer

    inside: dict[str, Any] = {} if gguf is None else {"gguf_file": gguf.name}
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **inside)
    except (OSError, ValueError, ImportError) as error:
        raise MissingError(
            f"stream.tokenizer: no tokenizer in {folder} ({str(error).splitlines()[0]}); put its tokenizer.json there"
        ) from error
    if gguf is None:
        _whole(folder, found)
    if not found.is_fast:
        raise UserError(f"stream.tokenizer: {name!r} has no tokenizer.json (valid: one that has)")
    end = found.sep_token_id if found.eos_token_id is None else found.eos_token_id
    if end is None:
        raise UserError(f"stream.tokenizer: {name!r} has no end-of-text token (valid: one that has)")
    return _Library(found.backend_tokenizer, *_template(found, name), end, found)


def _whole(folder: Path, found: Any) -> None:
    """Refuse a tokenizer whose files are not all there: transformers makes an empty or a default one of it.

    Raises:
        MissingError: naming the file.
    """
    if not (folder / "tokenizer.json").is_file():
        named = [v for k, v in found.vocab_files_names.items() if k != "tokenizer_file"]
        absent = [file for file in named if not (folder / file).is_file()]
        if absent or not named:
            also = f" (or {', '.join(absent)})" if absent else ""
            raise MissingError(f"stream.tokenizer: {folder / 'tokenizer.json'} is missing: put it there{also}")
    marks = ("tokenizer_config.json", "special_tokens_map.json")
    if not any((folder / file).is_file() for file in marks):
        raise MissingError(f"stream.tokenizer: {folder / marks[0]} is missing, which names the token that ends a text: "
                           "put it there")  # fmt: skip


def _template(found: Any, name: str | None) -> tuple[list[int], list[int]]:
    """Ids that a tokenizer puts before and behind a text, found from what it makes of one."""
    bare, full = (found("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise UserError(
        f"stream.tokenizer: {name!r} changes a text's own ids by its template (valid: one that adds to them)"
    )


def find_folder(name: str, key: str, files: Sequence[str]) -> Path:
    """Folder of a model: a path, `name` below the data root's weights/, the hub's cache, or the hub.

    Args:
        name: as the user wrote it.
        key: of the configuration, for the message.
        files: patterns to fetch from the hub.

    Raises:
        MissingError: nowhere to be found; says what to put where.
    """
    root = find_root(None)
    places = [Path(name).expanduser(), *([root / "weights" / name] if root else [])]
    for place in places:
        if place.is_dir():
            return place
    wanted = ", ".join(files)
    if len(Path(name).parts) > 2 or name.startswith((".", "/", "~")):
        raise MissingError(f"{key}: no folder {name}; put the model's files there ({wanted})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(files), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        # One request first: without a network the download itself would try again for half a minute.
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10)
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (HTTPError, HFValidationError, OSError) as error:
        raise MissingError(
            f"{key}: {name!r} is no folder here nor in weights/ of the data root ({root or 'not set'}), not in the "
            f"hub's cache, and can't be fetched ({type(error).__name__}); fetch {wanted} of "
            f"https://huggingface.co/{name} where there is a network, put them in {places[-1]} and name that folder"
        ) from error


def find_gguf(folder: Path, key: str) -> Path | None:
    """The GGUF file of a folder that has no .safetensors file; None where there is none.

    Raises:
        UserError: there are several.
        MissingError: the package that reads it is not there.
    """
    files = sorted(folder.glob("*.gguf")) if not any(folder.glob("*.safetensors")) else []
    if len(files) > 1:
        raise UserError(f"{key}: {folder} has {', '.join(f.name for f in files)} (valid: a folder with one .gguf file)")
    if files and find_spec("gguf") is None:
        raise MissingError(f"{key}: {files[0]} needs the package gguf, which is not here: pip install 'clplat[gguf]'")
    return files[0] if files else None


def read_json(file: Path) -> Any:
    """Content of a JSON file.

    Raises:
        MissingError: it is not there, or not whole.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingError(f"{file} is missing: put it there") from None
    except (OSError, ValueError) as error:
        raise MissingError(f"{file} can't be read ({error}): replace it by a whole file") from error


def encode_cached(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of each text, each (n,) int32; from the cache where these texts were tokenised before.

    The file is whole or absent; a cache that can't be written or read is done without.
    """
    file = cache_folder() / f"tokens-{_key(tokenizer, texts)}.safetensors"
    flat = _read(file, len(texts))
    if flat is None:
        ids = tokenizer.encode(texts)
        ends = np.cumsum([len(i) for i in ids], dtype=np.int64)
        flat = np.fromiter((i for row in ids for i in row), np.int32, int(ends[-1]) if len(ends) else 0), ends
        _write(file, *flat)
    return np.split(flat[0], flat[1][:-1]) if len(texts) else []


def check_different(rows: Sequence[np.ndarray], names: Sequence[str]) -> None:
    """Refuse classes that a model could not tell apart: rows of ids (n,) that are equal, of classes called `names`.

    Raises:
        UserError: naming both.
    """
    seen: dict[tuple[int, ...], str] = {}
    for row, name in zip(rows, names, strict=True):
        other = seen.setdefault(tuple(row.tolist()), name)
        if other != name:
            raise UserError(
                f"stream.tokenizer: the classes {other!r} and {name!r} have the same token ids (valid: a tokenizer "
                "that tells them apart)"
            )


def _key(tokenizer: Tokenizer, texts: Iterable[str]) -> str:
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:32]


def _read(file: Path, count: int) -> tuple[np.ndarray, np.ndarray] | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found = load_file(file)
        ids, ends = found["ids"], found["ends"]
    except (OSError, SafetensorError, KeyError):
        return None
    return (ids, ends) if len(ends) == count and (not count or ends[-1] == len(ids)) else None


def _write(file: Path, ids: np.ndarray, ends: np.ndarray) -> None:
    from contextlib import suppress

    from safetensors.numpy import save

    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, save({"ids": ids, "ends": ends}))


def padded(rows: Sequence[np.ndarray], length: int | None = None) -> torch.Tensor:
    """(N, L) int32 of rows of ids, filled with -1 at the end; L is the longest row's unless given."""
    width = max((len(r) for r in rows), default=0) if length is None else length
    table = np.full((len(rows), width), -1, np.int32)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return torch.from_numpy(table)
