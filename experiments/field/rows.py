"""Rows of the leaderboard: tunes strategies on a stream's own sweep, runs the best of each, and takes them in.

    python experiments/field/rows.py STREAM [STRATEGY ...] [--output DIR]
    python experiments/field/rows.py

Each strategy is tuned by STREAM_sweep.yaml, over the ranges that it declares, and its best settings are run on
`SEEDS`; `FIXED` has what is not tuned. What is there already under DIR (runs/field) is used again. One that is refused
on this stream has its reason for a row. Then results, STREAM.yaml with an arm for each row, and the tables of
README.md are made anew; without arguments the last two, of the results that are here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from clplat.config import discovery
from clplat.files import put_parts, write_atomic
from clplat.report import compare
from clplat.report.numbers import show_estimate, show_p
from clplat.report.ranks import rank
from clplat.report.tables import title_of
from clplat.sweep.ranges import searched

HERE = Path(__file__).parent
KEPT = ("strategy", "head", "name", "seed", "status", "git_commit", "accuracy_matrix", "metrics", "cost")
SEEDS = ("0", "1", "2")
# By stream: the metric that ranks, what else is shown, and what a practitioner would take where nothing is beyond it.
STREAMS = {
    "cifar100": ("average_accuracy", ("forgetting", "plasticity")),
    "text": ("average_accuracy", ("forgetting", "plasticity")),
    "requests": ("h_mean", ("forget_accuracy", "retain_accuracy")),
    "corruptions": ("online_error", ("last_round_error", "source_drop")),
}
# What is not tuned, the same for all that have it: room for samples.
FIXED: dict[str, dict[str, Any]] = {
    "cifar100": {"memory": 500},
    "text": {"memory": 60},
    "requests": {"memory": 2400, "replay_batch": 24},  # all that is at hand
    "corruptions": {"augmentations": 4, "fisher_weight": 0.0},  # images of the source are not there
}
# With these options `lr` does nothing: no task is learned, and what else is done has its own rate or takes no step.
IDLE = {"corruptions": {"adapt_lr", "lr"}, "requests": {"forget_lr", "dampening"}}
# Whose rows belong there: of what learns alone; of what else answers requests, or adapts, by that.
KINDS = {"cifar100": {"learn"}, "text": {"learn"}, "requests": {"learn", "forget"}, "corruptions": {"learn", "adapt"}}
# Why a strategy is no rival there, where it would run.
NO_RIVAL = {
    "acu": "It learns as acil does, and answers by its closed form, on features that stay frozen",
    "retrain": "It is no change of the model that is asked, but another model",
    "avalanche": "It wraps Avalanche's plugins, whose methods have rows of their own",
}
Groups = dict[str, compare.Group]


def fixed_and_space(stream: str, strategy: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is not tuned of a strategy's options, and the `sweep.space` of the others that it declares."""
    entry = discovery.find("strategies", strategy)
    known = {option.name for option in discovery.options(entry)}
    fixed = {k: v for k, v in FIXED[stream].items() if k in known}
    space = {}
    for name, declared in searched(entry).items():
        if name in fixed or (name == "lr" and known & IDLE.get(stream, set())):
            continue
        how = {"choices": declared} if isinstance(declared, list) else {"low": declared[0], "high": declared[1]}
        space[f"strategy.{name}"] = how | ({"log": True} if declared[2:] == ("log",) else {})
    return fixed, space


def tune_and_run(stream: str, strategy: str, output: Path) -> None:
    """The study of a strategy, and its best configuration on every seed; nothing is done twice.

    Where it is refused, `refused.txt` says why instead.
    """
    folder, base = output / stream / strategy, f"field/{stream}_sweep"
    fixed, space = fixed_and_space(stream, strategy)
    flags = [f"--strategy={strategy}", *(f"--strategy.{k}={v}" for k, v in fixed.items())]
    clplat, best = [sys.executable, "-m", "clplat"], [base, *flags]
    folder.mkdir(parents=True, exist_ok=True)
    checked = subprocess.run([*clplat, "validate", *best], capture_output=True, text=True, check=False)
    if checked.returncode == 2:
        said = [line.removeprefix("clplat: ") for line in checked.stderr.splitlines() if line.startswith("clplat: ")]
        write_atomic(folder / "refused.txt", said[-1])
        return
    start = (output / stream / "start").resolve()  # weights to start from are made once for all
    for part in (folder / "study", folder / "runs"):
        part.mkdir(parents=True, exist_ok=True)
        start.mkdir(exist_ok=True)
        if not (part / "start").is_symlink():
            (part / "start").symlink_to(start)
    if space:
        study = folder / "study"
        best = [str(study / f"{stream}_sweep" / "best.yaml")]
        if not Path(best[0]).is_file():
            asked = [base, *flags, f"--sweep.space={json.dumps(space)}", f"--output={study}"]
            subprocess.run([*clplat, "sweep", *asked, "-q"], check=True)
    subprocess.run([*clplat, "run", *best, "--seeds", *SEEDS, f"--output={folder / 'runs'}", "-q"], check=True)


def take_in(stream: str, output: Path) -> None:
    """Put every row that is whole under `output` into the stream's results, in the place of an older one."""
    file = HERE / f"results_{stream}.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"rows": {}, "runs": []}
    refused = known.setdefault("refused", {})
    rows, kept = known["rows"], {(run["strategy"], run["seed"]): run for run in known["runs"]}
    for folder in sorted((output / stream).glob("*/")):
        if (folder / "refused.txt").is_file():
            refused[folder.name] = (folder / "refused.txt").read_text(encoding="utf-8")
        found = sorted(f.parent for f in (folder / "runs").rglob("summary.json"))
        runs = [run for run in compare.load_summaries(found) if run["status"] == "complete"]
        if len(runs) < len(SEEDS):
            continue
        name, study = folder.name, folder / "study" / f"{stream}_sweep" / "sweep.json"
        facts = json.loads(study.read_text(encoding="utf-8")) if study.is_file() else {"best": {"params": {}}}
        tuned = {k.partition(".")[2]: v for k, v in facts["best"]["params"].items()}
        rows[name] = {"options": {"name": name, **fixed_and_space(stream, name)[0], **tuned}}
        rows[name] |= {k: facts[k] for k in ("protocol", "effort", "gain", "metric") if k in facts}
        for run in runs:
            kept[name, run["seed"]] = {k: run[k] for k in KEPT} | {"name": f"field-{stream}/{name}"}
    first = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in sorted(rows.items()))
    second = ",\n".join(f"  {json.dumps(run, ensure_ascii=False)}" for _, run in sorted(kept.items()))
    why = json.dumps(refused, ensure_ascii=False, indent=2, sort_keys=True)
    text = f' "experiment": "field/{stream}",\n "refused": {why},\n "rows": {{\n{first}\n }},\n "runs": [\n{second}\n ]'
    write_atomic(file, f"{{\n{text}\n}}\n")


def configuration(stream: str, results: Mapping[str, Any]) -> str:
    """STREAM.yaml: the sweep's configuration with a tuned arm for each row, so that `clplat run --only` repeats it."""
    text = (HERE / f"{stream}_sweep.yaml").read_text(encoding="utf-8")
    body = text[text.index("\nname: ") + 1 : text.index("\nsweep:")]
    arms = "".join(f"  {name}: {arm(row['options'])}\n" for name, row in sorted(results["rows"].items()))
    head = f"# Written by rows.py: {stream}_sweep.yaml, which says what it is, and what each strategy was tuned to.\n"
    return f"{head}{body}\nseeds: [{', '.join(SEEDS)}]\nruns:\n{arms}"


def arm(options: Mapping[str, Any]) -> str:
    """An arm in one line."""
    return yaml.safe_dump({"strategy": dict(options)}, default_flow_style=True, sort_keys=False, width=1000).strip()


def groups_of(results: Mapping[str, Any]) -> Groups:
    """Strategy → its runs."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        found.setdefault(run["name"].rpartition("/")[2], []).append(run)
    label = results["experiment"].partition("/")[2]
    return {name: compare.Group(name, name, label, "", tuple(runs), tuple(runs)) for name, runs in found.items()}


def ordered(stream: str, results: Mapping[str, Any]) -> tuple[list[compare.Group], dict[str, compare.Comparison]]:
    """Strategies, the best mean first; and of each other one how far the first is ahead of it, seed by seed."""
    metric, groups = STREAMS[stream][0], list(groups_of(results).values())
    against = {c.second: c for c in compare.against_best(groups, metric)}
    sign = -1 if compare.higher_is_better(metric) else 1
    return sorted(groups, key=lambda g: (g.label in against, sign * (g.estimate(metric).mean or 0.0))), against


def table(stream: str, results: Mapping[str, Any]) -> str:
    """Strategies of a stream in order, with what they were tuned to, time and memory."""
    metric, others = STREAMS[stream]
    groups, against = ordered(stream, results)
    heads = ["", "strategy", *map(title_of, (metric, *others)), "the first minus this", "p (Holm)", "tuned to",
             "train s", "kept MB"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for place, group in enumerate(groups, 1):
        cells = [str(place), f"`{group.label}`", *(show_estimate(group.estimate(m)) for m in (metric, *others))]
        apart = against.get(group.label)
        cells += ["", ""] if apart is None else [show_estimate(apart.difference), show_p(apart.p_holm)]
        options = results["rows"][group.label]["options"]
        cells.append(", ".join(f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in options.items()
                               if k != "name" and k not in FIXED[stream]))  # fmt: skip
        seconds, kept = (group.estimate(m).mean or 0.0 for m in ("train_seconds", "stored_bytes"))
        lines.append(f"| {' | '.join(cells)} | {seconds:.1f} | {kept / 1e6:.1f} |")
    return "\n".join(lines)


def answer(stream: str, results: Mapping[str, Any]) -> str:
    """The best mean, which strategies are not told from it, and the cheapest of these."""
    metric, _ = STREAMS[stream]
    groups, against = ordered(stream, results)
    told = {name for name, c in against.items() if c.difference.low is not None and c.difference.high is not None
            and not c.difference.low <= 0 <= c.difference.high}  # fmt: skip
    level = [group for group in groups if group.label not in told]
    cheap = min(level, key=lambda group: group.estimate("train_seconds").mean or 0.0)
    like = ", ".join(f"`{group.label}`" for group in level[1:])
    best = show_estimate(groups[0].estimate(metric))
    return (
        f"Of {len(groups)} strategies `{groups[0].label}` has the best mean: {title_of(metric)} {best}. "
        + (f"Not told from it beyond the interval: {like}. " if like else "All others are beyond the interval. ")
        + f"The cheapest of these to train is `{cheap.label}`."
    )


def missing(stream: str, results: Mapping[str, Any]) -> str:
    """Strategies of the stream's kinds that have no row: not run yet, or refused, with the reason."""
    asked = {n for n, e in discovery.entries("strategies").items() if KINDS[stream] == set(map(str, e.kinds))}
    by_reason: dict[str, list[str]] = {}
    for name in sorted(asked - set(results["rows"])):
        why = NO_RIVAL.get(name) or results.get("refused", {}).get(name, "Not run yet")
        by_reason.setdefault(why, []).append(f"`{name}`")
    lines = [f"- {reason}: {', '.join(names)}" for reason, names in sorted(by_reason.items())]
    return "Without a row:\n\n" + "\n".join(lines) if lines else "Every strategy of its kind has a row."


def overall(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Ranks of strategies that are in both streams that are learned."""
    both = [list(groups_of(results[s]).values()) for s in ("cifar100", "text") if s in results]
    ranking = rank(both, "average_accuracy") if len(both) > 1 else None
    if ranking is None:
        return "Not ranked over streams: fewer than two that are learned have rows."
    heads = ["strategy", "mean rank", *ranking.streams]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for j, name in enumerate(ranking.strategies):
        lines.append(f"| `{name}` | {ranking.means[j]:.1f} | " + " | ".join(f"{r[j]:g}" for r in ranking.ranks) + " |")
    return "\n".join(lines) + f"\n\n{ranking.said()}"


def results_here() -> dict[str, dict[str, Any]]:
    files = {s: HERE / f"results_{s}.json" for s in STREAMS}
    return {s: json.loads(f.read_text(encoding="utf-8")) for s, f in files.items() if f.is_file()}


def parts_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Name → text of the page's generated parts."""
    parts = {"ranks": overall(results)}
    for stream in STREAMS:
        known = results.get(stream)
        parts |= {f"{stream}-answer": answer(stream, known) if known else "No row was run yet."}
        parts |= {stream: table(stream, known) if known else "No row was run yet."}
        parts |= {f"{stream}-missing": missing(stream, known or {"rows": {}})}
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stream", nargs="?", choices=STREAMS)
    parser.add_argument("strategies", nargs="*")
    parser.add_argument("--output", type=Path, default=Path("runs/field"))
    args = parser.parse_args()
    if args.stream is not None:
        for strategy in args.strategies:
            tune_and_run(args.stream, strategy, args.output)
        take_in(args.stream, args.output)
    results = results_here()
    for stream, known in results.items():
        write_atomic(HERE / f"{stream}.yaml", configuration(stream, known))
    put_parts(HERE / "README.md", parts_of(results))


if __name__ == "__main__":
    main()
