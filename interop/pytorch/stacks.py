"""Models built of `torch.nn`'s own layers, under the names of their state dicts.

`verify` loads a file into one of these and computes with it. Tokens flow in, logits of every
position flow out; all are causal.

Shape letters: B batch, T query time, S source time, D model width, H heads, K head width, F hidden,
V vocabulary.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Model = Mapping[str, Any]
"""The fields of a `ModelSpec`."""

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class Stack(nn.Module):
    """Shared by all kinds: takes embedded tokens, and computes as training does.

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


def layer_options(model: Model) -> dict[str, Any]:
    """Arguments of every layer of `torch.nn`."""
    return {
        "d_model": model["d_model"],
        "nhead": model["num_heads"],
        "dim_feedforward": model["d_ff"],
        "dropout": model["dropout"],
        "activation": ACTIVATIONS[model["activation"]],
        "layer_norm_eps": model["norm_eps"],
        "batch_first": True,
        "norm_first": model["norm_first"],
        "bias": model["bias"],
    }


def make_encoder(model: Model) -> nn.TransformerEncoder:
    """Returns an encoder with the layers of a model."""
    layer = nn.TransformerEncoderLayer(**layer_options(model))
    count = model["num_layers"]
    return nn.TransformerEncoder(layer, count, make_final_norm(model), enable_nested_tensor=False)


def make_decoder(model: Model) -> nn.TransformerDecoder:
    """Returns a decoder with the layers of a model."""
    layer = nn.TransformerDecoderLayer(**layer_options(model))
    count = model["num_decoder_layers"] or model["num_layers"]
    return nn.TransformerDecoder(layer, count, make_final_norm(model))


def make_final_norm(model: Model) -> nn.LayerNorm | None:
    """Returns the layer norm after the last layer, or None."""
    if not model["final_norm"]:
        return None
    bias = model["final_norm_bias"]
    return nn.LayerNorm(model["d_model"], eps=model["norm_eps"], bias=bias)


def make_embedding(model: Model) -> nn.Embedding:
    """Returns the embedding of tokens."""
    return nn.Embedding(model["vocab_size"], model["d_model"])


def make_positions(model: Model) -> nn.Embedding:
    """Returns the embedding of positions; a fixed table has no gradient."""
    table = nn.Embedding(model["max_seq_len"], model["d_model"])
    table.weight.requires_grad_(model["positions"] == "learned")
    return table


def make_head(model: Model, tied: nn.Embedding) -> nn.Linear:
    """Returns the head; `tied` gives it its weight where the model ties them."""
    head = nn.Linear(model["d_model"], model["vocab_size"], bias=model["head_bias"])
    if model["tie_embeddings"]:
        head.weight = tied.weight
    return head


def future_mask(x_BTD: torch.Tensor) -> torch.Tensor:
    """Returns a mask (T, T), true where a query must not look."""
    T = x_BTD.shape[1]
    return torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).triu(1)


def padding_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Returns what `torch.nn` wants to know of a mask that is true for text."""
    return None if mask is None else ~mask


# Stacks of torch.nn.


class TorchEncoder(Stack):
    """`nn.TransformerEncoder` with a causal mask."""

    fixed = {"num_decoder_layers": 0, "cross_attention": "none"}

    def __init__(self, model: Model):
        super().__init__(model)
        self.token_embedding, self.position_embedding = make_embedding(model), make_positions(model)
        self.encoder = make_encoder(model)
        self.head = make_head(model, self.token_embedding)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Returns logits_BTV; `mask` (B, T) is false for padding."""
        x_BTD = self.embed(tokens, self.token_embedding, self.position_embedding)
        x_BTD = self.encoder(
            x_BTD, mask=future_mask(x_BTD), src_key_padding_mask=padding_mask(mask)
        )
        return self.head(x_BTD)


class TorchDecoder(Stack):
    """`nn.TransformerDecoder` whose memory is one vector of zeros, or nothing.

    A model without cross-attention has it in the file, as zeros.
    """

    fixed = {"num_decoder_layers": 0}

    def __init__(self, model: Model):
        super().__init__(model)
        self.token_embedding, self.position_embedding = make_embedding(model), make_positions(model)
        self.decoder = make_decoder(model)
        self.head = make_head(model, self.token_embedding)
        self._memory_length = 0 if model["cross_attention"] == "empty" else 1
        if model["cross_attention"] == "none" and not model["norm_first"]:
            raise ValueError("a decoder with norms after the sums has one more norm in each block")

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Returns logits_BTV; `mask` (B, T) is false for padding."""
        x_BTD = self.embed(tokens, self.token_embedding, self.position_embedding)
        memory = x_BTD.new_zeros(len(x_BTD), self._memory_length, x_BTD.shape[-1])
        padding = padding_mask(mask)
        x_BTD = self.decoder(
            x_BTD, memory, tgt_mask=future_mask(x_BTD), tgt_key_padding_mask=padding
        )
        return self.head(x_BTD)


class TorchTransformer(Stack):
    """`nn.Transformer`: a source and the target so far in, logits of the target out."""

    fixed = {"cross_attention": "source", "final_norm": True}

    def __init__(self, model: Model):
        super().__init__(model)
        self.source_embedding, self.target_embedding = make_embedding(model), make_embedding(model)
        if model["share_embeddings"]:
            self.source_embedding.weight = self.target_embedding.weight
        self.source_positions, self.target_positions = make_positions(model), make_positions(model)
        self.transformer = nn.Transformer(
            custom_encoder=make_encoder(model), custom_decoder=make_decoder(model),
            d_model=model["d_model"], nhead=model["num_heads"], batch_first=True,
        )  # fmt: skip
        self.head = make_head(model, self.target_embedding)

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
            tgt_mask=future_mask(x_BTD),
            src_key_padding_mask=padding_mask(source_mask),
            tgt_key_padding_mask=padding_mask(mask),
            memory_key_padding_mask=padding_mask(source_mask),
        )
        return self.head(x_BTD)
