"""Training batches of an array, for the tests of loaders and of the trainer."""

import numpy as np

from craft_jax.data.rows import Stream, Windows
from craft_jax.data.sampling import WeightSchedule
from craft_jax.data.text import TextBatches, check_num_tokens


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
        check_num_tokens(len(tokens_N), seq_len, seq_len, "training")
        windows = Windows(Stream.of(tokens_N), seq_len, seed)
        options = {"seq_len": seq_len, "batch_size": batch_size, "seed": seed}
        super().__init__([windows], [WeightSchedule.parse("1")], **options)
