"""What runs differently on a GPU, beside float32 on the same device: `scripts/gpu_bench.sh`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from craft_jax.models import base, layers
from craft_jax.models.gpt import GPT, GPTConfig

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")


@pytest.mark.parametrize("width", [32, 64, 80, 128])
@pytest.mark.parametrize("length", [1, 17, 256, 1024])
@pytest.mark.parametrize("is_packed", [False, True])
def test_attention_in_half_precision(width, length, is_packed):
    rng = np.random.default_rng(0)
    q, k, v, ct = (jnp.asarray(rng.standard_normal((2, length, 4, width))) for _ in range(4))
    segments = jnp.asarray(rng.integers(1, 3, (2, length)).cumsum(axis=1), jnp.int32)
    segments = segments if is_packed else None

    def both(attention, dtype):
        def f(q, k, v):
            return attention(q, k, v, segments_BT=segments)

        y, pullback = jax.vjp(f, *(x.astype(dtype) for x in (q, k, v)))
        return [y, *pullback(ct.astype(dtype))]

    with jax.default_matmul_precision("highest"):
        exact = both(layers.reference_attention, jnp.float32)
    for got, wanted in zip(both(layers.causal_attention, jnp.bfloat16), exact, strict=True):
        assert got.dtype == jnp.bfloat16
        scale = float(jnp.abs(wanted).max())
        np.testing.assert_allclose(got.astype(jnp.float32) / scale, wanted / scale, atol=0.03)


def test_widths_that_cudnn_does_not_know_are_said(caplog):
    q, k, v = (jnp.ones((1, 8, 2, 20), jnp.bfloat16) for _ in range(3))
    layers.causal_attention(q, k, v)
    assert "heads are 20 wide" in caplog.text


def test_a_model_in_bfloat16_is_near_float32():
    config = GPTConfig(vocab_size=512, num_layers=2, num_heads=4, d_model=256, max_seq_len=128)
    model_def = base.define(GPT, config)
    params = jax.jit(lambda key: base.init_params(GPT, config, key))(jax.random.key(0))
    ids = np.random.default_rng(0).integers(512, size=(2, 4, 128)).astype(np.int32)

    def loss(dtype):
        narrow = {path: value.astype(dtype) for path, value in params.items()}
        sums = jax.jit(lambda p: model_def.merge(p).loss({"tokens": ids[0], "targets": ids[1]}))
        return float(sums(narrow).loss / ids[0].size)

    with jax.default_matmul_precision("highest"):
        exact = loss(jnp.float32)
    assert loss(jnp.bfloat16) == pytest.approx(exact, rel=5e-3)
