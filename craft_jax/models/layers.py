"""Building blocks of the models: dense layers, embedding, normalisation, attention.

Arrays flow in and out; the modules hold `nnx.Param` leaves and nothing else. No dtype policy, no sharding and no
randomness state lives here: the dtype is that of the arguments, and dropout takes a key (`None`: deterministic).

Shape letters: B batch, T query time, S key time, D model width (or any input width), H heads, N key/value heads,
G query heads per key/value head (H = N * G), K head width, F hidden (or any output width), V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array


def _at_least_float32(dtype) -> jnp.dtype:
    """The dtype for statistics and logits: float32, or float64 where the operands are float64."""
    return jnp.promote_types(dtype, jnp.float32)


class Linear(nnx.Module):
    """Dense layer `x @ kernel + bias` over the last axis.

    Attributes:
        kernel: (d_in, d_out), drawn from N(0, init_std).
        bias: (d_out,), zeros; None without bias.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        use_bias: bool = True,
        init_std: float = 0.02,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(init_std * jax.random.normal(rngs.params(), (d_in, d_out)))
        self.bias = nnx.Param(jnp.zeros((d_out,))) if use_bias else None

    def __call__(self, x: Array) -> Array:
        """Maps (..., d_in) to (..., d_out), in the dtype to which input and kernel promote."""
        return linear(x, self.kernel[...], None if self.bias is None else self.bias[...])


def linear(x: Array, kernel_DF: Array, bias_F: Array | None) -> Array:
    """`x @ kernel + bias` over the last axis of x (..., D); the function behind `Linear`.

    The leading axes become one before the product: with two, XLA:CPU contracts the weight gradient over two
    dimensions, which takes about twice as long.
    """
    dtype = jnp.promote_types(x.dtype, kernel_DF.dtype)
    x_MD = x.reshape(-1, x.shape[-1]).astype(dtype)
    y_MF = x_MD @ kernel_DF.astype(dtype)
    if bias_F is not None:
        y_MF = y_MF + bias_F.astype(dtype)[None, :]
    return y_MF.reshape(*x.shape[:-1], kernel_DF.shape[-1])


class Embedding(nnx.Module):
    """Table of vectors, read by index and, as a tied head, by inner product.

    Attributes:
        embedding: (vocab_size, d_model), drawn from N(0, init_std).
    """

    def __init__(self, vocab_size: int, d_model: int, *, init_std: float = 0.02, rngs: nnx.Rngs):
        table_VD = init_std * jax.random.normal(rngs.params(), (vocab_size, d_model))
        self.embedding = nnx.Param(table_VD)

    def __call__(self, tokens: Array) -> Array:
        """Looks integer tokens (...) up: (..., D) in the dtype of the table."""
        return jnp.take(self.embedding[...], tokens, axis=0)

    def attend(self, x: Array) -> Array:
        """Inner products of x (..., D) with every row: (..., V), at least float32.

        The operands keep their promoted dtype (bfloat16 stays bfloat16); only the sum is wide.
        """
        table_VD = self.embedding[...]
        dtype = jnp.promote_types(x.dtype, table_VD.dtype)
        x_MD = x.reshape(-1, x.shape[-1]).astype(dtype)
        logits_MV = jnp.einsum(
            "md,vd->mv",
            x_MD,
            table_VD.astype(dtype),
            preferred_element_type=_at_least_float32(dtype),
        )
        return logits_MV.reshape(*x.shape[:-1], table_VD.shape[0])


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis (Ba et al. 2016, arXiv:1607.06450).

    Attributes:
        scale: (d,), ones.
        bias: (d,), zeros; None without bias.
    """

    def __init__(
        self, d: int, *, use_bias: bool = True, eps: float = 1e-5, rngs: nnx.Rngs | None = None
    ):
        del rngs  # nothing is drawn; accepted so that all layers are built alike
        self.scale = nnx.Param(jnp.ones((d,)))
        self.bias = nnx.Param(jnp.zeros((d,))) if use_bias else None
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """Normalises (..., d); statistics in at least float32, result in the dtype of x."""
        bias_D = None if self.bias is None else self.bias[...]
        return layer_norm(x, self.scale[...], bias_D, self.eps)


def layer_norm(x: Array, scale_D: Array, bias_D: Array | None, eps: float = 1e-5) -> Array:
    """The function behind `LayerNorm`.

    The variance is the mean of squared deviations, not E[x^2] - E[x]^2, which cancels at large means.
    """
    shape = x.shape
    wide = _at_least_float32(x.dtype)
    x_MD = x.reshape(-1, shape[-1]).astype(wide)
    x_MD = x_MD - jnp.mean(x_MD, axis=-1, keepdims=True)
    y_MD = x_MD * jax.lax.rsqrt(jnp.mean(jnp.square(x_MD), axis=-1, keepdims=True) + eps)
    y_MD = y_MD * scale_D.astype(wide)[None, :]
    if bias_D is not None:
        y_MD = y_MD + bias_D.astype(wide)[None, :]
    return y_MD.astype(x.dtype).reshape(shape)


def gelu(x: Array, approximate: bool = False) -> Array:
    """GELU (arXiv:1606.08415), exact by erf or, if `approximate`, by tanh; in the dtype of x."""
    return jax.nn.gelu(x, approximate=approximate)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes entries of x with probability `rate` and scales the rest by 1 / (1 - rate).

    Identity where key is None or rate is 0.

    Raises:
        ValueError: rate is not in [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout rate={rate} is not in [0, 1)")
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def causal_attention(
    q_BTHK: Array,
    k_BSNK: Array,
    v_BSNK: Array,
    *,
    offset_B: Array | None = None,
    dropout_rate: float = 0.0,
    key: Array | None = None,
) -> Array:
    """Causal multi-head attention (arXiv:1706.03762), grouped-query where N < H (arXiv:2305.13245).

    Without `offset_B` (training, prefill) S == T and query t attends to keys s <= t. With it (decoding against a
    cache of S slots) query t of row b stands at position offset_B[b] + t and attends to keys s <= that. Products are
    in the dtype of the operands; scores and softmax in at least float32; the scale is 1/sqrt(K).

    Args:
        q_BTHK: queries. k_BSNK, v_BSNK: keys and values, of the same dtype; head h reads key/value head h // (H/N).
        offset_B: int32 (B,), or None.
        dropout_rate, key: dropout on the probabilities; none where key is None.

    Returns:
        y_BTHK in the dtype of q.

    Raises:
        ValueError: N does not divide H, or S != T without offset_B.
    """
    num_heads, num_kv_heads = q_BTHK.shape[2], k_BSNK.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}")
    if offset_B is None and q_BTHK.shape[1] != k_BSNK.shape[1]:
        raise ValueError(
            f"{q_BTHK.shape[1]} queries but {k_BSNK.shape[1]} keys: pass offset_B, the position of "
            "the first query of each row"
        )
    return reference_attention(
        q_BTHK, k_BSNK, v_BSNK, offset_B=offset_B, dropout_rate=dropout_rate, key=key
    )


def reference_attention(
    q_BTHK: Array,
    k_BSNK: Array,
    v_BSNK: Array,
    *,
    offset_B: Array | None = None,
    dropout_rate: float = 0.0,
    key: Array | None = None,
) -> Array:
    """`causal_attention` written plainly: the definition that the fast paths are tested against."""
    B, T, H, K = q_BTHK.shape
    S, N = k_BSNK.shape[1:3]
    dtype = q_BTHK.dtype
    wide = _at_least_float32(dtype)

    q_BTNGK = q_BTHK.reshape(B, T, N, H // N, K)
    scores_BNGTS = jnp.einsum("BTNGK,BSNK->BNGTS", q_BTNGK, k_BSNK, preferred_element_type=wide)
    scores_BHTS = scores_BNGTS.reshape(B, H, T, S) / math.sqrt(K)

    query_BT = jnp.arange(T)[None, :]
    if offset_B is not None:
        query_BT = query_BT + offset_B[:, None]
    visible_BTS = jnp.arange(S)[None, None, :] <= query_BT[:, :, None]
    scores_BHTS = jnp.where(visible_BTS[:, None], scores_BHTS, jnp.finfo(wide).min)

    probs_BHTS = dropout(jax.nn.softmax(scores_BHTS, axis=-1), dropout_rate, key)
    probs_BNGTS = probs_BHTS.astype(dtype).reshape(B, N, H // N, T, S)
    return jnp.einsum("BNGTS,BSNK->BTNGK", probs_BNGTS, v_BSNK).reshape(B, T, H, K)
