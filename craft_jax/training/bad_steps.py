"""Records of bad steps: the number and the content of their batches."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from craft_jax import outputs
from craft_jax.data.base import Dataset
from craft_jax.errors import CraftError
from craft_jax.training.callbacks import Callback, StepRecord

logger = logging.getLogger(__name__)

_MOST = 100


class BadStepFiles(Callback):
    """Leaves a file for each skipped update that was no overflow of float16.

    Args:
      folder: where the files go.
      describe: returns the content of a batch as text, by its number.
    """

    def __init__(self, folder: Path, describe: Callable[[int], str]):
        self._folder, self._describe = folder, describe

    def on_step_end(self, record: StepRecord) -> None:
        metrics, batch = record.metrics, record.batch_index
        if not metrics["skipped"] or "loss_scale" in metrics or batch is None:
            return
        facts = {"step": record.step, "batch": batch} | {
            name: repr(metrics[name]) for name in ("loss", "grad_norm", "learning_rate")
        }
        text = f"{json.dumps(facts)}\n{self._describe(batch)}\n"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if sum(1 for _ in self._folder.iterdir()) < _MOST:
                outputs.write_text(self._folder / f"step_{record.step}.txt", text)
        except (OSError, CraftError) as error:  # The run is worth more than this note.
            logger.warning("the batch of step %d is not written down: %s", record.step, error)


def describe(batch: Mapping[str, np.ndarray], data: Dataset) -> str:
    """Returns the content of a batch: its text, row by row, or the size of each array."""
    if data.tokenizer is None or "tokens" not in batch:
        return "\n".join(
            f"{name}: {array.dtype} {list(array.shape)}, from {array.min()} to {array.max()}"
            for name, array in sorted(batch.items())
        )
    lines = []
    for number, ids in enumerate(batch["tokens"]):
        text = data.tokenizer.decode([*ids, batch["targets"][number, -1]])
        if "source" in batch:
            source = batch["source"][number][batch["source_mask"][number]]
            text = f"{data.tokenizer.decode(source)} -> {text}"
        lines.append(f"row {number}: {text!r}")
    return "\n".join(lines)
