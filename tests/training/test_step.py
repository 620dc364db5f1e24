import dataclasses
import functools
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from craft_jax.models import base
from craft_jax.models.losses import PLAIN as NO_SHAPING
from craft_jax.models.losses import LossConfig
from craft_jax.training import optim
from craft_jax.training import state as states
from craft_jax.training.optim import OptimConfig
from craft_jax.training.precision import LossScale, Policy
from craft_jax.training.step import make_eval_step, make_train_step
from tests.kinds import KINDS

every_kind = pytest.mark.parametrize("kind", KINDS)


# Nothing in a step depends on how many layers there are. A moving average is part of every step.
CONFIGS = {
    kind: dataclasses.replace(KINDS[kind].config, num_layers=1, d_model=32) for kind in KINDS
}
# With the usual epsilon of 1e-8, rounding decides the update where a gradient is next to nothing.
EPS = 1e-6
PLAIN = OptimConfig(weight_decay=0.1, ema_decay=0.9, eps=EPS)


def setup(kind="gpt", **options):
    """A compiled step and its first state, of which tests with the same options share one."""
    options = {"precision": "float32", "optim_config": PLAIN} | options
    state = fresh_state(kind, options["precision"], options["optim_config"])
    return compiled(kind, **dict(sorted(options.items()))), state


@functools.cache
def compiled(
    kind,
    *,
    optim_config,
    precision,
    dropout=0.0,
    accumulate=1,
    remat=False,
    seed=0,
    loss=NO_SHAPING,
):
    step = make_train_step(
        base.define(KINDS[kind].cls, dataclasses.replace(CONFIGS[kind], dropout=dropout)),
        optim.make_optimizer(optim_config),
        optim.make_schedule(dataclasses.replace(optim_config, warmup_steps=0), 100),
        Policy.named(precision),
        seed=seed,
        accumulate=accumulate,
        remat=remat,
        loss_config=loss,
    )
    return jax.jit(step)


@functools.cache
def first_params(kind):
    init = functools.partial(base.init_params, KINDS[kind].cls, CONFIGS[kind])
    return jax.jit(init)(jax.random.key(0))


@functools.cache
def fresh_state(kind, precision, optim_config):
    optimizer, policy = optim.make_optimizer(optim_config), Policy.named(precision)
    return states.from_params(first_params(kind), optimizer, policy)


def soak(*cell):
    """A cell of a matrix whose values all have other cells by default."""
    return pytest.param(*cell, marks=pytest.mark.soak)


def batch(seed=0, rows=12, weights=None, kind="gpt"):
    made = {name: jnp.asarray(array) for name, array in KINDS[kind].batch(seed, rows).items()}
    return made if weights is None else made | {"weights": jnp.asarray(weights)}


def assert_equal_bits(a, b):
    for (path, x), (_, y) in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree_util.tree_leaves_with_path(b), strict=True
    ):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


@every_kind
def test_it_learns(kind):
    step, state = setup(kind)
    losses, same = [], batch(kind=kind)
    for _ in range(100):
        state, metrics = step(state, same)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(KINDS[kind].first_loss, rel=0.1)
    assert losses[-1] < 0.8 * losses[0]
    assert state.step == 100


def test_the_moving_average_follows_the_parameters():
    step, state = setup()
    for _ in range(2):
        before, (state, _) = state, step(state, batch())
        decay = min(0.9, (1 + before.step) / (10 + before.step))
        for path, average in state.average.items():
            expected = decay * before.average[path] + (1 - decay) * state.params[path]
            np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-7)
            assert (average != before.average[path]).any()


# Weights vary by token in the first two kinds and by row in the last: all are uneven, one is even.
@pytest.mark.parametrize(
    ("kind", "weights"), [("gpt", None), *((kind, "uneven") for kind in KINDS)], ids=str
)
def test_accumulation_equals_the_big_batch(kind, weights, rng):
    if weights:
        shape = (*KINDS[kind].weights_shape, 12)
        weights = (rng.random(shape) < np.linspace(0.1, 1, 12)).astype(np.float32).T
    (big, state), (small, _) = setup(kind), setup(kind, accumulate=4)
    one, metrics_one = big(state, batch(weights=weights, kind=kind))
    four, metrics_four = small(state, batch(weights=weights, kind=kind))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics_one[name], metrics_four[name], rtol=1e-5)
    for path in one.params:
        np.testing.assert_allclose(one.params[path], four.params[path], atol=1e-5, err_msg=path)


@pytest.mark.parametrize("kind", ["gpt", soak("image_gpt"), "flow"])
def test_remat_is_the_same_step(kind):
    (plain, state), (remat, _) = setup(kind, dropout=0.5), setup(kind, dropout=0.5, remat=True)
    same = batch(kind=kind)
    one, two = plain(state, same)[1], remat(state, same)[1]
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-6)
    np.testing.assert_allclose(one["grad_norm"], two["grad_norm"], rtol=1e-5)


@pytest.mark.parametrize("accumulate", [soak(1), 4])
def test_dropout_follows_seed_and_step(accumulate):
    step, state = setup(dropout=0.5, accumulate=accumulate)
    other_seed, _ = setup(dropout=0.5, accumulate=accumulate, seed=1)
    later = state.replace(step=state.step + 1)
    first, again = step(state, batch())[1], step(state, batch())[1]
    assert float(first["loss"]) == float(again["loss"])
    assert float(first["loss"]) != float(step(later, batch())[1]["loss"])
    assert float(first["loss"]) != float(other_seed(state, batch())[1]["loss"])


def test_micro_batches_have_dropout_of_their_own():
    """With equal micro-batches, equal masks would give the loss of one of them."""
    step, state = setup(dropout=0.5, accumulate=4)
    alone, _ = setup(dropout=0.5)
    part = batch(rows=3)
    repeated = {k: jnp.concatenate([v] * 4) for k, v in part.items()}
    assert float(step(state, repeated)[1]["loss"]) != float(alone(state, part)[1]["loss"])


# An optimizer is given the gradient of the whole batch, however that came about; the one by default
# is the one with an average of its own.
@pytest.mark.parametrize("name", ["schedule_free_adamw", *map(soak, ("muon", "adafactor"))])
def test_accumulation_with_other_optimizers(name):
    config = config_of(name)
    if name == "adafactor":  # It learns at a rate that makes rounding too large.
        config = dataclasses.replace(config, learning_rate=1e-3)
    (big, state), (small, _) = (setup(optim_config=config, accumulate=n) for n in (1, 4))
    one, _ = big(state, batch())
    four, _ = small(state, batch())
    for path in one.params:
        np.testing.assert_allclose(one.params[path], four.params[path], atol=1e-5, err_msg=path)
        np.testing.assert_allclose(
            one.eval_params[path], four.eval_params[path], atol=1e-5, err_msg=path
        )


@every_kind
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_bad_step_changes_nothing_but_the_counter(bad, accumulate, kind):
    step, state = setup(kind, accumulate=accumulate)
    state, _ = step(state, batch(kind=kind))
    weights = np.ones((12, *KINDS[kind].weights_shape), np.float32)
    weights[7] = bad
    after, metrics = step(state, batch(weights=weights, kind=kind))
    assert metrics["skipped"] == 1
    assert_equal_bits(after.replace(step=state.step), state)
    assert after.step == state.step + 1
    healed, metrics = step(after, batch(kind=kind))
    assert metrics["skipped"] == 0
    assert np.isfinite(metrics["loss"])
    assert healed.step == 3


def test_the_learning_rate_is_scaled_by_the_state():
    step, state = setup()
    _, full = step(state, batch())
    _, half = step(state.replace(lr_scale=jnp.float32(0.5)), batch())
    np.testing.assert_allclose(half["learning_rate"], full["learning_rate"] / 2, rtol=1e-6)


# In half precision a step treats all models alike; what a flow computes is in test_flow.py.
@pytest.mark.parametrize("kind", ["gpt", soak("image_gpt"), soak("flow")])
def test_bfloat16_is_close_to_float32(kind):
    (wide, state), (narrow, _) = setup(kind), setup(kind, precision="bfloat16")
    same = batch(kind=kind)
    one, two = wide(state, same)[1], narrow(state, same)[1]
    assert two["loss"].dtype == jnp.float32
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-2)
    new_state, _ = narrow(state, same)
    assert {v.dtype.name for v in new_state.params.values()} == {"float32"}


@every_kind
def test_evaluation_is_deterministic_and_weighted(kind):
    cls, config = KINDS[kind].cls, dataclasses.replace(CONFIGS[kind], dropout=0.5)
    params = first_params(kind)
    evaluate = jax.jit(make_eval_step(base.define(cls, config), Policy.named("float32")))
    first, second = evaluate(params, batch(kind=kind)), evaluate(params, batch(kind=kind))
    assert float(first.loss) == float(second.loss)
    weights = np.zeros((12, *KINDS[kind].weights_shape), np.float32)
    weights[0] = 1
    assert evaluate(params, batch(weights=weights, kind=kind)).weight == weights.sum()


@pytest.mark.parametrize(
    ("kind", "accumulate"),
    [
        # Of one micro-batch: in test_trainer.py.
        soak("gpt", 1),
        ("gpt", 4),
        *(soak(kind, count) for kind in ("image_gpt", "flow") for count in (1, 4)),
    ],
)
def test_float16_takes_the_step_of_float32(kind, accumulate):
    wide, state = setup(kind)
    narrow, scaled = setup(kind, precision="float16", accumulate=accumulate)
    one, expected = wide(state, batch(kind=kind))
    two, found = narrow(scaled, batch(kind=kind))
    assert found["loss_scale"] == 2**16
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(found[name], expected[name], rtol=5e-3)
    for path in one.params:
        np.testing.assert_allclose(one.params[path], two.params[path], atol=2e-3, err_msg=path)


@pytest.mark.parametrize("kind", ["gpt", soak("image_gpt"), soak("flow")])
def test_an_overflow_halves_the_scale_and_changes_nothing_else(kind):
    step, state = setup(kind, precision="float16", accumulate=4)
    same = batch(kind=kind)
    state, _ = step(state, same)
    state = state.replace(loss_scale=LossScale(jnp.float32(2.0**60), jnp.int32(7)))
    after, metrics = step(state, same)
    assert metrics["skipped"] == 1
    assert after.loss_scale == LossScale(2.0**59, 0)
    assert_equal_bits(after.replace(step=state.step, loss_scale=state.loss_scale), state)
    for _ in range(60):
        after, metrics = step(after, same)
    assert metrics["skipped"] == 0
    assert np.isfinite(metrics["loss"])


def test_the_scale_doubles_after_many_good_steps():
    scale = LossScale(jnp.float32(8.0), jnp.int32(1998))
    scale = scale.adjusted(jnp.array(True))
    assert scale == LossScale(8.0, 1999)
    scale = scale.adjusted(jnp.array(True))
    assert scale == LossScale(16.0, 0)
    assert scale.adjusted(jnp.array(False)) == LossScale(8.0, 0)
    assert LossScale(jnp.float32(1.0), jnp.int32(0)).adjusted(jnp.array(False)).value == 1
    largest = LossScale(jnp.float32(2.0**24), jnp.int32(1999))
    assert largest.adjusted(jnp.array(True)).value == 2.0**24


def test_small_gradients_need_the_scale():
    """Without it, float16 rounds them to zero: the embedding's are the first to go."""
    step, state = setup(precision="float16", accumulate=4)
    tiny = {path: value * 1e-4 for path, value in state.params.items()}
    norms = {
        scale: float(
            step(
                state.replace(params=tiny, loss_scale=LossScale(jnp.float32(scale), jnp.int32(0))),
                batch(),
            )[1]["grad_norm"]
        )
        for scale in (1.0, 2.0**16)
    }
    exact, wide = setup()
    expected = float(exact(wide.replace(params=tiny), batch())[1]["grad_norm"])
    assert norms[2.0**16] == pytest.approx(expected, rel=1e-2)
    assert norms[1.0] != pytest.approx(expected, rel=1e-2)


def test_smoothing_steers_the_gradient_and_not_the_loss():
    step, state = setup()
    smooth, _ = setup(loss=LossConfig(label_smoothing=0.3, z_loss=0.1))
    one, two = step(state, batch())[1], smooth(state, batch())[1]
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-6)
    assert abs(float(one["grad_norm"]) / float(two["grad_norm"]) - 1) > 0.05


def config_of(name):
    # Adafactor's rate is relative to the size of the parameters, and that of sgd to the gradient's.
    rates = {"sgd": 0.5, "adafactor": 0.1}
    average = None if "free" in name else 0.9
    rate = rates.get(name, 3e-3)
    return OptimConfig(name=name, learning_rate=rate, ema_decay=average, eps=EPS)


NAMES = get_args(get_type_hints(OptimConfig)["name"])


# adamw is what `test_it_learns` learns with.
@pytest.mark.parametrize("name", [soak(name) if name == "adamw" else name for name in NAMES])
def test_every_optimizer_learns(name):
    step, state = setup(optim_config=config_of(name))
    for _ in range(60):
        state, metrics = step(state, batch())
    assert metrics["loss"] < 0.9 * np.log(16)
