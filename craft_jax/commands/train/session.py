"""The session of a training command: what is set up once per process and decided by process 0."""

import argparse
import contextlib
import dataclasses
import logging
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from craft_jax import config as configs
from craft_jax import outputs
from craft_jax.checkpoint import lock, resume
from craft_jax.checkpoint.listing import Checkpoints
from craft_jax.checkpoint.manager import Restored
from craft_jax.commands import report
from craft_jax.commands.train import config_choice
from craft_jax.config import ExperimentConfig
from craft_jax.data import pipeline
from craft_jax.data.pipeline import Datasets
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import INTERRUPTED, OK, PREEMPTED, STALLED, StoppedError, exit_code_of
from craft_jax.models.base import ModelDef
from craft_jax.outputs import RunPaths
from craft_jax.parallel import processes, sharding
from craft_jax.parallel.processes import ProcessGroup, SharedStop
from craft_jax.runtime import compilation_cache, cpu_memory, fault_injection, signals
from craft_jax.runtime.logging import FILE_ONLY, log_to, setup_logging
from craft_jax.runtime.signals import StopSignal
from craft_jax.runtime.watchdog import Watchdog
from craft_jax.training.callbacks import Callback
from craft_jax.training.compiled_step import CompiledStep, StepWrapper
from craft_jax.training.loggers import StatusFile
from craft_jax.training.state import TrainState
from craft_jax.training.trainer import FitResult

logger = logging.getLogger(__name__)

_STATES = {PREEMPTED: "preempted", INTERRUPTED: "interrupted"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Start:
    """Decisions of process 0 before the data is opened.

    The other processes receive `config`, `tokenizer` and `is_finished`.
    """

    config: ExperimentConfig
    tokenizer: Tokenizer | None = None
    is_finished: bool = False
    paths: RunPaths | None = None
    origin: config_choice.Origin | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "config": self.config.to_json(),
            "tokenizer": self.tokenizer.json if self.tokenizer else None,
            "is_finished": self.is_finished,
        }

    @staticmethod
    def from_json(sent: Mapping[str, Any]) -> "_Start":
        return _Start(
            config=configs.from_values(sent["config"], check_files=False),
            tokenizer=Tokenizer.parse(sent["tokenizer"]) if sent["tokenizer"] else None,
            is_finished=sent["is_finished"],
        )


class Session:
    """One process of a training run: signals, processes, lock, log and status.

    Attributes:
      config: of the run.
      is_finished: whether nothing is left to train.
      is_resumed: whether the run existed before; only in process 0.
      mesh: the devices of all processes.
      group: the processes.
      stop_flag: set when the run is asked to stop, in all processes at the same step.
      own_callbacks: the classes that `training.callbacks` names.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        stop_signal: StopSignal,
        group: ProcessGroup,
        context: contextlib.ExitStack,
    ):
        self.group = group
        self._run_name, self._workdir = args.run, workdir_of(args)
        self._stop_signal, self._context = stop_signal, context
        self._paths: RunPaths | None = None
        self.status: StatusFile | None = None
        config_choice.check_same_command(args, group)
        start = group.from_first(lambda: self._start(args), _Start.to_json, _Start.from_json)
        self.config, self.is_finished = start.config, start.is_finished
        self.is_resumed = start.paths is not None
        self.own_callbacks: list[type[Callback]] = config_choice.own_callbacks(start.config)
        self._tokenizer, self._origin = start.tokenizer, start.origin
        self.mesh = sharding.make_mesh(start.config.parallel, jax.devices())
        self.stop_flag = group.shared(stop_signal)

    @classmethod
    @contextlib.contextmanager
    def open(cls, args: argparse.Namespace) -> Iterator["Session"]:
        """Sets up this process, joins the others, and chooses the run and its config."""
        setup_logging()
        compilation_cache.enable_compilation_cache()
        with contextlib.ExitStack() as context:
            stop_signal = context.enter_context(signals.stop_signals())
            cpu_memory.tune_malloc()
            joined = processes.joined(args.coordinator, args.num_processes, args.process_id)
            group = context.enter_context(joined)
            with contextlib.ExitStack() as run_context:
                yield cls(args, stop_signal, group, run_context)

    def _start(self, args: argparse.Namespace) -> _Start:
        """Chooses the config, takes the lock, and finds the checkpoint to resume from."""
        workdir = self._workdir
        paths = config_choice.existing(args.run, workdir)
        config, origin = config_choice.choose_config(args, paths, workdir)
        config_choice.own_callbacks(config)  # Fails before anything is written.
        outputs.check_writable(workdir)
        if args.run:
            folder = paths.folder if paths else workdir / "models" / args.run
            self._context.enter_context(lock.hold(folder))
            if not paths and config_choice.existing(args.run, workdir):
                # Another process created it in between.
                self._context.close()
                return self._start(args)
        if paths:
            outputs.make_files(paths)
            self._record_in(paths, config)
        fault_injection.point("start")
        mesh = sharding.make_mesh(config.parallel, jax.devices())
        sharding.check_batch(config.data.batch_size, config.training.accumulate, mesh)
        step = resume.choose(paths, config) if paths else None
        if paths and step is not None and resume.is_finished(paths, step, config):
            logger.info(
                "run %s is finished: %d of %d steps\n  to train on: %s",
                paths.name,
                step,
                config.training.num_steps,
                shell_command(paths, f"--config.training.num_steps={2 * step}"),
            )
            assert self.status is not None
            self.status.finish("done", None, OK, step=step)
            return _Start(config=config, is_finished=True)
        tokenizer = config_choice.tokenizer(config, paths, step, origin)
        return _Start(config=config, tokenizer=tokenizer, paths=paths, origin=origin)

    def open_datasets(self) -> Datasets:
        """Opens the data, in process 0 first: the others find its cache.

        Raises:
          DataError: the data of this process is not that of process 0.
        """
        config = self.config
        datasets = self.group.in_turn(
            lambda: pipeline.open_datasets(
                config.data,
                workdir=self._workdir,
                seed=config.training.seed,
                tokenizer=self._tokenizer,
            )
        )
        config_choice.check_same_data(datasets.train, self.group)
        if self._origin:
            config_choice.compare_palettes(self._origin, datasets.train)
        return datasets

    def open_run(self, model_def: ModelDef) -> RunPaths:
        """Returns the paths of the run, whose folder process 0 creates if it is new."""
        self._paths = self.group.from_first(
            lambda: self._paths or self._create_run(model_def), RunPaths.to_json, RunPaths.from_json
        )
        return self._paths

    def _create_run(self, model_def: ModelDef) -> RunPaths:
        paths = outputs.create_run(
            self._workdir,
            name=self._run_name,
            model=report.model_word(self.config),
            size=report.size_word(model_def.num_params),
            precision=self.config.training.precision,
        )
        if not self._run_name:
            self._context.enter_context(lock.hold(paths.folder))
        self._record_in(paths, self.config)
        outputs.write_json(paths.config, resume.lasting(self.config).to_json())
        return paths

    def first_state(self, train_step: CompiledStep) -> Restored:
        """Returns the state of a new run: with the weights of `init_from`, or with fresh ones."""
        origin = self._origin
        if self.group.from_first(lambda: origin is not None):
            shapes = train_step.abstract_state.params
            params = origin.run.store.read_params(origin.run.step, shapes) if origin else None
            return Restored(train_step.state_from_params(params), {})
        config = self.config
        return Restored(train_step.init_state(config.model_class, config.training.seed), {})

    @property
    def wrap_step(self) -> StepWrapper | None:
        """Adds to the step what the processes exchange; None for a single process."""
        return None if self.group.count == 1 else SharedStop.reducing

    def make_watchdog(self) -> Watchdog:
        """Returns the watchdog of the run, which must be open."""
        assert self._paths is not None
        return Watchdog(
            self.config.training.stall_seconds,
            self._paths.log if self.group.is_first else None,
            lambda reason: self.status and self.status.finish("stalled", reason, STALLED),
        )

    def report_changes(self, state: TrainState) -> None:
        """Logs what differs from the run before it was resumed, and records its new config."""
        if self.is_resumed:
            assert self._paths is not None
            resume.report_changes(self._paths, self.config, int(state.step))
            outputs.write_json(self._paths.config, resume.lasting(self.config).to_json())

    def end_early(self, result: FitResult) -> int:
        """Records that the run was stopped; returns the exit code."""
        assert self._paths is not None
        logger.info(
            "stopped at step %d of %d by %s; everything is saved\n  to continue: %s",
            result.step,
            self.config.training.num_steps,
            result.stopped,
            shell_command(self._paths),
        )
        code = self.stop_flag.exit_code or OK
        if self.status:
            self.status.finish(_STATES.get(code, "done"), f"stopped by {result.stopped}", code)
        return code

    def end(self) -> int:
        """Records that the run is finished; returns the exit code."""
        if self.status and self._paths:
            best = Checkpoints(self._paths.checkpoints).best()
            self.status.finish("done", None, OK, best=best and best._asdict())
        return OK

    def _record_in(self, paths: RunPaths, config: ExperimentConfig) -> None:
        """Keeps the run's log and its `status.json` until the session ends, however it does."""
        self._paths = paths
        self.status = self._context.enter_context(
            _recorded(paths, config, self._stop_signal, self.group)
        )


@contextlib.contextmanager
def _recorded(
    paths: RunPaths, config: ExperimentConfig, stop_signal: StopSignal, group: ProcessGroup
) -> Iterator[StatusFile]:
    status = StatusFile(paths.folder, config.training.num_steps)
    stop_signal.on_abort = lambda code: status.finish("interrupted", "a second signal", code)
    group.on_failure = lambda reason, code: status.finish(_STATES.get(code, "failed"), reason, code)
    with log_to(paths.log):
        try:
            yield status
        except StoppedError as error:
            code = stop_signal.exit_code or OK
            status.finish(_STATES.get(code, "done"), str(error), code)
            raise
        except BaseException as raised:
            error = group.named(raised)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            status.finish("failed", reason, exit_code_of(error))
            logger.error("failed: %s", error, extra=FILE_ONLY)
            raise


def workdir_of(args: argparse.Namespace) -> Path:
    """Returns the absolute path of `--workdir`."""
    return Path(args.workdir).expanduser().absolute()


def shell_command(paths: RunPaths, *more: str, command: str = "") -> str:
    """Returns the shell command that does something with a run, from the current folder."""
    words = ["python", "-m", "craft_jax.main", *([command] if command else [])]
    words.append(f"--run={paths.name}")
    if paths.workdir != (Path.cwd() / "outputs"):
        words.append(f"--workdir={paths.workdir}")
    return shlex.join([*words, *more])
