import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from craft_jax import schema
from craft_jax.training import optim
from craft_jax.training.optim import OptimConfig


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
    after, _ = optimizer.apply(zero, optimizer.init(params), params, jnp.float32(0.5))
    assert (after["kernel"] == 0.75).all()
    assert (after["bias"] == 1).all()
    assert (after["scale"] == 1).all()


def test_clipping_is_of_the_whole_gradient():
    params = {"a": jnp.zeros((1, 1)), "b": jnp.zeros(1)}
    grads = {"a": jnp.full((1, 1), 30.0), "b": jnp.full(1, 40.0)}

    def first_moment(clip_norm):
        optimizer = optim.make_optimizer(OptimConfig(clip_norm=clip_norm, beta1=0.0))
        state = optimizer.apply(grads, optimizer.init(params), params, jnp.float32(1))[1]
        return next(s.mu for s in state if hasattr(s, "mu"))

    np.testing.assert_allclose(first_moment(5.0)["a"][0, 0], 3.0, rtol=1e-6)
    np.testing.assert_allclose(first_moment(5.0)["b"][0], 4.0, rtol=1e-6)
    assert first_moment(None)["a"][0, 0] == 30


def test_contradictions():
    assert schema.problems(OptimConfig(), "optim") == []
    for wrong in (
        OptimConfig(name="schedule_free_adamw", beta1=0.0),
        OptimConfig(name="schedule_free_adamw", ema_decay=0.9),
        OptimConfig(lr_multipliers=("embedding",)),
        OptimConfig(lr_multipliers=("=2",)),
        OptimConfig(decay_multipliers=("a[=1",)),
        OptimConfig(decay_multipliers=("a=-1",)),
        OptimConfig(decay_multipliers=("a=nan",)),
    ):
        assert len(schema.problems(wrong, "optim")) == 1, wrong
    wrong = OptimConfig(learning_rate=1e-4, min_learning_rate=1e-3, warmup_steps=9, decay_steps=5)
    assert len(schema.problems(wrong, "optim")) == 2


@pytest.mark.torch
def test_the_same_steps_as_torch(x64, rng):
    import torch

    weights, bias = rng.normal(size=(4, 3)), rng.normal(size=3)
    config = OptimConfig(weight_decay=0.1, clip_norm=None, beta1=0.8, beta2=0.95, eps=1e-6)
    optimizer = optim.make_optimizer(config)
    params = {"w": jnp.asarray(weights), "b": jnp.asarray(bias)}
    state, apply = optimizer.init(params), jax.jit(optimizer.apply)
    w, b = torch.tensor(weights, requires_grad=True), torch.tensor(bias, requires_grad=True)
    groups = [{"params": [w], "weight_decay": 0.1}, {"params": [b], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    for _ in range(20):
        grads = {"w": rng.normal(size=(4, 3)), "b": rng.normal(size=3)}
        w.grad, b.grad = torch.tensor(grads["w"]), torch.tensor(grads["b"])
        theirs.step()
        grads = jax.tree.map(jnp.asarray, grads)
        params, state = apply(grads, state, params, jnp.float64(0.01))
    np.testing.assert_allclose(params["w"], w.detach().numpy(), atol=1e-14)
    np.testing.assert_allclose(params["b"], b.detach().numpy(), atol=1e-14)


PARAMS = {
    "token_embedding.embedding": (16, 8),
    "blocks.0.attn.query.kernel": (8, 12),
    "blocks.0.attn.query.bias": (12,),
    "head.kernel": (8, 16),
}
NAMES = ("adamw", "adafactor", "lion", "sgd", "muon", "schedule_free_adamw")


def some_params(rng):
    return {k: jnp.asarray(rng.normal(size=shape), jnp.float32) for k, shape in PARAMS.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    # In test_step.py all of them learn with the first.
    "moment_dtype",
    [pytest.param("float32", marks=pytest.mark.soak), "bfloat16"],
)
def test_every_optimizer_descends(name, moment_dtype, rng):
    """On the squared distance to other parameters, whose gradient is the difference."""
    config = OptimConfig(name=name, weight_decay=0.0, moment_dtype=moment_dtype)
    optimizer = optim.make_optimizer(config)
    params, goal = some_params(rng), some_params(rng)
    state = optimizer.init(params)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, state)
    apply = jax.jit(optimizer.apply)

    def distance(params):
        return sum(float(jnp.sum((params[k] - goal[k]) ** 2)) for k in goal)

    first = distance(params)
    for _ in range(30):
        params, state = apply(jax.tree.map(jnp.subtract, params, goal), state, params, 0.02)
    assert distance(params) < 0.8 * first
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == dtypes
    if name in ("adamw", "lion", "sgd", "muon"):
        assert jnp.dtype(moment_dtype) in set(jax.tree.leaves(dtypes))


def test_muon_leaves_embeddings_heads_and_vectors_to_adamw(rng):
    params = some_params(rng)
    grads = some_params(rng)
    made = {}
    for name in ("adamw", "muon"):
        optimizer = optim.make_optimizer(OptimConfig(name=name))
        made[name], _ = jax.jit(optimizer.apply)(
            grads, optimizer.init(params), params, jnp.float32(0.1)
        )
    for path, array in made["muon"].items():
        same = bool((array == made["adamw"][path]).all())
        assert same is (path != "blocks.0.attn.query.kernel"), path
    # An orthogonal matrix, as large as the updates of AdamW usually are.
    inner = "blocks.0.attn.query.kernel"
    update = (params[inner] * 0.99 - made["muon"][inner]) / 0.1
    sizes = jnp.linalg.svd(update / (0.2 * 12**0.5), compute_uv=False)
    assert ((sizes > 0.6) & (sizes < 1.3)).all()


def test_multipliers_by_path(rng):
    params, grads = some_params(rng), some_params(rng)

    def step(**changes):
        optimizer = optim.make_optimizer(OptimConfig(weight_decay=0.5, **changes))
        after, _ = jax.jit(optimizer.apply)(grads, optimizer.init(params), params, jnp.float32(0.1))
        return jax.tree.map(jnp.subtract, after, params)

    plain = step()
    slow = step(lr_multipliers=(r"embedding$=0.5", "head=0", "e=1"))
    np.testing.assert_allclose(
        slow["token_embedding.embedding"], plain["token_embedding.embedding"] / 2, atol=1e-6
    )
    assert (slow["head.kernel"] == 0).all()
    assert (slow["blocks.0.attn.query.bias"] == plain["blocks.0.attn.query.bias"]).all()

    decayed = step(decay_multipliers=("bias=2", "embedding=0"))
    more = decayed["blocks.0.attn.query.bias"] - plain["blocks.0.attn.query.bias"]
    np.testing.assert_allclose(more, -0.1 * params["blocks.0.attn.query.bias"], atol=1e-6)
    less = decayed["token_embedding.embedding"] - plain["token_embedding.embedding"]
    np.testing.assert_allclose(less, 0.05 * params["token_embedding.embedding"], atol=1e-6)
    assert (decayed["head.kernel"] == plain["head.kernel"]).all()


def test_the_moving_average_by_hand(rng):
    params = some_params(rng)
    optimizer = optim.make_optimizer(OptimConfig(ema_decay=0.5))
    assert optimizer.averages
    average = {k: np.asarray(v, np.float64) for k, v in params.items()}
    got = params
    for step in range(8):
        params = some_params(rng)
        got = optimizer.average(params, None, got, jnp.int32(step))
        decay = min(0.5, (1 + step) / (10 + step))
        average = {k: decay * average[k] + (1 - decay) * np.asarray(params[k]) for k in params}
    for path in params:
        np.testing.assert_allclose(got[path], average[path], rtol=1e-5, atol=1e-6)


def test_schedule_free_averages_by_the_weights_of_its_paper(rng):
    """The average of the base iterates, weighted by the squared largest rate so far."""
    params = {"w": jnp.asarray(rng.normal(size=3), jnp.float32)}
    config = OptimConfig(
        name="schedule_free_adamw", weight_decay=0.0, clip_norm=None, beta1=0.9, beta2=0.0
    )
    optimizer = optim.make_optimizer(config)
    state, z, total, x = optimizer.init(params), np.asarray(params["w"]), 0.0, 0.0
    largest = 0.0
    for rate in (0.1, 0.2, 0.3, 0.3, 0.1):
        grads = {"w": jnp.asarray(rng.normal(size=3), jnp.float32)}
        params, state = optimizer.apply(grads, state, params, jnp.float32(rate))
        z = z - rate * np.sign(grads["w"])  # With beta2=0 the direction is the sign.
        largest = max(largest, rate)
        weight = largest**2
        total += weight
        x = x + (z - x) * weight / total
        found = optimizer.average(params, state, None, jnp.int32(0))["w"]
        np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(params["w"], 0.1 * z + 0.9 * x, rtol=1e-4, atol=1e-5)
