"""Values of a config: from Python or from the command line to the type of a field, or why not."""

import dataclasses
import types
import typing
import unicodedata
from typing import Any, Literal

from craft_jax.messages import shown, suggest


def types_of(cls: type) -> dict[str, Any]:
    """Returns the type of each field of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def coerce(value: Any, kind: Any) -> Any:
    """Returns a Python value as the type of a field; integers serve as floats.

    Raises:
      ValueError: it is of another type; the message completes `field=value ...`.
    """
    options = _options(kind)
    if value is None:
        if type(None) in options:
            return None
        raise ValueError(f"is not {_in_words(kind)}")
    for option in options:
        if typing.get_origin(option) is Literal:
            if isinstance(value, str) and value in typing.get_args(option):
                return value
            choices = typing.get_args(option)
            hint = suggest(shown(value).strip("'"), choices)
            raise ValueError(f"is not one of {', '.join(choices)}{hint}")
        if typing.get_origin(option) is tuple:
            if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
                for part in value:
                    _check_text(part)
                return tuple(value)
        elif option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                raise ValueError("is too large for a number") from None
        elif (option is int and isinstance(value, int) and not isinstance(value, bool)) or (
            option in (bool, str) and isinstance(value, option)
        ):
            if isinstance(value, str):
                _check_text(value)
            return value
    raise ValueError(f"is not {_in_words(kind)}")


def parse(text: str, kind: Any) -> Any:
    """Returns the text of a command-line override as the type of a field.

    `none` (or nothing) means None, commas separate the entries of a list.

    Raises:
      ValueError: it cannot be read so; the message completes `field=value ...`.
    """
    options = _options(kind)
    lowered = text.strip().lower()
    if type(None) in options and lowered in ("none", "null", ""):
        return None
    for option in options:
        try:
            if typing.get_origin(option) is tuple:
                inner = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
                parts = (part.strip() for part in inner.split(","))
                return coerce(tuple(part for part in parts if part), option)
            if option is bool and lowered in _BOOLEANS:
                return _BOOLEANS[lowered]
            if option is int:
                return int(text)
            if option is float:
                return float(text)
            if option is str:
                return coerce(text, str)
        except ValueError:
            if option not in (int, float):
                raise
    try:
        return coerce(text, kind)
    except ValueError as error:
        if text == "true":
            raise ValueError(f"{error}; a flag without a value means true") from None
        raise


_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _check_text(text: str) -> None:
    """Checks that a text can be stored, and shown in one line.

    Raises:
      ValueError: it cannot.
    """
    for kind, what in (("Cs", "is not valid UTF-8"), ("Cc", "has a control character")):
        if any(unicodedata.category(letter) == kind for letter in text):
            raise ValueError(what)


def _options(kind: Any) -> tuple:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _in_words(kind: Any) -> str:
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        type(None): "none",
    }
    return " or ".join(words.get(option, "a list of texts") for option in _options(kind))
