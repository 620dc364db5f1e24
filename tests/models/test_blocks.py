import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from craft_jax.models import blocks

OPTIONS = {"use_bias": True, "dropout": 0.0}


def test_a_cache_grows_and_can_be_cut_back():
    cache = blocks.KVCache.empty(2, (3, 2, 8, 4), jnp.bfloat16)
    assert len(cache.keys) == 2 and cache.keys[0].dtype == jnp.bfloat16
    assert cache.length_B.tolist() == [0, 0, 0] and cache.length_B.dtype == jnp.int32
    cut = cache._replace(length_B=jnp.array([1, 2, 3]))
    assert cut.layer(1)[2].tolist() == [1, 2, 3] and cut.layer(1)[0] is cache.keys[1]


def test_self_attention_of_everything_is_no_more_causal():
    attention = blocks.Attention(8, 2, **OPTIONS, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 5, 8))
    changed = x.at[:, 4].add(1.0)
    causal = [attention(y)[0][:, 0] for y in (x, changed)]
    np.testing.assert_array_equal(*causal)
    everything = jnp.ones((1, 1, 5), bool)
    free = [attention(y, visible_BTS=everything)[0][:, 0] for y in (x, changed)]
    assert jnp.any(free[0] != free[1])


def test_cross_attention_reads_its_memory_alone():
    cross = blocks.CrossAttention(8, 2, **OPTIONS, rngs=nnx.Rngs(0))
    x, memory = (jax.random.normal(jax.random.key(k), (2, n, 8)) for k, n in ((1, 3), (2, 6)))
    kv = cross.keys_and_values(memory)
    whole = cross(x, kv)
    np.testing.assert_allclose(whole[:, 1:2], cross(x[:, 1:2], kv), atol=1e-6)
    mask = jnp.array([[True] * 4 + [False] * 2, [True] * 6])[:, None]
    shorter = cross(x[:1], cross.keys_and_values(memory[:1, :4]))
    np.testing.assert_allclose(cross(x, kv, visible_BTS=mask)[:1], shorter, atol=1e-6)
    empty = cross(x, cross.keys_and_values(memory[:, :0]))
    np.testing.assert_array_equal(empty, jnp.broadcast_to(cross.out.bias[...], x.shape))


def test_an_mlp_drops_hidden_units():
    mlp = blocks.MLP(8, 64, activation="relu", use_bias=True, dropout=0.5, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 3, 8))
    plain = mlp(x)
    np.testing.assert_array_equal(plain, mlp(x))
    dropped = [mlp(x, jax.random.key(k)) for k in (0, 0, 1)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert jnp.any(dropped[0] != plain) and jnp.any(dropped[0] != dropped[2])
