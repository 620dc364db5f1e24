"""nanoGPT's architecture under nanoGPT's names, for reading its checkpoints independently of them.

`verify` runs this, since nanoGPT's own code is no package that could be depended on. Tokens flow
in, logits of every position flow out.

Shape letters: B batch, T time, D model width, H heads, K head width, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_EPS = 1e-5


class LayerNorm(nn.Module):
    """Layer normalisation whose bias may be absent."""

    def __init__(self, d: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, _EPS)


class Attention(nn.Module):
    """Causal attention; query, key and value are three blocks of rows of one matrix."""

    def __init__(self, d: int, num_heads: int, bias: bool):
        super().__init__()
        self.c_attn = nn.Linear(d, 3 * d, bias=bias)
        self.c_proj = nn.Linear(d, d, bias=bias)
        self.num_heads = num_heads

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        B, T, D = x_BTD.shape
        q_BHTK, k_BHTK, v_BHTK = (
            part.reshape(B, T, self.num_heads, -1).transpose(1, 2)
            for part in self.c_attn(x_BTD).split(D, dim=-1)
        )
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        return self.c_proj(y_BHTK.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Two dense layers with the exact GELU between them."""

    def __init__(self, d: int, bias: bool):
        super().__init__()
        self.c_fc = nn.Linear(d, 4 * d, bias=bias)
        self.c_proj = nn.Linear(4 * d, d, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, d: int, num_heads: int, bias: bool):
        super().__init__()
        self.ln_1, self.attn = LayerNorm(d, bias), Attention(d, num_heads, bias)
        self.ln_2, self.mlp = LayerNorm(d, bias), MLP(d, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """The model.

    Args:
      model_args: as a checkpoint holds them; `dropout` means nothing here.
    """

    def __init__(self, model_args: Mapping[str, Any]):
        super().__init__()
        d, bias = model_args["n_embd"], model_args["bias"]
        blocks = [Block(d, model_args["n_head"], bias) for _ in range(model_args["n_layer"])]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(model_args["vocab_size"], d),
                "wpe": nn.Embedding(model_args["block_size"], d),
                "h": nn.ModuleList(blocks),
                "ln_f": LayerNorm(d, bias),
            }
        )
        self.lm_head = nn.Linear(d, model_args["vocab_size"], bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Returns logits_BTV."""
        parts = self.transformer
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = parts["wte"](tokens_BT) + parts["wpe"](positions_T)
        for block in parts["h"]:
            x_BTD = block(x_BTD)
        return self.lm_head(parts["ln_f"](x_BTD))
