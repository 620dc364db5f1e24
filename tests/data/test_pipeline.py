import dataclasses

import numpy as np
import pytest

from craft_jax import schema
from craft_jax.data import pipeline
from craft_jax.data.pipeline import DataConfig
from craft_jax.errors import ConfigError, UsageError

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
    first = pipeline.prepare(config(text_file, tokenizer="bpe", vocab_size=300), workdir)
    same = pipeline.prepare(
        config(text_file, tokenizer="bpe", vocab_size=300), workdir, first.tokenizer
    )
    assert same.digest == first.digest
    other = pipeline.prepare(config(text_file, tokenizer="byte"), workdir, first.tokenizer)
    assert other.tokenizer.digest == first.tokenizer.digest


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
    with pytest.raises(UsageError, match="came without a tokenizer"):
        pipeline.open_datasets(bare, workdir=workdir, seed=0)
    assert not workdir.exists()


def test_contradictions():
    assert schema.problems(DataConfig(), "data") == []
    assert "contradicts" in schema.problems(DataConfig(pairs="sort", path="x"), "data")[0]
    assert "needs data.path" in schema.problems(DataConfig(source="files"), "data")[0]
    assert "contradicts" in schema.problems(DataConfig(source="stdlib", path="x"), "data")[0]
