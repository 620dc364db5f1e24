"""Plans of shards, their index, and sizes with units."""

import numpy as np
import pytest

from interop.files.shards import Shard, index_json, parse_size, plan_shards
from interop.mapping.tensors import Abstract


def floats(*counts: int) -> dict[str, Abstract]:
    return {f"t{i}": Abstract((n,), np.dtype(np.float32)) for i, n in enumerate(counts)}


def groups(tensors: dict[str, Abstract], limit: int) -> list[tuple[str, ...]]:
    return [one.names for one in plan_shards(tensors, limit)]


def test_small_models_are_one_file():
    assert plan_shards(floats(2, 3), 20) == [Shard("model.safetensors", ("t0", "t1"))]
    assert plan_shards({}, 20) == [Shard("model.safetensors", ())]


def test_one_byte_less_than_all_makes_two_files():
    assert plan_shards(floats(2, 3), 19) == [
        Shard("model-00001-of-00002.safetensors", ("t0",)),
        Shard("model-00002-of-00002.safetensors", ("t1",)),
    ]


def test_shards_are_filled_in_order():
    assert groups(floats(1, 1, 1, 1, 1), 8) == [("t0", "t1"), ("t2", "t3"), ("t4",)]
    assert groups(floats(1, 2, 1), 8) == [("t0",), ("t1",), ("t2",)]


def test_a_larger_tensor_is_alone():
    assert groups(floats(1, 9, 1, 1), 8) == [("t0",), ("t1",), ("t2", "t3")]
    assert groups(floats(9, 1), 8) == [("t0",), ("t1",)]
    assert groups(floats(9), 8) == [("t0",)]
    assert plan_shards(floats(9), 8)[0].file == "model.safetensors"


def test_a_limit_of_one_byte_gives_each_tensor_its_file():
    assert groups(floats(1, 1, 1), 1) == [("t0",), ("t1",), ("t2",)]
    assert groups(floats(0, 0), 1) == [("t0", "t1")]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_byte(limit):
    with pytest.raises(ValueError, match=str(limit)):
        plan_shards(floats(1), limit)


@pytest.mark.parametrize("limit", range(1, 60))
def test_every_plan_keeps_every_tensor_and_the_limit(limit):
    tensors = floats(3, 0, 1, 7, 2, 2, 5, 0, 1, 12, 1)
    shards = plan_shards(tensors, limit)
    assert [name for one in shards for name in one.names] == list(tensors)
    assert all(
        len(one.names) == 1 or sum(tensors[name].nbytes for name in one.names) <= limit
        for one in shards
    )


@pytest.mark.torch
@pytest.mark.parametrize("limit", [8, 9, 20, 1000])
def test_plans_are_those_of_the_hub(limit):
    hub = pytest.importorskip("huggingface_hub")
    torch = pytest.importorskip("torch")
    tensors = {f"t{i}": torch.zeros(n) for i, n in enumerate([1, 2, 2, 1, 1])}
    theirs = hub.split_torch_state_dict_into_shards(tensors, max_shard_size=limit)
    ours = plan_shards(floats(1, 2, 2, 1, 1), limit)
    assert {one.file: list(one.names) for one in ours} == theirs.filename_to_tensors
    total = index_json(ours, floats(1, 2, 2, 1, 1))["metadata"]["total_size"]
    assert total == theirs.metadata["total_size"]


def test_the_index_counts_and_sorts():
    tensors = {
        "b": Abstract((2, 3), np.dtype(np.float32)),
        "c": Abstract((), np.dtype(np.float64)),
        "a": Abstract((5,), np.dtype(np.int8)),
    }
    found = index_json(plan_shards(tensors, 24), tensors)
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    assert found == {
        "metadata": {"total_parameters": 12, "total_size": 37},
        "weight_map": {"a": second, "b": first, "c": second},
    }
    assert list(found["weight_map"]) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5GiB", 5 * 2**30),
        ("1", 1),
        ("1000", 1000),
        ("7B", 7),
        ("2KB", 2000),
        ("2KiB", 2048),
        ("3MB", 3_000_000),
        ("3MiB", 3 * 2**20),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        (" 10 mb ", 10_000_000),
        ("1.5GB", 1_500_000_000),
        ("0.5KiB", 512),
        ("0.1GB", 10**8),
        (12, 12),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_sizes(text, size):
    found = parse_size(text)
    assert found == size and type(found) is int


@pytest.mark.parametrize(
    "text",
    [
        *("", "0", "0GB", "-1", "-5GB", "GB", "5 G", "5XB", "five", "1e9", "nan", "inf", "1_000"),
        *(
            "1.5",
            "1.0005KB",
            "1,5GB",
            "1.GB",
            ".5GB",
            "0.3",
            "0.0001KB",
            "5GBs",
            "5\n0",
            "٣",
            "9223372036854775808",
        ),
        *("9" * 5000, "x" * 5000, "0x10", "5GB 5GB", 0, -1, True, 2.5, None),
    ],
)
def test_invalid_sizes(text):
    with pytest.raises(ValueError) as caught:
        parse_size(text)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 250
