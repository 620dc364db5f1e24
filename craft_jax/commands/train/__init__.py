"""train: from a config to a trained run. This page shows the way of the data.

config -> session -> data -> model -> train step -> trainer -> outputs
"""

import argparse
import logging
import time
from collections.abc import Mapping
from typing import Any

from craft_jax.commands import report, visualize
from craft_jax.commands.train import build, checks, replay
from craft_jax.commands.train.callback_choice import make_callbacks
from craft_jax.commands.train.session import Session, shell_command
from craft_jax.errors import OK, UsageError
from craft_jax.generation import previews
from craft_jax.generation.previews import Sampler
from craft_jax.outputs import RunPaths
from craft_jax.parallel import sharding
from craft_jax.runtime.logging import side_task
from craft_jax.training.state import TrainState
from craft_jax.training.trainer import Trainer

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> int:
    """Trains a new run, or continues the one that `--run` names."""
    if args.coordinator is None and (args.num_processes, args.process_id) != (None, None):
        raise UsageError("`num_processes` and `process_id` need `coordinator=HOST:PORT`")
    if args.replay_step is not None:
        return replay.run(args)
    with Session.open(args) as session:
        if session.is_finished:
            return OK
        config, mesh = session.config, session.mesh
        datasets = session.open_datasets()
        model_def = build.define_model(config, datasets.train)
        checks.check_feasible(config, model_def, datasets, mesh)
        paths = session.open_run(model_def)
        sampler = previews.make(config, model_def, datasets)

        train_step = build.build_train_step(config, model_def, mesh, session.wrap_step)
        # While it compiles, the state is read or initialized.
        train_step.compile_ahead(lambda: datasets.train.batch(0))
        manager = build.make_checkpoint_manager(
            config, paths, datasets.train, train_step, session.group
        )
        state, meta = manager.restore(is_verified=True) or session.first_state(train_step)
        watchdog = session.make_watchdog()
        trainer = Trainer(
            train_step,
            build.make_feed(config, datasets.train, mesh),
            config.training,
            evaluator=build.make_evaluator(config, model_def, mesh),
            val_data=datasets.val,
            callbacks=make_callbacks(session, paths, sampler, datasets.train),
            manager=manager,
            stop_signal=session.stop_flag,
            watchdog=watchdog,
        )
        state_bytes = sharding.bytes_on_one_device(state)
        report.header(config, model_def, datasets, mesh, paths, state_bytes)
        session.report_changes(state)

        start = time.monotonic()
        with watchdog.watching():
            state, result = trainer.fit(state, meta)
        if result.step < config.training.num_steps:
            return session.end_early(result)
        logger.info("trained to step %d in %.0f s", result.step, time.monotonic() - start)
        _finish(session, paths, sampler, state, result.metrics)
        return session.end()


def _finish(
    session: Session,
    paths: RunPaths,
    sampler: Sampler | None,
    state: TrainState,
    metrics: Mapping[str, Any],
) -> None:
    """Writes a longer sample and a picture, and says where everything is."""
    if not session.group.is_first:
        if sampler:
            previews.look_on(state)
        return
    if sampler:
        with side_task("the last sample"):
            report.sample(int(state.step), sampler(state, is_last=True), paths.samples)
    picture = None
    with side_task("the picture of the curves"):
        picture = visualize.draw_runs([paths])
    source = sampler.source if sampler else None
    report.ending(metrics, session.config.training.num_steps, paths, picture, shell_command, source)
