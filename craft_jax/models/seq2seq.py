"""Transformer: encoder and decoder, parameter for parameter `torch.nn.Transformer` (Vaswani et al.
2017, arXiv:1706.03762), with embeddings and a head.

A source and the target so far flow in, logits of the target's next tokens flow out. Shape letters:
B batch, T target time, S source time, D model width, H heads, K head width, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
from flax import nnx

from craft_jax.models import losses
from craft_jax.models.base import EncoderDecoderModel
from craft_jax.models.blocks import Cached, KVCache, split_keys
from craft_jax.models.layers import Embedding, Head, LayerNorm
from craft_jax.models.losses import PLAIN, LossConfig, PairSums
from craft_jax.models.transformer import (
    Block,
    Memory,
    StackConfig,
    causal_and,
    embed,
    position_table,
)
from craft_jax.schema import MAX_LAYERS, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig(StackConfig):
    """The architecture of a `Transformer`."""

    name: str = setting("seq2seq", "seq2seq")
    num_layers: int = setting(2, "blocks of the encoder", minimum=1, maximum=MAX_LAYERS)
    num_decoder_layers: int = setting(2, "blocks of the decoder", minimum=1, maximum=MAX_LAYERS)
    share_embeddings: bool = setting(True, "whether source and target have one token embedding")

    @property
    def norm_options(self) -> dict[str, Any]:
        return {"use_bias": self.bias, "eps": self.norm_eps}


class PairCache(NamedTuple):
    """A source, and the keys and values of the target so far.

    Attributes:
      keys, values, length_B: of the decoder's self-attention, as in `KVCache`.
      source_keys, source_values: k_BHSK and v_BHSK of each layer's cross-attention.
      source_mask_BS: bool, which source tokens are text.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length_B: jax.Array
    source_keys: tuple[jax.Array, ...]
    source_values: tuple[jax.Array, ...]
    source_mask_BS: jax.Array

    def layer(self, i: int) -> Cached:
        """Returns what the self-attention of layer i reads."""
        return self.keys[i], self.values[i], self.length_B


@final
class Transformer(EncoderDecoderModel):
    """Reads a source, writes a target: `Seq2SeqConfig` says how."""

    Config = Seq2SeqConfig
    takes_loss_config = True

    def __init__(self, config: Seq2SeqConfig, *, rngs: nnx.Rngs):
        assert config.vocab_size is not None, "model.vocab_size comes from the tokenizer"
        self.config = config
        rows, d = config.vocab_size, config.d_model
        self.target_embedding = Embedding(rows, d, rngs=rngs)
        self.source_embedding = None if config.share_embeddings else Embedding(rows, d, rngs=rngs)
        self.source_positions = position_table(config, rngs=rngs)
        self.target_positions = position_table(config, rngs=rngs)
        self.encoder = nnx.List(
            [
                Block(config, has_cross=False, num_layers=config.num_layers, rngs=rngs)
                for _ in range(config.num_layers)
            ]
        )
        self.encoder_norm = LayerNorm(d, **config.norm_options)
        self.decoder = nnx.List(
            [
                Block(config, has_cross=True, num_layers=config.num_decoder_layers, rngs=rngs)
                for _ in range(config.num_decoder_layers)
            ]
        )
        self.decoder_norm = LayerNorm(d, **config.norm_options)
        is_tied = config.tie_embeddings
        self.head = Head(rows, d, is_tied=is_tied, use_bias=config.head_bias, rngs=rngs)

    def encode(
        self,
        source_BS: jax.Array,
        source_mask_BS: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
        remat: bool = False,
    ) -> jax.Array:
        keys = split_keys(key if self.config.dropout else None, len(self.encoder) + 1)
        table = self.source_embedding or self.target_embedding
        x_BSD = embed(self.config, source_BS, table, self.source_positions, None, keys[-1])
        visible_BTS = _all_text(source_BS, source_mask_BS)[:, None, :]
        apply = nnx.remat(Block.__call__) if remat else Block.__call__
        for block, block_key in zip(self.encoder, keys, strict=False):
            x_BSD, _ = apply(block, x_BSD, None, block_key, visible_BTS)
        return self.encoder_norm(x_BSD)

    def init_cache_from(
        self,
        source_BS: jax.Array,
        source_mask_BS: jax.Array | None,
        max_len: int,
        dtype: Any,
    ) -> PairCache:
        memory_BSD = self.encode(source_BS, source_mask_BS).astype(dtype)
        kvs = [block.cross.keys_and_values(memory_BSD) for block in self.decoder]
        keys, values = zip(*kvs, strict=True)
        heads = self.config.num_heads
        shape = (source_BS.shape[0], heads, max_len, self.config.d_model // heads)
        target = KVCache.empty(len(kvs), shape, dtype)
        return PairCache(*target, keys, values, _all_text(source_BS, source_mask_BS))

    def hidden(
        self,
        tokens_BT: jax.Array,
        cache: PairCache | None = None,
        *,
        source_BS: jax.Array | None = None,
        source_mask_BS: jax.Array | None = None,
        mask_BT: jax.Array | None = None,
        key: jax.Array | None = None,
        remat: bool = False,
    ) -> tuple[jax.Array, PairCache | None]:
        if (cache is None) == (source_BS is None):
            raise ValueError("the source is given once: as source_BS, or in the cache")
        if mask_BT is not None and cache is not None:
            raise ValueError("a cache knows no padding: pass mask_BT without one")
        encoder_key, key = split_keys(key if self.config.dropout else None, 2)
        keys = split_keys(key, len(self.decoder) + 1)
        first_B = cache.length_B if cache else None
        if cache is None:
            memory_BSD = self.encode(source_BS, source_mask_BS, key=encoder_key, remat=remat)
            source_mask_BS = _all_text(source_BS, source_mask_BS)
        else:
            source_mask_BS = cache.source_mask_BS
        x_BTD = embed(
            self.config, tokens_BT, self.target_embedding, self.target_positions, first_B, keys[-1]
        )
        visible_BTS = None if mask_BT is None else causal_and(mask_BT)
        apply = nnx.remat(Block.__call__) if remat else Block.__call__
        kvs = []
        for i, block in enumerate(self.decoder):
            if cache is None:
                source_kv = block.cross.keys_and_values(memory_BSD)
            else:
                source_kv = cache.source_keys[i], cache.source_values[i]
            memory = Memory(source_kv, source_mask_BS[:, None, :])
            cached = cache.layer(i) if cache else None
            x_BTD, kv = apply(block, x_BTD, cached, keys[i], visible_BTS, memory)
            kvs.append(kv)
        x_BTD = self.decoder_norm(x_BTD)
        if cache is None:
            return x_BTD, None
        new_keys, new_values = zip(*kvs, strict=True)
        length_B = cache.length_B + tokens_BT.shape[1]
        return x_BTD, cache._replace(keys=new_keys, values=new_values, length_B=length_B)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        return self.head(x_BTD, self.target_embedding.embedding[...])

    def loss(
        self,
        batch: Mapping[str, jax.Array],
        *,
        key: jax.Array | None = None,
        remat: bool = False,
        config: LossConfig = PLAIN,
    ) -> PairSums:
        x_BTD, _ = self.hidden(
            batch["tokens"],
            source_BS=batch["source"],
            source_mask_BS=batch["source_mask"],
            key=key,
            remat=remat,
        )
        logits_BTV = self.logits(x_BTD)
        return losses.pair_cross_entropy(logits_BTV, batch["targets"], batch["weights"], config)


def _all_text(source_BS: jax.Array, mask_BS: jax.Array | None) -> jax.Array:
    return jnp.ones(source_BS.shape, bool) if mask_BS is None else mask_BS
