"""`clplat list`: what there is, one line each, read from the syntax tree (nothing is imported)."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from clplat.commands.arguments import Parser
from clplat.config import discovery
from clplat.config.resolve import experiments
from clplat.errors import UserError

GROUPS = (*discovery.GROUPS, "metrics", "experiments")


def configure(parser: Parser) -> None:
    parser.add_argument("group", nargs="?", metavar="GROUP", help=f"one of {', '.join(GROUPS)}; all if left out")
    parser.add_argument("--json", action="store_true", help="as JSON: group → list of objects")


def main(args: argparse.Namespace) -> int:
    if args.group is not None and args.group not in GROUPS:
        near = discovery.did_you_mean(args.group, GROUPS, n=1) or f" (one of {', '.join(GROUPS)})"
        raise UserError(f"list: unknown group '{args.group}'{near}")
    groups = {g: _rows(g) for g in ([args.group] if args.group else GROUPS)}
    if args.json:
        print(json.dumps(groups, indent=2, ensure_ascii=False))
        return 0
    blocks = []
    for group, rows in groups.items():
        heading = [] if args.group else [f"{group}:"]
        blocks.append("\n".join(heading + _table(rows, "" if args.group else "  ")))
    print("\n\n".join(blocks))
    return 0


def _rows(group: str) -> list[dict[str, Any]]:
    if group == "metrics":
        from clplat.metrics.catalogue import METRICS

        return [{"name": name, **dataclasses.asdict(info)} for name, info in METRICS.items()]
    if group == "experiments":
        return [{"name": name, "summary": _first_comment(file)} for name, file in experiments().items()]
    rows = []
    for entry in discovery.entries(group).values():
        row = {"name": entry.name, "kinds": list(entry.kinds), "paper": entry.paper, "summary": entry.summary}
        rows.append(row | ({"fault": entry.fault} if entry.fault else {}))
    return rows


def _first_comment(file: Any) -> str:
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def _table(rows: list[dict[str, Any]], indent: str) -> list[str]:
    if not rows:
        return [f"{indent}(none)"]
    cells = []
    for row in rows:
        text = f"UNUSABLE: {row['fault']}" if row.get("fault") else row.get("summary") or row.get("one_line", "")
        cells.append([row["name"], ",".join(row.get("kinds") or []), row.get("paper") or "", text])
    used = [i for i in range(4) if any(c[i] for c in cells)]
    widths = {i: max(len(c[i]) for c in cells) for i in used}
    return [(indent + "  ".join(c[i].ljust(widths[i]) for i in used)).rstrip() for c in cells]
