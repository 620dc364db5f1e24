"""Checks of a run before anything is compiled or written."""

import dataclasses

import jax

from craft_jax.config import ExperimentConfig
from craft_jax.data.base import Dataset
from craft_jax.data.pipeline import Datasets
from craft_jax.errors import ConfigError
from craft_jax.models.base import ModelDef
from craft_jax.parallel import memory
from craft_jax.training import optim, tasks
from craft_jax.training import state as states
from craft_jax.training.precision import Policy
from craft_jax.training.step import make_eval_step


def check_feasible(
    config: ExperimentConfig, model_def: ModelDef, datasets: Datasets, mesh: jax.sharding.Mesh
) -> None:
    """Checks that the run can be trained.

    Raises:
      ConfigError: the model does not take the loss's options, the memory does not suffice, or a
        metric that the config names does not exist.
    """
    _check_loss(config)
    policy = Policy.named(config.training.precision)
    need = memory.least(
        states.abstract_state(
            model_def, optim.make_optimizer(config.optim, model_def.constants), mesh, policy
        ),
        model_def.config,
        batch_size=config.data.batch_size,
        seq_len=_row_length(config, model_def, datasets.train),
        accumulate=config.training.accumulate,
        mesh=mesh,
    )
    memory.check(need, mesh)
    _check_metrics(config, model_def, datasets)


def _check_loss(config: ExperimentConfig) -> None:
    options = [field for field, value in dataclasses.asdict(config.loss).items() if value]
    if options and not config.model_class.takes_loss_config:
        raise ConfigError(
            f"loss.{options[0]} is set, and the loss of model.name={config.model.name} takes no "
            "argument config; leave it out, or add the argument and set `takes_loss_config`"
        )


def _row_length(config: ExperimentConfig, model_def: ModelDef, data: Dataset) -> int:
    """Returns the number of positions that a model computes for a row; 0 if unknown."""
    images = data.image_format
    if images is None:
        return config.data.seq_len
    if images.palette:
        return images.num_pixels
    return model_def.config.num_patches if config.model_class.has_patches else 0


def _check_metrics(config: ExperimentConfig, model_def: ModelDef, datasets: Datasets) -> None:
    if datasets.val is None:
        return
    task = tasks.task_of(config.model_class)
    eval_step = make_eval_step(model_def, Policy.named(config.training.precision))
    sums = jax.eval_shape(eval_step, model_def.shapes, datasets.val.batch(0))
    ones = {name: 1.0 for name in sums._fields if name != "penalty"}
    metrics = task.metrics(ones, datasets.val)
    known = {f"val_{name}" for name, value in metrics.items() if value is not None}
    known |= {"loss", "learning_rate", "grad_norm", "skipped", f"{task.unit}_per_second"}
    for field, name, is_read in (
        ("checkpoint.best_metric", config.checkpoint.best_metric, True),
        ("plateau.monitor", config.plateau.monitor, config.plateau.patience),
        ("early_stopping.monitor", config.early_stopping.monitor, config.early_stopping.patience),
    ):
        if is_read and name not in known:
            names = ", ".join(sorted(known))
            raise ConfigError(f"{field}={name} is no metric of this run; there are {names}")
