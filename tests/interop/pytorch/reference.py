"""What craft_jax computes in float64, and models that make every choice at least once."""

import dataclasses
import functools
import json

import jax
import numpy as np
import torch

from interop.mapping.spec import ModelSpec
from interop.mapping.tensors import lazy
from interop.pytorch.tensors import to_torch
from interop.sources.live import definition
from tests.interop.models import SPEC, random_leaves

# These models are tiny: threads only wait for each other.
torch.set_num_threads(1)

_OPEN = {"norm_bias": None, "final_norm_bias": None}
_LM = dataclasses.asdict(SPEC) | _OPEN | {"name": "transformer"}
_PAIR = _LM | {"name": "seq2seq", "cross_attention": "source", "num_decoder_layers": 2}


def lm(**changes) -> ModelSpec:
    return ModelSpec(**_LM | changes)


def pair(**changes) -> ModelSpec:
    return ModelSpec(**_PAIR | changes)


def gpt(**changes) -> ModelSpec:
    return ModelSpec(**_LM | {"name": "gpt"} | changes)


LMS = {
    "gpt": gpt(),
    "gpt, biases here and there": gpt(bias=False, norm_bias=True, head_bias=True),
    "gpt, untied, head bias": gpt(tie_embeddings=False, head_bias=True, norm_bias=False),
    "transformer": lm(embedding_scale=True),
    "post-norm": lm(norm_first=False, activation="relu", embedding_scale=True),
    "post-norm, no final norm": lm(norm_first=False, final_norm=False, activation="silu"),
    "no final norm": lm(final_norm=False, head_bias=True),
    "final norm without bias": lm(final_norm_bias=False, norm_eps=1e-6),
    "no bias": lm(bias=False, embedding_scale=True),
    "bias of the final norm alone": lm(bias=False, final_norm_bias=True),
    "sinusoidal": lm(positions="sinusoidal", embedding_scale=True, tie_embeddings=False),
    "zeros": lm(cross_attention="zeros", tie_embeddings=False, head_bias=True),
    "empty": lm(cross_attention="empty", embedding_scale=True, tie_embeddings=False),
    "zeros, post-norm": lm(cross_attention="zeros", norm_first=False, activation="gelu_tanh"),
    "empty, post-norm, no bias": lm(cross_attention="empty", norm_first=False, bias=False),
}
PAIRS = {
    "seq2seq": pair(share_embeddings=True, embedding_scale=True),
    "post-norm": pair(norm_first=False, activation="relu", num_decoder_layers=4),
    "no bias": pair(bias=False, share_embeddings=True, tie_embeddings=False),
    "apart": pair(tie_embeddings=False, head_bias=True, activation="silu"),
    "sinusoidal": pair(positions="sinusoidal", embedding_scale=True, norm_first=False),
    "tied, head bias": pair(head_bias=True, share_embeddings=True, activation="gelu_tanh"),
}


@functools.cache
def _forward(spec):
    """Compiled, for a model that is asked several times."""
    model_def = definition(spec)

    def forward(params, tokens, inputs):
        model = model_def.merge(params)
        return model.logits(model.hidden(tokens, **inputs)[0])

    return jax.jit(forward)


def logits(spec, leaves, tokens, **inputs) -> np.ndarray:
    """Returns craft_jax's logits in float64; inputs by the names of its models' arguments."""
    with jax.enable_x64(True):
        params = {n: jax.numpy.asarray(t.read().astype(np.float64)) for n, t in leaves.items()}
        return np.asarray(_forward(spec)(params, tokens, inputs))


def greedy(spec, leaves, prompt, count, **inputs) -> list[int]:
    """Returns the greedy continuation of a prompt, by whole forwards."""
    text = list(prompt)
    for _ in range(count):
        row = np.array([[*text, *[0] * (spec.max_seq_len - len(text))]])
        text.append(int(logits(spec, leaves, row, **inputs)[0, len(text) - 1].argmax()))
    return text[len(prompt) :]


def ids(length=33, rows=2, seed=0) -> np.ndarray:
    found = np.random.default_rng(seed).integers(0, 97, (rows, length))
    found[0, 0], found[-1, -1] = 0, 96
    return found


def mask(*lengths, width=33) -> np.ndarray:
    return np.arange(width)[None] < np.array(lengths)[:, None]


def gap(a, b) -> float:
    """The largest difference, in units of max(1, |a|)."""
    b = b.detach().numpy() if isinstance(b, torch.Tensor) else b
    assert a.dtype == b.dtype == np.float64
    return float(np.max(np.abs(a - b) / np.maximum(1, np.abs(a))))


def lazies(arrays):
    return {name: lazy(array) for name, array in arrays.items()}


def weights(leaves):
    return {name: to_torch(leaf.read()) for name, leaf in leaves.items()}


def saved(folder, model, **more):
    """Writes a folder that `modeling_craft` reads, with random leaves, and returns it."""
    folder.mkdir()
    config = {
        "model_type": "craft",
        "craft_format": 1,
        "model": model.model_config(),
        "eos_token_id": 5,
        "tokenizer_vocab_size": 90,
    }
    (folder / "config.json").write_text(json.dumps(config | more))
    arrays = {name: leaf.read() for name, leaf in random_leaves(model).items()}
    data, header = b"", {}
    for name, array in arrays.items():
        end = len(data) + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [len(data), end]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + data
    (folder / "model.safetensors").write_bytes(content)
    return folder
