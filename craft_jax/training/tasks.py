"""Tasks: what kinds of models count as a unit of throughput, and which metrics they have."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from craft_jax.data.base import Dataset
from craft_jax.models.base import EncoderDecoderModel, LanguageModel, Model
from craft_jax.training import metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of data, as the trainer sees it.

    Attributes:
      unit: what is counted for the throughput: `tokens`, `examples`.
      count: returns how many units a batch holds.
      count_scales_with_rows: whether the count of some rows gives that of all, by their number.
      metrics: returns the metrics of a split, from the sums of an `Evaluator` over it.
    """

    unit: str
    count: Callable[[Mapping[str, np.ndarray]], int]
    count_scales_with_rows: bool
    metrics: Callable[[Mapping[str, float], Dataset], dict[str, Any]]


def _language_metrics(sums: Mapping[str, float], data: Dataset) -> dict[str, Any]:
    if data.image_format is not None:
        return metrics.from_pixel_sums(**sums, channels=data.image_format.channels)
    return metrics.from_sums(**sums, num_bytes=data.num_bytes)


EXAMPLES = Task(
    unit="examples",
    count=lambda batch: len(next(iter(batch.values()))),
    count_scales_with_rows=True,
    metrics=lambda sums, data: metrics.from_mean(loss=sums["loss"], weight=sums["weight"]),
)
LANGUAGE = Task(
    unit="tokens",
    count=lambda batch: batch["tokens"].size,
    count_scales_with_rows=True,
    metrics=_language_metrics,
)
PAIRS = Task(
    unit="tokens",
    count=lambda batch: int(batch["source_mask"].sum() + (batch["weights"] > 0).sum()),
    count_scales_with_rows=False,
    metrics=lambda sums, data: metrics.from_pair_sums(**sums),
)


def task_of(model_class: type[Model]) -> Task:
    """Returns the task of a model class."""
    if issubclass(model_class, EncoderDecoderModel):
        return PAIRS
    return LANGUAGE if issubclass(model_class, LanguageModel) else EXAMPLES
