import datetime
import gzip
import json
import re

import numpy as np
import pytest

from craft_jax.data import pair_sources, pairs, tokenizers
from craft_jax.data.pair_sources import TASKS
from craft_jax.errors import DataError

OPTIONS = dict(
    num_pairs=50,
    val_fraction=0.2,
    tokenizer="char",
    vocab_size=300,
    seq_len=24,
    batch_size=8,
    seed=0,
)


def opened(name, **changes):
    return pairs.open_pairs(str(name), **OPTIONS | changes)


def texts(data, batch):
    """The pairs of a batch as text, and checks that it is made as the docstring says."""
    end, found = data.tokenizer.end_id, []
    assert {name: a.dtype.name for name, a in batch.items()} == {
        "source": "int32", "source_mask": "bool", "tokens": "int32", "targets": "int32",
        "weights": "float32",
    }  # fmt: skip
    for source, mask, tokens, target, weights in zip(*batch.values(), strict=True):
        read, write = int(mask.sum()), int(weights.sum())
        assert mask[:read].all() and not mask[read:].any()
        assert weights[:write].all() and not weights[write:].any()
        assert source[read - 1] == tokens[0] == end
        assert (source[read:] == end).all() and (target[write:] == end).all()
        assert (tokens[1 : write + 1] == target[:write])[: len(tokens) - 1].all()
        if write == 0:
            assert read == 1
            continue
        assert target[write - 1] == end
        decode = data.tokenizer.decode
        found.append((decode(source[: read - 1]), decode(target[: write - 1])))
    return found


def everything(data):
    return [pair for step in range(len(data)) for pair in texts(data, data.batch(step))]


def file_of(path, rows):
    """Writes pairs into a file of the kind that its name says."""
    is_json = ".jsonl" in path.name
    lines = [json.dumps({"source": s, "target": t}) if is_json else f"{s}\t{t}" for s, t in rows]
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


ROWS = [(f"word {i}", f"{i} mot \u00e9") for i in range(20)]

# Generated pairs.


def read_date(text):
    """The date that a text means, by rules of its own."""
    if "/" in text:
        month, day, year = map(int, text.split("/"))
    elif "." in text:
        day, month, year = map(int, text.split("."))
    else:
        (name,) = re.findall("[a-z]{3,}", text.lower())
        day, year = map(int, re.findall("[0-9]+", text))
        names = "jan feb mar apr may jun jul aug sep oct nov dec".split()
        month = names.index(name[:3]) + 1
    if year < 100:
        year += 2000 if year < 30 else 1900
    return datetime.date(year, month, day).isoformat()


@pytest.mark.parametrize(
    ("task", "answer"),
    [("dates", read_date), ("reverse", lambda s: s[::-1]), ("sort", lambda s: "".join(sorted(s)))],
)
def test_generated_pairs_are_right_and_splits_disjoint(task, answer):
    made = pair_sources.generate(task, 3000)
    assert (len(made.train), len(made.val)) == (3000, 1000)
    for pair in (*made.train, *made.val):
        assert pair.target == answer(pair.source)
    known = {pair.source for pair in made.train}
    assert not known & {pair.source for pair in made.val}
    assert len({pair.source for pair in made.val}) == 1000
    assert len(known) > 2500
    # The same every time, and a longer set begins as a shorter one.
    assert pair_sources.generate(task, 3100).train[:3000] == made.train
    assert len(pair_sources.generate(task, 7).val) == 7


def test_all_spellings_of_a_date_occur_with_both_centuries():
    sources = {pair.source for pair in pair_sources.generate("dates", 4000).train}
    for pattern in (
        r"[a-z]+ \d+, \d{4}", r"[A-Z][a-z]+ \d+, \d{4}", r"\d+ [A-Z][a-z]{5,} \d{4}",
        r"\d+ [a-z]{3} \d{4}", r"\d+ [A-Z][a-z]{2} \d{4}", r"\d\d/\d\d/[3-9]\d",
        r"\d\d/\d\d/[0-2]\d", r"\d+/\d+/\d{4}", r"\d\d\.\d\d\.\d\d", r"\d+\.\d+\.\d{4}",
    ):  # fmt: skip
        assert any(re.fullmatch(pattern, source) for source in sources), pattern
    assert max(map(len, sources)) < 20


# Batches.


def test_a_training_batch_is_a_function_of_seed_and_step():
    first, again, other = (opened("sort", seed=s)[0] for s in (0, 0, 1))
    for step in (0, 5, 123, 2):
        for name, array in first.batch(step).items():
            assert array.shape == (8, 24)
            np.testing.assert_array_equal(array, again.batch(step)[name])
    assert texts(first, first.batch(0)) != texts(other, other.batch(0))


def test_epochs_have_every_pair_once_in_orders_of_their_own():
    train, _ = opened("reverse", num_pairs=40)
    assert len(train) == 5
    epochs = [
        [pair for step in range(first, first + 5) for pair in texts(train, train.batch(step))]
        for first in (0, 5, 500)
    ]
    expected = sorted(pair[:2] for pair in pair_sources.generate("reverse", 40).train)
    assert [sorted(epoch) for epoch in epochs] == [expected] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_validation_has_every_pair_once_in_order():
    _, val = opened("dates", num_pairs=21)
    assert len(val) == 3
    assert everything(val) == [pair[:2] for pair in pair_sources.generate("dates", 21).val]
    last = val.batch(2)
    assert last["weights"].any(axis=1).tolist() == [True] * 5 + [False] * 3
    # Attention has something to look at in every row.
    assert last["source_mask"].any(axis=1).all()


def test_one_pass_of_a_training_set():
    train, _ = opened("sort", num_pairs=21)
    data = train.one_pass()
    assert everything(data) == [pair[:2] for pair in pair_sources.generate("sort", 21).train]
    assert (data.tokenizer, data.vocab_size) == (train.tokenizer, train.vocab_size)
    assert data.one_pass() is data


def test_without_validation():
    assert opened("sort", val_fraction=0.0)[1] is None


# Files.


@pytest.mark.parametrize("name", ["a.tsv", "b.jsonl", "c.tsv.gz", "d.jsonl.gz"])
@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_files(tmp_path, name, tokenizer):
    train, val = opened(file_of(tmp_path / name, ROWS), tokenizer=tokenizer)
    assert (everything(train.one_pass()), everything(val)) == (ROWS[:16], ROWS[16:])
    assert train.name == name[0]
    assert train.vocab_size == train.tokenizer.vocab_size == val.vocab_size
    again = tmp_path / f"tokenizer_{tokenizer}.json"
    again.write_text(train.tokenizer.json, encoding="utf-8")
    other, _ = opened(tmp_path / name, tokenizer=str(again))
    assert other.fingerprint == train.fingerprint == val.fingerprint


def test_windows_line_ends_a_mark_and_empty_lines(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(b"\xef\xbb\xbfone\tun\r\n\r\n  \r\ntwo\tdeux\r\nthree\t\r\n")
    rows = pair_sources.read(path).train
    assert rows == [("one", "un", 1), ("two", "deux", 4), ("three", "", 5)]


def test_a_source_is_in_one_split_only(tmp_path):
    rows = [*ROWS[:8], ROWS[2], ROWS[9], ROWS[9], ROWS[3]]
    train, val = opened(file_of(tmp_path / "a.tsv", rows), val_fraction=1 / 3)
    assert everything(val) == [ROWS[9], ROWS[9]]
    assert sorted(everything(train.one_pass())) == sorted([*ROWS[:8], ROWS[2], ROWS[3]])


def test_the_fingerprint_covers_content_tokenizer_and_split(tmp_path):
    path = file_of(tmp_path / "a.tsv", ROWS)
    found = [
        opened(path, **changes)[0].fingerprint
        for changes in ({}, {"tokenizer": "byte"}, {"val_fraction": 0.5}, {"seed": 3})
    ]
    assert len(set(found)) == 3
    assert found[0] == found[3]
    file_of(path, [("word 0", "another"), *ROWS[1:]])
    assert opened(path)[0].fingerprint not in found


BAD_LINES = [
    ("a.tsv", b"one\tun\ntwo deux\n", "line 2 has 1 fields separated by tabs, not 2"),
    ("a.tsv", b"one\tun\tuno\n", "line 1 has 3 fields"),
    ("a.tsv", b"one\tun\n\tdeux\n", "line 2 has an empty source"),
    ("a.tsv", b"one\tun\ncaf\xe9\tdeux\n", "line 2 is not UTF-8 text: byte 0xe9"),
    ("a.tsv", b"\n \n", "contains no pairs"),
    ("a.tsv.gz", b"one\tun\n", "is not a whole gzip file"),
    ("a.tsv.gz", gzip.compress(b"one\tun\n" * 99, mtime=0)[:-9], "is not a whole gzip file"),
    ("a.jsonl", b'{"source": "a", "target": "b"}\n{"source": "a"', "line 2 is not JSON"),
    ("a.jsonl", b'["a", "b"]\n', "line 1 is not an object"),
    ("a.jsonl", b'{"source": "a"}\n', "line 1 has no text in the field 'target'"),
    ("a.jsonl", b'{"source": 1, "target": "b"}\n', "no text in the field 'source'"),
    ("a.jsonl", b'{"source": "\\ud800", "target": "b"}\n', "unpaired surrogate"),
    ("a.jsonl", b"[" * 5000, "line 1 is not JSON"),
    ("a.tsv", "one\tun\n".encode("utf-16"), "a.tsv is UTF-16 text; convert it to UTF-8 (iconv -f"),
    ("a.tsv", "one\tun\n".encode("utf-16-le"), "a.tsv is UTF-16LE text; convert it"),
    ("a.csv", b"one,un\n", "its name must end in .tsv or .jsonl"),
    ("a.tsv", b"one\tun\n", "leaves no training pair of 1"),
    ("a.tsv", b"one\tun\n" * 9, "leaves no validation pair of 9"),
]


@pytest.mark.parametrize(("name", "content", "expected"), BAD_LINES)
def test_files_that_cannot_be_used(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(expected)) as caught:
        opened(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path):
    with pytest.raises(DataError, match=r"data.pairs: cannot read .*No such file"):
        opened(tmp_path / "a.tsv")
    (tmp_path / "b.tsv").mkdir()
    with pytest.raises(DataError, match=r"data.pairs: cannot read .*directory"):
        opened(tmp_path / "b.tsv")


def test_pairs_that_do_not_fit(tmp_path):
    path = file_of(tmp_path / "a.tsv", [("short", "x"), ("x" * 24, "y"), ("a", "y" * 30)])
    with pytest.raises(DataError) as caught:
        opened(path, val_fraction=0.0)
    for words in ("line 2: the source has 25 tokens", "data.seq_len=24", "data.seq_len=31"):
        assert words in str(caught.value)
    file_of(path, [("short", "x"), ("x", "y" * 25)])
    with pytest.raises(DataError, match="line 2: the target has 26 tokens with its end token"):
        opened(path, val_fraction=0.0)
    assert len(opened(file_of(path, [("x" * 23, "y" * 23)]), val_fraction=0.0)[0].pairs) == 1
    with pytest.raises(DataError, match=r"data.pairs=dates, pair \d+: the source has"):
        opened("dates", seq_len=11)


def test_unusable_tokenizers(tmp_path):
    path = file_of(tmp_path / "a.tsv", [*ROWS, ("word \u20ac", "1")])
    known = tokenizers.characters("".join(map("".join, ROWS)), end_token=True)
    with pytest.raises(DataError, match=r"line 21: the tokenizer does not know.*U\+20AC"):
        opened(path, tokenizer=known)
    bare = tokenizers.characters("".join(map("".join, ROWS)), end_token=False)
    with pytest.raises(DataError, match="this vocabulary has no end token"):
        opened(path, tokenizer=bare)
    (tmp_path / "bare.json").write_text(bare.json, encoding="utf-8")
    with pytest.raises(DataError, match="this vocabulary has no end token"):
        opened(path, tokenizer=str(tmp_path / "bare.json"))
    with pytest.raises(DataError, match="no such file"):
        opened(path, tokenizer=str(tmp_path / "none.json"))


def test_text_never_becomes_an_end_token(tmp_path):
    rows = [(f"a<|endoftext|>b {i}", "<|endoftext|>") for i in range(4)]
    for tokenizer in ("char", "byte", "bpe"):
        train, _ = opened(
            file_of(tmp_path / "a.tsv", rows), tokenizer=tokenizer, seq_len=40, val_fraction=0.0
        )
        assert everything(train.one_pass()) == rows


def test_a_file_to_evaluate_on(tmp_path):
    path = file_of(tmp_path / "other.tsv", ROWS)
    tokenizer = tokenizers.bytes_()
    data = pairs.from_file(path, tokenizer, field="--text", seq_len=24, batch_size=8)
    assert everything(data) == ROWS
    assert data.name == "other"
    with pytest.raises(DataError, match=f"--text: {re.escape(str(path))} line 1: the source has"):
        pairs.from_file(path, tokenizer, field="--text", seq_len=4, batch_size=8)


def test_names():
    assert set(TASKS) == {"dates", "reverse", "sort"}
    assert all(pair_sources.has_pairs_name(n) for n in ("a.tsv", "A.TSV", "b.jsonl.gz"))
    assert not any(pair_sources.has_pairs_name(n) for n in ("c.csv", "d.gz"))
