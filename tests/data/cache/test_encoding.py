import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from craft_jax.data import tokenizers
from craft_jax.data.cache import builder, encoding
from craft_jax.data.sources import decoding, documents, files
from craft_jax.data.sources.documents import Document
from craft_jax.data.sources.files import open_files
from craft_jax.data.sources.formats import Format, TextSpan
from craft_jax.errors import DataError
from tests.conftest import environment, words

PLAIN = Format()
ODD = (
    "naïve café 漢字仮名 👨\u200d👩\u200d👧 🇩🇪 the end\r\nof a line\r\n\r\n"
    "\tint x = 3;  // zwei  Leerzeichen\n\n\nאב ab cd\u3000ef gh ⅷ ² x\u0301 y\n"
)
TEXTS = {
    "words": words(3000),
    "odd": ODD * 80,
    "crlf": words(2000).replace("\n", "\r\n"),
    "code": "".join(f"def f_{n}(x):\n\treturn x  +  {n} # why not\n\n" for n in range(300)),
}


def tokenizer(kind, *texts):
    if kind == "char":
        return tokenizers.characters("".join(texts), end_token=True)
    if kind == "byte":
        return tokenizers.bytes_()
    return tokenizers.train_bpe(texts, 400)


def ids_of(path, made, folder, format=PLAIN, separator=None):
    built = builder.build(
        open_files(str(path), separator), tokenizer=made, format=format, folder=folder
    )
    return built.tokens.read(0, len(built.tokens)).tolist()


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
@pytest.mark.parametrize("name", TEXTS)
def test_spans_and_pieces_have_the_ids_of_the_whole(tmp_path, monkeypatch, kind, name):
    text = TEXTS[name]
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    made = tokenizer(kind, text)
    expected = [*made.encode(text).tolist(), made.end_id]
    assert ids_of(path, made, tmp_path / "whole") == expected
    monkeypatch.setattr(files, "PART_BYTES", 1700)
    monkeypatch.setattr(documents, "PIECE_CHARS", 250)
    monkeypatch.setattr(encoding, "_GROUP_CHARS", 600)
    assert len(open_files(str(path)).parts()) > 4
    assert ids_of(path, made, tmp_path / "parts") == expected


@pytest.mark.parametrize("kind", ["char", "byte"])
@pytest.mark.parametrize("text", ["漢字仮名🙂" * 500, "x" * 5000, "\r\n" * 2000, "\n" * 4000])
def test_text_without_spaces_is_cut_anywhere(tmp_path, monkeypatch, kind, text):
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    made = tokenizer(kind, text)
    monkeypatch.setattr(files, "PART_BYTES", 501)
    monkeypatch.setattr(documents, "PIECE_CHARS", 100)
    assert ids_of(path, made, tmp_path / "parts") == [*made.encode(text).tolist(), made.end_id]
    bpe = tokenizer("bpe", text)
    assert bpe.decode(ids_of(path, bpe, tmp_path / "bpe")) == text


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_long_json_lines_have_the_ids_of_the_whole(tmp_path, monkeypatch, kind):
    texts = [TEXTS["words"][: 37 * n] + ODD for n in range(60)]
    lines = [json.dumps({"text": text}) for text in texts]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    made = tokenizer(kind, *texts)
    monkeypatch.setattr(files, "PART_BYTES", 5000)
    monkeypatch.setattr(documents, "PIECE_CHARS", 250)
    expected = [id for text in texts for id in [*made.encode(text).tolist(), made.end_id]]
    assert ids_of(path, made, tmp_path / "cache") == expected


def test_documents_begin_where_they_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 400)
    monkeypatch.setattr(decoding, "BLOCK_BYTES", 64)
    texts = [f"{n} naïve words. " * (n % 13 + 1) for n in range(50)] + ["long words " * 300]
    path = tmp_path / "a.txt"
    path.write_text("<|endoftext|>".join(texts), encoding="utf-8")
    made = tokenizers.bytes_()
    source = open_files(str(path), "<|endoftext|>")
    built = builder.build(source, tokenizer=made, format=Format(), folder=tmp_path / "cache")
    assert built.documents["bytes"].tolist() == [len(text.encode()) for text in texts]
    bounds = [*built.documents["start"], len(built.tokens)]
    for text, start, stop in zip(texts, bounds, bounds[1:], strict=False):
        ids = built.tokens.read(start, stop)
        assert ids[-1] == made.end_id
        assert made.decode(ids) == text
    assert built.documents["key"][3] == encoding.document_key([TextSpan(texts[3])])


def test_the_bytes_of_a_document_in_several_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 500)
    texts = {"a.txt": TEXTS["odd"], "b.txt": "short", "c.txt": TEXTS["words"]}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    folder = tmp_path / "cache"
    source = open_files(str(tmp_path / "*.txt"))
    built = builder.build(source, tokenizer=tokenizers.bytes_(), format=Format(), folder=folder)
    sizes = [len(text.encode()) for text in texts.values()]
    assert built.documents["bytes"].tolist() == sizes
    assert built.documents["start"].tolist() == [0, sizes[0] + 1, sizes[0] + 1 + sizes[1] + 1]
    assert built.manifest["bytes"] == sum(sizes)
    assert built.manifest["characters"] == sum(map(len, texts.values()))


def test_the_key_of_a_long_text_is_that_of_its_first_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_CHARS", 100)

    def key(text):
        document = Document(place="here", read=lambda: iter((text,)))
        keys = [item.key for item in encoding.keyed(document, Format())]
        assert keys[1:] == [None] * (len(keys) - 1)
        return keys[0]

    assert key("one two " * 50) == key("one two " * 70)
    assert key("one two " * 50) != key("two two " * 50)
    assert 0 <= key("one") < 2**64


def test_empty_documents_are_left_out():
    empty = Document(place="here", read=lambda: iter(("", "")))
    assert list(encoding.keyed(empty, Format())) == []
    record = Document(place="here", fields={"text": ""})
    assert list(encoding.keyed(record, Format())) == []
    (rest,) = encoding.keyed(Document(place="here", read=lambda: iter(()), starts=False), Format())
    assert rest.ends and rest.span is None and rest.key is None


def folder_of_texts(tmp_path, count=6):
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(count):
        (folder / f"{n}.txt").write_text(words(9000, seed=n) + ODD, encoding="utf-8")
    lines = [{"text": words(20, seed=n)} for n in range(2000)]
    (folder / "z.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder


def content(path):
    """The bytes of all files of a cache, and its manifest without when and how it was made."""
    found = {f.name: f.read_bytes() for f in path.iterdir() if f.suffix in (".bin", ".json")}
    manifest = json.loads(found.pop("manifest.json"))
    return found, {k: v for k, v in manifest.items() if k not in ("created", "command", "checksum")}


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_one_process_and_two_make_the_same(tmp_path, monkeypatch, kind):
    folder = folder_of_texts(tmp_path)
    monkeypatch.setattr(files, "PART_BYTES", 40_000)
    monkeypatch.setattr(encoding.os, "sched_getaffinity", lambda _: {0, 1})
    made = tokenizer(kind, words(2000), ODD)
    source = open_files(str(folder))
    assert len(source.parts()) >= 6
    built = []
    for size in (1 << 40, 0):
        monkeypatch.setattr(encoding, "_IN_ONE_PROCESS", size)
        place = tmp_path / f"cache{size}"
        built.append(builder.build(source, tokenizer=made, format=Format(), folder=place).path)
    assert content(built[0]) == content(built[1])


def test_errors_come_from_other_processes(tmp_path, monkeypatch):
    folder = folder_of_texts(tmp_path)
    monkeypatch.setattr(files, "PART_BYTES", 40_000)
    monkeypatch.setattr(encoding.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(encoding, "_IN_ONE_PROCESS", 0)
    with (folder / "z.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n[]")
    source = open_files(str(folder))
    with pytest.raises(DataError, match=r"^data.path: .*z.jsonl line 2001 is a list"):
        builder.build(
            source, tokenizer=tokenizers.bytes_(), format=Format(), folder=tmp_path / "cache"
        )


def test_a_character_without_an_id_is_named_with_its_file(tmp_path):
    (tmp_path / "a.txt").write_text("aab", encoding="utf-8")
    (tmp_path / "b.txt").write_text("abc", encoding="utf-8")
    small = tokenizers.characters("ab", end_token=True)
    with pytest.raises(DataError, match=r"b.txt: the tokenizer does not know the character 'c'"):
        ids_of(tmp_path, small, tmp_path / "cache")


def test_the_markup_of_a_template_that_a_character_vocabulary_lacks(tmp_path):
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}), encoding="utf-8")
    small = tokenizers.characters("ab", end_token=True)
    with pytest.raises(DataError, match=r"a.jsonl line 1: the tokenizer does not know"):
        ids_of(tmp_path, small, tmp_path / "cache", Format(messages_field="messages"))


# Interruptions.

SLOWLY = """
import os, signal, sys
from pathlib import Path
from craft_jax.data import tokenizers
from craft_jax.data.cache import builder, encoding
from craft_jax.data.sources import files
from craft_jax.data.sources.formats import Format

files.PART_BYTES, encoding._IN_ONE_PROCESS = 4000, 1 << 40
encode, count = encoding.Encoding._encode, 0

def slowly(self, number, part):
    global count
    if count == 3:
        number_of = getattr(signal, sys.argv[3])
        os.kill(os.getpid(), number_of)
    encode(self, number, part)
    count += 1

encoding.Encoding._encode = slowly
source = files.open_files(sys.argv[1])
made = tokenizers.bytes_()
builder.build(source, tokenizer=made, format=Format(), folder=Path(sys.argv[2]))
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_complete_parts_survive_a_kill(tmp_path, monkeypatch, name, caplog):
    path = tmp_path / "a.txt"
    path.write_text(TEXTS["words"] + TEXTS["odd"], encoding="utf-8", newline="")
    folder = tmp_path / "cache"
    killed = [sys.executable, "-c", SLOWLY, str(path), str(folder), name]
    done = subprocess.run(killed, env=environment(), check=False, capture_output=True)
    assert done.returncode == -getattr(signal, name)
    (partial,) = folder.iterdir()
    made = {f: f.stat().st_mtime_ns for f in partial.glob("part-*.tokens")}
    assert {f.name for f in partial.glob("*.json")} == {f"part-{n}.json" for n in range(3)}

    monkeypatch.setattr(files, "PART_BYTES", 4000)
    encode, again = encoding.Encoding._encode, []

    def noted(self, number, part):
        again.append(number)
        encode(self, number, part)

    monkeypatch.setattr(encoding.Encoding, "_encode", noted)
    source, options = open_files(str(path)), {"tokenizer": tokenizers.bytes_(), "format": Format()}
    with caplog.at_level("INFO"):
        resumed = builder.build(source, folder=folder, **options)
    assert again == list(range(3, len(source.parts())))
    assert f"3 of {len(source.parts())} parts are done" in caplog.text
    assert list(folder.iterdir()) == [resumed.path]
    assert made
    whole = builder.build(source, folder=tmp_path / "whole", **options)
    assert content(resumed.path) == content(whole.path)


def test_the_files_of_parts_that_are_done_are_not_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 4000)
    path = tmp_path / "a.txt"
    path.write_text(TEXTS["words"], encoding="utf-8")
    parts = open_files(str(path)).parts()
    made = tokenizers.bytes_()
    task = encoding.Encoding(parts, Format(), made, tmp_path, np.dtype("<u2"), "a")
    task.batch(0)
    stamps = {f: f.stat().st_mtime_ns for f in tmp_path.glob("part-0.*")}
    assert {f.suffix for f in stamps} == {".tokens", ".documents", ".json"}
    assert task.batch(0)["num_bytes"] == parts[0].num_bytes
    assert {f: f.stat().st_mtime_ns for f in stamps} == stamps
    (tmp_path / "part-0.json").write_text("{", encoding="utf-8")  # Cut off: it is not done.
    assert encoding.done(tmp_path, 0) is None
    task.batch(0)
    assert encoding.done(tmp_path, 0)["tokens"] == (tmp_path / "part-0.tokens").stat().st_size // 2
