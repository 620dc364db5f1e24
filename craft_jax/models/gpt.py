"""GPT: a decoder of pre-norm blocks with learned positions (Radford et al. 2019, "GPT-2").

Tokens flow in, logits flow out. Shape letters: B batch, T query time, S key time, D model width,
H heads, K head width, F hidden, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, final

import jax
import jax.numpy as jnp
from flax import nnx

from craft_jax.models.base import LanguageModel
from craft_jax.models.blocks import (
    MLP,
    Attention,
    Cached,
    KVCache,
    check_packing,
    residual_std,
    split_keys,
)
from craft_jax.models.layers import Embedding, Head, LayerNorm, dropout
from craft_jax.schema import (
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB,
    MAX_WIDTH,
    Contradiction,
    setting,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The architecture of a GPT."""

    name: str = setting(
        "gpt", "gpt, transformer, seq2seq, or a model class of your own, path/file.py:Class"
    )
    vocab_size: int | None = setting(
        None,
        "rows of the token embedding; none for the tokenizer's size",
        minimum=1,
        maximum=MAX_VOCAB,
    )
    num_layers: int = setting(4, "blocks", minimum=1, maximum=MAX_LAYERS)
    num_heads: int = setting(
        4, "attention heads; must divide d_model", minimum=1, maximum=MAX_WIDTH
    )
    d_model: int = setting(128, "width of the residual stream", minimum=1, maximum=MAX_WIDTH)
    d_ff: int | None = setting(
        None, "hidden width of the MLP; none for 4 * d_model", minimum=1, maximum=4 * MAX_WIDTH
    )
    max_seq_len: int = setting(
        128, "positions, that is the longest context in tokens", minimum=1, maximum=MAX_POSITIONS
    )
    dropout: float = setting(
        0.0, "probability of zeroing embeddings, attention and residuals", minimum=0, below=1
    )
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = setting(
        "gelu", "gelu (exact), gelu_tanh, relu or silu"
    )
    bias: bool = setting(True, "whether dense layers and layer norms have biases")
    norm_bias: bool | None = setting(
        None, "whether layer norms have biases; none for the same as bias"
    )
    tie_embeddings: bool = setting(True, "whether the head is the token embedding")
    head_bias: bool = setting(False, "whether the head has a bias")
    norm_eps: float = setting(1e-5, "epsilon of the layer norms", minimum=1e-20, maximum=1)

    def contradictions(self) -> Iterator[Contradiction]:
        yield from heads_divide(self)

    @property
    def hidden_width(self) -> int:
        """The hidden width of the MLP."""
        return self.d_ff or 4 * self.d_model

    @property
    def norm_options(self) -> dict[str, Any]:
        """Arguments of every layer norm."""
        use_bias = self.bias if self.norm_bias is None else self.norm_bias
        return {"use_bias": use_bias, "eps": self.norm_eps}


def heads_divide(config: Any) -> Iterator[Contradiction]:
    """Yields a contradiction where `num_heads` does not divide `d_model`."""
    if config.d_model % config.num_heads:
        divisors = [n for n in range(1, config.d_model + 1) if config.d_model % n == 0]
        below = max(n for n in divisors if n <= config.num_heads)
        near = [str(below), *(str(n) for n in divisors if n > config.num_heads)][:2]
        yield Contradiction(
            ("model.num_heads", "model.d_model"),
            f"model.num_heads={config.num_heads} does not divide model.d_model={config.d_model}; "
            f"try {' or '.join(near)}",
        )


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        d, out_std = config.d_model, residual_std(2 * config.num_layers)
        dense = {"use_bias": config.bias, "out_std": out_std, "rngs": rngs}
        self.attn_norm = LayerNorm(d, **config.norm_options)
        self.attn = Attention(d, config.num_heads, dropout=config.dropout, **dense)
        self.mlp_norm = LayerNorm(d, **config.norm_options)
        self.mlp = MLP(d, config.hidden_width, activation=config.activation, **dense)
        self.dropout = config.dropout

    def __call__(
        self,
        x_BTD: jax.Array,
        cached: Cached | None = None,
        key: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        attn_key, residual_key, mlp_key = split_keys(key, 3)
        y_BTD, kv = self.attn(self.attn_norm(x_BTD), cached, attn_key, segments_BT=segments_BT)
        x_BTD = x_BTD + dropout(y_BTD, self.dropout, residual_key)
        y_BTD = self.mlp(self.mlp_norm(x_BTD))
        return x_BTD + dropout(y_BTD, self.dropout, mlp_key), kv


@final
class GPT(LanguageModel):
    """The GPT-2 family: `GPTConfig` says which."""

    Config = GPTConfig

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        assert config.vocab_size is not None, "model.vocab_size comes from the tokenizer"
        self.config = config
        rows, d = config.vocab_size, config.d_model
        self.token_embedding = Embedding(rows, d, rngs=rngs)
        self.position_embedding = Embedding(config.max_seq_len, d, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.final_norm = LayerNorm(d, **config.norm_options)
        is_tied = config.tie_embeddings
        self.head = Head(rows, d, is_tied=is_tied, use_bias=config.head_bias, rngs=rngs)

    def init_cache(self, batch_size: int, max_len: int, dtype: Any) -> KVCache:
        heads = self.config.num_heads
        shape = (batch_size, heads, max_len, self.config.d_model // heads)
        return KVCache.empty(self.config.num_layers, shape, dtype)

    def hidden(
        self,
        tokens_BT: jax.Array,
        cache: KVCache | None = None,
        *,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        key: jax.Array | None = None,
        remat: bool = False,
    ) -> tuple[jax.Array, KVCache | None]:
        T = tokens_BT.shape[1]
        if self.config.max_seq_len < T:
            raise ValueError(f"{T} tokens exceed max_seq_len={self.config.max_seq_len}")
        check_packing(cache, segments_BT, positions_BT)
        keys = split_keys(key if self.config.dropout else None, len(self.blocks) + 1)
        if positions_BT is None:
            positions_BT = jnp.arange(T, dtype=jnp.int32)[None, :]
        if cache is not None:
            positions_BT = positions_BT + cache.length_B[:, None]
        x_BTD = self.token_embedding(tokens_BT) + self.position_embedding(positions_BT)
        x_BTD = dropout(x_BTD, self.config.dropout, keys[-1])
        kvs = []
        apply = nnx.remat(Block.__call__) if remat else Block.__call__
        for i, block in enumerate(self.blocks):
            cached = cache.layer(i) if cache else None
            x_BTD, kv = apply(block, x_BTD, cached, keys[i], segments_BT)
            kvs.append(kv)
        x_BTD = self.final_norm(x_BTD)
        if cache is None:
            return x_BTD, None
        new_keys, new_values = zip(*kvs, strict=True)
        return x_BTD, KVCache(new_keys, new_values, cache.length_B + T)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        return self.head(x_BTD, self.token_embedding.embedding[...])
