"""Batches ahead of time: a thread or processes make the next ones while the device computes.

Batch s is a pure function of the seed and s, so what comes out is the same for any number of worker
processes and of batches ahead, and from any first step.
"""

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from craft_jax.data.base import Batch, Dataset, vocab_size_of
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

    Closing the iterator (or leaving it) ends everything that works for it. A thread cannot be ended
    in the middle of a batch, and is waited for; worker processes are killed.

    Args:
      dataset: whose batches.
      first, last: their numbers.
      workers: processes that make them; 0 for a thread of this one.
      ahead: how many are kept ready here, and in each worker; 0 to make a batch when it is asked
        for.
      then: what to do with each, in a thread of this process and in order, such as to put it on
        the devices.
      rows: which rows of each batch, where other processes make the others.

    Raises:
      DataError: a batch could not be made: `batch` raised something, which is named with its place,
        or its worker died, or there is an id outside the vocabulary. Raised at the batch's turn.
      CraftError: what `batch` raised, if that is one.
      ConfigError: the dataset cannot be sent to worker processes.
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
    """Sees that all ids of a batch are in the vocabulary: JAX computes something for any other.

    Args:
      dataset: where the batch is from; one without a `vocab_size` has no ids.
      step: the number of the batch, for messages.
      batch: of `tokens`, `targets` and `source`, integers (B, T), those that it has are checked.
      rows: which rows of the whole batch these are.

    Raises:
      DataError: an id is not in [0, vocab_size).
    """
    vocab_size = vocab_size_of(dataset)
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
            # A target is the token one place later.
            row = place[0] + (rows.start or 0)
            where = dataset.place(step, row, place[1] + (name == "targets"))
        raise DataError(
            f"{origin(dataset)}: batch {step} has the id {ids[tuple(place)]} in {name}{place}"
            f"{where and f' ({where})'}, but the vocabulary has {vocab_size} tokens, from 0; mend "
            "the data, or the dataset's vocab_size"
        )


def prefetch(
    get: Callable[[int], T],
    first: int,
    last: int,
    ahead: int = 2,
    stop: Callable[[], None] = lambda: None,
) -> Iterator[T]:
    """Yields `get(first)`, ..., `get(last - 1)`, keeping up to `ahead` results ready.

    What `get` raises is raised here, at the step it belongs to. Closing the iterator (or leaving
    it) ends the thread, after `stop`, which makes a running `get` return soon.
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
