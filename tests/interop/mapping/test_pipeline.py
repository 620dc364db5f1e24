import collections
import dataclasses
import functools
import threading
import time

import numpy as np
import pytest

from interop.mapping import pipeline
from interop.mapping.tensors import lazy, same_bits
from interop.targets.registry import TARGETS
from tests.interop.models import random_leaves, spec


def test_results_come_in_order_and_work_is_bounded():
    under_way, most, lock = set(), [], threading.Lock()

    def work(item):
        with lock:
            under_way.add(item)
            most.append(len(under_way))
        time.sleep(0.002 * (item % 3))
        return item

    found = []
    for item in pipeline.ordered(work, range(40), lambda item: 10, workers=4, budget=30):
        found.append(item)
        with lock:
            under_way.discard(item)
    assert found == list(range(40))
    assert 2 <= max(most) <= 3


def test_items_beyond_the_budget_go_alone():
    alone = []
    active = set()

    def work(item):
        active.add(item)
        alone.append(len(active))
        return item

    for item in pipeline.ordered(work, range(5), lambda item: 100, workers=4, budget=10):
        active.discard(item)
    assert alone == [1] * 5


def test_an_error_of_the_work_arrives():
    def work(item):
        if item == 3:
            raise KeyError("three")
        return item

    with pytest.raises(KeyError, match="three"):
        list(pipeline.ordered(work, range(9), lambda item: 1))


@pytest.mark.parametrize("workers", [1, 4])
def test_forward_gives_tensors_and_both_digests(workers):
    known = spec(d_ff=192)
    leaves = random_leaves(known)
    rules = TARGETS["nanogpt"].mapping(known)
    made, digests, canonical = {}, {}, {}
    for done in pipeline.forward(rules, leaves, workers=workers, budget=1):
        made |= done.arrays
        digests |= done.digests
        canonical |= done.canonical
        assert done.nonfinite == {}
    lazy = rules.forward(leaves)
    assert all(same_bits(made[n], np.ascontiguousarray(t.read())) for n, t in lazy.items())
    assert made["lm_head.weight"] is made["transformer.wte.weight"]
    assert canonical == pipeline.digests(leaves, workers=workers)
    assert set(digests) == set(lazy)


def test_a_survey_reads_each_leaf_once():
    leaves = random_leaves(spec(num_layers=1))
    odd = leaves["final_norm.bias"].read().copy()
    odd[:2] = [np.nan, np.inf]
    reads = collections.Counter()

    def counted(name, array):
        reads[name] += 1
        return array

    watched = {
        name: dataclasses.replace(leaf, read=functools.partial(counted, name, leaf.read()))
        for name, leaf in (leaves | {"final_norm.bias": lazy(odd)}).items()
    }
    found = pipeline.survey(watched, digests=True)
    assert found.nonfinite == {"final_norm.bias": 2}
    assert set(reads) == set(leaves) and set(reads.values()) == {1}
    assert found.digests == pipeline.digests(watched)
    assert pipeline.survey(watched, digests=False).digests == {}
