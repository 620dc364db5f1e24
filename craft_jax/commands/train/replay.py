"""train --replay_step=N: makes one step of a run again and shows it; writes nothing.

The run is restored from its newest checkpoint before that step, and trained up to it.
"""

import logging
from collections.abc import Callable

import jax
import numpy as np

from craft_jax.config import ExperimentConfig
from craft_jax.errors import OK, UsageError
from craft_jax.models.base import ModelDef
from craft_jax.outputs import RunPaths
from craft_jax.training import bad_steps, step
from craft_jax.training.callbacks import Callback, StepRecord, Stop
from craft_jax.training.precision import Policy
from craft_jax.training.state import TrainState
from craft_jax.training.trainer import Trainer

logger = logging.getLogger(__name__)

_SHOWN = 20


def run(number: int, config: ExperimentConfig, paths: RunPaths, assemble: Callable) -> int:
    """Replays a step.

    Args:
      number: of the step, from 1.
      config, paths: of the run.
      assemble: given callbacks, returns a trainer that stands where the newest checkpoint before
        the step does, and that saves nothing.

    Raises:
      UsageError: the run has no such step.
    """
    if not 1 <= number <= config.training.num_steps:
        raise UsageError(
            f"--replay_step={number}: run {paths.name} has steps 1 to {config.training.num_steps}"
        )
    replay = _Replay(number)
    trainer: Trainer = assemble([replay])
    first = int(trainer.state.step)
    logger.info("replaying steps %d to %d of %s; nothing is written", first + 1, number, paths.name)
    if first == number - 1:
        replay.state = jax.tree.map(lambda leaf: leaf.copy(), trainer.state)
    trainer.fit()
    assert replay.record is not None
    _show(config, trainer, replay)
    return OK


class _Replay(Callback):
    """Keeps the state before the step, and stops after it."""

    def __init__(self, number: int):
        self._number = number
        self.state: TrainState | None = None
        self.record: StepRecord | None = None

    def wants_state(self, step: int, is_last: bool) -> bool:
        return step in (self._number - 1, self._number)

    def on_step_end(self, record: StepRecord) -> None:
        logger.info(
            "step %d: loss %s, gradient norm %s, learning rate %.6g%s",
            record.step,
            record.metrics["loss"],
            record.metrics["grad_norm"],
            record.metrics["learning_rate"],
            ", update skipped" if record.metrics["skipped"] else "",
        )
        if record.step == self._number:
            self.record = record

    def on_sync(self, record: StepRecord) -> Stop | None:
        if record.step == self._number:
            return Stop("the replay")
        self.state = jax.tree.map(lambda leaf: leaf.copy(), record.state)
        return None


def _show(config: ExperimentConfig, trainer: Trainer, replay: _Replay) -> None:
    """Prints the batch, and the gradient of each parameter."""
    data, record, state = trainer.train_data, replay.record, replay.state
    assert record is not None
    assert state is not None
    assert record.batch_index is not None
    batch = data.batch(record.batch_index)
    logger.info("batch %d:\n%s", record.batch_index, bad_steps.describe(batch, data))
    norms = gradient_norms(config, trainer.model_def, state, batch)
    bad = [path for path, norm in norms.items() if not np.isfinite(norm)]
    logger.info(
        "gradients: %d of %d parameters are not finite%s",
        len(bad),
        len(norms),
        "".join(f"\n  {path}" for path in bad[:_SHOWN]),
    )
    largest = sorted(set(norms) - set(bad), key=norms.__getitem__, reverse=True)[:_SHOWN]
    for path in largest:
        logger.info("  %-50s norm %.6g", path, norms[path])


def gradient_norms(
    config: ExperimentConfig, model_def: ModelDef, state: TrainState, batch: dict
) -> dict[str, float]:
    """Returns the norm of the gradient of the mean loss by path, for a batch as a whole."""
    policy = Policy.named(config.training.precision)

    @jax.jit
    def norms(state: TrainState, batch: dict) -> dict[str, jax.Array]:
        key = jax.random.fold_in(step.step_key(config.training.seed), state.step)

        def loss(params: dict) -> jax.Array:
            sums = model_def.merge(policy.cast(params)).loss(batch, key=key)
            return sums.loss / sums.weight

        return jax.tree.map(jax.numpy.linalg.norm, jax.grad(loss)(state.params))

    return {path: float(norm) for path, norm in norms(state, batch).items()}
