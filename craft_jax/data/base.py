"""The interface of data: batches by number."""

import abc
import dataclasses
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Facts about a dataset, for models, checkpoints and messages.

    Attributes:
      vocab_size: one more than the largest token id; None for data without tokens.
      tokenizer: decodes ids to text; None if there is no text.
      num_bytes: UTF-8 bytes of the text behind one pass, for bits per byte; None if unknown.
      image_format: size, classes and palette of the images; None if there are none.
      fingerprint: identifies the content; a run resumes only on data with the same fingerprint.
      name: a word for file names.
    """

    vocab_size: int | None = None
    tokenizer: Tokenizer | None = None
    num_bytes: int | None = None
    image_format: ImageFormat | None = None
    fingerprint: str = ""
    name: str = "data"

    @classmethod
    def of(cls, data: "Dataset | BaseDataset") -> "DatasetInfo":
        """Returns the facts that a dataset declares."""
        return cls(**{field.name: getattr(data, field.name) for field in dataclasses.fields(cls)})


def sizes_of(data: "Dataset") -> dict[str, int]:
    """Returns the sizes of a model that its data decides; see `sizes_from`."""
    return sizes_from(data.vocab_size, data.image_format)


def sizes_from(vocab_size: int | None, images: ImageFormat | None) -> dict[str, int]:
    """Returns sizes by their field names in the config of a model."""
    sizes = {} if images is None else images.sizes
    return sizes if vocab_size is None else sizes | {"vocab_size": vocab_size}


class Dataset(abc.ABC):
    """The batches of one split.

    A dataset of your own is a class with this interface, built as `YourDataset(config, split,
    seed)` from the `data` section of the config, `"train"` or `"val"`, and `training.seed`. With
    `data.workers` each worker process builds one in the same way. It overrides the attributes below
    that apply, or passes them to this constructor.

    Args:
      info: values of the attributes; None keeps those of the class.

    Attributes:
      vocab_size, tokenizer, num_bytes, image_format, fingerprint, name: see `DatasetInfo`.
      batch_size: rows of a batch; None if unknown.
      recipe: how worker processes build it; None if it is pickled instead.
    """

    vocab_size: int | None = None
    tokenizer: Tokenizer | None = None
    num_bytes: int | None = None
    image_format: ImageFormat | None = None
    fingerprint: str = ""
    name: str = "data"
    batch_size: int | None = None
    recipe: Recipe | None = None

    def __init__(self, info: DatasetInfo | None = None):
        if info is not None:
            vars(self).update(vars(info))

    @abc.abstractmethod
    def batch(self, step: int) -> Batch:
        """Returns batch `step` (from 0), a pure function of the seed and `step`.

        The first axis of every array is the batch. Language models read `tokens` and `targets`,
        int32 (B, T), and the loss weights of the targets, `weights`, float32 (B, T), 1 where they
        are missing. Models with a source also read `source`, int32 (B, S), and `source_mask`, bool
        (B, S), false for padding. All ids are in [0, `vocab_size`), also where the weight is 0.

        A training set answers any step; a validation set those below `len(self)`.
        """

    def rows(self, step: int, rows: slice) -> Batch:
        """Returns the rows of batch `step` that one of several processes needs.

        Override it if rows can be made alone.
        """
        return {name: array[rows] for name, array in self.batch(step).items()}

    @abc.abstractmethod
    def __len__(self) -> int:
        """Returns the number of batches in one pass."""

    def one_pass(self) -> "Dataset":
        """Returns a training set as a validation set: every example once, in order."""
        return self

    def place(self, step: int, row: int, position: int) -> str:
        """Returns where `tokens[row, position]` of a batch is stored; empty if unknown.

        Messages about a bad id end with it.
        """
        return ""


class BaseDataset(abc.ABC):
    """Examples by number: a dataset, or a source of text, of your own.

    Named as `data.dataset`, it is built as `YourDataset(config, split, seed)` from the `data`
    section of the config, `"train"` or `"val"`, and `training.seed`. Its examples are dicts of
    arrays without a batch axis, all of the same shapes, with the names that `Dataset.batch`
    describes; they are shuffled, stacked and repeated for you.

    Named as `data.source`, it is built as `YourDataset(config)`. Its examples are texts, or dicts
    like the lines of a `.jsonl` file, and pass through tokenizer, cache and splits like any text.

    Attributes:
      vocab_size, tokenizer, num_bytes, image_format, fingerprint, name: see `DatasetInfo`.
    """

    vocab_size: int | None = None
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
