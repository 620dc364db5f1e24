import numpy as np
import pytest

from craft_jax.data import text, tokenizers
from craft_jax.data.text import TrainingWindows, ValidationWindows
from craft_jax.errors import DataError


def windows(n=1000, **options) -> TrainingWindows:
    options = {"seq_len": 10, "batch_size": 4, "seed": 0} | options
    return TrainingWindows(np.arange(n, dtype=np.uint16), **options)


def test_a_batch_is_a_function_of_seed_and_step():
    first, second = windows(), windows()
    for step in (0, 7, 200, 3):
        np.testing.assert_array_equal(first.batch(step)["tokens"], second.batch(step)["tokens"])
    other = windows(seed=1).batch(0)["tokens"]
    assert (first.batch(0)["tokens"] != other).any()


def test_targets_are_the_tokens_one_place_later():
    batch = windows().batch(5)
    assert batch["tokens"].shape == batch["targets"].shape == (4, 10)
    assert batch["tokens"].dtype == np.int32
    np.testing.assert_array_equal(batch["tokens"] + 1, batch["targets"])


def test_an_epoch_visits_every_window_once_and_the_next_lies_elsewhere():
    data = windows(1000, batch_size=1)
    epoch = [data.batch(i)["tokens"][0] for i in range(len(data))]
    starts = sorted(int(window[0]) for window in epoch)
    assert len(starts) == 99
    assert np.diff(starts).tolist() == [10] * 98
    offsets = {int(data.batch(e * len(data))["tokens"][0, 0]) % 10 for e in range(12)}
    assert len(offsets) > 3
    order = [int(window[0]) for window in epoch]
    assert order != starts


@pytest.mark.parametrize("n", [11, 12, 19, 20, 21, 30])
def test_short_streams_stay_within_their_bounds(n):
    data = windows(n, batch_size=3)
    for step in range(20):
        batch = data.batch(step)
        assert batch["tokens"].shape == (3, 10)
        assert batch["targets"].max() < n


@pytest.mark.parametrize("n", [11, 12, 20, 21, 22, 41, 100, 101])
def test_validation_predicts_every_token_but_the_first_once(n):
    data = ValidationWindows(np.arange(n, dtype=np.uint16), seq_len=10, batch_size=3)
    predicted = []
    for step in range(len(data)):
        batch = data.batch(step)
        counted = batch["weights"] > 0
        assert batch["tokens"].shape == (3, 10)
        np.testing.assert_array_equal(batch["tokens"][counted] + 1, batch["targets"][counted])
        predicted += batch["targets"][counted].tolist()
    assert predicted == list(range(1, n))


@pytest.mark.parametrize("kind", [TrainingWindows, ValidationWindows])
def test_a_window_longer_than_the_stream(kind):
    options = {"seed": 0} if kind is TrainingWindows else {}
    with pytest.raises(DataError, match=r"data.seq_len=10 needs at least 11 tokens.*has 10"):
        kind(np.zeros(10, np.uint16), seq_len=10, batch_size=1, **options)


def test_a_text_shorter_than_a_window():
    tokenizer = tokenizers.bytes_()
    data = text.from_text("hello", tokenizer, seq_len=100, batch_size=4)
    assert data.batch(0)["weights"].sum() == 4
    assert data.num_bytes == 5
    with pytest.raises(DataError, match="at least 2"):
        text.from_text("x", tokenizer, seq_len=100, batch_size=4)
    with pytest.raises(DataError, match="does not know"):
        text.from_text("abc", tokenizers.characters("ab", end_token=False), seq_len=9, batch_size=1)


def test_one_pass_of_a_training_set():
    training = windows(101)
    training.tokenizer = tokenizers.bytes_()
    data = training.one_pass()
    total = sum(data.batch(i)["weights"].sum() for i in range(len(data)))
    assert total == 100
