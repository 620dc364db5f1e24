import jax
import jax.numpy as jnp
import numpy as np
import pytest

from craft_jax import optim
from craft_jax.models import base
from craft_jax.models.gpt import GPT, GPTConfig
from craft_jax.optim import OptimConfig
from craft_jax.precision import Policy
from craft_jax.training import state as states
from craft_jax.training.step import make_eval_step, make_train_step


def setup(dropout=0.0, accumulate=1, remat=False, precision="float32", seed=0):
    config = GPTConfig(
        vocab_size=16, num_layers=2, num_heads=2, d_model=16, max_seq_len=8, dropout=dropout
    )
    optimizer = optim.make_optimizer(OptimConfig(weight_decay=0.1))
    step = make_train_step(
        base.define(GPT, config),
        optimizer,
        optim.make_schedule(OptimConfig(warmup_steps=0), 100),
        Policy.named(precision),
        seed=seed,
        accumulate=accumulate,
        remat=remat,
    )
    params = jax.jit(lambda k: base.init_params(GPT, config, k))(jax.random.key(0))
    return jax.jit(step), states.from_params(params, optimizer)


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


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_bad_step_changes_nothing_but_the_counter(bad, accumulate):
    step, state = setup(accumulate=accumulate)
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
