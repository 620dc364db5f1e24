import gzip
import json
import os

import pytest

from craft_jax.data import sources
from craft_jax.data.sources import open_source
from craft_jax.errors import DataError


def text_of(source) -> list[str]:
    return ["".join(document.pieces()) for document in source.documents()]


def test_the_standard_library_is_source_text_without_tests():
    source = open_source("auto", None)
    names = [path.relative_to(source.root).as_posix() for path in source.paths]
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert not [n for n in names if "site-packages" in n or "/test/" in n or "/tests/" in n]


def test_a_file_is_read_to_the_character(tmp_path):
    text = "naïve café\r\n漢字 🙂\n\n\tend without newline"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert text_of(open_source("files", str(path))) == [text]


def test_folder_and_glob_in_sorted_order(tmp_path):
    for name in ("b.txt", "a/c.md", "a/b.py", ".hidden/x.txt", "picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert text_of(open_source("auto", str(tmp_path))) == ["a/b.py", "a/c.md", "b.txt"]
    assert text_of(open_source("auto", str(tmp_path / "*.txt"))) == ["b.txt"]
    # A glob takes what it matches, whatever the ending.
    assert text_of(open_source("auto", str(tmp_path / "*.png"))) == ["picture.png"]


def test_jsonl_and_gzip(tmp_path):
    lines = [{"text": "one\ntwo"}, {"text": "three", "more": 1}]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode() + b"\n\n"))
    assert text_of(open_source("files", str(path))) == ["one\ntwo", "three"]


def test_pieces_are_bounded_and_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(sources, "PIECE_CHARS", 300)
    text = "word é🙂\n" * 500 + "x" * 2000 + " tail"
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    (document,) = open_source("files", str(path)).documents()
    pieces = list(document.pieces())
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 300
    assert all(piece.endswith("\n") for piece in pieces[:5])


def test_a_mark_at_the_start_is_dropped_and_no_other(tmp_path, monkeypatch):
    for size in (1, 2, 3, 100):
        monkeypatch.setattr(sources, "_BLOCK_BYTES", size)
        for name, content in (("a.txt", "\ufeff\ufeffa\ufeff"), ("b.txt", ""), ("c.txt", "\ufeff")):
            (tmp_path / name).write_text(content, encoding="utf-8")
        assert text_of(open_source("files", str(tmp_path))) == ["\ufeffa\ufeff", "", ""]


def test_links_that_go_round(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.txt").write_text("once", encoding="utf-8")
    (tmp_path / "a/again").symlink_to(tmp_path)
    for pattern in ("**/*.txt", "a/**", "*/*.txt", ""):
        assert text_of(open_source("files", str(tmp_path / pattern))) == ["once"]


def test_digest_follows_names_and_bytes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one", encoding="utf-8")
    first = open_source("files", str(path)).digest()
    assert open_source("files", str(tmp_path)).digest() == first
    path.write_text("two", encoding="utf-8")
    assert open_source("files", str(path)).digest() != first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc\xff\xfedef", "not UTF-8 text: byte 0xff at offset 3"),
        (b"caf\xc3", "byte 0xc3 at offset 3"),
        (b"\x89PNG\0\0", "binary"),
        (b"text\0text", "NUL byte at offset 4"),
    ],
)
def test_what_is_not_text_is_named_with_its_place(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        text_of(open_source("files", str(path)))


def test_the_place_counts_from_the_start_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 7)
    path = tmp_path / "a.txt"
    path.write_bytes("é".encode() * 10 + b"\xff")
    with pytest.raises(DataError, match="offset 20"):
        text_of(open_source("files", str(path)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 1}', "line 2 has no text in the field 'text'"),
        ('{"body": "x"}', "it has: body"),
        ("[1]", "it has: list"),
        ('{"text"', "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("1" * 10_000, "line 2 is not JSON"),
        ('{"text": "\\ud800"}', "line 2 has half a character in the field 'text'"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        text_of(open_source("files", str(path)))


def test_a_cut_gzip_file(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"some text" * 1000)[:-20])
    with pytest.raises(DataError, match="not a whole gzip file"):
        text_of(open_source("files", str(path)))


@pytest.mark.parametrize("name", ["missing.txt", "*.txt", "empty_folder", "fifo"])
def test_nothing_to_read(tmp_path, name):
    (tmp_path / "empty_folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DataError, match=r"data\.path=.*" + name.replace("*", r"\*")):
        open_source("files", str(tmp_path / name))
