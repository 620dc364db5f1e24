"""train: from a config to a trained run. This page shows the whole way the data goes.

config -> runtime -> data -> model -> training -> outputs
"""

import argparse
import contextlib
import dataclasses
import inspect
import logging
import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from craft_jax import config as configs
from craft_jax import (
    faults,
    locks,
    memory,
    optim,
    outputs,
    plugins,
    processes,
    runs,
    runtime,
    sharding,
)
from craft_jax.checkpointing import CheckpointStore
from craft_jax.commands import replay, report, resuming, samplers, visualize
from craft_jax.commands.samplers import PairSampler, Sampler
from craft_jax.config import ExperimentConfig, Override, Weights
from craft_jax.data import pipeline
from craft_jax.data.base import Dataset
from craft_jax.data.pipeline import Datasets
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import (
    INTERRUPTED,
    OK,
    PREEMPTED,
    STALLED,
    ConfigError,
    CraftError,
    DataError,
    StoppedError,
    UsageError,
)
from craft_jax.models import base
from craft_jax.models.base import ModelDef
from craft_jax.outputs import RunPaths
from craft_jax.precision import Policy
from craft_jax.processes import ProcessGroup
from craft_jax.training import bad_steps, language, trackers
from craft_jax.training import state as states
from craft_jax.training.bad_steps import BadStepFiles
from craft_jax.training.callbacks import (
    Callback,
    CheckpointCallback,
    EvaluationCallback,
    SampleCallback,
)
from craft_jax.training.loggers import (
    ConsoleLogger,
    ExactLogger,
    JsonLinesLogger,
    StatusFile,
    TensorBoardLogger,
)
from craft_jax.training.profiling import Profile
from craft_jax.training.reactions import EarlyStopping, ReduceLROnPlateauOrInstability
from craft_jax.training.saving import Found, Saver
from craft_jax.training.state import TrainState
from craft_jax.training.trainer import Trainer
from craft_jax.watchdog import Watchdog

logger = logging.getLogger(__name__)

_STATES = {PREEMPTED: "preempted", INTERRUPTED: "interrupted"}


def run(args: argparse.Namespace) -> int:
    """Trains a new run, or continues the one that `--run` names."""
    workdir = Path(args.workdir).expanduser().absolute()
    runtime.setup_logging()
    if args.coordinator is None and (args.num_processes, args.process_id) != (None, None):
        raise UsageError("--num_processes and --process_id need --coordinator=HOST:PORT")
    if args.replay_step is not None:
        if args.coordinator:
            raise UsageError("--replay_step is for one process; leave --coordinator out")
        return _replay(args, workdir)
    with runtime.stop_signals() as stop_signal:
        if args.coordinator:
            runtime.keep_freed_memory()
        with processes.joined(args.coordinator, args.num_processes, args.process_id) as group:
            return _run(args, workdir, stop_signal, group)


def _run(
    args: argparse.Namespace,
    workdir: Path,
    stop_signal: runtime.StopSignal,
    group: ProcessGroup,
) -> int:
    _check_same_command(args, group)
    with contextlib.ExitStack() as context:
        begun = group.from_first(
            lambda: _begin(args, workdir, stop_signal, context, group), _Begun.tell, _Begun.hear
        )
        if begun.is_finished:
            return OK
        config, found = begun.config, begun.found
        mesh = sharding.make_mesh(config.parallel, jax.devices())
        datasets = group.in_turn(
            lambda: pipeline.open_datasets(
                config.data,
                workdir=workdir,
                seed=config.training.seed,
                tokenizer=begun.tokenizer,
            )
        )
        _check_same_data(datasets.train, group)
        model_config = runs.with_vocab_size(config.model, datasets.train.vocab_size)
        model_def = base.define(config.model_class, model_config)
        _check_possible(config, model_def, mesh)
        status = begun.status

        def create() -> RunPaths:
            nonlocal status
            if found:
                return found
            paths = outputs.create_run(
                workdir,
                name=args.run,
                model=report.model_word(config),
                size=report.size_word(model_def.num_params),
                precision=config.training.precision,
            )
            if not args.run:
                context.enter_context(locks.hold(paths.folder))
            status = context.enter_context(_recorded(paths, config, stop_signal, group))
            outputs.write_json(paths.config, resuming.lasting(config).to_json())
            return paths

        paths = group.from_first(create, RunPaths.to_json, RunPaths.from_json)
        sampler = samplers.make(config, model_def, datasets)
        callbacks = [
            *_callbacks(config, sampler, paths, datasets.train, group),
            *([status] if status else []),
            *(callback() for callback in begun.own_callbacks),
        ]
        watchdog = Watchdog(
            config.training.stall_seconds,
            paths.log if group.is_first else None,
            lambda reason: status and status.finish("stalled", reason, STALLED),
        )
        shared_stop = group.shared(stop_signal)
        trainer = _assemble(
            config,
            model_def,
            datasets,
            mesh,
            paths,
            callbacks,
            shared_stop,
            watchdog,
            begun.origin,
            group,
        )
        state_bytes = sharding.bytes_on_one_device(trainer.state)
        report.header(config, model_def, datasets, mesh, paths, state_bytes)
        if found:
            resuming.say_changes(found, config, int(trainer.state.step))
            outputs.write_json(paths.config, resuming.lasting(config).to_json())
        start = time.monotonic()
        with watchdog.watching():
            result = trainer.fit()
        if result.step < config.training.num_steps:
            logger.info(
                "stopped at step %d of %d by %s; everything is saved\n  to continue: %s",
                result.step,
                config.training.num_steps,
                result.stopped,
                _command(paths),
            )
            if status:
                status.finish(*_ended(shared_stop, f"stopped by {result.stopped}"))
            return shared_stop.exit_code or OK
        logger.info("trained to step %d in %.0f s", result.step, time.monotonic() - start)
        _finish(config, trainer, sampler, paths, result.metrics, group)
        if status:
            status.finish("done", None, OK)
    return OK


class _Begun(NamedTuple):
    """What is known of a run before its data is opened; `found`, `status` and `origin` are those of
    the first process.
    """

    config: ExperimentConfig
    own_callbacks: list[type[Callback]]
    tokenizer: Tokenizer | None = None
    is_finished: bool = False
    found: RunPaths | None = None
    status: StatusFile | None = None
    origin: "_Origin | None" = None

    def tell(self) -> dict[str, Any]:
        """Returns what the other processes need to know."""
        return {
            "config": self.config.to_json(),
            "tokenizer": self.tokenizer.json if self.tokenizer else None,
            "is_finished": self.is_finished,
        }

    @staticmethod
    def hear(told: dict[str, Any]) -> "_Begun":
        """Returns what another process than the first knows."""
        config = configs.from_values(told["config"], check_files=False)
        tokenizer = Tokenizer.parse(told["tokenizer"]) if told["tokenizer"] else None
        return _Begun(config, _own_callbacks(config), tokenizer, told["is_finished"])


def _begin(
    args: argparse.Namespace,
    workdir: Path,
    stop_signal: runtime.StopSignal,
    context: contextlib.ExitStack,
    group: ProcessGroup,
) -> _Begun:
    """Chooses the config, takes the lock, and finds where the run stands."""
    found = _existing(args.run, workdir)
    config, origin = _choose_config(args, found, workdir)
    own_callbacks = _own_callbacks(config)
    outputs.check_writable(workdir)
    if args.run:
        folder = found.folder if found else workdir / "models" / args.run
        context.enter_context(locks.hold(folder))
        if not found and _existing(args.run, workdir):  # Another process was quicker.
            context.close()
            return _begin(args, workdir, stop_signal, context, group)
    status = None
    if found:
        outputs.make_files(found)
        status = context.enter_context(_recorded(found, config, stop_signal, group))
    faults.point("start")
    runtime.keep_freed_memory()
    mesh = sharding.make_mesh(config.parallel, jax.devices())
    sharding.check_batch(config.data.batch_size, config.training.accumulate, mesh)
    step = resuming.choose(found, config) if found else None
    if found and step is not None and resuming.is_finished(found, step, config):
        logger.info(
            "run %s is finished: %d of %d steps\n  to train on: %s",
            found.name,
            step,
            config.training.num_steps,
            _command(found, f"--config.training.num_steps={2 * step}"),
        )
        assert status is not None
        status.finish("done", None, OK, step=step)
        return _Begun(config, own_callbacks, is_finished=True)
    tokenizer = _tokenizer(config, found, step, origin)
    return _Begun(config, own_callbacks, tokenizer, False, found, status, origin)


def _own_callbacks(config: ExperimentConfig) -> list[type[Callback]]:
    return [
        plugins.load(reference, "training.callbacks", Callback)
        for reference in config.training.callbacks
    ]


def _check_same_command(args: argparse.Namespace, group: ProcessGroup) -> None:
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


def _check_same_data(data: Dataset, group: ProcessGroup) -> None:
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


def _replay(args: argparse.Namespace, workdir: Path) -> int:
    """Makes one step of a run again; see `replay`."""
    found = _existing(args.run, workdir)
    config, origin = _choose_config(args, found, workdir)
    if found is None:
        raise UsageError(f"--replay_step={args.replay_step} needs the --run whose step it is")
    store = CheckpointStore(found.checkpoints)
    newest, _ = store.newest_good()
    before, _ = store.newest_good(below=args.replay_step)
    # A trainer that goes on meanwhile does not remove it.
    pin = None if before is None else store.pin(before)
    mesh = sharding.make_mesh(config.parallel, jax.devices())
    datasets = pipeline.open_datasets(
        config.data,
        workdir=workdir,
        seed=config.training.seed,
        tokenizer=_tokenizer(config, found, newest, origin),
    )
    model_config = runs.with_vocab_size(config.model, datasets.train.vocab_size)
    model_def = base.define(config.model_class, model_config)
    if before is None and origin is None and config.init_from:
        origin = _Origin(*runs.weights(config.init_from, workdir))

    def assemble(callbacks: list[Callback]) -> Trainer:
        return _assemble(
            config,
            model_def,
            datasets,
            mesh,
            found,
            callbacks,
            runtime.StopSignal(),
            Watchdog(0),
            origin,
            processes.ALONE,
            replay_from=before or 0,
        )

    code = replay.run(args.replay_step, config, found, assemble)
    del pin
    return code


def _check_possible(config: ExperimentConfig, model_def: ModelDef, mesh: jax.sharding.Mesh) -> None:
    asked = [field for field, value in dataclasses.asdict(config.loss).items() if value]
    if asked and "config" not in inspect.signature(config.model_class.loss).parameters:
        raise ConfigError(
            f"loss.{asked[0]} is set, and the loss of model.name={config.model.name} takes no "
            "`config`; leave it out, or add that argument to it"
        )
    policy = Policy.named(config.training.precision)
    need = memory.least(
        states.abstract_state(model_def, optim.make_optimizer(config.optim), mesh, policy),
        model_def.config,
        batch_size=config.data.batch_size,
        seq_len=config.data.seq_len,
        accumulate=config.training.accumulate,
        mesh=mesh,
    )
    memory.check(need, mesh)


@contextlib.contextmanager
def _recorded(
    paths: RunPaths,
    config: ExperimentConfig,
    stop_signal: runtime.StopSignal,
    group: ProcessGroup,
) -> Iterator[StatusFile]:
    """Keeps the run's log and its `status.json` while the context lasts, whatever ends it."""
    status = StatusFile(paths.folder, config.training.num_steps)
    stop_signal.on_abort = lambda code: status.finish("interrupted", "a second signal", code)
    group.on_failure = lambda reason, code: status.finish(_STATES.get(code, "failed"), reason, code)
    with runtime.log_to(paths.log):
        try:
            yield status
        except StoppedError as error:
            status.finish(*_ended(stop_signal, str(error)))
            raise
        except BaseException as raised:
            error = group.named(raised)
            code = error.exit_code if isinstance(error, CraftError) else 1
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            status.finish("failed", reason, code)
            logger.error("failed: %s", error, extra=runtime.FILE_ONLY)
            raise


def _ended(stop_signal: runtime.StopSignal, reason: str) -> tuple[str, str, int]:
    """Returns the state, reason and exit code of a run that was stopped early."""
    code = stop_signal.exit_code or OK
    return _STATES.get(code, "done"), reason, code


def _tokenizer(
    config: ExperimentConfig, found: RunPaths | None, step: int | None, origin: "_Origin | None"
) -> Tokenizer | None:
    """Returns the tokenizer that the run has already, if it has one."""
    config.check_pairs()
    tokenizer = None
    if found and step is not None:
        file = CheckpointStore(found.checkpoints).tokenizer_file(step)
        tokenizer = Tokenizer.load(file) if file else None
    if found and tokenizer:
        resuming.check_tokenizer(found, config, tokenizer)
    elif origin and origin.given.tokenizer and config.data.tokenizer == origin.given.tokenizer:
        tokenizer = Tokenizer.load(origin.given.tokenizer)
    return tokenizer


def _existing(name: str | None, workdir: Path) -> RunPaths | None:
    if name is None or not runs.exists(name, workdir):
        return None
    folder, step = runs.locate(name, workdir)
    if step is not None:
        raise UsageError(
            f"--run={name} is a checkpoint; training continues from the newest: --run={folder.name}"
        )
    return outputs.open_run(folder)


class _Origin(NamedTuple):
    """What a new run begins with."""

    run: runs.Run
    given: Weights


def _choose_config(
    args: argparse.Namespace, found: RunPaths | None, workdir: Path
) -> tuple[ExperimentConfig, _Origin | None]:
    """The config of the command line, which a run that exists must agree with.

    Returns:
      The config and, for a run with `init_from` that has no checkpoint yet, what it begins with.
    """
    overrides = list(args.overrides)
    if args.tokenizer:
        overrides.append(Override("data.tokenizer", args.tokenizer))
    if found is not None and not resuming.is_untrained(found):
        config = _config_of(found, args.config, overrides)
        begins_again = config.checkpoint.resume == "none" and config.init_from
        return config, _Origin(*runs.weights(config.init_from, workdir)) if begins_again else None
    if found is None and args.config is None:
        missing = f"there is no run {args.run} below {args.workdir}; " if args.run else ""
        raise UsageError(f"{missing}a new run needs a config: --config=configs/gpt.py")
    if found is None and args.run is not None:
        outputs.check_name(args.run)
    saved = runs.saved_config(found) if args.config is None else None
    origins: list[_Origin] = []

    def weights(init_from: str | None) -> Weights | None:
        if init_from is None:
            return None
        origins.append(_Origin(*runs.weights(init_from, workdir)))
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
                "leave it, or start another --run"
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


def _assemble(
    config: ExperimentConfig,
    model_def: ModelDef,
    datasets: Datasets,
    mesh: jax.sharding.Mesh,
    paths: RunPaths,
    callbacks: list[Callback],
    stop_signal: runtime.StopSignal,
    watchdog: Watchdog,
    origin: _Origin | None,
    group: ProcessGroup,
    replay_from: int | None = None,
) -> Trainer:
    """Joins the pieces into a trainer that stands where the run's newest checkpoint does.

    With `replay_from` it stands at that step, and saves nothing.
    """
    optimizer = optim.make_optimizer(config.optim)
    policy = Policy.named(config.training.precision)
    abstract = states.abstract_state(model_def, optimizer, mesh, policy)
    tokenizer = datasets.train.tokenizer
    store = CheckpointStore(paths.checkpoints, config.training.keep_checkpoints, config.checkpoint)

    def complete(meta: dict) -> dict[str, Any]:
        meta |= {
            "vocab_size": datasets.train.vocab_size,
            "data_fingerprint": datasets.train.fingerprint,
            "environment": report.environment(),
        }
        return {
            "meta": meta,
            "config": resuming.lasting(config).to_json(),
            "tokenizer": tokenizer.json if tokenizer else None,
        }

    def read(step: int) -> Found:
        meta = resuming.check_data(store, step, datasets.train, config, paths.name)
        if not store.has_optimizer(step):
            return Found(store.read_params(step, abstract.params), meta, is_whole=False)
        return Found(store.read_state(step, abstract), meta, is_whole=True)

    def begin(params: Mapping | None) -> TrainState:
        return states.begin(sharding.spread(params, abstract.params), optimizer, mesh, policy)

    def place(found: Found) -> TrainState:
        return sharding.spread(found.arrays, abstract) if found.is_whole else begin(found.arrays)

    saver = Saver(store, config.checkpoint, complete, read, place, group)
    if replay_from is None:
        restored = saver.restore(is_checked=True)
    elif replay_from:
        found = read(replay_from)
        restored = place(found), found.meta
    else:
        restored = None
    if restored is not None:
        state = restored[0]
    elif group.from_first(lambda: origin is not None):
        state = begin(
            origin.run.store.read_params(origin.run.step, abstract.params) if origin else None
        )
    else:
        state = states.init_state(
            config.model_class,
            model_def.config,
            optimizer,
            seed=config.training.seed,
            mesh=mesh,
            policy=policy,
        )
    trainer = language.trainer_for(config.model_class)(
        model_def,
        state=state,
        train_data=datasets.train,
        val_data=datasets.val,
        optimizer=optimizer,
        schedule=optim.make_schedule(config.optim, config.training.num_steps),
        policy=policy,
        mesh=mesh,
        config=config.training,
        callbacks=callbacks,
        saver=saver if replay_from is None else None,
        stop_signal=stop_signal,
        watchdog=watchdog,
        is_exact=config.log.exact,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        loss_config=config.loss,
        mode=config.parallel.mode,
        norms_every=config.log.norms_every,
    )
    if restored is not None:
        trainer.load_meta(restored[1])
    return trainer


def _callbacks(
    config: ExperimentConfig,
    sampler: Sampler | PairSampler | None,
    paths: RunPaths,
    data: Dataset,
    group: ProcessGroup,
) -> list[Callback]:
    """The project's own callbacks, in the order in which they are called.

    All processes have those that decide something or need the state; the first writes.
    """
    training = config.training
    callbacks: list[Callback] = [EvaluationCallback(training.eval_every)]
    if config.plateau.patience or config.plateau.spike:
        callbacks.append(ReduceLROnPlateauOrInstability(config.plateau))
    if config.early_stopping.patience:
        callbacks.append(EarlyStopping(config.early_stopping))
    if sampler and training.sample_every:

        def show(step: int, text: str) -> None:
            report.sample(step, text, paths.samples)

        callbacks.append(
            SampleCallback(training.sample_every, sampler, show)
            if group.is_first
            else SampleCallback(training.sample_every, samplers.look_on, lambda step, text: None)
        )
    callbacks.append(
        CheckpointCallback(
            training.checkpoint_every,
            minutes=config.checkpoint.every_minutes,
            metric=config.checkpoint.best_metric,
            mode=config.checkpoint.best_mode,
        )
    )
    if not group.is_first:
        return callbacks
    callbacks += [
        ConsoleLogger(training.log_every, language.trainer_for(config.model_class).unit),
        JsonLinesLogger(paths.metrics, training.log_every),
        TensorBoardLogger(paths.events, training.log_every),
        BadStepFiles(paths.bad_steps, lambda n: bad_steps.describe(data.batch(n), data)),
    ]
    if config.log.exact:
        callbacks.append(ExactLogger(paths.exact))
    if config.profile.window:
        callbacks.append(Profile(*config.profile.window, paths.events))
    callbacks += trackers.make(
        config.log, training.log_every, paths.folder, resuming.lasting(config).to_json()
    )
    return callbacks


def _finish(
    config: ExperimentConfig,
    trainer: Trainer,
    sampler: Sampler | PairSampler | None,
    paths: RunPaths,
    metrics: Mapping[str, Any],
    group: ProcessGroup,
) -> None:
    """Leaves behind a longer sample and a picture, and says where everything is."""
    if not group.is_first:
        if sampler:
            samplers.look_on(trainer.state)
        return
    if sampler:
        text = sampler(trainer.state, is_last=True)
        report.sample(int(trainer.state.step), text, paths.samples)
    picture = visualize.draw_runs([paths])
    source = sampler.source if sampler else None
    report.ending(metrics, config.training.num_steps, paths, picture, _command, source)


def _command(paths: RunPaths, *more: str, command: str = "") -> str:
    """Returns the shell command that does something with this run, from the current folder."""
    words = ["python", "-m", "craft_jax.main", *([command] if command else [])]
    words.append(f"--run={paths.name}")
    if paths.workdir != (Path.cwd() / "outputs"):
        words.append(f"--workdir={paths.workdir}")
    return shlex.join([*words, *more])
