"""Names of the metrics of an evaluation, and their values from sums. Plain Python."""

import math

from craft_jax.errors import DataError


def from_sums(*, loss: float, weight: float, correct: float, num_bytes: int | None) -> dict:
    """Returns the metrics of one pass over a split.

    Args:
      loss: sum of the losses in nats.
      weight: number of predicted tokens.
      correct: number of tokens that the model ranked first.
      num_bytes: UTF-8 bytes of the text; None if there is no text.

    Returns:
      `loss` (nats per token), `perplexity`, `bits_per_byte` (None without text), `accuracy`,
      `tokens`. Bits per byte compare models with different tokenizers: the loss of all tokens, end
      tokens included, over the bytes of the text.

    Raises:
      DataError: no token is predicted.
    """
    _check_weight(weight)
    mean = loss / weight
    return {
        "loss": mean,
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "bits_per_byte": loss / math.log(2) / num_bytes if num_bytes else None,
        "accuracy": correct / weight,
        "tokens": int(weight),
    }


def from_pair_sums(
    *, loss: float, weight: float, correct: float, exact: float, rows: float
) -> dict:
    """Returns the metrics of one pass over a split of pairs.

    Args:
      loss, weight, correct: as for `from_sums`, over the targets.
      exact: number of pairs of which greedy decoding gives the whole target.
      rows: number of pairs.

    Returns:
      `loss` (nats per token), `perplexity`, `accuracy` (of tokens, given the right ones before),
      `exact_match`, `tokens`, `pairs`.
    """
    metrics = from_sums(loss=loss, weight=weight, correct=correct, num_bytes=None)
    del metrics["bits_per_byte"]
    tokens = metrics.pop("tokens")
    return {**metrics, "exact_match": exact / rows, "tokens": tokens, "pairs": int(rows)}


def from_pixel_sums(*, loss: float, weight: float, correct: float, channels: int) -> dict:
    """Returns the metrics of one pass over images that are tokens, one for each pixel.

    Args:
      loss, weight, correct: as for `from_sums`, over the pixels.
      channels: numbers in a pixel.

    Returns:
      `loss` (nats per pixel), `bits_per_dim` (bits for each number of an image, as its palette has
      it), `accuracy`, `pixels`.
    """
    found = from_sums(loss=loss, weight=weight, correct=correct, num_bytes=None)
    return {
        "loss": found["loss"],
        "bits_per_dim": found["loss"] / math.log(2) / channels,
        "accuracy": found["accuracy"],
        "pixels": found["tokens"],
    }


def from_mean(*, loss: float, weight: float) -> dict:
    """Returns the metrics of one pass over examples that have one loss each: `loss`, `examples`.

    Raises:
      DataError: no example counts.
    """
    _check_weight(weight)
    return {"loss": loss / weight, "examples": int(weight)}


def _check_weight(weight: float) -> None:
    if not weight:
        raise DataError(
            "all target weights in this split are 0; check data.learned_roles or the weights of "
            "the dataset"
        )
