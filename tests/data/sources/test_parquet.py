"""Parquet files as documents, whole and damaged."""

import datetime
import pickle
from pathlib import Path

import numpy as np
import pytest

from craft_jax.data.sources import parquet
from craft_jax.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"Text {i}: äöü 🦊\n" + "words and more words " * (i % 7 * 20) for i in range(500)]


def write(path: Path, table, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path, **options)
    return path


def documents(path: Path, columns=None) -> list:
    parts = pickle.loads(pickle.dumps(parquet.parquet_parts(path, "data.path=x", columns)))
    return [d for part in parts for d in part.documents()]


def texts(path: Path) -> list:
    return [d.fields["text"] for d in documents(path)]


def test_rows_come_back_in_order_with_their_numbers(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"text": TEXTS, "n": range(500)}, row_group_size=37)
    assert len(parquet.parquet_parts(path, "data.path")) == 1
    monkeypatch.setattr(parquet, "PART_BYTES", 40_000)
    parts = parquet.parquet_parts(path, "data.path")
    assert len(parts) > 3
    found = documents(path)
    assert [(d.fields["text"], d.fields["n"]) for d in found] == [
        *zip(TEXTS, range(500), strict=True)
    ]
    assert [d.where() for d in found] == [f"data.path: {path} row {i}" for i in range(500)]
    assert all(part.num_bytes > 0 for part in parts)


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
def test_compressions(tmp_path, compression):
    path = write(tmp_path / "a.parquet", {"text": TEXTS}, compression=compression)
    assert texts(path) == TEXTS


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_kinds_of_text(tmp_path, kind):
    path = write(tmp_path / "a.parquet", {"text": pa.array(TEXTS).cast(kind)})
    assert texts(path) == TEXTS


def test_values_of_python(tmp_path):
    chat = [{"role": "user", "content": "ä"}, {"role": "assistant", "content": "b"}]
    path = write(
        tmp_path / "a.parquet",
        {
            "chat": [chat, []],
            "turned": [{"role": ["u", "a"], "content": ["x", "y"]}, None],
            "uneven": [{"a": [1], "b": [1, 2]}, {"a": [], "b": []}],
            "when": pa.array([1, 2], pa.timestamp("ns")),
            "day": [datetime.date(2020, 1, 1)] * 2,
            "text": ["a", None],
        },
    )
    first, second = (d.fields for d in documents(path))
    assert first["chat"] == chat and second["chat"] == []
    assert first["turned"] == [{"role": "u", "content": "x"}, {"role": "a", "content": "y"}]
    assert second["turned"] is None and second["uneven"] == []
    assert first["uneven"] == {"a": [1], "b": [1, 2]}
    assert first["text"] == "a" and second["text"] is None
    assert "when" not in first


def test_columns(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": ["a"], "image": [b"x"], "n": [1]})
    assert [d.fields for d in documents(path, ("text",))] == [{"text": "a"}]
    # A message lists what there is.
    assert set(documents(path, ("txt",))[0].fields) == {"text", "image", "n"}


def test_no_rows(tmp_path):
    assert documents(write(tmp_path / "a.parquet", {"text": pa.array([], pa.string())})) == []


def test_text_that_is_not_utf8_names_the_row(tmp_path):
    values = [b"x"] * 300 + [b"M\xfcnchen"] + [b"y"] * 10
    column = pa.Array.from_buffers(pa.string(), len(values), pa.array(values).buffers())
    path = write(tmp_path / "a.parquet", {"text": column}, row_group_size=100)
    with pytest.raises(DataError, match=r"a\.parquet row 300 has text that is not UTF-8; "):
        documents(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole Parquet file"),
        (b"plain text\n" * 100, "not a whole Parquet file"),
        (b"PAR1PAR1", "not a whole Parquet file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    ],
)
def test_invalid_parquet_files(tmp_path, content, message):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        parquet.parquet_parts(path, "data.path=x")
    assert str(caught.value).startswith(f"data.path: {path} ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(DataError, match=r"cannot read it: No such file"):
        parquet.parquet_parts(tmp_path / "a.parquet", "data.path=x")
    with pytest.raises(DataError, match="is not a file"):
        parquet.parquet_parts(tmp_path, "data.path=x")


def test_cut_files_are_noticed(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": TEXTS}, row_group_size=100)
    whole = path.read_bytes()
    for length in [1, 4, 8, *range(100, len(whole), 1999), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"a\.parquet is not a whole Parquet file"):
            texts(path)


@pytest.mark.parametrize("has_checksums", [True, False])
def test_flipped_bits_never_crash(tmp_path, has_checksums):
    options = dict(row_group_size=100, write_page_checksum=has_checksums, compression="snappy")
    path = write(tmp_path / "a.parquet", {"text": TEXTS}, **options)
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    rng = np.random.default_rng(0)
    messages, unnoticed = [], 0
    for place in [*rng.integers(0, footer, 80), *rng.integers(footer, len(whole), 80)]:
        content = bytearray(whole)
        content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        try:
            found = documents(path)
        except DataError as error:
            messages.append(str(error))
        else:
            # The footer has no checksum: a column may have another name.
            assert len(found) == len(TEXTS)
            unnoticed += place < footer and [d.fields["text"] for d in found] != TEXTS
    assert len(messages) > 10
    assert all("a.parquet" in m and "\n" not in m for m in messages)
    # Without checksums what is noticed is what no longer decodes.
    assert unnoticed == 0 or not has_checksums


def test_rows_that_the_footer_does_not_count_are_noticed(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": TEXTS}, row_group_size=100)
    first, second = parquet.ParquetPart, parquet.parquet_parts(path, "data.path=x")[0]
    part = first(**vars(second) | {"num_rows": 499})
    with pytest.raises(DataError, match="has 500 rows from row 0 on, where its footer says 499"):
        list(part.documents())


def test_times_inside_other_values(tmp_path):
    moment = 1_700_000_000_123_456_789
    kinds = {"when": pa.timestamp("ns"), "took": pa.duration("ns"), "at": pa.time64("ns")}
    value = dict.fromkeys(kinds, moment % 86_400_000_000_000) | {"when": moment, "text": "a"}
    struct = pa.struct([pa.field("text", pa.string()), *(pa.field(*k) for k in kinds.items())])
    table = {
        "text": pa.array(["x"]),
        "one": pa.array([value], struct),
        "list": pa.array([[value]], pa.list_(struct)),
        "large": pa.array([[value]], pa.large_list(struct)),
        "two": pa.array([[moment, None]], pa.list_(pa.timestamp("ns"), 2)),
        "map": pa.array([[("k", moment)]], pa.map_(pa.string(), pa.timestamp("ns"))),
    }
    (document,) = documents(write(tmp_path / "a.parquet", table))
    when = "2023-11-14 22:13:20.123456789"
    read = {"text": "a", "when": when, "took": value["took"], "at": "22:13:20.123456789"}
    assert document.fields == {
        "text": "x",
        "one": read,
        "list": [read],
        "large": [read],
        "two": [when, None],
        "map": [("k", when)],
    }
