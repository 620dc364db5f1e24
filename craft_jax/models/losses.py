"""Losses as sums, so that parts of a batch can be added before they are divided.

Shape letters: B batch, T time, V vocabulary.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from craft_jax.models.numerics import accum_dtype
from craft_jax.schema import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Terms that training adds to the cross-entropy; no reported loss has them."""

    label_smoothing: float = setting(
        0.0, "the part of each target that is spread evenly over the vocabulary", minimum=0, below=1
    )
    z_loss: float = setting(
        0.0,
        "factor on the squared log of the softmax's normaliser, 1e-4 in PaLM",
        minimum=0,
        maximum=1,
    )

    @property
    def is_plain(self) -> bool:
        """Returns whether nothing is added."""
        return not (self.label_smoothing or self.z_loss)


class LossSums(NamedTuple):
    """Sums over the targets of a batch; scalars, at least float32.

    Attributes:
      loss: sum of the weighted losses, in nats.
      weight: sum of the weights; the mean loss is `loss / weight`.
      correct: weighted number of targets that the model ranks first.
      penalty: sum of what a `LossConfig` adds, weighted; training descends `loss + penalty`.
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array
    penalty: jax.Array | float = 0.0


class PairSums(NamedTuple):
    """Sums over the targets of a batch of pairs; scalars, at least float32.

    Attributes:
      loss, weight, correct, penalty: as in `LossSums`.
      exact: rows whose every target the model ranks first, given the targets before it; greedy
        decoding gives just these rows back whole.
      rows: rows that have a target.
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array
    exact: jax.Array
    rows: jax.Array
    penalty: jax.Array | float = 0.0


class MeanSums(NamedTuple):
    """Sums over the examples of a batch that each have one loss; scalars, at least float32.

    Attributes:
      loss: sum of the weighted losses.
      weight: sum of the weights; the mean loss is `loss / weight`.
      penalty: sum of what training adds, weighted.
    """

    loss: jax.Array
    weight: jax.Array
    penalty: jax.Array | float = 0.0


Sums = LossSums | PairSums | MeanSums
"""The result of a model's loss: named sums with `loss`, `weight` and `penalty`."""

PLAIN = LossConfig()


def cross_entropy(
    logits_BTV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array | None = None,
    config: LossConfig = PLAIN,
) -> LossSums:
    """Cross-entropy of integer targets, in at least float32.

    Args:
      logits_BTV: unnormalised log probabilities, any float dtype.
      targets_BT: int32 ids in [0, V). JAX clips or wraps others silently: check them before.
      weights_BT: the weight of each target; None for 1 each.
      config: what is added as `penalty`: for label smoothing by s, s times the mean over the
        vocabulary of the cross-entropy beyond that of the target (Szegedy et al. 2016); for a
        z-loss by z, z times the squared logsumexp of the logits (Chowdhery et al. 2022, section 5).
    """
    logits_BTV = logits_BTV.astype(accum_dtype(logits_BTV.dtype))
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    normaliser_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    losses_BT = normaliser_BT - chosen_BT
    correct_BT = (_best(logits_BTV, targets_BT) == targets_BT).astype(losses_BT.dtype)
    parts = [losses_BT, correct_BT]
    if not config.is_plain:
        spread_BT = config.label_smoothing * (chosen_BT - logits_BTV.mean(axis=-1))
        parts.append(spread_BT + config.z_loss * normaliser_BT**2)
    if weights_BT is None:
        weight = jnp.asarray(targets_BT.size, losses_BT.dtype)
        loss, correct, *penalty = (part_BT.sum() for part_BT in parts)
    else:
        weights_BT = weights_BT.astype(losses_BT.dtype)
        weight = weights_BT.sum()
        loss, correct, *penalty = ((part_BT * weights_BT).sum() for part_BT in parts)
    return LossSums(loss, weight, correct, *penalty)


def pair_cross_entropy(
    logits_BTV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    config: LossConfig = PLAIN,
) -> PairSums:
    """Cross-entropy of targets that are one sequence in each row; see `cross_entropy`."""
    sums = cross_entropy(logits_BTV, targets_BT, weights_BT, config)
    counts_BT = weights_BT > 0
    wrong_B = jnp.any((_best(logits_BTV, targets_BT) != targets_BT) & counts_BT, axis=-1)
    is_row_B = jnp.any(counts_BT, axis=-1)
    dtype = sums.loss.dtype
    exact, rows = (jnp.sum(x, dtype=dtype) for x in (is_row_B & ~wrong_B, is_row_B))
    return PairSums(**sums._asdict(), exact=exact, rows=rows)


def _best(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Returns the most likely ids, in the dtype of the targets."""
    return jnp.argmax(logits_BTV, axis=-1).astype(targets_BT.dtype)
