"""The train step and the evaluation step: pure functions over a state and a batch.

    loss and gradients of each micro-batch -> mean -> optimizer -> learning rate -> new state

Randomness is a function of (seed, step, micro-batch). An update with a non-finite loss or gradient
is skipped: parameters and optimizer state stay as they were, to the bit.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from craft_jax.models.base import ModelDef, Params
from craft_jax.models.losses import PLAIN, LossConfig, Sums
from craft_jax.training.optim import Optimizer, Schedule
from craft_jax.training.precision import Policy
from craft_jax.training.state import TrainState

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
GradientSums = tuple[jax.Array, jax.Array, Params]
"""The sum of losses, the sum of weights, and the gradient of the former."""
GradientFunction = Callable[[TrainState, Batch], tuple[jax.Array, Params]]
StepFunction = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def step_key(seed: int) -> jax.Array:
    """The root of the steps' randomness, apart from that of the initial parameters."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def make_gradients(
    model_def: ModelDef,
    policy: Policy,
    *,
    seed: int,
    accumulate: int = 1,
    remat: bool = False,
    loss_config: LossConfig = PLAIN,
    axis_name: str | None = None,
) -> GradientFunction:
    """Returns `gradients(state, batch) -> (loss, grads)`: the mean over the targets of a batch.

    The batch is split along its first axis into `accumulate` micro-batches, whose gradients are
    summed in float32. Loss (nats per target) and gradient of a batch without targets are 0. With an
    `axis_name` the function is to be mapped: each device of that axis gets a shard of the batch and
    the whole state, and all return the same.
    """
    shaping = {} if loss_config.is_plain else {"config": loss_config}

    def of_micro_batch(state: TrainState, batch: Batch, key: jax.Array) -> GradientSums:
        def objective(params: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Any]]:
            model = model_def.merge(policy.cast(params))
            sums = model.loss(batch, key=key, remat=remat, **shaping)
            # float16 cannot hold the gradient of a sum over many targets.
            unit = jnp.maximum(sums.weight, 1) / state.loss_scale.value if policy.scales else 1
            return (sums.loss + sums.penalty) / unit, (sums.loss, sums.weight, unit)

        grads, (loss, weight, unit) = jax.grad(objective, has_aux=True)(state.params)
        return loss, weight, jax.tree.map(lambda g: g * unit, grads) if policy.scales else grads

    def accumulated(state: TrainState, batch: Batch, key: jax.Array) -> GradientSums:
        def add(sums: GradientSums, part: tuple[jax.Array, Batch]) -> tuple[GradientSums, None]:
            index, micro_batch = part
            more = of_micro_batch(state, micro_batch, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, sums, more), None

        parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), dict(batch))
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(of_micro_batch, state, first, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, (jnp.arange(accumulate), parts))[0]

    def gradients(state: TrainState, batch: Batch) -> tuple[jax.Array, Params]:
        key = jax.random.fold_in(step_key(seed), state.step)
        if axis_name:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        sums = (of_micro_batch if accumulate == 1 else accumulated)(state, batch, key)
        loss, weight, grads = jax.lax.psum(sums, axis_name) if axis_name else sums
        weight = jnp.where(weight == 0, 1, weight)
        return loss / weight, jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)

    return gradients


def make_update(
    gradients: GradientFunction,
    optimizer: Optimizer,
    schedule: Schedule,
    policy: Policy,
    *,
    norms_every: int = 0,
) -> StepFunction:
    """Returns `train_step(state, batch) -> (state, metrics)`, pure, to be jitted.

    Metrics are scalars: `loss` (nats per target), `learning_rate`, `grad_norm` (before clipping),
    `skipped` (1 where the update was not made) and, in float16, `loss_scale`; with `norms_every`
    there is also `norms`, see `_norms`.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, grads = gradients(state, batch)
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        rate = schedule(state.step) * state.lr_scale
        params, opt_state = optimizer.apply(grads, state.opt_state, state.params, rate)
        average = optimizer.average(params, opt_state, state.average, state.step)
        accepted = state.replace(params=params, opt_state=opt_state, average=average)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), accepted, state)
        metrics = {
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "skipped": 1 - finite.astype(jnp.int32),
        }
        if policy.scales:
            metrics["loss_scale"] = state.loss_scale.value
            kept = kept.replace(loss_scale=state.loss_scale.adjusted(finite))
        if norms_every:
            is_due = (state.step + 1) % norms_every == 0
            metrics["norms"] = _norms(is_due, grads, state.params, kept.params)
        return kept.replace(step=state.step + 1), metrics

    return train_step


def make_train_step(
    model_def: ModelDef,
    optimizer: Optimizer,
    schedule: Schedule,
    policy: Policy,
    *,
    norms_every: int = 0,
    **options: Any,
) -> StepFunction:
    """Returns the train step of a model: `make_update` of `make_gradients`, which see."""
    gradients = make_gradients(model_def, policy, **options)
    return make_update(gradients, optimizer, schedule, policy, norms_every=norms_every)


def _norms(is_due: jax.Array, grads: Params, before: Params, after: Params) -> Metrics:
    """Returns the norms of gradient, parameter and update for each path, float32 (3,); or zeros."""

    def measure() -> Metrics:
        return {
            path: jnp.stack(
                [
                    jnp.linalg.norm(array.astype(jnp.float32).reshape(-1))
                    for array in (grads[path], after[path], after[path] - before[path])
                ]
            )
            for path in after
        }

    return jax.lax.cond(is_due, measure, lambda: {path: jnp.zeros(3) for path in after})


def named_norms(norms: Mapping[str, jax.Array]) -> dict[str, float]:
    """Returns the norms of `_norms` by name: `gradient_norms/PATH` and so on."""
    kinds = ("gradient_norms", "parameter_norms", "update_norms")
    host = {path: np.asarray(values).tolist() for path, values in norms.items()}
    return {f"{kind}/{path}": host[path][n] for n, kind in enumerate(kinds) for path in host}


def make_eval_step(model_def: ModelDef, policy: Policy) -> Callable[[Params, Batch], Sums]:
    """Returns `eval_step(params, batch) -> sums`, pure and deterministic, to be jitted."""

    def eval_step(params: Params, batch: Batch) -> Sums:
        return model_def.merge(policy.cast(params)).loss(batch)

    return eval_step
