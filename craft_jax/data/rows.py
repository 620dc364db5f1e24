"""Rows of tokens: windows of running text, packed documents, or one document each.

The targets of a row are its tokens, one position later. Shapes: T tokens of a row, N tokens in all.
"""

import abc

import numpy as np

from craft_jax.data import sampling
from craft_jax.data.base import Batch
from craft_jax.data.cache.token_cache import Shards
from craft_jax.data.sampling import Packing
from craft_jax.errors import DataError


class Stream:
    """The tokens of some spans of a cache, or of an array, concatenated.

    Args:
      tokens: ids, in files or in memory.
      spans: start and end of each, int64 (R, 2).
      loss_mask: for each id, whether it counts in the loss; None if all do.
    """

    def __init__(
        self, tokens: Shards | np.ndarray, spans: np.ndarray, loss_mask: Shards | None = None
    ):
        self._tokens, self._loss_mask = tokens, loss_mask
        self._starts, self._bounds = _joined(spans)

    @classmethod
    def of(cls, tokens_N: np.ndarray) -> "Stream":
        """Returns a stream of an array, any integer dtype (N,)."""
        return cls(tokens_N, np.array([[0, len(tokens_N)]], np.int64))

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns ids `start` to `stop` and their loss mask, None if all of them count."""
        spans = self._spans(start, stop)
        ids = [_read(self._tokens, first, last) for first, last in spans]
        ids_T = ids[0] if len(ids) == 1 else np.concatenate(ids)
        if self._loss_mask is None:
            return ids_T, None
        return ids_T, np.concatenate([self._loss_mask.read(*span) for span in spans])

    def windows(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the results of `read` for several starts at once, (M, length) each."""
        first = np.searchsorted(self._bounds, starts, "right") - 1
        index = starts[:, None] + np.arange(length)
        index += (self._starts[first] - self._bounds[first])[:, None]
        for row in np.flatnonzero(starts + length > self._bounds[first + 1]).tolist():
            spans = self._spans(int(starts[row]), int(starts[row]) + length)
            index[row] = np.concatenate([np.arange(*span) for span in spans])
        is_array = isinstance(self._tokens, np.ndarray)
        ids = self._tokens[index] if is_array else self._tokens.take(index)
        return ids, None if self._loss_mask is None else self._loss_mask.take(index)

    def _spans(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Returns the spans of the cache that hold tokens `start` to `stop` of the stream."""
        number = int(np.searchsorted(self._bounds, start, "right")) - 1
        spans = []
        while start < stop:
            end = min(stop, int(self._bounds[number + 1]))
            first = int(self._starts[number]) + start - int(self._bounds[number])
            spans.append((first, first + end - start))
            start, number = end, number + 1
        return spans

    def place(self, index: int) -> str:
        """Returns where a token is stored, for messages."""
        if isinstance(self._tokens, Shards):
            return self._tokens.place(self._spans(index, index + 1)[0][0])
        path = self._tokens.filename if isinstance(self._tokens, np.memmap) else None
        return f"{path or 'the stream'} token {index}"


def _joined(spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joins adjacent spans; returns their starts in the cache, and their bounds in the stream."""
    if not len(spans):
        return np.zeros(1, np.int64), np.zeros(2, np.int64)
    is_first = np.concatenate([[True], spans[1:, 0] != spans[:-1, 1]])
    starts = spans[is_first, 0]
    lengths = np.add.reduceat(spans[:, 1] - spans[:, 0], np.flatnonzero(is_first))
    return starts, np.concatenate([[0], np.cumsum(lengths)])


def _read(tokens: Shards | np.ndarray, start: int, stop: int) -> np.ndarray:
    return tokens.read(start, stop) if isinstance(tokens, Shards) else tokens[start:stop]


class Rows(abc.ABC):
    """The rows of one source: `count` of them in each epoch.

    Attributes:
      count: rows of an epoch.
      is_packed: whether a row holds several documents, with `segments` and `positions`.
      shuffles: whether epochs are shuffled; else rows are read in order.
    """

    count: int
    is_packed = False
    shuffles = True

    @abc.abstractmethod
    def fill(self, out: Batch, at: np.ndarray, epoch: int, indices: np.ndarray) -> None:
        """Writes the rows with these indices in an epoch into the rows `at` of a zeroed batch."""

    def once(self) -> "Rows":
        """Returns rows whose epoch has each target once."""
        return self

    def place(self, epoch: int, row: int, position: int) -> str:
        """Returns where a token is stored, for messages; empty if unknown."""
        return ""


class Windows(Rows):
    """Adjacent windows that hold each target once; the last is padded.

    Each epoch of training shifts them by an offset of its own, with a shorter first window, padded.
    Offsets are limited so that all epochs have the same number of windows.

    Args:
      stream: at least two tokens.
      seq_len: T.
      seed: of the offsets; None for no offset.
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
        # With r targets in the last window, a first one of r to T targets needs no extra window.
        choices = self._length - self._least + 1
        first = self._least + int(sampling.mix(self._seed, epoch) % np.uint64(choices))
        return first - self._length

    def fill(self, out: Batch, at: np.ndarray, epoch: int, indices: np.ndarray) -> None:
        self._fill(out, at, self._start(epoch) + indices * self._length)

    def _fill(self, out: Batch, at: np.ndarray, starts: np.ndarray) -> None:
        is_whole = (starts >= 0) & (starts + self._length < len(self.stream))
        rows = at[is_whole]
        ids, mask = self.stream.windows(starts[is_whole], self._length + 1)
        out["tokens"][rows], out["targets"][rows] = ids[:, :-1], ids[:, 1:]
        out["weights"][rows] = 1 if mask is None else mask[:, 1:]
        for row, start in zip(at[~is_whole].tolist(), starts[~is_whole].tolist(), strict=True):
            self._fill_one(out, row, start)

    def _fill_one(self, out: Batch, row: int, start: int) -> None:
        stop = min(start + self._length + 1, len(self.stream))
        ids, mask = self.stream.read(max(start, 0), stop)
        count = len(ids) - 1
        out["tokens"][row, :count] = ids[:-1]
        out["targets"][row, :count] = ids[1:]
        out["weights"][row, :count] = 1 if mask is None else mask[1:]

    def place(self, epoch: int, row: int, position: int) -> str:
        return self.stream.place(max(self._start(epoch) + row * self._length, 0) + position)


class RandomWindows(Windows):
    """Windows with uniformly random starts.

    Args:
      stream: at least T + 1 tokens.
      seq_len: T.
      seed: of the starts.
    """

    shuffles = False

    def fill(self, out: Batch, at: np.ndarray, epoch: int, indices: np.ndarray) -> None:
        self._fill(out, at, self._starts(epoch, indices))

    def _starts(self, epoch: int, indices: np.ndarray) -> np.ndarray:
        assert self._seed is not None
        numbers = epoch * self.count + indices
        return sampling.drawn(self._seed, numbers, len(self.stream) - self._length)

    def once(self) -> Rows:
        return Windows(self.stream, self._length, None)

    def place(self, epoch: int, row: int, position: int) -> str:
        return self.stream.place(int(self._starts(epoch, np.array([row]))[0]) + position)


class DocumentRows(Rows):
    """Rows of whole documents, one or several each; longer documents continue in further rows.

    The first token of a document is a target too, predicted from the end token, if the vocabulary
    has one. Padding has segment 0.

    Args:
      tokens: ids of the cache.
      loss_mask: for each id, whether it counts in the loss; None if all do.
      documents: start and end of each document, int64 (M, 2).
      seq_len: T.
      end_id: the end token; None without one.
      is_packed: several documents to a row.

    Raises:
      DataError: there is no target.
    """

    def __init__(
        self,
        tokens: Shards,
        loss_mask: Shards | None,
        documents: np.ndarray,
        *,
        seq_len: int,
        end_id: int | None,
        is_packed: bool,
    ):
        self._tokens, self._loss_mask, self._end_id = tokens, loss_mask, end_id
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

    def fill(self, out: Batch, at: np.ndarray, epoch: int, indices: np.ndarray) -> None:
        bounds = self._plan.bounds
        of_row = [self._plan.chunks[bounds[i] : bounds[i + 1]] for i in indices]
        chunks = np.concatenate(of_row)
        sizes = self._sizes[chunks]
        ends = np.cumsum(sizes)
        row_counts = np.array([len(c) for c in of_row])
        row = np.repeat(np.repeat(at, row_counts), sizes)
        position = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
        # Where each row begins among all targets.
        first_chunks = np.cumsum(row_counts) - row_counts
        row_starts = (ends - sizes)[first_chunks]
        row_sizes = np.add.reduceat(sizes, first_chunks)
        column = np.arange(ends[-1]) - np.repeat(row_starts, row_sizes)
        index = np.repeat(self._starts[chunks], sizes) + position
        out["targets"][row, column] = self._tokens.take(index)
        tokens = self._tokens.take(np.maximum(index - 1, 0)).astype(np.int32)
        if self._end_id is not None:
            is_first = np.repeat(self._offsets[chunks], sizes) + position == 0
            tokens[is_first] = self._end_id
        out["tokens"][row, column] = tokens
        out["weights"][row, column] = 1 if self._loss_mask is None else self._loss_mask.take(index)
        if self.is_packed:
            segment = np.arange(len(chunks)) - np.repeat(first_chunks, row_counts) + 1
            out["segments"][row, column] = np.repeat(segment, sizes)
            out["positions"][row, column] = position

    def place(self, epoch: int, row: int, position: int) -> str:
        bounds = self._plan.bounds
        chunks = self._plan.chunks[bounds[row] : bounds[row + 1]]
        ends = np.cumsum(self._sizes[chunks])
        chunk = int(np.searchsorted(ends, max(position - 1, 0), "right"))
        before = int(ends[chunk - 1]) if chunk else 0
        return self._tokens.place(int(self._starts[chunks[chunk]]) + position - 1 - before)
