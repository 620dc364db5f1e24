"""Pairs of text: generated for three small tasks with known answers, or read from a file."""

import datetime
import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from craft_jax.data.sources.decoding import blocks, other_encoding
from craft_jax.data.sources.documents import plain_name, shown
from craft_jax.errors import DataError

SUFFIXES = (".tsv", ".jsonl", ".tsv.gz", ".jsonl.gz")
_NUM_VAL = 1000


class Pair(NamedTuple):
    """A source and its target.

    Attributes:
      source, target: text.
      place: its line in the file, or its number, from 1; for messages.
    """

    source: str
    target: str
    place: int


class Pairs(NamedTuple):
    """Pairs of one origin.

    Attributes:
      name: what to call them in file names.
      origin: precedes `place` in messages.
      train, val: the two splits.
    """

    name: str
    origin: str
    train: list[Pair]
    val: list[Pair]


# Generated pairs.


def _date(rng: random.Random) -> tuple[str, str]:
    day = datetime.date(1930, 1, 1) + datetime.timedelta(days=rng.randrange(_DAYS))
    month = _MONTHS[day.month - 1]
    text = rng.choice(_DATE_FORMATS).format(
        d=day.day, m=day.month, y=day.year, yy=day.year % 100,
        month=month, mon=month[:3], Month=month.capitalize(), Mon=month[:3].capitalize(),
    )  # fmt: skip
    return text, day.isoformat()


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 10)))


def _reversed(rng: random.Random) -> tuple[str, str]:
    source = _letters(rng)
    return source, source[::-1]


def _sorted(rng: random.Random) -> tuple[str, str]:
    source = _letters(rng)
    return source, "".join(sorted(source))


_MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september",
    "october", "november", "december",
)  # fmt: skip
_DAYS = 36525
"""From 1930 to 2029: two digits name one year of this century."""

# With slashes the month comes first, with dots the day.
_DATE_FORMATS = (
    "{month} {d}, {y}",
    "{Month} {d}, {y}",
    "{Mon} {d}, {y}",
    "{d} {Month} {y}",
    "{d} {mon} {y}",
    "{d} {Mon} {y}",
    "{m:02}/{d:02}/{yy:02}",
    "{m}/{d}/{y}",
    "{d:02}.{m:02}.{yy:02}",
    "{d}.{m}.{y}",
)
TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "dates": _date,
    "reverse": _reversed,
    "sort": _sorted,
}
"""Generated tasks: dates to ISO 8601; words of 2 to 10 letters reversed, or with sorted letters."""


def generate(task: str, num_pairs: int) -> Pairs:
    """Returns pairs of a task, the same on every machine.

    Args:
      task: one of `TASKS`.
      num_pairs: training pairs; some may be equal.

    Returns:
      The training pairs, and up to 1000 distinct validation pairs with other sources.
    """
    draw, rng = TASKS[task], random.Random(task)
    held_out: dict[str, str] = {}
    while len(held_out) < min(_NUM_VAL, num_pairs):
        source, target = draw(rng)
        held_out[source] = target
    train: list[Pair] = []
    while len(train) < num_pairs:
        source, target = draw(rng)
        if source not in held_out:
            train.append(Pair(source, target, len(train) + 1))
    val = [Pair(source, target, n) for n, (source, target) in enumerate(held_out.items(), start=1)]
    return Pairs(task, f"data.pairs={task}, pair", train, val)


# From files.


def has_pairs_name(path: str) -> bool:
    """Returns whether a path has a suffix of a file of pairs."""
    return path.lower().endswith(SUFFIXES)


def read(path: Path, field: str = "data.pairs") -> Pairs:
    """Reads a file of pairs, all as training pairs.

    Lines of `.tsv` are a source, a tab and a target; lines of `.jsonl` are objects with the fields
    `source` and `target`. Empty lines are skipped.

    Args:
      path: the file; may be gzipped, with the suffix `.gz`.
      field: the config field or flag that names it, for messages.

    Raises:
      DataError: the file, or a line of it, cannot be read.
    """
    if not has_pairs_name(path.name):
        raise DataError(
            f"{field}={shown(path)} is not a file of pairs; its name must end in .tsv or .jsonl"
        )
    parse = _from_json if ".jsonl" in path.name.lower() else _from_tabs
    content = b"".join(blocks(path, field))
    if encoding := other_encoding(content):
        raise DataError(
            f"{field}: {shown(path)} is {encoding} text; convert it to UTF-8 (iconv -f {encoding} "
            "-t utf-8)"
        )
    origin = f"{field}: {shown(path)} line"
    pairs: list[Pair] = []
    for place, raw in enumerate(content.split(b"\n"), start=1):
        here = f"{origin} {place}"
        try:
            line = raw.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise DataError(
                f"{here} is not UTF-8 text: byte 0x{byte:02x}; convert the file (iconv -f ... -t "
                "utf-8)"
            ) from None
        line = line.removeprefix("\ufeff") if place == 1 else line
        if not line.strip():
            continue
        pair = Pair(*parse(line, here), place)
        if not pair.source:
            raise DataError(f"{here} has an empty source; fill it in or remove the line")
        pairs.append(pair)
    if not pairs:
        raise DataError(f"{field}: {shown(path)} contains no pairs; write one in each line")
    return Pairs(plain_name(path), origin, pairs, [])


def _from_tabs(line: str, here: str) -> tuple[str, str]:
    parts = line.split("\t")
    if len(parts) != 2:
        raise DataError(
            f"{here} has {len(parts)} fields separated by tabs, not 2; write a source, a tab "
            "and a target"
        )
    return parts[0], parts[1]


def _from_json(line: str, here: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        words = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise DataError(f"{here} is not JSON: {words}; correct or remove it") from None
    if not isinstance(record, dict):
        raise DataError(f"{here} is not an object with the fields source and target; correct it")
    for name in ("source", "target"):
        if not isinstance(record.get(name), str):
            have = ", ".join(map(repr, record)) or "none"
            raise DataError(f"{here} has no text in the field {name!r}; its fields: {have}")
        try:
            record[name].encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{here} has an unpaired surrogate in the field {name!r}; remove it"
            ) from None
    return record["source"], record["target"]


def split(pairs: Pairs, val_fraction: float) -> Pairs:
    """Moves the last training pairs to the validation split.

    Pairs whose source also occurs before the cut stay, so that no source is in both splits.

    Raises:
      DataError: one of the splits would be empty.
    """
    rows = pairs.train
    if val_fraction == 0:
        return pairs
    cut = min(int(len(rows) * (1 - val_fraction)), len(rows) - 1)
    known = {pair.source for pair in rows[:cut]}
    train = [p for p in rows if p.source in known]
    val = [p for p in rows[cut:] if p.source not in known]
    for name, part in (("training", train), ("validation", val)):
        if not part:
            raise DataError(
                f"{pairs.origin.removesuffix(' line')}: data.val_fraction={val_fraction} leaves no "
                f"{name} pair of {len(rows)} with a source of its own; use more pairs, another "
                "data.val_fraction, or 0"
            )
    return pairs._replace(train=train, val=val)
