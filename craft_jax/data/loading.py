"""Batches ahead of time: a thread prepares the next ones while the device computes."""

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(get: Callable[[int], T], first: int, last: int, ahead: int = 2) -> Iterator[T]:
    """Yields `get(first)`, ..., `get(last - 1)`, keeping up to `ahead` results ready.

    What `get` raises is raised here, at the step it belongs to. Closing the iterator (or leaving
    it) ends the thread.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
        waiting: collections.deque[Future[T]] = collections.deque()
        try:
            for step in range(first, last):
                while len(waiting) <= ahead and step + len(waiting) < last:
                    waiting.append(pool.submit(get, step + len(waiting)))
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
