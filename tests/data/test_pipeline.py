import dataclasses
import json

import numpy as np
import pytest

from craft_jax import schema
from craft_jax.data import loading, pipeline
from craft_jax.data.settings import DataConfig
from craft_jax.errors import ConfigError, DataError, UsageError
from tests.conftest import words

OWN = """
import numpy as np
from craft_jax.data.base import Dataset

class Squares(Dataset):
    vocab_size = 17

    def __init__(self, config, split, seed):
        self.shape = (config.batch_size, config.seq_len)

    def __len__(self):
        return 3

    def batch(self, step):
        tokens = np.full(self.shape, step % 17, np.int32)
        return {"tokens": tokens, "targets": tokens}

class NeedsNothing(Dataset):
    def __init__(self): ...
    def __len__(self): ...
    def batch(self, step): ...
"""


def config(path, **changes) -> DataConfig:
    values = {"path": str(path), "tokenizer": "char", "seq_len": 8, "batch_size": 2} | changes
    return DataConfig(**values)


def test_both_splits(text_file, workdir):
    data = pipeline.open_datasets(config(text_file), workdir=workdir, seed=0)
    assert data.train.vocab_size == data.val.vocab_size == data.train.tokenizer.vocab_size
    assert data.train.fingerprint == data.val.fingerprint != ""
    assert data.val.name == "words"
    assert data.train.batch(0)["tokens"].shape == (2, 8)


def test_no_validation_split(text_file, workdir):
    data = pipeline.open_datasets(config(text_file, val_fraction=0.0), workdir=workdir, seed=0)
    assert data.val is None


def test_a_run_continues_with_its_own_tokenizer(text_file, workdir):
    def cached(kind, tokenizer=None):
        own = config(text_file, tokenizer=kind, vocab_size=300)
        (prepared,) = pipeline.prepare(own, workdir, tokenizer)
        return prepared.caches["train"]

    first = cached("bpe")
    assert cached("bpe", first.tokenizer).digest == first.digest
    assert cached("byte", first.tokenizer).tokenizer.digest == first.tokenizer.digest


def test_a_dataset_of_the_users_own(tmp_path, workdir):
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    own = DataConfig(dataset=f"{tmp_path / 'own.py'}:Squares", seq_len=5, batch_size=3)
    data = pipeline.open_datasets(own, workdir=workdir, seed=0)
    assert data.train.vocab_size == 17
    np.testing.assert_array_equal(data.train.batch(18)["tokens"], np.ones((3, 5)))
    wrong = DataConfig(dataset=f"{tmp_path / 'own.py'}:NeedsNothing")
    with pytest.raises(ConfigError, match=r"built as Class\(config, split, seed\)"):
        pipeline.open_datasets(wrong, workdir=workdir, seed=0)


def test_pairs(tmp_path, workdir):
    own = DataConfig(pairs="sort", num_pairs=30, tokenizer="char", seq_len=12, batch_size=4)
    data = pipeline.open_datasets(own, workdir=workdir, seed=0)
    assert data.train.batch(0)["source"].shape == (4, 12)
    assert data.val.fingerprint == data.train.fingerprint
    # A run continues with its own tokenizer, whatever the config says.
    bpe = dataclasses.replace(own, tokenizer="bpe")
    again = pipeline.open_datasets(bpe, workdir=workdir, seed=0, tokenizer=data.train.tokenizer)
    assert again.train.fingerprint == data.train.fingerprint
    bare = dataclasses.replace(own, tokenizer=None)
    with pytest.raises(UsageError, match="the model has no tokenizer"):
        pipeline.open_datasets(bare, workdir=workdir, seed=0)
    assert not workdir.exists()


def test_contradictions():
    assert schema.problems(DataConfig(), "data") == []
    assert "contradicts" in schema.problems(DataConfig(pairs="sort", path="x"), "data")[0]
    assert "needs data.path" in schema.problems(DataConfig(source="files"), "data")[0]
    assert "contradicts" in schema.problems(DataConfig(source="stdlib", path="x"), "data")[0]


# Batches by number.


def texts(tmp_path):
    """Three sources: a file, lines of JSON, and documents with a separator."""
    (tmp_path / "a.txt").write_text(words(2500), encoding="utf-8")
    lines = [json.dumps({"text": words(n % 40 + 1, seed=n)}) for n in range(200)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "c.txt").write_text("naïve 漢字 🙂 " * 300, encoding="utf-8")
    return [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.txt")]


KINDS = {
    "windows": {},
    "random": {"order": "random"},
    "packed": {"layout": "packed"},
    "rows": {"layout": "rows"},
    "mixture": {"mixture": True},
    "packed_mixture": {"mixture": True, "layout": "packed"},
}


def opened(tmp_path, seed=3, **changes):
    paths = texts(tmp_path)
    values = {"tokenizer": "byte", "seq_len": 16, "batch_size": 8} | changes
    if values.pop("mixture", None):
        weights = ("0.5:0.1@40", "0.3", "0.2:0.7@40")
        values["mixture"] = tuple(f"{p}={w}" for p, w in zip(paths, weights, strict=True))
    else:
        values["path"] = paths[1]
    config = DataConfig(**values)
    return pipeline.open_datasets(config, workdir=tmp_path / "outputs", seed=seed)


def load(data, first, last, workers=0, rows=slice(None)):
    return [
        {name: array.copy() for name, array in batch.items()}
        for batch in loading.load_batches(
            data, first, last, workers=workers, ahead=2, then=lambda batch: batch, rows=rows
        )
    ]


def assert_equal(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_batches_do_not_depend_on_the_process(tmp_path, kind):
    train = opened(tmp_path, **KINDS[kind]).train
    expected = [train.batch(step) for step in range(50)]
    assert_equal(load(opened(tmp_path, **KINDS[kind]).train, 0, 50), expected)
    # Any number of hosts that each make their rows.
    for hosts in (1, 2, 4):
        parts = [slice(n * 8 // hosts, (n + 1) * 8 // hosts) for n in range(hosts)]
        made = [load(train, 0, 50, rows=part) for part in parts]
        whole = [{k: np.concatenate([b[k] for b in bs]) for k in bs[0]}
                 for bs in zip(*made, strict=True)]  # fmt: skip
        assert_equal(whole, expected)
    # From any step on, the ends of epochs among them.
    count = len(train)
    for first in (1, 7, 39, 40, 41, count - 1, count, count + 1, 49):
        if first < 50:
            assert_equal(load(train, first, 50), expected[first:])
    other = opened(tmp_path, seed=4, **KINDS[kind]).train
    assert any((other.batch(n)["tokens"] != expected[n]["tokens"]).any() for n in range(3))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_do_not_depend_on_the_number_of_workers(tmp_path, workers):
    train = opened(tmp_path, **KINDS["packed_mixture"]).train
    expected = [train.batch(step) for step in range(35, 50)]
    assert_equal(load(train, 35, 50, workers), expected)
    some = load(train, 41, 50, workers, slice(4, 8))
    assert_equal(some, [{k: v[4:8] for k, v in batch.items()} for batch in expected[6:]])


def test_a_mixture_gives_each_source_its_share(tmp_path):
    data = opened(tmp_path, mixture=True)
    assert [rows.is_packed for rows in data.train.sources] == [False] * 3
    source_N = np.concatenate([data.train.mixture.rows(step, slice(None))[0] for step in range(40)])
    assert np.bincount(source_N).tolist() == [160, 96, 64]
    assert data.train.name == "a_b_c"
    assert data.val is not None
    found = sum(data.val.batch(step)["weights"].sum() for step in range(len(data.val)))
    assert found == sum(len(rows.stream) - 1 for rows in data.val.sources)


def test_other_batches_have_another_fingerprint(tmp_path):
    changes = [
        {}, {"mixture": True}, {"layout": "packed"}, {"order": "random"}, {"val_fraction": 0.2},
        {"test_fraction": 0.1}, {"hold_out": "tail"}, {"tokenizer": "char"},
    ]  # fmt: skip
    found = [opened(tmp_path, **change).train.fingerprint for change in changes]
    assert len(set(found)) == len(changes)
    assert opened(tmp_path).train.fingerprint == found[0]


def test_named_splits(tmp_path):
    a, b, c = texts(tmp_path)
    own = config(a, tokenizer="byte", val_split=c, test_split=b)
    data = pipeline.open_datasets(own, workdir=tmp_path / "outputs", seed=0)
    assert data.train.num_bytes == len((tmp_path / "a.txt").read_bytes())
    assert data.val.num_bytes == len((tmp_path / "c.txt").read_bytes())
    assert data.test.fingerprint == data.train.fingerprint
    bare = pipeline.open_datasets(config(a, tokenizer="byte"), workdir=tmp_path / "o", seed=0)
    assert bare.train.fingerprint != data.train.fingerprint


@pytest.mark.parametrize("layout", ["concatenated", "packed", "rows"])
def test_a_split_that_is_too_short_is_named(tmp_path, layout):
    path = tmp_path / "a.txt"
    path.write_text("a few words", encoding="utf-8")
    own = config(path, tokenizer="byte", val_fraction=0.1, seq_len=16, layout=layout)
    if layout == "concatenated":
        with pytest.raises(DataError, match=rf"^data.path={path}: data.seq_len=16 needs"):
            pipeline.open_datasets(own, workdir=tmp_path / "outputs", seed=0)
    else:
        data = pipeline.open_datasets(own, workdir=tmp_path / "outputs", seed=0)
        assert data.train.batch(0)["weights"].sum() > 0
