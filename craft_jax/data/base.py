"""What the trainer needs of data: batches by number."""

import abc
from typing import Any, NamedTuple

import numpy as np

from craft_jax.data.images.format import ImageFormat
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


def vocab_size_of(dataset: "Dataset") -> int | None:
    """Returns the vocabulary size of a dataset; None for one without tokens."""
    return getattr(dataset, "vocab_size", None)


def sizes_of(data: "Dataset") -> dict[str, int]:
    """Returns the sizes of data that a model takes over; see `sizes_from`."""
    return sizes_from(vocab_size_of(data), data.image_format)


def sizes_from(vocab_size: int | None, images: ImageFormat | None) -> dict[str, int]:
    """Returns sizes by the names that they have in the config of a model."""
    found = {} if images is None else images.sizes
    return found if vocab_size is None else found | {"vocab_size": vocab_size}


class Dataset(abc.ABC):
    """The batches of one split.

    A dataset of your own is a class with this interface, built as `YourDataset(config, split,
    seed)` from the `data` section of the config, `"train"` or `"val"`, and `training.seed`. With
    `data.workers` each worker process builds one in the same way.

    Attributes:
      vocab_size: one more than the largest token id, for models of tokens; others have none.
      tokenizer: turns ids into text, or None if there is no text.
      num_bytes: UTF-8 bytes of the text behind one pass, for bits per byte; None if unknown.
      image_format: what the images are; None if there are none.
      fingerprint: identifies the content; a run only resumes on data with the same one.
      name: a word for file names.
      recipe: how worker processes build it; None where it is sent to them as it is.
    """

    vocab_size: int
    tokenizer: Tokenizer | None = None
    num_bytes: int | None = None
    image_format: ImageFormat | None = None
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

    def rows(self, step: int, rows: slice) -> Batch:
        """Returns some rows of batch `step`: those that one of several processes needs.

        A dataset that can make them without the others does.
        """
        return {name: array[rows] for name, array in self.batch(step).items()}

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


class BaseDataset(abc.ABC):
    """Examples by number: what a dataset or a source of text of your own is.

    Named as `data.dataset`, it is built as `YourDataset(config, split, seed)` from the `data`
    section of the config, `"train"` or `"val"`, and `training.seed`. Its examples are dicts of
    arrays without a batch axis, all of the same shapes, with the names that `Dataset.batch`
    describes; they are shuffled, stacked and repeated for you.

    Named as `data.source`, it is built as `YourDataset(config)`. Its examples are texts, or dicts
    like the lines of a `.jsonl` file, and take the whole way of text: tokenizer, cache, splits.

    Attributes:
      vocab_size, tokenizer, num_bytes, image_format, fingerprint, name: see `Dataset`.
    """

    vocab_size: int
    tokenizer: Tokenizer | None = None
    num_bytes: int | None = None
    image_format: ImageFormat | None = None
    fingerprint: str = ""
    name: str = "data"

    @abc.abstractmethod
    def __len__(self) -> int:
        """Returns the number of examples."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Any:
        """Returns example `index`, from 0 to `len(self) - 1`."""
