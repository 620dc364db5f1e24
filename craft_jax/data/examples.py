"""Batches of a `BaseDataset`, shuffled each epoch; and two datasets of text to derive from."""

import hashlib
from typing import Any

import numpy as np

from craft_jax import plugins
from craft_jax.data import sampling, tokenizers
from craft_jax.data.base import BaseDataset, Batch, Dataset, DatasetInfo, Recipe
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import ConfigError, DataError, UsageError


class TextDataset(BaseDataset):
    """Adjacent windows of a text; the last is padded.

    Args:
      text: the text.
      tokenizer: of its ids.
      seq_len: T, tokens of a window.

    Raises:
      DataError: the text has fewer than two tokens.
      UsageError: the text has characters without an id.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, seq_len: int):
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size
        self.num_bytes, self._length = len(text.encode()), seq_len
        self._ids = tokenizer.encode(text)
        if len(self._ids) < 2:
            raise DataError(f"the text has {len(self._ids)} tokens; a loss needs at least 2")
        content = f"{tokenizer.digest} {seq_len}\0{text}"
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def __len__(self) -> int:
        return -(-(len(self._ids) - 1) // self._length)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns `tokens`, `targets`, int32 (T,), and `weights`, float32 (T,)."""
        piece = self._ids[index * self._length : (index + 1) * self._length + 1]
        padded = np.zeros(self._length + 1, np.int32)
        padded[: len(piece)] = piece
        weights = np.arange(self._length) < len(piece) - 1
        return {
            "tokens": padded[:-1],
            "targets": padded[1:],
            "weights": weights.astype(np.float32),
        }


class CharDataset(TextDataset):
    """Windows of a text, one token for each character.

    Args:
      text: the text.
      seq_len: T, characters of a window.
      alphabet: the vocabulary, the same for both splits; None for the characters of the text.
    """

    def __init__(self, text: str, seq_len: int, alphabet: str | None = None):
        characters = tokenizers.characters(alphabet or text, end_token=False)
        super().__init__(text, characters, seq_len)


class ExampleBatches(Dataset):
    """Batches of examples.

    Args:
      examples: at least one.
      batch_size: B.
      seed: of the order, for endless training batches; None for one pass in order, where rows of
        weight 0 fill up the last batch.

    Raises:
      DataError: there are no examples.
    """

    def __init__(self, examples: BaseDataset, *, batch_size: int, seed: int | None):
        if not len(examples):
            raise DataError(f"{type(examples).__name__} has no examples; it needs at least one")
        super().__init__(DatasetInfo.of(examples))
        self._examples, self.batch_size, self._seed = examples, batch_size, seed
        self.fingerprint = examples.fingerprint or _fingerprint(examples)

    def __len__(self) -> int:
        if self._seed is None:
            return -(-len(self._examples) // self.batch_size)
        return max(1, len(self._examples) // self.batch_size)

    def batch(self, step: int) -> Batch:
        return self.rows(step, slice(None))

    def rows(self, step: int, rows: slice) -> Batch:
        count = len(self._examples)
        numbers = step * self.batch_size + np.arange(self.batch_size)[rows]
        if self._seed is None:
            return self._stacked(np.minimum(numbers, count - 1), numbers < count)
        indices = sampling.example_indices(self._seed, numbers, count)
        return self._stacked(indices, np.ones(len(indices), bool))

    def _stacked(self, indices: np.ndarray, in_loss: np.ndarray) -> Batch:
        examples = [self._examples[int(i)] for i in indices]
        first = examples[0]
        if not isinstance(first, dict):
            raise TypeError(
                f"example {indices[0]} is a {type(first).__name__}, not a dict of arrays"
            )
        batch: Batch = {}
        for name in first:
            arrays = [np.asarray(example[name]) for example in examples]
            for i, array in zip(indices, arrays, strict=True):
                if array.shape != arrays[0].shape:
                    raise ValueError(
                        f"{name!r} of example {i} has the shape {array.shape}, but in example "
                        f"{indices[0]} {arrays[0].shape}; pad them to one shape"
                    )
            batch[name] = np.stack(arrays)
        if not in_loss.all():
            like = batch.get("weights")
            if like is None:
                like = np.ones(batch.get("targets", in_loss).shape, np.float32)
            in_loss = in_loss.reshape(-1, *(1,) * (like.ndim - 1))
            batch["weights"] = np.where(in_loss, like, 0).astype(np.float32)
        elif self._seed is None and "weights" not in batch:
            shape = batch["targets"].shape if "targets" in batch else in_loss.shape
            batch["weights"] = np.ones(shape, np.float32)
        return batch

    def one_pass(self) -> Dataset:
        return ExampleBatches(self._examples, batch_size=self.batch_size, seed=None)


def _fingerprint(examples: BaseDataset) -> str:
    """Returns a fingerprint for examples without one: of their number, and the first and last."""
    digest = hashlib.sha256(str(len(examples)).encode())
    for number in (0, len(examples) - 1):
        example = examples[number]
        for name, value in sorted(example.items()) if isinstance(example, dict) else ():
            array = np.ascontiguousarray(value)
            digest.update(f"{name} {array.dtype} {array.shape}\0".encode() + array.tobytes())
    return digest.hexdigest()


class OwnDataset(Dataset):
    """A dataset of the user's own, with the recipe by which worker processes build it.

    Args:
      data: the dataset.
      recipe: see `Dataset`.
    """

    def __init__(self, data: Dataset, recipe: Recipe):
        super().__init__(DatasetInfo.of(data))
        self.data, self.batch_size, self.recipe = data, data.batch_size, recipe

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, step: int) -> Batch:
        return self.data.batch(step)

    def rows(self, step: int, rows: slice) -> Batch:
        return self.data.rows(step, rows)

    def one_pass(self) -> Dataset:
        once = self.data.one_pass()
        return self if once is self.data else once

    def place(self, step: int, row: int, position: int) -> str:
        return self.data.place(step, row, position)


def build(recipe: Recipe) -> OwnDataset:
    """Builds one split of a dataset of the user's own.

    Raises:
      ConfigError: the class cannot be used.
    """
    cls: Any = plugins.load(recipe.reference, "data.dataset", (Dataset, BaseDataset))
    try:
        data = cls(recipe.config, recipe.split, recipe.seed)
    except TypeError as error:
        raise ConfigError(
            f"data.dataset={recipe.reference} is built as Class(config, split, seed): {error}"
        ) from error
    except UsageError as error:  # A tokenizer raises it for text that it cannot encode.
        raise DataError(f"data.dataset={recipe.reference}: {error}") from error
    if isinstance(data, BaseDataset):
        seed = recipe.seed if recipe.split == "train" else None
        data = ExampleBatches(data, batch_size=recipe.config.batch_size, seed=seed)
    return OwnDataset(data, recipe)
