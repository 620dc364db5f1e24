"""Prefetches batches in a thread or worker processes while the device computes.

Batch s is a pure function of the seed and s, so batches are the same for any number of workers, any
prefetch depth and any first step.
"""

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from craft_jax.data.base import Batch, Dataset
from craft_jax.data.workers import WHOLE, Workers, batch_error, make_batch, origin
from craft_jax.errors import CraftError, DataError, StoppedError

T = TypeVar("T")

_IDS = ("tokens", "targets", "source")


def load_batches(
    dataset: Dataset,
    first: int,
    last: int,
    *,
    workers: int,
    ahead: int,
    then: Callable[[Batch], T],
    rows: slice = WHOLE,
) -> Iterator[T]:
    """Yields `then(batch)` for the batches `first`, ..., `last - 1` of a dataset.

    Closing the iterator (or leaving it) kills its worker processes and waits for its thread, which
    finishes its current batch.

    Args:
      dataset: with the batches.
      first, last: their numbers.
      workers: worker processes; 0 for a thread of this process.
      ahead: batches kept ready here, and in each worker; 0 loads a batch when it is needed.
      then: runs on each batch in order, in a thread of this process; puts it on the devices, say.
      rows: of each batch, if other processes load the rest.

    Raises:
      DataError: `batch` failed, its worker died, or an id is outside the vocabulary. Raised at the
        turn of the batch.
      CraftError: from `batch`, unchanged.
      ConfigError: the dataset cannot be pickled.
    """
    if workers and last > first:
        return _from_workers(dataset, first, last, workers, ahead, then, rows)
    return prefetch(lambda step: then(read_batch(dataset, step, rows)), first, last, ahead)


def _from_workers(
    dataset: Dataset,
    first: int,
    last: int,
    workers: int,
    ahead: int,
    then: Callable[[Batch], T],
    rows: slice,
) -> Iterator[T]:
    def get(step: int) -> T:
        batch = pool.get(step)
        check_ids(dataset, step, batch, rows)
        return then(batch)

    count = min(workers, last - first)
    with Workers(dataset, first, last, count=count, ahead=ahead, rows=rows) as pool:
        yield from prefetch(get, first, last, ahead, pool.kill)


def read_batch(dataset: Dataset, step: int, rows: slice = WHOLE) -> Batch:
    """Returns a batch of a dataset, or some rows of it, checked.

    Raises:
      DataError, CraftError: see `load_batches`.
    """
    try:
        batch = make_batch(dataset, step, rows)
    except (CraftError, StoppedError):
        raise
    except BaseException as error:
        raise batch_error(dataset, step, error) from error
    check_ids(dataset, step, batch, rows)
    return batch


def check_ids(dataset: Dataset, step: int, batch: Batch, rows: slice = WHOLE) -> None:
    """Checks that all ids of a batch are in the vocabulary, since JAX does not.

    Args:
      dataset: of the batch; without a `vocab_size` nothing is checked.
      step: the number of the batch, for messages.
      batch: integer arrays `tokens`, `targets` and `source`, (B, T), are checked if present.
      rows: of the whole batch.

    Raises:
      DataError: an id is not in [0, vocab_size).
    """
    vocab_size = dataset.vocab_size
    for name in _IDS:
        ids = batch.get(name)
        if vocab_size is None or ids is None or ids.dtype.kind not in "iu" or not ids.size:
            continue
        if ids.min() >= 0 and ids.max() < vocab_size:
            continue
        wrong = np.argwhere((ids < 0) | (ids >= vocab_size))
        place = wrong[0].tolist()
        where = ""
        if len(place) == 2 and name != "source":
            # A target is the token at the next position.
            row = place[0] + (rows.start or 0)
            where = dataset.place(step, row, place[1] + (name == "targets"))
        raise DataError(
            f"{origin(dataset)}: batch {step} has the id {ids[tuple(place)]} in {name}{place}"
            f"{where and f' ({where})'}, but the vocabulary has {vocab_size} tokens; correct the "
            "data, or the dataset's vocab_size"
        )


def prefetch(
    get: Callable[[int], T],
    first: int,
    last: int,
    ahead: int = 2,
    stop: Callable[[], None] = lambda: None,
) -> Iterator[T]:
    """Yields `get(first)`, ..., `get(last - 1)`, keeping up to `ahead` results ready.

    Errors of `get` are raised at their step. Closing the iterator (or leaving it) calls `stop`,
    which must make a running `get` return soon, and ends the thread.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
    waiting: collections.deque[Future[T]] = collections.deque()
    try:
        for step in range(first, last):
            while len(waiting) <= ahead and step + len(waiting) < last:
                waiting.append(pool.submit(get, step + len(waiting)))
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        stop()
        pool.shutdown()
