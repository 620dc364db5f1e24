"""Sampling from a language model: one prefill, one compiled loop, any number of rows.

Prompts of different lengths stand side by side, each from position 0 of its own row, so a row's
text does not depend on its neighbours. Shape letters: B rows, T prompt positions, S cache
positions, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from craft_jax.errors import UsageError
from craft_jax.models import base
from craft_jax.models.base import LanguageModel, ModelDef, Params

CHUNK = 16
"""Tokens decoded on the device between two looks at them on the host."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen; the filters apply in the order in which they stand here.

    Attributes:
      repetition_penalty: divides positive and multiplies negative logits of tokens seen before
        (Keskar et al. 2019); 1 for none.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keeps the k most likely tokens; None for all.
      top_p: keeps the smallest set of most likely tokens with at least this probability (Holtzman
        et al. 2020); 1 for all.
      min_p: drops tokens below this fraction of the most likely one's probability; 0 for none.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def check(self, vocab_size: int) -> None:
        """Checks every value.

        Raises:
          UsageError: names all that are impossible.
        """
        wrong = [
            f"--{name}={value} must be {demand}"
            for name, value, possible, demand in (
                ("temperature", self.temperature, 0 <= self.temperature < float("inf"),
                 "0 (most likely token) or more"),
                ("top_k", self.top_k, self.top_k is None or 1 <= self.top_k <= vocab_size,
                 f"from 1 to the vocabulary's {vocab_size}"),
                ("top_p", self.top_p, 0 < self.top_p <= 1, "greater than 0 and at most 1"),
                ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
                ("repetition_penalty", self.repetition_penalty,
                 0 < self.repetition_penalty < float("inf"), "greater than 0; 1 for none"),
            )
            if not possible
        ]  # fmt: skip
        if wrong:
            raise UsageError("; ".join(wrong))


def choose(
    logits_BV: jax.Array, seen_BV: jax.Array, keys_B: jax.Array, config: SamplingConfig
) -> jax.Array:
    """Chooses the next token of each row.

    Args:
      logits_BV: float32 or float64.
      seen_BV: bool, whether the row holds the token already.
      keys_B: a key for each row.
      config: how.

    Returns:
      int32 (B,).
    """
    if config.repetition_penalty != 1.0:
        penalty = config.repetition_penalty
        punished_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, punished_BV, logits_BV)
    if config.temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / config.temperature
    if config.top_k is not None:
        smallest_B1 = jax.lax.top_k(logits_BV, config.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= smallest_B1, logits_BV, -jnp.inf)
    if config.top_p < 1.0:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token stays while those before it have not reached top_p, so the first always does.
        kept_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV < config.top_p
        smallest_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= smallest_B1, logits_BV, -jnp.inf)
    if config.min_p > 0.0:
        floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(config.min_p)
        logits_BV = jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


class _Rows(NamedTuple):
    """The state of decoding.

    Attributes:
      cache: the model's cache; holds everything but the token that was chosen last.
      token_B: the token that was chosen last.
      seen_BV: tokens that stand in each row.
      count_B: tokens made so far.
      done_B: whether the row has ended.
    """

    cache: Any
    token_B: jax.Array
    seen_BV: jax.Array
    count_B: jax.Array
    done_B: jax.Array


class Generator:
    """Continues prompts with one architecture; compiled functions are kept between calls.

    Args:
      model_def: the model.
      max_len: the longest context, in tokens.
      vocab_size: ids from here on are never chosen (rows that only pad the embedding).
      end_id: the token that ends a row, or None.
    """

    def __init__(
        self,
        model_def: ModelDef[LanguageModel],
        *,
        max_len: int,
        vocab_size: int,
        end_id: int | None,
    ):
        self._model_def, self._max_len = model_def, max_len
        self._vocab_size, self._end_id = vocab_size, end_id
        self._prefill = jax.jit(self._prefill_on_device, static_argnames=("cache_len", "config"))
        self._decode = jax.jit(
            self._decode_on_device, static_argnames="config", donate_argnames="rows"
        )

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
        max_new_tokens: int,
        config: SamplingConfig,
        seed: int = 0,
        sample_index: Sequence[int] | None = None,
        on_refill: Callable[[int], None] = lambda kept: None,
    ) -> Iterator[list[list[int]]]:
        """Yields the new tokens of each row, some at a time; a row that ended yields none.

        Token i of a row is a function of its prompt and of (seed, sample_index, i). A row that
        reaches `max_len` goes on from a fresh prefill of its last half.

        Args:
          params: in the dtype that computes.
          prompts: ids, one to `max_len` in each.
          max_new_tokens: per row.
          config: how tokens are chosen.
          seed: of the randomness.
          sample_index: tells samples of the same prompt apart; None for 0 in every row.
          on_refill: called with the number of tokens kept, when a row goes on past the context.

        Raises:
          UsageError: an impossible sampling value, or a prompt that is empty or too long.
        """
        config.check(self._vocab_size)
        texts = [list(map(int, prompt)) for prompt in prompts]
        for text in texts:
            if not 0 < len(text) <= self._max_len:
                raise UsageError(
                    f"a prompt has {len(text)} tokens; this model takes 1 to {self._max_len}"
                )
        if max_new_tokens <= 0 or not texts:
            return
        longest = max(map(len, texts))
        cache_len = min(self._max_len, _round_up(longest + max_new_tokens))
        index_B = jnp.asarray(list(sample_index or [0] * len(texts)), jnp.uint32)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index_B)
        everyone = np.ones(len(texts), bool)
        rows = self._fill(params, None, texts, everyone, keys_B, cache_len, config)
        new = [[int(token)] for token in np.asarray(rows.token_B)]
        while True:
            for text, tokens in zip(texts, new, strict=True):
                text.extend(tokens)
            yield [[t for t in tokens if t != self._end_id] for tokens in new]
            count_B, length_B = np.asarray(rows.count_B), np.asarray(rows.cache.length_B)
            active_B = ~np.asarray(rows.done_B) & (count_B < max_new_tokens)
            if not active_B.any():
                return
            full_B = active_B & (length_B >= self._max_len)
            if full_B.any():
                kept = max(1, self._max_len // 2)
                on_refill(kept)
                tails = [text[-kept:] for text in texts]
                rows = self._fill(params, rows, tails, full_B, keys_B, cache_len, config)
                token_B = np.asarray(rows.token_B)
                new = [[int(t)] if full else [] for t, full in zip(token_B, full_B, strict=True)]
                continue
            steps = min(CHUNK, int((self._max_len - length_B)[active_B].min()))
            rows, tokens_NB, made_NB = self._decode(
                params=params,
                rows=rows,
                keys_B=keys_B,
                steps=steps,
                max_new_tokens=max_new_tokens,
                config=config,
            )
            tokens_BN, made_BN = np.asarray(tokens_NB).T, np.asarray(made_NB).T
            new = [t[made].tolist() for t, made in zip(tokens_BN, made_BN, strict=True)]

    def _fill(
        self,
        params: Params,
        rows: _Rows | None,
        texts: Sequence[Sequence[int]],
        which_B: np.ndarray,
        keys_B: jax.Array,
        cache_len: int,
        config: SamplingConfig,
    ) -> _Rows:
        """Prefills the caches of some rows with `texts` and chooses their next token."""
        texts = [text if chosen else text[:1] for text, chosen in zip(texts, which_B, strict=True)]
        length_B = np.array([len(text) for text in texts], np.int32)
        width = min(cache_len, _round_up(int(length_B.max())))
        tokens_BT = np.zeros((len(texts), width), np.int32)
        for row, text in zip(tokens_BT, texts, strict=True):
            row[: len(text)] = text
        return self._prefill(
            params, rows, tokens_BT, length_B, which_B, keys_B, cache_len=cache_len, config=config
        )

    # On the device.

    def _prefill_on_device(
        self,
        params: Params,
        rows: _Rows | None,
        tokens_BT: jax.Array,
        length_B: jax.Array,
        which_B: jax.Array,
        keys_B: jax.Array,
        *,
        cache_len: int,
        config: SamplingConfig,
    ) -> _Rows:
        model = self._model_def.merge(params)
        B, T = tokens_BT.shape
        dtype = jax.tree.leaves(params)[0].dtype
        x_BTD, cache = model.hidden(tokens_BT, model.init_cache(B, cache_len, dtype))
        # What follows a row's prompt is padding: later tokens overwrite it before they look at it.
        cache = cache._replace(length_B=length_B)
        logits_BV = model.logits(jnp.take_along_axis(x_BTD, length_B[:, None, None] - 1, axis=1))
        logits_BV = self._within_vocabulary(logits_BV[:, 0])
        if rows is None:
            is_prompt_BT = jnp.arange(T)[None, :] < length_B[:, None]
            row_B1 = jnp.arange(B)[:, None]
            seen_BV = jnp.zeros(logits_BV.shape, bool).at[row_B1, tokens_BT].max(is_prompt_BT)
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
        max_new_tokens: jax.Array,
        config: SamplingConfig,
    ) -> tuple[_Rows, jax.Array, jax.Array]:
        """Makes up to `steps` tokens per row; returns them, and which of them count, (N, B)."""
        model = self._model_def.merge(params)
        B = keys_B.shape[0]

        def is_active(rows: _Rows) -> jax.Array:
            return ~rows.done_B & (rows.count_B < max_new_tokens)

        def cond(carry: tuple) -> jax.Array:
            i, rows, _, _ = carry
            return (i < steps) & jnp.any(is_active(rows))

        def body(carry: tuple) -> tuple:
            i, rows, tokens_NB, made_NB = carry
            active_B = is_active(rows)
            logits_B1V, cache = model(rows.token_B[:, None], rows.cache)
            length_B = jnp.where(active_B, cache.length_B, rows.cache.length_B)
            rows = rows._replace(cache=cache._replace(length_B=length_B))
            logits_BV = self._within_vocabulary(logits_B1V[:, 0])
            rows = self._advance(rows, logits_BV, active_B, keys_B, config)
            return i + 1, rows, tokens_NB.at[i].set(rows.token_B), made_NB.at[i].set(active_B)

        empty = jnp.zeros((CHUNK, B), jnp.int32), jnp.zeros((CHUNK, B), bool)
        _, rows, tokens_NB, made_NB = jax.lax.while_loop(cond, body, (0, rows, *empty))
        return rows, tokens_NB, made_NB

    def _within_vocabulary(self, logits_BV: jax.Array) -> jax.Array:
        is_token_V = jnp.arange(logits_BV.shape[-1]) < self._vocab_size
        return jnp.where(is_token_V[None, :], logits_BV, -jnp.inf)

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
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    config: SamplingConfig | None = None,
    seed: int = 0,
    end_id: int | None = None,
) -> list[list[int]]:
    """Returns the new tokens of each prompt, with samples of equal prompts told apart by row.

    Args:
      model: a module with its parameters.
      prompts: ids, one to the model's `max_seq_len` in each.
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
        max_new_tokens=max_new_tokens,
        config=config or SamplingConfig(),
        seed=seed,
        sample_index=range(len(prompts)),
    )


def _round_up(length: int, multiple: int = 64) -> int:
    """Rounds a length up, so that near lengths share a compiled program."""
    return -(-length // multiple) * multiple
