"""Sampling and beam search with a language model: a prefill, a compiled loop, any number of rows.

Prompts of different lengths stand side by side, each from position 0 of its own row, so a row's
text does not depend on its neighbours; nor do the sources of an encoder-decoder. Shape letters: B
rows, T prompt positions, S source positions, V vocabulary, W beams of a row, N new tokens, K
continuations that are looked at.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from craft_jax.errors import UsageError
from craft_jax.generation.sampling import SamplingConfig, choose
from craft_jax.models import base, layers
from craft_jax.models.base import Cache, EncoderDecoderModel, LanguageModel, ModelDef, Params

CHUNK = 16
"""Tokens decoded on the device between two looks at them on the host."""

TURNED_FROM = 32
"""New tokens from which on `layers.turned` pays."""

MAX_BEAMS = 1000
"""Each beam takes the memory of a row."""


class _Padded(NamedTuple):
    """Texts of different lengths as one array: ids_BT int32, and length_B int32."""

    ids_BT: jax.Array
    length_B: jax.Array

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], widest: int) -> "_Padded":
        """Lays texts side by side; the width is rounded up, at most to `widest`."""
        length_B = np.array([len(text) for text in texts], np.int32)
        ids_BT = np.zeros((len(texts), min(widest, _round_up(int(length_B.max())))), np.int32)
        for row, text in zip(ids_BT, texts, strict=True):
            row[: len(text)] = text
        return cls(ids_BT, length_B)

    @property
    def mask_BT(self) -> jax.Array:
        """Which ids are text."""
        return jnp.arange(self.ids_BT.shape[1])[None, :] < self.length_B[:, None]


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


class _Beams(NamedTuple):
    """The state of a beam search.

    Attributes:
      cache: of B * W rows; holds everything but the tokens that were chosen last.
      count: tokens made so far, the same number in every hypothesis that lives.
      tokens_BWN, score_BW: the hypotheses and their log-probabilities; -inf for those that ended,
        and for slots that were never filled.
      best_BN, best_count_B, best_score_B: the best of those that ended, its length and its score.
    """

    cache: Cache
    count: jax.Array
    tokens_BWN: jax.Array
    score_BW: jax.Array
    best_BN: jax.Array
    best_count_B: jax.Array
    best_score_B: jax.Array


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
        model_def: ModelDef[LanguageModel],
        *,
        max_len: int,
        vocab_size: int,
        end_id: int | None,
    ):
        self._model_def, self._max_len = model_def, max_len
        self._vocab_size, self._end_id = vocab_size, end_id
        self._has_source = isinstance(model_def.merge(model_def.shapes), EncoderDecoderModel)
        self._turn = jax.jit(self._turn_on_device, static_argnames="num_rows")
        self._prefill = jax.jit(self._prefill_on_device, static_argnames=("cache_len", "config"))
        self._decode = jax.jit(
            self._decode_on_device, static_argnames="config", donate_argnames="rows"
        )
        self._search = jax.jit(
            self._search_on_device, static_argnames=("num_beams", "room", "cache_len")
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
        config.check(self._vocab_size)
        if not 0 <= seed < 2**32:
            raise UsageError(f"--seed={seed} must be from 0 to {2**32 - 1}")
        texts = [list(map(int, prompt)) for prompt in prompts]
        self._check(texts, sources)
        if max_new_tokens <= 0 or not texts:
            return
        source = None if sources is None else _Padded.of(sources, self._max_len)
        cache_len = self._cache_len(texts, max_new_tokens)
        limit_B = self._limits(texts, max_new_tokens, may_refill=not self._has_source)
        index_B = jnp.asarray(list(sample_index or [0] * len(texts)), jnp.uint32)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index_B)
        everyone = np.ones(len(texts), bool)
        rows = self._fill(params, None, texts, source, everyone, keys_B, cache_len, config)
        new = [[int(token)] for token in np.asarray(rows.token_B)]
        # Making them takes about the time that they save on so many tokens.
        turned = {} if max_new_tokens < TURNED_FROM else None
        while True:
            for text, tokens in zip(texts, new, strict=True):
                text.extend(tokens)
            yield [[t for t in tokens if t != self._end_id] for tokens in new]
            count_B, length_B = np.asarray(rows.count_B), np.asarray(rows.cache.length_B)
            active_B = ~np.asarray(rows.done_B) & (count_B < limit_B)
            if not active_B.any():
                return
            full_B = active_B & (length_B >= self._max_len)
            if full_B.any():
                kept = max(1, self._max_len // 2)
                on_refill(kept)
                tails = [text[-kept:] for text in texts]
                rows = self._fill(params, rows, tails, None, full_B, keys_B, cache_len, config)
                token_B = np.asarray(rows.token_B)
                new = [[int(t)] if full else [] for t, full in zip(token_B, full_B, strict=True)]
                continue
            steps = min(CHUNK, int((self._max_len - length_B)[active_B].min()))
            if turned is None:
                turned = self._turn(params, num_rows=len(texts))
            rows, tokens_NB, made_NB = self._decode(
                params=params,
                turned=turned,
                rows=rows,
                keys_B=keys_B,
                steps=steps,
                limit_B=limit_B,
                config=config,
            )
            tokens_BN, made_BN = np.asarray(tokens_NB).T, np.asarray(made_NB).T
            new = [t[made].tolist() for t, made in zip(tokens_BN, made_BN, strict=True)]

    def beam_search(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        *,
        sources: Sequence[Sequence[int]] | None = None,
        num_beams: int,
        max_new_tokens: int,
        length_penalty: float = 0.0,
    ) -> list[tuple[list[int], float]]:
        """Returns the best continuation that is found of each prompt, and its score.

        The score is the log-probability of the new tokens, the end token among them, divided by
        their number to the power of `length_penalty`. One of the beams always takes the most likely
        next token, so nothing scores below greedy decoding, and one beam is greedy decoding; the
        others hold the best of all other continuations, whose ends count while they are among
        these. A row ends at `max_len` without an end token.

        Args:
          params: in the dtype that computes.
          prompts, sources: as for `stream`.
          num_beams: hypotheses of each row, W.
          max_new_tokens: per row.
          length_penalty: 0 prefers short texts, 1 compares the means of tokens.

        Returns:
          For each prompt its new tokens, without the end token, and the score.

        Raises:
          UsageError: an impossible value, or a prompt or a source as for `stream`.
        """
        if not 1 <= num_beams <= MAX_BEAMS:
            raise UsageError(f"--num_beams={num_beams} must be from 1 (greedy) to {MAX_BEAMS}")
        if not 0 <= length_penalty < float("inf"):
            raise UsageError(f"--length_penalty={length_penalty} must be 0 (none) or more")
        texts = [list(map(int, prompt)) for prompt in prompts]
        self._check(texts, sources)
        if max_new_tokens <= 0 or not texts:
            return [([], 0.0) for _ in texts]
        found = self._search(
            params,
            _Padded.of(texts, self._max_len),
            None if sources is None else _Padded.of(sources, self._max_len),
            self._limits(texts, max_new_tokens, may_refill=False),
            float(length_penalty),
            num_beams=num_beams,
            room=min(self._max_len, _round_up(max_new_tokens)),
            cache_len=self._cache_len(texts, max_new_tokens),
        )
        return [
            ([t for t in tokens_N[:count].tolist() if t != self._end_id], float(score))
            for tokens_N, count, score in zip(*map(np.asarray, found), strict=True)
        ]

    def _check(
        self, texts: Sequence[Sequence[int]], sources: Sequence[Sequence[int]] | None
    ) -> None:
        if self._has_source and sources is None:
            raise UsageError("this model reads a source for each prompt: give `sources`")
        if sources is not None and not self._has_source:
            raise UsageError("this model reads no source: leave `sources` out")
        if sources is not None and len(sources) != len(texts):
            raise UsageError(f"{len(sources)} sources for {len(texts)} prompts; give one for each")
        for word, rows in (("source", sources or []), ("prompt", texts)):
            for row in rows:
                if not 0 < len(row) <= self._max_len:
                    raise UsageError(
                        f"a {word} has {len(row)} tokens; this model takes 1 to {self._max_len}"
                    )

    def _cache_len(self, texts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
        return min(self._max_len, _round_up(max(map(len, texts)) + max_new_tokens))

    def _limits(
        self, texts: Sequence[Sequence[int]], max_new_tokens: int, *, may_refill: bool
    ) -> np.ndarray:
        """The most new tokens of each row, int32 (B,)."""
        # The last one is chosen where the context is full; it needs no place of its own.
        places_B = np.array([self._max_len - len(text) + 1 for text in texts], np.int32)
        limit_B = np.full(len(texts), min(max_new_tokens, np.iinfo(np.int32).max), np.int32)
        return limit_B if may_refill else np.minimum(limit_B, places_B)

    def _fill(
        self,
        params: Params,
        rows: _Rows | None,
        texts: Sequence[Sequence[int]],
        source: _Padded | None,
        which_B: np.ndarray,
        keys_B: jax.Array,
        cache_len: int,
        config: SamplingConfig,
    ) -> _Rows:
        """Prefills the caches of some rows with `texts` and chooses their next token."""
        texts = [text if chosen else text[:1] for text, chosen in zip(texts, which_B, strict=True)]
        prompt = _Padded.of(texts, cache_len)
        return self._prefill(
            params, rows, prompt, source, which_B, keys_B, cache_len=cache_len, config=config
        )

    # On the device.

    def _turn_on_device(self, params: Params, *, num_rows: int) -> dict[str, jax.Array]:
        return layers.turned(self._model_def.merge(params), num_rows)

    def _read(
        self, params: Params, prompt: _Padded, source: _Padded | None, cache_len: int
    ) -> tuple[Cache, jax.Array]:
        """Returns the cache of prompts, and the logits_BV of what follows them."""
        model = self._model_def.merge(params)
        dtype = jax.tree.leaves(params)[0].dtype
        if source is None:
            cache = model.init_cache(len(prompt.ids_BT), cache_len, dtype)
        else:
            cache = model.init_cache_from(source.ids_BT, source.mask_BT, cache_len, dtype)
        x_BTD, cache = model.hidden(prompt.ids_BT, cache)
        # What follows a row's prompt is padding: later tokens overwrite it before they look at it.
        cache = _with_length(cache, prompt.length_B)
        last_B11 = prompt.length_B[:, None, None] - 1
        logits_B1V = model.logits(jnp.take_along_axis(x_BTD, last_B11, axis=1))
        return cache, self._within_vocabulary(logits_B1V[:, 0])

    def _prefill_on_device(
        self,
        params: Params,
        rows: _Rows | None,
        prompt: _Padded,
        source: _Padded | None,
        which_B: jax.Array,
        keys_B: jax.Array,
        *,
        cache_len: int,
        config: SamplingConfig,
    ) -> _Rows:
        cache, logits_BV = self._read(params, prompt, source, cache_len)
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
        turned: dict[str, jax.Array],
        rows: _Rows,
        keys_B: jax.Array,
        steps: jax.Array,
        limit_B: jax.Array,
        config: SamplingConfig,
    ) -> tuple[_Rows, jax.Array, jax.Array]:
        """Makes up to `steps` tokens per row; returns them, and which of them count, (N, B)."""
        model = self._model_def.merge(params)
        layers.use_turned(model, turned)
        B = keys_B.shape[0]

        def is_active(rows: _Rows) -> jax.Array:
            return ~rows.done_B & (rows.count_B < limit_B)

        def cond(carry: tuple) -> jax.Array:
            i, rows, _, _ = carry
            return (i < steps) & jnp.any(is_active(rows))

        def body(carry: tuple) -> tuple:
            i, rows, tokens_NB, made_NB = carry
            active_B = is_active(rows)
            logits_B1V, cache = model(rows.token_B[:, None], rows.cache)
            length_B = jnp.where(active_B, cache.length_B, rows.cache.length_B)
            rows = rows._replace(cache=_with_length(cache, length_B))
            logits_BV = self._within_vocabulary(logits_B1V[:, 0])
            rows = self._advance(rows, logits_BV, active_B, keys_B, config)
            return i + 1, rows, tokens_NB.at[i].set(rows.token_B), made_NB.at[i].set(active_B)

        empty = jnp.zeros((CHUNK, B), jnp.int32), jnp.zeros((CHUNK, B), bool)
        _, rows, tokens_NB, made_NB = jax.lax.while_loop(cond, body, (0, rows, *empty))
        return rows, tokens_NB, made_NB

    def _search_on_device(
        self,
        params: Params,
        prompt: _Padded,
        source: _Padded | None,
        limit_B: jax.Array,
        length_penalty: jax.Array,
        *,
        num_beams: int,
        room: int,
        cache_len: int,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the best hypothesis of each row: tokens_BN, count_B and score_B."""
        model = self._model_def.merge(params)
        W = num_beams
        cache, logits_BV = self._read(params, prompt, source, cache_len)
        B, V = logits_BV.shape
        tokens_BWN = jnp.zeros((B, W, room), jnp.int32)
        worst_B = jnp.full(B, -jnp.inf, logits_BV.dtype)
        beams = _Beams(
            cache=jax.tree.map(lambda leaf: jnp.repeat(leaf, W, axis=0), cache),
            count=jnp.zeros((), jnp.int32),
            tokens_BWN=tokens_BWN,
            # All beams of a row begin alike: only the first of them is one.
            score_BW=jnp.tile(worst_B[:, None], (1, W)).at[:, 0].set(0.0),
            best_BN=tokens_BWN[:, 0],
            best_count_B=jnp.zeros(B, jnp.int32),
            best_score_B=worst_B,
        )
        logits_BWV = jnp.broadcast_to(logits_BV[:, None, :], (B, W, V))

        def is_alive(beams: _Beams) -> jax.Array:
            return jnp.any(beams.score_BW > -jnp.inf)

        def body(beams: _Beams) -> _Beams:
            newest_BW = jax.lax.dynamic_index_in_dim(
                beams.tokens_BWN, beams.count - 1, axis=2, keepdims=False
            )
            logits_R1V, cache = model(newest_BW.reshape(-1, 1), beams.cache)
            logits_BWV = self._within_vocabulary(logits_R1V[:, 0]).reshape(B, W, V)
            beams = beams._replace(cache=cache)
            return self._extend(beams, logits_BWV, limit_B, length_penalty)

        beams = self._extend(beams, logits_BWV, limit_B, length_penalty)
        beams = jax.lax.while_loop(is_alive, body, beams)
        return beams.best_BN, beams.best_count_B, beams.best_score_B

    def _extend(
        self, beams: _Beams, logits_BWV: jax.Array, limit_B: jax.Array, length_penalty: jax.Array
    ) -> _Beams:
        """Makes every hypothesis one token longer, and keeps the best of those that end."""
        B, W, V = logits_BWV.shape
        # Every continuation, by its score; what ended has none, whatever its logits are.
        is_alive_BW1 = beams.score_BW[:, :, None] > -jnp.inf
        score_BWV = beams.score_BW[:, :, None] + jax.nn.log_softmax(logits_BWV, axis=-1)
        score_BWV = jnp.where(is_alive_BW1, score_BWV, -jnp.inf)
        # The greedy one stands first, then the best others: as many as may end, and W - 1 to go on.
        greedy_B1 = jnp.argmax(logits_BWV[:, 0], axis=-1, keepdims=True)
        greedy_score_B1 = jnp.take_along_axis(score_BWV[:, 0], greedy_B1, axis=1)
        is_greedy_BV = jnp.arange(V)[None, :] == greedy_B1
        others_BWV = score_BWV.at[:, 0].set(jnp.where(is_greedy_BV, -jnp.inf, score_BWV[:, 0]))
        others = others_BWV.reshape(B, W * V)
        other_score_BK, other_BK = jax.lax.top_k(others, min(2 * W - 1, W * V))
        score_BK = jnp.concatenate([greedy_score_B1, other_score_BK], axis=1)
        place_BK = jnp.concatenate([greedy_B1, other_BK], axis=1)
        parent_BK, token_BK = place_BK // V, place_BK % V
        is_end_BK = token_BK == (-1 if self._end_id is None else self._end_id)
        # Which of them go on.
        living_BK = jnp.where(is_end_BK, -jnp.inf, score_BK)
        _, other_BX = jax.lax.top_k(living_BK[:, 1:], W - 1)
        on_BW = jnp.concatenate([jnp.zeros((B, 1), jnp.int32), other_BX + 1], axis=1)
        score_BW = jnp.take_along_axis(living_BK, on_BW, axis=1)

        def texts(which_BX: jax.Array) -> jax.Array:
            """The tokens of some of the continuations."""
            parent_BX = jnp.take_along_axis(parent_BK, which_BX, axis=1)
            token_BX = jnp.take_along_axis(token_BK, which_BX, axis=1)
            before_BXN = jnp.take_along_axis(beams.tokens_BWN, parent_BX[:, :, None], axis=1)
            return before_BXN.at[:, :, beams.count].set(token_BX.astype(jnp.int32))

        # Which of them are complete: the first W that end and, where no more tokens fit, all.
        count = beams.count + 1
        is_full_B = count >= limit_B
        may_end_K = jnp.arange(score_BK.shape[1]) < W
        ended_BK = jnp.where(is_end_BK & may_end_K[None, :], score_BK, -jnp.inf)
        cut_BW = jnp.where(is_full_B[:, None], score_BW, -jnp.inf)
        complete_BX = jnp.concatenate([ended_BK, cut_BW], axis=1)
        index_BK = jnp.broadcast_to(jnp.arange(score_BK.shape[1])[None, :], score_BK.shape)
        index_BX = jnp.concatenate([index_BK, on_BW], axis=1)
        best_B1 = jnp.argmax(complete_BX, axis=1, keepdims=True)

        def penalized(score_B: jax.Array, count: jax.Array) -> jax.Array:
            return score_B / count.astype(score_B.dtype) ** length_penalty

        new_score_B = penalized(jnp.take_along_axis(complete_BX, best_B1, axis=1)[:, 0], count)
        is_better_B = new_score_B > beams.best_score_B
        new_BN = texts(jnp.take_along_axis(index_BX, best_B1, axis=1))[:, 0]
        best_score_B = jnp.where(is_better_B, new_score_B, beams.best_score_B)
        # A row is done where nothing that lives can become better: no token has a positive score.
        is_done_B = is_full_B | (penalized(score_BW.max(axis=1), limit_B) <= best_score_B)
        row_BW = jnp.arange(B)[:, None] * W + jnp.take_along_axis(parent_BK, on_BW, axis=1)
        return _Beams(
            cache=jax.tree.map(lambda leaf: leaf[row_BW.reshape(-1)], beams.cache),
            count=count,
            tokens_BWN=texts(on_BW),
            score_BW=jnp.where(is_done_B[:, None], -jnp.inf, score_BW),
            best_BN=jnp.where(is_better_B[:, None], new_BN, beams.best_BN),
            best_count_B=jnp.where(is_better_B, count, beams.best_count_B),
            best_score_B=best_score_B,
        )

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


def _with_length(cache: Cache, length_B: jax.Array) -> Cache:
    """Returns a cache whose rows hold so many tokens.

    A named tuple with the field `length_B` is a cache; one that keeps it elsewhere has
    `with_length`.
    """
    if hasattr(cache, "with_length"):
        return cache.with_length(length_B)
    return cache._replace(length_B=length_B)


def _round_up(length: int, multiple: int = 64) -> int:
    """Rounds a length up, so that near lengths share a compiled program."""
    return -(-length // multiple) * multiple
