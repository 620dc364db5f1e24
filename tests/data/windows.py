"""Training batches of an array: what the tests of loaders and of the trainer feed on."""

import numpy as np

from craft_jax.data.sampling import Share
from craft_jax.data.text import Stream, TextBatches, Windows, need_tokens


class TrainingWindows(TextBatches):
    """Windows of an array, shuffled, epoch after epoch; see `Windows`.

    Args:
      tokens_N: the ids, any integer dtype (N,).
      seq_len: T.
      batch_size: B.
      seed: of the order.

    Raises:
      DataError: fewer than `seq_len + 1` tokens.
    """

    def __init__(self, tokens_N: np.ndarray, *, seq_len: int, batch_size: int, seed: int):
        need_tokens(len(tokens_N), seq_len, seq_len, "training")
        windows = Windows(Stream.of(tokens_N), seq_len, seed)
        options = {"seq_len": seq_len, "batch_size": batch_size, "seed": seed}
        super().__init__([windows], [Share.parse("1")], **options)
