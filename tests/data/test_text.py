import itertools
import json
import pickle

import numpy as np
import pytest

from craft_jax.data import loading, partition, pipeline, text, tokenizers
from craft_jax.data.base import DatasetInfo
from craft_jax.data.cache import builder
from craft_jax.data.rows import DocumentRows, RandomWindows, Stream, Windows
from craft_jax.data.sampling import WeightSchedule
from craft_jax.data.settings import DataConfig
from craft_jax.data.sources import files
from craft_jax.data.text import (
    TextBatches,
    ValidationRows,
    ValidationWindows,
)
from craft_jax.errors import DataError
from tests.conftest import words
from tests.data.windows import TrainingWindows

WHOLE = slice(None)


def windows(n=1000, **options) -> TrainingWindows:
    options = {"seq_len": 10, "batch_size": 4, "seed": 0} | options
    return TrainingWindows(np.arange(n, dtype=np.uint16), **options)


def filled(rows, epoch, places=None, seq_len=10):
    """Returns some rows of an epoch, all of them in order by default."""
    places = np.arange(rows.count) if places is None else np.array(places)
    out = text._zeros(len(places), seq_len, rows.is_packed)
    rows.fill(out, np.arange(len(places)), epoch, places)
    return out


def counted(batch) -> tuple[list[int], list[int]]:
    """Returns the tokens and targets of a batch that count."""
    at = batch["weights"] > 0
    return batch["tokens"][at].tolist(), batch["targets"][at].tolist()


# Windows.


def test_a_batch_is_a_function_of_seed_and_step():
    first, second = windows(), windows()
    for step in (0, 7, 200, 3):
        np.testing.assert_array_equal(first.batch(step)["tokens"], second.batch(step)["tokens"])
    other = windows(seed=1).batch(0)["tokens"]
    assert (first.batch(0)["tokens"] != other).any()


def test_targets_are_the_tokens_one_place_later():
    batch = windows().batch(5)
    assert batch["tokens"].shape == batch["targets"].shape == (4, 10)
    assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
    assert batch["weights"].dtype == np.float32
    tokens, targets = counted(batch)
    np.testing.assert_array_equal(np.array(tokens) + 1, targets)


@pytest.mark.parametrize("seq_len", [1, 2, 3, 10, 64])
def test_every_epoch_has_every_target_once(seq_len):
    for n in [*range(seq_len + 1, seq_len + 25), 10 * seq_len, 10 * seq_len + 1, 997]:
        rows = Windows(Stream.of(np.arange(n)), seq_len, seed=n)
        starts = set()
        for epoch in range(5):
            batch = filled(rows, epoch, seq_len=seq_len)
            tokens, targets = counted(batch)
            assert targets == list(range(1, n))
            assert tokens == list(range(n - 1))
            # What is padded stands at the end of the first and last window alone.
            assert (np.diff(batch["weights"], axis=1) <= 0).all()
            assert (batch["weights"][1:-1] == 1).all()
            assert batch["weights"][0, 0] == batch["weights"][-1, 0] == 1
            assert (batch["tokens"][batch["weights"] == 0] == 0).all()
            starts.add(int(batch["weights"][0].sum()))
        assert rows.count == -(-(n - 1) // seq_len)
        # A remainder leaves some freedom for where the first window begins.
        free = seq_len - ((n - 1) % seq_len or seq_len)
        assert (len(starts) > 1) == (free > 0) or free < 4


@pytest.mark.parametrize("n", [11, 12, 101, 1001, 1002])
def test_batches_have_every_target_once_in_each_epoch(n):
    data = windows(n, batch_size=1)
    count = -(-(n - 1) // 10)
    order = []
    for epoch in range(4):
        batches = [data.batch(epoch * count + step) for step in range(count)]
        targets = [target for batch in batches for target in counted(batch)[1]]
        assert sorted(targets) == list(range(1, n))
        order.append(targets)
    if count > 10:
        assert order[0] != order[1] != sorted(order[1])
    assert len(data) == count


def test_an_epoch_may_end_within_a_batch():
    data = windows(102, batch_size=7)  # 11 windows, in which 9 places are free.
    rows = [counted({k: v[b : b + 1] for k, v in data.batch(step).items()})[1]
            for step in range(11) for b in range(7)]  # fmt: skip
    for epoch in range(7):
        found = sorted(target for row in rows[epoch * 11 : epoch * 11 + 11] for target in row)
        assert found == list(range(1, 102))
    assert len({len(min(rows[e * 11 : e * 11 + 11], key=min)) for e in range(7)}) > 2


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
        assert batch["tokens"].shape == (3, 10)
        tokens, targets = counted(batch)
        np.testing.assert_array_equal(np.array(tokens) + 1, targets)
        predicted += targets
    assert predicted == list(range(1, n))


@pytest.mark.parametrize("kind", [TrainingWindows, ValidationWindows])
def test_a_window_longer_than_the_stream(kind):
    options = {"seed": 0} if kind is TrainingWindows else {}
    with pytest.raises(DataError, match=r"data.seq_len=10 needs at least 11 tokens.*has 10"):
        kind(np.zeros(10, np.uint16), seq_len=10, batch_size=1, **options)


def test_random_windows_begin_anywhere():
    rows = RandomWindows(Stream.of(np.arange(50)), 10, seed=3)
    batch = filled(rows, 0, range(4000))
    assert (batch["weights"] == 1).all()
    np.testing.assert_array_equal(batch["tokens"] + 1, batch["targets"])
    np.testing.assert_array_equal(batch["tokens"][:, 0] + 9, batch["tokens"][:, -1])
    starts = np.bincount(batch["tokens"][:, 0])
    assert len(starts) == 40 and starts.min() > 60
    # The example decides, not the epoch that it is counted in.
    np.testing.assert_array_equal(
        filled(rows, 3, [2])["tokens"], filled(rows, 0, [3 * rows.count + 2])["tokens"]
    )
    least = RandomWindows(Stream.of(np.arange(11)), 10, seed=3)
    assert filled(least, 0, range(5))["targets"][:, -1].tolist() == [10] * 5


@pytest.mark.parametrize("kind", [Windows, RandomWindows])
def test_one_pass_of_a_training_set(kind):
    rows = kind(Stream.of(np.arange(101)), 10, 5)
    info = DatasetInfo(tokenizer=tokenizers.bytes_(), vocab_size=257, num_bytes=7, name="me")
    training = TextBatches(
        [rows], [WeightSchedule.parse("1")], seq_len=10, batch_size=4, seed=0, info=info
    )
    data = training.one_pass()
    assert (data.name, data.num_bytes, data.vocab_size) == ("me", 7, 257)
    targets = [t for step in range(len(data)) for t in counted(data.batch(step))[1]]
    assert targets == list(range(1, 101))


def test_a_text_shorter_than_a_window():
    tokenizer = tokenizers.bytes_()
    data = text.from_text("hello", tokenizer, seq_len=100, batch_size=4)
    assert data.batch(0)["weights"].sum() == 4
    assert data.num_bytes == 5
    with pytest.raises(DataError, match="at least 2"):
        text.from_text("x", tokenizer, seq_len=100, batch_size=4)
    with pytest.raises(DataError, match="does not know"):
        text.from_text("abc", tokenizers.characters("ab", end_token=False), seq_len=9, batch_size=1)


# Streams.


def test_a_stream_concatenates_its_spans():
    whole = np.arange(100)
    spans = np.array([[0, 5], [5, 9], [40, 41], [20, 33], [33, 34], [99, 100]])
    expected = np.concatenate([whole[a:b] for a, b in spans])
    stream = Stream(whole, spans)
    assert len(stream) == len(expected)
    for start in range(len(expected)):
        for stop in range(start + 1, len(expected) + 1):
            ids, learned = stream.read(start, stop)
            assert ids.tolist() == expected[start:stop].tolist()
            assert learned is None
        assert stream.place(start) == f"the stream token {start}"
    assert len(Stream(whole, np.zeros((0, 2), np.int64))) == 0


# Whole documents.


def prepared_cache(tmp_path, lengths, monkeypatch=None, format=None, **changes):
    """A cache of documents of these many tokens, the end token included."""
    path = tmp_path / "a.jsonl"
    texts = [words(200, seed=n).replace(" ", "")[: length - 1] for n, length in enumerate(lengths)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    values = {"path": str(path), "tokenizer": "byte", "val_fraction": 0.0}
    config = DataConfig(**(values | changes))
    (prepared,) = pipeline.prepare(config, tmp_path / "outputs")
    return prepared.caches["train"], config


LENGTHS = [2, 11, 10, 9, 12, 2, 2, 31, 30, 3, 25, 21, 20, 19, 2, 10]


def check_rows(rows, tokens, seq_len):
    """Sees that an epoch has each target of each document once, given what it should be given."""
    bounds = [*tokens.documents["start"].tolist(), len(tokens.tokens)]
    ids = tokens.tokens.read(0, len(tokens.tokens)).tolist()
    end = tokens.tokenizer.end_id
    wanted = []
    for start, stop in itertools.pairwise(bounds):
        given = [end, *ids[start : stop - 1]]
        # A long document goes on in other rows, where positions begin anew.
        pairs = [*zip(given, ids[start:stop], strict=True)]
        wanted += [pairs[n : n + seq_len] for n in range(0, len(pairs), seq_len)]
    batch = filled(rows, 0, seq_len=seq_len)
    found = []
    for row in range(rows.count):
        size = int(batch["weights"][row].sum())
        assert (batch["weights"][row, :size] == 1).all()
        pairs = [*zip(batch["tokens"][row].tolist(), batch["targets"][row].tolist(), strict=True)]
        assert pairs[size:] == [(0, 0)] * (seq_len - size)
        if not rows.is_packed:
            found.append(pairs[:size])
            continue
        segments, positions = batch["segments"][row], batch["positions"][row]
        assert (segments[size:] == 0).all() and (positions[size:] == 0).all()
        assert sorted(set(segments[:size].tolist())) == list(range(1, segments.max() + 1))
        assert (np.diff(segments[:size]) >= 0).all()
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            assert positions[at].tolist() == list(range(len(at)))
            found.append([pairs[n] for n in at])
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("layout", ["packed", "rows"])
@pytest.mark.parametrize("seq_len", [1, 3, 10, 64])
def test_an_epoch_has_every_target_of_every_document_once(tmp_path, layout, seq_len):
    tokens, config = prepared_cache(tmp_path, LENGTHS, layout=layout, seq_len=seq_len)
    assert np.diff([*tokens.documents["start"], len(tokens.tokens)]).tolist() == LENGTHS
    data = pipeline.open_datasets(config, workdir=tmp_path / "outputs", seed=0)
    (rows,) = data.train.sources
    assert isinstance(rows, DocumentRows)
    check_rows(rows, tokens, seq_len)
    pieces = sum(-(-length // seq_len) for length in LENGTHS)
    assert rows.count == pieces if layout == "rows" or seq_len == 1 else rows.count < pieces
    if layout == "packed":
        assert rows.count <= -(-sum(LENGTHS) // seq_len) + 1


@pytest.mark.parametrize("layout", ["packed", "rows"])
def test_shuffled_batches_of_documents(tmp_path, layout):
    tokens, config = prepared_cache(tmp_path, LENGTHS, layout=layout, seq_len=10, batch_size=3)
    train = pipeline.open_datasets(config, workdir=tmp_path / "outputs", seed=0).train
    ids = sorted(tokens.tokens.read(0, len(tokens.tokens)).tolist())
    (rows,) = train.sources
    for epoch in range(3):
        found = []
        for number in range(epoch * rows.count, (epoch + 1) * rows.count):
            batch = train.rows(number // 3, slice(number % 3, number % 3 + 1))
            found += counted(batch)[1]
        assert sorted(found) == ids
    assert {*train.batch(0)} == {"tokens", "targets", "weights"} | (
        {"segments", "positions"} if layout == "packed" else set()
    )


@pytest.mark.parametrize("layout", ["packed", "rows"])
@pytest.mark.parametrize("length", [2, 9, 10, 11, 12, 21])
def test_one_document_without_an_end_token(tmp_path, layout, length):
    path = tmp_path / "a.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz"[:length], encoding="utf-8")
    config = DataConfig(
        path=str(path), tokenizer="char", val_fraction=0, layout=layout, seq_len=10, batch_size=1
    )
    train = pipeline.open_datasets(config, workdir=tmp_path / "outputs", seed=0).train
    assert train.tokenizer.end_id is None
    (rows,) = train.sources
    tokens, targets = counted(filled(rows, 0))
    assert sorted(targets) == list(range(1, length))
    assert np.array_equal(np.array(tokens) + 1, targets)


@pytest.mark.parametrize("layout", ["packed", "rows"])
def test_one_character_is_no_row(tmp_path, layout):
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    config = DataConfig(
        path=str(tmp_path / "a.txt"), tokenizer="char", val_fraction=0, layout=layout, seq_len=10
    )
    with pytest.raises(DataError, match=r"^data.path=.*: no document has a token"):
        pipeline.open_datasets(config, workdir=tmp_path / "outputs", seed=0)


@pytest.mark.parametrize("layout", ["concatenated", "packed", "rows"])
@pytest.mark.parametrize("order", ["epochs", "random"])
def test_many_files_give_the_batches_of_one(tmp_path, monkeypatch, layout, order):
    if layout != "concatenated" and order == "random":
        return
    options = {"layout": layout, "order": order, "seq_len": 10, "batch_size": 4}
    found = []
    for size in (1 << 30, 30):
        folder = tmp_path / str(size)
        folder.mkdir()
        monkeypatch.setattr(files, "PART_BYTES", size)
        monkeypatch.setattr(builder, "_SHARD_BYTES", size)
        tokens, config = prepared_cache(folder, LENGTHS * 3, **options)
        assert (len(tokens.tokens.files) > 3) == (size == 30)
        train = pipeline.open_datasets(config, workdir=folder / "outputs", seed=0).train
        found.append([train.batch(step) for step in range(2 * len(train))])
    for one, many in zip(*found, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], many[name])


@pytest.mark.parametrize("layout", ["concatenated", "packed", "rows"])
def test_masked_tokens_have_no_weight(tmp_path, layout):
    path = tmp_path / "a.jsonl"
    lines = [{"prompt": f"{n} is ", "text": words(n, seed=n)} for n in range(1, 40)]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    config = DataConfig(
        path=str(path), tokenizer="byte", val_fraction=0, layout=layout, seq_len=16,
        batch_size=4, prompt_field="prompt",
    )  # fmt: skip
    train = pipeline.open_datasets(config, workdir=tmp_path / "outputs", seed=0).train
    (rows,) = train.sources
    batch = filled(rows, 0, seq_len=16)
    made, learned = train.tokenizer, sorted(counted(batch)[1])
    wanted = [i for line in lines for i in [*made.encode(line["text"]).tolist(), made.end_id]]
    assert learned == sorted(wanted)
    # The prompts are read all the same.
    assert np.count_nonzero(batch["targets"]) > len(learned)


def test_a_bad_id_is_located_in_its_document(tmp_path):
    for layout in ("packed", "rows", "concatenated"):
        folder = tmp_path / layout
        folder.mkdir()
        tokens, config = prepared_cache(folder, LENGTHS, layout=layout, seq_len=10, batch_size=2)
        train = pipeline.open_datasets(config, workdir=folder / "outputs", seed=0).train
        file = tokens.path / "tokens-00000.bin"
        ids = np.fromfile(file, "<u2")
        ids[40] = 60_000
        ids.tofile(file)
        with pytest.raises(DataError, match=rf"id 60000 in .*\({file} token 40\).* 257 tokens"):
            list(loading.prefetch(lambda step: loading.read_batch(train, step), 0, 40))  # noqa: B023


# Validation.


@pytest.mark.parametrize("layout", ["concatenated", "packed", "rows"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_validation_reads_all_sources_once(tmp_path, layout, batch_size):
    _tokens, config = prepared_cache(tmp_path, LENGTHS, layout=layout, seq_len=10)
    (prepared,) = pipeline.prepare(config, tmp_path / "outputs")
    part = partition.partition([prepared], config)[0]["train"]
    rows = [pipeline.make_rows(part, config, "val", None) for _ in range(3)]
    data = ValidationRows(rows, seq_len=10, batch_size=batch_size)
    assert len(data) == -(-3 * rows[0].count // batch_size)
    found = [target for step in range(len(data)) for target in counted(data.batch(step))[1]]
    per_source = sum(LENGTHS) - (layout == "concatenated")
    assert len(found) == 3 * per_source
    assert found[:per_source] == found[per_source : 2 * per_source]
    for step in range(len(data)):
        batch = data.batch(step)
        assert batch["tokens"].shape == (batch_size, 10)
        again = [data.rows(step, slice(n, n + 1)) for n in range(batch_size)]
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([b[name] for b in again]), array)


def test_a_dataset_is_sent_as_the_names_of_its_files(tmp_path):
    tokens, _config = prepared_cache(tmp_path, LENGTHS * 20, layout="rows", seq_len=10)
    stream = Stream(tokens.tokens, np.array([[3, 50], [70, 90]]))
    assert len(pickle.dumps(stream)) < 2000
    again = pickle.loads(pickle.dumps(stream))
    assert again.read(0, 67)[0].tolist() == stream.read(0, 67)[0].tolist()
