"""Models for the tests of interop: specs that coincide in nothing, and leaves of random bits."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np

from craft_jax.data.tokenizers import Tokenizer
from interop.files.weights import open_weights
from interop.imports import write_run
from interop.leaves import leaves
from interop.source import Source
from interop.spec import ModelSpec
from interop.tensors import LazyTensor, lazy

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

# What each target can hold exactly.
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
}

DTYPES = ("float32", "bfloat16", "float16", "mixed")


def spec(**changes) -> ModelSpec:
    return dataclasses.replace(SPEC, **changes)


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
        found[name] = lazy(values.astype(_dtype(dtype, name)))
    return found


def _dtype(dtype: str, name: str) -> np.dtype:
    """The dtype of a leaf; mixed: norms and embeddings float32, the matrices half."""
    if dtype == "mixed":
        dtype = "bfloat16" if ".attn." in name or ".mlp." in name else "float32"
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
