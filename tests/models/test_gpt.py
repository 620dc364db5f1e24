import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from craft_jax import schema
from craft_jax.models import base
from craft_jax.models.gpt import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=13, num_layers=2, num_heads=3, d_model=24, max_seq_len=10)


def build(config=CONFIG, dtype=jnp.float32, seed=0):
    """A model whose parameters, biases and scales too, are all random."""
    definition = base.define(GPT, config)
    rng = np.random.default_rng(seed)
    noisy = {
        path: jnp.asarray(path.endswith("scale") + 0.3 * rng.standard_normal(leaf.shape), dtype)
        for path, leaf in definition.shapes.items()
    }
    return definition.merge(noisy)


@pytest.fixture
def tokens_BT():
    return jax.random.randint(jax.random.key(7), (2, 10), 0, 13)


def test_the_past_does_not_see_the_future(tokens_BT):
    """The gradient of the logits at t with respect to the embedded tokens after t is zero."""
    model = build()
    _, width = tokens_BT.shape[0], CONFIG.d_model

    shifted = dataclasses.replace(CONFIG, vocab_size=10)
    others = base.split(build(shifted))

    @jax.jit
    @jax.grad
    def gradient_at(x_TD, t):
        params = others | {"token_embedding.embedding": x_TD}
        merged = base.define(GPT, shifted).merge(params)
        return merged.hidden(jnp.arange(10)[None, :])[0][0, t].sum()

    x_TD = model.token_embedding.embedding[...][jnp.arange(10)]
    assert x_TD.shape == (10, width)
    for t in (0, 4, 9):
        influence_T = jnp.abs(gradient_at(x_TD, t)).sum(-1)
        assert (influence_T[: t + 1] > 0).all()
        assert (influence_T[t + 1 :] == 0).all()


@pytest.mark.parametrize("splits", [[10], [1] * 10, [4, 1, 5], [9, 1]])
def test_with_a_cache_as_without(tokens_BT, splits):
    model = build()
    expected, none = model(tokens_BT)
    assert none is None
    cache, start, parts = model.init_cache(2, 10, jnp.float32), 0, []
    for width in splits:
        logits, cache = model(tokens_BT[:, start : start + width], cache)
        parts.append(logits)
        start += width
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, atol=2e-5)
    assert cache.length_B.tolist() == [10, 10]


def test_rows_of_a_cache_stand_at_their_own_positions(tokens_BT):
    model = build()
    _, cache = model(tokens_BT[:, :6], model.init_cache(2, 10, jnp.float32))
    cache = cache._replace(length_B=jnp.array([3, 6]))
    logits, _ = model(jnp.stack([tokens_BT[0, 3:5], tokens_BT[1, 6:8]]), cache)
    expected, _ = model(tokens_BT)
    np.testing.assert_allclose(logits[0], expected[0, 3:5], atol=2e-5)
    np.testing.assert_allclose(logits[1], expected[1, 6:8], atol=2e-5)


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.soak), 0.3])
def test_remat_changes_nothing(tokens_BT, dropout):
    config = dataclasses.replace(CONFIG, num_layers=1, dropout=dropout)
    definition = base.define(GPT, config)
    batch = {"tokens": tokens_BT, "targets": tokens_BT}
    key = jax.random.key(3, impl="rbg")  # One of threefry takes seconds to compile.

    def loss(params, remat):
        return definition.merge(params).loss(batch, key=key, remat=remat).loss

    params = base.split(build(config))
    gradients = jax.jit(jax.grad(loss), static_argnums=1)
    plain, again = (gradients(params, remat) for remat in (False, True))
    for path, value in plain.items():
        np.testing.assert_allclose(again[path], value, rtol=1e-4, atol=1e-4)


def test_dropout_needs_a_key_and_follows_it(tokens_BT):
    config = dataclasses.replace(CONFIG, dropout=0.5)
    model = build(config)
    plain = model(tokens_BT)[0]
    assert jnp.array_equal(plain, model(tokens_BT)[0])
    one, same, other = (model(tokens_BT, key=jax.random.key(k))[0] for k in (0, 0, 1))
    assert jnp.array_equal(one, same)
    assert not jnp.allclose(one, other)
    assert not jnp.allclose(one, plain)


@pytest.mark.parametrize(
    ("activation", "tie_embeddings", "bias"),
    [
        # Every two of the values come together in the first four.
        ("gelu", True, True),
        ("gelu", False, False),
        ("gelu_tanh", True, False),
        ("gelu_tanh", False, True),
        pytest.param("gelu", True, False, marks=pytest.mark.soak),
        pytest.param("gelu", False, True, marks=pytest.mark.soak),
        pytest.param("gelu_tanh", True, True, marks=pytest.mark.soak),
        pytest.param("gelu_tanh", False, False, marks=pytest.mark.soak),
    ],
)
def test_variants(tokens_BT, activation, tie_embeddings, bias):
    config = dataclasses.replace(
        CONFIG, bias=bias, tie_embeddings=tie_embeddings, activation=activation
    )
    paths = base.define(GPT, config).shapes
    assert ("head.embedding" in paths) == (not tie_embeddings)
    assert any(path.endswith("bias") for path in paths) == bias
    logits, _ = build(config)(tokens_BT)
    assert logits.shape == (2, 10, 13)
    assert jnp.isfinite(logits).all()
    other = "gelu_tanh" if activation == "gelu" else "gelu"
    difference = logits - build(dataclasses.replace(config, activation=other))(tokens_BT)[0]
    assert 0 < jnp.abs(difference).max() < 0.1


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ((12, 12, 768), 124_439_808),
        # The largest is counted in test_base.py.
        pytest.param((24, 16, 1024), 354_823_168, marks=pytest.mark.soak),
        pytest.param((36, 20, 1280), 774_030_080, marks=pytest.mark.soak),
        pytest.param((48, 25, 1600), 1_557_611_200, marks=pytest.mark.soak),
    ],
)
def test_sizes_of_the_gpt2_family(size, count):
    num_layers, num_heads, d_model = size
    config = GPTConfig(
        vocab_size=50257,
        num_layers=num_layers,
        num_heads=num_heads,
        d_model=d_model,
        max_seq_len=1024,
    )
    assert base.define(GPT, config).num_params == count


def test_initial_scales():
    config = dataclasses.replace(CONFIG, d_model=192, vocab_size=500)
    params = jax.jit(lambda key: base.init_params(GPT, config, key))(jax.random.key(0))
    residual = 0.02 / (2 * config.num_layers) ** 0.5
    for path, expected in (
        ("token_embedding.embedding", 0.02),
        ("blocks.0.attn.query.kernel", 0.02),
        ("blocks.1.mlp.up.kernel", 0.02),
        ("blocks.0.attn.out.kernel", residual),
        ("blocks.1.mlp.down.kernel", residual),
    ):
        assert abs(float(params[path].std()) / expected - 1) < 0.03, path
    assert (params["blocks.0.attn_norm.scale"] == 1).all()
    assert (params["blocks.0.mlp.up.bias"] == 0).all()


def test_more_tokens_than_positions():
    with pytest.raises(ValueError, match="11 tokens exceed max_seq_len=10"):
        build()(jnp.zeros((1, 11), jnp.int32))


def test_heads_must_divide_the_width():
    (problem,) = schema.problems(GPTConfig(num_heads=5, d_model=64), "model")
    assert problem == "model.num_heads=5 does not divide model.d_model=64; try 4 or 8"


@pytest.mark.torch
@pytest.mark.parametrize(
    ("norm_eps", "activation"),
    [
        (1e-5, "gelu"),
        (1e-6, "gelu_tanh"),
        pytest.param(1e-5, "gelu_tanh", marks=pytest.mark.soak),
        pytest.param(1e-6, "gelu", marks=pytest.mark.soak),
    ],
)
def test_the_same_numbers_as_torch(x64, norm_eps, activation):
    """Against plain torch functions in float64, from the definition of the architecture."""
    import torch
    from torch.nn import functional as F

    config = dataclasses.replace(CONFIG, activation=activation, norm_eps=norm_eps)
    model = build(config, jnp.float64)
    w = {k: torch.tensor(np.asarray(v)) for k, v in base.split(model).items()}
    tokens = np.random.default_rng(0).integers(0, 13, (2, 10))

    def norm(x, name):
        return F.layer_norm(x, (24,), w[f"{name}.scale"], w[f"{name}.bias"], norm_eps)

    def dense(x, name):
        return x @ w[f"{name}.kernel"] + w[f"{name}.bias"]

    def heads(x):
        return x.view(2, 10, 3, 8).transpose(1, 2)

    x = w["token_embedding.embedding"][tokens] + w["position_embedding.embedding"]
    for i in range(2):
        h = norm(x, f"blocks.{i}.attn_norm")
        q, k, v = (heads(dense(h, f"blocks.{i}.attn.{n}")) for n in ("query", "key", "value"))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + dense(y.transpose(1, 2).reshape(2, 10, 24), f"blocks.{i}.attn.out")
        h = dense(norm(x, f"blocks.{i}.mlp_norm"), f"blocks.{i}.mlp.up")
        h = F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")
        x = x + dense(h, f"blocks.{i}.mlp.down")
    expected = (norm(x, "final_norm") @ w["token_embedding.embedding"].T).numpy()
    logits, _ = model(jnp.asarray(tokens))
    assert logits.dtype == jnp.float64
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12)
