"""Train, validation and test splits by a hash of the content, so that a document keeps its split.

Equal documents are always in the same split.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "val", "test")
FEWEST = 10
"""With fewer documents, the end of the text is held out instead of whole documents."""


class Fractions(NamedTuple):
    """The fractions that are held out, each in [0, 1), their sum below 1."""

    val: float = 0.0
    test: float = 0.0


def name_of(key: int, fractions: Fractions) -> str:
    """Returns the split of a document by its key, in [0, 2**64)."""
    place = key / 2**64
    if place < fractions.val:
        return "val"
    return "test" if place < fractions.val + fractions.test else "train"


def by_key(keys: np.ndarray, fractions: Fractions) -> dict[str, np.ndarray]:
    """Divides documents, or images, by their keys.

    Items keep their split when others are added or removed, unless a split would be empty: then
    the items with the lowest key of the largest split move there, if others remain.

    Args:
      keys: content hashes, uniform in [0, 2**64), uint64 (M,).
      fractions: see `Fractions`.

    Returns:
      The numbers of each split, ascending, int64.
    """
    distinct_D, which_M = np.unique(keys, return_inverse=True)
    bounds = np.array([fractions.val, fractions.val + fractions.test])
    # The split of each distinct key: 0 val, 1 test, 2 train.
    split_D = np.searchsorted(bounds, distinct_D / 2.0**64, "right")
    wanted = [2, *(n for n, fraction in enumerate(fractions) if fraction)]
    for number in wanted:
        counts = np.bincount(split_D, minlength=3)
        largest = int(counts.argmax())
        # A single document goes to the training split.
        if not counts[number] and counts[largest] > (0 if number == 2 else 1):
            split_D[np.flatnonzero(split_D == largest)[0]] = number
    order = {"val": 0, "test": 1, "train": 2}
    return {name: np.flatnonzero(split_D[which_M] == order[name]) for name in SPLITS}


def by_position(count: int, fractions: Fractions) -> dict[str, tuple[int, int]]:
    """Divides `count` tokens in order into train, val and test: start and stop of each."""
    test = count - int(count * fractions.test)
    val = test - int(count * fractions.val)
    return {"train": (0, val), "val": (val, test), "test": (test, count)}


def held_out(fractions: Fractions) -> Iterator[str]:
    """Yields the names of the splits that are held out."""
    for name, fraction in zip(("val", "test"), fractions, strict=True):
        if fraction:
            yield name
