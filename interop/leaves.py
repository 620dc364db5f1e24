"""The parameters of craft_jax's own models: names and shapes, without building a model.

`tests/interop/test_leaves.py` holds them against the models themselves.
"""

import numpy as np

from interop.spec import ModelSpec
from interop.tensors import Abstract

Shape = tuple[int, ...]


def patterns(spec: ModelSpec) -> dict[str, Shape]:
    """Returns the shape of each parameter, `{i}` for the layer, in the order of the forward."""
    d, f = spec.d_model, spec.d_ff

    def norm(name: str) -> dict[str, Shape]:
        bias = {f"{name}.bias": (d,)} if spec.bias else {}
        return {f"{name}.scale": (d,)} | bias

    def dense(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
        bias = {f"{name}.bias": (outputs,)} if spec.bias else {}
        return {f"{name}.kernel": (inputs, outputs)} | bias

    block = norm("attn_norm")
    for name in ("query", "key", "value", "out"):
        block |= dense(f"attn.{name}", d, d)
    block |= norm("mlp_norm") | dense("mlp.up", d, f) | dense("mlp.down", f, d)
    found = {
        "token_embedding.embedding": (spec.vocab_size, d),
        "position_embedding.embedding": (spec.max_seq_len, d),
        **{f"blocks.{{i}}.{name}": shape for name, shape in block.items()},
        **norm("final_norm"),
    }
    if not spec.tie_embeddings:
        found["head.embedding"] = (spec.vocab_size, d)
    return found


def leaves(spec: ModelSpec) -> dict[str, Abstract]:
    """Returns every parameter of a model, by path, as float32."""
    found, dtype = {}, np.dtype(np.float32)
    for pattern, shape in patterns(spec).items():
        layers = range(spec.num_layers) if "{i}" in pattern else range(1)
        for i in layers:
            found[pattern.replace("{i}", str(i))] = Abstract(shape, dtype)
    return found
