"""Every error that a user can cause or meet, each with the exit code it ends a command with.

An error message names the value, the place and the remedy on one line. `main` prints it without a
traceback and exits with `exit_code`; library callers catch the class.
"""

from collections.abc import Sequence

OK = 0
USAGE = 2
BAD_DATA = 65
RUN_IN_USE = 69
FAILED_CHECK = 70
OUTPUT_EXISTS = 73
STORAGE = 74
PREEMPTED = 75
STALLED = 76
UNSAFE_INPUT = 77
BAD_CONFIG = 78
INTERRUPTED = 130
KILLED = 143


class CraftError(Exception):
    """Base of all errors that are answers to a user rather than defects of the program."""

    exit_code = 1


class UsageError(CraftError):
    """The command line itself is wrong."""

    exit_code = USAGE


class ConfigError(CraftError):
    """One or more config values are wrong, or at odds with each other or with a saved run.

    Attributes:
      problems: one line per mistake.
    """

    exit_code = BAD_CONFIG

    def __init__(self, problems: Sequence[str] | str):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(f"config error: {problem}" for problem in self.problems))


class DataError(CraftError):
    """Input data is missing, unreadable, corrupt, or disagrees with itself."""

    exit_code = BAD_DATA


class RunInUseError(CraftError):
    """Another process trains in this run folder."""

    exit_code = RUN_IN_USE


class DivergedError(CraftError):
    """Training produced non-finite numbers that skipping updates did not cure."""

    exit_code = FAILED_CHECK


class OutputError(CraftError):
    """An output exists already, or its place cannot be created."""

    exit_code = OUTPUT_EXISTS


class StorageError(CraftError):
    """Reading or writing failed: the disk is full, or no checkpoint loads."""

    exit_code = STORAGE


class LostPeerError(CraftError):
    """Another process of the same run is gone, or was never found; a restart may cure it."""

    exit_code = STALLED


def exit_code_of(error: BaseException) -> int:
    """Returns the exit code of a command that an error ends."""
    if isinstance(error, OSError):
        return STORAGE
    return getattr(error, "exit_code", INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1)


class StoppedError(BaseException):
    """A signal asked the program to end while there was nothing to save.

    Not an Exception: raised at any place, it must pass those who handle all errors of a library.
    """

    def __init__(self, message: str, exit_code: int):
        self.exit_code = exit_code
        super().__init__(message)
