"""Models of the layers of `torch.nn`, parameter for parameter: a language model here, and in
`seq2seq` the whole encoder-decoder.

Tokens flow in, logits flow out. Shape letters: B batch, T query time, S key time, D model width,
H heads, K head width, F hidden, V vocabulary.
"""

import abc
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, final

import jax
import jax.numpy as jnp
from flax import nnx

from craft_jax.models.base import LanguageModel
from craft_jax.models.blocks import (
    MLP,
    Attention,
    Cached,
    CrossAttention,
    KVCache,
    check_packing,
    residual_std,
    split_keys,
)
from craft_jax.models.gpt import heads_divide
from craft_jax.models.layers import Embedding, Head, LayerNorm, Sinusoids, dropout, same_segment
from craft_jax.models.numerics import accum_dtype
from craft_jax.schema import (
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB,
    MAX_WIDTH,
    Contradiction,
    setting,
)

_MAX_SINES = 2**28


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig(abc.ABC):
    """The settings that models of these layers share."""

    name: str
    vocab_size: int | None = setting(
        None,
        "rows of each embedding; none for the tokenizer's size",
        minimum=1,
        maximum=MAX_VOCAB,
    )
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
        0.0,
        "probability of zeroing embeddings, attention, hidden units and residuals",
        minimum=0,
        below=1,
    )
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = setting(
        "gelu", "gelu (exact), gelu_tanh, relu or silu"
    )
    bias: bool = setting(True, "whether dense layers and layer norms have biases")
    norm_first: bool = setting(
        True, "layer norms before attention and MLP (pre-norm), or after the residual sum"
    )
    norm_eps: float = setting(1e-5, "epsilon of the layer norms", minimum=1e-20, maximum=1)
    positions: Literal["learned", "sinusoidal"] = setting(
        "learned", "learned, or sinusoidal: a table of sines that never trains"
    )
    embedding_scale: bool = setting(True, "whether embedded tokens are multiplied by sqrt(d_model)")
    tie_embeddings: bool = setting(True, "whether the head is the embedding of what it predicts")
    head_bias: bool = setting(False, "whether the head has a bias")

    def contradictions(self) -> Iterator[Contradiction]:
        yield from heads_divide(self)
        # The table of sines is computed on the host, before a memory check can see it.
        if self.positions == "sinusoidal" and self.max_seq_len * self.d_model > _MAX_SINES:
            yield Contradiction(
                ("model.positions", "model.max_seq_len", "model.d_model"),
                f"model.positions=sinusoidal with model.max_seq_len={self.max_seq_len} and "
                f"model.d_model={self.d_model} is a table of more than {_MAX_SINES} numbers; lower "
                "one of them, or use model.positions=learned",
            )

    @property
    def hidden_width(self) -> int:
        """The hidden width of the MLP."""
        return self.d_ff or 4 * self.d_model

    @property
    @abc.abstractmethod
    def norm_options(self) -> dict[str, Any]:
        """Arguments of the layer norms of the blocks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(StackConfig):
    """The architecture of a `TransformerLM`; the defaults are those of Craft's own model."""

    name: str = setting("transformer", "transformer")
    num_layers: int = setting(4, "blocks", minimum=1, maximum=MAX_LAYERS)
    norm_bias: bool | None = setting(
        None, "whether the layer norms of the blocks have biases; none for the same as bias"
    )
    final_norm: bool = setting(True, "whether a layer norm follows the last block")
    final_norm_bias: bool | None = setting(
        None, "whether that one has a bias; none for the same as those of the blocks"
    )
    cross_attention: Literal["none", "zeros", "empty"] = setting(
        "none",
        "none (layers of an encoder), or layers of a decoder whose memory is one zero vector "
        "(zeros) or nothing (empty)",
    )

    @property
    def norm_options(self) -> dict[str, Any]:
        use_bias = self.bias if self.norm_bias is None else self.norm_bias
        return {"use_bias": use_bias, "eps": self.norm_eps}

    @property
    def final_norm_options(self) -> dict[str, Any]:
        """Arguments of the layer norm after the last block."""
        if self.final_norm_bias is None:
            return self.norm_options
        return self.norm_options | {"use_bias": self.final_norm_bias}


class Memory(NamedTuple):
    """Keys and values for the cross-attention of one layer.

    Attributes:
      kv: k_BHSK and v_BHSK.
      visible_BTS: bool, T of which may be 1; None for everything.
    """

    kv: tuple[jax.Array, jax.Array]
    visible_BTS: jax.Array | None = None


class Block(nnx.Module):
    """`torch.nn.TransformerEncoderLayer`; with cross-attention, `TransformerDecoderLayer`.

    Args:
      config: sizes, and the position of the norms.
      has_cross: whether it has cross-attention.
      num_layers: blocks of the stack, for the initial values.
    """

    def __init__(self, config: StackConfig, *, has_cross: bool, num_layers: int, rngs: nnx.Rngs):
        d, rate = config.d_model, config.dropout
        out_std = residual_std((3 if has_cross else 2) * num_layers)
        dense = {"use_bias": config.bias, "dropout": rate, "out_std": out_std, "rngs": rngs}
        self.attn_norm = LayerNorm(d, **config.norm_options)
        self.attn = Attention(d, config.num_heads, **dense)
        self.cross_norm = LayerNorm(d, **config.norm_options) if has_cross else None
        self.cross = CrossAttention(d, config.num_heads, **dense) if has_cross else None
        self.mlp_norm = LayerNorm(d, **config.norm_options)
        self.mlp = MLP(d, config.hidden_width, activation=config.activation, **dense)
        self.norm_first, self.dropout = config.norm_first, rate

    def __call__(
        self,
        x_BTD: jax.Array,
        cached: Cached | None = None,
        key: jax.Array | None = None,
        visible_BTS: jax.Array | None = None,
        memory: Memory | None = None,
        segments_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Returns y_BTD and, if `cached` was given, its keys and values with these tokens added."""
        keys = split_keys(key, 6)
        y_BTD, kv = self.attn(
            self._before(self.attn_norm, x_BTD), cached, keys[0], visible_BTS, segments_BT
        )
        x_BTD = self._after(self.attn_norm, x_BTD, y_BTD, keys[1])
        if self.cross is not None:
            assert memory is not None
            y_BTD = self.cross(
                self._before(self.cross_norm, x_BTD), memory.kv, keys[2], memory.visible_BTS
            )
            x_BTD = self._after(self.cross_norm, x_BTD, y_BTD, keys[3])
        y_BTD = self.mlp(self._before(self.mlp_norm, x_BTD), keys[4])
        return self._after(self.mlp_norm, x_BTD, y_BTD, keys[5]), kv

    def _before(self, norm: LayerNorm, x_BTD: jax.Array) -> jax.Array:
        return norm(x_BTD) if self.norm_first else x_BTD

    def _after(
        self, norm: LayerNorm, x_BTD: jax.Array, y_BTD: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        x_BTD = x_BTD + dropout(y_BTD, self.dropout, key)
        return x_BTD if self.norm_first else norm(x_BTD)


def position_table(config: StackConfig, *, rngs: nnx.Rngs) -> Embedding | Sinusoids:
    """Returns the position table of a config."""
    if config.positions == "sinusoidal":
        return Sinusoids(config.max_seq_len, config.d_model)
    return Embedding(config.max_seq_len, config.d_model, rngs=rngs)


def embed(
    config: StackConfig,
    tokens_BT: jax.Array,
    table: Embedding,
    positions: Embedding | Sinusoids,
    first_B: jax.Array | None,
    key: jax.Array | None,
    positions_BT: jax.Array | None = None,
) -> jax.Array:
    """Returns x_BTD of tokens at `positions_BT` (int32; None: 0, 1, 2, ...).

    `first_B`, where given, is added to the positions.

    Raises:
      ValueError: more tokens than positions.
    """
    T = tokens_BT.shape[1]
    if config.max_seq_len < T:
        raise ValueError(f"{T} tokens exceed max_seq_len={config.max_seq_len}")
    if positions_BT is None:
        positions_BT = jnp.arange(T, dtype=jnp.int32)[None, :]
    if first_B is not None:
        positions_BT = positions_BT + first_B[:, None]
    x_BTD = table(tokens_BT)
    if config.embedding_scale:
        # The factor itself would be rounded to bfloat16: 55.43 becomes 55.5.
        accum = accum_dtype(x_BTD.dtype)
        x_BTD = (x_BTD.astype(accum) * math.sqrt(config.d_model)).astype(x_BTD.dtype)
    return dropout(x_BTD + positions(positions_BT), config.dropout, key)


def causal_and(mask_BT: jax.Array) -> jax.Array:
    """Returns visible_BTS: keys up to the query that are text (bool)."""
    T = mask_BT.shape[1]
    return jnp.tril(jnp.ones((T, T), bool))[None] & mask_BT[:, None, :]


@final
class TransformerLM(LanguageModel):
    """A causal language model of `torch.nn` layers: `TransformerConfig` says which."""

    Config = TransformerConfig

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        assert config.vocab_size is not None, "model.vocab_size comes from the tokenizer"
        self.config = config
        rows, d = config.vocab_size, config.d_model
        self.token_embedding = Embedding(rows, d, rngs=rngs)
        self.position_embedding = position_table(config, rngs=rngs)
        has_cross = config.cross_attention != "none"
        self.blocks = nnx.List(
            [
                Block(config, has_cross=has_cross, num_layers=config.num_layers, rngs=rngs)
                for _ in range(config.num_layers)
            ]
        )
        self.final_norm = LayerNorm(d, **config.final_norm_options) if config.final_norm else None
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
        mask_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        key: jax.Array | None = None,
        remat: bool = False,
    ) -> tuple[jax.Array, KVCache | None]:
        """See `LanguageModel.hidden`.

        Args:
          tokens_BT, cache, segments_BT, positions_BT, key, remat: as there.
          mask_BT: bool, false where a token is padding that no other attends to; None for all text.
            Without a cache only. With `segments_BT` a token attends to what both let it see.
        """
        config = self.config
        if mask_BT is not None and cache is not None:
            raise ValueError("a cache knows no padding: pass mask_BT without one")
        check_packing(cache, segments_BT, positions_BT)
        keys = split_keys(key if config.dropout else None, len(self.blocks) + 1)
        x_BTD = embed(
            config,
            tokens_BT,
            self.token_embedding,
            self.position_embedding,
            cache.length_B if cache else None,
            keys[-1],
            positions_BT,
        )
        visible_BTS = None if mask_BT is None else causal_and(mask_BT)
        if visible_BTS is not None and segments_BT is not None:
            visible_BTS = visible_BTS & same_segment(segments_BT)
            segments_BT = None
        memory_BSD = self._memory(x_BTD)
        kvs = []
        apply = nnx.remat(Block.__call__) if remat else Block.__call__
        for i, block in enumerate(self.blocks):
            memory = None
            if memory_BSD is not None:
                memory = Memory(block.cross.keys_and_values(memory_BSD))
            cached = cache.layer(i) if cache else None
            x_BTD, kv = apply(block, x_BTD, cached, keys[i], visible_BTS, memory, segments_BT)
            kvs.append(kv)
        if self.final_norm is not None:
            x_BTD = self.final_norm(x_BTD)
        if cache is None:
            return x_BTD, None
        new_keys, new_values = zip(*kvs, strict=True)
        return x_BTD, KVCache(new_keys, new_values, cache.length_B + tokens_BT.shape[1])

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        return self.head(x_BTD, self.token_embedding.embedding[...])

    def _memory(self, x_BTD: jax.Array) -> jax.Array | None:
        """Returns the memory of the cross-attention, zeros or empty as in Craft's own models."""
        lengths = {"none": None, "zeros": 1, "empty": 0}
        length = lengths[self.config.cross_attention]
        B, _, D = x_BTD.shape
        return None if length is None else jnp.zeros((B, length, D), x_BTD.dtype)
