"""The console script `clplat`: finds the command, and turns errors into one line per fault and an exit code.

Exit codes: 0 done; 1 the run failed (a loss that is no longer finite, a full disk); 2 the user's mistake; 3 data or
weights missing; 130 interrupted, and resumable.
"""

from __future__ import annotations

import importlib
import os
import sys

from clplat.commands import COMMANDS
from clplat.errors import ClplatError, CodeError, UserError
from clplat.package import __version__


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except ClplatError as error:
        if debug:
            raise
        for fault in error.faults:
            more = " (--debug shows the traceback)" if isinstance(error, CodeError) else ""
            print(f"clplat: {fault}{more}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("clplat: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has gone: nothing more can be said, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug:
            raise
        print(f"clplat: {error} (--debug shows where)", file=sys.stderr)
        return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"clplat {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, n=2, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"commands: {', '.join(COMMANDS)}"
        raise UserError(f"unknown command '{command}' ({hint})")
    from clplat.commands.arguments import parse

    module = importlib.import_module(f"clplat.commands.{command}")
    parsed = parse(command, COMMANDS[command], module, rest)
    return 0 if parsed is None else int(module.main(parsed))


def _help() -> str:
    lines = [
        "usage: clplat COMMAND [...]",
        "",
        "Continual learning, unlearning, test-time adaptation and warm-started RL.",
    ]
    lines += ["", "commands:", *(f"  {name:<12}{text}" for name, text in COMMANDS.items())]
    lines += ["", "`clplat COMMAND --help` says more; --debug shows the traceback of an error; --version."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
