"""Kills at random moments over all strategies and kinds of experience: how many changed or lost a result.

    python tests/faults/kills.py [--cases 1000] [--seed 0] [--workers 2] [--only NAME] [--output FILE.json]

A case: a run of the command line on a tiny stream of what its strategy declares is killed (SIGKILL) after a time drawn
evenly over what the whole run took, gone on with, in one case of three killed again meanwhile, and compared with the
run that nobody killed: summary.json but for times and memory, and every tensor of the last checkpoint, to the bit.
Prints each difference with what repeats it; exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
NETWORKS = (
    {"name": "mlp", "hidden": [16]},
    {"name": "vit_micro", "patch_size": 2, "dim": 8, "depth": 2, "heads": 2},
    {"name": "slim_resnet18", "width": 2},
    {"name": "clip", "dim": 8, "depth": 1, "heads": 2, "patch_size": 2, "vocabulary": 12},
    {"name": "actor_critic", "actor_hidden": [8], "critic_hidden": [8]},
)  # the suite's own, in its order
AGAIN = 1 / 3  # the share of cases that are killed twice


def configuration(name: str, folder: Path) -> dict[str, Any]:
    """Of the strategy on the tiny stream of its kinds, on the first network that it takes."""
    from clplat.testing.subject import BACKBONES, Subject

    subject = Subject(name)
    kinds = ",".join(sorted(str(k) for k in subject.cls.kinds))
    return {
        "name": name, "output": str(folder), "stream": {"name": f"{HERE}/tiny.py:Tiny", "kinds": kinds},
        "backbone": NETWORKS[BACKBONES.index(subject.backbone)],
        "strategy": {"name": name, **subject.options()},
        "loop": {"max_epochs": 4, "batch_size": 8, "eval_every": 5, "eval_episodes": 2, "checkpoint_every": 4},
        "tracking": {"enabled": False}, "fabric": {"accelerator": "cpu", "threads": 1},
        "audit": {"samples": 8, "relearn_steps": 1},
    }  # fmt: skip


def forked(call: Callable[[], int | None]) -> int:
    """Process id of a child that does this and ends: with its result as exit code, or 70 where it raises."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        code = call() or 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:  # noqa: BLE001 - a child must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_in_child(
    arguments: list[str], said: Path, *, kill_after: float | None = None, before: Callable[[], None] | None = None
) -> int:
    """The command line in a child that has all modules loaded; its exit code, less than 0 for a signal.

    Args:
        said: file to which it prints.
        kill_after: seconds.
        before: called in the child first.
    """

    def run() -> int:
        with said.open("ab", buffering=0) as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.setsid()
        if before:
            before()
        from clplat.cli import main

        return main(arguments)

    child = forked(run)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def result(folder: Path) -> dict[str, Any]:
    """What the one run below `folder` ended with, less what differs between any two runs: times and memory."""
    (run_dir,) = (f.parent for f in folder.glob("*/*/config.yaml"))
    summary = json.loads((run_dir / "summary.json").read_text())
    del summary["git_commit"]  # of the checkout, which may move on meanwhile
    flops = summary.pop("cost")["train_flops"]
    newest = max((run_dir / "checkpoints").iterdir())
    tensors = hashlib.sha256((newest / "tensors.safetensors").read_bytes()).hexdigest()
    left = sorted(str(f.relative_to(run_dir)) for f in run_dir.rglob("*.part"))
    return summary | {"train_flops": flops, "tensors": tensors, "left behind": left}


def whole(config: dict[str, Any], folder: Path) -> tuple[dict[str, Any], float]:
    """The result of the run that nobody kills, and the seconds it took."""
    start = time.perf_counter()
    code = run_in_child(["run", written(config, folder), "--quiet"], folder / "said")
    seconds = time.perf_counter() - start
    if code:
        raise RuntimeError(f"{config['name']}: ended with {code}: {(folder / 'said').read_text()[-2000:]}")
    return result(folder), seconds


def written(config: dict[str, Any], folder: Path) -> str:
    """Path of the configuration as a file of `folder`, below which it writes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump({**config, "output": str(folder)}, sort_keys=False))
    return str(folder / "run.yaml")


def case(
    config: dict[str, Any], straight: dict[str, Any], seconds: float, draw: random.Random, folder: Path
) -> tuple[int, list[str]]:
    """One case: how many times the run was killed before its end, and what is not as in `straight`."""
    path, said, kills = written(config, folder), folder / "said", 0
    for _ in range(1 + (draw.random() < AGAIN)):
        kills += run_in_child(going_on(path, folder), said, kill_after=draw.uniform(0, seconds)) == -signal.SIGKILL
    code = run_in_child(going_on(path, folder), said)
    if code:
        return kills, [f"ended with {code}: {said.read_text()[-500:]}"]
    found = result(folder)
    return kills, [key for key in {**straight, **found} if straight.get(key) != found.get(key)]


def going_on(path: str, folder: Path) -> list[str]:
    """The command that goes on with the run below `folder`, or begins it where a kill came before there was one."""
    runs = list(folder.glob("*/*/config.yaml"))
    return ["run", "--resume", str(runs[0].parent), "--quiet"] if runs else ["run", path, "--quiet"]


def kills(name: str, cases: int, seed: int, place: Path) -> dict[str, Any]:
    """All cases of one strategy."""
    found: dict[str, Any] = {"name": name, "cases": cases, "kills": 0, "faults": []}
    config = configuration(name, place)
    straight, seconds = whole(config, place / "whole")
    for number in range(cases):
        folder = place / str(number)
        killed, differing = case(config, straight, seconds, random.Random(f"{seed} {name} {number}"), folder)
        found["kills"] += killed
        found["faults"] += [f"case {number}: {d}" for d in differing]
        shutil.rmtree(folder)
    return found


def parallel(
    about: str, names: list[str], cases_of: Callable[[str, int, int, Path], dict[str, Any]], default: int
) -> int:
    """Cases shared out among names, names among processes; prints what came out of each, and of all.

    Args:
        about: the script's docstring.
        cases_of: name, number of cases, seed and an empty folder → counts and `faults`.
        default: cases.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--cases", type=int, default=default)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=names, help="one of these alone")
    parser.add_argument("--output", type=Path, help="a JSON file of what came out")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    names = [given.only] if given.only else names
    shares, start = Counter(names[i % len(names)] for i in range(given.cases)), time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "found.jsonl"
        out.touch()

        def work(part: int) -> None:
            for name in [n for n in names if shares[n]][part :: given.workers]:
                folder = Path(place) / name
                folder.mkdir()
                found = cases_of(name, shares[name], given.seed, folder)
                shutil.rmtree(folder)
                with out.open("a") as file:
                    file.write(json.dumps(found) + "\n")
                print(f"[{time.perf_counter() - start:.0f} s] {json.dumps(found)}", flush=True)

        children = [forked(lambda part=part: work(part)) for part in range(given.workers)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children]
        found = sorted((json.loads(line) for line in out.read_text().splitlines()), key=lambda f: str(f["name"]))
    summary = {
        **{key: sum(f[key] for f in found) for key in ("cases", "kills") if all(key in f for f in found)},
        "names": len(found), "faults": {f["name"]: f["faults"] for f in found if f["faults"]}, "seed": given.seed,
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }  # fmt: skip
    print(json.dumps(summary, indent=1))
    if given.output:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
        about_it = {"commit": commit, "cores": os.cpu_count(), "measured": f"{datetime.now(UTC):%Y-%m-%d}"}
        given.output.write_text(json.dumps(summary | about_it | {"found": found}, indent=1) + "\n")
    return int(any(codes) or bool(summary["faults"]))


def main() -> int:
    from clplat.config import discovery

    return parallel(__doc__, sorted(discovery.entries("strategies")), kills, default=1000)


if __name__ == "__main__":
    sys.exit(main())
