"""GPT: a decoder of pre-norm blocks with learned positions (Radford et al. 2019, "GPT-2").

Tokens flow in, logits flow out. Shape letters: B batch, T query time, S key time, D model width,
H heads, K head width, F hidden, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, final

import jax
import jax.numpy as jnp
from flax import nnx

from craft_jax.models.base import LanguageModel
from craft_jax.models.layers import (
    ACTIVATIONS,
    Embedding,
    LayerNorm,
    Linear,
    causal_attention,
    dropout,
)
from craft_jax.schema import Contradiction, setting

_INIT_STD = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The architecture of a GPT."""

    name: str = setting("gpt", "gpt, or a model class of your own, path/file.py:Class")
    vocab_size: int | None = setting(
        None, "rows of the token embedding; none for the tokenizer's size", minimum=1
    )
    num_layers: int = setting(4, "blocks", minimum=1)
    num_heads: int = setting(4, "attention heads; must divide d_model", minimum=1)
    d_model: int = setting(128, "width of the residual stream", minimum=1)
    d_ff: int | None = setting(None, "hidden width of the MLP; none for 4 * d_model", minimum=1)
    max_seq_len: int = setting(128, "positions, that is the longest context in tokens", minimum=1)
    dropout: float = setting(
        0.0, "probability of zeroing embeddings, attention and residuals", minimum=0, below=1
    )
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = setting(
        "gelu", "gelu (exact), gelu_tanh, relu or silu"
    )
    bias: bool = setting(True, "whether dense layers and layer norms have biases")
    tie_embeddings: bool = setting(True, "whether the head is the token embedding")
    norm_eps: float = setting(1e-5, "epsilon of the layer norms", above=0)

    def contradictions(self) -> Iterator[Contradiction]:
        if self.d_model % self.num_heads:
            divisors = [n for n in range(1, self.d_model + 1) if self.d_model % n == 0]
            below = max(n for n in divisors if n <= self.num_heads)
            above = min((n for n in divisors if n > below), default=self.d_model)
            yield Contradiction(
                ("model.num_heads", "model.d_model"),
                f"model.num_heads={self.num_heads} does not divide model.d_model={self.d_model}; "
                f"try {below} or {above}",
            )

    @property
    def hidden_width(self) -> int:
        """The hidden width of the MLP."""
        return self.d_ff or 4 * self.d_model


class KVCache(NamedTuple):
    """Keys and values of the tokens so far.

    Attributes:
      keys: k_BSHK of each layer, zeros where nothing was written yet.
      values: v_BSHK of each layer.
      length_B: tokens in each row, int32; the next token stands at this position.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length_B: jax.Array


class Attention(nnx.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        d, bias = config.d_model, config.bias
        self.query = Linear(d, d, use_bias=bias, rngs=rngs)
        self.key = Linear(d, d, use_bias=bias, rngs=rngs)
        self.value = Linear(d, d, use_bias=bias, rngs=rngs)
        self.out = Linear(d, d, use_bias=bias, init_std=_residual_std(config), rngs=rngs)
        self.num_heads, self.dropout = config.num_heads, config.dropout

    def __call__(
        self,
        x_BTD: jax.Array,
        cached: tuple[jax.Array, jax.Array, jax.Array] | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Returns y_BTD and, if `cached` (k_BSHK, v_BSHK, length_B) was given, the new k and v."""
        B, T, D = x_BTD.shape
        heads = (B, T, self.num_heads, D // self.num_heads)
        q_BTHK, k_BTHK, v_BTHK = (
            dense(x_BTD).reshape(heads) for dense in (self.query, self.key, self.value)
        )
        if cached is None:
            y_BTHK = causal_attention(q_BTHK, k_BTHK, v_BTHK, dropout_rate=self.dropout, key=key)
            return self.out(y_BTHK.reshape(B, T, D)), None
        old_k_BSHK, old_v_BSHK, length_B = cached
        k_BSHK = _write(old_k_BSHK, k_BTHK, length_B)
        v_BSHK = _write(old_v_BSHK, v_BTHK, length_B)
        y_BTHK = causal_attention(q_BTHK, k_BSHK, v_BSHK, offset_B=length_B)
        return self.out(y_BTHK.reshape(B, T, D)), (k_BSHK, v_BSHK)


class MLP(nnx.Module):
    """Two dense layers with an activation between them."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        d, f, bias = config.d_model, config.hidden_width, config.bias
        self.up = Linear(d, f, use_bias=bias, rngs=rngs)
        self.down = Linear(f, d, use_bias=bias, init_std=_residual_std(config), rngs=rngs)
        self.activation = config.activation

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.up(x_BTD)))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        norm = {"use_bias": config.bias, "eps": config.norm_eps, "rngs": rngs}
        self.attn_norm = LayerNorm(config.d_model, **norm)
        self.attn = Attention(config, rngs=rngs)
        self.mlp_norm = LayerNorm(config.d_model, **norm)
        self.mlp = MLP(config, rngs=rngs)
        self.dropout = config.dropout

    def __call__(
        self,
        x_BTD: jax.Array,
        cached: tuple[jax.Array, jax.Array, jax.Array] | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        attn_key, residual_key, mlp_key = (None,) * 3 if key is None else jax.random.split(key, 3)
        y_BTD, kv = self.attn(self.attn_norm(x_BTD), cached, attn_key)
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
        self.token_embedding = Embedding(config.vocab_size, config.d_model, rngs=rngs)
        self.position_embedding = Embedding(config.max_seq_len, config.d_model, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.final_norm = LayerNorm(
            config.d_model, use_bias=config.bias, eps=config.norm_eps, rngs=rngs
        )
        self.head = (
            None
            if config.tie_embeddings
            else Embedding(config.vocab_size, config.d_model, rngs=rngs)
        )

    def init_cache(self, batch_size: int, max_len: int, dtype: Any) -> KVCache:
        config = self.config
        shape = (batch_size, max_len, config.num_heads, config.d_model // config.num_heads)
        layers = tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))
        return KVCache(layers, layers, jnp.zeros((batch_size,), jnp.int32))

    def hidden(
        self,
        tokens_BT: jax.Array,
        cache: KVCache | None = None,
        *,
        key: jax.Array | None = None,
        remat: bool = False,
    ) -> tuple[jax.Array, KVCache | None]:
        T = tokens_BT.shape[1]
        if self.config.max_seq_len < T:
            raise ValueError(f"{T} tokens exceed max_seq_len={self.config.max_seq_len}")
        keys = [None] * (len(self.blocks) + 1)
        if key is not None and self.config.dropout:
            keys = list(jax.random.split(key, len(keys)))
        position_BT = jnp.arange(T)[None, :]
        if cache is not None:
            position_BT = position_BT + cache.length_B[:, None]
        x_BTD = self.token_embedding(tokens_BT) + self.position_embedding(position_BT)
        x_BTD = dropout(x_BTD, self.config.dropout, keys[-1])
        kvs = []
        apply = nnx.remat(Block.__call__) if remat else Block.__call__
        for i, block in enumerate(self.blocks):
            cached = (cache.keys[i], cache.values[i], cache.length_B) if cache else None
            x_BTD, kv = apply(block, x_BTD, cached, keys[i])
            kvs.append(kv)
        x_BTD = self.final_norm(x_BTD)
        if cache is None:
            return x_BTD, None
        new_keys, new_values = zip(*kvs, strict=True)
        return x_BTD, KVCache(new_keys, new_values, cache.length_B + T)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        return (self.head or self.token_embedding).attend(x_BTD)


def _residual_std(config: GPTConfig) -> float:
    """GPT-2 scales what adds to the residual stream by 1/sqrt(its number of summands)."""
    return _INIT_STD / math.sqrt(2 * config.num_layers)


def _write(cache_BSHK: jax.Array, new_BTHK: jax.Array, start_B: jax.Array) -> jax.Array:
    """Puts T new positions into each row of a cache, from `start_B` on."""

    def write_row(cache_SHK, new_THK, start):
        return jax.lax.dynamic_update_slice(
            cache_SHK, new_THK.astype(cache_SHK.dtype), (start, 0, 0)
        )

    return jax.vmap(write_row)(cache_BSHK, new_BTHK, start_B)
