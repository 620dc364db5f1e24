"""Examples by number to batches by number: the datasets of the user's own, and two to build on.

A `BaseDataset` flows in; batches flow out, each epoch shuffled by the seed.
"""

import hashlib
import logging
from typing import Any

import numpy as np

from craft_jax import plugins
from craft_jax.data import sampling, tokenizers
from craft_jax.data.base import BaseDataset, Batch, Dataset, Recipe
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import ConfigError, DataError, UsageError

logger = logging.getLogger(__name__)


class TextDataset(BaseDataset):
    """Windows of a text, side by side; the last is padded.

    Args:
      text: what to cut up.
      tokenizer: of its ids.
      seq_len: T, tokens of a window.

    Raises:
      DataError: the text has fewer than two tokens.
      UsageError: it has characters that have no id.
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
      text: what to cut up.
      seq_len: T, characters of a window.
      alphabet: the vocabulary; None for the characters of the text. Give both splits the same.
    """

    def __init__(self, text: str, seq_len: int, alphabet: str | None = None):
        characters = tokenizers.characters(alphabet or text, end_token=False)
        super().__init__(text, characters, seq_len)


class ExampleBatches(Dataset):
    """Batches of examples.

    Args:
      examples: at least one.
      batch_size: B.
      seed: of the order of training batches, without end; None for one pass in order, whose last
        batch is filled up with rows whose `weights` are 0.

    Raises:
      DataError: there is no example.
    """

    def __init__(self, examples: BaseDataset, *, batch_size: int, seed: int | None):
        if not len(examples):
            raise DataError(f"{type(examples).__name__} has no example; it needs one at least")
        self._examples, self.batch_size, self._seed = examples, batch_size, seed
        for name in ("vocab_size", "tokenizer", "num_bytes", "image_format", "name"):
            if hasattr(examples, name):
                setattr(self, name, getattr(examples, name))
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
        places = sampling.places(self._seed, numbers, count)
        return self._stacked(places, np.ones(len(places), bool))

    def _stacked(self, places: np.ndarray, counts: np.ndarray) -> Batch:
        examples = [self._examples[int(place)] for place in places]
        first = examples[0]
        if not isinstance(first, dict):
            raise TypeError(
                f"example {places[0]} is a {type(first).__name__}, not a dict of arrays"
            )
        batch: Batch = {}
        for name in first:
            arrays = [np.asarray(example[name]) for example in examples]
            for place, array in zip(places, arrays, strict=True):
                if array.shape != arrays[0].shape:
                    raise ValueError(
                        f"{name!r} of example {place} has the shape {array.shape}, and that of "
                        f"example {places[0]} {arrays[0].shape}; pad them to one"
                    )
            batch[name] = np.stack(arrays)
        if not counts.all():
            like = batch.get("weights")
            if like is None:
                like = np.ones(batch.get("targets", counts).shape, np.float32)
            counts = counts.reshape(-1, *(1,) * (like.ndim - 1))
            batch["weights"] = np.where(counts, like, 0).astype(np.float32)
        elif self._seed is None and "weights" not in batch:
            shape = batch["targets"].shape if "targets" in batch else counts.shape
            batch["weights"] = np.ones(shape, np.float32)
        return batch

    def one_pass(self) -> Dataset:
        return ExampleBatches(self._examples, batch_size=self.batch_size, seed=None)


def _fingerprint(examples: BaseDataset) -> str:
    """Returns what identifies examples that do not say it: how many, and the outermost."""
    digest = hashlib.sha256(str(len(examples)).encode())
    for number in (0, len(examples) - 1):
        example = examples[number]
        for name, value in sorted(example.items()) if isinstance(example, dict) else ():
            array = np.ascontiguousarray(value)
            digest.update(f"{name} {array.dtype} {array.shape}\0".encode() + array.tobytes())
    return digest.hexdigest()


def build(recipe: Recipe) -> Dataset:
    """Builds one split of a dataset of the user's own.

    Raises:
      ConfigError: the class cannot be used.
    """
    cls: Any = plugins.load(recipe.reference, "data.dataset", (Dataset, BaseDataset))
    try:
        made = cls(recipe.config, recipe.split, recipe.seed)
    except TypeError as error:
        raise ConfigError(
            f"data.dataset={recipe.reference} is built as Class(config, split, seed): {error}"
        ) from error
    except UsageError as error:  # Of a tokenizer: it is the data that does not fit.
        raise DataError(f"data.dataset={recipe.reference}: {error}") from error
    if isinstance(made, BaseDataset):
        seed = recipe.seed if recipe.split == "train" else None
        made = ExampleBatches(made, batch_size=recipe.config.batch_size, seed=seed)
    made.recipe = recipe
    return made
