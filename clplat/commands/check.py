"""`clplat check`: the conformance suite on one strategy or stream."""

from __future__ import annotations

import argparse
from contextlib import suppress

from clplat.commands.arguments import Parser
from clplat.config import discovery, syntax
from clplat.errors import UserError

TAKES_KEYS = True  # of a stream: its options, data_root, and the backbone whose language a stream of text speaks
KEYS = ("--stream.", "--backbone", "--data_root")


def configure(parser: Parser) -> None:
    parser.usage = "clplat check PATH_OR_NAME [--as strategy|stream] [--stream.KEY VALUE ...]"
    parser.add_argument("part", metavar="PATH_OR_NAME", help="a strategy's or stream's name, or path/to/file.py:Class")
    parser.add_argument("--as", dest="kind", choices=("strategy", "stream"), help="which of them, where both are there")


def main(args: argparse.Namespace) -> int:
    group = _group(args.part, args.kind)
    if wrong := [k for k in args.keys if k.startswith("-") and not (group == "streams" and k.startswith(KEYS))]:
        valid = (
            "valid: --stream.KEY, --backbone, --backbone.KEY, --data_root"
            if group == "streams"
            else "a strategy is checked with small ones of its own"
        )
        raise UserError(f"check: {wrong[0].partition('=')[0]} has no meaning here ({valid})")
    from clplat.testing import check

    return check(args.part, group, args.keys)


def _group(name: str, kind: str | None) -> str:
    """Strategies or streams. An unknown name is refused before anything heavy is imported."""
    if kind is not None:
        group = {"strategy": "strategies", "stream": "streams"}[kind]
        discovery.find(group, name)
        return group
    found = groups_of(name)
    if len(found) > 1:
        raise UserError(f"check: '{name}' is a strategy and a stream (say --as strategy, or --as stream)")
    if not found and ".py" not in name:
        known = {n for g in discovery.ROOTS for n in discovery.entries(g)}
        raise UserError(f"check: unknown name '{name}'" + (discovery.did_you_mean(name, known) or " (see clplat list)"))
    if not found:
        discovery.find("strategies", name)  # says what is wrong with the file
        raise UserError(f"check: {name}: is neither a Strategy nor a Stream")
    return found[0]


def groups_of(name: str) -> list[str]:
    """Which of strategies and streams have a part of this name, or of this file."""
    found = {}
    for group in discovery.ROOTS:
        with suppress(UserError):
            found[group] = discovery.find(group, name)
    stated = name.rpartition(":")[2] if ".py:" in name else None
    return [g for g, e in found.items() if stated is None or stated in discovery.candidates(syntax.read(e.file), g)]
