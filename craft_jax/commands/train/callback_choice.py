"""The callbacks of a run, in the order in which they are called."""

from craft_jax.checkpoint import resume
from craft_jax.commands import report
from craft_jax.commands.train.session import Session
from craft_jax.config import ExperimentConfig
from craft_jax.data.base import Dataset
from craft_jax.generation import previews
from craft_jax.generation.previews import Sampler
from craft_jax.outputs import RunPaths
from craft_jax.training import bad_steps, tasks, trackers
from craft_jax.training.bad_steps import BadStepFiles
from craft_jax.training.callbacks import (
    Callback,
    CheckpointCallback,
    EvaluationCallback,
    SampleCallback,
)
from craft_jax.training.early_stopping import EarlyStopping
from craft_jax.training.loggers import (
    ConsoleLogger,
    ExactLogger,
    JsonLinesLogger,
    TensorBoardLogger,
)
from craft_jax.training.plateau import ReduceLROnPlateauOrInstability
from craft_jax.training.profiling import Profile


def make_callbacks(
    session: Session, paths: RunPaths, sampler: Sampler | None, data: Dataset
) -> list[Callback]:
    """Returns the callbacks of this process.

    All processes have those that make a request or need the state; process 0 has those that write.

    Args:
      session: of the run.
      paths: of the run.
      sampler: makes the samples; None for none.
      data: the training set.
    """
    config, is_first = session.config, session.group.is_first
    callbacks = _deciding(config)
    if sampler and config.training.sample_every:
        callbacks.append(_sampling(config, paths, sampler, is_first))
    callbacks.append(
        CheckpointCallback(
            config.training.checkpoint_every,
            minutes=config.checkpoint.every_minutes,
            metric=config.checkpoint.best_metric,
            mode=config.checkpoint.best_mode,
        )
    )
    if is_first:
        callbacks += _writing(config, paths, data)
    if session.status:
        callbacks.append(session.status)
    return callbacks + [callback() for callback in session.own_callbacks]


def _deciding(config: ExperimentConfig) -> list[Callback]:
    callbacks: list[Callback] = [EvaluationCallback(config.training.eval_every)]
    if config.plateau.patience or config.plateau.spike:
        callbacks.append(ReduceLROnPlateauOrInstability(config.plateau))
    if config.early_stopping.patience:
        callbacks.append(EarlyStopping(config.early_stopping))
    return callbacks


def _sampling(
    config: ExperimentConfig, paths: RunPaths, sampler: Sampler, is_first: bool
) -> SampleCallback:
    every = config.training.sample_every
    if not is_first:
        return SampleCallback(every, previews.look_on, lambda step, sample: None)
    return SampleCallback(
        every, sampler, lambda step, sample: report.sample(step, sample, paths.samples)
    )


def _writing(config: ExperimentConfig, paths: RunPaths, data: Dataset) -> list[Callback]:
    every = config.training.log_every
    callbacks: list[Callback] = [
        ConsoleLogger(every, tasks.task_of(config.model_class).unit),
        JsonLinesLogger(paths.metrics, every),
        TensorBoardLogger(paths.events, every),
        BadStepFiles(paths.bad_steps, lambda n: bad_steps.describe(data.batch(n), data)),
    ]
    if config.log.exact:
        callbacks.append(ExactLogger(paths.exact))
    if config.profile.window:
        callbacks.append(Profile(*config.profile.window, paths.events))
    values = resume.lasting(config).to_json()
    return callbacks + trackers.make(config.log, every, paths.folder, values)
