"""Which example comes when: shuffles, random starts, mixtures and packing plans, in numpy.

Everything here is arithmetic on numbers of examples: from (seed, n) to the place of example n,
without state and in constant time, so that any step can be resumed, and any row of a batch made,
alone.
"""

import bisect
import functools
import importlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from craft_jax.errors import ConfigError

_SMALL = 1 << 16
_MAX_PERIOD = 100_000


def mix(*words: int | np.ndarray) -> np.ndarray:
    """Returns well-mixed 64-bit numbers of any number of words, uint64, elementwise.

    The finaliser of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number
    generators"), applied word by word.
    """
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for word in words:
            state = state ^ np.asarray(word).astype(np.uint64)
            state = state + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def shuffled(seed: int, epoch: int, places: np.ndarray, count: int) -> np.ndarray:
    """Returns which of `count` examples stand at these places of an epoch, int64.

    Each epoch is a permutation of its own. Of many examples Grain's index shuffle, a block cipher,
    works a place out by itself; of few, it would try too many numbers, and a permutation is kept.
    """
    if count <= _SMALL:
        return _permutation(seed, epoch, count)[places]
    # Grain's own 4 rounds leave neighbours alike, with correlations of up to 0.5. Of 4**k + 1
    # numbers it hits some twice: then one more is shuffled, and passed over.
    last = count - 1 if (count - 1).bit_count() > 1 else count
    key = int(mix(seed, epoch)) & 0xFFFFFFFF
    shuffle = functools.partial(_index_shuffle(), max_index=last, seed=key, rounds=12)
    found = [shuffle(int(n)) for n in places]
    return np.array([shuffle(n) if n == count else n for n in found], np.int64)


def places(seed: int, numbers: np.ndarray, count: int) -> np.ndarray:
    """Returns which of `count` examples the examples of these numbers are, epoch after epoch."""
    epochs = numbers // count
    found = np.empty(len(numbers), np.int64)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        found[here] = shuffled(seed, epoch, numbers[here] - epoch * count, count)
    return found


@functools.cache
def _index_shuffle() -> Callable[..., int]:
    # Grain imports JAX, which the processes that make batches of few examples do without.
    return importlib.import_module("grain").experimental.index_shuffle


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def drawn(seed: int, numbers: np.ndarray, count: int) -> np.ndarray:
    """Returns a random number below `count` for each number of an example, int64."""
    return (mix(seed, numbers) % np.uint64(count)).astype(np.int64)


# Mixtures.


class Share(NamedTuple):
    """How much of a mixture a source is.

    Attributes:
      steps: the batches from which on each weight holds; the first is 0.
      weights: as many, not negative.
    """

    steps: tuple[int, ...]
    weights: tuple[Fraction, ...]

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Reads `0.7`, or `0.7:0.2@1000`: 0.2 from batch 1000 on.

        Raises:
          ValueError: it is neither.
        """
        steps, weights = [0], []
        for n, word in enumerate(text.split(":")):
            weight, at, step = word.partition("@")
            if bool(at) != bool(n):
                raise ValueError("the first weight has no @STEP, and each other has one")
            if n and not step.strip().isdecimal():
                raise ValueError(f"@{step} is no number of a batch")
            weights.append(Fraction(weight.strip()))
            if n:
                steps.append(int(step))
        if any(w < 0 for w in weights) or steps != sorted(set(steps)):
            raise ValueError("weights are not negative, and steps ascend")
        return cls(tuple(steps), tuple(weights))

    def at(self, step: int) -> Fraction:
        """Returns the weight of a batch."""
        return self.weights[bisect.bisect_right(self.steps, step) - 1]


class _Period(NamedTuple):
    """A mixture of constant weights, which repeats itself.

    Attributes:
      source_P: which source each example of a period is from.
      before_PK: how many of each source come before each example, and, in the last row, in all.
    """

    source_P: np.ndarray
    before_PK: np.ndarray


class Mixture:
    """Interleaves sources so that after any number of examples each has its share, to within one.

    Where weights change, the counting starts anew.

    Args:
      shares: of each source; at every step one weight at least is not 0.
      batch_size: examples of a batch, B.

    Raises:
      ConfigError: weights of too many digits, or nothing but zeros.
    """

    def __init__(self, shares: Sequence[Share], batch_size: int):
        self.batch_size, self.count = batch_size, len(shares)
        self.steps = sorted({step for share in shares for step in share.steps})
        self._periods = [_period(tuple(s.at(step) for s in shares)) for step in self.steps]
        firsts = [np.zeros(len(shares), np.int64)]
        for n, (start, stop) in enumerate(zip(self.steps, self.steps[1:], strict=False)):
            firsts.append(firsts[-1] + self._counts(n, (stop - start) * batch_size))
        self._firsts = firsts

    def _counts(self, segment: int, examples: int) -> np.ndarray:
        source_P, before_PK = self._periods[segment]
        whole, rest = divmod(examples, len(source_P))
        return whole * before_PK[-1] + before_PK[rest]

    def rows(self, step: int, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Returns of some rows of a batch which source they are from, and which example of it."""
        segment = bisect.bisect_right(self.steps, step) - 1
        source_P, before_PK = self._periods[segment]
        first = (step - self.steps[segment]) * self.batch_size
        example_B = first + np.arange(self.batch_size, dtype=np.int64)[rows]
        whole_B, place_B = np.divmod(example_B, len(source_P))
        source_B = source_P[place_B]
        number_B = whole_B * before_PK[-1, source_B] + before_PK[place_B, source_B]
        return source_B, self._firsts[segment][source_B] + number_B

    def seen(self, step: int) -> np.ndarray:
        """Returns how many examples of each source the batches before a step hold, int64 (K,)."""
        segment = bisect.bisect_right(self.steps, step) - 1
        examples = (step - self.steps[segment]) * self.batch_size
        return self._firsts[segment] + self._counts(segment, examples)


@functools.lru_cache(maxsize=64)
def _period(weights: tuple[Fraction, ...]) -> _Period:
    """Returns the fairest order of sources with these weights.

    Of the sources that may take the next example without getting too far ahead, the one that would
    first fall too far behind takes it (Tijdeman 1980, "The chairman assignment problem"): then the
    number of examples of each, after n of them all, differs from its share of n by less than 1.
    """
    total = sum(weights)
    if not total:
        raise ConfigError("data.mixture: at each step one weight at least must be above 0")
    shares = [weight / total for weight in weights]
    length = math.lcm(*(share.denominator for share in shares))
    if length > _MAX_PERIOD:
        raise ConfigError(
            f"data.mixture: the weights {', '.join(str(float(w)) for w in weights)} repeat only "
            f"after {length} examples, more than {_MAX_PERIOD}; use fewer digits"
        )
    parts = [int(share * length) for share in shares]
    live = [k for k, part in enumerate(parts) if part]
    slack = 1 / max(2 * len(live) - 2, 1)
    taken = [0] * len(parts)
    source_P = np.zeros(length, np.int64)
    before_PK = np.zeros((length + 1, len(parts)), np.int64)
    for n in range(length):
        owed = {k: parts[k] * (n + 1) / length - taken[k] for k in live}
        fair = [k for k in live if owed[k] >= slack - 1e-9]
        chosen = min(fair, key=lambda k: ((1 - slack - owed[k]) * length / parts[k], k))
        source_P[n] = chosen
        taken[chosen] += 1
        before_PK[n + 1] = taken
    return _Period(source_P, before_PK)


# Packing.


class Packing(NamedTuple):
    """Which pieces of documents stand together in a row.

    Attributes:
      pieces: numbers of pieces, row after row, int64 (M,).
      bounds: where each row begins in it, and the end of the last, int64 (R + 1,).
    """

    pieces: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1


def pack(lengths: np.ndarray, size: int) -> Packing:
    """Puts pieces into as few rows as it can: the longest first, each where it fits best.

    Best-fit decreasing needs at most 11/9 of the fewest rows, and 6/9 of one more (Dosa 2007), and
    with pieces of many lengths hardly one more. The plan depends on the lengths alone.

    Args:
      lengths: of each piece, from 1 to `size`, int (M,).
      size: of a row.
    """
    order = np.argsort(-lengths, kind="stable")
    whole = int(np.count_nonzero(lengths == size))
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = defaultdict(list)  # By the room that is left.
    rooms: list[int] = []  # The keys of it, ascending.
    for piece, length in zip(order[whole:].tolist(), lengths[order[whole:]].tolist(), strict=True):
        place = bisect.bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[place]
            rows[row].append(piece)
        else:
            room, row = size, len(rows)
            rows.append([piece])
        if left := room - length:
            if left not in open_rows:
                bisect.insort(rooms, left)
            open_rows[left].append(row)
    counts = np.array([1] * whole + [len(row) for row in rows], np.int64)
    found = np.array([piece for row in rows for piece in row], np.int64)
    return Packing(np.concatenate([order[:whole], found]), np.cumsum([0, *counts]))
