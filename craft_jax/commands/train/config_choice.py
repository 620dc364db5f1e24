"""Choosing what a run is: its config, what it begins with, and that all processes agree on it."""

import argparse
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from craft_jax import config as configs
from craft_jax import outputs, plugins, runs
from craft_jax.checkpoint import resume
from craft_jax.checkpoint.store import CheckpointStore
from craft_jax.config import ExperimentConfig, Override, Weights
from craft_jax.data.base import Dataset
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import ConfigError, DataError, UsageError
from craft_jax.outputs import RunPaths
from craft_jax.parallel.processes import ProcessGroup
from craft_jax.training.callbacks import Callback

logger = logging.getLogger(__name__)


def existing(name: str | None, workdir: Path) -> RunPaths | None:
    """Returns the run of a name or path; None where there is none.

    Raises:
      UsageError: it is a checkpoint.
    """
    if name is None or not runs.exists(name, workdir):
        return None
    folder, step = runs.locate(name, workdir)
    if step is not None:
        raise UsageError(
            f"`run={name}` is a checkpoint; training continues from the newest: `run={folder.name}`"
        )
    return outputs.open_run(folder)


class Origin(NamedTuple):
    """Weights that a new run begins with."""

    run: runs.Run
    given: Weights


def choose_config(
    args: argparse.Namespace, found: RunPaths | None, workdir: Path
) -> tuple[ExperimentConfig, Origin | None]:
    """The config of the command line, which a run that exists must agree with.

    Returns:
      The config and, for a run with `init_from` that has no checkpoint yet, what it begins with.
    """
    overrides = list(args.overrides)
    if args.tokenizer:
        overrides.append(Override("data.tokenizer", args.tokenizer))
    if found is not None and not resume.is_untrained(found):
        config = _config_of(found, args.config, overrides)
        begins_again = config.checkpoint.resume == "none" and config.init_from
        return config, Origin(*runs.weights(config.init_from, workdir)) if begins_again else None
    if found is None and args.config is None:
        missing = f"there is no run {args.run} below {args.workdir}; " if args.run else ""
        raise UsageError(f"{missing}a new run needs a config: `config=configs/gpt.py`")
    if found is None and args.run is not None:
        outputs.check_name(args.run)
    saved = runs.saved_config(found) if args.config is None else None
    origins: list[Origin] = []

    def weights(init_from: str | None) -> Weights | None:
        if init_from is None:
            return None
        origins.append(Origin(*runs.weights(init_from, workdir)))
        return origins[0].given

    config = configs.load(args.config, overrides, saved, weights)
    if not origins:
        return config, None
    run = origins[0].run
    return dataclasses.replace(config, init_from=str(run.store.folder / str(run.step))), origins[0]


def _config_of(found: RunPaths, file: str | None, overrides: list[Override]) -> ExperimentConfig:
    """The config that a run is continued with."""
    saved = runs.saved_config(found)
    store = CheckpointStore(found.checkpoints)
    step = store.latest()
    # An imported run was never trained: all but its model is free until it is.
    is_fresh = step is not None and not store.has_optimizer(step)

    def weights(init_from: str | None) -> Weights | None:
        if not is_fresh and saved.get("init_from") is None:
            return None
        return Weights(f"run {found.name}", saved["model"], saved["data"]["tokenizer"])

    config = configs.load(file, overrides, saved, weights)
    if saved.get("init_from") and config.init_from:
        config = dataclasses.replace(config, init_from=_same_place(config, saved, found.workdir))
    _, refused = configs.changes(saved, config)
    if config.checkpoint.resume == "none":
        refused = []
    if refused and not is_fresh:
        raise ConfigError(
            [
                f"{c.field}={c.now} differs from {c.saved}, with which run {found.name} began; "
                "leave it, or start another `run`"
                for c in refused
            ]
        )
    return config


def _same_place(config: ExperimentConfig, saved: Mapping[str, Any], workdir: Path) -> str:
    """Returns `init_from` as it was saved, if it means the same run."""
    before = Path(saved["init_from"])
    named = [config.init_from, str(workdir / "models" / config.init_from)]
    places = {Path(name).expanduser().absolute() for name in named}
    if config.init_from == "latest" or places & {before, before.parent.parent}:
        return saved["init_from"]
    return config.init_from


def tokenizer(
    config: ExperimentConfig, found: RunPaths | None, step: int | None, origin: Origin | None
) -> Tokenizer | None:
    """Returns the tokenizer that the run has already, if it has one."""
    config.check_pairs()
    tokenizer = None
    if found and step is not None:
        file = CheckpointStore(found.checkpoints).tokenizer_file(step)
        tokenizer = Tokenizer.load(file) if file else None
    if found and tokenizer:
        resume.check_tokenizer(found, config, tokenizer)
    elif origin and origin.given.tokenizer and config.data.tokenizer == origin.given.tokenizer:
        tokenizer = Tokenizer.load(origin.given.tokenizer)
    return tokenizer


def compare_palettes(origin: Origin, data: Dataset) -> None:
    """Warns where weights were trained on pixels of another palette than that of the data."""
    known, found = origin.run.image_format, data.image_format
    if known and found and known.palette != found.palette:
        logger.warning(
            "%s was trained on images of %d other colours: what it knows of each begins anew",
            origin.given.origin,
            known.num_colors,
        )


def own_callbacks(config: ExperimentConfig) -> list[type[Callback]]:
    """Returns the classes that `training.callbacks` names."""
    return [
        plugins.load(reference, "training.callbacks", Callback)
        for reference in config.training.callbacks
    ]


def check_same_command(args: argparse.Namespace, group: ProcessGroup) -> None:
    """Checks that all processes were started with the same config.

    Raises:
      ConfigError: this one was not; names the first field that differs.
    """
    if group.count == 1:
        return
    values = configs.flat(args.config, args.overrides) | {"--run": str(args.run)}
    first = group.from_first(lambda: values)
    for field in [*first, *values]:
        theirs, ours = first.get(field, "left out"), values.get(field, "left out")
        if theirs != ours:
            raise ConfigError(
                f"{field} is {ours} in process {group.index} and {theirs} in process 0; start all "
                "of them with the same command"
            )
    group.confirm()


def check_same_data(data: Dataset, group: ProcessGroup) -> None:
    """Checks that all processes see the same data.

    Raises:
      DataError: this one sees another than the first.
    """
    if group.from_first(lambda: data.fingerprint) != data.fingerprint:
        raise DataError(
            f"the data of process {group.index} is not that of process 0: its text or its "
            "tokenizer is another one; give all of them the same files"
        )
    group.confirm()
