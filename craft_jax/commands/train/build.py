"""The parts of a training run, each built from the config."""

import jax

from craft_jax import runs
from craft_jax.checkpoint import resume
from craft_jax.checkpoint.manager import CheckpointManager
from craft_jax.checkpoint.store import CheckpointStore
from craft_jax.config import ExperimentConfig
from craft_jax.data.base import Dataset, sizes_of
from craft_jax.models import base
from craft_jax.models.base import ModelDef
from craft_jax.outputs import RunPaths
from craft_jax.parallel import sharding
from craft_jax.parallel.processes import ALONE, ProcessGroup
from craft_jax.runtime import environment, fault_injection
from craft_jax.training import optim, tasks
from craft_jax.training import step as steps
from craft_jax.training.compiled_step import CompiledStep, StepWrapper
from craft_jax.training.evaluation import Evaluator
from craft_jax.training.feed import BatchFeed
from craft_jax.training.precision import Policy
from craft_jax.training.step import StepFunction


def define_model(config: ExperimentConfig, data: Dataset) -> ModelDef:
    """Returns the model, with the sizes that the config leaves to the data."""
    model_config = runs.with_sizes(config.model, sizes_of(data))
    return base.define(config.model_class, model_config)


def build_train_step(
    config: ExperimentConfig,
    model_def: ModelDef,
    mesh: jax.sharding.Mesh,
    wrap: StepWrapper | None = None,
) -> CompiledStep:
    """Returns the train step; `wrap` adds to it what several processes exchange."""
    optimizer, training = optim.make_optimizer(config.optim, model_def.constants), config.training
    schedule = optim.make_schedule(config.optim, training.num_steps)

    def make_step(policy: Policy) -> StepFunction:
        gradients = steps.make_gradients(
            model_def,
            policy,
            seed=training.seed,
            accumulate=training.accumulate,
            remat=training.remat,
            loss_config=config.loss,
            axis_name=sharding.AXIS_NAME if config.parallel.mode == "pmap" else None,
        )
        gradients = fault_injection.poisoned(gradients)
        norms_every = config.log.norms_every
        step = steps.make_update(gradients, optimizer, schedule, policy, norms_every=norms_every)
        return wrap(step) if wrap else step

    return CompiledStep(
        make_step,
        model_def=model_def,
        optimizer=optimizer,
        policy=Policy.named(training.precision),
        mesh=mesh,
        mode=config.parallel.mode,
        norms_every=config.log.norms_every,
        can_compile_ahead=wrap is None,
    )


def make_feed(config: ExperimentConfig, data: Dataset, mesh: jax.sharding.Mesh) -> BatchFeed:
    """Returns the training batches."""
    return BatchFeed(
        data,
        tasks.task_of(config.model_class),
        mesh,
        mode=config.parallel.mode,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        with_md5=config.log.exact,
    )


def make_evaluator(
    config: ExperimentConfig, model_def: ModelDef, mesh: jax.sharding.Mesh
) -> Evaluator:
    """Returns the evaluator, which computes in the precision of the run."""
    return Evaluator(model_def, Policy.named(config.training.precision), mesh)


def make_checkpoint_manager(
    config: ExperimentConfig,
    paths: RunPaths,
    data: Dataset,
    train_step: CompiledStep,
    group: ProcessGroup = ALONE,
) -> CheckpointManager:
    """Returns the manager of the run's checkpoints.

    Args:
      config, paths: of the run.
      data: the training set; a checkpoint of other data is refused.
      train_step: makes the states.
      group: the processes of the run.
    """
    store = CheckpointStore(paths.checkpoints, config.training.keep_checkpoints, config.checkpoint)
    images, tokenizer = data.image_format, data.tokenizer
    contents = {
        "meta": {
            "vocab_size": data.vocab_size,
            "images": images.to_json() if images else None,
            "data_fingerprint": data.fingerprint,
            "environment": environment.environment(),
        },
        "config": resume.lasting(config).to_json(),
        "tokenizer": tokenizer.json if tokenizer else None,
    }
    return CheckpointManager(
        store,
        config.checkpoint,
        contents,
        lambda step: resume.check_data(store, step, data, config, paths.name),
        train_step,
        group,
    )
