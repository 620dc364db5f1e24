"""Attention as an accelerator runs it fastest: the library's, by cuDNN where it supports the heads.

CI does not run this file on a GPU; `scripts/gpu_bench.sh` does.
"""

import functools
import logging

import jax

from craft_jax.models.attention import same_segment

Array = jax.Array

_CUDNN_MAX_HEAD_DIM = 128


def fused_attention(
    q_BTHK: Array, k_BTNK: Array, v_BTNK: Array, segments_BT: Array | None, backend: str
) -> Array:
    """Causal attention in half precision: y_BTHK in the dtype of q."""
    # With segments its cost was not measured: XLA may or may not write the mask to memory.
    mask_BHTT = None if segments_BT is None else same_segment(segments_BT)[:, None]
    return jax.nn.dot_product_attention(
        q_BTHK,
        k_BTNK,
        v_BTNK,
        mask=mask_BHTT,
        is_causal=True,
        implementation=implementation(backend, q_BTHK.shape[-1]),
    )


@functools.cache  # One warning, not one for each layer.
def implementation(backend: str, head_dim: int) -> str | None:
    """Returns the argument of `jax.nn.dot_product_attention`: cuDNN's flash attention, or XLA."""
    if backend != "gpu":
        return None
    if head_dim % 8 == 0 and head_dim <= _CUDNN_MAX_HEAD_DIM:
        return "cudnn"
    logging.getLogger(__name__).warning(
        "attention runs without cuDNN, which takes more time and memory: heads are %d wide; cuDNN "
        "supports multiples of 8 up to %d",
        head_dim,
        _CUDNN_MAX_HEAD_DIM,
    )
    return "xla"
