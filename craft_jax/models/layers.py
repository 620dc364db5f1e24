"""Building blocks of the models: dense layers, embedding, head, normalisation, attention.

Arrays flow in and out; the modules hold `nnx.Param` leaves and nothing else. No dtype policy, no
sharding and no randomness lives here: the dtype is that of the arguments, and dropout takes a key
(`None`: deterministic). Everything works on plain arrays under jit, grad, remat, scan and a mesh.

Shape letters: B batch, T query time, S key time, D model width (or any input width), H heads,
N key/value heads, G query heads per key/value head (H = N * G), K head width, F hidden (or any
output width), V vocabulary, M all leading axes as one.

Functions that every layer calls are jitted, so that JAX traces and lowers them once for all layers;
XLA inlines them into one program.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from craft_jax.models import kernels
from craft_jax.models.attention import (
    attention,
    cached_attention,
    heads_first,
    reference_attention,
    same_segment,
)
from craft_jax.models.base import Constant, Kernel
from craft_jax.models.kernels import causal_attention
from craft_jax.models.numerics import accum_dtype, accum_einsum, dropout, dropout_mask, promoted

__all__ = [
    "ACTIVATIONS",
    "Constant",
    "Embedding",
    "Head",
    "Kernel",
    "LayerNorm",
    "Linear",
    "Sinusoids",
    "attend",
    "attention",
    "cached_attention",
    "causal_attention",
    "dropout",
    "dropout_mask",
    "gelu",
    "heads_first",
    "layer_norm",
    "linear",
    "reference_attention",
    "same_segment",
    "silu",
    "sinusoids",
]

Array = jax.Array


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
        self.kernel = Kernel(init_std * jax.random.normal(rngs.params(), (d_in, d_out)))
        self.bias = nnx.Param(jnp.zeros((d_out,))) if use_bias else None

    def __call__(self, x: Array) -> Array:
        """Maps (..., d_in) to (..., d_out), in the dtype to which input and kernel promote."""
        bias_F = None if self.bias is None else self.bias[...]
        return linear(x, self.kernel.get_value(), bias_F)


@jax.jit
def linear(x: Array, kernel: Array | kernels.DecodeKernel, bias_F: Array | None) -> Array:
    """`x @ kernel + bias` over the last axis of x (..., D); the function behind `Linear`.

    The leading axes become one before the product: with two, XLA:CPU contracts the weight gradient
    over two dimensions, which takes about twice as long.
    """
    y_MF = kernels.matmul(x.reshape(-1, x.shape[-1]), kernel)
    if bias_F is not None:
        y_MF = y_MF + bias_F.astype(y_MF.dtype)[None, :]
    return y_MF.reshape(*x.shape[:-1], kernel.shape[-1])


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

    The operands keep their promoted dtype (bfloat16 stays bfloat16); the sum is in at least
    float32.
    """
    dtype = promoted(x.dtype, table_VD.dtype)
    V = table_VD.shape[0]
    x_MD = x.reshape(-1, x.shape[-1]).astype(dtype)
    table_VD = kernels.pad_table(table_VD, x_MD.shape[0])
    logits_MV = accum_einsum("md,vd->mv", x_MD, table_VD.astype(dtype))[:, :V]
    return logits_MV.reshape(*x.shape[:-1], V)


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

    The table is stored, not recomputed, so that an imported one keeps its bits: libraries round
    these numbers differently.

    Attributes:
        constant: (max_len, d_model); has no gradient and does not decay.
    """

    def __init__(self, max_len: int, d_model: int):
        self.constant = Constant(jnp.asarray(sinusoids(max_len, d_model), jnp.float32))

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
    dtype = accum_dtype(x.dtype)
    x_MD = x.reshape(-1, shape[-1]).astype(dtype)
    x_MD = x_MD - jnp.mean(x_MD, axis=-1, keepdims=True)
    y_MD = x_MD * jax.lax.rsqrt(jnp.mean(jnp.square(x_MD), axis=-1, keepdims=True) + eps)
    y_MD = y_MD * scale_D.astype(dtype)[None, :]
    if bias_D is not None:
        y_MD = y_MD + bias_D.astype(dtype)[None, :]
    return y_MD.astype(x.dtype).reshape(shape)


@functools.partial(jax.jit, static_argnames="approximate")
def gelu(x: Array, approximate: bool = False) -> Array:
    """GELU (arXiv:1606.08415): x times the normal distribution function of x, in the dtype of x.

    Exact by erf or, if `approximate`, by tanh; computed in at least float32 and rounded once.
    """
    y = x.astype(accum_dtype(x.dtype))
    y = jax.nn.gelu(y, approximate=True) if approximate else _exact_gelu(y)
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
    return jax.nn.silu(x.astype(accum_dtype(x.dtype))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": silu,
}
"""By the name in a config; each keeps the dtype of its argument."""
