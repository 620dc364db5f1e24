"""The train step and the evaluation step: pure functions over a state and a batch.

    loss and gradients of each micro-batch -> mean -> optimizer -> learning rate -> new state

Randomness is a function of (seed, step, micro-batch). An update with a non-finite loss or gradient
is skipped: parameters and optimizer state stay as they were, to the bit.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from craft_jax.losses import LossSums, PairSums
from craft_jax.models.base import ModelDef, Params
from craft_jax.optim import Schedule
from craft_jax.precision import Policy
from craft_jax.training.state import TrainState

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


def step_key(seed: int) -> jax.Array:
    """The root of the steps' randomness, apart from that of the initial parameters."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def make_train_step(
    model_def: ModelDef,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    policy: Policy,
    *,
    seed: int,
    accumulate: int = 1,
    remat: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns `train_step(state, batch) -> (state, metrics)`, pure, to be jitted.

    The batch is split along its first axis into `accumulate` micro-batches, whose gradients add up
    to that of the whole. Metrics are scalars: `loss` (nats per target), `learning_rate`,
    `grad_norm` (before clipping) and `skipped` (1 where the update was not made).
    """

    def loss_sum(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        sums = model_def.merge(policy.cast(params)).loss(batch, key=key, remat=remat)
        return sums.loss, sums.weight

    def gradients(params: Params, batch: Batch, key: jax.Array) -> tuple:
        """Returns sum of losses, sum of weights, and gradient of the former."""
        grad = jax.value_and_grad(loss_sum, has_aux=True)
        if accumulate == 1:
            (loss, weight), grads = grad(params, batch, key)
            return loss, weight, grads

        def add(sums, micro_batch):
            micro_key = jax.random.fold_in(key, micro_batch["index"])
            (loss, weight), grads = grad(params, micro_batch["batch"], micro_key)
            return jax.tree.map(jnp.add, sums, (loss, weight, grads)), None

        parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), dict(batch))
        micro_batches = {"index": jnp.arange(accumulate), "batch": parts}
        first = jax.tree.map(lambda x: x[0], micro_batches)
        shapes = jax.eval_shape(lambda b: grad(params, b["batch"], key), first)
        (loss, weight), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, (loss, weight, grads), micro_batches)[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(step_key(seed), state.step)
        loss, weight, grads = gradients(state.params, batch, key)
        loss = loss / weight
        grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        rate = schedule(state.step) * state.lr_scale
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - rate.astype(p.dtype) * u, state.params, updates)

        accepted = state.replace(params=params, opt_state=opt_state)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), accepted, state)
        metrics = {
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "skipped": 1 - finite.astype(jnp.int32),
        }
        return kept.replace(step=state.step + 1), metrics

    return train_step


def make_eval_step(
    model_def: ModelDef, policy: Policy
) -> Callable[[Params, Batch], LossSums | PairSums]:
    """Returns `eval_step(params, batch) -> sums`, pure and deterministic, to be jitted."""

    def eval_step(params: Params, batch: Batch) -> LossSums | PairSums:
        return model_def.merge(policy.cast(params)).loss(batch)

    return eval_step
