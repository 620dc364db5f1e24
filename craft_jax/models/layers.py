"""Building blocks of the models: dense layers, embedding, head, normalisation, attention.

Arrays flow in and out; the modules hold `nnx.Param` leaves and nothing else. No dtype policy, no
sharding and no randomness lives here: the dtype is that of the arguments, and dropout takes a key
(`None`: deterministic). Everything works on plain arrays under jit, grad, remat, scan and a mesh.

Shape letters: B batch, T query time, S key time, D model width (or any input width), H heads,
N key/value heads, G query heads per key/value head (H = N * G), K head width, F hidden (or any
output width), V vocabulary, M all leading axes as one.

What every layer of a model calls is jitted, so that JAX traces and lowers it once for all layers;
XLA makes one program of the whole.
"""

import functools
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from craft_jax.models.kernels.cpu import bfloat16_product, blocked_attention

Array = jax.Array


def _at_least_float32(dtype) -> jnp.dtype:
    """The dtype for statistics and logits: float32, or float64 where the operands are float64."""
    return jnp.promote_types(dtype, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wide_einsum(subscripts: str, a: Array, b: Array) -> Array:
    """Product of equal-typed a and b, returned in at least float32.

    Backward, the cotangent is rounded to the operands' dtype first, so that with bfloat16 these
    products run in bfloat16 too; autodiff alone would multiply float32 by bfloat16, in float32.
    """
    return jnp.einsum(subscripts, a, b, preferred_element_type=_at_least_float32(a.dtype))


def _wide_einsum_forward(subscripts, a, b):
    return _wide_einsum(subscripts, a, b), (a, b)


def _wide_einsum_backward(subscripts, operands, ct):
    _, pullback = jax.vjp(functools.partial(jnp.einsum, subscripts), *operands)
    return pullback(ct.astype(operands[0].dtype))


_wide_einsum.defvjp(_wide_einsum_forward, _wide_einsum_backward)


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
        self.turned_FD: Array | None = nnx.data(None)

    def __call__(self, x: Array) -> Array:
        """Maps (..., d_in) to (..., d_out), in the dtype to which input and kernel promote."""
        bias_F = None if self.bias is None else self.bias[...]
        return linear(x, self.kernel[...], bias_F, self.turned_FD)


@jax.jit
def linear(
    x: Array, kernel_DF: Array, bias_F: Array | None, turned_FD: Array | None = None
) -> Array:
    """`x @ kernel + bias` over the last axis of x (..., D); the function behind `Linear`.

    The leading axes become one before the product: with two, XLA:CPU contracts the weight gradient
    over two dimensions, which takes about twice as long. `turned_FD` is the kernel, see `turned`.
    """
    dtype = jnp.promote_types(x.dtype, kernel_DF.dtype)
    x_MD = x.reshape(-1, x.shape[-1]).astype(dtype)
    if turned_FD is not None:
        y_MF = jnp.einsum("md,fd->mf", x_MD.astype(turned_FD.dtype), turned_FD).astype(dtype)
    elif dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        y_MF = bfloat16_product(x_MD, kernel_DF.astype(dtype))
    else:
        y_MF = x_MD @ kernel_DF.astype(dtype)
    if bias_F is not None:
        y_MF = y_MF + bias_F.astype(dtype)[None, :]
    return y_MF.reshape(*x.shape[:-1], kernel_DF.shape[-1])


def turned(model: nnx.Module, num_rows: int) -> dict[str, Array]:
    """Returns the kernels of a model's dense layers as (F, D), by path, where that is faster.

    That is where XLA:CPU multiplies a single vector: a product with (F, D) is one pass over memory
    in all cores, at 26 GB/s where reading takes 30; with (D, F) it is 20. They are in at least
    float32, for it knows no such product of bfloat16. They cost as much memory again, so models
    above `MAX_TURNED_BYTES` have none.
    """
    layers = {
        ".".join(map(str, path)): module.kernel[...]
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    }
    size = sum(4 * kernel_DF.size for kernel_DF in layers.values())
    if num_rows > 1 or jax.default_backend() != "cpu" or size > MAX_TURNED_BYTES:
        return {}
    return {
        path: kernel_DF.T.astype(_at_least_float32(kernel_DF.dtype))
        for path, kernel_DF in layers.items()
    }


MAX_TURNED_BYTES = 4 << 30


def use_turned(model: nnx.Module, kernels: dict[str, Array]) -> None:
    """Makes dense layers multiply by what `turned` returned."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            module.turned_FD = kernels.get(".".join(map(str, path)))


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
        """Inner products of x (..., D) with every row: (..., V), at least float32."""
        return attend(x, self.embedding[...])


def attend(x: Array, table_VD: Array) -> Array:
    """Inner products of x (..., D) with every row of a table: (..., V), at least float32.

    The operands keep their promoted dtype (bfloat16 stays bfloat16); only the sum is wide.
    """
    dtype = jnp.promote_types(x.dtype, table_VD.dtype)
    V = table_VD.shape[0]
    x_MD = x.reshape(-1, x.shape[-1]).astype(dtype)
    if _likes_whole_tiles(x_MD.shape[0]):
        table_VD = jnp.pad(table_VD, ((0, -V % TILE), (0, 0)))
    logits_MV = _wide_einsum("md,vd->mv", x_MD, table_VD.astype(dtype))[:, :V]
    return logits_MV.reshape(*x.shape[:-1], V)


TILE = 128
"""What the rows of a table are made a multiple of; other widths keep a GPU from fast products."""


def _likes_whole_tiles(num_rows: int) -> bool:
    """Whether padding a table costs less than it gains: not for the few rows of decoding."""
    return jax.default_backend() != "cpu" and num_rows >= TILE


class Head(nnx.Module):
    """Logits of hidden states: inner products with the rows of a table, and a bias.

    Attributes:
        embedding: (vocab_size, d_model), drawn from N(0, 0.02); None where the table is that of
            the token embedding.
        bias: (vocab_size,), zeros; None without bias.
    """

    def __init__(
        self, vocab_size: int, d_model: int, *, is_tied: bool, use_bias: bool, rngs: nnx.Rngs
    ):
        own = None if is_tied else Embedding(vocab_size, d_model, rngs=rngs).embedding
        self.embedding = own
        self.bias = nnx.Param(jnp.zeros((vocab_size,))) if use_bias else None

    def __call__(self, x: Array, tied_VD: Array) -> Array:
        """Maps x (..., D) to logits (..., V), at least float32; `tied_VD` serves if it is tied."""
        table_VD = tied_VD if self.embedding is None else self.embedding[...]
        logits = attend(x, table_VD)
        if self.bias is None:
            return logits
        bias_V = self.bias[...].astype(logits.dtype)
        return logits + bias_V.reshape(*(1,) * (logits.ndim - 1), -1)


class Sinusoids(nnx.Module):
    """A table of positions that never trains: sines and cosines (arXiv:1706.03762, section 3.5).

    The table is held, not computed anew, so that one which came from elsewhere keeps its bits:
    libraries round these numbers differently.

    Attributes:
        constant: (max_len, d_model); a leaf of this name has no gradient and does not decay.
    """

    def __init__(self, max_len: int, d_model: int):
        self.constant = nnx.Param(jnp.asarray(sinusoids(max_len, d_model), jnp.float32))

    def __call__(self, positions: Array) -> Array:
        """Looks integer positions (...) up: (..., D) in the dtype of the table."""
        return jnp.take(jax.lax.stop_gradient(self.constant[...]), positions, axis=0)


def sinusoids(max_len: int, d_model: int) -> np.ndarray:
    """The table of `Sinusoids`, float64: sin(p / 10000^(2i/D)) at 2i, its cosine at 2i + 1."""
    rate_I = np.exp(np.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
    angle_PI = np.arange(max_len)[:, None] * rate_I[None, :]
    table_PD = np.zeros((max_len, d_model))
    table_PD[:, 0::2] = np.sin(angle_PI)
    table_PD[:, 1::2] = np.cos(angle_PI)[:, : d_model // 2]
    return table_PD


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


@functools.partial(jax.jit, static_argnames="eps")
def layer_norm(x: Array, scale_D: Array, bias_D: Array | None, eps: float = 1e-5) -> Array:
    """The function behind `LayerNorm`.

    The variance is the mean of squared deviations, not E[x^2] - E[x]^2, which cancels where the
    mean is large.
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


@functools.partial(jax.jit, static_argnames="approximate")
def gelu(x: Array, approximate: bool = False) -> Array:
    """GELU (arXiv:1606.08415): x times the normal distribution function of x, in the dtype of x.

    Exact by erf or, if `approximate`, by tanh; computed in at least float32 and rounded once.
    """
    wide = x.astype(_at_least_float32(x.dtype))
    y = jax.nn.gelu(wide, approximate=True) if approximate else _exact_gelu(wide)
    return y.astype(x.dtype)


# jax.nn.gelu goes through erfc, of which XLA:CPU computes every branch: twice the time of erf, and
# more memory kept for the backward pass. With its own VJP only x is kept.
@jax.custom_vjp
def _exact_gelu(x: Array) -> Array:
    return x * _normal_cdf(x)


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


def _exact_gelu_backward(x, ct):
    density = jnp.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))
    return (ct * (_normal_cdf(x) + x * density),)


_exact_gelu.defvjp(lambda x: (_exact_gelu(x), x), _exact_gelu_backward)


def silu(x: Array) -> Array:
    """SiLU (arXiv:1606.08415): x * sigmoid(x), computed in at least float32 and rounded once."""
    wide = x.astype(_at_least_float32(x.dtype))
    return jax.nn.silu(wide).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": silu,
}
"""What a config may name; each keeps the dtype of its argument."""


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes entries of x with probability `rate` and divides the rest by 1 - rate.

    Identity where key is None or rate is 0.

    Raises:
        ValueError: rate is not in [0, 1).
    """
    keep = dropout_mask(x.shape, rate, key)
    return x if keep is None else jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def dropout_mask(shape: tuple[int, ...], rate: float, key: Array | None) -> Array | None:
    """What dropout keeps: bool of the given shape, or None where it keeps everything.

    Raises:
        ValueError: rate is not in [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout rate={rate} is not in [0, 1)")
    if key is None or rate == 0.0:
        return None
    return jax.random.bernoulli(key, 1.0 - rate, shape)


def causal_attention(
    q_BTHK: Array,
    k_BTNK: Array,
    v_BTNK: Array,
    *,
    segments_BT: Array | None = None,
    dropout_rate: float = 0.0,
    key: Array | None = None,
) -> Array:
    """Causal multi-head attention (arXiv:1706.03762); grouped-query if N < H (arXiv:2305.13245).

    Query t attends to keys s <= t; with `segments_BT` (packed documents) to those of its own
    segment only. Products are in the dtype of the operands, scores and softmax in at least float32,
    and the scale is 1/sqrt(K). Where keys come from a cache, see `cached_attention`.

    Args:
        q_BTHK: queries.
        k_BTNK: keys, in the dtype of the queries; head h reads key head h // (H / N).
        v_BTNK: values, likewise.
        segments_BT: int32, the segment of each token; or None.
        dropout_rate: rate of dropout on the probabilities, in [0, 1).
        key: randomness for it; None: no dropout.

    Returns:
        y_BTHK in the dtype of q.

    Raises:
        ValueError: N does not divide H, as many keys as queries are not there, or a rate outside
            [0, 1).
    """
    (B, T, H, _), (S, N) = q_BTHK.shape, k_BTNK.shape[1:3]
    _check_heads(H, N)
    if T != S:
        raise ValueError(f"{T} queries but {S} keys; for those of a cache use cached_attention")
    backend = jax.default_backend()
    if backend == "cpu":
        keep_BHTT = dropout_mask((B, H, T, T), dropout_rate, key)
        return blocked_attention(q_BTHK, k_BTNK, v_BTNK, keep_BHTT, segments_BT, dropout_rate)
    # Not tested by this project's CI, but by `scripts/gpu_bench.sh`. float32 stays with the
    # reference, since the library function may not multiply in float32 there.
    half = q_BTHK.dtype in (jnp.bfloat16, jnp.float16)
    no_dropout = key is None or dropout_rate == 0.0
    if half and no_dropout:
        # With segments its cost was not measured: XLA may or may not write the mask to memory.
        mask_BHTT = None if segments_BT is None else same_segment(segments_BT)[:, None]
        return jax.nn.dot_product_attention(
            q_BTHK,
            k_BTNK,
            v_BTNK,
            mask=mask_BHTT,
            is_causal=True,
            implementation=_implementation(backend, q_BTHK.shape[-1]),
        )
    options = {"segments_BT": segments_BT, "dropout_rate": dropout_rate, "key": key}
    return reference_attention(q_BTHK, k_BTNK, v_BTNK, **options)


@functools.cache  # One warning, not one for each layer.
def _implementation(backend: str, head_width: int) -> str | None:
    """Returns what `jax.nn.dot_product_attention` is to use: cuDNN's flash attention, or XLA."""
    if backend != "gpu":
        return None
    if head_width % 8 == 0 and head_width <= _CUDNN_WIDTH:
        return "cudnn"
    logging.getLogger(__name__).warning(
        "attention without cuDNN, which takes more time and memory: heads are %d wide, and it "
        "knows multiples of 8 up to %d",
        head_width,
        _CUDNN_WIDTH,
    )
    return "xla"


_CUDNN_WIDTH = 128


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

    Query t of row b stands at position offset_B[b] + t and attends to keys s <= that.

    Args:
        q_BTHK: queries.
        k_BNSK, v_BNSK: keys and values, heads before time, as a `KVCache` holds them.
        offset_B: int32, at least 0.

    Raises:
        ValueError: N does not divide H.
    """
    _check_heads(q_BTHK.shape[2], k_BNSK.shape[1])
    query_BT = jnp.arange(q_BTHK.shape[1])[None, :] + offset_B[:, None]
    visible_BTS = jnp.arange(k_BNSK.shape[2])[None, None, :] <= query_BT[:, :, None]
    return attention(q_BTHK, k_BNSK, v_BNSK, visible_BTS)


def _check_heads(num_heads: int, num_kv_heads: int) -> None:
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}")


def heads_first(x_BSNK: Array) -> Array:
    """Keys or values with heads before time, so that each head's are one piece: x_BNSK."""
    return x_BSNK.transpose(0, 2, 1, 3)


def same_segment(segments_BT: Array) -> Array:
    """Whether two tokens of a row belong to one document: bool (B, T, T)."""
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
    scores_BNRS = _wide_einsum("BNRK,BNSK->BNRS", q_BNRK, k_BNSK)
    scores_BHTS = scores_BNRS.reshape(B, H, T, S) / math.sqrt(K)
    if visible_BTS is not None:
        lowest = jnp.finfo(_at_least_float32(dtype)).min
        scores_BHTS = jnp.where(visible_BTS[:, None], scores_BHTS, lowest)
    probs_BHTS = dropout(jax.nn.softmax(scores_BHTS, axis=-1), dropout_rate, key)
    probs_BNRS = probs_BHTS.astype(dtype).reshape(B, N, H // N * T, S)
    y_BNRK = jnp.einsum("BNRS,BNSK->BNRK", probs_BNRS, v_BNSK)
    return y_BNRK.reshape(B, H, T, K).transpose(0, 2, 1, 3)
