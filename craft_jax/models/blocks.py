"""Parts that the blocks of all models share: attention with a cache, and the MLP.

Arrays and caches flow in and out. Shape letters: B batch, T query time, S key time, D model width,
H heads, K head width, F hidden.
"""

import math
from typing import NamedTuple, final

import jax
import jax.numpy as jnp
from flax import nnx

from craft_jax.models.attention import attention, cached_attention, heads_first
from craft_jax.models.kernels import causal_attention
from craft_jax.models.layers import ACTIVATIONS, Linear
from craft_jax.models.numerics import dropout

INIT_STD = 0.02

Cached = tuple[jax.Array, jax.Array, jax.Array]
"""k_BHSK and v_BHSK of one layer, and length_B: how many of the S slots are written."""


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, heads before time, since each head reads its own.

    Attributes:
      keys: k_BHSK of each layer, zeros in slots not yet written.
      values: v_BHSK of each layer.
      length_B: tokens in each row, int32; the position of the next token.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length_B: jax.Array

    @classmethod
    def empty(cls, num_layers: int, shape_BHSK: tuple[int, ...], dtype: object) -> "KVCache":
        """Returns a cache without tokens."""
        layers = tuple(jnp.zeros(shape_BHSK, dtype) for _ in range(num_layers))
        return cls(layers, layers, jnp.zeros(shape_BHSK[:1], jnp.int32))

    def layer(self, i: int) -> Cached:
        """Returns the keys, values and lengths of layer i."""
        return self.keys[i], self.values[i], self.length_B


class _Projections(nnx.Module):
    """The dense layers of multi-head attention.

    Args:
      d_model, num_heads: D and H.
      use_bias: of the four dense layers.
      dropout: rate on the probabilities.
      out_std: of the initial kernel of the last dense layer.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        use_bias: bool,
        dropout: float,
        out_std: float = INIT_STD,
        rngs: nnx.Rngs,
    ):
        options = {"use_bias": use_bias, "rngs": rngs}
        self.query = Linear(d_model, d_model, **options)
        self.key = Linear(d_model, d_model, **options)
        self.value = Linear(d_model, d_model, **options)
        self.out = Linear(d_model, d_model, init_std=out_std, **options)
        self.num_heads, self.dropout = num_heads, dropout

    def heads(self, x_BTD: jax.Array) -> jax.Array:
        """Splits the width: x_BTHK."""
        B, T, D = x_BTD.shape
        return x_BTD.reshape(B, T, self.num_heads, D // self.num_heads)


@final
class Attention(_Projections):
    """Multi-head self-attention."""

    def __call__(
        self,
        x_BTD: jax.Array,
        cached: Cached | None = None,
        key: jax.Array | None = None,
        visible_BTS: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Attends to the tokens up to each token, or to those that `visible_BTS` (bool) marks.

        With `segments_BT` (int32), which excludes `cached` and `visible_BTS`, a token attends to
        tokens of its own segment only.

        Returns:
          y_BTD and, if `cached` was given, its keys and values with these tokens added.
        """
        q_BTHK, k_BTHK, v_BTHK = (
            self.heads(dense(x_BTD)) for dense in (self.query, self.key, self.value)
        )
        if cached is not None:
            old_k_BHSK, old_v_BHSK, length_B = cached
            kv = _write(old_k_BHSK, k_BTHK, length_B), _write(old_v_BHSK, v_BTHK, length_B)
            y_BTHK = cached_attention(q_BTHK, *kv, length_B)
            return self.out(y_BTHK.reshape(x_BTD.shape)), kv
        drop = {"dropout_rate": self.dropout, "key": key}
        if visible_BTS is None:
            y_BTHK = causal_attention(q_BTHK, k_BTHK, v_BTHK, segments_BT=segments_BT, **drop)
        else:
            kv = heads_first(k_BTHK), heads_first(v_BTHK)
            y_BTHK = attention(q_BTHK, *kv, visible_BTS, **drop)
        return self.out(y_BTHK.reshape(x_BTD.shape)), None


@final
class CrossAttention(_Projections):
    """Multi-head attention to a memory."""

    def keys_and_values(self, memory_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns k_BHSK and v_BHSK of a memory, which may have length 0."""
        k_BSHK, v_BSHK = self.heads(self.key(memory_BSD)), self.heads(self.value(memory_BSD))
        return heads_first(k_BSHK), heads_first(v_BSHK)

    def __call__(
        self,
        x_BTD: jax.Array,
        kv: tuple[jax.Array, jax.Array],
        key: jax.Array | None = None,
        visible_BTS: jax.Array | None = None,
    ) -> jax.Array:
        """Attends to the keys that `visible_BTS` (bool) marks; None: all."""
        q_BTHK = self.heads(self.query(x_BTD))
        y_BTHK = attention(q_BTHK, *kv, visible_BTS, dropout_rate=self.dropout, key=key)
        return self.out(y_BTHK.reshape(x_BTD.shape))


class MLP(nnx.Module):
    """Two dense layers with an activation, and dropout of rate `dropout`, between them."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: str,
        use_bias: bool,
        dropout: float = 0.0,
        out_std: float = INIT_STD,
        rngs: nnx.Rngs,
    ):
        self.up = Linear(d_model, d_ff, use_bias=use_bias, rngs=rngs)
        self.down = Linear(d_ff, d_model, use_bias=use_bias, init_std=out_std, rngs=rngs)
        self.activation, self.dropout = activation, dropout

    def __call__(self, x_BTD: jax.Array, key: jax.Array | None = None) -> jax.Array:
        h_BTF = ACTIVATIONS[self.activation](self.up(x_BTD))
        return self.down(dropout(h_BTF, self.dropout, key))


def residual_std(num_summands: int) -> float:
    """Returns the initial std of layers that add to the residual stream, scaled as in GPT-2."""
    return INIT_STD / math.sqrt(num_summands)


def split_keys(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """Returns `count` keys, or `count` times None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def check_packing(
    cache: object | None, segments_BT: jax.Array | None, positions_BT: jax.Array | None
) -> None:
    """Refuses packed documents together with a cache.

    Raises:
      ValueError: both were given.
    """
    if cache is not None and not (segments_BT is None and positions_BT is None):
        raise ValueError(
            "a cache holds no packed documents: pass segments_BT and positions_BT without one"
        )


def _write(cache_BHSK: jax.Array, new_BTHK: jax.Array, start_B: jax.Array) -> jax.Array:
    """Writes T new positions into each row of a cache, from `start_B` on, in place where possible.

    Rows and heads are one axis meanwhile: with a leading axis of one, XLA:CPU duplicates the update
    and copies the whole cache.
    """
    B, H, S, K = cache_BHSK.shape
    new_RTK = heads_first(new_BTHK).astype(cache_BHSK.dtype).reshape(B * H, -1, K)

    def write_head(cache_SK, new_TK, start):
        return jax.lax.dynamic_update_slice(cache_SK, new_TK, (start, jnp.zeros_like(start)))

    cache_RSK = cache_BHSK.reshape(B * H, S, K)
    return jax.vmap(write_head)(cache_RSK, new_RTK, jnp.repeat(start_B, H)).reshape(B, H, S, K)
