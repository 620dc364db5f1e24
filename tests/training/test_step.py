import dataclasses
import functools
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from craft_jax import optim
from craft_jax.losses import LossConfig
from craft_jax.models import base
from craft_jax.models.gpt import GPT, GPTConfig
from craft_jax.optim import OptimConfig
from craft_jax.precision import LossScale, Policy
from craft_jax.training import state as states
from craft_jax.training.step import make_eval_step, make_train_step


@functools.cache
def setup(dropout=0.0, accumulate=1, remat=False, precision="float32", seed=0, optim_config=None):
    config = GPTConfig(
        vocab_size=16, num_layers=2, num_heads=2, d_model=16, max_seq_len=8, dropout=dropout
    )
    optim_config = optim_config or OptimConfig(weight_decay=0.1)
    optimizer = optim.make_optimizer(optim_config)
    policy = Policy.named(precision)
    step = make_train_step(
        base.define(GPT, config),
        optimizer,
        optim.make_schedule(dataclasses.replace(optim_config, warmup_steps=0), 100),
        policy,
        seed=seed,
        accumulate=accumulate,
        remat=remat,
    )
    params = jax.jit(lambda k: base.init_params(GPT, config, k))(jax.random.key(0))
    return jax.jit(step), states.from_params(params, optimizer, policy)


def batch(seed=0, rows=12, weights=None):
    tokens = np.random.default_rng(seed).integers(0, 16, (rows, 9)).astype(np.int32)
    made = {"tokens": jnp.asarray(tokens[:, :-1]), "targets": jnp.asarray(tokens[:, 1:])}
    return made if weights is None else made | {"weights": jnp.asarray(weights)}


def assert_equal_bits(a, b):
    for (path, x), (_, y) in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree_util.tree_leaves_with_path(b), strict=True
    ):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def test_it_learns():
    step, state = setup()
    losses = []
    for _ in range(100):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(16), abs=0.1)
    assert losses[-1] < 0.8 * losses[0]
    assert state.step == 100


@pytest.mark.parametrize("weights", [None, "uneven"])
def test_accumulation_equals_the_big_batch(weights, rng):
    if weights:
        weights = (rng.random((12, 8)) < np.linspace(0.1, 1, 12)[:, None]).astype(np.float32)
    (big, state), (small, _) = setup(), setup(accumulate=4)
    one, metrics_one = big(state, batch(weights=weights))
    four, metrics_four = small(state, batch(weights=weights))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics_one[name], metrics_four[name], rtol=1e-5)
    for path in one.params:
        np.testing.assert_allclose(one.params[path], four.params[path], atol=1e-5, err_msg=path)


def test_remat_is_the_same_step():
    (plain, state), (remat, _) = setup(dropout=0.2), setup(dropout=0.2, remat=True)
    one, two = plain(state, batch())[1], remat(state, batch())[1]
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-6)
    np.testing.assert_allclose(one["grad_norm"], two["grad_norm"], rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 3])
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
    step, state = setup(dropout=0.5, accumulate=2)
    alone, _ = setup(dropout=0.5)
    half = batch(rows=4)
    doubled = {k: jnp.concatenate([v, v]) for k, v in half.items()}
    assert float(step(state, doubled)[1]["loss"]) != float(alone(state, half)[1]["loss"])


@pytest.mark.parametrize("name", ["muon", "schedule_free_adamw", "adafactor"])
def test_accumulation_with_other_optimizers(name):
    config = OptimConfig(name=name, ema_decay=None if "free" in name else 0.9)
    (big, state), (small, _) = (setup(optim_config=config, accumulate=n) for n in (1, 4))
    one, _ = big(state, batch())
    four, _ = small(state, batch())
    for path in one.params:
        np.testing.assert_allclose(one.params[path], four.params[path], atol=1e-5, err_msg=path)
        np.testing.assert_allclose(
            one.best_params[path], four.best_params[path], atol=1e-5, err_msg=path
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_bad_step_changes_nothing_but_the_counter(bad, accumulate):
    step, state = setup(accumulate=accumulate, optim_config=OptimConfig(ema_decay=0.9))
    state, _ = step(state, batch())
    weights = np.ones((12, 8), np.float32)
    weights[7, 3] = bad
    after, metrics = step(state, batch(weights=weights))
    assert metrics["skipped"] == 1
    assert_equal_bits(after.replace(step=state.step), state)
    assert after.step == state.step + 1
    healed, metrics = step(after, batch())
    assert metrics["skipped"] == 0
    assert np.isfinite(metrics["loss"])
    assert healed.step == 3


def test_the_learning_rate_is_scaled_by_the_state():
    step, state = setup()
    _, full = step(state, batch())
    _, half = step(state.replace(lr_scale=jnp.float32(0.5)), batch())
    np.testing.assert_allclose(half["learning_rate"], full["learning_rate"] / 2, rtol=1e-6)


def test_bfloat16_is_close_to_float32():
    (wide, state), (narrow, _) = setup(), setup(precision="bfloat16")
    one, two = wide(state, batch())[1], narrow(state, batch())[1]
    assert two["loss"].dtype == jnp.float32
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-2)
    new_state, _ = narrow(state, batch())
    assert {v.dtype.name for v in new_state.params.values()} == {"float32"}


def test_evaluation_is_deterministic_and_weighted():
    config = GPTConfig(vocab_size=16, num_layers=1, num_heads=2, d_model=16, dropout=0.5)
    params = base.init_params(GPT, config, jax.random.key(0))
    evaluate = jax.jit(make_eval_step(base.define(GPT, config), Policy.named("float32")))
    first, second = evaluate(params, batch()), evaluate(params, batch())
    assert float(first.loss) == float(second.loss)
    weights = np.zeros((12, 8), np.float32)
    weights[0] = 1
    assert evaluate(params, batch(weights=weights)).weight == 8


@pytest.mark.parametrize("accumulate", [1, 3])
def test_float16_takes_the_step_of_float32(accumulate):
    (wide, state), (narrow, scaled) = setup(), setup(precision="float16", accumulate=accumulate)
    one, expected = wide(state, batch())
    two, found = narrow(scaled, batch())
    assert found["loss_scale"] == 2**16
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(found[name], expected[name], rtol=5e-3)
    for path in one.params:
        np.testing.assert_allclose(one.params[path], two.params[path], atol=2e-3, err_msg=path)


def test_an_overflow_halves_the_scale_and_changes_nothing_else():
    step, state = setup(precision="float16")
    state, _ = step(state, batch())
    state = state.replace(loss_scale=LossScale(jnp.float32(2.0**60), jnp.int32(7)))
    after, metrics = step(state, batch())
    assert metrics["skipped"] == 1
    assert after.loss_scale == LossScale(2.0**59, 0)
    assert_equal_bits(after.replace(step=state.step, loss_scale=state.loss_scale), state)
    for _ in range(60):
        after, metrics = step(after, batch())
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
    step, state = setup(precision="float16")
    tiny = {path: value * 1e-3 for path, value in state.params.items()}
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
    config = GPTConfig(vocab_size=16, num_layers=2, num_heads=2, d_model=16, max_seq_len=8)
    smooth = jax.jit(
        make_train_step(
            base.define(GPT, config),
            optim.make_optimizer(OptimConfig(weight_decay=0.1)),
            optim.make_schedule(OptimConfig(warmup_steps=0), 100),
            Policy.named("float32"),
            seed=0,
            loss_config=LossConfig(label_smoothing=0.3, z_loss=0.1),
        )
    )
    one, two = step(state, batch())[1], smooth(state, batch())[1]
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-6)
    assert abs(float(one["grad_norm"]) / float(two["grad_norm"]) - 1) > 0.05


@pytest.mark.parametrize("name", get_args(get_type_hints(OptimConfig)["name"]))
def test_every_optimizer_learns(name):
    # Adafactor's rate is relative to the size of the parameters, and that of sgd to the gradient's.
    rates = {"sgd": 0.5, "adafactor": 0.1}
    config = OptimConfig(name=name, learning_rate=rates.get(name, 3e-3))
    step, state = setup(optim_config=config)
    for _ in range(60):
        state, metrics = step(state, batch())
    assert metrics["loss"] < 0.9 * np.log(16)
