"""Models built of `torch.nn`'s own layers, and Craft's lineages, under the names of their files.

`verify` loads a file into one of these and computes with it. Tokens flow in, logits of every
position flow out; all are causal.

Shape letters: B batch, T query time, S source time, D model width, H heads, K head width, F hidden,
V vocabulary.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Model = Mapping[str, Any]
"""The fields of a `ModelSpec`."""

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def build(kind: str, model: Model) -> nn.Module:
    """Returns a module with the tensors and the arithmetic of a kind, freshly initialised.

    Args:
      kind: one of `KINDS`.
      model: the fields of a `ModelSpec`.

    Raises:
      ValueError: no module of this kind can be such a model.
    """
    model = dict(model)
    for field, same in (("norm_bias", "bias"), ("final_norm_bias", "norm_bias")):
        if model[field] is None:
            model[field] = model[same]
    for field, value in ({"norm_bias": model["bias"]} | KINDS[kind].fixed).items():
        if model[field] != value:
            raise ValueError(f"{kind} has {field}={value!r}, not {model[field]!r}")
    return KINDS[kind](model)


class _Stack(nn.Module):
    """What all kinds share: embedded tokens in, and the arithmetic of training all the way.

    Without gradients, `torch.nn` may replace a whole layer by one kernel that rounds otherwise and
    calls no submodule; that is switched off here.

    Attributes:
      fixed: fields of the model in which a kind has no choice, beside `norm_bias`, which is `bias`
        unless it says otherwise.
    """

    fixed: Mapping[str, Any] = {}

    def __init__(self, model: Model):
        super().__init__()
        self.dropout = nn.Dropout(model["dropout"])
        self._scale = math.sqrt(model["d_model"]) if model["embedding_scale"] else 1.0

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with _without_fast_path():
            return super().__call__(*args, **kwargs)

    def embed(
        self, tokens_BT: torch.Tensor, table: nn.Embedding, positions: nn.Embedding
    ) -> torch.Tensor:
        """Returns x_BTD."""
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        return self.dropout(table(tokens_BT) * self._scale + positions(positions_T))


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def _layer_options(model: Model) -> dict[str, Any]:
    """What every layer of `torch.nn` is built with."""
    return {
        "d_model": model["d_model"],
        "nhead": model["num_heads"],
        "dim_feedforward": model["d_ff"],
        "dropout": model["dropout"],
        "activation": _ACTIVATIONS[model["activation"]],
        "layer_norm_eps": model["norm_eps"],
        "batch_first": True,
        "norm_first": model["norm_first"],
        "bias": model["bias"],
    }


def _encoder(model: Model) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(**_layer_options(model))
    count = model["num_layers"]
    return nn.TransformerEncoder(layer, count, _final_norm(model), enable_nested_tensor=False)


def _decoder(model: Model) -> nn.TransformerDecoder:
    layer = nn.TransformerDecoderLayer(**_layer_options(model))
    count = model["num_decoder_layers"] or model["num_layers"]
    return nn.TransformerDecoder(layer, count, _final_norm(model))


def _final_norm(model: Model) -> nn.LayerNorm | None:
    if not model["final_norm"]:
        return None
    bias = model["final_norm_bias"]
    return nn.LayerNorm(model["d_model"], eps=model["norm_eps"], bias=bias)


def _tokens(model: Model) -> nn.Embedding:
    return nn.Embedding(model["vocab_size"], model["d_model"])


def _positions(model: Model) -> nn.Embedding:
    table = nn.Embedding(model["max_seq_len"], model["d_model"])
    table.weight.requires_grad_(model["positions"] == "learned")
    return table


def _head(model: Model, tied: nn.Embedding) -> nn.Linear:
    head = nn.Linear(model["d_model"], model["vocab_size"], bias=model["head_bias"])
    if model["tie_embeddings"]:
        head.weight = tied.weight
    return head


def _future(x_BTD: torch.Tensor) -> torch.Tensor:
    """Returns a mask (T, T), true where a query must not look."""
    T = x_BTD.shape[1]
    return torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).triu(1)


def _padding(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Returns what `torch.nn` wants to know of a mask that is true for text."""
    return None if mask is None else ~mask


# Stacks of torch.nn.


class TorchEncoder(_Stack):
    """`nn.TransformerEncoder` with a causal mask."""

    fixed = {"num_decoder_layers": 0, "cross_attention": "none"}

    def __init__(self, model: Model):
        super().__init__(model)
        self.token_embedding, self.position_embedding = _tokens(model), _positions(model)
        self.encoder = _encoder(model)
        self.head = _head(model, self.token_embedding)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Returns logits_BTV; `mask` (B, T) is false for padding."""
        x_BTD = self.embed(tokens, self.token_embedding, self.position_embedding)
        x_BTD = self.encoder(x_BTD, mask=_future(x_BTD), src_key_padding_mask=_padding(mask))
        return self.head(x_BTD)


class TorchDecoder(_Stack):
    """`nn.TransformerDecoder` whose memory is one vector of zeros, or nothing.

    A model without cross-attention has it in the file, as zeros.
    """

    fixed = {"num_decoder_layers": 0}

    def __init__(self, model: Model):
        super().__init__(model)
        self.token_embedding, self.position_embedding = _tokens(model), _positions(model)
        self.decoder = _decoder(model)
        self.head = _head(model, self.token_embedding)
        self._memory_length = 0 if model["cross_attention"] == "empty" else 1
        if model["cross_attention"] == "none" and not model["norm_first"]:
            raise ValueError("a decoder with norms after the sums has one more norm in each block")

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Returns logits_BTV; `mask` (B, T) is false for padding."""
        x_BTD = self.embed(tokens, self.token_embedding, self.position_embedding)
        memory = x_BTD.new_zeros(len(x_BTD), self._memory_length, x_BTD.shape[-1])
        padding = _padding(mask)
        x_BTD = self.decoder(x_BTD, memory, tgt_mask=_future(x_BTD), tgt_key_padding_mask=padding)
        return self.head(x_BTD)


class TorchTransformer(_Stack):
    """`nn.Transformer`: a source and the target so far in, logits of the target out."""

    fixed = {"cross_attention": "source", "final_norm": True}

    def __init__(self, model: Model):
        super().__init__(model)
        self.source_embedding, self.target_embedding = _tokens(model), _tokens(model)
        if model["share_embeddings"]:
            self.source_embedding.weight = self.target_embedding.weight
        self.source_positions, self.target_positions = _positions(model), _positions(model)
        self.transformer = nn.Transformer(
            custom_encoder=_encoder(model), custom_decoder=_decoder(model),
            d_model=model["d_model"], nhead=model["num_heads"], batch_first=True,
        )  # fmt: skip
        self.head = _head(model, self.target_embedding)

    def forward(
        self,
        tokens: torch.Tensor,
        source: torch.Tensor,
        source_mask: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns logits_BTV of tokens (B, T) and a source (B, S); masks are false for padding."""
        source_BSD = self.embed(source, self.source_embedding, self.source_positions)
        x_BTD = self.embed(tokens, self.target_embedding, self.target_positions)
        x_BTD = self.transformer(
            source_BSD,
            x_BTD,
            tgt_mask=_future(x_BTD),
            src_key_padding_mask=_padding(source_mask),
            tgt_key_padding_mask=_padding(mask),
            memory_key_padding_mask=_padding(source_mask),
        )
        return self.head(x_BTD)


# Craft's lineages, oldest first; docs/interop.md says where each comes from.


class CraftBPositions(nn.Module):
    """Adds a table of positions: learned, or sines that the file holds in float32."""

    def __init__(self, model: Model):
        super().__init__()
        count, d = model["max_seq_len"], model["d_model"]
        if model["positions"] == "learned":
            self.position_embeddings = nn.Embedding(count, d)
            self.register_buffer("position_ids", torch.arange(count)[None])
        else:
            self.register_buffer("pe", _sinusoids(count, d)[None])

    def forward(self, T: int) -> torch.Tensor:
        """Returns the rows of the first T positions: (1, T, D)."""
        if hasattr(self, "pe"):
            return self.pe[:, :T]
        return self.position_embeddings(self.position_ids[:, :T])


def _sinusoids(count: int, d: int) -> torch.Tensor:
    """The table (count, d) in the arithmetic of float32, in which these files were made."""
    rates = torch.exp(-math.log(10000.0) / d * torch.arange(0, d, 2, dtype=torch.float32))
    angles = torch.arange(count, dtype=torch.float32)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :d]


class CraftB(_Stack):
    """An encoder with scaled embeddings and a head of its own with a bias."""

    fixed = {
        "num_decoder_layers": 0,
        "activation": "gelu",
        "bias": True,
        "norm_first": True,
        "final_norm": True,
        "final_norm_bias": True,
        "embedding_scale": True,
        "cross_attention": "none",
        "tie_embeddings": False,
        "head_bias": True,
    }

    def __init__(self, model: Model):
        super().__init__(model)
        self.embedding = _tokens(model)
        self.positional_encoding = CraftBPositions(model)
        self.transformer_encoder = _encoder(model)
        self.decoder = _head(model, self.embedding)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns logits_BTV."""
        x_BTD = self.embedding(tokens) * self._scale + self.positional_encoding(tokens.shape[1])
        x_BTD = self.transformer_encoder(self.dropout(x_BTD), mask=_future(x_BTD))
        return self.decoder(x_BTD)


class CraftC(_Stack):
    """A decoder whose memory is one vector of zeros."""

    fixed = {
        "num_decoder_layers": 0,
        "norm_first": True,
        "final_norm": True,
        "final_norm_bias": True,
        "positions": "learned",
        "embedding_scale": False,
        "cross_attention": "zeros",
        "tie_embeddings": False,
    }

    def __init__(self, model: Model):
        super().__init__(model)
        self.token_embedding, self.position_embedding = _tokens(model), _positions(model)
        self.transformer_decoder = _decoder(model)
        self.output_layer = _head(model, self.token_embedding)
        self._memory_length = 0 if model["cross_attention"] == "empty" else 1

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns logits_BTV."""
        x_BTD = self.embed(tokens, self.token_embedding, self.position_embedding)
        memory = x_BTD.new_zeros(len(x_BTD), self._memory_length, x_BTD.shape[-1])
        return self.output_layer(self.transformer_decoder(x_BTD, memory, tgt_mask=_future(x_BTD)))


class CraftDAttention(nn.Module):
    """Causal attention that keeps its mask, and so has one more tensor once it has run."""

    def __init__(self, model: Model):
        super().__init__()
        dense = functools.partial(nn.Linear, model["d_model"], bias=model["bias"])
        self.query, self.key, self.value, self.out_proj = (dense(model["d_model"]) for _ in "qkvo")
        self.num_heads, self.dropout = model["num_heads"], nn.Dropout(model["dropout"])
        self.register_buffer("causal_mask", None)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        B, T, D = x_BTD.shape
        q_BHTK, k_BHTK, v_BHTK = (
            part(x_BTD).reshape(B, T, self.num_heads, -1).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        if self.causal_mask is None or len(self.causal_mask) < T:
            zeros = torch.zeros(T, T, device=x_BTD.device)
            self.causal_mask = zeros.masked_fill(_future(x_BTD), -math.inf)
        scores_BHTT = q_BHTK @ k_BHTK.transpose(-1, -2) / math.sqrt(q_BHTK.shape[-1])
        probs_BHTT = torch.softmax(scores_BHTT + self.causal_mask[:T, :T], dim=-1)
        y_BHTK = self.dropout(probs_BHTT) @ v_BHTK
        return self.dropout(self.out_proj(y_BHTK.transpose(1, 2).reshape(B, T, D)))


class CraftDMLP(nn.Module):
    """Two dense layers with an activation between them."""

    def __init__(self, model: Model):
        super().__init__()
        self.fc1 = nn.Linear(model["d_model"], model["d_ff"], bias=model["bias"])
        self.fc2 = nn.Linear(model["d_ff"], model["d_model"], bias=model["bias"])
        self.activation = _ACTIVATIONS[model["activation"]]
        self.dropout = nn.Dropout(model["dropout"])

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.fc2(self.dropout(self.activation(self.fc1(x_BTD)))))


class CraftDLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, model: Model):
        super().__init__()
        self.self_attn, self.ff = CraftDAttention(model), CraftDMLP(model)
        self.norm1, self.norm2 = (
            nn.LayerNorm(model["d_model"], eps=model["norm_eps"]) for _ in range(2)
        )

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self.self_attn(self.norm1(x_BTD))
        return x_BTD + self.ff(self.norm2(x_BTD))


class CraftD(_Stack):
    """Craft's GPT: dense layers apart, and a head of its own with a bias.

    Attributes:
      names: of the last layer norm and of the head.
    """

    names = ("ln_f", "out_proj")

    fixed = {
        "num_decoder_layers": 0,
        "norm_bias": True,
        "norm_first": True,
        "final_norm": True,
        "final_norm_bias": True,
        "positions": "learned",
        "embedding_scale": False,
        "cross_attention": "none",
        "tie_embeddings": False,
    }

    def __init__(self, model: Model):
        super().__init__(model)
        self.token_embedding, self.position_embedding = _tokens(model), _positions(model)
        self.layers = nn.ModuleList(CraftDLayer(model) for _ in range(model["num_layers"]))
        norm, head = self.names
        self.add_module(norm, _final_norm(model))
        self.add_module(head, _head(model, self.token_embedding))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns logits_BTV."""
        x_BTD = self.embed(tokens, self.token_embedding, self.position_embedding)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        norm, head = (self.get_submodule(name) for name in self.names)
        return head(norm(x_BTD))


class CraftD0(CraftD):
    """The same under the names of Craft's first weeks."""

    names = ("norm", "output_layer")


class CraftE(_Stack):
    """Layers of an encoder with scaled embeddings, which the head shares."""

    fixed = {
        "num_decoder_layers": 0,
        "final_norm": True,
        "positions": "learned",
        "embedding_scale": True,
        "cross_attention": "none",
        "tie_embeddings": True,
        "head_bias": False,
    }

    def __init__(self, model: Model):
        super().__init__(model)
        self.token_embedding, self.position_embedding = _tokens(model), _positions(model)
        self.transformer_layers = nn.ModuleList(
            nn.TransformerEncoderLayer(**_layer_options(model)) for _ in range(model["num_layers"])
        )
        self.layer_norm = _final_norm(model)
        self.output_head = _head(model, self.token_embedding)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns logits_BTV."""
        x_BTD = self.embed(tokens, self.token_embedding, self.position_embedding)
        for layer in self.transformer_layers:
            x_BTD = layer(x_BTD, src_mask=_future(x_BTD))
        return self.output_head(self.layer_norm(x_BTD))


class CraftF(CraftC):
    """C with scaled embeddings and a memory of length 0."""

    fixed = {
        "num_decoder_layers": 0,
        "final_norm": True,
        "final_norm_bias": True,
        "positions": "learned",
        "embedding_scale": True,
        "cross_attention": "empty",
        "tie_embeddings": False,
        "head_bias": False,
    }


KINDS: dict[str, type[_Stack]] = {
    "torch-encoder": TorchEncoder,
    "torch-decoder": TorchDecoder,
    "torch-transformer": TorchTransformer,
    "craft-b": CraftB,
    "craft-c": CraftC,
    "craft-d": CraftD,
    "craft-d0": CraftD0,
    "craft-e": CraftE,
    "craft-f": CraftF,
}
"""What `build` makes."""
