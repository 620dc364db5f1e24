"""What can be multiplied or added into the weights, so that a simpler architecture holds a model.

The numbers stay the same up to rounding, and the weights do not come back: a fold is made only
where it was asked for by name (`--allow-approx`). Leaves flow in and out; each is computed in
float64 when it is read, and rounded once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

from interop.errors import NotRepresentableError
from interop.mapping.shapes import leaves
from interop.mapping.spec import ModelSpec
from interop.mapping.tensors import LazyTensor, Tensors

CROSS, SCALE = "cross-fold", "scale-fold"
CONSTANT = ("zeros", "empty")
"""Cross-attention that reads nothing, and so adds the same to every position."""


def without_cross_attention(spec: ModelSpec) -> ModelSpec:
    """Returns what a model is when its constant cross-attention is folded.

    Raises:
      NotRepresentableError: a layer norm follows it.
    """
    if not spec.norm_first:
        raise NotRepresentableError(
            f"{CROSS}: layer norms follow the sums of this model, also the one with its "
            "cross-attention, so that no bias can take its place"
        )
    return dataclasses.replace(spec, cross_attention="none")


def towards(spec: ModelSpec, found: Tensors, folded: ModelSpec) -> dict[str, LazyTensor]:
    """Returns the leaves of `folded`, which is `spec` without cross-attention or without scale."""
    made = dict(found)
    if spec.embedding_scale and not folded.embedding_scale:
        table = made["token_embedding.embedding"]
        if spec.tie_embeddings:
            made["head.embedding"] = table
        scaled = functools.partial(_scaled, table, math.sqrt(spec.d_model))
        made["token_embedding.embedding"] = _computed(table, scaled)
    if spec.cross_attention in CONSTANT and folded.cross_attention == "none" and spec.bias:
        for i in range(spec.num_layers):
            bias = made[f"blocks.{i}.attn.out.bias"]
            add = functools.partial(_with_constant, spec, found, i)
            made[f"blocks.{i}.attn.out.bias"] = _computed(bias, add)
    return {name: made[name] for name in leaves(folded)}


def _computed(like: LazyTensor, read: Callable[[], np.ndarray]) -> LazyTensor:
    return LazyTensor(like.shape, like.dtype, lambda: read().astype(like.dtype))


def _scaled(table: LazyTensor, factor: float) -> np.ndarray:
    return table.read().astype(np.float64) * factor


def _with_constant(spec: ModelSpec, found: Tensors, i: int) -> np.ndarray:
    def wide(name: str) -> np.ndarray:
        return found[f"blocks.{i}.{name}"].read().astype(np.float64)

    total_D = wide("attn.out.bias") + wide("cross.out.bias")
    if spec.cross_attention == "zeros":
        # Over one key the softmax is 1, and the value of a zero vector is the bias.
        total_D += wide("cross.value.bias") @ wide("cross.out.kernel")
    return total_D
