"""Batches on the devices, ahead of the step that reads them."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from craft_jax.data.base import Batch, Dataset
from craft_jax.data.loading import WHOLE, load_batches
from craft_jax.parallel import sharding
from craft_jax.runtime import fault_injection
from craft_jax.training.tasks import Task


class DeviceBatch(NamedTuple):
    """A batch on the devices.

    Attributes:
      arrays: by name, sharded.
      items: how many units of the task the whole batch holds.
      md5: see `batch_md5`; None unless asked for.
    """

    arrays: Mapping[str, jax.Array]
    items: int
    md5: str | None


class BatchFeed:
    """Loads the batches of a dataset and puts them on the devices.

    Args:
      data: the training set.
      task: counts its units.
      mesh, mode: as for `sharding.put_batch`.
      workers, prefetch: see `loading.load_batches`.
      with_md5: whether to compute the digest of each batch.
    """

    def __init__(
        self,
        data: Dataset,
        task: Task,
        mesh: Mesh,
        *,
        mode: str = "jit",
        workers: int = 0,
        prefetch: int = 2,
        with_md5: bool = False,
    ):
        self.data, self.task = data, task
        self._mesh, self._mode = mesh, mode
        self._workers, self._prefetch, self._with_md5 = workers, prefetch, with_md5
        self._batch_size = data.batch_size
        self._rows = WHOLE
        # Each of several processes makes its shard of a batch; a digest needs the whole.
        if (
            jax.process_count() > 1
            and self._batch_size
            and task.count_scales_with_rows
            and not with_md5
        ):
            self._rows = sharding.own_rows(self._batch_size, mesh)

    def batches(self, first: int, last: int) -> Iterator[DeviceBatch]:
        """Yields the batches `first`, ..., `last - 1`; see `loading.load_batches` for errors."""
        return load_batches(
            self.data,
            first,
            last,
            workers=self._workers,
            ahead=self._prefetch,
            then=self._put,
            rows=self._rows,
        )

    def _put(self, batch: Batch) -> DeviceBatch:
        fault_injection.point("data")
        md5 = batch_md5(batch) if self._with_md5 else None
        items = self.task.count(batch)
        if self._rows == WHOLE:
            return DeviceBatch(sharding.put_batch(batch, self._mesh, self._mode), items, md5)
        assert self._batch_size is not None
        items = items * self._batch_size // (self._rows.stop - self._rows.start)
        whole = {"rows": self._rows, "batch_size": self._batch_size}
        arrays = sharding.put_batch(batch, self._mesh, self._mode, **whole)
        return DeviceBatch(arrays, items, md5)


def batch_md5(batch: Mapping[str, np.ndarray]) -> str:
    """Returns the MD5 over the names, dtypes, shapes and bytes of a batch, hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    for name, array in sorted(batch.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
