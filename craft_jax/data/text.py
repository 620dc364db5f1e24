"""Tokenized documents as training and validation batches.

A row of a batch is a window of running text, several documents packed side by side, or one
document; its targets are its tokens one place later. Shapes: B rows of a batch, T tokens of a row,
N tokens in all.
"""

import abc
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from craft_jax.data import sampling
from craft_jax.data.base import Batch, Dataset
from craft_jax.data.cache.token_cache import Shards
from craft_jax.data.sampling import Mixture, Packing, Share
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import DataError

Layout = Literal["concatenated", "packed", "rows"]
_WHOLE = slice(None)


class Stream:
    """Tokens of some stretches of a cache, one after another; or all of an array.

    Args:
      tokens: ids, in files or in memory.
      stretches: first token and end of each, int64 (R, 2).
      mask: of each id whether it is learned; None where all are.
    """

    def __init__(
        self, tokens: Shards | np.ndarray, stretches: np.ndarray, mask: Shards | None = None
    ):
        self._tokens, self._mask = tokens, mask
        self._starts, self._bounds = _joined(stretches)

    @classmethod
    def of(cls, tokens_N: np.ndarray) -> "Stream":
        """Returns a stream of an array, any integer dtype (N,)."""
        return cls(tokens_N, np.array([[0, len(tokens_N)]], np.int64))

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns ids from `start` to `stop`, and whether each is learned; None where all are."""
        where = self._where(start, stop)
        ids = [_read(self._tokens, first, last) for first, last in where]
        ids_T = ids[0] if len(ids) == 1 else np.concatenate(ids)
        if self._mask is None:
            return ids_T, None
        return ids_T, np.concatenate([self._mask.read(*stretch) for stretch in where])

    def windows(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns what `read` does from several places at once, (M, length) each."""
        first = np.searchsorted(self._bounds, starts, "right") - 1
        index = starts[:, None] + np.arange(length)
        index += (self._starts[first] - self._bounds[first])[:, None]
        for row in np.flatnonzero(starts + length > self._bounds[first + 1]).tolist():
            where = self._where(int(starts[row]), int(starts[row]) + length)
            index[row] = np.concatenate([np.arange(*stretch) for stretch in where])
        is_array = isinstance(self._tokens, np.ndarray)
        ids = self._tokens[index] if is_array else self._tokens.take(index)
        return ids, None if self._mask is None else self._mask.take(index)

    def _where(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Returns the stretches of the cache that hold tokens of the stream."""
        number = int(np.searchsorted(self._bounds, start, "right")) - 1
        found = []
        while start < stop:
            end = min(stop, int(self._bounds[number + 1]))
            first = int(self._starts[number]) + start - int(self._bounds[number])
            found.append((first, first + end - start))
            start, number = end, number + 1
        return found

    def place(self, index: int) -> str:
        """Returns words for where a token is stored."""
        if isinstance(self._tokens, Shards):
            return self._tokens.place(self._where(index, index + 1)[0][0])
        path = getattr(self._tokens, "filename", None)
        return f"{path or 'the stream'} token {index}"


def _joined(stretches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joins stretches that touch; returns where each begins, and where in the stream."""
    if not len(stretches):
        return np.zeros(1, np.int64), np.zeros(2, np.int64)
    is_first = np.concatenate([[True], stretches[1:, 0] != stretches[:-1, 1]])
    starts = stretches[is_first, 0]
    lengths = np.add.reduceat(stretches[:, 1] - stretches[:, 0], np.flatnonzero(is_first))
    return starts, np.concatenate([[0], np.cumsum(lengths)])


def _read(tokens: Shards | np.ndarray, start: int, stop: int) -> np.ndarray:
    return tokens.read(start, stop) if isinstance(tokens, Shards) else tokens[start:stop]


# Rows.


class Rows(abc.ABC):
    """The rows of one source: `count` of them in each epoch.

    Attributes:
      count: rows of an epoch.
      is_packed: whether rows hold several documents, and so `segments` and `positions`.
      shuffles: whether epochs are shuffled; else rows are asked for in order.
    """

    count: int
    is_packed = False
    shuffles = True

    @abc.abstractmethod
    def fill(self, out: Batch, at: np.ndarray, epoch: int, places: np.ndarray) -> None:
        """Writes the rows at these places of an epoch into the rows `at` of a batch of zeros."""

    def once(self) -> "Rows":
        """Returns rows of which an epoch has each target once."""
        return self

    def place(self, epoch: int, row: int, position: int) -> str:
        """Returns words for where a token is stored; empty if unknown."""
        return ""


class Windows(Rows):
    """Windows side by side, that hold each target once; the last is padded.

    Each epoch of training lays them from an offset of its own: the first is shorter, and padded.
    Offsets are those with which no epoch has more windows than another.

    Args:
      stream: at least two tokens.
      seq_len: T.
      seed: of the offsets; None for none.
    """

    def __init__(self, stream: Stream, seq_len: int, seed: int | None):
        self.stream, self._length, self._seed = stream, seq_len, seed
        targets = len(stream) - 1
        self.count = -(-targets // seq_len)
        self._least = targets % seq_len or seq_len

    def _start(self, epoch: int) -> int:
        """Returns where the first window of an epoch begins: 0, or up to T - 1 before the text."""
        if self._seed is None:
            return 0
        # With r targets in the last window, a first one of r to T targets needs no window more.
        choices = self._length - self._least + 1
        first = self._least + int(sampling.mix(self._seed, epoch) % np.uint64(choices))
        return first - self._length

    def fill(self, out: Batch, at: np.ndarray, epoch: int, places: np.ndarray) -> None:
        self._fill(out, at, self._start(epoch) + places * self._length)

    def _fill(self, out: Batch, at: np.ndarray, starts: np.ndarray) -> None:
        is_whole = (starts >= 0) & (starts + self._length < len(self.stream))
        rows = at[is_whole]
        ids, learned = self.stream.windows(starts[is_whole], self._length + 1)
        out["tokens"][rows], out["targets"][rows] = ids[:, :-1], ids[:, 1:]
        out["weights"][rows] = 1 if learned is None else learned[:, 1:]
        for row, start in zip(at[~is_whole].tolist(), starts[~is_whole].tolist(), strict=True):
            self._fill_one(out, row, start)

    def _fill_one(self, out: Batch, row: int, start: int) -> None:
        stop = min(start + self._length + 1, len(self.stream))
        ids, learned = self.stream.read(max(start, 0), stop)
        count = len(ids) - 1
        out["tokens"][row, :count] = ids[:-1]
        out["targets"][row, :count] = ids[1:]
        out["weights"][row, :count] = 1 if learned is None else learned[1:]

    def place(self, epoch: int, row: int, position: int) -> str:
        return self.stream.place(max(self._start(epoch) + row * self._length, 0) + position)


class RandomWindows(Windows):
    """Windows that each begin anywhere: each token but the first and last is as likely as another.

    Args:
      stream: at least T + 1 tokens.
      seq_len: T.
      seed: of the places.
    """

    shuffles = False

    def fill(self, out: Batch, at: np.ndarray, epoch: int, places: np.ndarray) -> None:
        self._fill(out, at, self._starts(epoch, places))

    def _starts(self, epoch: int, places: np.ndarray) -> np.ndarray:
        assert self._seed is not None
        numbers = epoch * self.count + places
        return sampling.drawn(self._seed, numbers, len(self.stream) - self._length)

    def once(self) -> Rows:
        return Windows(self.stream, self._length, None)

    def place(self, epoch: int, row: int, position: int) -> str:
        return self.stream.place(int(self._starts(epoch, np.array([row]))[0]) + position)


class DocumentRows(Rows):
    """Rows of whole documents, one in a row or as many as fit; what is too long goes on in others.

    A document is predicted from its first token on, given the end token, where the vocabulary has
    one; else from its second. Padding has segment 0.

    Args:
      tokens: ids of the cache.
      mask: of each id whether it is learned; None where all are.
      documents: first token and end of each document, int64 (M, 2).
      seq_len: T.
      end_id: of the end token; None without one.
      is_packed: several to a row.

    Raises:
      DataError: there is no target.
    """

    def __init__(
        self,
        tokens: Shards,
        mask: Shards | None,
        documents: np.ndarray,
        *,
        seq_len: int,
        end_id: int | None,
        is_packed: bool,
    ):
        self._tokens, self._mask, self._end_id = tokens, mask, end_id
        self.is_packed, self._length = is_packed, seq_len
        self._shift = 1 if end_id is None else 0
        targets = documents[:, 1] - documents[:, 0] - self._shift
        if not targets.any():
            raise DataError("no document has a token that is predicted from another; use more text")
        counts = -(-targets // seq_len)
        owner = np.repeat(np.arange(len(documents)), counts)
        number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._offsets = number * seq_len
        self._starts = documents[owner, 0] + self._shift + self._offsets
        self._sizes = np.minimum(targets[owner] - self._offsets, seq_len)
        if is_packed:
            self._plan = sampling.pack(self._sizes, seq_len)
        else:
            every = np.arange(len(owner) + 1)
            self._plan = Packing(every[:-1], every)
        self.count = len(self._plan)

    def fill(self, out: Batch, at: np.ndarray, epoch: int, places: np.ndarray) -> None:
        bounds = self._plan.bounds
        of_row = [self._plan.pieces[bounds[p] : bounds[p + 1]] for p in places]
        pieces = np.concatenate(of_row)
        sizes = self._sizes[pieces]
        ends = np.cumsum(sizes)
        row_counts = np.array([len(p) for p in of_row])
        row = np.repeat(np.repeat(at, row_counts), sizes)
        position = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
        # Where each row begins among all targets.
        first_pieces = np.cumsum(row_counts) - row_counts
        row_starts = (ends - sizes)[first_pieces]
        row_sizes = np.add.reduceat(sizes, first_pieces)
        column = np.arange(ends[-1]) - np.repeat(row_starts, row_sizes)
        index = np.repeat(self._starts[pieces], sizes) + position
        out["targets"][row, column] = self._tokens.take(index)
        tokens = self._tokens.take(np.maximum(index - 1, 0)).astype(np.int32)
        if self._end_id is not None:
            is_first = np.repeat(self._offsets[pieces], sizes) + position == 0
            tokens[is_first] = self._end_id
        out["tokens"][row, column] = tokens
        out["weights"][row, column] = 1 if self._mask is None else self._mask.take(index)
        if self.is_packed:
            segment = np.arange(len(pieces)) - np.repeat(first_pieces, row_counts) + 1
            out["segments"][row, column] = np.repeat(segment, sizes)
            out["positions"][row, column] = position

    def place(self, epoch: int, row: int, position: int) -> str:
        bounds = self._plan.bounds
        pieces = self._plan.pieces[bounds[row] : bounds[row + 1]]
        ends = np.cumsum(self._sizes[pieces])
        piece = int(np.searchsorted(ends, max(position - 1, 0), "right"))
        before = int(ends[piece - 1]) if piece else 0
        return self._tokens.place(int(self._starts[pieces[piece]]) + position - 1 - before)


# Batches.


class TextBatches(Dataset):
    """Rows of one source or of several, without end; batch s is a pure function of (seed, s).

    Args:
      rows: of each source, which has at least one.
      shares: how much of the mixture each is.
      seq_len: T.
      batch_size: B.
      seed: of the order.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        shares: Sequence[Share],
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
    ):
        self.sources, self.seq_len, self.batch_size = list(rows), seq_len, batch_size
        self.mixture = Mixture(shares, batch_size)
        self._seeds = [int(sampling.mix(seed, k)) >> 33 for k in range(len(self.sources))]

    def __len__(self) -> int:
        return max(1, sum(source.count for source in self.sources) // self.batch_size)

    def batch(self, step: int) -> Batch:
        return self.rows(step, _WHOLE)

    def rows(self, step: int, rows: slice) -> Batch:
        source_B, number_B = self.mixture.rows(step, rows)
        out = _zeros(len(source_B), self.seq_len, self.sources[0].is_packed)
        for k in np.unique(source_B).tolist():
            at_k = np.flatnonzero(source_B == k)
            epoch_B = number_B[at_k] // self.sources[k].count
            for epoch in np.unique(epoch_B).tolist():
                at = at_k[epoch_B == epoch]
                places = self._places(k, epoch, number_B[at])
                self.sources[k].fill(out, at, epoch, places)
        return out

    def _places(self, source: int, epoch: int, numbers: np.ndarray) -> np.ndarray:
        rows = self.sources[source]
        places = numbers - epoch * rows.count
        if not rows.shuffles:
            return places
        return sampling.shuffled(self._seeds[source], epoch, places, rows.count)

    def one_pass(self) -> Dataset:
        rows = [source.once() for source in self.sources]
        found = ValidationRows(rows, seq_len=self.seq_len, batch_size=self.batch_size)
        return described(
            found,
            tokenizer=self.tokenizer,
            num_bytes=self.num_bytes,
            name=self.name,
            fingerprint=self.fingerprint,
        )

    def place(self, step: int, row: int, position: int) -> str:
        source_B, number_B = self.mixture.rows(step, slice(row, row + 1))
        source = int(source_B[0])
        epoch = int(number_B[0]) // self.sources[source].count
        (place,) = self._places(source, epoch, number_B).tolist()
        return self.sources[source].place(epoch, place, position)

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self), tokenizer=None)


class ValidationRows(Dataset):
    """All rows of one source or of several, once, in order.

    Every target is predicted exactly once. The last batch is filled up with rows whose `weights`
    are 0.

    Args:
      rows: of each source.
      seq_len: T.
      batch_size: B.
    """

    def __init__(self, rows: Sequence[Rows], *, seq_len: int, batch_size: int):
        self.sources, self.seq_len, self.batch_size = list(rows), seq_len, batch_size
        self._bounds = np.cumsum([0, *(source.count for source in self.sources)])

    def __len__(self) -> int:
        return -(-int(self._bounds[-1]) // self.batch_size)

    def batch(self, step: int) -> Batch:
        return self.rows(step, _WHOLE)

    def rows(self, step: int, rows: slice) -> Batch:
        number_B = step * self.batch_size + np.arange(self.batch_size)[rows]
        out = _zeros(len(number_B), self.seq_len, self.sources[0].is_packed)
        source_B = np.searchsorted(self._bounds, number_B, "right") - 1
        for k in range(len(self.sources)):
            at = np.flatnonzero(source_B == k)
            if len(at):
                self.sources[k].fill(out, at, 0, number_B[at] - self._bounds[k])
        return out

    def place(self, step: int, row: int, position: int) -> str:
        number = step * self.batch_size + row
        source = int(np.searchsorted(self._bounds, number, "right")) - 1
        return self.sources[source].place(0, number - int(self._bounds[source]), position)

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self), tokenizer=None)


def _zeros(num_rows: int, seq_len: int, is_packed: bool) -> Batch:
    names = ("tokens", "targets", *(("segments", "positions") if is_packed else ()))
    out: Batch = {name: np.zeros((num_rows, seq_len), np.int32) for name in names}
    return out | {"weights": np.zeros((num_rows, seq_len), np.float32)}


class ValidationWindows(ValidationRows):
    """All windows of an array, once, in order; see `Windows`.

    Args:
      tokens_N: the ids, any integer dtype (N,).
      seq_len: T.
      batch_size: B.

    Raises:
      DataError: fewer than `seq_len + 1` tokens.
    """

    def __init__(self, tokens_N: np.ndarray, *, seq_len: int, batch_size: int):
        need_tokens(len(tokens_N), seq_len, seq_len, "validation")
        windows = Windows(Stream.of(tokens_N), seq_len, None)
        super().__init__([windows], seq_len=seq_len, batch_size=batch_size)


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
    return described(dataset, tokenizer=tokenizer, num_bytes=len(text.encode()))


def described(dataset: Dataset, *, tokenizer: Tokenizer | None, **attributes: object) -> Dataset:
    """Gives a dataset what the commands say of it."""
    if tokenizer is not None:
        dataset.tokenizer, dataset.vocab_size = tokenizer, tokenizer.vocab_size
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return dataset


def need_tokens(num_tokens: int, least: int, seq_len: int, split: str) -> None:
    """Checks that a split has `least` tokens to predict.

    Raises:
      DataError: it has not.
    """
    if num_tokens < least + 1:
        raise DataError(
            f"data.seq_len={seq_len} needs at least {least + 1} tokens, but the {split} split "
            f"has {num_tokens}; use a shorter data.seq_len, more text, or another data.val_fraction"
        )
