"""Models for the tests of interop: specs that coincide in nothing, and leaves of random bits."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np

from craft_jax.data.tokenizers import Tokenizer
from craft_jax.models.layers import sinusoids
from interop.commands.import_ import write_run
from interop.files.weights import open_weights
from interop.mapping.shapes import leaves
from interop.mapping.spec import ModelSpec
from interop.mapping.tensors import LazyTensor, lazy
from interop.sources.source import CRAFT, Source
from interop.targets.registry import TARGETS

SPEC = ModelSpec(
    vocab_size=97,
    num_layers=3,
    num_heads=6,
    d_model=48,
    d_ff=112,
    max_seq_len=33,
    dropout=0.0,
    activation="gelu",
    bias=True,
    tie_embeddings=True,
    norm_eps=1e-5,
)
"""No two sizes are equal, and none divides a neighbour by chance."""

# What each target can hold exactly. The first are of the family gpt.
SPECS = {
    "plain": {},
    "twelve layers": {"num_layers": 12},
    "untied": {"tie_embeddings": False},
    "no bias": {"bias": False},
    "untied, no bias, tanh": {"tie_embeddings": False, "bias": False, "activation": "gelu_tanh"},
    "relu, eps 1e-12": {"activation": "relu", "norm_eps": 1e-12},
    "silu, eps 1e-6": {"activation": "silu", "norm_eps": 1e-6},
    "nanogpt": {"d_ff": 192},
    "nanogpt, no bias": {"d_ff": 192, "bias": False},
    "layers as wide as the model": {"d_ff": 48, "num_layers": 2},
    "a head of six": {"d_model": 18, "num_heads": 3, "d_ff": 72},
    "craft d": {"tie_embeddings": False, "head_bias": True},
    "craft d, no bias, relu": {
        "tie_embeddings": False,
        "bias": False,
        "norm_bias": True,
        "activation": "relu",
    },
}
_CRAFT = {"name": "transformer", "embedding_scale": True}
_SEQ2SEQ = {"name": "seq2seq", "num_decoder_layers": 2, "cross_attention": "source"}
SPECS |= {
    "craft e": _CRAFT,
    "craft e, no bias": _CRAFT | {"bias": False},
    "craft e, post-norm, relu": _CRAFT | {"norm_first": False, "activation": "relu"},
    "craft f": _CRAFT | {"cross_attention": "empty", "tie_embeddings": False},
    "craft f, post-norm": _CRAFT
    | {"cross_attention": "empty", "tie_embeddings": False, "norm_first": False},
    "craft f, no bias": _CRAFT
    | {
        "cross_attention": "empty",
        "tie_embeddings": False,
        "bias": False,
        "final_norm_bias": True,
    },
    "craft c": {
        "name": "transformer",
        "cross_attention": "zeros",
        "tie_embeddings": False,
        "head_bias": True,
    },
    "craft b": _CRAFT | {"tie_embeddings": False, "head_bias": True},
    "craft b, sinusoidal": _CRAFT
    | {"tie_embeddings": False, "head_bias": True, "positions": "sinusoidal"},
    "post-norm, nothing after it": {
        "name": "transformer",
        "norm_first": False,
        "final_norm": False,
        "activation": "relu",
    },
    "seq2seq": _SEQ2SEQ | {"share_embeddings": True, "embedding_scale": True},
    "seq2seq, post-norm, no bias, all apart": _SEQ2SEQ
    | {
        "norm_first": False,
        "bias": False,
        "activation": "relu",
        "tie_embeddings": False,
        "head_bias": True,
        "positions": "sinusoidal",
    },
}

DTYPES = ("float32", "bfloat16", "float16", "mixed")


def spec(**changes) -> ModelSpec:
    return dataclasses.replace(SPEC, **changes)


def fitting(target: str) -> ModelSpec:
    """Returns the first spec that a target can hold exactly."""
    known = (spec(**changes) for changes in ({"d_ff": 192}, *SPECS.values()))
    return next(s for s in known if TARGETS[target].answer(s).exact)


def random_leaves(model: ModelSpec, dtype: str = "float32", seed: int = 0) -> dict[str, LazyTensor]:
    """Returns a value for every leaf: scales around 1, all else around 0, nothing left at zero."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, leaf in leaves(model).items():
        center, width = (1.0, 0.3) if name.endswith("scale") else (0.0, 0.3)
        if name.endswith("kernel"):
            width = 0.2
        if name.endswith("embedding"):
            width = 0.5
        values = center + width * rng.standard_normal(leaf.shape)
        if name.endswith("constant"):
            values = sinusoids(*leaf.shape)
        found[name] = lazy(values.astype(_dtype(dtype, name)))
    return found


def _dtype(dtype: str, name: str) -> np.dtype:
    """The dtype of a leaf; mixed: norms and embeddings float32, the matrices half."""
    if dtype == "mixed":
        is_matrix = any(part in name for part in (".attn.", ".cross.", ".mlp."))
        dtype = "bfloat16" if is_matrix else "float32"
    return np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)


def make_run(
    folder: Path,
    model: ModelSpec,
    dtype: str = "float32",
    *,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
) -> Path:
    """Makes a run of random leaves, as an import makes it, and returns its folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    leaves_ = random_leaves(model, dtype, seed)
    source = Source(
        path=Path("made here"),
        run=folder.name,
        kind="craft_jax",
        spec=model,
        leaves=leaves_,
        tokenizer=tokenizer,
    )
    write_run(source, folder, folder, spill=False)
    return folder


def in_memory(
    model: ModelSpec, dtype: str = "float32", *, tokenizer: Tokenizer | None = None
) -> Source:
    """Returns what `open_source` finds in a run that `make_run` makes, without writing one."""
    return Source(
        path=Path("<model>"),
        run="run",
        kind=CRAFT,
        spec=model,
        leaves=random_leaves(model, dtype),
        tokenizer=tokenizer,
    )


def array(path: Path, name: str) -> np.ndarray:
    """Returns a tensor of a file or folder of safetensors, copied."""
    return np.array(open_weights(path).tensors[name].read())


def flip(file: Path, name: str, at: int = -1) -> None:
    """Flips one bit of a tensor in a safetensors file."""
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    start, end = header[name]["data_offsets"]
    with file.open("r+b") as handle:
        place = 8 + length + (end - 1 if at < 0 else start + at)
        handle.seek(place)
        byte = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([byte ^ 1]))
