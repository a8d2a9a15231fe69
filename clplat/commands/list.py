"""`clplat list`, and `clplat.list` in Python: what there is, read from the syntax tree (nothing is imported)."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from typing import Any

from clplat.commands import support
from clplat.commands.arguments import Parser
from clplat.config import discovery
from clplat.config.resolve import experiments
from clplat.errors import UserError

GROUPS = (*discovery.GROUPS, "metrics", "experiments")


class Listing(list[dict[str, Any]]):
    """What there is: a dict for each, with its `section`, `name` and facts. Shown as `clplat list` shows it."""

    def frame(self) -> Any:
        """A pandas DataFrame of a row for each."""
        import pandas

        return pandas.DataFrame(self)

    def __repr__(self) -> str:
        groups = [(name, [*rows]) for name, rows in itertools.groupby(self, lambda row: row["section"])]
        if len(groups) == 1:
            return "\n".join(_table(groups[0][1], ""))
        return "\n\n".join("\n".join([f"{name}:", *_table(rows, "  ")]) for name, rows in groups) or "(none)"

    def _repr_html_(self) -> str:
        return self.frame().dropna(axis=1, how="all").to_html(index=False, na_rep="")


def listed(group: str | None = None) -> Listing:
    """What there is, as `clplat list` prints it.

    Args:
        group: strategies, streams, backbones, heads, merges, metrics or experiments; None is all of them.

    Raises:
        UserError: there is no such group.
    """
    if group is not None and group not in GROUPS:
        near = discovery.did_you_mean(group, GROUPS, n=1) or f" (one of {', '.join(GROUPS)})"
        raise UserError(f"list: unknown group '{group}'{near}")
    return Listing({"section": g, **row} for g in ([group] if group else GROUPS) for row in _rows(g))


def configure(parser: Parser) -> None:
    parser.add_argument("group", nargs="?", metavar="GROUP", help=f"one of {', '.join(GROUPS)}; all if left out")
    parser.add_argument("--json", action="store_true", help="as JSON: group → list of objects")
    parser.add_argument("--support", action="store_true", help="what strategies were seen to do, and on what")


def main(args: argparse.Namespace) -> int:
    found = listed(args.group)
    if args.support:
        return _supported(args, [row["name"] for row in found])
    if not args.json:
        print(found)
        return 0
    groups: dict[str, Any] = {g: [] for g in ([args.group] if args.group else GROUPS)}
    for row in found:
        groups[row.pop("section")].append(row)
    print(json.dumps(groups, indent=2, ensure_ascii=False))
    return 0


def _supported(args: argparse.Namespace, names: list[str]) -> int:
    if args.group != "strategies":
        raise UserError(f"list: --support is of strategies, not of {args.group or 'all'} (clplat list strategies)")
    rows = {name: cells for name, cells in support.recorded().items() if name in names}
    print(json.dumps(rows, indent=2, ensure_ascii=False) if args.json else support.shown(names))
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
    cells = []
    for row in rows:
        text = f"UNUSABLE: {row['fault']}" if row.get("fault") else row.get("summary") or row.get("one_line", "")
        cells.append([row["name"], ",".join(row.get("kinds") or []), row.get("paper") or "", text])
    used = [i for i in range(4) if any(c[i] for c in cells)]
    widths = {i: max(len(c[i]) for c in cells) for i in used}
    return [(indent + "  ".join(c[i].ljust(widths[i]) for i in used)).rstrip() for c in cells]
