"""Streams tensors through a mapping: read, transform and hash in threads, write in order.

Memory is bounded: arrays in flight never exceed a budget by more than those of one rule.
"""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from interop.mapping import dtypes
from interop.mapping.table import Mapping, Rule
from interop.mapping.tensors import Tensors

DEFAULT_BUDGET = 256 * 2**20
"""Bytes that may be in flight at once."""

T = TypeVar("T")
R = TypeVar("R")


class Done(NamedTuple):
    """The result of one rule.

    Attributes:
      arrays: the target's tensors by name, contiguous; tied names share one.
      digests: of the target's tensors.
      canonical: digests of the leaves, in their own layout.
      nonfinite: the number of NaN and infinite values of each leaf that has any.
    """

    arrays: dict[str, np.ndarray]
    digests: dict[str, str]
    canonical: dict[str, str]
    nonfinite: dict[str, int]


def workers_or_default(workers: int | None) -> int:
    """Returns the number of threads; the default for None."""
    return workers or min(4, os.cpu_count() or 1)


def forward(
    rules: Mapping, leaves: Tensors, *, workers: int | None = None, budget: int | None = None
) -> Iterator[Done]:
    """Yields the result of each rule, in their order."""

    def carry_out(one: Rule) -> Done:
        sources = {name: leaves[name].read() for name in one.reads}
        canonical = {name: dtypes.digest(sources[name]) for name in one.sources}
        odd = {name: dtypes.count_nonfinite(sources[name]) for name in one.sources}
        results = one.chain.forward(tuple(sources.values()))
        arrays: dict[str, np.ndarray] = {}
        digests: dict[str, str] = {}
        for index, (name, result) in enumerate(zip(one.targets, results, strict=True)):
            if index and result is results[0]:
                first = one.targets[0]
                arrays[name], digests[name] = arrays[first], digests[first]
                continue
            arrays[name] = np.ascontiguousarray(result)
            renamed = not one.ops and one.sources
            digests[name] = canonical[one.sources[0]] if renamed else dtypes.digest(arrays[name])
        return Done(arrays, digests, canonical, {n: count for n, count in odd.items() if count})

    def cost(one: Rule) -> int:
        return 2 * sum(leaves[name].nbytes for name in one.sources)

    yield from ordered(carry_out, rules.rules, cost, workers=workers, budget=budget)


def digests(
    leaves: Tensors, *, workers: int | None = None, budget: int | None = None
) -> dict[str, str]:
    """Returns the digest of every leaf."""
    names = list(leaves)
    found = ordered(
        lambda name: dtypes.digest(leaves[name].read()),
        names,
        lambda name: leaves[name].nbytes,
        workers=workers,
        budget=budget,
    )
    return dict(zip(names, found, strict=True))


class Survey(NamedTuple):
    """Digests and counts from one pass over a model's leaves.

    Attributes:
      digests: of the leaves; empty if not requested.
      nonfinite: the number of NaN and infinite values of each leaf that has any.
    """

    digests: dict[str, str]
    nonfinite: dict[str, int]


def survey(
    leaves: Tensors, *, digests: bool, workers: int | None = None, budget: int | None = None
) -> Survey:
    """Reads every leaf once."""

    def look(name: str) -> tuple[int, str]:
        array = np.ascontiguousarray(leaves[name].read())
        return dtypes.count_nonfinite(array), dtypes.digest(array) if digests else ""

    names = list(leaves)
    costs = {name: 2 * leaves[name].nbytes for name in names}
    found = ordered(look, names, costs.__getitem__, workers=workers, budget=budget)
    rows = dict(zip(names, found, strict=True))
    return Survey(
        {name: digest for name, (_, digest) in rows.items() if digests},
        {name: count for name, (count, _) in rows.items() if count},
    )


def ordered(
    work: Callable[[T], R],
    items: Sequence[T],
    cost: Callable[[T], int],
    *,
    workers: int | None = None,
    budget: int | None = None,
) -> Iterator[R]:
    """Yields `work(item)` in order, computed ahead in threads.

    Args:
      work: the function of an item.
      items: all of them.
      cost: the bytes that an item takes; one that exceeds the budget goes alone.
      workers: threads.
      budget: bytes of all items in flight, including the last one yielded.
    """
    limit = DEFAULT_BUDGET if budget is None else budget
    waiting: collections.deque = collections.deque(items)
    in_flight: collections.deque = collections.deque()
    used = 0
    with concurrent.futures.ThreadPoolExecutor(workers_or_default(workers)) as pool:
        try:
            while waiting or in_flight:
                while waiting and (not in_flight or used + cost(waiting[0]) <= limit):
                    item = waiting.popleft()
                    used += cost(item)
                    in_flight.append((pool.submit(work, item), cost(item)))
                future, bytes_ = in_flight.popleft()
                yield future.result()
                del future
                used -= bytes_
        finally:
            for future, _ in in_flight:
                future.cancel()
