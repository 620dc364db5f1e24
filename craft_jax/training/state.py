"""The state of training: a frozen value that a train step maps to the next."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from craft_jax.models import base
from craft_jax.models.base import ModelDef, Params
from craft_jax.parallel import sharding
from craft_jax.training.optim import Optimizer
from craft_jax.training.precision import FLOAT32, LossScale, Policy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Parameters, optimizer state and counters.

    Attributes:
      step: updates made so far, int32 scalar.
      params: parameters by path.
      opt_state: the optimizer's state.
      lr_scale: factor on the schedule's learning rate, float32 scalar.
      loss_scale: of float16; None in other precisions.
      average: the parameters that are evaluated and exported, where the optimizer keeps an average
        of them; else None.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    lr_scale: jax.Array
    loss_scale: LossScale | None = None
    average: Params | None = None

    @property
    def eval_params(self) -> Params:
        """The parameters that are evaluated, sampled from and exported."""
        return self.params if self.average is None else self.average

    def replace(self, **changes: Any) -> "TrainState":
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def from_params(params: Params, optimizer: Optimizer, policy: Policy = FLOAT32) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        lr_scale=jnp.ones((), jnp.float32),
        loss_scale=LossScale.first() if policy.scales else None,
        average=jax.tree.map(jnp.copy, params) if optimizer.averages else None,
    )


def abstract_state(
    model_def: ModelDef, optimizer: Optimizer, mesh: Mesh, policy: Policy = FLOAT32
) -> TrainState:
    """Returns shapes, dtypes and shardings of a state, without arrays."""
    state = jax.eval_shape(lambda p: from_params(p, optimizer, policy), model_def.shapes)
    shardings = sharding.tree_shardings(state, mesh)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        state,
        shardings,
    )


def init_state(
    cls: type,
    config: Any,
    optimizer: Optimizer,
    *,
    seed: int,
    mesh: Mesh,
    policy: Policy = FLOAT32,
) -> TrainState:
    """Draws fresh parameters, each on the devices where it belongs from the start."""

    # The key is made inside: outside, each of its small programs would be compiled at every start.
    def init(seed: jax.Array) -> TrainState:
        key = jax.random.fold_in(jax.random.key(seed), 0)
        return from_params(base.init_params(cls, config, key), optimizer, policy)

    number = np.uint32(seed)
    shardings = sharding.tree_shardings(jax.eval_shape(init, number), mesh)
    return jax.jit(init, out_shardings=shardings)(number)


def begin(params: Params, optimizer: Optimizer, mesh: Mesh, policy: Policy = FLOAT32) -> TrainState:
    """Returns the state before the first step with parameters that are there already.

    Args:
      params: on the devices where they belong; taken over.
      optimizer, mesh, policy: as for `init_state`.
    """

    def make(params: Params) -> TrainState:
        return from_params(params, optimizer, policy)

    shardings = sharding.tree_shardings(jax.eval_shape(make, params), mesh)
    return jax.jit(make, out_shardings=shardings, donate_argnums=0)(params)
