"""Beam search with a language model, as one compiled loop.

Shape letters: B rows, V vocabulary, W beams of a row, N new tokens, K continuations of a row, X
some of these, R all beams of all rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from craft_jax.errors import UsageError
from craft_jax.generation.prompts import Padded, PromptReader, round_up
from craft_jax.models.base import Cache, Params

MAX_BEAMS = 1000
"""Each beam takes the memory of a row."""


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


class BeamSearch:
    """Searches for the most likely continuations; compiled functions are kept between calls.

    Args:
      reader: the model and its limits.
      end_id: the token that ends a row, or None.
    """

    def __init__(self, reader: PromptReader, end_id: int | None):
        self._reader, self._end_id = reader, end_id
        self._search = jax.jit(
            self._search_on_device, static_argnames=("num_beams", "room", "cache_len")
        )

    def __call__(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        *,
        sources: Sequence[Sequence[int]] | None = None,
        num_beams: int,
        max_new_tokens: int,
        length_penalty: float = 0.0,
    ) -> list[tuple[list[int], float]]:
        """Returns the best continuation found for each prompt, and its score.

        The score is the log-probability of the new tokens, the end token among them, divided by
        their number to the power of `length_penalty`. One of the beams always takes the most likely
        next token, so nothing scores below greedy decoding, and one beam is greedy decoding; the
        others hold the best of all other continuations, whose ends count while they are among
        these. A row ends at `max_len` without an end token.

        Args:
          params: in the dtype that computes.
          prompts, sources: as for `Generator.stream`.
          num_beams: hypotheses of each row, W.
          max_new_tokens: per row.
          length_penalty: 0 prefers short texts, 1 compares the means of tokens.

        Returns:
          For each prompt its new tokens, without the end token, and the score.

        Raises:
          UsageError: an impossible value, or a prompt or a source as for `Generator.stream`.
        """
        if not 1 <= num_beams <= MAX_BEAMS:
            raise UsageError(f"`num_beams={num_beams}` must be from 1 (greedy) to {MAX_BEAMS}")
        if not 0 <= length_penalty < float("inf"):
            raise UsageError(f"`length_penalty={length_penalty}` must be 0 (none) or more")
        texts = [list(map(int, prompt)) for prompt in prompts]
        self._reader.check(texts, sources)
        if max_new_tokens <= 0 or not texts:
            return [([], 0.0) for _ in texts]
        found = self._search(
            params,
            Padded.of(texts, self._reader.max_len),
            None if sources is None else Padded.of(sources, self._reader.max_len),
            self._reader.limits(texts, max_new_tokens, may_refill=False),
            float(length_penalty),
            num_beams=num_beams,
            room=min(self._reader.max_len, round_up(max_new_tokens)),
            cache_len=self._reader.cache_len(texts, max_new_tokens),
        )
        return [
            ([t for t in tokens_N[:count].tolist() if t != self._end_id], float(score))
            for tokens_N, count, score in zip(*map(np.asarray, found), strict=True)
        ]

    def _search_on_device(
        self,
        params: Params,
        prompt: Padded,
        source: Padded | None,
        limit_B: jax.Array,
        length_penalty: jax.Array,
        *,
        num_beams: int,
        room: int,
        cache_len: int,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the best hypothesis of each row: tokens_BN, count_B and score_B."""
        model = self._reader.model_def.merge(params)
        W = num_beams
        cache, logits_BV = self._reader.read(params, prompt, source, cache_len)
        B, V = logits_BV.shape
        tokens_BWN = jnp.zeros((B, W, room), jnp.int32)
        worst_B = jnp.full(B, -jnp.inf, logits_BV.dtype)
        beams = _Beams(
            cache=jax.tree.map(lambda leaf: jnp.repeat(leaf, W, axis=0), cache),
            count=jnp.zeros((), jnp.int32),
            tokens_BWN=tokens_BWN,
            # All beams of a row begin alike, so only the first has a finite score.
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
            logits_BWV = self._reader.within_vocabulary(logits_R1V[:, 0]).reshape(B, W, V)
            beams = beams._replace(cache=cache)
            return self._extend(beams, logits_BWV, limit_B, length_penalty)

        beams = self._extend(beams, logits_BWV, limit_B, length_penalty)
        beams = jax.lax.while_loop(is_alive, body, beams)
        return beams.best_BN, beams.best_count_B, beams.best_score_B

    def _extend(
        self, beams: _Beams, logits_BWV: jax.Array, limit_B: jax.Array, length_penalty: jax.Array
    ) -> _Beams:
        """Makes every hypothesis one token longer, and keeps the best of those that end."""
        B, W, _ = logits_BWV.shape
        score_BK, parent_BK, token_BK = _continuations(beams, logits_BWV)
        is_end_BK = token_BK == (-1 if self._end_id is None else self._end_id)
        # The W hypotheses that stay alive.
        living_BK = jnp.where(is_end_BK, -jnp.inf, score_BK)
        _, other_BX = jax.lax.top_k(living_BK[:, 1:], W - 1)
        on_BW = jnp.concatenate([jnp.zeros((B, 1), jnp.int32), other_BX + 1], axis=1)
        score_BW = jnp.take_along_axis(living_BK, on_BW, axis=1)

        def texts(which_BX: jax.Array) -> jax.Array:
            """Returns the tokens of some of the continuations."""
            parent_BX = jnp.take_along_axis(parent_BK, which_BX, axis=1)
            token_BX = jnp.take_along_axis(token_BK, which_BX, axis=1)
            before_BXN = jnp.take_along_axis(beams.tokens_BWN, parent_BX[:, :, None], axis=1)
            return before_BXN.at[:, :, beams.count].set(token_BX.astype(jnp.int32))

        # Complete are the first W that end and, where no more tokens fit, all.
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
        # A row is done where no living hypothesis can become better: no token has a positive score.
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


def _continuations(beams: _Beams, logits_BWV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns score_BK, parent_BK and token_BK: the greedy continuation, then the best others.

    K is 2 W: as many as may end, and W - 1 others that stay alive.
    """
    B, W, V = logits_BWV.shape
    # Ended hypotheses have no continuation, whatever their logits are.
    is_alive_BW1 = beams.score_BW[:, :, None] > -jnp.inf
    score_BWV = beams.score_BW[:, :, None] + jax.nn.log_softmax(logits_BWV, axis=-1)
    score_BWV = jnp.where(is_alive_BW1, score_BWV, -jnp.inf)
    greedy_B1 = jnp.argmax(logits_BWV[:, 0], axis=-1, keepdims=True)
    greedy_score_B1 = jnp.take_along_axis(score_BWV[:, 0], greedy_B1, axis=1)
    is_greedy_BV = jnp.arange(V)[None, :] == greedy_B1
    others_BWV = score_BWV.at[:, 0].set(jnp.where(is_greedy_BV, -jnp.inf, score_BWV[:, 0]))
    others = others_BWV.reshape(B, W * V)
    other_score_BK, other_BK = jax.lax.top_k(others, min(2 * W - 1, W * V))
    score_BK = jnp.concatenate([greedy_score_B1, other_score_BK], axis=1)
    index_BK = jnp.concatenate([greedy_B1, other_BK], axis=1)
    return score_BK, index_BK // V, index_BK % V


def check_beams(num_beams: int, length_penalty: float, sampling: Sequence[str]) -> None:
    """Checks that a search is not asked to sample, nor sampling to search.

    Args:
      num_beams, length_penalty: see `Generator.beam_search`.
      sampling: names of the options of sampling that were given.

    Raises:
      UsageError: it is.
    """
    if num_beams > 1 and sampling:
        raise UsageError(
            f"`num_beams={num_beams}` searches for the most likely text and samples nothing; leave "
            f"{', '.join(f'`{name}`' for name in sampling)} out"
        )
    if num_beams < 1:
        raise UsageError(f"`num_beams={num_beams}` must be 1 (no search) or more")
    if num_beams == 1 and length_penalty:
        raise UsageError(
            f"`length_penalty={length_penalty}` is for a search; give `num_beams` of 2 or more"
        )
