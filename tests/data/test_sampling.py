import itertools
import time
from fractions import Fraction

import numpy as np
import pytest

from craft_jax.data import sampling
from craft_jax.data.sampling import Mixture, WeightSchedule, mix, pack, shuffled
from craft_jax.errors import ConfigError

ALL = slice(None)


# Shuffles.


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 65536, 65537])
def test_an_epoch_is_a_permutation(count):
    places = np.arange(count)
    found = shuffled(1, 0, places, count)
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), places)
    if count > 10:
        assert not np.array_equal(found, places)
        places = places[:5000]
        for other in (shuffled(1, 1, places, count), shuffled(2, 0, places, count)):
            assert np.count_nonzero(other == found[:5000]) < 20
            assert abs(np.corrcoef(other, found[:5000])[0, 1]) < 0.1


@pytest.mark.parametrize("count", [1000, 10**6, 10**12])
def test_a_place_of_an_epoch_does_not_depend_on_the_others(count):
    places = np.array([0, 7, 999, 500])
    whole = shuffled(3, 5, places, count)
    assert len(set(whole.tolist())) == 4
    assert whole.max() < count
    for place, found in zip(places, whole, strict=True):
        assert shuffled(3, 5, np.array([place]), count).tolist() == [found]


@pytest.mark.parametrize("count", [5000, 65_537, 100_000, 1_000_000, 1_048_577])
def test_a_shuffle_leaves_no_order(count):
    for seed in range(3):
        found = shuffled(seed, 0, np.arange(5000), count)
        other = shuffled(seed, 1, np.arange(5000), count)
        for one, two in (
            (found, np.arange(5000)), (found[:-1], found[1:]), (found[:-2], found[2:]),
            (found, other), (found[:-1], other[1:]),
        ):  # fmt: skip
            assert abs(np.corrcoef(one, two)[0, 1]) < 0.06
        assert np.histogram(found / count, 10, (0, 1))[0].min() > 400


def test_mixed_numbers_depend_on_every_word_and_their_order():
    numbers = mix(1, np.arange(100_000))
    assert numbers.dtype == np.uint64
    assert len(np.unique(numbers)) == 100_000
    assert np.histogram(numbers / 2.0**64, 16, (0, 1))[0].min() > 5900
    assert len({int(mix(*words)) for words in [(1, 2), (2, 1), (1,), (2,), (1, 2, 0), (0, 1)]}) == 6
    assert int(mix(1, 7)) == int(numbers[7])
    # Half of the bits change with one bit of a word.
    changed = [int(mix(5, 9) ^ mix(5, 9 ^ (1 << bit))).bit_count() for bit in range(63)]
    assert 28 < np.mean(changed) < 36


def test_drawn_numbers_are_even():
    found = sampling.drawn(4, np.arange(70_000), 7)
    assert np.bincount(found, minlength=7).min() > 9500
    assert sampling.drawn(4, np.array([11]), 7).tolist() == [found[11]]


# Mixtures.


@pytest.mark.parametrize("text", ["0.7", "0.7:0.2@1000", "1/3", "2", "0:1@5:0.5@9", "1e-2"])
def test_shares_that_can_be_read(text):
    share = WeightSchedule.parse(text)
    assert share.at(0) == Fraction(text.split(":")[0])
    assert share.at(10**9) == Fraction(text.split(":")[-1].split("@")[0])


def test_a_share_changes_at_its_step():
    share = WeightSchedule.parse("0.7:0.2@1000:1@2000")
    assert [share.at(step) for step in (0, 999, 1000, 1999, 2000)] == [
        Fraction(7, 10), Fraction(7, 10), Fraction(1, 5), Fraction(1, 5), 1
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["", "x", "-1", "0.7@3", "0.7:0.2", "1:2@5:3@5", "1:2@5:3@4", "1:2@0", "1:2@-1", "1:2@x"],
)
def test_shares_that_cannot(text):
    with pytest.raises(ValueError):
        WeightSchedule.parse(text)


def mixtures():
    """Random weights of 2 to 6 sources, some of them 0."""
    rng = np.random.default_rng(0)
    for number in range(10):
        weights = rng.integers(0, 20, rng.integers(2, 7))
        weights[rng.integers(len(weights))] += 1
        if number == 0:
            weights = np.array([0, 3, 0])
        if number == 1:
            weights = np.array([1, 99, 400, 500])
        yield weights


@pytest.mark.parametrize("weights", mixtures(), ids=str)
def test_each_source_has_its_share_after_any_number_of_examples(weights):
    batch_size, steps = 3, 10_000
    mixture = Mixture([WeightSchedule.parse(f"{w}") for w in weights], batch_size)
    rows = [mixture.rows(step, ALL) for step in range(steps)]
    source_N = np.concatenate([source_B for source_B, _ in rows])
    number_N = np.concatenate([number_B for _, number_B in rows])
    counts_NK = np.cumsum(source_N[:, None] == np.arange(len(weights)), axis=0)
    wanted_NK = np.arange(1, len(source_N) + 1)[:, None] * weights / weights.sum()
    assert np.abs(counts_NK - wanted_NK).max() < 1
    # Each example of a source comes once, in order.
    for k in range(len(weights)):
        assert np.array_equal(number_N[source_N == k], np.arange(counts_NK[-1, k]))
    for step in (0, 1, 77, steps):
        seen = counts_NK[step * batch_size - 1] if step else np.zeros(len(weights))
        assert np.array_equal(mixture.seen(step), seen)


SCHEDULES = [
    ["0.7:0.2@1000", "0.3"],
    ["1:0@100", "0:1@100", "0:1@5000:3@5001"],
    ["0.5:0.1@3333:0.9@7000", "1", "1/3:2@10"],
]


@pytest.mark.parametrize("texts", SCHEDULES, ids=str)
def test_shares_that_change_are_counted_from_the_change(texts):
    batch_size, steps = 2, 10_000
    shares = [WeightSchedule.parse(text) for text in texts]
    mixture = Mixture(shares, batch_size)
    rows = [mixture.rows(step, ALL) for step in range(steps)]
    source_N = np.concatenate([source_B for source_B, _ in rows])
    number_N = np.concatenate([number_B for _, number_B in rows])
    changes = [*mixture.steps, steps]
    assert changes[1] in (10, 100, 1000)
    for start, stop in itertools.pairwise(changes):
        weights = np.array([float(share.at(start)) for share in shares])
        here = source_N[start * batch_size : stop * batch_size]
        counts_NK = np.cumsum(here[:, None] == np.arange(len(shares)), axis=0)
        wanted_NK = np.arange(1, len(here) + 1)[:, None] * weights / weights.sum()
        assert np.abs(counts_NK - wanted_NK).max() < 1
    for k in range(len(shares)):
        assert np.array_equal(number_N[source_N == k], np.arange(np.sum(source_N == k)))
    for step in (0, 99, 100, 101, 5001, 9999):
        expected = np.bincount(source_N[: step * batch_size], minlength=len(shares))
        assert np.array_equal(mixture.seen(step), expected)


@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 8), slice(5, 6), slice(8, 8), slice(None)])
def test_some_rows_of_a_batch_are_those_of_the_whole(rows):
    mixture = Mixture([WeightSchedule.parse(text) for text in ("0.7:0.2@50", "0.3", "0.17")], 8)
    for step in (0, 1, 49, 50, 51, 12_345, 10**9):
        whole, some = mixture.rows(step, ALL), mixture.rows(step, rows)
        for one, other in zip(whole, some, strict=True):
            assert np.array_equal(one[rows], other)


def test_any_step_takes_constant_time():
    mixture = Mixture(
        [WeightSchedule.parse("0.123"), WeightSchedule.parse("0.877:0.5@1000000")], 64
    )
    seconds = []
    for step in (5, 10**12):
        start = time.perf_counter()
        for n in range(300):
            mixture.rows(step + n, ALL)
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < 10 * seconds[0] + 0.05
    assert mixture.seen(10**12).sum() == 64 * 10**12


def test_weights_that_cannot_be_mixed():
    with pytest.raises(ConfigError, match="at least one weight must be above 0"):
        Mixture([WeightSchedule.parse("1:0@10"), WeightSchedule.parse("0")], 2)
    with pytest.raises(ConfigError, match="use fewer digits"):
        Mixture([WeightSchedule.parse("0.1234567"), WeightSchedule.parse("0.7654321")], 2)


# Packing.


def check_plan(lengths, size):
    plan = pack(lengths, size)
    assert np.array_equal(np.sort(plan.chunks), np.arange(len(lengths)))
    assert len(plan) == len(plan.bounds) - 1
    assert plan.bounds[0] == 0 and plan.bounds[-1] == len(lengths)
    if len(lengths):
        filled = np.add.reduceat(lengths[plan.chunks], plan.bounds[:-1])
        assert filled.max() <= size
        assert filled.sum() == lengths.sum()
        assert (np.diff(plan.bounds) > 0).all()
    return plan


@pytest.mark.parametrize("size", [1, 2, 7, 128, 1000])
def test_each_chunk_is_in_one_row(size):
    rng = np.random.default_rng(size)
    for count in (0, 1, 2, 500):
        check_plan(rng.integers(1, size + 1, count), size)
    check_plan(np.full(50, size), size)
    check_plan(np.full(50, 1), size)


@pytest.mark.parametrize("mean", [20, 100, 300])
def test_rows_are_nearly_full(mean):
    lengths = np.random.default_rng(mean).geometric(1 / mean, 5000).clip(1, 1024)
    plan = check_plan(lengths, 1024)
    assert len(plan) <= -(-lengths.sum() // 1024) * 1.01 + 1


def test_pairs_that_fit_are_found():
    lengths = np.random.default_rng(0).permutation(np.concatenate([range(1, 50), range(51, 100)]))
    assert len(check_plan(lengths, 100)) == 49
    thirds = np.array([6, 4, 3, 7, 5, 5, 10, 1, 9])
    assert len(check_plan(thirds, 10)) == 5


def test_plans_of_many_pieces_are_quick():
    lengths = np.random.default_rng(0).integers(1, 2049, 200_000)
    start = time.perf_counter()
    plan = pack(lengths, 2048)
    assert time.perf_counter() - start < 5
    assert len(plan) <= lengths.sum() / 2048 * 1.01
