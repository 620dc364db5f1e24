"""The parameters of craft_jax's own models: names and shapes, without building a model.

`tests/interop/mapping/test_shapes.py` holds them against the models themselves.
"""

import numpy as np

from interop.mapping.spec import FlowSpec, ModelSpec, Spec
from interop.mapping.tensors import Abstract

Shape = tuple[int, ...]
_TIME_FEATURES = 256


def patterns(spec: Spec) -> dict[str, Shape]:
    """Returns the shape of each parameter, in the order of the forward.

    `{i}` is the layer, `{j}` the layer of a decoder beside an encoder.
    """
    return _of_flow(spec) if isinstance(spec, FlowSpec) else _of_tokens(spec)


def _of_flow(spec: FlowSpec) -> dict[str, Shape]:
    d, f = spec.d_model, spec.d_ff
    denses = {
        "patch_embedding": (spec.patch_width, d),
        "time_embedding.up": (_TIME_FEATURES, d),
        "time_embedding.down": (d, d),
        "blocks.{i}.modulation": (d, 6 * d),
        **{f"blocks.{{i}}.attn.{name}": (d, d) for name in ("query", "key", "value", "out")},
        "blocks.{i}.mlp.up": (d, f),
        "blocks.{i}.mlp.down": (f, d),
        "final_modulation": (d, 2 * d),
        "head": (d, spec.patch_width),
    }
    found: dict[str, Shape] = {}
    for name, shape in denses.items():
        found |= {f"{name}.kernel": shape, f"{name}.bias": shape[1:]}
        if name == "patch_embedding":
            found["position_embedding.embedding"] = (spec.num_patches, d)
        if name == "time_embedding.down" and spec.num_classes:
            found["label_embedding.embedding"] = (spec.num_classes + 1, d)
    return found


def _of_tokens(spec: ModelSpec) -> dict[str, Shape]:
    rows, d = spec.vocab_size, spec.d_model
    if spec.num_decoder_layers:
        embedding = "source_embedding.embedding"
        own = {} if spec.share_embeddings else {embedding: (rows, d)}
        found = {
            **own,
            **_positions("source_positions", spec),
            **_block("encoder.{i}", spec, has_cross=False),
            **_norm("encoder_norm", d, spec.has_final_norm_bias),
            "target_embedding.embedding": (rows, d),
            **_positions("target_positions", spec),
            **_block("decoder.{j}", spec, has_cross=True),
            **_norm("decoder_norm", d, spec.has_final_norm_bias),
        }
    else:
        found = {
            "token_embedding.embedding": (rows, d),
            **_positions("position_embedding", spec),
            **_block("blocks.{i}", spec, has_cross=spec.cross_attention != "none"),
            **(_norm("final_norm", d, spec.has_final_norm_bias) if spec.final_norm else {}),
        }
    if not spec.tie_embeddings:
        found["head.embedding"] = (rows, d)
    if spec.head_bias:
        found["head.bias"] = (rows,)
    return found


def _positions(name: str, spec: ModelSpec) -> dict[str, Shape]:
    leaf = "constant" if spec.positions == "sinusoidal" else "embedding"
    return {f"{name}.{leaf}": (spec.max_seq_len, spec.d_model)}


def _norm(name: str, d: int, has_bias: bool) -> dict[str, Shape]:
    return {f"{name}.scale": (d,)} | ({f"{name}.bias": (d,)} if has_bias else {})


def _dense(name: str, inputs: int, outputs: int, spec: ModelSpec) -> dict[str, Shape]:
    bias = {f"{name}.bias": (outputs,)} if spec.bias else {}
    return {f"{name}.kernel": (inputs, outputs)} | bias


def _block(name: str, spec: ModelSpec, has_cross: bool) -> dict[str, Shape]:
    d, f = spec.d_model, spec.d_ff
    found: dict[str, Shape] = {}
    for part in ("attn", "cross") if has_cross else ("attn",):
        found |= _norm(f"{name}.{part}_norm", d, spec.has_norm_bias)
        for dense in ("query", "key", "value", "out"):
            found |= _dense(f"{name}.{part}.{dense}", d, d, spec)
    found |= _norm(f"{name}.mlp_norm", d, spec.has_norm_bias)
    return found | _dense(f"{name}.mlp.up", d, f, spec) | _dense(f"{name}.mlp.down", f, d, spec)


def leaves(spec: Spec) -> dict[str, Abstract]:
    """Returns every parameter of a model, by path, as float32."""
    found, dtype = {}, np.dtype(np.float32)
    counts = {"{i}": spec.num_layers, "{j}": spec.num_decoder_layers}
    for pattern, shape in patterns(spec).items():
        mark = next((mark for mark in counts if mark in pattern), None)
        for i in range(counts[mark]) if mark else range(1):
            found[pattern.replace(mark, str(i)) if mark else pattern] = Abstract(shape, dtype)
    return found
