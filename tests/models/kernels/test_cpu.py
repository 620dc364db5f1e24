"""cpu.py and the fast paths of layers.py: whole models and products beside their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from craft_jax.generation.generator import prepare_decode_params
from craft_jax.models import base, kernels, layers
from craft_jax.models.gpt import GPT, GPTConfig
from craft_jax.models.kernels import cpu, gpu
from craft_jax.models.losses import LossConfig

# Layers, heads, width, context, batch, vocabulary.
ODD = {
    "context of one": (2, 2, 8, 1, 3, 11),
    "prime widths": (1, 1, 13, 17, 2, 7),
    "one head": (2, 1, 16, 33, 1, 5),
    "two blocks of queries": (1, 3, 21, 131, 1, 29),
    "one token in the vocabulary": (1, 1, 4, 5, 2, 1),
}


def plain_layer_norm(x, scale_D, bias_D, eps=1e-5):
    mean = x.mean(-1, keepdims=True)
    y = (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)
    return y * scale_D.reshape(*(1,) * (x.ndim - 1), -1) + bias_D.reshape(*(1,) * (x.ndim - 1), -1)


def plain_linear(x, kernel_DF, bias_F):
    y = jnp.einsum("...d,df->...f", x, kernel_DF)
    return y if bias_F is None else y + bias_F.reshape(*(1,) * (y.ndim - 1), -1)


def initial(config):
    # With a key of threefry it would take seconds to compile.
    init = functools.partial(base.init_params, GPT, config)
    return jax.jit(init)(jax.random.key(0, impl="rbg"))


def loss_and_gradients(config, params, batch):
    model_def = base.define(GPT, config)

    def loss(params):
        sums = model_def.merge(params).loss(batch)
        return sums.loss / sums.weight

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
    # One head and odd sizes come with the other cases too.
    "case",
    [pytest.param(c, marks=pytest.mark.soak) if c == "one head" else c for c in ODD],
)
def test_a_model_equals_the_one_written_plainly(case, monkeypatch):
    num_layers, heads, width, context, batch_size, vocabulary = ODD[case]
    config = GPTConfig(
        vocab_size=vocabulary,
        num_layers=num_layers,
        num_heads=heads,
        d_model=width,
        max_seq_len=context,
    )
    params = initial(config)
    rng = np.random.default_rng(0)
    params = {
        path: value + jnp.asarray(0.1 * rng.standard_normal(value.shape), jnp.float32)
        for path, value in params.items()
    }
    ids = rng.integers(vocabulary, size=(2, batch_size, context)).astype(np.int32)
    batch = {"tokens": ids[0], "targets": ids[1]}
    loss, grads = loss_and_gradients(config, params, batch)
    monkeypatch.setattr(cpu, "blocked_attention", reference_attention)
    monkeypatch.setattr(layers, "linear", plain_linear)
    monkeypatch.setattr(layers, "layer_norm", plain_layer_norm)
    monkeypatch.setattr(layers, "_exact_gelu", lambda x: jax.nn.gelu(x, approximate=False))
    plain_loss, plain_grads = loss_and_gradients(config, params, batch)
    assert abs(loss - plain_loss) <= 1e-6 * abs(plain_loss)
    largest = max(float(jnp.abs(g).max()) for g in plain_grads.values())
    for path, plain in plain_grads.items():
        np.testing.assert_allclose(grads[path], plain, rtol=0, atol=1e-5 * largest, err_msg=path)


def reference_attention(q, k, v, keep_BHTT, segments_BT, dropout_rate):
    assert keep_BHTT is None
    return layers.reference_attention(q, k, v, segments_BT=segments_BT)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 3), (5, 13, 11), (64, 32, 48)])
def test_the_product_of_bfloat16_is_rounded_once(shape):
    M, D, F = shape
    rng = np.random.default_rng(0)
    a, b, ct = (
        jnp.asarray(rng.standard_normal(size), jnp.bfloat16) for size in ((M, D), (D, F), (M, F))
    )
    y, pullback = jax.vjp(cpu.bfloat16_product, a, b)
    da, db = pullback(ct)
    wide_a, wide_b, wide_ct = (np.asarray(x, np.float64) for x in (a, b, ct))
    for got, exact in (
        (y, wide_a @ wide_b),
        (da, wide_ct @ wide_b.T),
        (db, wide_a.T @ wide_ct),
    ):
        assert got.dtype == jnp.bfloat16 and got.shape == exact.shape
        # A rounding to 8 bits, and the sum's own in float32.
        np.testing.assert_allclose(
            np.asarray(got, np.float64), exact, rtol=2**-8, atol=1e-5 * np.abs(exact).max()
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transposed_kernels_give_the_same_logits(dtype):
    config = GPTConfig(vocab_size=11, num_layers=2, num_heads=1, d_model=13, max_seq_len=8)
    model_def = base.define(GPT, config)
    params = {path: value.astype(dtype) for path, value in initial(config).items()}
    token = jnp.array([[3]], jnp.int32)
    plain, _ = model_def.merge(params)(token)
    prepared = prepare_decode_params(model_def, params, 1)
    transposed = {p: v for p, v in prepared.items() if isinstance(v, kernels.DecodeKernel)}
    assert transposed.keys() == model_def.kernels and len(transposed) == 12
    assert transposed["blocks.0.mlp.up.kernel"].kernel_FD.shape == (52, 13)
    assert all(kernel.kernel_FD.dtype == jnp.float32 for kernel in transposed.values())
    logits, _ = model_def.merge(prepared)(token)
    assert logits.dtype == plain.dtype
    np.testing.assert_allclose(logits, plain, atol={"float32": 1e-6, "bfloat16": 0.01}[dtype])


def test_kernels_are_transposed_for_one_row_of_a_model_that_fits(monkeypatch):
    dense = {"up.kernel": jnp.ones((4, 6))}
    assert kernels.transpose_kernels(dense, 1) and not kernels.transpose_kernels(dense, 2)
    monkeypatch.setattr(kernels, "MAX_TRANSPOSED_BYTES", 4 * 4 * 6 - 1)
    assert not kernels.transpose_kernels(dense, 1)


@pytest.mark.parametrize(
    ("has_weights", "max_logits"),
    [
        # Equal parts without weights, and the last one filled up with and without them.
        (False, 1),
        (True, 84),
        (False, 200),
        (False, 231),
        *(
            pytest.param(*cell, marks=pytest.mark.soak)
            for cell in ((True, 1), (False, 84), (True, 200), (True, 231))
        ),
    ],
)
def test_the_loss_in_parts_is_the_loss(max_logits, has_weights, monkeypatch):
    config = GPTConfig(vocab_size=7, num_layers=1, num_heads=1, d_model=8, max_seq_len=11)
    model_def = base.define(GPT, config)
    with jax.enable_x64(True):
        params = initial(config)
        params = {path: value.astype(jnp.float64) for path, value in params.items()}
        rng = np.random.default_rng(0)
        ids = rng.integers(7, size=(2, 3, 11)).astype(np.int32)
        batch = {"tokens": ids[0], "targets": ids[1]}
        if has_weights:
            batch["weights"] = rng.integers(2, size=(3, 11)).astype(np.float64)

        def objective(params):
            sums = model_def.merge(params).loss(batch, config=LossConfig(label_smoothing=0.1))
            return sums.loss + sums.penalty, sums

        def results():
            return jax.jit(jax.value_and_grad(objective, has_aux=True))(params)

        whole = results()
        monkeypatch.setattr(base, "MAX_LOGITS", max_logits)
        parts = model_def.merge(params)._num_parts(jnp.zeros((3, 11, 8)))
        assert parts == {1: 11, 84: 3, 200: 2, 231: 1}[max_logits]
        for got, wanted in zip(*map(jax.tree.leaves, (results(), whole)), strict=True):
            assert got.dtype == wanted.dtype
            np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-14)


def test_a_padded_table_gives_the_same_logits_and_gradients(monkeypatch):
    rng = np.random.default_rng(0)
    x, table = (jnp.asarray(rng.standard_normal(size), jnp.float32) for size in ((2, 3, 5), (7, 5)))
    plain, pullback = jax.vjp(layers.attend, x, table)
    monkeypatch.setattr(kernels, "backend", lambda: "gpu")
    monkeypatch.setattr(kernels, "_TILE", 4)
    padded, padded_pullback = jax.vjp(layers.attend, x, table)
    assert padded.shape == (2, 3, 7)
    for got, wanted in zip(
        (padded, *padded_pullback(plain)), (plain, *pullback(plain)), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def test_cudnn_is_used_where_it_supports_the_heads(caplog):
    assert gpu.implementation("tpu", 64) is None
    assert [gpu.implementation("gpu", width) for width in (8, 64, 128)] == ["cudnn"] * 3
    assert not caplog.text
    assert gpu.implementation("gpu", 20) == "xla" and "heads are 20 wide" in caplog.text
    assert gpu.implementation("gpu", 256) == "xla"
