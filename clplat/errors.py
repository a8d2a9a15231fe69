"""Errors that a user can mend; the command line turns each into one line per fault and an exit code."""

from __future__ import annotations

import functools
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class ClplatError(Exception):
    """Base of all errors raised on purpose.

    Args:
        faults: one line each, naming the key, the value and what would be valid.
    """

    exit_code = 1

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class UserError(ClplatError):
    """The user's mistake: a wrong key, name, type, range or state."""

    exit_code = 2


class CodeError(UserError):
    """The user's own code failed: names the hook, the file and the line."""

    @classmethod
    def of(cls, error: BaseException, what: str = "") -> CodeError | None:
        """What is to be said of `error`; None where it did not come up in code of the user's.

        Args:
            what: of the configuration the code belongs to, `strategy: `, say.
        """
        if isinstance(error, SyntaxError) and error.filename and is_users(error.filename):
            return cls(f"{what}{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}")
        frames = [(f, line) for f, line in traceback.walk_tb(error.__traceback__) if is_users(_file(f))]
        if not frames:
            return None
        hook, (frame, line) = frames[0][0].f_code.co_qualname, frames[-1]
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        inside = f"in {hook}, " if hook != "<module>" else ""
        return cls(f"{what}{inside}{frame.f_code.co_filename}, line {line}: {text}")


class MissingError(ClplatError):
    """Data or weights are not there; the message says what to put where."""

    exit_code = 3


class Interrupted(ClplatError):
    """Stopped by Ctrl-C or SIGTERM after a checkpoint: the run can be resumed."""

    exit_code = 130


class DivergedError(ClplatError):
    """The loss, or what is predicted, is no longer finite; the last good checkpoint is kept."""

    exit_code = 1


class OutOfMemory(ClplatError):
    """The device or the machine has no memory left for a step or an evaluation; the run can be resumed."""

    exit_code = 1


def is_users(file: str) -> bool:
    """Whether code of `file` is the user's: neither Python's, nor an installed package's, nor the platform's.

    Strategies and streams of a checkout count as the user's, who may put files there.
    """
    if file.startswith(("<frozen ", *_places())) or "/site-packages/" in file or "/dist-packages/" in file:
        return False
    home = str(Path(__file__).parent) + "/"
    return not file.startswith(home) or file.removeprefix(home).partition("/")[0] in ("strategies", "streams")


@contextmanager
def users_code(what: str = "") -> Iterator[None]:
    """What fails in code of the user's within this becomes a `CodeError`, from the error itself.

    Args:
        what: as in `CodeError.of`.
    """
    try:
        yield
    except ClplatError:
        raise
    except Exception as error:
        if (said := CodeError.of(error, what)) is None:
            raise
        raise said from error


def _file(frame: FrameType) -> str:
    """Where the code of a frame is written; of code made at run time (as of a dataclass) the file of its module."""
    file = frame.f_code.co_filename
    return frame.f_globals.get("__file__", file) if file == "<string>" else file


@functools.cache
def _places() -> tuple[str, ...]:
    """Folders of the standard library and of installed packages."""
    paths = sysconfig.get_paths()
    return tuple({str(Path(paths[k])) + "/" for k in ("stdlib", "platstdlib", "purelib", "platlib")})
