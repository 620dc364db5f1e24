"""Folds: factors and constants that can be moved into the weights of a simpler architecture.

Outputs stay the same up to rounding, and a fold cannot be undone: it is applied only
if `allow_approx` names it. Leaves flow in and out; each is computed in
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
"""Cross-attention without a source, which adds the same vector at every position."""


def without_cross_attention(spec: ModelSpec) -> ModelSpec:
    """Returns the spec of a model after its constant cross-attention is folded.

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
    result = dict(found)
    if spec.embedding_scale and not folded.embedding_scale:
        table = result["token_embedding.embedding"]
        if spec.tie_embeddings:
            result["head.embedding"] = table
        scaled = functools.partial(_scaled, table, math.sqrt(spec.d_model))
        result["token_embedding.embedding"] = _computed(table, scaled)
    if spec.cross_attention in CONSTANT and folded.cross_attention == "none" and spec.bias:
        for i in range(spec.num_layers):
            bias = result[f"blocks.{i}.attn.out.bias"]
            add = functools.partial(_with_constant, spec, found, i)
            result[f"blocks.{i}.attn.out.bias"] = _computed(bias, add)
    return {name: result[name] for name in leaves(folded)}


def _computed(like: LazyTensor, read: Callable[[], np.ndarray]) -> LazyTensor:
    return LazyTensor(like.shape, like.dtype, lambda: read().astype(like.dtype))


def _scaled(table: LazyTensor, factor: float) -> np.ndarray:
    return table.read().astype(np.float64) * factor


def _with_constant(spec: ModelSpec, found: Tensors, i: int) -> np.ndarray:
    def in_float64(name: str) -> np.ndarray:
        return found[f"blocks.{i}.{name}"].read().astype(np.float64)

    total_D = in_float64("attn.out.bias") + in_float64("cross.out.bias")
    if spec.cross_attention == "zeros":
        # Over one key the softmax is 1, and the value of a zero vector is the bias.
        total_D += in_float64("cross.value.bias") @ in_float64("cross.out.kernel")
    return total_D
