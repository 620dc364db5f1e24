"""Text of messages: values cut to size, hints for misspelt names, options as flags."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any


def one_line(text: str) -> str:
    """Returns a text without line breaks."""
    return " ".join(text.split())


def shorten(text: str) -> str:
    """Returns the beginning of a text that is too long for a message."""
    return text if len(text) <= 200 else f"{text[:160]}... ({len(text)} characters)"


def shown(value: Any) -> str:
    """Returns a value as a message shows it."""
    try:
        return shorten(repr(value))
    except ValueError:  # Python writes no integer of more than some thousand digits.
        return f"(a {type(value).__name__} of too many digits)"


def nearest(name: str, choices: Collection[str]) -> str | None:
    """Returns the choice that is spelt most like a name; None if none is close."""
    return next(iter(difflib.get_close_matches(name, choices, n=1)), None)


def suggest(name: str, choices: Collection[str]) -> str:
    """Returns `; did you mean 'x'?` for the nearest choice, or an empty text."""
    close = nearest(name, choices)
    return f"; did you mean {close!r}?" if close else ""


def with_flags(message: str, options: Iterable[str], spell: Callable[[str], str] = str) -> str:
    """Replaces the options that a message names in backticks by flags.

    `` `seed=-1` must be ... `` becomes `--seed=-1 must be ...`.

    Args:
      message: of the library, which speaks of fields.
      options: the names of options, as regular expressions.
      spell: returns the spelling of an option's flag, without its dashes.
    """
    pattern = rf"`({'|'.join(options)})(=[^`]*)?`"
    return re.sub(pattern, lambda match: f"--{spell(match[1])}{match[2] or ''}", message)
