import gzip
import json
import os
import random

import pytest
import zstandard

from craft_jax.data.sources import decoding, documents, files
from craft_jax.data.sources.files import open_files
from craft_jax.data.sources.formats import Format
from craft_jax.errors import DataError

# Nothing here may be cut in the middle: emoji of several code points, CJK, CRLF, tabs.
MIXED = (
    "naïve café 漢字仮名 👨\u200d👩\u200d👧 🇩🇪 the end\r\nof a line\r\n\r\n"
    "\tint x = 3;  // zwei  Leerzeichen\n\n\nאב ab cd\u3000ef gh\n"
)


def parts_of(source) -> list[list]:
    """Reads all parts: of each its documents, as pairs of a document and its text."""
    return [[(d, text_of(d)) for d in part.documents()] for part in source.parts()]


def text_of(document) -> str:
    if document.fields is None:
        return "".join(document.read())
    return "".join(span.text for span in Format().spans(document))


def texts_of(source) -> list[str]:
    found = []
    for part in parts_of(source):
        for document, text in part:
            if document.starts:
                found.append("")
            found[-1] += text
    return found


def test_the_standard_library_is_source_text_without_tests():
    source = open_files(None)
    names = [path.relative_to(source.root).as_posix() for path in source.paths]
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert not [n for n in names if "site-packages" in n or "/test/" in n or "/tests/" in n]
    assert source.describe() == {"files": len(names)}


def test_a_file_is_read_to_the_character(tmp_path):
    text = "naïve café\r\n漢字 🙂\n\n\tend without newline"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert texts_of(open_files(str(path))) == [text]


def test_folder_and_glob_in_sorted_order(tmp_path):
    for name in ("b.txt", "a/c.md", "a/b.py", ".hidden/x.txt", "picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert texts_of(open_files(str(tmp_path))) == ["a/b.py", "a/c.md", "b.txt"]
    assert texts_of(open_files(str(tmp_path / "*.txt"))) == ["b.txt"]
    # A glob takes what it matches, whatever the ending.
    assert texts_of(open_files(str(tmp_path / "*.png"))) == ["picture.png"]


def test_jsonl_and_gzip(tmp_path):
    lines = [{"text": "one\ntwo"}, {"text": "three", "more": 1}]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode() + b"\n\n"))
    assert texts_of(open_files(str(path))) == ["one\ntwo", "three"]


def test_pieces_are_bounded_and_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(documents, "PIECE_CHARS", 300)
    text = "word é🙂\n" * 500 + "x" * 2000 + " tail"
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    ((document,),) = [list(part.documents()) for part in open_files(str(path)).parts()]
    pieces = list(documents.pieces(document.read()))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 300
    assert all(piece.startswith(" é") for piece in pieces[1:5])


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_pieces_do_not_depend_on_the_chunks_that_they_are_read_in(monkeypatch, size):
    monkeypatch.setattr(documents, "PIECE_CHARS", 50)
    text = MIXED * 5
    chunks = [text[n : n + size] for n in range(0, len(text), size)]
    pieces = list(documents.pieces(chunks))
    assert pieces == list(documents.pieces([text]))
    assert "".join(pieces) == text
    assert list(documents.pieces(["", "", "a", ""])) == ["a"]
    assert list(documents.pieces([])) == []


def test_a_piece_ends_before_a_space_between_words():
    assert documents.cut("one two. three four", 18, 0) == 14
    assert documents.cut("one two. three", 13, 0) == 3
    assert documents.cut("one\ntwo. - three", 12, 0) == 3  # No such space: before a newline.
    assert documents.cut("one.\n\n - three", 12, 0) == 12  # Nor such a newline: anywhere.
    assert documents.cut("a b", 2, 1) == 2  # Never before `start`, nor at it.


def test_a_mark_at_the_start_is_dropped_and_no_other(tmp_path, monkeypatch):
    for size in (1, 2, 3, 100):
        monkeypatch.setattr(decoding, "BLOCK_BYTES", size)
        for name, content in (("a.txt", "\ufeff\ufeffa\ufeff"), ("b.txt", ""), ("c.txt", "\ufeff")):
            (tmp_path / name).write_text(content, encoding="utf-8")
        assert texts_of(open_files(str(tmp_path))) == ["\ufeffa\ufeff", "", ""]


def test_a_mark_before_the_first_json_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "one"}\n', encoding="utf-8")
    assert texts_of(open_files(str(tmp_path))) == ["one"]


def test_a_mark_is_no_mark_where_a_span_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 100)
    text = "a\ufeff" * 500
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    source = open_files(str(tmp_path))
    assert len(source.parts()) > 5
    assert texts_of(source) == [text]


def test_links_that_go_round(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.txt").write_text("once", encoding="utf-8")
    (tmp_path / "a/again").symlink_to(tmp_path)
    for pattern in ("**/*.txt", "a/**", "*/*.txt", ""):
        assert texts_of(open_files(str(tmp_path / pattern))) == ["once"]


def test_digest_follows_names_bytes_and_separator(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one", encoding="utf-8")
    first = open_files(str(path)).digest()
    assert open_files(str(tmp_path)).digest() == first
    assert open_files(str(path), "\n").digest() != first
    path.rename(tmp_path / "b.txt")
    assert open_files(str(tmp_path)).digest() != first
    (tmp_path / "b.txt").rename(path)
    path.write_text("two", encoding="utf-8")
    assert open_files(str(path)).digest() != first


# Long files, in spans.

TEXTS = {
    "mixed": MIXED * 60,
    "no_spaces": "漢字仮名交じり文🙂" * 400,
    "crlf": "one\r\n" * 2000,
    "one_word": "x" * 9000,
    "newlines": "\n" * 9000,
    "few_newlines": ("x" * 700 + "\n") * 12,
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("part_bytes", [97, 500, 2000])
def test_a_long_file_is_read_in_spans(tmp_path, monkeypatch, name, part_bytes):
    monkeypatch.setattr(files, "PART_BYTES", part_bytes)
    path = tmp_path / "a.txt"
    path.write_bytes(TEXTS[name].encode())
    source = open_files(str(path))
    parts = parts_of(source)
    lengths = [len(text) for part in parts for _, text in part]
    assert max(lengths) < (3 * part_bytes if name != "few_newlines" else 701 + 2 * part_bytes)
    read = [document for part in parts for document, _ in part]
    assert [d.starts for d in read] == [True] + [False] * (len(read) - 1)
    assert [d.ends for d in read] == [False] * (len(read) - 1) + [True]
    assert texts_of(source) == [TEXTS[name]]
    assert sum(part.num_bytes for part in source.parts()) == path.stat().st_size
    assert [p.spans for p in source.parts()] == [p.spans for p in open_files(str(path)).parts()]


def test_spans_begin_before_a_space_between_words(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 300)
    (tmp_path / "a.txt").write_bytes(TEXTS["mixed"].encode())
    (tmp_path / "b.txt").write_bytes(TEXTS["few_newlines"].encode())
    texts = [text for part in parts_of(open_files(str(tmp_path))) for _, text in part]
    begins = [text[:2] for text in texts if text not in (texts[0], "x")]
    assert {begin[0] for begin in begins} == {" ", "\n", "x"}
    assert all(begin[1].isalnum() for begin in begins)


def test_small_files_share_a_part(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 1000)
    for n in range(30):
        (tmp_path / f"{n:02}.txt").write_text(f"{n:02} " * 50, encoding="utf-8")
    parts = parts_of(open_files(str(tmp_path)))
    assert [len(part) for part in parts] == [6] * 5
    assert [text[:2] for part in parts for _, text in part] == [f"{n:02}" for n in range(30)]


@pytest.mark.parametrize("part_bytes", [50, 400, 10**6])
def test_lines_of_json_stay_whole(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr(files, "PART_BYTES", part_bytes)
    texts = [f"{n} é🙂\n" * (n % 7 + 1) for n in range(200)]
    lines = [json.dumps({"text": text}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts)]
    for name, end in (("a.jsonl", "\n"), ("b.jsonl", "")):
        (tmp_path / name).write_text("\n".join(lines) + end, encoding="utf-8")
        source = open_files(str(tmp_path / name))
        assert texts_of(source) == texts
        assert (len(source.parts()) > 10) == (part_bytes < 10**6)


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("bad", [0, 57, 199])
def test_the_line_of_an_error_counts_from_the_start_of_the_file(tmp_path, monkeypatch, ending, bad):
    monkeypatch.setattr(files, "PART_BYTES", 200)
    monkeypatch.setattr(decoding, "BLOCK_BYTES", 64)
    lines = [json.dumps({"text": f"line {n}"}) for n in range(200)]
    path = tmp_path / f"a.jsonl{ending}"
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[ending]
    for wrong, message in (
        ("{", "is not JSON"),
        ("[]", "is a list, not an object"),
        ('{"body": "x"}', "has no text in the field 'text'"),
    ):
        found = "\n".join([*lines[:bad], wrong, *lines[bad + 1 :]])
        path.write_bytes(pack(found.encode()))
        with pytest.raises(DataError, match=f"line {bad + 1} {message}"):
            texts_of(open_files(str(path)))


# Separators.


@pytest.mark.parametrize("block", [64, 65, 67, 101, 1000, 1 << 20])
@pytest.mark.parametrize("separator", ["\n\n", "<|endoftext|>", "🙂é"])
def test_separated_documents_across_blocks(tmp_path, monkeypatch, block, separator):
    monkeypatch.setattr(decoding, "BLOCK_BYTES", block)
    texts = [("é word" * n)[: 40 * n % 301] + "." for n in range(60)]
    text = separator.join(texts)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert texts_of(open_files(str(path), separator)) == texts
    # After the last there may stand another.
    path.write_bytes((text + separator).encode())
    assert texts_of(open_files(str(path), separator)) == texts


@pytest.mark.parametrize("separator", ["\n\n", "<|endoftext|>", "---", "aa"])
@pytest.mark.parametrize("part_bytes", [64, 333])
def test_separated_documents_across_spans(tmp_path, monkeypatch, separator, part_bytes):
    monkeypatch.setattr(files, "PART_BYTES", part_bytes)
    monkeypatch.setattr(decoding, "BLOCK_BYTES", 50)
    texts = [f"{n} naïve words 漢字. " * (n % 23) + "x" for n in range(100)]
    path = tmp_path / "a.txt"
    path.write_bytes(separator.join(texts).encode())
    source = open_files(str(path), separator)
    assert texts_of(source) == texts
    assert len(source.parts()) > 10


def test_a_separator_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 64)
    monkeypatch.setattr(decoding, "BLOCK_BYTES", 50)
    (tmp_path / "a.txt").write_bytes(MIXED.encode() * 10)
    source = open_files(str(tmp_path), "<|endoftext|>")
    assert texts_of(source) == [MIXED * 10]
    assert len(source.parts()) == 1


# Packed files.


@pytest.mark.parametrize("block", [5, 1000, 1 << 20])
def test_zstd_of_several_frames(tmp_path, monkeypatch, block):
    monkeypatch.setattr(decoding, "BLOCK_BYTES", block)
    monkeypatch.setattr(decoding, "_PACKED_BLOCK_BYTES", block)
    frames = [MIXED * 20, "", "x", "more\n" * 1000]
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"".join(zstandard.compress(frame.encode()) for frame in frames))
    assert texts_of(open_files(str(path))) == ["".join(frames)]


def test_gzip_of_several_members(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(b"".join(gzip.compress(text.encode()) for text in (MIXED, "", "end")))
    assert texts_of(open_files(str(path))) == [MIXED + "end"]


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("cut", [-1, -20, 100, 5])
def test_a_packed_file_that_is_cut_off(tmp_path, ending, cut):
    pack = {"gz": gzip.compress, "zst": zstandard.compress}[ending]
    text = os.urandom(2000).hex().encode()
    path = tmp_path / f"a.txt.{ending}"
    path.write_bytes((pack(b"whole") + pack(text))[: len(pack(b"whole")) + cut if cut > 0 else cut])
    with pytest.raises(DataError, match=r"^data.path: .*is not a whole (gzip|zstd) file"):
        texts_of(open_files(str(path)))


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_file_that_is_packed_by_its_name_alone(tmp_path, ending):
    path = tmp_path / f"a.txt.{ending}"
    path.write_bytes(b"some text, as it is")
    with pytest.raises(DataError, match="is not a whole"):
        texts_of(open_files(str(path)))


def test_a_cut_gzip_file(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"some text" * 1000)[:-20])
    with pytest.raises(DataError, match="not a whole gzip file"):
        texts_of(open_files(str(path)))


# What cannot be read.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc\xff\xfedef", "not UTF-8 text: byte 0xff at offset 3"),
        (b"caf\xc3", "byte 0xc3 at offset 3"),
        (b"\x89PNG\0\0", "binary"),
        (b"text\0text", "NUL byte at offset 4"),
    ],
)
def test_invalid_text_is_reported_with_its_offset(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts_of(open_files(str(path)))


def test_the_place_counts_from_the_start_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "BLOCK_BYTES", 7)
    path = tmp_path / "a.txt"
    path.write_bytes("é".encode() * 10 + b"\xff")
    with pytest.raises(DataError, match="offset 20"):
        texts_of(open_files(str(path)))


@pytest.mark.parametrize("place", [0, 499, 2000, 4998])
@pytest.mark.parametrize("byte", [0xFF, 0])
def test_the_place_counts_from_the_start_of_the_file_in_spans(tmp_path, monkeypatch, place, byte):
    monkeypatch.setattr(files, "PART_BYTES", 300)
    content = bytearray(b"some words " * 500)[:5000]
    content[place] = byte
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"at offset {place}\b"):
        texts_of(open_files(str(tmp_path)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 1}', "line 2 has no text in the field 'text'"),
        ('{"body": "x"}', "it has: body"),
        ("[1]", "line 2 is a list, not an object"),
        ('{"text"', "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("1" * 10_000, "line 2 is not JSON"),
        ('{"text": "\\ud800"}', "line 2 has an unpaired surrogate in the field 'text'"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        texts_of(open_files(str(path)))


@pytest.mark.parametrize("name", ["missing.txt", "*.txt", "empty_folder", "fifo"])
def test_nothing_to_read(tmp_path, name):
    (tmp_path / "empty_folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DataError, match=r"data\.path=.*" + name.replace("*", r"\*")):
        open_files(str(tmp_path / name))


@pytest.mark.parametrize("separator", ["\n\n", "aa", "<|endoftext|>"])
def test_separated_documents_are_those_of_the_whole_file(tmp_path, monkeypatch, separator):
    rng = random.Random(0)
    text = "".join(
        f"{rng.choice('bcd') * rng.randint(0, 30)}{separator * rng.randint(1, 3)}{separator[0] * 3}"
        for _ in range(300)
    )
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")

    def read() -> list[str]:
        parts = files.open_files(str(path), separator).parts()
        return ["".join(d.read()) for part in parts for d in part.documents()]

    whole = read()
    assert whole == text.split(separator)[: len(whole)]
    monkeypatch.setattr(files, "PART_BYTES", 200)
    assert len(files.open_files(str(path), separator).parts()) > 20
    assert [d for d in read() if d] == [d for d in whole if d]
