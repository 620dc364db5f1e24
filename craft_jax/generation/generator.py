"""Sampling with a language model: a prefill, a compiled loop, any number of rows.

Each prompt starts at position 0 of its own row, so a row's text does not depend on the other rows;
nor do the sources of an encoder-decoder. Shape letters: B rows, V vocabulary, N new tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from craft_jax.errors import UsageError
from craft_jax.generation.beam_search import BeamSearch
from craft_jax.generation.prompts import Padded, PromptReader
from craft_jax.generation.sampling import SamplingConfig, choose
from craft_jax.models import base, kernels
from craft_jax.models.base import Cache, ModelDef, Params, TokenModel

CHUNK = 16
"""Tokens decoded on the device between two looks at them on the host."""

TRANSPOSE_FROM = 32
"""New tokens from which on `kernels.transpose_kernels` pays."""


class _Rows(NamedTuple):
    """The state of decoding.

    Attributes:
      cache: the model's cache; holds everything but the token that was chosen last.
      token_B: the token that was chosen last.
      seen_BV: tokens that stand in each row.
      count_B: tokens made so far.
      done_B: whether the row has ended.
    """

    cache: Cache
    token_B: jax.Array
    seen_BV: jax.Array
    count_B: jax.Array
    done_B: jax.Array


class Generator:
    """Continues prompts with one architecture; compiled functions are kept between calls.

    An encoder-decoder reads a source for each row, and its prompt is how the target begins.

    Args:
      model_def: the model.
      max_len: the longest context, in tokens.
      vocab_size: ids from here on are never chosen (rows that only pad the embedding).
      end_id: the token that ends a row, or None.
    """

    def __init__(
        self,
        model_def: ModelDef[TokenModel],
        *,
        max_len: int,
        vocab_size: int,
        end_id: int | None,
    ):
        self._model_def, self._end_id = model_def, end_id
        self._reader = PromptReader(model_def=model_def, max_len=max_len, vocab_size=vocab_size)
        self._prefill = jax.jit(self._prefill_on_device, static_argnames=("cache_len", "config"))
        self._decode = jax.jit(
            self._decode_on_device, static_argnames="config", donate_argnames="rows"
        )
        self._search = BeamSearch(self._reader, end_id)

    def generate(
        self, params: Params, prompts: Sequence[Sequence[int]], **options: Any
    ) -> list[list[int]]:
        """Returns the new tokens of each row; see `stream`."""
        made: list[list[int]] = [[] for _ in prompts]
        for new in self.stream(params, prompts, **options):
            for row, tokens in zip(made, new, strict=True):
                row.extend(tokens)
        return made

    def stream(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        *,
        sources: Sequence[Sequence[int]] | None = None,
        max_new_tokens: int,
        config: SamplingConfig,
        seed: int = 0,
        sample_index: Sequence[int] | None = None,
        on_refill: Callable[[int], None] = lambda kept: None,
    ) -> Iterator[list[list[int]]]:
        """Yields the new tokens of each row, some at a time; a row that ended yields none.

        Token i of a row is a function of its prompt, its source and (seed, sample_index, i). A row
        that reaches `max_len` goes on from a fresh prefill of its last half; a target ends there.

        Args:
          params: in the dtype that computes.
          prompts: ids, one to `max_len` in each.
          sources: ids of what an encoder-decoder reads, one to `max_len` for each prompt.
          max_new_tokens: per row.
          config: how tokens are chosen.
          seed: of the randomness, in [0, 2**32).
          sample_index: tells samples of the same prompt apart; None for 0 in every row.
          on_refill: called with the number of tokens kept, when a row goes on past the context.

        Raises:
          UsageError: an impossible sampling value or seed, or a prompt or a source that is empty,
            too long or none of this model's.
        """
        config.check(self._reader.vocab_size)
        if not 0 <= seed < 2**32:
            raise UsageError(f"`seed={seed}` must be from 0 to {2**32 - 1}")
        texts = [list(map(int, prompt)) for prompt in prompts]
        self._reader.check(texts, sources)
        if max_new_tokens <= 0 or not texts:
            return
        source = None if sources is None else Padded.of(sources, self._reader.max_len)
        index_B = jnp.asarray(list(sample_index or [0] * len(texts)), jnp.uint32)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index_B)
        yield from self._continue(
            params, texts, source, keys_B, max_new_tokens, config=config, on_refill=on_refill
        )

    def _continue(
        self,
        params: Params,
        texts: list[list[int]],
        source: Padded | None,
        keys_B: jax.Array,
        max_new_tokens: int,
        *,
        config: SamplingConfig,
        on_refill: Callable[[int], None],
    ) -> Iterator[list[list[int]]]:
        """Yields new tokens as `stream` does, and appends them to `texts`."""
        max_len = self._reader.max_len
        cache_len = self._reader.cache_len(texts, max_new_tokens)
        has_source = self._reader.has_source
        limit_B = self._reader.limits(texts, max_new_tokens, may_refill=not has_source)
        everyone = np.ones(len(texts), bool)
        rows = self._fill(params, None, texts, source, everyone, keys_B, cache_len, config)
        new = [[int(token)] for token in np.asarray(rows.token_B)]
        # Transposing takes about the time that it saves on this many tokens.
        decode_params = params if max_new_tokens < TRANSPOSE_FROM else None
        while True:
            for text, tokens in zip(texts, new, strict=True):
                text.extend(tokens)
            yield [[t for t in tokens if t != self._end_id] for tokens in new]
            count_B, length_B = np.asarray(rows.count_B), np.asarray(rows.cache.length_B)
            active_B = ~np.asarray(rows.done_B) & (count_B < limit_B)
            if not active_B.any():
                return
            full_B = active_B & (length_B >= max_len)
            if full_B.any():
                kept = max(1, max_len // 2)
                on_refill(kept)
                tails = [text[-kept:] for text in texts]
                rows = self._fill(params, rows, tails, None, full_B, keys_B, cache_len, config)
                token_B = np.asarray(rows.token_B)
                new = [[int(t)] if full else [] for t, full in zip(token_B, full_B, strict=True)]
                continue
            steps = min(CHUNK, int((max_len - length_B)[active_B].min()))
            if decode_params is None:
                decode_params = prepare_decode_params(self._model_def, params, len(texts))
            rows, tokens_NB, is_new_NB = self._decode(
                decode_params, rows, keys_B, steps, limit_B, config
            )
            tokens_BN, is_new_BN = np.asarray(tokens_NB).T, np.asarray(is_new_NB).T
            new = [t[is_new].tolist() for t, is_new in zip(tokens_BN, is_new_BN, strict=True)]

    def beam_search(
        self, params: Params, prompts: Sequence[Sequence[int]], **options: Any
    ) -> list[tuple[list[int], float]]:
        """Returns the best continuation of each prompt, and its score: see `BeamSearch`."""
        return self._search(params, prompts, **options)

    def _fill(
        self,
        params: Params,
        rows: _Rows | None,
        texts: Sequence[Sequence[int]],
        source: Padded | None,
        which_B: np.ndarray,
        keys_B: jax.Array,
        cache_len: int,
        config: SamplingConfig,
    ) -> _Rows:
        """Prefills the caches of some rows with `texts` and chooses their next token."""
        texts = [text if chosen else text[:1] for text, chosen in zip(texts, which_B, strict=True)]
        prompt = Padded.of(texts, cache_len)
        return self._prefill(
            params, rows, prompt, source, which_B, keys_B, cache_len=cache_len, config=config
        )

    # On the device.

    def _prefill_on_device(
        self,
        params: Params,
        rows: _Rows | None,
        prompt: Padded,
        source: Padded | None,
        which_B: jax.Array,
        keys_B: jax.Array,
        *,
        cache_len: int,
        config: SamplingConfig,
    ) -> _Rows:
        cache, logits_BV = self._reader.read(params, prompt, source, cache_len)
        B = len(logits_BV)
        if rows is None:
            row_B1 = jnp.arange(B)[:, None]
            seen_BV = jnp.zeros(logits_BV.shape, bool)
            seen_BV = seen_BV.at[row_B1, prompt.ids_BT].max(prompt.mask_BT)
            start = jnp.zeros(B, jnp.int32)
            rows = _Rows(cache, start, seen_BV, start, start.astype(bool))
        merged = jax.tree.map(
            lambda new, old: jnp.where(which_B.reshape(-1, *(1,) * (new.ndim - 1)), new, old),
            cache,
            rows.cache,
        )
        return self._advance(rows._replace(cache=merged), logits_BV, which_B, keys_B, config)

    def _decode_on_device(
        self,
        params: Params,
        rows: _Rows,
        keys_B: jax.Array,
        steps: jax.Array,
        limit_B: jax.Array,
        config: SamplingConfig,
    ) -> tuple[_Rows, jax.Array, jax.Array]:
        """Returns up to `steps` new tokens per row, and which of them count, both (N, B)."""
        model = self._model_def.merge(params)
        B = keys_B.shape[0]

        def is_active(rows: _Rows) -> jax.Array:
            return ~rows.done_B & (rows.count_B < limit_B)

        def cond(carry: tuple) -> jax.Array:
            i, rows, _, _ = carry
            return (i < steps) & jnp.any(is_active(rows))

        def body(carry: tuple) -> tuple:
            i, rows, tokens_NB, is_new_NB = carry
            active_B = is_active(rows)
            logits_B1V, cache = model(rows.token_B[:, None], rows.cache)
            length_B = jnp.where(active_B, cache.length_B, rows.cache.length_B)
            rows = rows._replace(cache=cache._replace(length_B=length_B))
            logits_BV = self._reader.within_vocabulary(logits_B1V[:, 0])
            rows = self._advance(rows, logits_BV, active_B, keys_B, config)
            return i + 1, rows, tokens_NB.at[i].set(rows.token_B), is_new_NB.at[i].set(active_B)

        empty = jnp.zeros((CHUNK, B), jnp.int32), jnp.zeros((CHUNK, B), bool)
        _, rows, tokens_NB, is_new_NB = jax.lax.while_loop(cond, body, (0, rows, *empty))
        return rows, tokens_NB, is_new_NB

    def _advance(
        self,
        rows: _Rows,
        logits_BV: jax.Array,
        which_B: jax.Array,
        keys_B: jax.Array,
        config: SamplingConfig,
    ) -> _Rows:
        """Chooses the next token of the rows in `which_B`, and leaves the others as they are."""
        token_keys_B = jax.vmap(jax.random.fold_in)(keys_B, rows.count_B)
        chosen_B = choose(logits_BV, rows.seen_BV, token_keys_B, config)
        token_B = jnp.where(which_B, chosen_B, rows.token_B)
        is_new_BV = jax.nn.one_hot(token_B, logits_BV.shape[-1], dtype=bool) & which_B[:, None]
        ended_B = which_B & (token_B == self._end_id) if self._end_id is not None else False
        return _Rows(
            cache=rows.cache,
            token_B=token_B,
            seen_BV=rows.seen_BV | is_new_BV,
            count_B=rows.count_B + which_B,
            done_B=rows.done_B | ended_B,
        )


def generate(
    model: TokenModel,
    prompts: Sequence[Sequence[int]],
    *,
    sources: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int,
    config: SamplingConfig | None = None,
    seed: int = 0,
    end_id: int | None = None,
) -> list[list[int]]:
    """Returns the new tokens of each prompt, with samples of equal prompts told apart by row.

    Args:
      model: a module with its parameters.
      prompts: ids, one to the model's `max_seq_len` in each.
      sources: likewise, for an encoder-decoder: what it reads for each prompt.
      max_new_tokens: per row.
      config: how tokens are chosen; None for plain sampling at temperature 1.
      seed: of the randomness.
      end_id: the token that ends a row, or None.

    Raises:
      UsageError: see `Generator.stream`.
    """
    generator = Generator(
        base.define(type(model), model.config),
        max_len=model.config.max_seq_len,
        vocab_size=model.config.vocab_size,
        end_id=end_id,
    )
    return generator.generate(
        base.split(model),
        prompts,
        sources=sources,
        max_new_tokens=max_new_tokens,
        config=config or SamplingConfig(),
        seed=seed,
        sample_index=range(len(prompts)),
    )


def prepare_decode_params(model_def: ModelDef, params: Params, num_rows: int) -> Params:
    """Returns the parameters for decoding `num_rows` rows: see `kernels.transpose_kernels`."""
    dense = {path: params[path] for path in sorted(model_def.kernels)}
    return params | kernels.transpose_kernels(dense, num_rows)
