"""Errors that a user can mend; the command line turns each into one line per fault and an exit code."""


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
