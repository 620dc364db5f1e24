"""Losses as sums, so that parts of a batch can be added before they are divided.

Shape letters: B batch, T time, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LossSums(NamedTuple):
    """Sums over the targets of a batch; scalars, at least float32.

    Attributes:
      loss: sum of the weighted losses, in nats.
      weight: sum of the weights; the mean loss is `loss / weight`.
      correct: weighted number of targets that the model ranks first.
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array


class PairSums(NamedTuple):
    """Sums over the targets of a batch of pairs; scalars, at least float32.

    Attributes:
      loss, weight, correct: as in `LossSums`.
      exact: rows whose every target the model ranks first, given the targets before it; greedy
        decoding gives just these rows back whole.
      rows: rows that have a target.
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array
    exact: jax.Array
    rows: jax.Array


def cross_entropy(
    logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array | None = None
) -> LossSums:
    """Cross-entropy of integer targets, in at least float32.

    Args:
      logits_BTV: unnormalised log probabilities, any float dtype.
      targets_BT: int32 ids in [0, V). JAX clips or wraps others silently: check them before.
      weights_BT: what each target counts; None for 1 each.
    """
    logits_BTV = logits_BTV.astype(jnp.promote_types(logits_BTV.dtype, jnp.float32))
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    losses_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT
    correct_BT = (jnp.argmax(logits_BTV, axis=-1) == targets_BT).astype(losses_BT.dtype)
    if weights_BT is None:
        weight = jnp.asarray(targets_BT.size, losses_BT.dtype)
        return LossSums(losses_BT.sum(), weight, correct_BT.sum())
    weights_BT = weights_BT.astype(losses_BT.dtype)
    return LossSums(
        (losses_BT * weights_BT).sum(), weights_BT.sum(), (correct_BT * weights_BT).sum()
    )


def pair_cross_entropy(
    logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> PairSums:
    """Cross-entropy of targets that are one sequence in each row; see `cross_entropy`."""
    sums = cross_entropy(logits_BTV, targets_BT, weights_BT)
    counts_BT = weights_BT > 0
    wrong_B = jnp.any((jnp.argmax(logits_BTV, axis=-1) != targets_BT) & counts_BT, axis=-1)
    is_row_B = jnp.any(counts_BT, axis=-1)
    dtype = sums.loss.dtype
    exact, rows = (jnp.sum(x, dtype=dtype) for x in (is_row_B & ~wrong_B, is_row_B))
    return PairSums(*sums, exact=exact, rows=rows)
