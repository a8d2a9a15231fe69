"""Takes in the front of a study on test data: derpp.json, and its part of README.md.

    python experiments/tuning/on_test.py STUDY RUNS FURTHER

STUDY is the folder of the study, RUNS holds a folder for each configuration of its `front/`, by its name, with the runs
on held-out seeds, FURTHER the same of some of them with other seeds. Every number comes from sweep.json and the runs'
summary.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clplat.files import put_parts, write_atomic
from clplat.sweep.held_out import spreads

HERE = Path(__file__).parent
KEPT = ("study", "metrics", "seeds", "protocol", "effort", "gain")


def runs_of(folder: Path, metrics: Sequence[str]) -> dict[int, list[float]]:
    """Seed → metrics on test data of the runs in a folder."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*/summary.json"))]
    assert all(s["status"] == "complete" for s in found), folder
    return {s["seed"]: [s["metrics"][m] for m in metrics] for s in sorted(found, key=lambda s: s["seed"])}


def read(study: Path, runs: Path, further: Path) -> dict[str, Any]:
    """A study, its front and what this came to on test data."""
    facts = json.loads((study / "sweep.json").read_text(encoding="utf-8"))
    run = json.loads(next(study.glob("trial-0000/*/summary.json")).read_text(encoding="utf-8"))
    default = next(t["number"] for t in facts["trials"] if t["default"])
    front = {p["number"]: p for p in facts["front"]}
    assert default in front, "the runs are those of the front, and the default is not among them"
    rows = {n: runs_of(runs / f"trial-{n:04d}", facts["metrics"]) for n in front}
    assert len({tuple(r) for r in rows.values()}) == 1, "other seeds"
    more = {n: r for n in front if (r := runs_of(further / f"trial-{n:04d}", facts["metrics"]))}
    return {
        **{key: facts[key] for key in KEPT}, "git_commit": run["git_commit"], "default": default,
        "front": {n: {"params": p["params"], "values": p["values"]} for n, p in front.items()},
        "test": rows, "further": more,
    }  # fmt: skip


def gains(found: Mapping[str, Any], part: str = "test") -> dict[int, list[tuple[float, float | None]]]:
    """Trial → mean and half-width of each metric's difference to the default, seed by seed."""
    base = found[part][found["default"]]
    return {n: spreads([[y - x for x, y in zip(base[s], own[s], strict=True)] for s in base])
            for n, own in found[part].items() if n != found["default"]}  # fmt: skip


def table(found: Mapping[str, Any], part: str = "test") -> str:
    """A row for each point: where it was chosen, on test data, and what it gains there."""
    named = ", ".join(found["metrics"])
    lines = [f"| trial | chosen by: {named} | test data: {named} | over the default, seed by seed |", "|---" * 4 + "|"]
    over = gains(found, part)
    for number, own in found[part].items():
        chosen = ", ".join(f"{v:.3f}" for v in found["front"][number]["values"])
        test = ", ".join(f"{m:.3f} ± {h:.3f}" for m, h in spreads(list(own.values())))
        gain = ", ".join(f"{m:+.3f} ± {h:.3f}" for m, h in over.get(number, []))
        name = f"{number}, the default" if number == found["default"] else str(number)
        lines.append(f"| {name} | {chosen} | {test} | {gain} |")
    return "\n".join(lines)


def answer(found: Mapping[str, Any]) -> str:
    """Whether a point is better than the default: in both beyond the interval, in the mean, or in one alone."""
    over = gains(found)
    both = [n for n, g in over.items() if all(m > h for m, h in g)]
    mean = [n for n, g in over.items() if all(m >= 0 for m, _ in g) and any(m > 0 for m, _ in g)]
    one = [n for n, g in over.items() if any(m > h for m, h in g) and not any(m < -h for m, h in g)]

    def named(numbers: list[int]) -> str:
        return f"trial {', '.join(map(str, numbers))}" if numbers else "none"

    answers = {
        "Better in both beyond the interval": both,
        "Not worse in the mean of either": mean,
        "Better in one beyond the interval and in the other not worse beyond it": one,
    }
    told = ". ".join(f"{what}: {named(numbers)}" for what, numbers in answers.items())
    return f"{told}. Spent: {found['effort']}."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("further", type=Path)
    given = parser.parse_args()
    found = read(given.study, given.runs, given.further)
    parts = {"derpp": table(found), "derpp-answer": answer(found), "derpp-further": table(found, "further")}
    put_parts(HERE / "README.md", parts)
    text = json.dumps({**found, **{k: f"@{k}" for k in ("test", "further")}}, indent=1, ensure_ascii=False)
    for part in ("test", "further"):
        rows = ",\n".join(f'  "{n}": {json.dumps(r)}' for n, r in found[part].items())
        text = text.replace(f'"@{part}"', f"{{\n{rows}\n }}", 1)
    write_atomic(HERE / "derpp.json", text + "\n")


if __name__ == "__main__":
    main()
