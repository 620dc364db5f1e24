"""What the trainer needs of data: batches by number."""

import abc
from typing import Any, NamedTuple

import numpy as np

from craft_jax import plugins
from craft_jax.data.tokenizers import Tokenizer

Batch = dict[str, np.ndarray]


class Recipe(NamedTuple):
    """How a dataset of the user's own is built.

    Attributes:
      reference: its class, `path/file.py:Class` or `module:Class`.
      config: the `data` section of the config.
      split: `"train"` or `"val"`.
      seed: `training.seed`.
    """

    reference: str
    config: Any
    split: str
    seed: int


class Dataset(abc.ABC):
    """The batches of one split.

    A dataset of your own is a class with this interface, built as `YourDataset(config, split,
    seed)` from the `data` section of the config, `"train"` or `"val"`, and `training.seed`. With
    `data.workers` each worker process builds one in the same way.

    Attributes:
      vocab_size: one more than the largest token id, for models of tokens.
      tokenizer: turns ids into text, or None if there is no text.
      num_bytes: UTF-8 bytes of the text behind one pass, for bits per byte; None if unknown.
      fingerprint: identifies the content; a run only resumes on data with the same one.
      name: a word for file names.
      recipe: how worker processes build it; None where it is sent to them as it is.
    """

    vocab_size: int
    tokenizer: Tokenizer | None = None
    num_bytes: int | None = None
    fingerprint: str = ""
    name: str = "data"
    recipe: Recipe | None = None

    @abc.abstractmethod
    def batch(self, step: int) -> Batch:
        """Returns batch `step` (from 0), a pure function of the seed and `step`.

        Every array has the batch as its first axis. Language models read `tokens` and `targets`,
        int32 (B, T), and, where some targets do not count, `weights`, float32 (B, T). Those that
        have a source read `source`, int32 (B, S), and `source_mask`, bool (B, S), false for
        padding, as well. All ids are in [0, `vocab_size`), also where they do not count.

        A training set answers any step; a validation set those below `len(self)`.
        """

    @abc.abstractmethod
    def __len__(self) -> int:
        """Returns the number of batches in one pass."""

    def one_pass(self) -> "Dataset":
        """Returns a training set as a validation set: all of it once, in order."""
        return self

    def place(self, step: int, row: int, position: int) -> str:
        """Returns words for where `tokens[row, position]` of a batch is stored; empty if unknown.

        Messages about a bad id end with them.
        """
        return ""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The module of a class from a file of the user's has another name in another process.
        return (_build, self.recipe) if self.recipe else super().__reduce_ex__(protocol)


def _build(reference: str, config: Any, split: str, seed: int) -> Dataset:
    return plugins.load(reference, "data.dataset", Dataset)(config, split, seed)
