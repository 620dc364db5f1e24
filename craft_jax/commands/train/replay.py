"""train --replay_step=N: makes one step of a run again and shows it; writes nothing.

The run is restored from its newest checkpoint before that step, and trained up to it.
"""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from craft_jax import runs
from craft_jax.checkpoint.store import CheckpointStore
from craft_jax.commands.train import build, config_choice
from craft_jax.commands.train.session import workdir_of
from craft_jax.config import ExperimentConfig
from craft_jax.data import pipeline
from craft_jax.data.base import Dataset
from craft_jax.errors import OK, UsageError
from craft_jax.models.base import ModelDef
from craft_jax.outputs import RunPaths
from craft_jax.parallel import sharding
from craft_jax.runtime import compilation_cache
from craft_jax.runtime.logging import setup_logging
from craft_jax.training import bad_steps, step
from craft_jax.training.callbacks import Callback, StepRecord, Stop
from craft_jax.training.compiled_step import CompiledStep
from craft_jax.training.precision import Policy
from craft_jax.training.state import TrainState
from craft_jax.training.trainer import Trainer

logger = logging.getLogger(__name__)

_SHOWN = 20


def run(args: argparse.Namespace) -> int:
    """Replays a step.

    Raises:
      UsageError: the run has no such step.
    """
    number, workdir = args.replay_step, workdir_of(args)
    setup_logging()
    compilation_cache.enable_compilation_cache()
    if args.coordinator:
        raise UsageError("`replay_step` is for one process; leave `coordinator` out")
    paths = config_choice.existing(args.run, workdir)
    config, origin = config_choice.choose_config(args, paths, workdir)
    if paths is None:
        raise UsageError(f"`replay_step={number}` needs the `run` whose step it is")
    if not 1 <= number <= config.training.num_steps:
        raise UsageError(
            f"`replay_step={number}`: run {paths.name} has steps 1 to {config.training.num_steps}"
        )
    store = CheckpointStore(paths.checkpoints)
    newest, _ = store.newest_good()
    before, _ = store.newest_good(below=number)
    # A trainer that runs meanwhile does not remove it.
    pin = None if before is None else store.pin(before)
    mesh = sharding.make_mesh(config.parallel, jax.devices())
    data = pipeline.open_datasets(
        config.data,
        workdir=workdir,
        seed=config.training.seed,
        tokenizer=config_choice.tokenizer(config, paths, newest, origin),
    ).train
    model_def = build.define_model(config, data)
    train_step = build.build_train_step(config, model_def, mesh)
    train_step.compile_ahead(lambda: data.batch(0))
    if before:
        manager = build.make_checkpoint_manager(config, paths, data, train_step)
        state, meta = manager.restore_step(before)
    else:
        state, meta = _first_state(config, origin, train_step, workdir), {}
    del pin
    _replay(number, config, paths, data, train_step, state, meta)
    return OK


def _first_state(
    config: ExperimentConfig,
    origin: config_choice.Origin | None,
    train_step: CompiledStep,
    workdir: Path,
) -> TrainState:
    if origin is None and config.init_from:
        origin = config_choice.Origin(*runs.weights(config.init_from, workdir))
    if origin is None:
        return train_step.init_state(config.model_class, config.training.seed)
    shapes = train_step.abstract_state.params
    return train_step.state_from_params(origin.run.store.read_params(origin.run.step, shapes))


def _replay(
    number: int,
    config: ExperimentConfig,
    paths: RunPaths,
    data: Dataset,
    train_step: CompiledStep,
    state: TrainState,
    meta: Mapping[str, Any],
) -> None:
    replay, first = _Replay(number), int(state.step)
    logger.info("replaying steps %d to %d of %s; nothing is written", first + 1, number, paths.name)
    if first == number - 1:
        replay.state = jax.tree.map(lambda leaf: leaf.copy(), state)
    trainer = Trainer(
        train_step,
        build.make_feed(config, data, train_step.mesh),
        config.training,
        evaluator=build.make_evaluator(config, train_step.model_def, train_step.mesh),
        val_data=None,
        callbacks=[replay],
    )
    trainer.fit(state, meta)
    _show(config, train_step.model_def, data, replay)


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


def _show(config: ExperimentConfig, model_def: ModelDef, data: Dataset, replay: _Replay) -> None:
    """Prints the batch, and the gradient of each parameter."""
    record, state = replay.record, replay.state
    assert record is not None
    assert state is not None
    assert record.batch_index is not None
    batch = data.batch(record.batch_index)
    logger.info("batch %d:\n%s", record.batch_index, bad_steps.describe(batch, data))
    norms = gradient_norms(config, model_def, state, batch)
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
