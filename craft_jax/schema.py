"""Settings of config dataclasses: help text, bounds, and their check.

Every section of a config (`GPTConfig`, `OptimConfig`, ...) is a frozen, keyword-only dataclass that
is beside the code that reads it. `setting` declares a field. A section whose fields can exclude
each other is `HasContradictions`.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

MAX_WIDTH = 2**20
MAX_LAYERS = 1000
MAX_POSITIONS = 2**24
MAX_VOCAB = 2**26
"""Sizes of a model beyond these are mistakes, and would be noticed only by hours of work."""

_MAX_INT = 2**31 - 1


class Contradiction(NamedTuple):
    """Values that are possible alone but not together.

    Attributes:
      fields: the full names of the fields involved, such as `model.num_heads`.
      message: one line with values and remedy.
    """

    fields: tuple[str, ...]
    message: str


@runtime_checkable
class HasContradictions(Protocol):
    """A section whose fields can exclude each other."""

    def contradictions(self) -> Iterator[Contradiction]:
        """Yields what is wrong between fields."""


def values(section: Any) -> dict[str, Any]:
    """Returns the values of a section by field; sections inside stay what they are."""
    return {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}


def defaults(cls: type) -> dict[str, Any]:
    """Returns the fields of a dataclass that have a default value, and it."""
    fields = dataclasses.fields(cls)
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    resumable: bool = False,
    keeps_vocabulary: bool = False,
) -> Any:
    """Declares a field of a config dataclass.

    Args:
      default: the default value.
      help: one line for docs/configuration.md, with the unit where there is one.
      minimum, maximum: inclusive bounds.
      above, below: exclusive bounds.
      resumable: whether a run may be resumed with another value.
      keeps_vocabulary: of a field of `data`: whether it decides the vocabulary, so that it may not
        change with `data.allow_change` either.
    """
    bounds = {"minimum": minimum, "maximum": maximum, "above": above, "below": below}
    metadata = {k: v for k, v in bounds.items() if v is not None}
    facts = {"help": help, "resumable": resumable, "keeps_vocabulary": keeps_vocabulary}
    return dataclasses.field(default=default, metadata=facts | metadata)


def out_of_bounds(section: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yields (full field name, one-line problem) for each impossible value of one section."""
    for field in dataclasses.fields(section):
        full_name, value = f"{name}.{field.name}", getattr(section, field.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            yield full_name, f"{full_name}={value} is not finite; the default is {field.default}"
        elif demands := _broken_bounds(value, field.metadata):
            words = " and ".join(demands)
            value = _short(value)
            yield full_name, f"{full_name}={value} must be {words}; the default is {field.default}"


def _short(value: float) -> str:
    if isinstance(value, int) and value.bit_length() > 10_000:  # `str` would refuse.
        return f"(about 10**{round(value.bit_length() * math.log10(2))})"
    text = str(value)
    return text if len(text) <= 24 else f"{text[:8]}... ({len(text)} digits)"


def _broken_bounds(value: float, bounds: Any) -> list[str]:
    if isinstance(value, int):
        bounds = {"maximum": _MAX_INT} | dict(bounds)
    rules = [
        ("minimum", "at least", value.__ge__),
        ("maximum", "at most", value.__le__),
        ("above", "greater than", value.__gt__),
        ("below", "less than", value.__lt__),
    ]
    return [
        f"{words} {bounds[rule]}"
        for rule, words, holds in rules
        if rule in bounds and holds(type(value)(bounds[rule])) is not True
    ]


def repaired(section: Any, name: str, known_bad: Collection[str]) -> Any:
    """Returns a section whose bad fields have their defaults, so that the others can be checked."""
    fields = [
        field
        for field in dataclasses.fields(section)
        if f"{name}.{field.name}" in known_bad and field.default is not dataclasses.MISSING
    ]
    return dataclasses.replace(section, **{field.name: field.default for field in fields})


def contradictions(section: Any, known_bad: Collection[str] = ()) -> list[str]:
    """Returns the messages of a section's contradictions, without those that involve `known_bad`.

    A contradiction is only worth naming when each value that takes part in it is possible.
    """
    if not isinstance(section, HasContradictions):
        return []
    return [c.message for c in section.contradictions() if not set(c.fields) & set(known_bad)]


def problems(section: Any, name: str) -> list[str]:
    """Returns one line per mistake in one section; empty if it is usable."""
    bad = dict(out_of_bounds(section, name))
    return [*bad.values(), *contradictions(repaired(section, name, bad), bad)]
