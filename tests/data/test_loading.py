import threading
import time

import pytest

from craft_jax.data.loading import prefetch


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_in_order_and_complete(ahead):
    assert list(prefetch(lambda i: i * i, 3, 9, ahead)) == [9, 16, 25, 36, 49, 64]


def test_nothing_to_do():
    assert list(prefetch(lambda i: i, 4, 4)) == []


def test_it_works_ahead_but_not_too_far():
    asked = []
    batches = prefetch(lambda i: asked.append(i) or i, 0, 100, ahead=3)
    assert next(batches) == 0
    time.sleep(0.05)
    assert asked == [0, 1, 2, 3][: len(asked)]
    batches.close()


def test_an_error_is_raised_at_its_step():
    def get(i):
        if i == 2:
            raise ValueError("broken")
        return i

    batches = prefetch(get, 0, 5)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ValueError, match="broken"):
        next(batches)


def test_closing_ends_the_thread():
    batches = prefetch(lambda i: i, 0, 100)
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("loader")]
