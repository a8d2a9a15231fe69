"""Rebuilds what the documentation takes from the code and from measured results.

    python docs/generate.py                    rewrite the generated parts, and the picture of docs/architecture.md
    python docs/generate.py --demo runs/demo   take in new runs of `make demo` first: their results and the picture
    python docs/generate.py --check            change nothing; exit code 1 if a part is out of date

A generated part stands between `<!-- generated: NAME -->` and `<!-- end: NAME -->`; the rest of a page is written by
hand.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import os
import platform
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from clplat.commands import support
from clplat.commands.keys import _shown, _type_name
from clplat.config import discovery, syntax
from clplat.config.resolve import expand, experiments, section_options
from clplat.report import compare, tables

sys.path.insert(0, str(Path(__file__).parent))
import architecture
import reproduced

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "demo" / "results.json"
BENCHMARKS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "images" / "demo.svg"
KEPT = ("strategy", "stream", "backbone", "head", "name", "seed", "status", "git_commit", "experiences",
        "accuracy_matrix", "metrics", "cost")  # fmt: skip
_KINDS = ("learn", "forget", "adapt", "interact")
_PART = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)


# --- parts --------------------------------------------------------------------------------------------------------


def strategies_table() -> str:
    """Name, kinds, backbones, paper and folders of experiments of every strategy, by kinds."""
    rows = []
    for name, entry in sorted(
        discovery.entries("strategies").items(), key=lambda item: (_KINDS.index(item[1].kinds[-1]), item[0])
    ):
        about = f"[`{name}`](strategies/{name}.py)"
        folders = dict.fromkeys(e.partition("/")[0] for e in experiments_of(name))
        shown = ", ".join(f"[{f}](experiments/{f})" for f in folders) or "—"
        rows.append([about, ", ".join(entry.kinds), backbones_of(entry), paper_link(entry.paper), shown])
    return table(["strategy", "kinds", "backbones", "paper", "experiment"], rows)


def experiments_of(strategy: str) -> list[str]:
    """Shipped experiments that run a strategy."""
    return [name for name, strategies in _strategies_run().items() if strategy in strategies]


@functools.cache
def _strategies_run() -> dict[str, set[str]]:
    """Experiment → strategies in it."""
    return {name: {config.strategy.name for config in expand(config=file)} for name, file in experiments().items()}


def backbones_of(entry: discovery.Entry) -> str:
    """Any, unless its source asks for blocks, adaptable layers (itself or through adapters), normalisation layers, a
    text tower, patches or answers that are written."""
    nodes = list(ast.walk(syntax.read(entry.file).tree))
    attributes = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    froms = [n for n in nodes if isinstance(n, ast.ImportFrom)]
    modules, names = {n.module or "" for n in froms}, {a.name for n in froms for a in n.names}
    through = any("adapters" in module or module.endswith(("lora", "_calibrated")) for module in modules)
    asked = {
        "attention or FFN layers": "layers" in attributes or through,
        "blocks": "blocks" in attributes,
        "normalisation layers": bool(names & {"NormStepping", "norm_affine"}),
        "a text tower": "text_features" in attributes,
        "batch normalisation": "TTA" in names and "norms" in attributes,
        "patches (ViTs of timm)": "MaskedPatches" in names,
        "written answers": any(isinstance(n, ast.Name) and n.id == "needs_text" for n in nodes),
    }
    found = [words for words, wanted in asked.items() if wanted]
    return f"those with {' and '.join(found)}" if found else "any"


def paper_link(paper: str) -> str:
    """`arXiv:…` and `doi:…` as links."""
    scheme, _, number = paper.partition(":")
    if scheme == "arXiv":
        return f"[{paper}](https://arxiv.org/abs/{number})"
    # A bracket in a link's address has to be written by its code.
    address = number.replace("(", "%28").replace(")", "%29")
    return f"[{paper}](https://doi.org/{address})" if scheme == "doi" else paper


def demo_table() -> str:
    """What the demo printed, with its conditions."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    groups = compare.split_streams(results["runs"])[0]
    seeds = sorted({run["seed"] for run in results["runs"]})
    tested = compare.against_best(groups, "average_accuracy")
    pairs = "; ".join(
        f"{t.second} by {t.difference.mean:.3f} [{t.difference.low:.3f}, {t.difference.high:.3f}], p = {t.p_holm:.2g}"
        for t in tested
        if t.difference.mean is not None and t.p_holm is not None
    )
    apart = all("warmup_seconds" in run["cost"] for run in results["runs"])
    warm = (
        "evaluation and the process's warm-up apart" if apart else "evaluation apart; a process's first run warms it up"
    )
    text = f"""Mean ± half the 95 % interval over seeds {", ".join(map(str, seeds))} (Student's t). {tested[0].first}
        exceeds {pairs} (paired t-test, Holm). Time is that of training, {warm}. {results["machine"]},
        clplat {results["clplat"]} at commit
        {results["git_commit"][:7]}, torch {results["torch"]}."""
    return tables.markdown(groups) + "\n" + paragraph(text)


def benchmarks_table() -> str:
    """Of each part of `make bench` its newest results: the figures that have a limit, and the peer's."""
    files = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(BENCHMARKS.glob("*.json"))]
    if not files:
        return paragraph("No results are checked in yet; `make bench` measures them.")
    newest = {}
    for results in files:
        for row in results["rows"]:
            newest[row["part"]] = max(newest.get(row["part"], ""), row["date"])
    rows, sources = [], {}
    for part in newest:
        for row, source in ((row, facts) for facts in files for row in facts["rows"] if row["part"] == part):
            plain = part != "peers" and (row["limit"] is None or row["unit"] == "kB")
            if row["date"] != newest[part] or plain:
                continue  # these stand in benchmarks/README.md alone
            unit = "×" if row["how"] == "ratio" else row["unit"]
            shown = ".3g" if row["how"] == "ratio" else "+.1f"
            middle, low, high = (f"{row[k]:{shown}} {unit}" for k in ("median", "min", "max"))
            sides = [f"{row[k]:{'.0f' if row['unit'] == 'MB' else '.3g'}} {row['unit']}" for k in ("base", "ours")]
            most = "—" if row["limit"] is None else f"{row['limit']:.3g} {unit}" + ", not kept" * (not row["passed"])
            where = source["processor"].replace("(R)", "").removesuffix(" Processor")
            rows.append([row["name"], *sides, f"{middle} ({low} to {high})", most, f"{where}, {row['date'][:10]}"])
            sources[where] = ", ".join(f"{name} {number}" for name, number in source["versions"].items())
    head = ["figure", "by hand", "clplat (or the peer named)", "pairs: median (min to max)", "limit", "measured on"]
    versions = "; ".join(f"{where}: {found}" for where, found in sources.items())
    text = f"Machines of two cores, one thread. {versions}. All figures, and what each is: [benchmarks/](benchmarks)."
    return table(head, rows) + "\n" + paragraph(text)


def support_part() -> str:
    """The support matrix as recorded: its columns, a row of each strategy, and the reasons by number."""
    rows = support.recorded()
    known = support.reasons(rows)
    shown = [
        [f"[`{name}`](methods.md#{name})", *(support.cell(row, c, known).replace("yes", "✓") for c in support.COLUMNS)]
        for name, row in rows.items()
    ]
    what = table(["column", "a ✓ says"], [[f"`{name}`", said] for name, said in support.COLUMNS.items()])
    reasons = "\n".join(f"{number}. {why}" for number, why in enumerate(known, 1))
    head = ["strategy", *(name.replace("_", " ") for name in support.COLUMNS)]
    return f"{what}\n\n{table(head, shown)}\n\n{reasons}"


def published_part() -> str:
    """Published figures and what came of them here."""
    known = reproduced.arms()
    rows = reproduced.published_rows(known)
    head = ["method", "setting", "metric", "published", "source", "ours", "seeds", "command", "commit", "outcome"]
    counts = {said: sum(row[-1] == said for row in rows) for said in ("reached", "not reached", "not run here")}
    text = ", ".join(f"{count} {said}" for said, count in counts.items())
    names = ", ".join(f"`{name}`" for name in reproduced.without())
    return f"{len(rows)} figures: {text}.\n\n{table(head, rows)}\n" + paragraph(
        f"No published figure in a setting that is shipped is known here of {names}."
    )


def measured_part() -> str:
    """What was run here, from the results that are checked in."""
    head = ["command", "run", "seeds", "metric", "mean ± half the 95 % interval", "commit", "measured"]
    return table(head, reproduced.measured_rows(reproduced.arms()))


def methods() -> str:
    """One section for each strategy, from its module's docstring and its constructor."""
    base = {o.name for o in discovery.options(discovery.find("strategies", "naive"))}
    sections = []
    for name, entry in discovery.entries("strategies").items():
        title, blocks = module_parts(ast.get_docstring(syntax.read(entry.file).tree) or "")
        own = [o for o in discovery.options(entry) if o.name not in base]
        lines = [f"## `{name}`\n", f"{title}\n", "```text", *blocks.pop("", []), "```\n"]
        lines += [f"- **{head}**: {' '.join(text)}" for head, text in blocks.items()]
        lines += [f"- **Paper**: {paper_link(entry.paper)}", f"- **Kinds**: {', '.join(entry.kinds)}"]
        lines += [f"- **Backbones**: {backbones_of(entry)}\n"]
        lines += [option_table(own, "strategy.") if own else "No options of its own.\n"]
        sections.append("\n".join(lines))
    shared = discovery.options(discovery.find("strategies", "naive"))
    sections.append("## Options of all strategies\n\n" + option_table(shared, "strategy."))
    return "\n".join(sections)


def module_parts(doc: str) -> tuple[str, dict[str, list[str]]]:
    """A strategy's docstring: its first sentence; lines under Source, Checked, Differs; and, under "", equations."""
    first, _, rest = doc.partition("\n\n")
    parts: dict[str, list[str]] = {"": []}
    head = ""
    for line in rest.splitlines():
        word = re.match(r"(Source|Checked|Differs)\s+", line)
        if word:
            head = word[1]
            parts[head] = [line[word.end() :]]
        elif line.startswith(" " * 9) and (head == "Differs" or (head and not parts[""])):
            parts[head].append(line.strip())
        elif line.strip():
            parts[""].append(line.removeprefix("    "))
    if "Differs" in parts:
        parts["Differs"] = parts.pop("Differs")  # last, as it stands
    return first.replace("\n", " "), parts


def streams_part() -> str:
    """One section for each stream with the options it does not share."""
    shared = {o.name for o in discovery.options(discovery.find("streams", "digits"))}
    sections = []
    for name, entry in discovery.entries("streams").items():
        own = [o for o in discovery.options(entry) if o.name not in shared]
        text = option_table(own, "stream.") if own else "No options of its own.\n"
        sections.append(f"### `{name}`\n\n{entry.summary}\n\n{text}")
    return "\n".join(sections)


def backbones_part() -> str:
    """One section for each backbone with its options."""
    sections = []
    for name, entry in discovery.entries("backbones").items():
        sections.append(f"### `{name}`\n\n{entry.summary}\n\n{option_table(discovery.options(entry), 'backbone.')}")
    return "\n".join(sections)


def merges_part() -> str:
    """One section for each merge with its equation and options."""
    sections = []
    for name, entry in discovery.entries("merges").items():
        title, blocks = module_parts(ast.get_docstring(syntax.read(entry.file).tree) or "")
        lines = [f"#### `{name}`\n", f"{title}\n"]
        if equations := blocks.pop("", []):
            lines += ["```text", *equations, "```\n"]
        lines += [f"- **{head}**: {' '.join(text)}" for head, text in blocks.items()]
        lines += ["", option_table(discovery.options(entry), "merge.")] if blocks else []
        sections.append("\n".join(lines))
    return "\n".join(sections)


def scenario_part() -> str:
    """Options of every stream that is cut from one data set."""
    return option_table(discovery.options(discovery.find("streams", "digits")), "stream.")


def section_part(section: str | None) -> Callable[[], str]:
    """Options of `loop`, `fabric` or `tracking`, or of the run itself."""
    return lambda: option_table(section_options(section), f"{section}." if section else "")


def option_table(options: Iterable[syntax.Option], prefix: str) -> str:
    """Keys with their types, defaults and docstrings."""
    rows = []
    for option in options:
        default = "required" if option.default is syntax.REQUIRED else f"`{_shown(option.default)}`"
        kind = _type_name(option.type).replace("|", " or ")
        rows.append([f"`{prefix}{option.name}`", kind, default, option.help])
    return table(["key", "type", "default", "what"], rows)


# --- pages --------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[], str]] = {
    "strategies": strategies_table,
    "demo": demo_table,
    "benchmarks": benchmarks_table,
    "published": published_part,
    "measured": measured_part,
    "support": support_part,
    "methods": methods,
    "streams": streams_part,
    "backbones": backbones_part,
    "merges": merges_part,
    "scenarios": scenario_part,
    "run": section_part(None),
    "loop": section_part("loop"),
    "fabric": section_part("fabric"),
    "start": section_part("start"),
    "audit": section_part("audit"),
    "tracking": section_part("tracking"),
}


def pages() -> dict[Path, str]:
    """Each page with a generated part, and the picture of the rooms, as they should be."""
    found = {architecture.PICTURE: architecture.picture()}
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        if _PART.search(text):
            found[path] = _PART.sub(lambda m: f"{m[1]}\n{PARTS[m[2]]()}\n{m[3]}", text)
    return found


def take_in_demo(folder: Path, machine: str) -> None:
    """Results and picture of the newest run of each name and seed under `folder`."""
    import torch

    import clplat
    from clplat.files import write_atomic
    from clplat.report import write_report

    newest: dict[tuple[str, int], Path] = {}
    for file in sorted(folder.rglob("summary.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        newest[facts["name"], facts["seed"]] = file.parent
    order = [(c.name, c.seed) for c in expand(config="demo/digits")]
    folders = [newest[str(name), seed] for name, seed in order]
    runs = []
    for run in compare.load_summaries(folders):
        config = {k: v for k, v in run["config"].items() if k not in ("name", "output", "data_root", "tracking")}
        kept = {k: run[k] for k in KEPT} | {"config": config}
        kept["metrics"] = {k: v for k, v in run["metrics"].items() if v is not None}
        runs.append(kept)
    facts = {
        "experiment": "demo/digits",
        "command": "make demo",
        "machine": machine,
        "clplat": clplat.__version__,
        "git_commit": runs[0]["git_commit"],
        "torch": torch.__version__,
    }
    lines = ",\n".join("  " + json.dumps(run, ensure_ascii=False) for run in runs)
    write_atomic(RESULTS, json.dumps(facts, indent=1)[:-2] + f',\n "runs": [\n{lines}\n ]\n}}\n')
    report = folder / "comparison"
    write_report(folders, report)
    shutil.copyfile(report / "figures" / "accuracy-matrix.svg", PICTURE)


def this_machine() -> str:
    """Cores and processor, in words."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
    return f"{os.cpu_count()} CPU cores ({names[0] if names else platform.machine()})"


# --- text ---------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def paragraph(text: str) -> str:
    """`text` in lines of at most 116 characters."""
    return textwrap.fill(" ".join(text.split()), 116, break_long_words=False, break_on_hyphens=False) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--demo", type=Path, metavar="DIR", help="runs of `make demo` to take in")
    parser.add_argument("--machine", default=this_machine(), help="where they were made, in words")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a part is out of date")
    args = parser.parse_args()
    if args.demo is not None:
        take_in_demo(args.demo, args.machine)
    stale = [(p, text) for p, text in pages().items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
    for path, text in stale:
        print(f"{'out of date' if args.check else 'rewritten'}: {path.relative_to(ROOT)}")
        if not args.check:
            path.write_text(text, encoding="utf-8")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
