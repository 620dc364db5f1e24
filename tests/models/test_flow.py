"""Flow matching: the loss and guidance are the papers', the samplers are of their orders."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from craft_jax import schema
from craft_jax.models import base, flow
from craft_jax.models.flow import Flow, FlowConfig

CONFIG = FlowConfig(
    height=6, width=4, channels=3, num_classes=5, patch_size=2, num_layers=1, num_heads=2, d_model=8
)


@functools.cache
def build(config=CONFIG, dtype="float32", seed=0):
    """A model whose every parameter is random: a fresh one predicts nothing but zeros."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        definition = base.define(Flow, config)
        params = {
            name: jnp.asarray(0.4 * rng.normal(size=shape.shape), dtype)
            for name, shape in definition.shapes.items()
        }
        return definition.merge(params)


def batch(config=CONFIG, rows=7, dtype=np.float32):
    rng = np.random.default_rng(1)
    shape = (rows, config.height, config.width, config.channels)
    made = {
        "images": rng.uniform(-1, 1, shape).astype(dtype),
        "seeds": rng.integers(2**32, size=rows, dtype=np.uint32),
    }
    if config.num_classes:
        made["labels"] = rng.integers(config.num_classes, size=rows).astype(np.int32)
    return made


def test_a_fresh_model_predicts_zeros():
    @jax.jit
    def velocity(x_BHWC):
        model = Flow(CONFIG, rngs=nnx.Rngs(jax.random.key(0, impl="rbg")))
        return model(x_BHWC, jnp.full(7, 0.3), jnp.arange(7) % 5)

    assert not np.any(velocity(batch()["images"]))


@pytest.mark.parametrize(("height", "width", "channels", "size"), [(6, 4, 3, 2), (5, 5, 1, 5)])
def test_patches_are_squares_and_go_back(height, width, channels, size):
    x_BHWC = jnp.arange(2 * height * width * channels).reshape(2, height, width, channels)
    x_BTP = flow.patches(x_BHWC, size)
    assert x_BTP.shape == (2, height * width // size**2, size * size * channels)
    np.testing.assert_array_equal(
        x_BTP[0, -1].reshape(size, size, channels), x_BHWC[0, -size:, -size:]
    )
    np.testing.assert_array_equal(flow.unpatched(x_BTP, x_BHWC.shape, size), x_BHWC)


def test_every_patch_sees_every_other(x64):
    model = build(dtype="float64")

    def first_number(x_BHWC):
        return model(x_BHWC, jnp.array([0.4]), jnp.array([1]))[0, 0, 0, 0]

    influence = jax.jit(jax.grad(first_number))(jnp.asarray(batch(dtype=np.float64)["images"][:1]))
    assert np.all(np.abs(influence) > 0)


@nnx.jit
def velocity(model, x_BHWC, t_B, labels_B):
    return model(x_BHWC, t_B, labels_B)


@nnx.jit
def loss(model, given, key=None):
    return model.loss(given, key=key)


@pytest.mark.parametrize("what", ["image", "time", "label"])
def test_a_velocity_depends_on(what):
    model, given = build(), batch()
    x_BHWC, labels_B, t_B = given["images"], given["labels"], np.full(7, 0.3, np.float32)
    v_BHWC = velocity(model, x_BHWC, t_B, labels_B)
    others = {
        "image": (x_BHWC + 0.1, t_B, labels_B),
        "time": (x_BHWC, t_B + 0.1, labels_B),
        "label": (x_BHWC, t_B, (labels_B + 1) % 5),
    }
    assert np.abs(velocity(model, *others[what]) - v_BHWC).max() > 1e-3


def test_the_loss_is_the_mean_square_of_the_papers_target(x64):
    """x_t = (1 - t) x0 + t x1, and the target x1 - x0, from each image's own seed."""
    model, given = build(dtype="float64"), batch(dtype=np.float64)
    weights = np.arange(7.0)
    found = loss(model, given | {"weights": weights})
    expected = 0.0
    for n in range(7):
        x1, seed = given["images"][n], given["seeds"][n]
        noise_key, time_key, _ = jax.random.split(jax.random.key(seed), 3)
        x0 = jax.random.normal(noise_key, x1.shape, jnp.float64)
        t = jax.random.uniform(time_key, (), jnp.float64)
        x_t = (1 - t) * x0 + t * x1
        v = velocity(model, x_t[None], t[None], given["labels"][n : n + 1])[0]
        expected += weights[n] * float(np.mean((v - (x1 - x0)) ** 2))
    np.testing.assert_allclose(found.loss, expected, rtol=1e-12)
    assert found.weight == weights.sum()


def test_times_and_noise_are_what_they_should_be():
    """A model of zeros has the loss of its targets: E (x1 - x0)^2 = x1^2 + 1."""
    fresh = base.define(Flow, CONFIG)
    zeros = {name: jnp.zeros(s.shape) for name, s in fresh.shapes.items()}
    given = batch(rows=2000)
    # As an argument: XLA:CPU computes nonsense, in some processes, from constants that are uniform.
    sums = jax.jit(lambda params, batch: fresh.merge(params).loss(batch))(zeros, given)
    expected = float(np.mean(given["images"] ** 2)) + 1
    assert float(sums.loss / sums.weight) == pytest.approx(expected, abs=0.02)


def test_labels_are_left_out_while_training_and_not_while_evaluating():
    key = jax.random.key(0)
    never, often = (build(dataclasses.replace(CONFIG, label_dropout=rate)) for rate in (0.0, 0.9))
    given = batch()
    assert float(loss(never, given).loss) == float(loss(often, given).loss)
    assert float(loss(never, given, key).loss) == float(loss(never, given).loss)
    assert float(loss(never, given, key).loss) != float(loss(often, given, key).loss)


def test_an_image_of_a_batch_has_the_loss_that_it_has_alone(x64):
    model, given = build(dtype="float64"), batch(dtype=np.float64)
    key = jax.random.key(3)
    alone = [
        float(loss(model, {k: v[n : n + 1] for k, v in given.items()}, key).loss) for n in range(7)
    ]
    assert float(loss(model, given, key).loss) == pytest.approx(sum(alone), rel=1e-12)


def test_a_solver_is_of_its_order(x64):
    """Twice the steps: half the error of Euler, a quarter of Heun's."""
    params = {k: v / 2 for k, v in base.split(build(dtype="float64")).items()}
    # Of the times, only slow sines: the fast ones would need thousands of steps.
    kernel = params["time_embedding.up.kernel"]
    is_slow = np.tile(np.arange(flow.NUM_FREQUENCIES) > 80, 2)[:, None]
    params["time_embedding.up.kernel"] = jnp.where(is_slow, kernel, 0.0)
    model = base.define(Flow, CONFIG).merge(params)
    noise = np.random.default_rng(5).normal(size=(3, 6, 4, 3))
    labels = jnp.arange(3)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def sample(num_steps, solver):
        return model.generate(
            labels, noise_BHWC=noise, num_steps=num_steps, solver=solver, guidance=1.0
        )

    exact = sample(2000, "heun")
    for solver, order in (("euler", 1), ("heun", 2)):
        errors = [float(np.abs(sample(n, solver) - exact).max()) for n in (100, 200)]
        assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25), solver


def test_guidance_is_its_formula(x64):
    model = build(dtype="float64")
    noise, labels = np.random.default_rng(5).normal(size=(3, 6, 4, 3)), jnp.arange(3)
    one = model.generate(labels, noise_BHWC=noise, num_steps=1, solver="euler", guidance=2.5)
    t_B = jnp.zeros(3)
    with_label, without = model(noise, t_B, labels), model(noise, t_B, None)
    np.testing.assert_allclose(one, noise + without + 2.5 * (with_label - without), atol=1e-12)
    none = model.generate(jnp.full(3, 5), noise_BHWC=noise, num_steps=2, guidance=1.0)
    guided = model.generate(jnp.full(3, 5), noise_BHWC=noise, num_steps=2, guidance=7.0)
    np.testing.assert_allclose(none, guided, atol=1e-12)


def test_an_image_does_not_depend_on_its_neighbours():
    model, key = build(), jax.random.key(9)
    many = model.generate(jnp.array([1, 2, 3, 4]), key, num_steps=3)
    few = model.generate(jnp.array([1, 2]), key, num_steps=3)
    np.testing.assert_allclose(many[:2], few, atol=1e-5)
    assert np.abs(many[0] - many[1]).max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "rk4"}, "is not one of euler, heun"),
        ({"num_steps": 0}, "is not from 1 to"),
        ({"guidance": float("nan")}, "not a finite number"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        build().generate(jnp.arange(2), jax.random.key(0), **options)


def test_guidance_needs_training_without_labels():
    model = build(dataclasses.replace(CONFIG, label_dropout=0.0))
    assert model.generate(jnp.arange(2), jax.random.key(0), num_steps=1).shape == (2, 6, 4, 3)
    with pytest.raises(ValueError, match=r"label_dropout=0\.0"):
        model.generate(jnp.arange(2), jax.random.key(0), guidance=2.0)


def test_images_without_labels():
    config = dataclasses.replace(CONFIG, num_classes=0)
    model = build(config)
    assert np.isfinite(model.loss(batch(config), key=jax.random.key(0)).loss)
    assert model.generate(jnp.zeros(2, int), jax.random.key(0), num_steps=1).shape == (2, 6, 4, 3)


@pytest.mark.parametrize(
    ("dtype", "times"),
    [
        ("bfloat16", "logit_normal"),
        ("float16", "uniform"),
        pytest.param("bfloat16", "uniform", marks=pytest.mark.soak),
        pytest.param("float16", "logit_normal", marks=pytest.mark.soak),
    ],
)
def test_half_precision_accumulates_in_float32(dtype, times):
    model = build(dataclasses.replace(CONFIG, times=times), dtype=dtype)
    sums, whole = loss(model, batch()), build(dataclasses.replace(CONFIG, times=times))
    assert sums.loss.dtype == jnp.float32
    np.testing.assert_allclose(sums.loss, loss(whole, batch()).loss, rtol=0.05)


def test_contradictions():
    wrong = FlowConfig(height=6, width=4, patch_size=4, num_heads=3, d_model=8)
    found = " ".join(schema.contradictions(wrong))
    assert "model.num_heads=3 does not divide" in found
    assert "model.patch_size=4 does not divide model.height=6" in found
    assert "model.width" not in found
