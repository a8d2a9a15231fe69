"""`clplat completion`: a completion script for the shell."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from clplat.commands import COMMANDS
from clplat.commands.arguments import Parser, parser_for
from clplat.config import discovery
from clplat.config.resolve import PARTS, SECTIONS, experiments, section_options

SHELLS = ("bash", "zsh")


def configure(parser: Parser) -> None:
    parser.description = 'Print a completion script: `eval "$(clplat completion bash)"`.'
    parser.add_argument("shell", choices=SHELLS, help="bash or zsh")


def main(args: argparse.Namespace) -> int:
    import shtab

    configs: Any = {shell: text % _names() for shell, text in _CONFIGS.items()}  # shtab's annotation says str
    print(shtab.complete(_whole_parser(), args.shell, preamble=configs))
    return 0


# A configuration is a shipped experiment or a file.
_CONFIGS = {
    "bash": """_clplat_configs() { compgen -W "%s" -- "$1"; compgen -f -- "$1"; }""",
    "zsh": """_clplat_configs() { compadd -- %s; _files; }""",
}


def _names() -> str:
    return " ".join(experiments())


def _whole_parser() -> argparse.ArgumentParser:
    """One argparse parser of all commands and general keys, for shtab to read; nothing parses with it."""
    top = argparse.ArgumentParser(prog="clplat")
    commands = top.add_subparsers()
    for command, text in COMMANDS.items():
        module = importlib.import_module(f"clplat.commands.{command}")
        own = parser_for(command, text, module)
        if getattr(module, "TAKES_KEYS", False):
            _add_keys(own)
        for action in own._actions:
            _complete(command, action)
        commands.add_parser(command, help=text, parents=[own], add_help=False)
    return top


def _add_keys(parser: Parser) -> None:
    for key, group in PARTS.items():
        parser.add_argument(f"--{key}", choices=list(discovery.entries(group)))
    for key, group in PARTS.items():
        known = {o.name: o for e in discovery.entries(group).values() if not e.fault for o in discovery.options(e)}
        for name, option in known.items():
            parser.add_argument(f"--{key}.{name}", help=option.help.replace("%", "%%"))
    for section in (None, *SECTIONS):
        for option in section_options(section):
            flag = f"--{section}.{option.name}" if section else f"--{option.name}"
            if flag not in parser.flags:
                parser.add_argument(flag, help=option.help.replace("%", "%%"))  # argparse formats it


def _complete(command: str, action: argparse.Action) -> None:
    """Names where an argument takes one, files or folders where it takes a path."""
    import shtab

    if action.dest == "group":
        from clplat.commands.list import GROUPS

        action.choices = list(GROUPS)
    elif command == "cp" and action.dest == "name":
        action.choices = list(experiments())
    elif action.dest == "part":
        action.choices = sorted({n for g in discovery.ROOTS for n in discovery.entries(g)})
    elif action.dest == "config":
        action.complete = dict.fromkeys(SHELLS, "_clplat_configs")  # type: ignore[attr-defined]
    elif action.dest == "dest":
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    elif action.dest in ("resume", "run_dirs", "output"):
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
