"""Accumulation dtypes and dropout: what layers, attention and kernels share.

Shape letters as in `layers`.
"""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array


def promoted(a: jnp.dtype, b: jnp.dtype) -> jnp.dtype:
    """Returns the dtype to which two promote, also where implicit promotion is an error."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def accum_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype for statistics, logits and losses: at least float32."""
    return promoted(dtype, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def accum_einsum(subscripts: str, a: Array, b: Array) -> Array:
    """Product of equal-typed a and b, returned in at least float32.

    Backward, the cotangent is rounded to the operands' dtype first, so that with bfloat16 these
    products run in bfloat16 too; autodiff alone would multiply float32 by bfloat16, in float32.
    """
    return jnp.einsum(subscripts, a, b, preferred_element_type=accum_dtype(a.dtype))


def _accum_einsum_forward(subscripts, a, b):
    return accum_einsum(subscripts, a, b), (a, b)


def _accum_einsum_backward(subscripts, operands, ct):
    _, pullback = jax.vjp(functools.partial(jnp.einsum, subscripts), *operands)
    return pullback(ct.astype(operands[0].dtype))


accum_einsum.defvjp(_accum_einsum_forward, _accum_einsum_backward)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes entries of x with probability `rate` and divides the rest by 1 - rate.

    Identity where key is None or rate is 0.

    Raises:
        ValueError: rate is not in [0, 1).
    """
    keep = dropout_mask(x.shape, rate, key)
    return x if keep is None else jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def dropout_mask(shape: tuple[int, ...], rate: float, key: Array | None) -> Array | None:
    """Returns the entries that dropout keeps, bool of the given shape; None: all.

    Raises:
        ValueError: rate is not in [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout rate={rate} is not in [0, 1)")
    if key is None or rate == 0.0:
        return None
    return jax.random.bernoulli(key, 1.0 - rate, shape)
