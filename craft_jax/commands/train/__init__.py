"""train: from a config to a trained run. This page shows the whole way the data goes.

config -> runtime -> data -> model -> training -> outputs
"""

import argparse
import contextlib
import dataclasses
import logging
import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from craft_jax import config as configs
from craft_jax import outputs, runs
from craft_jax.checkpoint import lock, resume
from craft_jax.checkpoint.manager import Found, Saver
from craft_jax.checkpoint.store import CheckpointStore
from craft_jax.commands import report, visualize
from craft_jax.commands.train import config_choice, replay
from craft_jax.config import ExperimentConfig
from craft_jax.data import pipeline
from craft_jax.data.base import Dataset, sizes_of, vocab_size_of
from craft_jax.data.pipeline import Datasets
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import (
    INTERRUPTED,
    OK,
    PREEMPTED,
    STALLED,
    ConfigError,
    StoppedError,
    UsageError,
    exit_code_of,
)
from craft_jax.generation import previews
from craft_jax.generation.previews import Sampler
from craft_jax.models import base
from craft_jax.models.base import ModelDef
from craft_jax.outputs import RunPaths
from craft_jax.parallel import memory, processes, sharding
from craft_jax.parallel.processes import ProcessGroup
from craft_jax.runtime import compilation_cache, cpu_memory, environment, fault_injection, signals
from craft_jax.runtime.logging import FILE_ONLY, log_to, setup_logging
from craft_jax.runtime.watchdog import Watchdog
from craft_jax.training import bad_steps, language, optim, trackers
from craft_jax.training import state as states
from craft_jax.training.bad_steps import BadStepFiles
from craft_jax.training.callbacks import (
    Callback,
    CheckpointCallback,
    EvaluationCallback,
    Sample,
    SampleCallback,
)
from craft_jax.training.early_stopping import EarlyStopping
from craft_jax.training.loggers import (
    ConsoleLogger,
    ExactLogger,
    JsonLinesLogger,
    StatusFile,
    TensorBoardLogger,
)
from craft_jax.training.plateau import ReduceLROnPlateauOrInstability
from craft_jax.training.precision import Policy
from craft_jax.training.profiling import Profile
from craft_jax.training.state import TrainState
from craft_jax.training.step import make_eval_step
from craft_jax.training.trainer import Trainer

logger = logging.getLogger(__name__)

_STATES = {PREEMPTED: "preempted", INTERRUPTED: "interrupted"}


def run(args: argparse.Namespace) -> int:
    """Trains a new run, or continues the one that `--run` names."""
    workdir = Path(args.workdir).expanduser().absolute()
    setup_logging()
    compilation_cache.keep_compiled()
    if args.coordinator is None and (args.num_processes, args.process_id) != (None, None):
        raise UsageError("--num_processes and --process_id need --coordinator=HOST:PORT")
    if args.replay_step is not None:
        if args.coordinator:
            raise UsageError("--replay_step is for one process; leave --coordinator out")
        return _replay(args, workdir)
    with signals.stop_signals() as stop_signal:
        cpu_memory.keep_freed_memory()
        with processes.joined(args.coordinator, args.num_processes, args.process_id) as group:
            return _run(args, workdir, stop_signal, group)


def _run(
    args: argparse.Namespace,
    workdir: Path,
    stop_signal: signals.StopSignal,
    group: ProcessGroup,
) -> int:
    config_choice.check_same_command(args, group)
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
        config_choice.check_same_data(datasets.train, group)
        if begun.origin:
            config_choice.compare_palettes(begun.origin, datasets.train)
        model_config = runs.with_sizes(config.model, sizes_of(datasets.train))
        model_def = base.define(config.model_class, model_config)
        _check_possible(config, model_def, datasets.train, mesh)
        _check_metrics(config, model_def, datasets)
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
                context.enter_context(lock.hold(paths.folder))
            status = context.enter_context(_recorded(paths, config, stop_signal, group))
            outputs.write_json(paths.config, resume.lasting(config).to_json())
            return paths

        paths = group.from_first(create, RunPaths.to_json, RunPaths.from_json)
        sampler = previews.make(config, model_def, datasets)
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
            resume.say_changes(found, config, int(trainer.state.step))
            outputs.write_json(paths.config, resume.lasting(config).to_json())
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
    origin: config_choice.Origin | None = None

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
        return _Begun(config, config_choice.own_callbacks(config), tokenizer, told["is_finished"])


def _begin(
    args: argparse.Namespace,
    workdir: Path,
    stop_signal: signals.StopSignal,
    context: contextlib.ExitStack,
    group: ProcessGroup,
) -> _Begun:
    """Chooses the config, takes the lock, and finds where the run stands."""
    found = config_choice.existing(args.run, workdir)
    config, origin = config_choice.choose_config(args, found, workdir)
    own_callbacks = config_choice.own_callbacks(config)
    outputs.check_writable(workdir)
    if args.run:
        folder = found.folder if found else workdir / "models" / args.run
        context.enter_context(lock.hold(folder))
        if not found and config_choice.existing(args.run, workdir):  # Another process was quicker.
            context.close()
            return _begin(args, workdir, stop_signal, context, group)
    status = None
    if found:
        outputs.make_files(found)
        status = context.enter_context(_recorded(found, config, stop_signal, group))
    fault_injection.point("start")
    mesh = sharding.make_mesh(config.parallel, jax.devices())
    sharding.check_batch(config.data.batch_size, config.training.accumulate, mesh)
    step = resume.choose(found, config) if found else None
    if found and step is not None and resume.is_finished(found, step, config):
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
    tokenizer = config_choice.tokenizer(config, found, step, origin)
    return _Begun(config, own_callbacks, tokenizer, False, found, status, origin)


def _replay(args: argparse.Namespace, workdir: Path) -> int:
    """Makes one step of a run again; see `replay`."""
    found = config_choice.existing(args.run, workdir)
    config, origin = config_choice.choose_config(args, found, workdir)
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
        tokenizer=config_choice.tokenizer(config, found, newest, origin),
    )
    model_config = runs.with_sizes(config.model, sizes_of(datasets.train))
    model_def = base.define(config.model_class, model_config)
    if before is None and origin is None and config.init_from:
        origin = config_choice.Origin(*runs.weights(config.init_from, workdir))

    def assemble(callbacks: list[Callback]) -> Trainer:
        return _assemble(
            config,
            model_def,
            datasets,
            mesh,
            found,
            callbacks,
            signals.StopSignal(),
            Watchdog(0),
            origin,
            processes.ALONE,
            replay_from=before or 0,
        )

    code = replay.run(args.replay_step, config, found, assemble)
    del pin
    return code


def _check_possible(
    config: ExperimentConfig, model_def: ModelDef, data: Dataset, mesh: jax.sharding.Mesh
) -> None:
    asked = [field for field, value in dataclasses.asdict(config.loss).items() if value]
    if asked and not config.model_class.takes_loss_config:
        raise ConfigError(
            f"loss.{asked[0]} is set, and the loss of model.name={config.model.name} takes no "
            "`config`; leave it out, or add that argument and set `takes_loss_config`"
        )
    policy = Policy.named(config.training.precision)
    need = memory.least(
        states.abstract_state(model_def, optim.make_optimizer(config.optim), mesh, policy),
        model_def.config,
        batch_size=config.data.batch_size,
        seq_len=_row_length(config, model_def, data),
        accumulate=config.training.accumulate,
        mesh=mesh,
    )
    memory.check(need, mesh)


def _row_length(config: ExperimentConfig, model_def: ModelDef, data: Dataset) -> int:
    """Returns over how many places a model computes in each row; 0 where that is not known."""
    images = data.image_format
    if images is None:
        return config.data.seq_len
    if images.palette:
        return images.num_pixels
    return model_def.config.num_patches if config.model_class.has_patches else 0


def _check_metrics(config: ExperimentConfig, model_def: ModelDef, datasets: Datasets) -> None:
    """Checks that evaluations will have the metrics that the config names."""
    if datasets.val is None:
        return
    batch = datasets.val.batch(0)
    eval_step = make_eval_step(model_def, Policy.named(config.training.precision))
    sums = jax.eval_shape(eval_step, model_def.shapes, batch)
    ones = {name: 1.0 for name in sums._fields if name != "penalty"}
    trainer = language.trainer_for(config.model_class)
    found = trainer.evaluation_metrics(ones, datasets.val)
    own = {f"val_{name}" for name, value in found.items() if value is not None}
    steps = {"loss", "learning_rate", "grad_norm", "skipped", f"{trainer.unit}_per_second"}
    for field, name, is_read in (
        ("checkpoint.best_metric", config.checkpoint.best_metric, True),
        ("plateau.monitor", config.plateau.monitor, config.plateau.patience),
        ("early_stopping.monitor", config.early_stopping.monitor, config.early_stopping.patience),
    ):
        if is_read and name not in own | steps:
            known = ", ".join(sorted(own | steps))
            raise ConfigError(f"{field}={name} is no metric of this run; there are {known}")


@contextlib.contextmanager
def _recorded(
    paths: RunPaths,
    config: ExperimentConfig,
    stop_signal: signals.StopSignal,
    group: ProcessGroup,
) -> Iterator[StatusFile]:
    """Keeps the run's log and its `status.json` while the context lasts, whatever ends it."""
    status = StatusFile(paths.folder, config.training.num_steps)
    stop_signal.on_abort = lambda code: status.finish("interrupted", "a second signal", code)
    group.on_failure = lambda reason, code: status.finish(_STATES.get(code, "failed"), reason, code)
    with log_to(paths.log):
        try:
            yield status
        except StoppedError as error:
            status.finish(*_ended(stop_signal, str(error)))
            raise
        except BaseException as raised:
            error = group.named(raised)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            status.finish("failed", reason, exit_code_of(error))
            logger.error("failed: %s", error, extra=FILE_ONLY)
            raise


def _ended(stop_signal: signals.StopSignal, reason: str) -> tuple[str, str, int]:
    """Returns the state, reason and exit code of a run that was stopped early."""
    code = stop_signal.exit_code or OK
    return _STATES.get(code, "done"), reason, code


def _assemble(
    config: ExperimentConfig,
    model_def: ModelDef,
    datasets: Datasets,
    mesh: jax.sharding.Mesh,
    paths: RunPaths,
    callbacks: list[Callback],
    stop_signal: signals.StopSignal,
    watchdog: Watchdog,
    origin: config_choice.Origin | None,
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

    images = datasets.train.image_format

    def complete(meta: dict) -> dict[str, Any]:
        meta |= {
            "vocab_size": vocab_size_of(datasets.train),
            "images": images.to_json() if images else None,
            "data_fingerprint": datasets.train.fingerprint,
            "environment": environment.environment(),
        }
        return {
            "meta": meta,
            "config": resume.lasting(config).to_json(),
            "tokenizer": tokenizer.json if tokenizer else None,
        }

    def read(step: int) -> Found:
        meta = resume.check_data(store, step, datasets.train, config, paths.name)
        if not store.has_optimizer(step):
            return Found(store.read_params(step, abstract.params), meta, is_whole=False)
        return Found(store.read_state(step, abstract), meta, is_whole=True)

    def begin(params: Mapping | None) -> TrainState:
        return states.begin(sharding.spread(params, abstract.params), optimizer, mesh, policy)

    def place(found: Found) -> TrainState:
        return sharding.spread(found.arrays, abstract) if found.is_whole else begin(found.arrays)

    saver = Saver(store, config.checkpoint, complete, read, place, group)
    trainer = language.trainer_for(config.model_class)(
        model_def,
        state=abstract,
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
    # While it compiles, the state is read or drawn.
    trainer.compile_ahead()
    if replay_from is None:
        restored = saver.restore(is_checked=True)
    elif replay_from:
        found = read(replay_from)
        restored = place(found), found.meta
    else:
        restored = None
    if restored is not None:
        trainer.state, meta = restored
        trainer.load_meta(meta)
    elif group.from_first(lambda: origin is not None):
        trainer.state = begin(
            origin.run.store.read_params(origin.run.step, abstract.params) if origin else None
        )
    else:
        trainer.state = states.init_state(
            config.model_class,
            model_def.config,
            optimizer,
            seed=config.training.seed,
            mesh=mesh,
            policy=policy,
        )
    return trainer


def _callbacks(
    config: ExperimentConfig,
    sampler: Sampler | None,
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

        def show(step: int, made: Sample) -> None:
            report.sample(step, made, paths.samples)

        callbacks.append(
            SampleCallback(training.sample_every, sampler, show)
            if group.is_first
            else SampleCallback(training.sample_every, previews.look_on, lambda step, made: None)
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
        config.log, training.log_every, paths.folder, resume.lasting(config).to_json()
    )
    return callbacks


def _finish(
    config: ExperimentConfig,
    trainer: Trainer,
    sampler: Sampler | None,
    paths: RunPaths,
    metrics: Mapping[str, Any],
    group: ProcessGroup,
) -> None:
    """Leaves behind a longer sample and a picture, and says where everything is."""
    if not group.is_first:
        if sampler:
            previews.look_on(trainer.state)
        return
    if sampler:
        made = sampler(trainer.state, is_last=True)
        report.sample(int(trainer.state.step), made, paths.samples)
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
