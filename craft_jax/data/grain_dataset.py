"""Batches of a dataset as a Grain `MapDataset`.

Element s is batch s, a pure function of the seed and s, also in threads, worker processes and
slices of Grain.
"""

import grain

from craft_jax.data.base import Batch, Dataset
from craft_jax.data.loading import read_batch
from craft_jax.data.workers import WHOLE


class Batches(grain.MapDataset[Batch]):
    """Some of the batches of a dataset.

    Args:
      dataset: with the batches.
      count: number of batches, from batch 0; None for one pass.
      rows: of each batch, such as those of one host.
    """

    def __init__(self, dataset: Dataset, count: int | None = None, rows: slice = WHOLE):
        super().__init__()
        self._dataset, self._rows = dataset, rows
        self._count = len(dataset) if count is None else count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int | slice) -> Batch | grain.MapDataset[Batch] | None:
        """Returns a checked batch, or a dataset of a slice.

        Raises:
          DataError, CraftError: see `loading.load_batches`.
        """
        if isinstance(index, slice):
            return self.slice(index)
        return read_batch(self._dataset, index % self._count, self._rows)
