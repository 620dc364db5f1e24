"""The models of the original PyTorch Craft, each generation under its own names. Needs torch."""

import functools
import math

import torch
from torch import nn

from interop.pytorch.stacks import (
    ACTIVATIONS,
    Model,
    Stack,
    future_mask,
    layer_options,
    make_decoder,
    make_embedding,
    make_encoder,
    make_final_norm,
    make_head,
    make_positions,
)

# Craft's lineages, oldest first; docs/interop.md says where each comes from.


class CraftBPositions(nn.Module):
    """Adds a table of positions: learned, or sines that the file holds in float32."""

    def __init__(self, model: Model):
        super().__init__()
        count, d = model["max_seq_len"], model["d_model"]
        self._is_sinusoidal = model["positions"] == "sinusoidal"
        if model["positions"] == "learned":
            self.position_embeddings = nn.Embedding(count, d)
            self.register_buffer("position_ids", torch.arange(count)[None])
        else:
            self.register_buffer("pe", _sinusoids(count, d)[None])

    def forward(self, T: int) -> torch.Tensor:
        """Returns the rows of the first T positions: (1, T, D)."""
        if self._is_sinusoidal:
            return self.pe[:, :T]
        return self.position_embeddings(self.position_ids[:, :T])


def _sinusoids(count: int, d: int) -> torch.Tensor:
    """The table (count, d) in the arithmetic of float32, in which these files were made."""
    rates = torch.exp(-math.log(10000.0) / d * torch.arange(0, d, 2, dtype=torch.float32))
    angles = torch.arange(count, dtype=torch.float32)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :d]


class CraftB(Stack):
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
        self.embedding = make_embedding(model)
        self.positional_encoding = CraftBPositions(model)
        self.transformer_encoder = make_encoder(model)
        self.decoder = make_head(model, self.embedding)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns logits_BTV."""
        x_BTD = self.embedding(tokens) * self._scale + self.positional_encoding(tokens.shape[1])
        x_BTD = self.transformer_encoder(self.dropout(x_BTD), mask=future_mask(x_BTD))
        return self.decoder(x_BTD)


class CraftC(Stack):
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
        self.token_embedding, self.position_embedding = make_embedding(model), make_positions(model)
        self.transformer_decoder = make_decoder(model)
        self.output_layer = make_head(model, self.token_embedding)
        self._memory_length = 0 if model["cross_attention"] == "empty" else 1

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns logits_BTV."""
        x_BTD = self.embed(tokens, self.token_embedding, self.position_embedding)
        memory = x_BTD.new_zeros(len(x_BTD), self._memory_length, x_BTD.shape[-1])
        return self.output_layer(
            self.transformer_decoder(x_BTD, memory, tgt_mask=future_mask(x_BTD))
        )


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
            self.causal_mask = zeros.masked_fill(future_mask(x_BTD), -math.inf)
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
        self.activation = ACTIVATIONS[model["activation"]]
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


class CraftD(Stack):
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
        self.token_embedding, self.position_embedding = make_embedding(model), make_positions(model)
        self.layers = nn.ModuleList(CraftDLayer(model) for _ in range(model["num_layers"]))
        norm, head = self.names
        self.add_module(norm, make_final_norm(model))
        self.add_module(head, make_head(model, self.token_embedding))

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


class CraftE(Stack):
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
        self.token_embedding, self.position_embedding = make_embedding(model), make_positions(model)
        self.transformer_layers = nn.ModuleList(
            nn.TransformerEncoderLayer(**layer_options(model)) for _ in range(model["num_layers"])
        )
        self.layer_norm = make_final_norm(model)
        self.output_head = make_head(model, self.token_embedding)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns logits_BTV."""
        x_BTD = self.embed(tokens, self.token_embedding, self.position_embedding)
        for layer in self.transformer_layers:
            x_BTD = layer(x_BTD, src_mask=future_mask(x_BTD))
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
