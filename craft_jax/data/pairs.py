"""Pairs of text, as training and validation batches: a source to read and a target to write.

Pairs are made here, for three small tasks whose answers are known, or read from a file. Shapes: B
pairs of a batch, S places of a source, T of a target, N ids of all pairs.
"""

import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import random
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from craft_jax.data import tokenizers
from craft_jax.data.base import Batch, Dataset
from craft_jax.data.sources.documents import plain_name, shown
from craft_jax.data.sources.files import blocks, other_encoding
from craft_jax.data.tokenizers import END_TOKEN, Tokenizer
from craft_jax.errors import DataError

SUFFIXES = (".tsv", ".jsonl", ".tsv.gz", ".jsonl.gz")
_NUM_VAL = 1000


class Pair(NamedTuple):
    """A source and its target.

    Attributes:
      source, target: text.
      place: the line of its file, or its number, from 1; for messages.
    """

    source: str
    target: str
    place: int


class Pairs(NamedTuple):
    """Pairs of one origin.

    Attributes:
      name: what to call them in file names.
      origin: what stands before `place` in messages.
      train, val: the two splits.
    """

    name: str
    origin: str
    train: list[Pair]
    val: list[Pair]


# Made here.


def _a_date(rng: random.Random) -> tuple[str, str]:
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
"""From 1930 to 2029: a century, so that two digits name one year of it."""

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
    "dates": _a_date,
    "reverse": _reversed,
    "sort": _sorted,
}
"""Tasks whose pairs are made: dates to ISO 8601, words of 2 to 10 letters backwards or in order."""


def make(task: str, num_pairs: int) -> Pairs:
    """Returns pairs of a task, the same on every machine.

    Args:
      task: one of `TASKS`.
      num_pairs: pairs that train; some may be equal.

    Returns:
      The training pairs, and up to 1000 for validation, all different, none of whose sources is
      among those that train.
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
    """Whether a file's name is that of a file of pairs."""
    return path.lower().endswith(SUFFIXES)


def read(path: Path, field: str = "data.pairs") -> Pairs:
    """Reads a file of pairs, all as training pairs.

    Lines of `.tsv` are a source, a tab and a target; lines of `.jsonl` are objects with the fields
    `source` and `target`. Empty lines are skipped.

    Args:
      path: the file, also with `.gz` behind its name.
      field: the config field or flag that names it, for messages.

    Raises:
      DataError: it cannot be read, or a line of it; names the line.
    """
    if not has_pairs_name(path.name):
        raise DataError(
            f"{field}={shown(path)} is no file of pairs; its name must end in .tsv or .jsonl"
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
            raise DataError(f"{here} has an empty source; mend or remove it")
        pairs.append(pair)
    if not pairs:
        raise DataError(f"{field}: {shown(path)} holds no pair; write one in each line")
    return Pairs(plain_name(path), origin, pairs, [])


def _from_tabs(line: str, here: str) -> tuple[str, str]:
    parts = line.split("\t")
    if len(parts) != 2:
        raise DataError(
            f"{here} has {len(parts)} fields with tabs between them, not 2; write a source, a tab "
            "and a target"
        )
    return parts[0], parts[1]


def _from_json(line: str, here: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        words = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise DataError(f"{here} is not JSON: {words}; mend or remove it") from None
    if not isinstance(record, dict):
        raise DataError(f"{here} is not an object with the fields source and target; mend it")
    for name in ("source", "target"):
        if not isinstance(record.get(name), str):
            have = ", ".join(map(repr, record)) or "none"
            raise DataError(f"{here} has no text in the field {name!r} (its fields: {have})")
        try:
            record[name].encode()
        except UnicodeEncodeError:
            raise DataError(f"{here} has half a character in the field {name!r}") from None
    return record["source"], record["target"]


def split(pairs: Pairs, val_fraction: float) -> Pairs:
    """Moves the last part of pairs that train to those that validate.

    A pair of that part whose source also occurs before it stays, so that no source is in both.

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


# As ids.


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Rows of ids, one after another.

    Attributes:
      ids_N: all of them, int32.
      bounds: where each row begins, and the end of the last.
    """

    ids_N: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> "Sequences":
        """Lays rows one after another."""
        rows = list(rows)
        bounds = np.cumsum([0, *map(len, rows)])
        return cls(np.concatenate([np.zeros(0, np.int32), *rows]).astype(np.int32), bounds)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.ids_N[self.bounds[row] : self.bounds[row + 1]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairIds:
    """Pairs as ids, and how they stand in a batch.

    Attributes:
      sources, targets: of each pair, without end tokens.
      end_id: ends a source and a target, begins a target, and pads both.
      seq_len: S and T.
    """

    sources: Sequences
    targets: Sequences
    end_id: int
    seq_len: int

    def __len__(self) -> int:
        return len(self.sources)

    def batch(self, numbers: Sequence[int], batch_size: int) -> Batch:
        """Returns a batch of the pairs with these numbers, and rows that do not count after them.

        Returns:
          `source` int32 (B, S): the source and the end token; `source_mask` bool (B, S): true on
          these; `tokens` int32 (B, T): the end token and the target; `targets` int32 (B, T): the
          target and the end token; `weights` float32 (B, T): 1 on these. Everything else is
          padding: end tokens.
        """
        shape = (batch_size, self.seq_len)
        source, tokens, targets = (np.full(shape, self.end_id, np.int32) for _ in range(3))
        source_mask, weights = np.zeros(shape, bool), np.zeros(shape, np.float32)
        source_mask[:, 0] = True  # Attention needs something, also in a row that does not count.
        for row, number in enumerate(numbers):
            read, write = self.sources[number], self.targets[number]
            source[row, : len(read)] = read
            source_mask[row, : len(read) + 1] = True
            tokens[row, 1 : len(write) + 1] = write
            targets[row, : len(write)] = write
            weights[row, : len(write) + 1] = 1
        return {
            "source": source,
            "source_mask": source_mask,
            "tokens": tokens,
            "targets": targets,
            "weights": weights,
        }


class TrainingPairs(Dataset):
    """Shuffled pairs, epoch after epoch, without end; batch s is a pure function of (seed, s).

    Args:
      pairs: at least one.
      batch_size: B.
      seed: of the order.
    """

    def __init__(self, pairs: PairIds, *, batch_size: int, seed: int):
        self.pairs, self.batch_size, self._seed = pairs, batch_size, seed

    def __len__(self) -> int:
        return max(1, len(self.pairs) // self.batch_size)

    def batch(self, step: int) -> Batch:
        first, count = step * self.batch_size, len(self.pairs)
        numbers = [
            int(_epoch_order(self._seed, n // count, count)[n % count])
            for n in range(first, first + self.batch_size)
        ]
        return self.pairs.batch(numbers, self.batch_size)

    def one_pass(self) -> Dataset:
        data = ValidationPairs(self.pairs, batch_size=self.batch_size)
        data.tokenizer, data.vocab_size = self.tokenizer, self.vocab_size
        data.name, data.fingerprint = self.name, self.fingerprint
        return data


class ValidationPairs(Dataset):
    """All pairs once, in order; the last batch is filled up with rows of weight 0.

    Args:
      pairs: at least one.
      batch_size: B.
    """

    def __init__(self, pairs: PairIds, *, batch_size: int):
        self.pairs, self.batch_size = pairs, batch_size

    def __len__(self) -> int:
        return -(-len(self.pairs) // self.batch_size)

    def batch(self, step: int) -> Batch:
        first = step * self.batch_size
        last = min(first + self.batch_size, len(self.pairs))
        return self.pairs.batch(range(first, last), self.batch_size)


# From a config to datasets.


def open_pairs(
    name: str,
    *,
    num_pairs: int,
    val_fraction: float,
    tokenizer: str | Tokenizer,
    vocab_size: int,
    seq_len: int,
    batch_size: int,
    seed: int,
) -> tuple[TrainingPairs, ValidationPairs | None]:
    """Returns the training and validation batches of a task, or of a file.

    Args:
      name: one of `TASKS`, or the path of a file: see `read`.
      num_pairs: pairs that train, where they are made.
      val_fraction: the part of a file's pairs, at its end, that validates (see `split`); without
        any, nothing validates.
      tokenizer: `char` or `bpe`, made from the pairs, `byte`, a path, or a tokenizer.
      vocab_size: the size of the vocabulary to train; `bpe` only.
      seq_len: S and T.
      batch_size: B.
      seed: of the order.

    Raises:
      DataError: unreadable or unfit pairs, or a tokenizer without an end token.
    """
    if name in TASKS:
        pairs = make(name, num_pairs)
        pairs = pairs if val_fraction else pairs._replace(val=[])
    else:
        pairs = split(read(Path(name)), val_fraction)
    tokenizer = _with_end(_choose_tokenizer(tokenizer, pairs, vocab_size))
    digest = hashlib.sha256(tokenizer.digest.encode())
    splits = (pairs.train, pairs.val)
    for part in splits:
        digest.update(json.dumps([pair[:2] for pair in part]).encode())
    found = [_encode(part, pairs.origin, tokenizer, seq_len) for part in splits]
    train = TrainingPairs(found[0], batch_size=batch_size, seed=seed)
    val = ValidationPairs(found[1], batch_size=batch_size) if pairs.val else None
    for data in filter(None, (train, val)):
        data.tokenizer, data.vocab_size = tokenizer, tokenizer.vocab_size
        data.name, data.fingerprint = pairs.name, digest.hexdigest()
    return train, val


def from_file(
    path: Path, tokenizer: Tokenizer, *, field: str, seq_len: int, batch_size: int
) -> ValidationPairs:
    """Returns all pairs of a file as validation batches.

    Raises:
      DataError: see `open_pairs`; messages call the file that of `field`.
    """
    pairs = read(path, field)
    ids = _encode(pairs.train, pairs.origin, _with_end(tokenizer), seq_len)
    data = ValidationPairs(ids, batch_size=batch_size)
    data.tokenizer, data.vocab_size, data.name = tokenizer, tokenizer.vocab_size, pairs.name
    return data


# Of a few pairs, Grain's shuffle takes milliseconds each: it draws from 65,536 until one fits.
@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _choose_tokenizer(tokenizer: str | Tokenizer, pairs: Pairs, vocab_size: int) -> Tokenizer:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if tokenizer == "char":
        texts = _texts([*pairs.train, *pairs.val])
        return tokenizers.characters(set().union(*texts), end_token=True)
    if tokenizer == "bpe":
        return tokenizers.train_bpe(_texts(pairs.train), vocab_size)
    return tokenizers.open_fixed(tokenizer)


def _texts(pairs: Iterable[Pair]) -> Iterator[str]:
    return itertools.chain.from_iterable(pair[:2] for pair in pairs)


def _with_end(tokenizer: Tokenizer) -> Tokenizer:
    if tokenizer.end_id is None:
        raise DataError(
            f"data.tokenizer: this vocabulary has no end token, and pairs need one; add "
            f"{END_TOKEN!r} to it, or use data.tokenizer=char, byte or bpe"
        )
    return tokenizer


def _encode(pairs: Sequence[Pair], origin: str, tokenizer: Tokenizer, seq_len: int) -> PairIds:
    if tokenizer.unknown_characters("".join(set().union(*_texts(pairs)))):
        _name_unknown(pairs, origin, tokenizer)
    sides = {}
    for side in ("source", "target"):
        texts = [getattr(pair, side) for pair in pairs]
        sides[side] = Sequences.of(tokenizer.encode_batch(texts))
    lengths = {side: np.diff(rows.bounds) + 1 for side, rows in sides.items()}
    longest = max((int(found.max()) for found in lengths.values() if len(found)), default=0)
    for side, found in lengths.items():
        for row in np.flatnonzero(found > seq_len)[:1]:
            raise DataError(
                f"{origin} {pairs[row].place}: the {side} has {found[row]} tokens with its end "
                f"token, but data.seq_len={seq_len}; the longest has {longest}: use "
                f"--config.data.seq_len={longest} and as many model.max_seq_len, or leave long "
                "pairs out"
            )
    assert tokenizer.end_id is not None
    return PairIds(
        sources=sides["source"], targets=sides["target"], end_id=tokenizer.end_id, seq_len=seq_len
    )


def _name_unknown(pairs: Sequence[Pair], origin: str, tokenizer: Tokenizer) -> None:
    for pair in pairs:
        if unknown := tokenizer.unknown_characters(pair.source + pair.target):
            raise DataError(
                f"{origin} {pair.place}: the tokenizer does not know the character {unknown[0]!r} "
                f"(U+{ord(unknown[0]):04X}); leave the pair out, or train with data.tokenizer=byte "
                "or bpe"
            )
