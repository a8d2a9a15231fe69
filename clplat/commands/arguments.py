"""Arguments of commands: argparse without abbreviations, its errors one-line faults."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NoReturn

from clplat.config.discovery import did_you_mean
from clplat.errors import UserError

_SEEDS = re.compile(r"[\[\]\d.,]+")


def dashes(words: Iterable[str]) -> str:
    """A hint where a key was written without its dashes: `strategy.lr=0.1`."""
    keys = [w for w in words if re.fullmatch(r"[a-z_]+(\.[a-z_]+)*=\S*", w)]
    return f" (keys are written {' '.join(f'--{k}' for k in keys)})" if keys else ""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError and knows its own flags."""

    def __init__(self, command: str, text: str) -> None:
        self.flags: dict[str, argparse.Action] = {}
        super().__init__(
            prog=f"clplat {command}",
            description=text[0].upper() + text[1:] + ".",
            allow_abbrev=False,
            add_help=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("-h", "--help", action="store_true", help="show this and exit")

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        action = super().add_argument(*names, **settings)
        self.flags |= {name: action for name in names if name.startswith("-")}
        return action

    def error(self, message: str) -> NoReturn:
        words = message.partition("unrecognized arguments: ")[2].split()
        raise UserError(f"{self.prog.removeprefix('clplat ')}: {message}{dashes(words)}")


def parser_for(command: str, text: str, module: ModuleType) -> Parser:
    """The parser of a command's own arguments."""
    parser = Parser(command, text)
    module.configure(parser)
    return parser


def add_launcher(parser: Parser, count: str) -> None:
    """The flags that say where jobs are done.

    Args:
        count: the flag that says how many at a time.
    """
    where = f"local: processes of this machine (the default with {count}); slurm: an array of jobs; ray: its tasks"
    parser.add_argument("--launcher", metavar="NAME", help=where)
    what = "of each job: timeout_min=240, slurm_partition=gpu, … (slurm); num_cpus, num_gpus, memory, address (ray)"
    parser.add_argument("--resource", action="append", metavar="KEY=VALUE", default=[], help=what)


def parse(command: str, text: str, module: ModuleType, argv: list[str]) -> argparse.Namespace | None:
    """Arguments of a command, or None when only help was wanted (and printed).

    Raises:
        UserError: unknown flags, with the nearest ones; missing arguments.
    """
    parser = parser_for(command, text, module)
    own, keys = split(argv, parser)
    takes_keys = getattr(module, "TAKES_KEYS", False)
    if any(token in ("-h", "--help") for token in own):
        print(parser.format_help() + (module.help_text(own, keys) if hasattr(module, "help_text") else ""), end="")
        return None
    if keys and not takes_keys:
        faults = [k.partition("=")[0] for k in keys if k.startswith("-")]
        raise UserError(*(f"{command}: no such option {f}{did_you_mean(f, parser.flags)}" for f in faults))
    args = parser.parse_args(own)
    args.keys = keys
    return args


def split(argv: list[str], parser: Parser) -> tuple[list[str], list[str]]:
    """A command's own arguments, and the rest: flags that are not its own, each with the value that follows it."""
    own: list[str] = []
    keys: list[str] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        action = parser.flags.get(token.partition("=")[0])
        if action is not None:
            own.append(token)
            if action.nargs == "+":
                while tokens and _SEEDS.fullmatch(tokens[0]):
                    own.append(tokens.pop(0))
            elif action.nargs != 0 and "=" not in token and tokens:
                own.append(tokens.pop(0))
        elif token.startswith("-") and len(token) > 1:
            keys.append(token)
            if "=" not in token and tokens and not tokens[0].startswith("--") and tokens[0] not in parser.flags:
                keys.append(tokens.pop(0))
        else:
            own.append(token)
    return own, keys


def parse_names(words: list[str] | None) -> list[str] | None:
    """Names, one a word or separated by commas."""
    return None if words is None else [name for word in words for name in word.split(",") if name]


def parse_seeds(words: list[str]) -> list[int]:
    """`0..4` (both ends included), `0,1,2`, `[0, 1, 2]`, `7`, or several of these.

    Raises:
        UserError: anything else, or a seed given twice.
    """
    found: list[int] = []
    for word in ",".join(words).strip("[]").replace(" ", "").split(","):
        ends = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", word)
        if ends is None or int(ends[2] or ends[1]) < int(ends[1]):
            raise UserError(f"seeds: '{word}' is neither a number nor a range (valid: 0..4, or 0,1,2)")
        found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    if len(set(found)) < len(found):
        raise UserError(f"seeds: {','.join(map(str, found))} names a seed twice")
    return found
