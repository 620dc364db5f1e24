"""The train step and the evaluation step: pure functions over a state and a batch.

    loss and gradients of each micro-batch -> mean -> optimizer -> learning rate -> new state

Randomness is a function of (seed, step, micro-batch). An update with a non-finite loss or gradient
is skipped: parameters and optimizer state stay as they were, to the bit.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from craft_jax.models.base import ModelDef, Params
from craft_jax.models.losses import PLAIN, LossConfig, Sums
from craft_jax.runtime import fault_injection
from craft_jax.training.optim import Optimizer, Schedule
from craft_jax.training.precision import Policy
from craft_jax.training.state import TrainState

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
Gradients = tuple[jax.Array, jax.Array, Params]


def step_key(seed: int) -> jax.Array:
    """The root of the steps' randomness, apart from that of the initial parameters."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def make_train_step(
    model_def: ModelDef,
    optimizer: Optimizer,
    schedule: Schedule,
    policy: Policy,
    *,
    seed: int,
    accumulate: int = 1,
    remat: bool = False,
    loss_config: LossConfig = PLAIN,
    axis_name: str | None = None,
    norms_every: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns `train_step(state, batch) -> (state, metrics)`, pure, to be jitted.

    The batch is split along its first axis into `accumulate` micro-batches, whose gradients add up
    to that of the whole. Metrics are scalars: `loss` (nats per target), `learning_rate`,
    `grad_norm` (before clipping), `skipped` (1 where the update was not made) and, in float16,
    `loss_scale`; with `norms_every` there is also `norms`, see `_norms`. With an `axis_name` the
    function is to be mapped: each device of that axis gets a part of the batch and the whole
    state, and all return the same.
    """
    shaping = {} if loss_config.is_plain else {"config": loss_config}

    def gradients(state: TrainState, batch: Batch, key: jax.Array) -> Gradients:
        """Returns the sums of losses and weights, and the gradient of the sum of losses."""

        def objective(params: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            model = model_def.merge(policy.cast(params))
            sums = model.loss(batch, key=key, remat=remat, **shaping)
            # float16 cannot hold the gradient of a sum over many targets.
            unit = jnp.maximum(sums.weight, 1) / state.loss_scale.value if policy.scales else 1
            return (sums.loss + sums.penalty) / unit, (sums.loss, sums.weight, unit)

        grads, (loss, weight, unit) = jax.grad(objective, has_aux=True)(state.params)
        return loss, weight, jax.tree.map(lambda g: g * unit, grads) if policy.scales else grads

    def accumulated(state: TrainState, batch: Batch, key: jax.Array) -> Gradients:
        """Returns what `gradients` does, computed in parts and added up in float32."""

        def add(sums: Gradients, part: tuple[jax.Array, Batch]) -> tuple[Gradients, None]:
            index, micro_batch = part
            more = gradients(state, micro_batch, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, sums, more), None

        parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), dict(batch))
        shapes = jax.eval_shape(gradients, state, jax.tree.map(lambda x: x[0], parts), key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, (jnp.arange(accumulate), parts))[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(step_key(seed), state.step)
        if axis_name:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        loss, weight, grads = (gradients if accumulate == 1 else accumulated)(state, batch, key)
        if axis_name:
            loss, weight, grads = jax.lax.psum((loss, weight, grads), axis_name)
        # Of a batch in which nothing is learned, loss and gradient are 0.
        weight = jnp.where(weight == 0, 1, weight)
        loss = loss / weight
        grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
        grads = fault_injection.poison(grads, state.step)
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


def make_eval_step(model_def: ModelDef, policy: Policy) -> Callable[[Params, Batch], Sums]:
    """Returns `eval_step(params, batch) -> sums`, pure and deterministic, to be jitted."""

    def eval_step(params: Params, batch: Batch) -> Sums:
        return model_def.merge(policy.cast(params)).loss(batch)

    return eval_step
