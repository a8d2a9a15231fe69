"""Takes in new runs of an experiment of this folder: its results, its figure, and the generated parts of its page.

    python experiments/real/collect.py cifar100 RUNS [--sweeps ARM/DIR ...]
    python experiments/real/collect.py cifar100

RUNS is the folder of the runs, a DIR one of a study (with sweep.json). Without a DIR the studies that are here stay;
without RUNS the page is made of the results that are here. Every number comes from them, by the functions that `clplat
report` uses: mean ± half the 95 % interval over seeds (Student's t), and differences from a reference, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from clplat.files import put_parts, write_atomic
from clplat.report import compare, write_report

HERE = Path(__file__).parent
LEARNED = {"average_accuracy": "average accuracy", "forgetting": "forgetting", "plasticity": "just learned"}
SPOKEN = LEARNED | {"general_accuracy": "other task", "general_drop": "lost of it", "general_perplexity_ratio":
                    "perplexity, of that before"}  # fmt: skip
ADAPTED = {
    "last_round_error": "error in the last round",
    "round_drift": "above the first round by",
    "online_error": "error of all rounds",
    "source_accuracy": "right on clean images, at the end",
}
BEFORE_COTTA = ("source", "bn_adapt", "tent", "eata")
REQUESTED = {"retain_accuracy": "retained", "forget_accuracy": "erased", "average_accuracy": "test sets, at the end"}
KEPT = ("strategy", "head", "name", "seed", "status", "git_commit", "accuracy_matrix", "metrics", "cost")
Groups = dict[str, compare.Group]


@dataclass(frozen=True)
class Page:
    """What is made of one experiment.

    Args:
        readme: the page, of this folder as the next.
        results: its runs and studies.
        references: what the other arms are compared with: what a practitioner would do anyway.
        answer: the figures of the page's first lines.
        metrics: name → head of its column; the first is what arms are compared by.
        figure: of `clplat report` that the page shows.
    """

    readme: str
    results: str
    references: tuple[str, ...]
    answer: Callable[[Groups], str]
    metrics: Mapping[str, str] = field(default_factory=lambda: LEARNED)
    figure: str = "accuracy-per-experience"


def percent(found: compare.Estimate, sign: str = "") -> str:
    """Mean ± half the interval, in points."""
    if found.mean is None:
        return ""
    if found.half_width is not None:
        return f"{100 * found.mean:{sign}.1f} ± {100 * found.half_width:.1f}"
    cut = "" if found.low is None or found.high is None else f" [{100 * found.low:.1f}, {100 * found.high:.1f}]"
    return f"{100 * found.mean:{sign}.1f}{cut}"


def more(groups: Groups, arm: str, reference: str, metric: str = "average_accuracy") -> compare.Estimate:
    """By how much a metric is above the reference's, seed by seed."""
    return compare.paired(groups[arm], groups[reference], metric).difference


def groups_of(results: Mapping[str, Any]) -> Groups:
    """Arm → its runs, as they are kept."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        found.setdefault(run["name"].rpartition("/")[2], []).append(run)
    return {
        name: compare.Group(
            name, runs[0]["strategy"], "", "", tuple(runs), tuple(sorted(runs, key=lambda r: r["seed"]))
        )
        for name, runs in sorted(found.items())
    }


def arms_table(groups: Groups, page: Page) -> str:
    """Seeds, metrics, differences from references, time and memory of each arm."""
    first = next(iter(page.metrics))
    heads = ["arm", "seeds", *page.metrics.values(), *(f"more than `{r}`" for r in page.references)]
    heads += ["train s", "kept MB"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, group in groups.items():
        cells = [str(len(group.counted)), *(percent(group.estimate(m)) for m in page.metrics)]
        cells += ["" if r == name else percent(more(groups, name, r, first), "+") for r in page.references]
        seconds, kept = (group.estimate(m).mean or 0.0 for m in ("train_seconds", "stored_bytes"))
        lines.append(f"| `{name}` | " + " | ".join(cells) + f" | {seconds:.1f} | {kept / 1e6:.1f} |")
    return "\n".join(lines)


def frozen_answer(groups: Groups) -> str:
    """Class means and a closed form of frozen features, against replay of a head on them."""
    mean = {name: percent(group.estimate("average_accuracy")) for name, group in groups.items()}
    closed, means = (percent(more(groups, *pair), "+") for pair in (("acil", "ncm"), ("ncm", "er")))
    return (
        f"Average accuracy: `ncm` {mean['ncm']} %, `acil` {mean['acil']} % ({closed} points), `er` {mean['er']} % "
        f"(`ncm` has {means} points more)."
    )


def adapted_answer(groups: Groups) -> str:
    """What training the network gives, next to frozen features in closed form."""
    means = {n: g.estimate("average_accuracy").mean or 0.0 for n, g in groups.items() if n.endswith("_frozen")}
    best = max(means, key=lambda name: means[name])
    lines = [f"- `{best}`, {percent(groups[best].estimate('average_accuracy'))} %"]
    for name in (n for n in groups if not n.endswith("_frozen")):
        apart = percent(more(groups, name, best), "+")
        lines.append(f"- `{name}`, {percent(groups[name].estimate('average_accuracy'))} %: {apart} points")
    return "Average accuracy, and how far it is from the best of frozen features:\n\n" + "\n".join(lines)


def adapters_answer(groups: Groups, references: Sequence[str] = ("lora", "er", "ncm")) -> str:
    """Of what protects adapters or weights: which is above sequential LoRA, and which above the practitioner's ways."""
    asked = [name for name in ("ilora", "ilora_slow", "olora", "moram", "svd_orthogonal") if name in groups]
    lines = []
    for reference in (r for r in references if r in groups):
        found = {name: more(groups, name, reference) for name in asked}
        said: dict[str, list[str]] = {"above it beyond the interval": [], "not": [], "too few seeds to say": []}
        for name, by in found.items():
            how = "too few seeds to say" if by.low is None else "above it beyond the interval" if by.low > 0 else "not"
            said[how].append(f"`{name}` ({percent(by, '+')})")
        mean = percent(groups[reference].estimate("average_accuracy"))
        lines.append(f"- `{reference}`, {mean} %; " + "; ".join(f"{k}: {', '.join(v)}" for k, v in said.items() if v))
    return "\n".join(lines)


def adapting_answer(groups: Groups, of: str = "cotta") -> str:
    """CoTTA's arm in the last round, next to what a practitioner would do: nothing, batch statistics, TENT, EATA."""
    lines = []
    for reference in (r for r in BEFORE_COTTA if r in groups):
        mean = percent(groups[reference].estimate("last_round_error"))
        apart = percent(more(groups, of, reference, "last_round_error"), "+")
        lines.append(f"- `{reference}`, {mean} %; `{of}` {apart} points")
    mean = percent(groups[of].estimate("last_round_error"))
    return f"Error in the last of ten rounds: `{of}` {mean} %, next to\n\n" + "\n".join(lines)


def requests_answer(groups: Groups) -> str:
    """Each way to answer a request, next to training anew without what it erases."""
    lines = []
    for unit in ("classes", "samples"):
        anew = groups[f"retrain_{unit}"]
        mean, erased = (percent(anew.estimate(m)) for m in ("retain_accuracy", "forget_accuracy"))
        lines.append(f"- {unit}: `{anew.label}` {mean} % on what is retained, {erased} % on what is erased;")
        for name in (f"{way}_{unit}" for way in ("acu", "finetune", "relabel")):
            kept, gone = (
                percent(more(groups, name, anew.label, m), "+") for m in ("retain_accuracy", "forget_accuracy")
            )
            lines[-1] += f" `{name}` {kept} and {gone} points,"
    return "\n".join(line.removesuffix(",") for line in lines)


def sweeps_table(studies: list[Any]) -> str:
    """Metric on validation data of each value tried of what was searched, by arm; the best one in bold."""
    tables: dict[str, list[Any]] = {}
    for study in studies:
        (key,) = study["best"]["params"]
        tables.setdefault(key, []).append(study)
    parts = []
    for key, searched in tables.items():
        values = sorted({t["params"][key] for s in searched for t in s["trials"]})
        named = "arm" if key == "strategy.lr" else f"arm, `{key}`"
        lines = [f"| {named} | " + " | ".join(f"{v:g}" for v in values) + " |", "|---" * (len(values) + 1) + "|"]
        for study in searched:
            found = {t["params"][key]: t["value"] for t in study["trials"] if t["value"] is not None}
            best = study["best"]["params"][key]
            cells = [
                f"{'**' * (v == best)}{100 * found[v]:.1f}{'**' * (v == best)}" if v in found else "" for v in values
            ]
            lines.append(f"| `{study.get('arm') or study['trials'][0]['strategy']}` | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


PAGES = {
    "cifar100": Page("README.md", "results.json", ("er", "ncm"), frozen_answer),
    "cifar100_adapted": Page(
        "README_cifar100_adapted.md", "results_cifar100_adapted.json", ("er", "ncm_frozen"), adapted_answer
    ),
    "cotta": Page(
        "README_cotta.md",
        "results_cotta.json",
        BEFORE_COTTA,
        adapting_answer,
        ADAPTED,
        "online-error-by-round",
    ),
    "cotta_cifar100": Page(
        "README_cotta_cifar100.md",
        "results_cotta_cifar100.json",
        BEFORE_COTTA,
        partial(adapting_answer, of="cotta_gate_55"),
        ADAPTED,
        "online-error-by-round",
    ),
    "llm": Page(
        "README_llm.md",
        "results_llm.json",
        ("lora", "replay"),
        partial(adapters_answer, references=("lora", "lora_slow", "replay")),
        SPOKEN,
        "text-max-answer-50-evaluate-score-accuracy-per-experience",
    ),
    "requests": Page(
        "README_requests.md",
        "results_requests.json",
        (),
        requests_answer,
        REQUESTED,
        "unlearning-unit-class-size-5-forget-accuracy-retain-accuracy",
    ),
    "text_classes": Page("README_text_classes.md", "results_text_classes.json", ("lora", "er", "ncm"), adapters_answer),
}


def parts_of(page: Page, results: Mapping[str, Any]) -> dict[str, str]:
    """Name → text of the page's generated parts."""
    groups = groups_of(results)
    parts = {"answer": page.answer(groups), "arms": arms_table(groups, page)}
    return parts | ({"sweeps": sweeps_table(results["sweeps"])} if results["sweeps"] else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("experiment", choices=PAGES)
    parser.add_argument("runs", type=Path, nargs="?")
    parser.add_argument("--sweeps", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    page = PAGES[args.experiment]
    if args.runs is not None:
        _take_in(args.experiment, page, args.runs, args.sweeps)
    put_parts(HERE / page.readme, parts_of(page, json.loads((HERE / page.results).read_text(encoding="utf-8"))))


def _take_in(name: str, page: Page, folder: Path, sweeps: list[Path]) -> None:
    """Write results and figure anew."""
    folders = sorted(file.parent for file in folder.rglob("summary.json"))
    runs = [run for run in compare.load_summaries(folders) if run["status"] == "complete"]
    kept = [{k: run[k] for k in KEPT} | {"config": run["config"]["strategy"]} for run in runs]
    file = HERE / page.results
    known = json.loads(file.read_text(encoding="utf-8"))["sweeps"] if file.is_file() else []
    facts = {"experiment": f"real/{name}", "sweeps": [study_of(sweep) for sweep in sweeps] or known, "runs": kept}
    lists = {k: "[\n" + ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in v) + "\n ]"
             if isinstance(v, list) else json.dumps(v) for k, v in facts.items()}  # fmt: skip
    text = ",\n".join(f' "{k}": {v}' for k, v in lists.items())
    write_atomic(file, f"{{\n{text}\n}}\n")
    # A run that has all at once is another stream: with it the figures would be of two.
    write_report([run["run_dir"] for run in runs if len(run["accuracy_matrix"]) > 2], folder / "comparison")
    shutil.copyfile(folder / "comparison" / "figures" / f"{page.figure}.svg", HERE / f"{name}.svg")


def study_of(folder: Path) -> dict[str, Any]:
    """What is kept of a study: its trials, which strategy they ran, and the arm that its folder is named by."""
    study = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    name = json.loads(next(Path(study["trials"][0]["folder"]).rglob("summary.json")).read_text())["strategy"]
    trials = [{k: t[k] for k in ("params", "value", "state")} | {"strategy": name} for t in study["trials"]]
    facts = {k: study[k] for k in ("study", "metric", "evaluated_on", "seeds", "best")}
    return facts | {"arm": folder.parent.name, "trials": trials}


if __name__ == "__main__":
    main()
