import functools
import json
import operator

import numpy as np
import pytest

from craft_jax.data import partition, pipeline, splits
from craft_jax.data.cache.encoding import document_key
from craft_jax.data.settings import DataConfig
from craft_jax.data.sources.formats import TextSpan
from craft_jax.data.splits import SPLITS, Fractions
from tests.conftest import words

BOTH = Fractions(0.1, 0.05)


def keys_of(texts) -> np.ndarray:
    return np.array([document_key([TextSpan(text)]) for text in texts], np.uint64)


def names(keys, fractions) -> list[str]:
    found = splits.by_key(keys, fractions)
    assert set(found) == set(SPLITS)
    every = np.concatenate([found[name] for name in SPLITS])
    assert np.array_equal(np.sort(every), np.arange(len(keys)))  # Disjoint, and all of them.
    assert all(np.all(np.diff(numbers) > 0) for numbers in found.values())
    by_number = {int(n): name for name, numbers in found.items() for n in numbers}
    return [by_number[n] for n in range(len(keys))]


TEXTS = [words(20, seed=n) + str(n) for n in range(5000)]


def test_the_held_out_fraction_is_about_right():
    found = names(keys_of(TEXTS), BOTH)
    assert abs(found.count("val") - 500) < 70
    assert abs(found.count("test") - 250) < 50


def test_documents_keep_their_split_when_others_change():
    keys = keys_of(TEXTS)
    whole = names(keys, BOTH)
    assert names(keys[:1000], BOTH) == whole[:1000]
    assert names(keys[2500:], BOTH) == whole[2500:]
    assert names(keys[::-1], BOTH) == whole[::-1]


def test_a_larger_fraction_keeps_all_held_out():
    keys = keys_of(TEXTS)
    small, large = names(keys, Fractions(0.1)), names(keys, Fractions(0.2))
    assert all(b == "val" for a, b in zip(small, large, strict=True) if a == "val")


def test_equal_documents_stay_together():
    texts = [TEXTS[n % 40] for n in range(400)]
    found = names(keys_of(texts), Fractions(0.3, 0.3))
    for n in range(40):
        assert len(set(found[n::40])) == 1


def test_name_of_agrees_with_by_key():
    keys = keys_of(TEXTS)
    assert [splits.name_of(int(key), BOTH) for key in keys] == names(keys, BOTH)
    edges = [0, 1, 2**64 - 1, int(0.1 * 2**64), int(0.1 * 2**64) - 2000]
    found = [splits.name_of(key, Fractions(0.1)) for key in edges]
    many = np.concatenate([np.array(edges, np.uint64), keys])
    assert found == names(many, Fractions(0.1))[: len(edges)]


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("val_fraction", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_neither_split_is_empty_of_two_documents_or_more(count, val_fraction):
    for seed in range(40):
        keys = keys_of(TEXTS[seed * count : seed * count + count])
        found = names(keys, Fractions(val_fraction))
        assert {"train", "val"} == set(found)


@pytest.mark.parametrize("fractions", [(0.01, 0.01), (0.3, 0.3), (0.5, 0.49), (0.9, 0.01)])
def test_no_split_is_empty_of_three_documents_or_more(fractions):
    for seed in range(40):
        found = names(keys_of(TEXTS[seed * 3 : seed * 3 + 3]), Fractions(*fractions))
        assert set(found) == set(SPLITS)


def test_copies_of_one_text_train():
    for seed in range(40):
        keys = keys_of([TEXTS[seed]] * 12)
        assert names(keys, Fractions(0.5)) == ["train"] * 12
        assert names(keys[:1], Fractions(0.5)) == ["train"]
    assert names(keys_of([]), BOTH) == []
    assert names(keys_of(TEXTS[:9]), Fractions()) == ["train"] * 9


def test_tails_touch():
    for count in (1, 9, 100, 12_345):
        for fractions in (BOTH, Fractions(0.5), Fractions(0, 0.3), Fractions()):
            found = splits.by_position(count, fractions)
            (a, b), (c, d), (e, f) = (found[name] for name in SPLITS)
            assert (a, b, d, f) == (0, c, e, count)
            assert d - c == int(count * fractions.val)
            assert f - e == int(count * fractions.test)


def test_held_out_names():
    assert list(splits.held_out(BOTH)) == ["val", "test"]
    assert list(splits.held_out(Fractions(0, 0.1))) == ["test"]
    assert list(splits.held_out(Fractions())) == []


# Of a prepared source.


def divided(tmp_path, texts, **changes):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in texts]
    path.write_text("\n".join(lines), encoding="utf-8")
    config = DataConfig(**({"path": str(path), "tokenizer": "byte"} | changes))
    (prepared,) = pipeline.prepare(config, tmp_path / "outputs")
    return partition.partition([prepared], config)[0]


def texts_of(part) -> list[str]:
    tokens = part.cache.tokens
    return [part.cache.tokenizer.decode(tokens.read(*s)) for s in part.spans.tolist()]


def test_whole_documents_are_held_out(tmp_path):
    texts = TEXTS[:300]
    parts = divided(tmp_path, texts, val_fraction=0.2, test_fraction=0.1)
    found = {name: texts_of(part) for name, part in parts.items()}
    assert sorted(functools.reduce(operator.iadd, found.values(), [])) == sorted(texts)
    assert 30 < len(found["val"]) < 90
    assert 10 < len(found["test"]) < 60
    for name, part in parts.items():
        assert part.num_bytes == sum(len(text.encode()) for text in found[name])
        assert part.num_tokens == part.num_bytes + len(found[name])
    # Those that train are in the order of the file.
    assert found["train"] == [text for text in texts if text in set(found["train"])]


@pytest.mark.parametrize("hold_out", ["auto", "tail"])
def test_the_end_of_few_documents_is_held_out(tmp_path, hold_out):
    texts = TEXTS[: 9 if hold_out == "auto" else 50]
    parts = divided(tmp_path, texts, val_fraction=0.2, test_fraction=0.1, hold_out=hold_out)
    found = ["".join(texts_of(parts[name])) for name in SPLITS]
    assert "".join(found) == "".join(texts)
    total = sum(part.num_tokens for part in parts.values())
    assert parts["val"].num_tokens == int(total * 0.2)
    assert parts["test"].num_tokens == int(total * 0.1)
    for text, name in zip(found, SPLITS, strict=True):
        assert parts[name].num_bytes == len(text.encode())


def test_whole_documents_of_few(tmp_path):
    parts = divided(tmp_path, TEXTS[:5], val_fraction=0.1, hold_out="documents")
    assert len(texts_of(parts["val"])) == 1
    assert len(texts_of(parts["train"])) == 4
    assert "test" not in parts


def test_the_first_tokens_of_a_split(tmp_path):
    whole = divided(tmp_path, TEXTS[:200], val_fraction=0.3)
    some = divided(tmp_path, TEXTS[:200], val_fraction=0.3, max_val_tokens=500)
    assert some["val"].num_tokens == 500
    text = "".join(texts_of(whole["val"]))
    assert text.startswith("".join(texts_of(some["val"])))
    assert some["val"].num_bytes == len("".join(texts_of(some["val"])).encode())
    assert texts_of(some["train"]) == texts_of(whole["train"])
    more = divided(tmp_path, TEXTS[:200], val_fraction=0.3, max_val_tokens=10**9)
    assert texts_of(more["val"]) == texts_of(whole["val"])
