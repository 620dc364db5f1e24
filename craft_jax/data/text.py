"""Rows of tokens as training and validation batches.

Shapes: B rows of a batch, T tokens of a row, N tokens in all.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from craft_jax.data import sampling
from craft_jax.data.base import Batch, Dataset, DatasetInfo
from craft_jax.data.rows import Rows, Stream, Windows
from craft_jax.data.sampling import Mixture, WeightSchedule
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import DataError

_WHOLE = slice(None)


class TextBatches(Dataset):
    """Rows of a mixture of sources, without end; batch s is a pure function of (seed, s).

    Args:
      rows: of each source, at least one each.
      weights: of each source in the mixture.
      seq_len: T.
      batch_size: B.
      seed: of the order.
      info: see `Dataset`.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        weights: Sequence[WeightSchedule],
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        info: DatasetInfo | None = None,
    ):
        super().__init__(info)
        self.sources, self.seq_len, self.batch_size = list(rows), seq_len, batch_size
        self.mixture = Mixture(weights, batch_size)
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
                self.sources[k].fill(out, at, epoch, self._indices(k, epoch, number_B[at]))
        return out

    def _indices(self, source: int, epoch: int, numbers: np.ndarray) -> np.ndarray:
        rows = self.sources[source]
        indices = numbers - epoch * rows.count
        if not rows.shuffles:
            return indices
        return sampling.shuffled(self._seeds[source], epoch, indices, rows.count)

    def one_pass(self) -> Dataset:
        return ValidationRows(
            [source.once() for source in self.sources],
            seq_len=self.seq_len,
            batch_size=self.batch_size,
            info=DatasetInfo.of(self),
        )

    def place(self, step: int, row: int, position: int) -> str:
        source_B, number_B = self.mixture.rows(step, slice(row, row + 1))
        source = int(source_B[0])
        epoch = int(number_B[0]) // self.sources[source].count
        (index,) = self._indices(source, epoch, number_B).tolist()
        return self.sources[source].place(epoch, index, position)

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self), tokenizer=None)


class ValidationRows(Dataset):
    """All rows of one or several sources, once, in order.

    Every target is predicted exactly once. Rows with `weights` 0 fill up the last batch.

    Args:
      rows: of each source.
      seq_len: T.
      batch_size: B.
      info: see `Dataset`.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        *,
        seq_len: int,
        batch_size: int,
        info: DatasetInfo | None = None,
    ):
        super().__init__(info)
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
      info: see `Dataset`.

    Raises:
      DataError: fewer than `seq_len + 1` tokens.
    """

    def __init__(
        self,
        tokens_N: np.ndarray,
        *,
        seq_len: int,
        batch_size: int,
        info: DatasetInfo | None = None,
    ):
        check_num_tokens(len(tokens_N), seq_len, seq_len, "validation")
        windows = Windows(Stream.of(tokens_N), seq_len, None)
        super().__init__([windows], seq_len=seq_len, batch_size=batch_size, info=info)


def from_text(
    text: str, tokenizer: Tokenizer, *, seq_len: int, batch_size: int, name: str = "data"
) -> Dataset:
    """Returns validation windows of a text; `name` is for file names.

    Raises:
      DataError: the text has fewer than two tokens, or characters without an id.
    """
    if unknown := tokenizer.unknown_characters(text):
        raise DataError(
            f"the text has characters that the tokenizer of this run does not know: {unknown[0]!r} "
            f"(U+{ord(unknown[0]):04X}) and {len(unknown) - 1} more"
        )
    tokens_N = tokenizer.encode(text)
    if len(tokens_N) < 2:
        raise DataError(f"the text has {len(tokens_N)} tokens; a loss needs at least 2")
    # Shortens the window to a text that is shorter.
    seq_len = min(seq_len, len(tokens_N) - 1)
    info = DatasetInfo(
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        num_bytes=len(text.encode()),
        name=name,
    )
    return ValidationWindows(tokens_N, seq_len=seq_len, batch_size=batch_size, info=info)


def check_num_tokens(num_tokens: int, least: int, seq_len: int, split: str) -> None:
    """Checks that a split has `least` tokens to predict.

    Raises:
      DataError: it has fewer.
    """
    if num_tokens < least + 1:
        raise DataError(
            f"data.seq_len={seq_len} needs at least {least + 1} tokens, but the {split} split "
            f"has {num_tokens}; use a shorter data.seq_len, more text, or another data.val_fraction"
        )
