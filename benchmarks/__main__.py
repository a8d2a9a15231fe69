"""`python -m benchmarks`: all figures, printed as a table and written to benchmarks/results/.

Options: --quick takes one short round of each and asserts nothing on times; --only NAME... takes some of the parts
(steps, evaluation, startup, memory, peers, hnet, acu, corruptions, cotta, adapters, agents, dashboard, on_disk,
real, smollm2, processes, arithmetic, overhead, allocation, compiled, long_streams); --table puts the results into
README.md, a table for each processor, prints them, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS, README = Path(__file__).parent / "results", Path(__file__).parent / "README.md"
PARTS = (
    "steps",
    "evaluation",
    "startup",
    "memory",
    "peers",
    "hnet",
    "acu",
    "corruptions",
    "cotta",
    "adapters",
    "agents",
    "dashboard",
    "on_disk",
    "real",
    "smollm2",
    "processes",
    "arithmetic",
    "overhead",
    "allocation",
    "compiled",
    "long_streams",
)
VERSIONS = ("clplat", "torch", "lightning", "timm", "mlflow", "avalanche-lib", "stable-baselines3")


def main() -> int:
    """Exit code 1 if a limit is not kept."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    if options.table:
        found = sorted(
            (json.loads(p.read_text()) for p in RESULTS.glob("*.json")), key=lambda r: r["date"], reverse=True
        )
        text = "\n\n".join(map(table, found))
        before, mark, rest = README.read_text().partition("<!-- table -->\n")
        README.write_text(f"{before}{mark}{text}\n<!-- /table -->{rest.partition('<!-- /table -->')[2]}")
        print(text)
        return 0
    results = measure(options.only, options.quick)
    print(table(results))
    if options.quick:
        return 0
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{_slug(platform.system(), platform.machine(), results['cores'], results['processor'])}.json"
    if options.only != PARTS and path.exists():  # parts not measured now keep what was measured before, with its date
        kept = [r for r in json.loads(path.read_text())["rows"] if r["part"] not in options.only]
        results["rows"] = sorted(kept + results["rows"], key=lambda r: PARTS.index(r["part"]))
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {path}", file=sys.stderr)
    return 0 if all(row["passed"] is not False for row in results["rows"]) else 1


def measure(parts: list[str], quick: bool) -> dict[str, Any]:
    """Facts of the machine, and a row for each figure."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import importlib

    import torch

    torch.set_num_threads(1)
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    rows = []
    for part in parts:
        print(f"measuring {part} ...", file=sys.stderr, flush=True)
        found = importlib.import_module(f"benchmarks.{part}").rows(quick)
        rows += [{"part": part, "date": date, **row.to_dict()} for row in found]
    return {
        "date": date,
        "quick": quick,
        "cores": os.cpu_count(),
        "processor": _processor(),
        "load": [round(x, 1) for x in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
        "rows": rows,
    }


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        f"{results['date']}; {results['cores']} cores ({results['processor']}), one thread, load "
        f"{results['load'][0]}; Python {results['python']}, {versions}.",
        "",
        "| figure | clplat or peer | by hand | pairs: median (min to max) | limit | |",
        "|---|---|---|---|---|---|",
    ]
    for r in results["rows"]:
        unit, ratio = r["unit"], r["how"] == "ratio"
        median, low, high = (_ratio(r[k]) if ratio else f"{r[k]:+.1f} {unit}" for k in ("median", "min", "max"))
        limit = "" if r["limit"] is None else f"≤ {r['limit']:g} ×" if ratio else f"≤ {r['limit']:+g} {unit}"
        passed = {None: "", True: "kept", False: "**not kept**"}[r["passed"]]
        precision = ".0f" if unit == "MB" else ".3g"
        sides = f"{r['ours']:{precision}} {unit} | {r['base']:{precision}} {unit}"
        note = f" ({r['note']})" if r["note"] else ""
        spread = f"{median} ({low} to {high}; {r['rounds']} pairs)"
        lines.append(f"| {r['name']}{note} | {sides} | {spread} | {limit} | {passed} |")
    return "\n".join(lines)


def _ratio(value: float) -> str:
    """Two decimals, or two digits where those would be zeros."""
    return f"{value:.2f} ×" if value >= 0.1 else f"{value:.2g} ×"


def _slug(*facts: Any) -> str:
    """Facts of a machine in a file's name: figures of two processors are never in one file."""
    return re.sub(r"[^a-z0-9_]+", "-", "-".join(map(str, facts)).lower()).strip("-")


def _processor() -> str:
    """Its name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
