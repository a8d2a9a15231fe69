"""Damaged and hostile files through every reader: each ends in a result or in one line, never in a traceback.

    python tests/faults/fuzz.py [--cases 500] [--seed 0] [--workers 2] [--only NAME] [--output FILE.json]

A case damages one file of a set that is read whole, at a place and in a way drawn from the seed, and runs what reads
it, within 8 GiB of memory and a minute. Right are exit code 0, and 1, 2 or 3 with lines that begin with `clplat:`.
"""

from __future__ import annotations

import io
import json
import random
import resource
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from kills import configuration, parallel, run_in_child, written

MEMORY, SECONDS = 8 << 30, 60
# What a text, a table or a head of a binary file may be made to say.
WORDS = (
    b"null",
    b"NaN",
    b"-1",
    b"1e999",
    b"999999999999",
    b"[]",
    b'{"a": [[[]]]}',
    b"\x00\xff",
    b"../../etc/passwd",
    b'"',
    b"\n",
    b"\xf0\x9f",
)

Made = tuple[dict[str, Any], list[Path]]  # a configuration that reads them, and the files
RUN: dict[str, Any] = {
    "loop": {"max_steps": 2, "batch_size": 4, "representation": False}, "tracking": {"enabled": False},
    "fabric": {"accelerator": "cpu", "threads": 1}, "strategy": {"name": "naive"},
    "backbone": {"name": "mlp", "hidden": [4]},
}  # fmt: skip


def _labelled(number: int = 12) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    x, y = draw.random((number, 3, 6, 6), dtype=np.float32), np.arange(number) % 2
    return {"train_inputs": x, "train_labels": y, "test_inputs": x, "test_labels": y}


def _of(folder: Path, stream: dict[str, Any], *paths: Path, **other: Any) -> Made:
    return RUN | {"stream": {"experiences": 1, "path": str(folder), **stream}} | other, list(paths)


def npz(folder: Path) -> Made:
    np.savez(folder / "a.npz", **_labelled())
    return _of(folder / "a.npz", {"name": "arrays"}, folder / "a.npz")


def npy(folder: Path) -> Made:
    for name, values in _labelled().items():
        np.save(folder / f"{name}.npy", values)
    return _of(folder, {"name": "arrays", "in_memory": False}, *folder.glob("*.npy"))


def safetensors(folder: Path) -> Made:
    from safetensors.numpy import save_file

    save_file(_labelled(), folder / "a.safetensors")
    return _of(folder / "a.safetensors", {"name": "arrays", "in_memory": False}, folder / "a.safetensors")


def _pictures(folder: Path) -> list[Path]:
    from PIL import Image

    paths = []
    for part in ("train", "test"):
        for number, pixels in enumerate(_labelled()["train_inputs"][:6]):
            path = folder / part / f"class{number % 2}" / f"{number}.{('png', 'jpg')[number % 3 > 0]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((255 * pixels.transpose(1, 2, 0)).astype("uint8")).save(path)
            paths.append(path)
    return paths


def pictures(folder: Path) -> Made:
    return _of(folder / "own", {"name": "images"}, *_pictures(folder / "own"))


def listing_csv(folder: Path) -> Made:
    rows = [f"{p},{p.parent.name},{p.parents[1].name}" for p in _pictures(folder / "own")]
    (folder / "own.csv").write_text("\n".join(["path,label,split", *rows]) + "\n")
    return _of(folder / "own.csv", {"name": "images"}, folder / "own.csv")


def listing_parquet(folder: Path) -> Made:
    import pyarrow as pa
    from pyarrow import parquet

    found = _pictures(folder / "own")
    columns = {"path": [str(p) for p in found], "label": [p.parent.name for p in found]}
    parquet.write_table(pa.table(columns | {"split": [p.parents[1].name for p in found]}), folder / "own.parquet")
    return _of(folder / "own.parquet", {"name": "images"}, folder / "own.parquet")


def tars(folder: Path) -> Made:
    found = _pictures(folder / "own")
    for part in ("train", "test"):
        (folder / "tars" / part).mkdir(parents=True)
        with tarfile.open(folder / "tars" / part / "0.tar", "w") as tar:
            for number, path in enumerate(p for p in found if p.parents[1].name == part):
                label = str(number % 2).encode()
                for name, content in ((f"{number}{path.suffix}", path.read_bytes()), (f"{number}.cls", label)):
                    about = tarfile.TarInfo(name)
                    about.size = len(content)
                    tar.addfile(about, io.BytesIO(content))
    return _of(folder / "tars", {"name": "images", "in_memory": False}, *(folder / "tars").rglob("*.tar"))


def _texts(folder: Path, suffix: str, write: Callable[[Path, list[dict[str, str]]], None]) -> Made:
    rows = [{"text": f"the film was {w} {i}", "label": w} for i in range(6) for w in ("good", "bad")]
    for part in ("train", "test"):
        (folder / "own" / "films").mkdir(parents=True, exist_ok=True)
        write(folder / "own" / "films" / f"{part}.{suffix}", rows)
    network = {"name": "text_encoder", "dim": 8, "depth": 1, "heads": 2}
    stream = {"name": "text", "benchmark": "jsonl", "path": str(folder / "own"), "answer": "class"}
    return RUN | {"stream": stream, "backbone": network}, list((folder / "own").rglob(f"*.{suffix}"))


def jsonl(folder: Path) -> Made:
    return _texts(folder, "jsonl", lambda p, rows: p.write_text("".join(json.dumps(r) + "\n" for r in rows)) and None)


def texts_csv(folder: Path) -> Made:
    def write(path: Path, rows: list[dict[str, str]]) -> None:
        path.write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))

    return _texts(folder, "csv", write)


def texts_parquet(folder: Path) -> Made:
    import pyarrow as pa
    from pyarrow import parquet

    return _texts(folder, "parquet", lambda path, rows: parquet.write_table(pa.Table.from_pylist(rows), path))


def _transitions() -> dict[str, np.ndarray]:
    draw, n = np.random.default_rng(0), 40
    seen = draw.uniform(-1, 1, (n + 1, 3)).astype("float32")
    return {
        "observations": seen[:-1], "next_observations": seen[1:], "rewards": -draw.random(n).astype("float32"),
        "actions": draw.uniform(-1, 1, (n, 1)).astype("float32"), "terminals": np.zeros(n, bool),
        "timeouts": np.arange(n) % 10 == 9,
    }  # fmt: skip


def _recorded(path: Path) -> Made:
    network = {"name": "actor_critic", "actor_hidden": [8], "critic_hidden": [8]}
    stream = {"name": "rl", "env": "Pendulum-v1", "data": str(path), "env_steps": 0, "probe": 4}
    loop = RUN["loop"] | {"eval_episodes": 1}
    return RUN | {"stream": stream, "backbone": network, "strategy": {"name": "bc"}, "loop": loop}, [path]


def rl_npz(folder: Path) -> Made:
    np.savez(folder / "a.npz", **_transitions())
    return _recorded(folder / "a.npz")


def rl_hdf5(folder: Path) -> Made:
    import h5py

    with h5py.File(folder / "a.hdf5", "w") as file:
        for name, values in _transitions().items():
            file[name] = values
    return _recorded(folder / "a.hdf5")


def yaml_file(folder: Path) -> Made:
    """The configuration itself."""
    return RUN | {"stream": {"name": "digits", "experiences": 2}}, [folder / "run.yaml"]


def run_folder(folder: Path) -> Made:
    """What a run has left, when it is gone on with."""
    config = configuration("er", folder)
    config["loop"] |= {"max_epochs": 1, "stop_after": 1}
    if run_in_child(["run", written(config, folder / "runs"), "--quiet"], folder / "said"):
        raise RuntimeError((folder / "said").read_text())
    return config, [
        f
        for f in (folder / "runs").rglob("*")
        if f.is_file() and f.suffix in (".json", ".jsonl", ".yaml", ".safetensors")
    ]


TARGETS = {
    made.__name__: made
    for made in (npz, npy, safetensors, pictures, listing_csv, listing_parquet, tars, jsonl, texts_csv, texts_parquet,
                 rl_npz, rl_hdf5, yaml_file, run_folder)
}  # fmt: skip


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Up to three changes: bits, bytes cut out or doubled, the end cut off, or a word put over what is there."""
    found = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        at, length = draw.randrange(len(found) + 1), draw.choice((1, 4, 16, 256))
        if draw.random() < 0.5:
            at = min(at, draw.randrange(257))  # heads are what readers trust
        match draw.randrange(6):
            case 0:
                del found[at:]
            case 1:
                del found[at : at + length]
            case 2:
                found[at:at] = found[at : at + length]
            case 3:
                found[at : at + length] = bytes(length)
            case 4:
                word = draw.choice(WORDS)
                found[at : at + len(word)] = word
            case 5:
                for place in range(at, min(at + length, len(found))):
                    found[place] ^= 1 << draw.randrange(8)
    return bytes(found)


def limited(arguments: list[str], said: Path) -> int:
    """As `run_in_child`, within `MEMORY` and `SECONDS` of the processor."""

    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))

    return run_in_child(arguments, said, before=limits)


def wrong(code: int, said: str) -> str | None:
    """What is wrong with how a command ended, or None."""
    lines = [line for line in said.splitlines() if line.strip()]
    if code not in (0, 1, 2, 3) or "Traceback" in said:
        return f"exit code {code}: {' / '.join(lines[-3:])[-600:]}"
    if code and not (lines and all(line.startswith("clplat: ") for line in lines[-1:])):
        return f"exit code {code} with no line of ours: {' / '.join(lines[-3:])[-600:]}"
    return None


def attack(name: str, cases: int, seed: int, place: Path) -> dict[str, Any]:
    """All cases of one target."""
    whole = place / "whole"
    whole.mkdir()
    config, files = TARGETS[name](whole)
    ended, faults = {str(c): 0 for c in (0, 1, 2, 3)}, []
    for number in range(-1, cases):  # the first is not damaged, and must run
        folder, draw = place / "case", random.Random(f"{seed} {name} {number}")
        shutil.copytree(whole, folder)
        moved = json.loads(json.dumps(config).replace(str(whole), str(folder)))
        path = Path(written(moved, folder)) if name != "run_folder" else None
        chosen = folder / draw.choice(files).relative_to(whole)
        if number >= 0:
            chosen.write_bytes(damaged(chosen.read_bytes(), draw))
        run = [f.parent for f in (folder / "runs").glob("*/*/config.yaml")] if path is None else []
        arguments = ["run", str(path), "--quiet"] if path else ["run", "--resume", str(run[0]), "--quiet"]
        code = limited(arguments, folder / "said")
        fault = wrong(code, (folder / "said").read_text(errors="replace"))
        if number < 0 and code:
            raise RuntimeError(f"{name}, whole: {fault or (folder / 'said').read_text()}")
        if fault:
            faults.append(f"case {number}, {chosen.name}: {fault}")
        elif number >= 0:
            ended[str(code)] += 1
        shutil.rmtree(folder)
    return {"name": name, "cases": cases, "ended with": ended, "faults": faults}


def main() -> int:
    return parallel(__doc__, list(TARGETS), attack, default=500)


if __name__ == "__main__":
    sys.exit(main())
