"""Every way in which a conversion can be refused, each with the exit code it ends a command with.

A message names the value, the place and the remedy; `details` has the same as data.
"""

import difflib
import re
from collections.abc import Collection, Iterable
from typing import Any

from craft_jax import errors
from craft_jax.errors import CraftError

_MAX_NAMED = 10


class InteropError(CraftError):
    """Base of all refusals.

    Attributes:
      details: what the message says, as plain data.
    """

    exit_code = errors.BAD_DATA

    def __init__(self, message: str, **details: Any):
        super().__init__(message)
        self.details = details


class MissingKeysError(InteropError):
    """Tensors that the architecture needs are not there."""


class UnexpectedKeysError(InteropError):
    """Tensors are there that the architecture has no place for."""


class ShapeMismatchError(InteropError):
    """A tensor has another shape than its place."""


class DtypeError(InteropError):
    """A tensor has a dtype that cannot be kept without being asked to."""


class CollidingKeysError(InteropError):
    """Two tensors claim the same place."""


class TiedWeightsError(InteropError):
    """The config says that two tensors are one, and their values differ."""


class AmbiguousSourceError(InteropError):
    """A folder holds several sets of weights that are not the same."""


class CorruptFileError(InteropError):
    """A file is damaged, truncated, or not what its name says."""


class UncommittedCheckpointError(InteropError):
    """A checkpoint was never finished, or is not one of craft_jax."""


class UnsafePickleError(InteropError):
    """A pickle asks for code that is not on the list of harmless names."""

    exit_code = errors.UNSAFE_INPUT


class NotRepresentableError(InteropError):
    """The target cannot hold this model without changing its numbers."""

    exit_code = errors.BAD_CONFIG


class UnknownArchitectureError(InteropError):
    """The source is a model, or has a setting, that craft_jax does not have."""

    exit_code = errors.BAD_CONFIG


class OutputExistsError(InteropError):
    """The output is there already, or its place cannot be written."""

    exit_code = errors.OUTPUT_EXISTS


class DiskSpaceError(InteropError):
    """The output could not be written: the disk is full, or the file too large for it."""

    exit_code = errors.STORAGE


class ParityError(InteropError):
    """A verification failed: the two models are not the same."""

    exit_code = errors.FAILED_CHECK


class MissingDependencyError(InteropError):
    """An optional package is needed for this, and is not installed."""

    exit_code = errors.USAGE


def listed(names: Iterable[str], separator: str = ", ") -> str:
    """Returns the first ten of what `collapsed` makes of `names`, and how many more there are."""
    rows = collapsed(names)
    more = f" and {len(rows) - _MAX_NAMED} more" if len(rows) > _MAX_NAMED else ""
    return separator.join(rows[:_MAX_NAMED]) + more


def collapsed(names: Iterable[str]) -> list[str]:
    """Returns names with those that differ in one layer number only as one: `h.{0..11}.ln_1.bias`.

    Numbers of a group that are not consecutive are listed: `h.{0,2}.ln_1.bias`.
    """
    groups: dict[str, list[int]] = {}
    for name in names:
        found = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = f"{name[: found.start()]}\0{name[found.end() :]}" if found else name
        groups.setdefault(pattern, []).append(int(found.group()) if found else -1)
    rows = []
    for pattern, numbers in groups.items():
        low, high = min(numbers), max(numbers)
        if low == high:
            inside = str(low)
        elif sorted(numbers) == list(range(low, high + 1)):
            inside = f"{{{low}..{high}}}"
        else:
            inside = "{" + ",".join(map(str, sorted(numbers))) + "}"
        rows.append(pattern.replace("\0", inside))
    return rows


def nearest(name: str, present: Collection[str]) -> str:
    """Returns ` (did you mean x?)` for the most similar name that is there, or nothing."""
    close = difflib.get_close_matches(name, present, n=1, cutoff=0.75)
    return f" (nearest present: {close[0]})" if close else ""
