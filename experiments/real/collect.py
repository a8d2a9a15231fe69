"""Takes in new runs of real/cifar100: results.json, the figure, and the tables of README.md.

    python experiments/real/collect.py RUNS [--sweeps DIR ...]

RUNS is the folder of the runs, a DIR one of a study (with sweep.json). Every number comes from them, by the
functions that `clplat report` uses: mean ± half the 95 % interval over seeds (Student's t), and differences from a
reference, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from clplat.files import put_parts, write_atomic
from clplat.report import compare, write_report

HERE = Path(__file__).parent
KEPT = ("strategy", "head", "name", "seed", "status", "git_commit", "accuracy_matrix", "metrics", "cost")
REFERENCES = ("er", "ncm")  # what a practitioner would do anyway


def percent(found: compare.Estimate, sign: str = "") -> str:
    """Mean ± half the interval, in points."""
    if found.mean is None:
        return ""
    if found.half_width is not None:
        return f"{100 * found.mean:{sign}.1f} ± {100 * found.half_width:.1f}"
    cut = "" if found.low is None or found.high is None else f" [{100 * found.low:.1f}, {100 * found.high:.1f}]"
    return f"{100 * found.mean:{sign}.1f}{cut}"


def arms_table(groups: list[compare.Group]) -> str:
    """Accuracy, forgetting, what was just learned, differences from both references, time and memory of each arm."""
    by_name = {group.label: group for group in groups}
    heads = ["arm", "average accuracy", "forgetting", "just learned", *(f"more than `{r}`" for r in REFERENCES)]
    heads += ["train s", "kept MB"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, group in by_name.items():
        cells = [percent(group.estimate(m)) for m in ("average_accuracy", "forgetting", "plasticity")]
        cells += ["" if name == r else percent(compare.paired(group, by_name[r], "average_accuracy").difference, "+")
                  for r in REFERENCES]  # fmt: skip
        seconds, kept = (group.estimate(m).mean or 0.0 for m in ("train_seconds", "stored_bytes"))
        lines.append(f"| `{name}` | " + " | ".join(cells) + f" | {seconds:.1f} | {kept / 1e6:.1f} |")
    return "\n".join(lines)


def answer(groups: list[compare.Group]) -> str:
    """The figures of the README's first lines."""
    found = {group.label: group for group in groups}
    mean = {name: percent(group.estimate("average_accuracy")) for name, group in found.items()}
    more = percent(compare.paired(found["acil"], found["ncm"], "average_accuracy").difference, "+")
    over = percent(compare.paired(found["ncm"], found["er"], "average_accuracy").difference, "+")
    return (f"Average accuracy: `ncm` {mean['ncm']} %, `acil` {mean['acil']} % ({more} points), `er` {mean['er']} % "
            f"(`ncm` has {over} points more).")  # fmt: skip


def sweeps_table(studies: dict[str, Any]) -> str:
    """Average accuracy on validation data of each rate tried, by arm; the best one in bold."""
    rates = sorted({t["params"]["strategy.lr"] for s in studies.values() for t in s["trials"]})
    lines = ["| arm | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for name, study in studies.items():
        found = {t["params"]["strategy.lr"]: t["value"] for t in study["trials"] if t["value"] is not None}
        best = study["best"]["params"]["strategy.lr"]
        cells = [f"{'**' * (r == best)}{100 * found[r]:.1f}{'**' * (r == best)}" if r in found else "" for r in rates]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--sweeps", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    folders = sorted(file.parent for file in args.runs.rglob("summary.json"))
    runs = [run for run in compare.load_summaries(folders) if run["status"] == "complete"]
    (groups,) = compare.split_streams(runs)
    studies = {s["trials"][0]["strategy"]: s for s in map(study_of, args.sweeps)}
    parts = {"answer": answer(groups), "arms": arms_table(groups)} | (
        {"sweeps": sweeps_table(studies)} if studies else {}
    )
    kept = [{k: run[k] for k in KEPT} | {"config": run["config"]["strategy"]} for run in runs]
    facts = {"experiment": "real/cifar100", "sweeps": list(studies.values())}
    facts["runs"] = kept
    lists = {k: "[\n" + ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in v) + "\n ]"
             if isinstance(v, list) else json.dumps(v) for k, v in facts.items()}  # fmt: skip
    text = ",\n".join(f' "{k}": {v}' for k, v in lists.items())
    write_atomic(HERE / "results.json", f"{{\n{text}\n}}\n")
    put_parts(HERE / "README.md", parts)
    write_report(folders, args.runs / "comparison")
    figures = args.runs / "comparison" / "figures"
    shutil.copyfile(figures / "accuracy-per-experience.svg", HERE / "cifar100.svg")


def study_of(folder: Path) -> dict[str, Any]:
    """What is kept of a study: its trials, and which strategy they ran."""
    study = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    name = json.loads(next(Path(study["trials"][0]["folder"]).rglob("summary.json")).read_text())["strategy"]
    trials = [{k: t[k] for k in ("params", "value", "state")} | {"strategy": name} for t in study["trials"]]
    return {k: study[k] for k in ("study", "metric", "evaluated_on", "seeds", "best")} | {"trials": trials}


if __name__ == "__main__":
    main()
