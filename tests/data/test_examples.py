import numpy as np
import pytest

from craft_jax.data import loading, pipeline
from craft_jax.data.base import BaseDataset
from craft_jax.data.examples import CharDataset, ExampleBatches, TextDataset
from craft_jax.data.settings import DataConfig
from craft_jax.data.tokenizers import bytes_, characters
from craft_jax.errors import ConfigError, DataError, UsageError
from tests.conftest import words

OWN = """
import numpy as np
from craft_jax.data.base import BaseDataset
from craft_jax.data.examples import CharDataset, TextDataset
from craft_jax.data.tokenizers import bytes_

class Squares(BaseDataset):
    vocab_size = 100

    def __init__(self, config, split, seed):
        self.first = 0 if split == "train" else 50
        self.length = config.seq_len

    def __len__(self):
        return 23 if not self.first else 10

    def __getitem__(self, index):
        tokens = np.full(self.length, self.first + index, np.int32)
        return {"tokens": tokens, "targets": tokens + 1}

class Text(TextDataset):
    def __init__(self, config, split, seed):
        super().__init__("the cat " * 30 + split, bytes_(), config.seq_len)

class Chars(CharDataset):
    def __init__(self, config, split, seed):
        super().__init__("the cat " * 30 + split, config.seq_len, "abcehtlvinr ")

class Wrong(BaseDataset):
    def __init__(self): ...
    def __len__(self): ...
    def __getitem__(self, index): ...

class Neither: ...
"""


def opened(tmp_path, name, seed=0, **changes):
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    reference = f"{tmp_path / 'own.py'}:{name}"
    config = DataConfig(**({"dataset": reference, "seq_len": 8, "batch_size": 4} | changes))
    return pipeline.open_datasets(config, workdir=tmp_path, seed=seed)


class Numbers(BaseDataset):
    def __init__(self, count, **more):
        self.count, self.more = count, more

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        return {"targets": np.array([index, index]), **self.more}


def test_each_epoch_has_every_example_once(tmp_path):
    train = opened(tmp_path, "Squares").train
    assert train.vocab_size == 100
    assert len(train) == 5
    rows = [int(n) for step in range(46) for n in train.batch(step)["tokens"][:, 0]]
    epochs = [rows[n : n + 23] for n in range(0, 8 * 23, 23)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(23))] * 8
    assert epochs[0] != epochs[1] != sorted(epochs[1])
    assert "weights" not in train.batch(0)
    other = opened(tmp_path, "Squares", seed=1).train
    assert (other.batch(0)["tokens"] != train.batch(0)["tokens"]).any()


def test_validation_has_every_example_once_in_order(tmp_path):
    val = opened(tmp_path, "Squares").val
    batches = [val.batch(step) for step in range(len(val))]
    assert [b["weights"].shape for b in batches] == [(4, 8)] * 3
    found = [int(n) for b in batches for n in b["tokens"][:, 0][b["weights"][:, 0] > 0]]
    assert found == list(range(50, 60))
    assert batches[2]["weights"][2:].sum() == 0
    assert batches[2]["weights"][:2].sum() == 16
    assert all(b["weights"].dtype == np.float32 for b in batches)


@pytest.mark.parametrize("name", ["Squares", "Text", "Chars"])
def test_workers_make_the_same(tmp_path, name):
    data = opened(tmp_path, name)
    for split, last in ((data.train, 12), (data.val, len(data.val))):
        expected = [split.batch(step) for step in range(last)]
        for workers in (0, 2):
            found = list(
                loading.load_batches(
                    split, 0, last, workers=workers, ahead=1, then=lambda batch: batch
                )
            )
            for one, two in zip(found, expected, strict=True):
                assert one.keys() == two.keys()
                assert all(np.array_equal(one[key], two[key]) for key in one)


def test_some_rows_of_a_batch(tmp_path):
    data = opened(tmp_path, "Text")
    for split in (data.train, data.val):
        for step in range(len(split)):
            whole = split.batch(step)
            for rows in (slice(0, 2), slice(2, 4), slice(1, 2)):
                some = split.rows(step, rows)
                for name, array in some.items():
                    assert np.array_equal(array, whole[name][rows])
                assert some.keys() == whole.keys()


@pytest.mark.parametrize("length", [2, 8, 9, 10, 16, 17, 100])
def test_windows_of_a_text_have_each_target_once(length):
    text = (words(100))[:length]
    data = TextDataset(text, bytes_(), 8)
    assert (data.vocab_size, data.num_bytes) == (257, length)
    examples = [data[n] for n in range(len(data))]
    ids = data.tokenizer.encode(text).tolist()
    found = [int(t) for e in examples for t in e["targets"][e["weights"] > 0]]
    assert found == ids[1:]
    given = [int(t) for e in examples for t in e["tokens"][e["weights"] > 0]]
    assert given == ids[:-1]
    assert {e["tokens"].shape for e in examples} == {(8,)}
    assert {str(e[k].dtype) for e in examples for k in ("tokens", "targets")} == {"int32"}


def test_characters_of_a_text():
    data = CharDataset("hello", 3)
    assert data.vocab_size == 4
    assert data.tokenizer.decode(data[0]["targets"]) == "ell"
    assert CharDataset("hello", 3, "abcdefgh lo").vocab_size == 11
    with pytest.raises(UsageError, match="does not know"):
        CharDataset("hello", 3, "abc")
    with pytest.raises(DataError, match="at least 2"):
        CharDataset("h", 3)


def test_names_and_sizes_for_the_commands(tmp_path):
    data = opened(tmp_path, "Text")
    assert data.train.tokenizer.digest == bytes_().digest
    assert data.train.num_bytes == len("the cat " * 30 + "train")
    assert data.train.fingerprint != data.val.fingerprint
    assert data.train.fingerprint == opened(tmp_path, "Text").train.fingerprint
    once = data.train.one_pass()
    counts = sum(once.batch(step)["weights"].sum() for step in range(len(once)))
    assert counts == data.train.num_bytes - 1
    assert once.vocab_size == 257
    assert TextDataset("abab", characters("ab", end_token=False), 2).fingerprint != (
        TextDataset("abab", characters("abc", end_token=False), 2).fingerprint
    )


def test_a_fingerprint_of_the_outermost_examples():
    def of(*args, **more):
        return ExampleBatches(Numbers(*args, **more), batch_size=2, seed=0).fingerprint

    assert of(5) == of(5)
    assert len({of(5), of(6), of(5, more=np.zeros(2)), of(5, more=np.ones(2))}) == 4


def test_weights_of_ones_own_are_kept():
    own = Numbers(3, weights=np.array([0.5, 0.0], np.float32))
    data = ExampleBatches(own, batch_size=2, seed=None)
    assert data.batch(0)["weights"].tolist() == [[0.5, 0], [0.5, 0]]
    assert data.batch(1)["weights"].tolist() == [[0.5, 0], [0, 0]]


def test_a_batch_larger_than_all_examples():
    data = ExampleBatches(Numbers(3), batch_size=7, seed=1)
    assert len(data) == 1
    assert sorted(data.batch(0)["targets"][:3, 0].tolist()) == [0, 1, 2]
    val = data.one_pass()
    assert val.batch(0)["targets"].shape == (7, 2)
    assert val.batch(0)["weights"].sum() == 6


def test_examples_that_cannot_be_stacked(tmp_path):
    with pytest.raises(DataError, match="Numbers has no example"):
        ExampleBatches(Numbers(0), batch_size=2, seed=0)

    class Uneven(Numbers):
        def __getitem__(self, index):
            return {"targets": np.zeros(index + 1)}

    data = ExampleBatches(Uneven(4), batch_size=2, seed=None)
    with pytest.raises(DataError, match=r"'targets' of example 1 has the shape \(2,\).*pad them"):
        loading.read_batch(data, 0)

    class NoDict(Numbers):
        def __getitem__(self, index):
            return index

    with pytest.raises(DataError, match="is a int, not a dict of arrays"):
        loading.read_batch(ExampleBatches(NoDict(4), batch_size=2, seed=None), 0)


def test_classes_that_cannot_be_used(tmp_path):
    with pytest.raises(ConfigError, match=r"built as Class\(config, split, seed\)"):
        opened(tmp_path, "Wrong")
    with pytest.raises(ConfigError, match="no class Neither there that derives from"):
        opened(tmp_path, "Neither")
