"""Attention and products in the form that XLA:CPU runs fastest.

Causal attention is the same mathematics as `attention.reference_attention`, against which tests
compare values and gradients. Four things make it two to three times as fast there: heads stand
before time, so that every product is a plain batched matrix product; queries are taken in blocks,
each against the keys up to its own end, so that most of the masked half is never computed; only the
probabilities are kept for the backward pass; and the softmax gradient needs sum_s(p * dp), which
equals sum_k(dy * y) and costs a pass over (T, K) instead of (T, S) (Dao et al. 2022,
arXiv:2205.14135, appendix B).

Packed documents cost a comparison of segments in the block at hand; no mask of all T x T is made.

Shape letters as in `layers`, and: G query heads per key/value head (H = N * G), R = G * t query
rows of one block of t queries, U keys seen by that block.
"""

import functools
import math

import jax
import jax.numpy as jnp

from craft_jax.models.numerics import accum_dtype

Array = jax.Array

# 128 queries a block measured best at T=256 (64: more and smaller products, 256: no half saved);
# at most 8 blocks, since each is unrolled into the program.
BLOCK_SIZE = 128
MAX_BLOCKS = 8


@jax.custom_vjp
def bfloat16_product(a_MD: Array, b_DF: Array) -> Array:
    """Product of two bfloat16 matrices: (M, F) in bfloat16, summed in float32 and rounded once.

    XLA:CPU has a fast product of bfloat16 with a float32 result only; with a bfloat16 result it
    widens both operands in memory first, which takes twice the time. That holds for the gradient of
    a; for that of b there is no difference.
    """
    return _bfloat16_product(a_MD, b_DF, 1, 0)


def _bfloat16_product(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    y = jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
    return y.astype(jnp.bfloat16)


def _bfloat16_product_backward(operands: tuple[Array, Array], ct_MF: Array) -> tuple[Array, Array]:
    a_MD, b_DF = operands
    return _bfloat16_product(ct_MF, b_DF, 1, 1), a_MD.T @ ct_MF


bfloat16_product.defvjp(lambda a, b: (bfloat16_product(a, b), (a, b)), _bfloat16_product_backward)


@functools.partial(jax.jit, static_argnums=5)
def blocked_attention(
    q_BTHK: Array,
    k_BTNK: Array,
    v_BTNK: Array,
    keep_BHTT: Array | None,
    segments_BT: Array | None,
    dropout_rate: float,
) -> Array:
    """Causal attention of T queries to the same T keys: y_BTHK in the dtype of q.

    `keep_BHTT` (bool; None: no dropout) marks what dropout keeps of the probabilities. With
    `segments_BT` (int32) a query attends to keys of its own segment only.
    """
    return _attention(q_BTHK, k_BTNK, v_BTNK, keep_BHTT, segments_BT, dropout_rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q_BTHK, k_BTNK, v_BTNK, keep_BHTT, segments_BT, dropout_rate):
    return _forward(q_BTHK, k_BTNK, v_BTNK, keep_BHTT, segments_BT, dropout_rate)[0]


def _forward(q_BTHK, k_BTNK, v_BTNK, keep_BHTT, segments_BT, dropout_rate):
    num_groups = q_BTHK.shape[2] // k_BTNK.shape[2]
    dtype, accum = q_BTHK.dtype, accum_dtype(q_BTHK.dtype)
    q_BNGTK = _split_heads(q_BTHK, k_BTNK.shape[2])
    k_BNTK, v_BNTK = k_BTNK.transpose(0, 2, 1, 3), v_BTNK.transpose(0, 2, 1, 3)

    probs, ys = [], []
    for block in _blocks(q_BTHK.shape[1]):
        k_BNUK, v_BNUK = k_BNTK[:, :, : block.stop], v_BNTK[:, :, : block.stop]
        scores_BNRU = _product(_rows(q_BNGTK, block), k_BNUK, 3, 3, accum)
        scores_BNRU = scores_BNRU * (1.0 / math.sqrt(q_BTHK.shape[-1]))
        visible_tU = jnp.arange(block.start, block.stop)[:, None] >= jnp.arange(block.stop)[None, :]
        visible_BNRU = jnp.tile(visible_tU, (num_groups, 1))[None, None]
        if segments_BT is not None:
            segments_BR = jnp.tile(segments_BT[:, block], (1, num_groups))
            is_same_BRU = segments_BR[:, :, None] == segments_BT[:, None, : block.stop]
            visible_BNRU = visible_BNRU & is_same_BRU[:, None]
        scores_BNRU = jnp.where(visible_BNRU, scores_BNRU, jnp.finfo(accum).min)
        p_BNRU = jax.nn.softmax(scores_BNRU, axis=-1)
        dropped_BNRU = _drop(p_BNRU, keep_BHTT, block, dropout_rate).astype(dtype)
        ys.append(_product(dropped_BNRU, v_BNUK, 3, 2, dtype))
        probs.append(p_BNRU.astype(dtype))
    y_BTHK = _join_heads(ys, num_groups)
    return y_BTHK, (q_BNGTK, k_BNTK, v_BNTK, keep_BHTT, probs, y_BTHK)


# Needs no mask: masked keys have probability exactly 0, a factor of the gradient of their score,
# since each query attends at least to itself.
def _backward(dropout_rate, residuals, dy_BTHK):
    q_BNGTK, k_BNTK, v_BNTK, keep_BHTT, probs, y_BTHK = residuals
    num_kv_heads, num_groups = q_BNGTK.shape[1:3]
    dtype, accum = q_BNGTK.dtype, accum_dtype(q_BNGTK.dtype)
    scale = 1.0 / math.sqrt(q_BNGTK.shape[-1])
    blocks = _blocks(q_BNGTK.shape[3])

    dy_BNGTK = _split_heads(dy_BTHK, num_kv_heads)
    delta_BTH1 = jnp.sum(dy_BTHK.astype(accum) * y_BTHK.astype(accum), axis=-1, keepdims=True)
    delta_BNGT1 = _split_heads(delta_BTH1, num_kv_heads)

    dqs, dks, dvs = [], [], []  # by blocks: dq of its queries, dk and dv of its keys
    for block, p_BNRU in zip(blocks, probs, strict=True):
        k_BNUK, v_BNUK = k_BNTK[:, :, : block.stop], v_BNTK[:, :, : block.stop]
        q_BNRK, dy_BNRK = _rows(q_BNGTK, block), _rows(dy_BNGTK, block)
        accum_p_BNRU = p_BNRU.astype(accum)
        dropped_BNRU = _drop(accum_p_BNRU, keep_BHTT, block, dropout_rate).astype(dtype)
        dv_BNUK = _product(dropped_BNRU, dy_BNRK, 2, 2, accum)
        dp_BNRU = _drop(_product(dy_BNRK, v_BNUK, 3, 3, accum), keep_BHTT, block, dropout_rate)
        ds_BNRU = (accum_p_BNRU * (dp_BNRU - _rows(delta_BNGT1, block)) * scale).astype(dtype)
        dqs.append(_product(ds_BNRU, k_BNUK, 3, 2, dtype))
        dk_BNUK = _product(ds_BNRU, q_BNRK, 2, 2, accum)
        for j in range(len(dks)):  # the keys before this block, which earlier queries saw too
            dks[j] = dks[j] + dk_BNUK[:, :, blocks[j]]
            dvs[j] = dvs[j] + dv_BNUK[:, :, blocks[j]]
        dks.append(dk_BNUK[:, :, block])
        dvs.append(dv_BNUK[:, :, block])
    dk_BTNK = jnp.concatenate(dks, axis=2).transpose(0, 2, 1, 3).astype(dtype)
    dv_BTNK = jnp.concatenate(dvs, axis=2).transpose(0, 2, 1, 3).astype(dtype)
    return _join_heads(dqs, num_groups), dk_BTNK, dv_BTNK, None, None


_attention.defvjp(_forward, _backward)


def _blocks(num_queries: int) -> list[slice]:
    size = max(BLOCK_SIZE, -(-num_queries // MAX_BLOCKS))
    return [slice(i, min(i + size, num_queries)) for i in range(0, num_queries, size)]


def _product(a: Array, b: Array, axis_a: int, axis_b: int, dtype) -> Array:
    """Product of a and b over one axis each, batched over their two leading axes."""
    dimensions = (((axis_a,), (axis_b,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=dtype)


def _drop(p_BNRU: Array, keep_BHTT: Array | None, block: slice, rate: float) -> Array:
    if keep_BHTT is None:
        return p_BNRU
    keep_BNRU = keep_BHTT[:, :, block, : block.stop].reshape(p_BNRU.shape)
    return jnp.where(keep_BNRU, p_BNRU / (1.0 - rate), jnp.zeros_like(p_BNRU))


def _split_heads(x_BTHK: Array, num_kv_heads: int) -> Array:
    """(B, T, H, K) -> (B, N, G, T, K)."""
    B, T, H, K = x_BTHK.shape
    return x_BTHK.transpose(0, 2, 1, 3).reshape(B, num_kv_heads, H // num_kv_heads, T, K)


def _rows(x_BNGTK: Array, block: slice) -> Array:
    """The queries of a block, of all heads that share a key: (B, N, R, K)."""
    B, N, _, _, K = x_BNGTK.shape
    return x_BNGTK[:, :, :, block].reshape(B, N, -1, K)


def _join_heads(x_BNRK: list[Array], num_groups: int) -> Array:
    """The blocks put together: (B, T, H, K)."""
    B, N, _, K = x_BNRK[0].shape
    x_BNGTK = jnp.concatenate([x.reshape(B, N, num_groups, -1, K) for x in x_BNRK], axis=3)
    return x_BNGTK.reshape(B, N * num_groups, -1, K).transpose(0, 2, 1, 3)
