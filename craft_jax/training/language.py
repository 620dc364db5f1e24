"""Training language models: what is about tokens, and nothing else."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from craft_jax.data.base import Dataset
from craft_jax.models.base import EncoderDecoderModel, LanguageModel, Model
from craft_jax.training import metrics
from craft_jax.training.trainer import Trainer


class LanguageModelTrainer(Trainer):
    """A trainer that counts tokens, and knows perplexity and bits per byte, or per dimension."""

    unit = "tokens"

    def count(self, batch: Mapping[str, np.ndarray]) -> int:
        return batch["tokens"].size

    @staticmethod
    def evaluation_metrics(sums: Mapping[str, float], data: Dataset) -> dict[str, Any]:
        if data.image_format is not None:
            return metrics.from_pixel_sums(**sums, channels=data.image_format.channels)
        return metrics.from_sums(**sums, num_bytes=data.num_bytes)


class Seq2SeqTrainer(LanguageModelTrainer):
    """A trainer of models that read a source: their losses are `PairSums`."""

    counts_alone = False

    def count(self, batch: Mapping[str, np.ndarray]) -> int:
        return int(batch["source_mask"].sum() + (batch["weights"] > 0).sum())

    @staticmethod
    def evaluation_metrics(sums: Mapping[str, float], data: Dataset) -> dict[str, Any]:
        return metrics.from_pair_sums(**sums)


def trainer_for(model_class: type[Model]) -> type[Trainer]:
    """Returns the trainer class that fits a model class."""
    if issubclass(model_class, EncoderDecoderModel):
        return Seq2SeqTrainer
    return LanguageModelTrainer if issubclass(model_class, LanguageModel) else Trainer
