"""Which example comes when: shuffles, random starts, mixtures and packing plans, in numpy.

Everything here is arithmetic on example numbers: from (seed, n) to the index of example n, without
state and in constant time, so that any step can be resumed and any row of a batch computed alone.
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


def shuffled(seed: int, epoch: int, indices: np.ndarray, count: int) -> np.ndarray:
    """Returns the examples, of `count`, at these indices of an epoch, int64.

    Each epoch is a permutation of its own. For many examples Grain's index shuffle, a block cipher,
    computes single entries; for few it would need too many trials, and the permutation is cached.
    """
    if count <= _SMALL:
        return _permutation(seed, epoch, count)[indices]
    # Grain's default of 4 rounds leaves correlations of up to 0.5 between neighbours. With 4**k + 1
    # numbers it repeats some: then one number more is shuffled, and skipped.
    last = count - 1 if (count - 1).bit_count() > 1 else count
    key = int(mix(seed, epoch)) & 0xFFFFFFFF
    shuffle = functools.partial(_index_shuffle(), max_index=last, seed=key, rounds=12)
    found = [shuffle(int(n)) for n in indices]
    return np.array([shuffle(n) if n == count else n for n in found], np.int64)


def example_indices(seed: int, numbers: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices in [0, `count`) of examples numbered through all epochs, int64."""
    epochs = numbers // count
    found = np.empty(len(numbers), np.int64)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        found[here] = shuffled(seed, epoch, numbers[here] - epoch * count, count)
    return found


@functools.cache
def _index_shuffle() -> Callable[..., int]:
    # Grain imports JAX, which worker processes with few examples do not need.
    return importlib.import_module("grain").experimental.index_shuffle


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def drawn(seed: int, numbers: np.ndarray, count: int) -> np.ndarray:
    """Returns a random number below `count` for each example number, int64."""
    return (mix(seed, numbers) % np.uint64(count)).astype(np.int64)


# Mixtures.


class WeightSchedule(NamedTuple):
    """The weight of a source in a mixture, piecewise constant.

    Attributes:
      steps: the first batch of each weight, ascending from 0.
      weights: one for each of `steps`, not negative.
    """

    steps: tuple[int, ...]
    weights: tuple[Fraction, ...]

    @classmethod
    def parse(cls, text: str) -> "WeightSchedule":
        """Reads `0.7`, or `0.7:0.2@1000`: 0.2 from batch 1000 on.

        Raises:
          ValueError: it is neither.
        """
        steps, weights = [0], []
        for n, word in enumerate(text.split(":")):
            weight, at, step = word.partition("@")
            if bool(at) != bool(n):
                raise ValueError("every weight but the first needs @STEP")
            if n and not step.strip().isdecimal():
                raise ValueError(f"@{step} is not a batch number")
            weights.append(Fraction(weight.strip()))
            if n:
                steps.append(int(step))
        if any(w < 0 for w in weights) or steps != sorted(set(steps)):
            raise ValueError("weights must not be negative, and steps must ascend")
        return cls(tuple(steps), tuple(weights))

    def at(self, step: int) -> Fraction:
        """Returns the weight of a batch."""
        return self.weights[bisect.bisect_right(self.steps, step) - 1]


class _Period(NamedTuple):
    """The repeating order of a mixture with constant weights.

    Attributes:
      source_P: the source of each example of a period.
      before_PK: the examples of each source before each example; in the last row, their total.
    """

    source_P: np.ndarray
    before_PK: np.ndarray


class Mixture:
    """Interleaves sources so that each is within one example of its weight at any time.

    Counting restarts where weights change.

    Args:
      weights: of each source; at every step at least one is above 0.
      batch_size: examples of a batch, B.

    Raises:
      ConfigError: weights with too many digits, or all 0.
    """

    def __init__(self, weights: Sequence[WeightSchedule], batch_size: int):
        self.batch_size, self.count = batch_size, len(weights)
        self.steps = sorted({step for weight in weights for step in weight.steps})
        self._periods = [_period(tuple(w.at(step) for w in weights)) for step in self.steps]
        firsts = [np.zeros(len(weights), np.int64)]
        for n, (start, stop) in enumerate(zip(self.steps, self.steps[1:], strict=False)):
            firsts.append(firsts[-1] + self._counts(n, (stop - start) * batch_size))
        self._firsts = firsts

    def _counts(self, segment: int, examples: int) -> np.ndarray:
        source_P, before_PK = self._periods[segment]
        whole, rest = divmod(examples, len(source_P))
        return whole * before_PK[-1] + before_PK[rest]

    def rows(self, step: int, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source of some rows of a batch, and their example numbers in it."""
        segment = bisect.bisect_right(self.steps, step) - 1
        source_P, before_PK = self._periods[segment]
        first = (step - self.steps[segment]) * self.batch_size
        example_B = first + np.arange(self.batch_size, dtype=np.int64)[rows]
        whole_B, index_B = np.divmod(example_B, len(source_P))
        source_B = source_P[index_B]
        number_B = whole_B * before_PK[-1, source_B] + before_PK[index_B, source_B]
        return source_B, self._firsts[segment][source_B] + number_B

    def seen(self, step: int) -> np.ndarray:
        """Returns the examples of each source in the batches before a step, int64 (K,)."""
        segment = bisect.bisect_right(self.steps, step) - 1
        examples = (step - self.steps[segment]) * self.batch_size
        return self._firsts[segment] + self._counts(segment, examples)


@functools.lru_cache(maxsize=64)
def _period(weights: tuple[Fraction, ...]) -> _Period:
    """Returns the fairest order of sources with these weights.

    Each example comes from the source with the earliest deadline among those not ahead (Tijdeman
    1980, "The chairman assignment problem"): after n examples, the count of each source differs
    from its share of n by less than 1.
    """
    total = sum(weights)
    if not total:
        raise ConfigError("data.mixture: at least one weight must be above 0 at each step")
    shares = [weight / total for weight in weights]
    length = math.lcm(*(share.denominator for share in shares))
    if length > _MAX_PERIOD:
        raise ConfigError(
            f"data.mixture: the weights {', '.join(str(float(w)) for w in weights)} repeat only "
            f"after {length} examples, more than {_MAX_PERIOD}; use fewer digits"
        )
    counts = [int(share * length) for share in shares]
    positive = [k for k, count in enumerate(counts) if count]
    slack = 1 / max(2 * len(positive) - 2, 1)
    taken = [0] * len(counts)
    source_P = np.zeros(length, np.int64)
    before_PK = np.zeros((length + 1, len(counts)), np.int64)
    for n in range(length):
        owed = {k: counts[k] * (n + 1) / length - taken[k] for k in positive}
        fair = [k for k in positive if owed[k] >= slack - 1e-9]
        chosen = min(fair, key=lambda k: ((1 - slack - owed[k]) * length / counts[k], k))
        source_P[n] = chosen
        taken[chosen] += 1
        before_PK[n + 1] = taken
    return _Period(source_P, before_PK)


# Packing.


class Packing(NamedTuple):
    """The chunks of documents in each row.

    Attributes:
      chunks: chunk numbers, row after row, int64 (M,).
      bounds: start of each row in `chunks`, and end of the last, int64 (R + 1,).
    """

    chunks: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1


def pack(lengths: np.ndarray, size: int) -> Packing:
    """Packs chunks into few rows by best-fit decreasing.

    It needs at most 11/9 of the fewest rows plus 6/9 of a row (Dosa 2007), and with varied lengths
    rarely more than one extra. The plan depends on the lengths alone.

    Args:
      lengths: of each chunk, from 1 to `size`, int (M,).
      size: of a row.
    """
    order = np.argsort(-lengths, kind="stable")
    whole = int(np.count_nonzero(lengths == size))
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = defaultdict(list)  # By remaining room.
    rooms: list[int] = []  # Its keys, ascending.
    for chunk, length in zip(order[whole:].tolist(), lengths[order[whole:]].tolist(), strict=True):
        best = bisect.bisect_left(rooms, length)
        if best < len(rooms):
            room = rooms[best]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[best]
            rows[row].append(chunk)
        else:
            room, row = size, len(rows)
            rows.append([chunk])
        if left := room - length:
            if left not in open_rows:
                bisect.insort(rooms, left)
            open_rows[left].append(row)
    counts = np.array([1] * whole + [len(row) for row in rows], np.int64)
    found = np.array([chunk for row in rows for chunk in row], np.int64)
    return Packing(np.concatenate([order[:whole], found]), np.cumsum([0, *counts]))
