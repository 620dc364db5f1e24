"""Multi-head attention, written plainly; `kernels` has the fast forms and chooses between them.

Shape letters as in `layers`.
"""

import math

import jax
import jax.numpy as jnp

from craft_jax.models.numerics import accum_dtype, accum_einsum, dropout

Array = jax.Array


def reference_attention(
    q_BTHK: Array,
    k_BTNK: Array,
    v_BTNK: Array,
    *,
    segments_BT: Array | None = None,
    dropout_rate: float = 0.0,
    key: Array | None = None,
) -> Array:
    """`causal_attention` written plainly: the definition that the fast paths are tested against."""
    T = q_BTHK.shape[1]
    visible_BTT = jnp.tri(T, dtype=bool)[None]
    if segments_BT is not None:
        visible_BTT = visible_BTT & same_segment(segments_BT)
    k_BNTK, v_BNTK = heads_first(k_BTNK), heads_first(v_BTNK)
    return attention(q_BTHK, k_BNTK, v_BNTK, visible_BTT, dropout_rate=dropout_rate, key=key)


def cached_attention(q_BTHK: Array, k_BNSK: Array, v_BNSK: Array, offset_B: Array) -> Array:
    """Causal attention of new tokens to the S slots of a cache, otherwise as `causal_attention`.

    Query t of row b has position p = offset_B[b] + t and attends to keys s <= p.

    Args:
        q_BTHK: queries.
        k_BNSK, v_BNSK: keys and values, heads before time, as a `KVCache` holds them.
        offset_B: int32, at least 0.

    Raises:
        ValueError: N does not divide H.
    """
    check_heads(q_BTHK.shape[2], k_BNSK.shape[1])
    query_BT = jnp.arange(q_BTHK.shape[1], dtype=jnp.int32)[None, :] + offset_B[:, None]
    visible_BTS = (
        jnp.arange(k_BNSK.shape[2], dtype=jnp.int32)[None, None, :] <= query_BT[:, :, None]
    )
    return attention(q_BTHK, k_BNSK, v_BNSK, visible_BTS)


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """Raises a ValueError where N does not divide H."""
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}")


def heads_first(x_BSNK: Array) -> Array:
    """Returns x_BNSK: heads before time, so that each head is contiguous."""
    return x_BSNK.transpose(0, 2, 1, 3)


def same_segment(segments_BT: Array) -> Array:
    """Returns whether two tokens of a row belong to one document: bool (B, T, T)."""
    return segments_BT[:, :, None] == segments_BT[:, None, :]


def attention(
    q_BTHK: Array,
    k_BNSK: Array,
    v_BNSK: Array,
    visible_BTS: Array | None = None,
    *,
    dropout_rate: float = 0.0,
    key: Array | None = None,
) -> Array:
    """Multi-head attention to any set of keys; grouped-query if N < H. See `causal_attention`.

    Args:
        q_BTHK, k_BNSK, v_BNSK: queries, keys and values. Without a key, S = 0, the result is 0.
        visible_BTS: bool, what each query attends to, B and T of which may be 1; None: everything.
            A query that sees nothing gets the mean of all values.
        dropout_rate, key: as for `causal_attention`.

    Returns:
        y_BTHK in the dtype of q.
    """
    B, T, H, K = q_BTHK.shape
    N, S = k_BNSK.shape[1:3]
    dtype = q_BTHK.dtype
    if S == 0:
        return jnp.zeros_like(q_BTHK)
    # All queries that read one key head are the rows R of one product.
    q_BNRK = heads_first(q_BTHK).reshape(B, N, H // N * T, K)
    scores_BNRS = accum_einsum("BNRK,BNSK->BNRS", q_BNRK, k_BNSK)
    scores_BHTS = scores_BNRS.reshape(B, H, T, S) / math.sqrt(K)
    if visible_BTS is not None:
        lowest = jnp.finfo(accum_dtype(dtype)).min
        scores_BHTS = jnp.where(visible_BTS[:, None], scores_BHTS, lowest)
    probs_BHTS = dropout(jax.nn.softmax(scores_BHTS, axis=-1), dropout_rate, key)
    probs_BNRS = probs_BHTS.astype(dtype).reshape(B, N, H // N * T, S)
    y_BNRK = jnp.einsum("BNRS,BNSK->BNRK", probs_BNRS, v_BNSK)
    return y_BNRK.reshape(B, H, T, K).transpose(0, 2, 1, 3)
