"""Prompts of different lengths side by side, and their prefill.

Shape letters: B rows, T prompt positions, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import UsageError
from craft_jax.models.base import Cache, EncoderDecoderModel, ModelDef, Params, TokenModel


class Padded(NamedTuple):
    """Texts of different lengths as one array: ids_BT int32, and length_B int32."""

    ids_BT: jax.Array
    length_B: jax.Array

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], widest: int) -> "Padded":
        """Lays texts side by side; the width is rounded up, at most to `widest`."""
        length_B = np.array([len(text) for text in texts], np.int32)
        ids_BT = np.zeros((len(texts), min(widest, round_up(int(length_B.max())))), np.int32)
        for row, text in zip(ids_BT, texts, strict=True):
            row[: len(text)] = text
        return cls(ids_BT, length_B)

    @property
    def mask_BT(self) -> jax.Array:
        """Which ids are text."""
        return jnp.arange(self.ids_BT.shape[1])[None, :] < self.length_B[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptReader:
    """Checks prompts and sources, and fills the cache of a model with them.

    Attributes:
      model_def: the model.
      max_len: the longest context, in tokens.
      vocab_size: ids from here on are never chosen (rows that only pad the embedding).
    """

    model_def: ModelDef[TokenModel]
    max_len: int
    vocab_size: int

    @functools.cached_property
    def has_source(self) -> bool:
        """Returns whether the model reads a source for each prompt."""
        return isinstance(self.model_def.merge(self.model_def.shapes), EncoderDecoderModel)

    def check(
        self, texts: Sequence[Sequence[int]], sources: Sequence[Sequence[int]] | None
    ) -> None:
        """Raises a UsageError for prompts or sources that the model cannot read."""
        if self.has_source and sources is None:
            raise UsageError("this model reads a source for each prompt: give `sources`")
        if sources is not None and not self.has_source:
            raise UsageError("this model reads no source: leave `sources` out")
        if sources is not None and len(sources) != len(texts):
            raise UsageError(f"{len(sources)} sources for {len(texts)} prompts; give one for each")
        for word, rows in (("source", sources or []), ("prompt", texts)):
            for row in rows:
                if not 0 < len(row) <= self.max_len:
                    raise UsageError(
                        f"a {word} has {len(row)} tokens; this model takes 1 to {self.max_len}"
                    )

    def cache_len(self, texts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
        """Returns the positions of a cache for these prompts and their new tokens."""
        return min(self.max_len, round_up(max(map(len, texts)) + max_new_tokens))

    def limits(
        self, texts: Sequence[Sequence[int]], max_new_tokens: int, *, may_refill: bool
    ) -> np.ndarray:
        """The most new tokens of each row, int32 (B,)."""
        # The last token is chosen from a full context; it needs no position of its own.
        room_B = np.array([self.max_len - len(text) + 1 for text in texts], np.int32)
        limit_B = np.full(len(texts), min(max_new_tokens, np.iinfo(np.int32).max), np.int32)
        return limit_B if may_refill else np.minimum(limit_B, room_B)

    def read(
        self, params: Params, prompt: Padded, source: Padded | None, cache_len: int
    ) -> tuple[Cache, jax.Array]:
        """Returns the cache of prompts, and the logits_BV of what follows them."""
        model = self.model_def.merge(params)
        dtype = jax.tree.leaves(params)[0].dtype
        if source is None:
            cache = model.init_cache(len(prompt.ids_BT), cache_len, dtype)
        else:
            cache = model.init_cache_from(source.ids_BT, source.mask_BT, cache_len, dtype)
        x_BTD, cache = model.hidden(prompt.ids_BT, cache)
        # Padding behind a row's prompt is overwritten by later tokens before they attend to it.
        cache = cache._replace(length_B=prompt.length_B)
        last_B11 = prompt.length_B[:, None, None] - 1
        logits_B1V = model.logits(jnp.take_along_axis(x_BTD, last_B11, axis=1))
        return cache, self.within_vocabulary(logits_B1V[:, 0])

    def within_vocabulary(self, logits_BV: jax.Array) -> jax.Array:
        """Returns logits in which ids from `vocab_size` on are impossible."""
        is_token_V = jnp.arange(logits_BV.shape[-1]) < self.vocab_size
        return jnp.where(is_token_V[None, :], logits_BV, -jnp.inf)


def round_up(length: int, multiple: int = 64) -> int:
    """Rounds a length up, so that near lengths share a compiled program."""
    return -(-length // multiple) * multiple


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Returns the ids of a prompt; an empty one is the start of a document.

    Raises:
      UsageError: characters that the tokenizer does not know.
    """
    if prompt:
        return tokenizer.encode(prompt, "the prompt").tolist()
    if tokenizer.end_id is not None:
        return [tokenizer.end_id]
    if tokenizer.unknown_characters("\n"):
        return [0]
    return tokenizer.encode("\n").tolist() or [0]  # Some tokenizers drop line breaks.


class PromptRows(NamedTuple):
    """Encoded prompts, the input of a generator.

    Attributes:
      prompts: ids that new tokens follow.
      sources: ids of what an encoder-decoder reads; None for other models.
    """

    prompts: list[list[int]]
    sources: list[list[int]] | None


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str], *, is_pair: bool) -> PromptRows:
    """Returns texts as prompts or, for a model of pairs, as sources.

    Raises:
      UsageError: characters that the tokenizer does not know, or an empty source.
    """
    if not is_pair:
        return PromptRows([prompt_ids(tokenizer, text) for text in texts], None)
    if tokenizer.end_id is None:
        raise UsageError("the tokenizer has no end token, and a model of pairs needs one")
    for number, text in enumerate(texts, start=1):
        if not text:
            which = f"source {number} of {len(texts)}" if len(texts) > 1 else "the source"
            raise UsageError(f"{which} is empty; a model of pairs needs a text to read")
    sources = [[*tokenizer.encode(text, "the source").tolist(), tokenizer.end_id] for text in texts]
    return PromptRows([[tokenizer.end_id] for _ in texts], sources)
