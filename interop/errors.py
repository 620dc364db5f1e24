"""Errors of conversions, each with the exit code of a command that it ends.

A message names the value, the place and the remedy; `details` has the same as data. Options are
named by their field, in backticks; `interop/__main__` prints the flag instead.
"""

import difflib
import re
from collections.abc import Collection, Iterable
from typing import Any

from craft_jax import errors
from craft_jax.errors import CraftError

_MAX_NAMED = 10


class InteropError(CraftError):
    """Base of all errors of conversions.

    Attributes:
      details: the content of the message, as plain data.
    """

    exit_code = errors.BAD_DATA

    def __init__(self, message: str, **details: Any):
        super().__init__(message)
        self.details = details


class MissingKeysError(InteropError):
    """Tensors that the architecture needs are missing."""


class UnexpectedKeysError(InteropError):
    """Tensors are present that the architecture does not have."""


class ShapeMismatchError(InteropError):
    """A tensor has another shape than the architecture."""


class DtypeError(InteropError):
    """A tensor has a dtype that is not kept by default."""


class CollidingKeysError(InteropError):
    """Two tensors have the same name after cleaning."""


class TiedWeightsError(InteropError):
    """Two tensors that the config ties have different values."""


class AmbiguousSourceError(InteropError):
    """A source holds several sets of weights that differ."""


class CorruptFileError(InteropError):
    """A file is damaged, truncated, or not what its name says."""


class UncommittedCheckpointError(InteropError):
    """A checkpoint was not finished, or is not one of craft_jax."""


class UnsafePickleError(InteropError):
    """A pickle asks for code that is not on the list of harmless names."""

    exit_code = errors.UNSAFE_INPUT


class NotRepresentableError(InteropError):
    """The target cannot hold this model without changing its numbers."""

    exit_code = errors.BAD_CONFIG


class UnknownArchitectureError(InteropError):
    """The source is a model, or has a setting, that craft_jax lacks."""

    exit_code = errors.BAD_CONFIG


class OutputExistsError(InteropError):
    """The output exists, or its folder cannot be written."""

    exit_code = errors.OUTPUT_EXISTS


class DiskSpaceError(InteropError):
    """The output could not be written: the disk is full, or the file is too large for it."""

    exit_code = errors.STORAGE


class ParityError(InteropError):
    """A verification failed: the two models are not the same."""

    exit_code = errors.FAILED_CHECK


class MissingDependencyError(InteropError):
    """An optional package is needed and not installed."""

    exit_code = errors.USAGE


def listed(names: Iterable[str], separator: str = ", ") -> str:
    """Returns the first ten rows of `collapsed`, and the number of further rows."""
    rows = collapsed(names)
    more = f" and {len(rows) - _MAX_NAMED} more" if len(rows) > _MAX_NAMED else ""
    return separator.join(rows[:_MAX_NAMED]) + more


def collapsed(names: Iterable[str]) -> list[str]:
    """Joins names that differ in the layer number only: `h.{0..11}.ln_1.bias`.

    Numbers that are not consecutive are listed: `h.{0,2}.ln_1.bias`.
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
    """Returns ` (nearest present: x)` for the most similar name, or an empty text."""
    close = difflib.get_close_matches(name, present, n=1, cutoff=0.75)
    return f" (nearest present: {close[0]})" if close else ""
