"""The kinds of models that one trainer trains, small, for tests that hold for all of them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from craft_jax.data.images.datasets import open_images
from craft_jax.data.images.pixels import ImageProcessor
from craft_jax.data.images.sources import digits
from craft_jax.models.base import Model
from craft_jax.models.flow import Flow, FlowConfig
from craft_jax.models.gpt import GPT, GPTConfig
from tests.conftest import MICRO, ROOT, overrides


class Kind(NamedTuple):
    """A kind of model.

    Attributes:
      cls, config: the model, without dropout.
      batch: from a seed and a number of rows to a batch without `weights`.
      weights_shape: of a row's weights.
      first_loss: about what a fresh model has.
      file: its config file.
      overrides: what makes that small, and its data `text_file` where it needs any.
    """

    cls: type[Model]
    config: Any
    batch: Callable[[int, int], dict[str, np.ndarray]]
    weights_shape: tuple[int, ...]
    first_loss: float
    file: str
    overrides: Callable[[Path], dict[str, Any]]


def _text(seed: int, rows: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, 16, (rows, 9)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


@functools.cache
def _images(rows: int, num_colors: int | None) -> Any:
    options = {"val_fraction": 0.1, "test_fraction": 0.0, "batch_size": rows, "seed": 0}
    processor = ImageProcessor(channels=1)
    return open_images(digits(), **options, processor=processor, num_colors=num_colors)["train"]


def _batch_of(num_colors: int | None) -> Callable[[int, int], dict[str, np.ndarray]]:
    def batch(seed: int, rows: int) -> dict[str, np.ndarray]:
        made = _images(rows, num_colors).batch(seed)
        return {name: array for name, array in made.items() if name != "weights"}

    return batch


_SMALL = {"model.num_layers": 1, "model.num_heads": 2, "model.d_model": 16}
_SIZES = {"num_layers": 2, "num_heads": 2, "d_model": 16}

KINDS: dict[str, Kind] = {
    "gpt": Kind(
        GPT,
        GPTConfig(vocab_size=16, max_seq_len=8, **_SIZES),
        _text,
        (8,),
        np.log(16),
        "configs/gpt.py",
        lambda text_file: (
            _SMALL
            | {
                "model.max_seq_len": 16,
                "data.seq_len": 16,
                "data.tokenizer": "char",
                "data.val_fraction": 0.1,
                "data.path": text_file,
            }
        ),
    ),
    "image_gpt": Kind(
        GPT,
        GPTConfig(vocab_size=27, max_seq_len=64, **_SIZES),
        _batch_of(17),
        (64,),
        np.log(27),
        "configs/image_gpt.py",
        lambda text_file: _SMALL,
    ),
    "flow": Kind(
        Flow,
        FlowConfig(height=8, width=8, channels=1, num_classes=10, patch_size=4, **_SIZES),
        _batch_of(None),
        (),
        1.75,
        "configs/flow.py",
        lambda text_file: _SMALL | {"model.patch_size": 4},
    ),
}

_RUN = {k: v for k, v in MICRO.items() if k == "data.batch_size" or k.startswith("training.")}


def command_words(kind: str, text_file: Path, **changes: object) -> list[str]:
    """Returns the words that train a kind of model in seconds.

    Changes are given with `__` for the dot: `training__num_steps=3`.
    """
    values = _RUN | KINDS[kind].overrides(text_file)
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return [f"--config={ROOT / KINDS[kind].file}", *overrides(values)]
