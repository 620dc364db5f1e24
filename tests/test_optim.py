import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from craft_jax import optim, schema
from craft_jax.optim import OptimConfig


def rates(num_steps=100, **values):
    config = OptimConfig(learning_rate=1.0, min_learning_rate=0.1, **values)
    schedule = optim.make_schedule(config, num_steps)
    return np.array([schedule(jnp.asarray(step)) for step in range(num_steps + 1)])


def test_warm_up_then_cosine_by_the_formula():
    got = rates(schedule="cosine", warmup_steps=10)
    for step in range(101):
        if step < 10:
            expected = (step + 1) / 11
        else:
            expected = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 10) / 90))
        assert abs(got[step] - expected) < 1e-6


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_from_the_peak_to_the_minimum(schedule):
    got = rates(schedule=schedule, warmup_steps=10)
    assert got.argmax() == 10
    assert got.max() == 1
    np.testing.assert_allclose(got[100], 0.1, rtol=1e-6)
    assert (np.diff(got[:10]) > 0).all()
    assert (np.diff(got[10:]) <= 1e-7).all()


def test_the_others():
    assert (rates(schedule="constant", warmup_steps=0) == 1).all()
    wsd = rates(schedule="wsd", warmup_steps=0)
    assert (wsd[:81] == 1).all()
    np.testing.assert_allclose(wsd[90], 0.55, rtol=1e-6)
    inverse = rates(schedule="inverse_sqrt", warmup_steps=9)
    np.testing.assert_allclose(inverse[39], 0.5, rtol=1e-6)
    assert rates(num_steps=2000, schedule="inverse_sqrt", warmup_steps=9)[-1] == pytest.approx(0.1)


def test_a_horizon_of_its_own():
    long = optim.make_schedule(OptimConfig(warmup_steps=10, decay_steps=500), 100)
    same = optim.make_schedule(OptimConfig(warmup_steps=10), 500)
    assert [long(jnp.asarray(s)) for s in (0, 50, 499)] == [
        same(jnp.asarray(s)) for s in (0, 50, 499)
    ]


def test_decay_only_on_matrices():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)}
    optimizer = optim.make_optimizer(OptimConfig(weight_decay=0.5))
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    assert (updates["kernel"] == 0.5).all()
    assert (updates["bias"] == 0).all()
    assert (updates["scale"] == 0).all()


def test_clipping_is_of_the_whole_gradient():
    params = {"a": jnp.zeros((1, 1)), "b": jnp.zeros(1)}
    grads = {"a": jnp.full((1, 1), 30.0), "b": jnp.full(1, 40.0)}

    def first_moment(clip_norm):
        optimizer = optim.make_optimizer(OptimConfig(clip_norm=clip_norm, beta1=0.0))
        state = optimizer.update(grads, optimizer.init(params), params)[1]
        return next(s.mu for s in state if hasattr(s, "mu"))

    np.testing.assert_allclose(first_moment(5.0)["a"][0, 0], 3.0, rtol=1e-6)
    np.testing.assert_allclose(first_moment(5.0)["b"][0], 4.0, rtol=1e-6)
    assert first_moment(None)["a"][0, 0] == 30


def test_contradictions():
    assert schema.problems(OptimConfig(), "optim") == []
    wrong = OptimConfig(learning_rate=1e-4, min_learning_rate=1e-3, warmup_steps=9, decay_steps=5)
    assert len(schema.problems(wrong, "optim")) == 2


@pytest.mark.torch
def test_the_same_steps_as_torch(x64, rng):
    import torch

    weights, bias = rng.normal(size=(4, 3)), rng.normal(size=3)
    config = OptimConfig(weight_decay=0.1, clip_norm=None, beta1=0.8, beta2=0.95, eps=1e-6)
    optimizer = optim.make_optimizer(config)
    params = {"w": jnp.asarray(weights), "b": jnp.asarray(bias)}
    state = optimizer.init(params)
    w, b = torch.tensor(weights, requires_grad=True), torch.tensor(bias, requires_grad=True)
    groups = [{"params": [w], "weight_decay": 0.1}, {"params": [b], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    for _ in range(20):
        grads = {"w": rng.normal(size=(4, 3)), "b": rng.normal(size=3)}
        w.grad, b.grad = torch.tensor(grads["w"]), torch.tensor(grads["b"])
        theirs.step()
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, grads), state, params)
        params = jax.tree.map(lambda p, u: p - 0.01 * u, params, updates)
    np.testing.assert_allclose(params["w"], w.detach().numpy(), atol=1e-14)
    np.testing.assert_allclose(params["b"], b.detach().numpy(), atol=1e-14)
