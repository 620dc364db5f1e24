"""What the numbers of an evaluation are called and how they follow from sums. Plain Python."""

import math


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
    """
    mean = loss / weight
    return {
        "loss": mean,
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "bits_per_byte": loss / math.log(2) / num_bytes if num_bytes else None,
        "accuracy": correct / weight,
        "tokens": int(weight),
    }
