import math

from craft_jax.training import metrics


def test_from_sums():
    got = metrics.from_sums(loss=20.0, weight=10.0, correct=4.0, num_bytes=25)
    assert got == {
        "loss": 2.0,
        "perplexity": math.exp(2.0),
        "bits_per_byte": 20.0 / math.log(2) / 25,
        "accuracy": 0.4,
        "tokens": 10,
    }


def test_without_text_and_beyond_range():
    got = metrics.from_sums(loss=1e6, weight=1.0, correct=0.0, num_bytes=None)
    assert got["bits_per_byte"] is None
    assert got["perplexity"] == math.inf


def test_of_pairs():
    got = metrics.from_pair_sums(loss=6.0, weight=12.0, correct=9.0, exact=1.0, rows=4.0)
    assert got == {
        "loss": 0.5,
        "perplexity": math.exp(0.5),
        "accuracy": 0.75,
        "exact_match": 0.25,
        "tokens": 12,
        "pairs": 4,
    }
