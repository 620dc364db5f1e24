"""Windows of a token stream, as training and validation batches.

A window of `seq_len` tokens has as its targets the same tokens one place later. Shapes: B windows
of a batch, T tokens of a window.
"""

import functools
import mmap
from pathlib import Path
from typing import Any

import grain
import numpy as np

from craft_jax.data.base import Batch, Dataset
from craft_jax.data.cache import TokenCache
from craft_jax.data.sources import open_source
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import DataError


class _Windows(Dataset):
    """What training and validation share."""

    tokens_N: np.ndarray

    def place(self, step: int, row: int, position: int) -> str:
        path = getattr(self.tokens_N, "filename", None)
        return f"{path or 'the stream'} token {self._first(step, row) + position}"

    def _first(self, step: int, row: int) -> int:
        """Returns the place of a window's first token in the stream."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self), tokenizer=None)
        tokens_N = self.tokens_N
        # A worker maps the file itself. A slice does not know its place in it, and goes as it is.
        if isinstance(tokens_N, np.memmap) and isinstance(tokens_N.base, mmap.mmap):
            state["tokens_N"] = (
                tokens_N.filename,
                tokens_N.dtype.str,
                tokens_N.offset,
                tokens_N.shape,
            )
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["tokens_N"], tuple):
            name, dtype, offset, shape = state["tokens_N"]
            state["tokens_N"] = np.memmap(name, dtype, "r", offset, shape)
        vars(self).update(state)


class TrainingWindows(_Windows):
    """Shuffled windows, epoch after epoch, without end.

    Each epoch lays the windows side by side from an offset of its own, and visits them in an order
    of its own. At most `2 * seq_len` tokens at the two ends of the stream stay unvisited in an
    epoch. Window n, and so every batch, is a pure function of (seed, n).

    Args:
      tokens_N: the ids, any integer dtype (N,).
      seq_len: T.
      batch_size: B.
      seed: of the order.

    Raises:
      DataError: fewer than `seq_len + 1` tokens.
    """

    def __init__(self, tokens_N: np.ndarray, *, seq_len: int, batch_size: int, seed: int):
        self.tokens_N, self.seq_len, self.batch_size = tokens_N, seq_len, batch_size
        self._seed = seed
        _need_a_window(len(tokens_N), seq_len, "training")
        # With fewer than two windows' tokens there is no room for an offset.
        self._offsets = seq_len if len(tokens_N) >= 2 * seq_len else 1
        self._windows = (len(tokens_N) - self._offsets) // seq_len
        self._order = grain.MapDataset.range(self._windows).seed(seed).shuffle().repeat()

    def _first(self, step: int, row: int) -> int:
        return self._start(step * self.batch_size + row)

    def __len__(self) -> int:
        return max(1, self._windows // self.batch_size)

    def batch(self, step: int) -> Batch:
        first = step * self.batch_size
        starts = [self._start(n) for n in range(first, first + self.batch_size)]
        return _cut_windows(self.tokens_N, starts, self.seq_len)

    def one_pass(self) -> Dataset:
        windows = ValidationWindows(self.tokens_N, seq_len=self.seq_len, batch_size=self.batch_size)
        return _described(
            windows, tokenizer=self.tokenizer, num_bytes=self.num_bytes, name=self.name
        )

    def _start(self, n: int) -> int:
        offset = _epoch_offset(self._seed, n // self._windows, self._offsets)
        return offset + int(self._order[n]) * self.seq_len


class ValidationWindows(_Windows):
    """All of a stream, once, in windows that do not overlap.

    Every token but the first is predicted exactly once. The last batch is filled up with windows
    whose `weights` are 0, as is the last window after the end of the stream.

    Args:
      tokens_N: the ids, any integer dtype (N,).
      seq_len: T.
      batch_size: B.

    Raises:
      DataError: fewer than `seq_len + 1` tokens.
    """

    def __init__(self, tokens_N: np.ndarray, *, seq_len: int, batch_size: int):
        _need_a_window(len(tokens_N), seq_len, "validation")
        self.tokens_N, self.seq_len, self.batch_size = tokens_N, seq_len, batch_size
        self._windows = -(-(len(tokens_N) - 1) // seq_len)

    def _first(self, step: int, row: int) -> int:
        return (step * self.batch_size + row) * self.seq_len

    def __len__(self) -> int:
        return -(-self._windows // self.batch_size)

    def batch(self, step: int) -> Batch:
        shape_BT = (self.batch_size, self.seq_len)
        span = self.batch_size * self.seq_len
        piece = self.tokens_N[step * span : (step + 1) * span + 1].astype(np.int32)
        padded = np.zeros(span + 1, np.int32)
        padded[: len(piece)] = piece
        weights = np.arange(span) < len(piece) - 1
        return {
            "tokens": padded[:-1].reshape(shape_BT),
            "targets": padded[1:].reshape(shape_BT),
            "weights": weights.astype(np.float32).reshape(shape_BT),
        }


def from_cache(
    cache: TokenCache, split: str, *, seq_len: int, batch_size: int, seed: int
) -> Dataset:
    """Returns the windows of one split of a token cache.

    Raises:
      DataError: the split is shorter than one window.
    """
    tokens_N = cache.tokens(split)
    try:
        if split == "train":
            dataset = TrainingWindows(tokens_N, seq_len=seq_len, batch_size=batch_size, seed=seed)
        else:
            dataset = ValidationWindows(tokens_N, seq_len=seq_len, batch_size=batch_size)
    except DataError as error:
        raise DataError(f"{cache.manifest['source']['origin']}: {error}") from None
    return _described(
        dataset,
        tokenizer=cache.tokenizer,
        num_bytes=cache.num_bytes(split),
        fingerprint=cache.digest,
        name=cache.manifest["source"]["name"],
    )


def from_text(text: str, tokenizer: Tokenizer, *, seq_len: int, batch_size: int) -> Dataset:
    """Returns validation windows of a text.

    Raises:
      DataError: the text has fewer than two tokens, or characters that have no id.
    """
    if unknown := tokenizer.unknown_characters(text):
        raise DataError(
            f"the text has characters that the tokenizer of this run does not know: {unknown[0]!r} "
            f"(U+{ord(unknown[0]):04X}) and {len(unknown) - 1} more"
        )
    tokens_N = tokenizer.encode(text)
    if len(tokens_N) < 2:
        raise DataError(f"the text has {len(tokens_N)} tokens; a loss needs at least 2")
    # A text may be shorter than a window: then the window is cut to the text.
    seq_len = min(seq_len, len(tokens_N) - 1)
    dataset = ValidationWindows(tokens_N, seq_len=seq_len, batch_size=batch_size)
    return _described(dataset, tokenizer=tokenizer, num_bytes=len(text.encode()))


def _described(dataset: Dataset, *, tokenizer: Tokenizer, **attributes: object) -> Dataset:
    dataset.tokenizer, dataset.vocab_size = tokenizer, tokenizer.vocab_size
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return dataset


def _need_a_window(num_tokens: int, seq_len: int, split: str) -> None:
    if num_tokens < seq_len + 1:
        raise DataError(
            f"data.seq_len={seq_len} needs at least {seq_len + 1} tokens, but the {split} split "
            f"has {num_tokens}; use a shorter data.seq_len, more text, or another data.val_fraction"
        )


def _cut_windows(tokens_N: np.ndarray, starts: list[int], seq_len: int) -> Batch:
    windows = np.stack([tokens_N[s : s + seq_len + 1] for s in starts]).astype(np.int32)
    return {"tokens": windows[:, :-1].copy(), "targets": windows[:, 1:].copy()}


@functools.lru_cache(maxsize=64)
def _epoch_offset(seed: int, epoch: int, offsets: int) -> int:
    return int(np.random.default_rng([seed, epoch]).integers(offsets))


def read_text(path: Path) -> str:
    """Reads a UTF-8 text file whole, newlines as they are.

    Raises:
      DataError: it is missing or not text.
    """
    return "".join(p for d in open_source("files", str(path)).documents() for p in d.pieces())
