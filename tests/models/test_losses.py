import jax
import jax.numpy as jnp
import numpy as np
import pytest

from craft_jax.models.losses import LossConfig, cross_entropy, pair_cross_entropy


@pytest.fixture
def case(rng):
    return rng.normal(size=(2, 3, 5)).astype(np.float32), rng.integers(0, 5, (2, 3))


def test_by_hand(case):
    logits, targets = case
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(probs, targets[..., None], -1)).sum()
    sums = cross_entropy(jnp.asarray(logits), jnp.asarray(targets))
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-6)
    assert sums.weight == 6
    assert int(sums.correct) == (logits.argmax(-1) == targets).sum()


def test_weights(case):
    logits, targets = map(jnp.asarray, case)
    weights = jnp.array([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    sums = cross_entropy(logits, targets, weights)
    parts = [cross_entropy(logits[:1, i : i + 1], targets[:1, i : i + 1]) for i in (0, 2)]
    np.testing.assert_allclose(sums.loss, sum(part.loss for part in parts), rtol=1e-6)
    assert sums.weight == 2


def test_shifts_and_large_logits_do_no_harm(case):
    logits, targets = map(jnp.asarray, case)
    plain = cross_entropy(logits, targets).loss
    np.testing.assert_allclose(cross_entropy(logits + 1000, targets).loss, plain, rtol=1e-4)
    assert jnp.isfinite(cross_entropy(logits * 1e4, targets).loss)


def test_at_least_float32(case, x64):
    logits, targets = map(jnp.asarray, case)
    assert cross_entropy(logits.astype(jnp.bfloat16), targets).loss.dtype == jnp.float32
    assert cross_entropy(logits.astype(jnp.float64), targets).loss.dtype == jnp.float64


def test_gradient_is_softmax_minus_one_hot(case):
    logits, targets = map(jnp.asarray, case)
    gradient = jax.grad(lambda x: cross_entropy(x, targets).loss)(logits)
    expected = jax.nn.softmax(logits) - jax.nn.one_hot(targets, 5)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_label_smoothing_spreads_the_target(case):
    logits, targets = map(jnp.asarray, case)
    sums = cross_entropy(logits, targets, config=LossConfig(label_smoothing=0.1))
    spread = 0.9 * jax.nn.one_hot(targets, 5) + 0.1 / 5
    expected = -(spread * jax.nn.log_softmax(logits)).sum()
    np.testing.assert_allclose(sums.loss + sums.penalty, expected, rtol=1e-6)
    np.testing.assert_allclose(sums.loss, cross_entropy(logits, targets).loss)


def test_z_loss_counts_as_the_targets_do(case):
    logits, targets = map(jnp.asarray, case)
    weights = jnp.array([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]])
    config = LossConfig(z_loss=0.01)
    expected = 0.01 * (weights * jax.nn.logsumexp(logits, axis=-1) ** 2).sum()
    for made in (cross_entropy, pair_cross_entropy):
        sums = made(logits, targets, weights, config)
        np.testing.assert_allclose(sums.penalty, expected, rtol=1e-6)
        assert sums.loss == cross_entropy(logits, targets, weights).loss
