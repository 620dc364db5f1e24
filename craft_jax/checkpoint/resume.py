"""Resuming a run: chooses the checkpoint, checks the data, reports changes since."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from craft_jax import config as configs
from craft_jax import runs
from craft_jax.checkpoint import manager
from craft_jax.checkpoint.store import CheckpointStore
from craft_jax.config import ExperimentConfig
from craft_jax.data.base import Dataset
from craft_jax.data.pipeline import is_tokenizer_path
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import ConfigError, DataError, StorageError
from craft_jax.outputs import RunPaths
from craft_jax.runtime import environment
from craft_jax.training import optim

logger = logging.getLogger(__name__)


def is_untrained(paths: RunPaths) -> bool:
    """Returns whether a run has no checkpoint at all, not even a damaged one."""
    store = CheckpointStore(paths.checkpoints)
    return not (store.steps() or store.damaged() or store.corrupt())


def choose(paths: RunPaths, config: ExperimentConfig) -> int | None:
    """Removes unfinished saves, and returns the step to resume from; None to begin at step 0.

    Raises:
      StorageError: there are checkpoints, but all are damaged.
    """
    store = CheckpointStore(paths.checkpoints)
    removed = store.remove_leftovers()
    for name in store.foreign():
        logger.warning("%s is not a checkpoint; it is left alone", store.folder / name)
    if config.checkpoint.resume == "none":
        for place in store.set_aside():
            logger.info("beginning again: the checkpoint is set aside as %s", place)
        return None
    step = manager.read_latest(store, config.checkpoint.verify, lambda step: step)
    lost = f"; step {', '.join(map(str, removed))} was incomplete and has been removed"
    lost = lost if removed else ""
    if step is not None:
        logger.info(
            "resuming from step %d (%s%s)", step, _how_verified(config.checkpoint.verify), lost
        )
    elif config.checkpoint.resume == "must":
        raise StorageError(
            f"checkpoint.resume=must: run {paths.name} has no checkpoint; leave it out to begin at "
            "step 0"
        )
    else:
        logger.info("no checkpoint yet: beginning at step 0%s", lost)
    return step


def _how_verified(level: str) -> str:
    return {"full": "every checksum is right", "fast": "sizes are right"}.get(level, "not verified")


def is_finished(paths: RunPaths, step: int, config: ExperimentConfig) -> bool:
    """Returns whether a run is complete: its last step is done, or a callback ended it."""
    store = CheckpointStore(paths.checkpoints)
    meta = store.meta(step)
    if meta.get("ended") and store.config(step) == lasting(config).to_json():
        return True
    return step >= config.training.num_steps and not meta.get("is_open", False)


def lasting(config: ExperimentConfig) -> ExperimentConfig:
    """Returns the config to store: `checkpoint.resume` holds for one command only."""
    return dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, resume="auto")
    )


def check_tokenizer(paths: RunPaths, config: ExperimentConfig, own: Tokenizer) -> None:
    """Checks that the tokenizer file of a config is still the tokenizer of the run.

    Raises:
      ConfigError: it is not; names both digests.
    """
    name = config.data.tokenizer
    if not name or not is_tokenizer_path(name):
        return
    try:
        now = Tokenizer.load(name)
    except DataError:
        return  # The run has a copy of its own.
    if now.digest != own.digest:
        raise ConfigError(
            f"data.tokenizer={name} has changed: its digest is {now.digest[:16]}, and that of the "
            f"tokenizer of run {paths.name} is {own.digest[:16]}; bring the old file back, or "
            "start another `run`"
        )


def check_data(
    store: CheckpointStore, step: int, data: Dataset, config: ExperimentConfig, run: str
) -> dict[str, Any]:
    """Checks that the data is the data of a checkpoint, and returns the checkpoint's meta.

    Raises:
      ConfigError: it is other data, and `data.allow_change` is not set.
    """
    meta, saved = store.meta(step), store.config(step)["data"]
    shape = ("batch_size", "seq_len")
    is_cut_alike = all(saved.get(name) == getattr(config.data, name) for name in shape)
    if meta["data_fingerprint"] is None:  # An imported model has seen no data.
        return meta
    if meta["data_fingerprint"] == data.fingerprint and is_cut_alike:
        return meta
    fields = config.data
    what = next(
        f"data.{name}={getattr(fields, name)}"
        for name in ("dataset", "pairs", "path", "source")
        if getattr(fields, name)
    )
    if not fields.allow_change:
        raise ConfigError(
            f"{what}: the data of run {run} has changed since step {step}: its text, tokenizer or "
            "split is another one; bring the old text back, start another `run`, or accept it with "
            "`config.data.allow_change`"
        )
    logger.warning(
        "%s: the data has changed since step %d; its batches are counted from 0 again", what, step
    )
    return meta | {"data_start": step}


def report_changes(paths: RunPaths, config: ExperimentConfig, step: int) -> None:
    """Logs the settings and the environment that changed since the run was last trained."""
    if not paths.config.exists():  # The first process was killed before it wrote its config.
        return
    saved = runs.saved_config(paths)
    for part in configs.changes(saved, config):
        for change in part:
            logger.info("changed: %s from %s to %s", change.field, change.saved, change.now)
            if change.field.startswith("parallel."):
                logger.warning("not bit-exact: %s %s -> %s", *change)
    before = saved["training"]["num_steps"]
    if before != config.training.num_steps and config.optim.decay_steps is None:
        old, new = (
            float(optim.make_schedule(config.optim, length)(jnp.int32(step)))
            for length in (before, config.training.num_steps)
        )
        if old != new:
            logger.info(
                "schedule horizon changed %d -> %d, lr at step %d goes %.1e -> %.1e",
                before,
                config.training.num_steps,
                step + 1,
                old,
                new,
            )
    store = CheckpointStore(paths.checkpoints)
    saved_environment = store.meta(step).get("environment") if step in store.steps() else None
    if saved_environment:
        for difference in _differences(saved_environment, environment.environment()):
            logger.warning("not bit-exact: %s", difference)
    logger.info("continuing %s at step %d", paths.name, step)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name, value in now.items():
        if isinstance(value, Mapping):
            yield from _differences(before.get(name, {}), value)
        elif name in before and before[name] != value:
            yield f"{name} {before[name]} -> {value}"
