"""Pairs of text as training and validation batches: a source to read and a target to write.

Shapes: B pairs of a batch, S tokens of a source, T of a target, N ids of all pairs.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from craft_jax.data import tokenizers
from craft_jax.data.base import Batch, Dataset, DatasetInfo
from craft_jax.data.pair_sources import TASKS, Pair, Pairs, generate, read, split
from craft_jax.data.tokenizers import END_TOKEN, Tokenizer
from craft_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Concatenated rows of ids.

    Attributes:
      ids_N: all ids, int32.
      bounds: start of each row, and end of the last.
    """

    ids_N: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> "Sequences":
        """Concatenates rows."""
        rows = list(rows)
        bounds = np.cumsum([0, *map(len, rows)])
        return cls(np.concatenate([np.zeros(0, np.int32), *rows]).astype(np.int32), bounds)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.ids_N[self.bounds[row] : self.bounds[row + 1]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairIds:
    """Pairs as ids.

    Attributes:
      sources, targets: of each pair, without end tokens.
      end_id: ends sources and targets, begins targets, and pads both.
      seq_len: S and T.
    """

    sources: Sequences
    targets: Sequences
    end_id: int
    seq_len: int

    def __len__(self) -> int:
        return len(self.sources)

    def batch(self, numbers: Sequence[int], batch_size: int) -> Batch:
        """Returns a batch of the pairs with these numbers, filled up with rows of weight 0.

        Returns:
          `source` int32 (B, S): the source and the end token; `source_mask` bool (B, S): true on
          these; `tokens` int32 (B, T): the end token and the target; `targets` int32 (B, T): the
          target and the end token; `weights` float32 (B, T): 1 on these. Padding is end tokens.
        """
        shape = (batch_size, self.seq_len)
        source, tokens, targets = (np.full(shape, self.end_id, np.int32) for _ in range(3))
        source_mask, weights = np.zeros(shape, bool), np.zeros(shape, np.float32)
        source_mask[:, 0] = True  # Attention needs a key, also in a row of weight 0.
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
      info: see `Dataset`.
    """

    def __init__(
        self, pairs: PairIds, *, batch_size: int, seed: int, info: DatasetInfo | None = None
    ):
        super().__init__(info)
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
        info = DatasetInfo.of(self)
        return ValidationPairs(self.pairs, batch_size=self.batch_size, info=info)


class ValidationPairs(Dataset):
    """All pairs once, in order; rows of weight 0 fill up the last batch.

    Args:
      pairs: at least one.
      batch_size: B.
      info: see `Dataset`.
    """

    def __init__(self, pairs: PairIds, *, batch_size: int, info: DatasetInfo | None = None):
        super().__init__(info)
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
      name: one of `TASKS`, or the path of a file: see `pair_sources.read`.
      num_pairs: training pairs to generate; tasks only.
      val_fraction: the fraction of a file's pairs, at its end, to hold out (see
        `pair_sources.split`); 0 for no validation split.
      tokenizer: `char` or `bpe`, trained on the pairs; `byte`, a path, or a tokenizer.
      vocab_size: of the vocabulary to train; `bpe` only.
      seq_len: S and T.
      batch_size: B.
      seed: of the order.

    Raises:
      DataError: pairs that cannot be read or encoded, or a tokenizer without an end token.
    """
    if name in TASKS:
        pairs = generate(name, num_pairs)
        pairs = pairs if val_fraction else pairs._replace(val=[])
    else:
        pairs = split(read(Path(name)), val_fraction)
    tokenizer = _with_end(_choose_tokenizer(tokenizer, pairs, vocab_size))
    digest = hashlib.sha256(tokenizer.digest.encode())
    splits = (pairs.train, pairs.val)
    for part in splits:
        digest.update(json.dumps([pair[:2] for pair in part]).encode())
    info = _info(pairs, tokenizer, digest.hexdigest())
    ids = [_encode(part, pairs.origin, tokenizer, seq_len) for part in splits]
    train = TrainingPairs(ids[0], batch_size=batch_size, seed=seed, info=info)
    val = ValidationPairs(ids[1], batch_size=batch_size, info=info) if pairs.val else None
    return train, val


def from_file(
    path: Path, tokenizer: Tokenizer, *, field: str, seq_len: int, batch_size: int
) -> ValidationPairs:
    """Returns all pairs of a file as validation batches.

    Raises:
      DataError: see `open_pairs`; messages name the file as `field`.
    """
    pairs = read(path, field)
    ids = _encode(pairs.train, pairs.origin, _with_end(tokenizer), seq_len)
    return ValidationPairs(ids, batch_size=batch_size, info=_info(pairs, tokenizer))


def _info(pairs: Pairs, tokenizer: Tokenizer, fingerprint: str = "") -> DatasetInfo:
    return DatasetInfo(
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        name=pairs.name,
        fingerprint=fingerprint,
    )


# For few pairs Grain's shuffle takes milliseconds each: it draws from 65,536 until one fits.
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
            f"data.tokenizer: this vocabulary has no end token, which pairs need; add "
            f"{END_TOKEN!r} to it, or use data.tokenizer=char, byte or bpe"
        )
    return tokenizer


def _encode(pairs: Sequence[Pair], origin: str, tokenizer: Tokenizer, seq_len: int) -> PairIds:
    if tokenizer.unknown_characters("".join(set().union(*_texts(pairs)))):
        _raise_unknown(pairs, origin, tokenizer)
    sides = {}
    for side in ("source", "target"):
        texts = [getattr(pair, side) for pair in pairs]
        sides[side] = Sequences.of(tokenizer.encode_batch(texts))
    lengths = {side: np.diff(rows.bounds) + 1 for side, rows in sides.items()}
    longest = max((int(counts.max()) for counts in lengths.values() if len(counts)), default=0)
    for side, counts in lengths.items():
        for row in np.flatnonzero(counts > seq_len)[:1]:
            raise DataError(
                f"{origin} {pairs[row].place}: the {side} has {counts[row]} tokens with its end "
                f"token, but data.seq_len={seq_len}; the longest has {longest}: set "
                f"data.seq_len={longest} and model.max_seq_len={longest}, or remove long pairs"
            )
    assert tokenizer.end_id is not None
    return PairIds(
        sources=sides["source"], targets=sides["target"], end_id=tokenizer.end_id, seq_len=seq_len
    )


def _raise_unknown(pairs: Sequence[Pair], origin: str, tokenizer: Tokenizer) -> None:
    for pair in pairs:
        if unknown := tokenizer.unknown_characters(pair.source + pair.target):
            raise DataError(
                f"{origin} {pair.place}: the tokenizer does not know the character {unknown[0]!r} "
                f"(U+{ord(unknown[0]):04X}); remove the pair, or train with data.tokenizer=byte "
                "or bpe"
            )
