import json
import os
import random
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

from craft_jax.data import tokenizers
from craft_jax.data.cache import builder, encoding, token_cache
from craft_jax.data.cache.token_cache import Shards
from craft_jax.data.sources import files as sources
from craft_jax.data.sources.files import open_files
from craft_jax.data.sources.formats import Format
from craft_jax.data.splits import Fractions
from craft_jax.data.tokenizers import vocabulary
from craft_jax.errors import DataError, OutputError, StorageError
from tests.conftest import environment, words

PLAIN = Format()
MASKED = Format(prompt_field="prompt")


def build(path, workdir, kind="char", format=PLAIN, **options):
    source, folder = open_files(str(path)), workdir / "data"
    if isinstance(kind, str):
        kind = vocabulary.train(
            kind,
            [source],
            format,
            fractions=Fractions(0.1),
            folder=workdir / "tokenizers",
            **{"vocab_size": 300} | options,
        )
    return builder.build(source, tokenizer=kind, format=format, folder=folder)


def ids_of(tokens) -> list[int]:
    return tokens.tokens.read(0, len(tokens.tokens)).tolist()


def records(tmp_path, count=40):
    path = tmp_path / "a.jsonl"
    lines = [{"prompt": f"{n}: ", "text": words(n, seed=n)} for n in range(1, count)]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def test_one_file_is_one_document_of_characters(text_file, workdir):
    text = text_file.read_text(encoding="utf-8")
    tokens = build(text_file, workdir)
    assert tokens.tokenizer.decode(ids_of(tokens)) == text
    assert tokens.tokens.dtype == np.uint16
    assert tokens.tokenizer.end_id is None
    assert tokens.loss_mask is None
    assert tokens.documents["start"].tolist() == [0]
    assert tokens.documents["bytes"].tolist() == [len(text.encode())]
    assert {p.name for p in tokens.path.iterdir()} == {
        "tokens-00000.bin",
        "documents.bin",
        "tokenizer.json",
        "manifest.json",
    }


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_documents_are_separated_by_the_end_token(tmp_path, workdir, kind):
    texts = [words(300, seed) for seed in range(4)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    tokens = build(tmp_path, workdir, kind)
    end, ids = tokens.tokenizer.end_id, ids_of(tokens)
    assert ids.count(end) == 4
    assert ids[-1] == end
    assert tokens.tokenizer.decode(ids) == "".join(texts)
    documents = np.split(ids, np.flatnonzero(np.array(ids) == end)[:-1] + 1)
    assert [tokens.tokenizer.decode(d) for d in documents] == texts
    assert tokens.documents["start"].tolist() == np.cumsum([0, *map(len, documents[:-1])]).tolist()


def test_an_equal_request_reuses_the_cache(text_file, workdir):
    first = build(text_file, workdir)
    stamp = (first.path / "tokens-00000.bin").stat().st_mtime_ns
    second = build(text_file, workdir)
    assert second.path == first.path
    assert (second.path / "tokens-00000.bin").stat().st_mtime_ns == stamp
    assert build(text_file, workdir, "byte").path != first.path
    assert build(text_file, workdir, vocab_size=400).path == first.path  # bpe alone reads it
    assert build(text_file, workdir, format=Format(text_field="body")).path != first.path
    text_file.write_text(words(2500, seed=1), encoding="utf-8")
    assert build(text_file, workdir).digest != first.digest


def test_a_large_vocabulary_has_larger_ids(tmp_path, workdir):
    (tmp_path / "a.txt").write_text("ab" * 100, encoding="utf-8")
    small = tokenizers.characters("ab", end_token=False)
    assert build(tmp_path / "a.txt", workdir, small).tokens.dtype == np.uint16
    huge = tokenizers.characters(map(chr, range(0xE000, 0x22000)), end_token=False)
    (tmp_path / "b.txt").write_text("\ue000\U0001f642\U00021fff", encoding="utf-8")
    tokens = build(tmp_path / "b.txt", workdir, huge)
    assert tokens.tokens.dtype == np.uint32
    assert ids_of(tokens) == [0, 0x1F642 - 0xE000, 0x21FFF - 0xE000]


# Damage.


@pytest.fixture
def masked(tmp_path, workdir):
    """A cache with every kind of file in it, and what makes it again."""
    path = records(tmp_path)

    def again():
        return build(path, workdir, format=MASKED)

    return again(), again


def everything(tokens):
    return (
        ids_of(tokens),
        tokens.loss_mask.read(0, len(tokens.loss_mask)).tolist(),
        tokens.documents.tolist(),
        tokens.tokenizer.json,
    )


FILES = ("tokens-00000.bin", "mask-00000.bin", "documents.bin", "tokenizer.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_cache_is_rebuilt(masked, name, caplog):
    first, again = masked
    expected = everything(first)
    assert {p.name for p in first.path.iterdir()} == set(FILES)
    whole = (first.path / name).read_bytes()
    for content in (b"", b"\0", whole[:-2], whole[: len(whole) // 2], whole + b"x"):
        (first.path / name).write_bytes(content)
        assert everything(again()) == expected
        assert "is damaged" in caplog.text
        caplog.clear()
    (first.path / name).unlink()
    assert everything(again()) == expected
    assert [p.name for p in first.path.parent.iterdir()] == [first.path.name]
    # A folder in its place, or one that is empty.
    (first.path / name).unlink()
    (first.path / name).mkdir()
    assert everything(again()) == expected
    for file in first.path.iterdir():
        file.unlink()
    assert everything(again()) == expected


@pytest.mark.parametrize("name", FILES[:3])
def test_a_flipped_bit_is_detected(masked, name, caplog):
    first, again = masked
    expected = everything(first)
    content = bytearray((first.path / name).read_bytes())
    content[17] ^= 1
    (first.path / name).write_bytes(content)
    assert everything(again()) == expected
    assert f"is damaged ({name}: crc32 mismatch); building it again" in caplog.text


@pytest.mark.parametrize("name", FILES[3:])
def test_a_flipped_bit_of_a_description_does_no_harm(masked, name):
    first, again = masked
    expected = everything(first)
    rng = random.Random(0)
    for _ in range(40):
        content = bytearray((first.path / name).read_bytes())
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        (first.path / name).write_bytes(content)
        assert everything(again()) == expected, content[max(0, place - 20) : place + 20]


def test_every_digit_of_a_manifest_is_checked(masked):
    first, again = masked
    expected = everything(first)
    whole = (first.path / "manifest.json").read_text(encoding="utf-8")
    facts = ("documents", "learned", "tokens", "largest", "bytes")
    for line in {
        line
        for line in whole.splitlines()
        if line.strip().startswith(tuple(f'"{fact}":' for fact in facts))
    }:
        name, _, number = line.rstrip(",").partition(": ")
        for other in (int(number) - 1, int(number) + 1):
            changed = whole.replace(line, line.replace(number, str(other)))
            (first.path / "manifest.json").write_text(changed, encoding="utf-8")
            assert everything(again()) == expected, (name, number, other)


def test_ids_beyond_the_vocabulary_are_detected(text_file, workdir, caplog):
    first = build(text_file, workdir)
    assert first.manifest["largest"] == max(ids_of(first))
    expected = ids_of(first)
    file = first.path / "tokens-00000.bin"
    ids = np.fromfile(file, first.tokens.dtype)
    ids[5] = 60_000
    ids.tofile(file)
    first.manifest["files"][file.name]["crc32"] = f"{zlib.crc32(ids):08x}"
    first.manifest["largest"] = 60_000
    first.manifest["checksum"] = token_cache.checksum_of(first.manifest)
    (first.path / "manifest.json").write_text(json.dumps(first.manifest), encoding="utf-8")
    assert ids_of(build(text_file, workdir)) == expected
    assert "its largest id is 60000" in caplog.text


def test_a_replaced_tokenizer_is_detected(text_file, workdir, caplog):
    first = build(text_file, workdir)
    expected = ids_of(first)
    other = tokenizers.characters("".join(map(chr, range(32, 300))), end_token=False)
    (first.path / "tokenizer.json").write_text(other.json, encoding="utf-8")
    again = build(text_file, workdir)
    assert again.tokenizer.digest == first.tokenizer.digest
    assert ids_of(again) == expected
    assert "its digests do not agree" in caplog.text


def unfinished(path, workdir, made, monkeypatch):
    """Makes all parts of a cache, and nothing else; returns where they are."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "PART_BYTES", 700)
    with monkeypatch.context() as patch:
        patch.setattr(builder, "_joined", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(path, workdir, made, MASKED)
    (partial,) = (workdir / "data").iterdir()
    return partial


@pytest.mark.parametrize("ending", [".tokens", ".documents", ".mask", ".json"])
@pytest.mark.parametrize("content", [None, b"", b"x" * 24])
def test_an_incomplete_part_is_encoded_again(tmp_path, workdir, monkeypatch, ending, content):
    path, made = records(tmp_path), tokenizers.bytes_()
    expected = everything(build(path, tmp_path / "other", made, MASKED))
    file = unfinished(path, workdir, made, monkeypatch) / f"part-1{ending}"
    assert file.stat().st_size > 24
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert everything(build(path, workdir, made, MASKED)) == expected


def test_a_flipped_bit_of_a_part_is_detected(tmp_path, workdir, monkeypatch):
    path, made = records(tmp_path), tokenizers.bytes_()
    partial = unfinished(path, workdir, made, monkeypatch)
    content = bytearray((partial / "part-1.tokens").read_bytes())
    content[4] ^= 1
    (partial / "part-1.tokens").write_bytes(content)
    with pytest.raises(StorageError, match=r"part-1.tokens is damaged; run the command again"):
        build(path, workdir, made, MASKED)
    assert everything(build(path, workdir, made, MASKED)) == everything(
        build(path, workdir / "other", made, MASKED)
    )


# Building.


@pytest.mark.parametrize("kind", ["byte", "char"])
def test_a_text_that_changes_while_it_is_read(text_file, workdir, monkeypatch, kind):
    run = encoding.run
    made = tokenizers.characters(text_file.read_text(encoding="utf-8"), end_token=False)

    def replaced(*args):
        text_file.write_text("NEW " + words(2400, seed=3), encoding="utf-8")
        run(*args)

    monkeypatch.setattr(encoding, "run", replaced)
    with pytest.raises(DataError, match=r"^data.path=.*the text changed while it was tokenized"):
        build(text_file, workdir, made if kind == "char" else kind)
    # What was made of it is found by no later request.
    monkeypatch.setattr(encoding, "run", run)
    assert build(text_file, workdir, "byte").manifest["bytes"] == text_file.stat().st_size


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_before_a_part_is_done_leaves_nothing(
    text_file, workdir, monkeypatch, error
):
    def interrupted(*_):
        raise error

    monkeypatch.setattr(encoding, "run", interrupted)
    with pytest.raises(error):
        build(text_file, workdir)
    assert not list((workdir / "data").iterdir())


def test_stale_partial_caches_are_removed(text_file, workdir):
    (workdir / "data").mkdir(parents=True)
    old, new = (workdir / "data" / f".{n}{'0' * 15}.partial" for n in (1, 2))
    for folder in (old, new):
        folder.mkdir()
    month_ago = time.time() - 31 * 24 * 3600
    os.utime(old, (month_ago, month_ago))
    tokens = build(text_file, workdir)
    assert set((workdir / "data").iterdir()) == {tokens.path, new}


def test_a_resumed_partial_cache_is_kept(text_file, workdir, monkeypatch):
    expected = ids_of(build(text_file, workdir / "other"))
    monkeypatch.setattr(sources, "PART_BYTES", 4000)

    def interrupted(*_):
        raise KeyboardInterrupt

    joined = builder._joined
    monkeypatch.setattr(builder, "_joined", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(text_file, workdir)
    monkeypatch.setattr(builder, "_joined", joined)
    (partial,) = (workdir / "data").iterdir()
    month_ago = time.time() - 31 * 24 * 3600
    os.utime(partial, (month_ago, month_ago))
    assert ids_of(build(text_file, workdir)) == expected


def test_a_tokenizer_of_the_users_own(text_file, tmp_path, workdir):
    own = tokenizers.train_bpe([words(500)], 280)
    (tmp_path / "tokenizer.json").write_text(own.json, encoding="utf-8")
    tokens = build(text_file, workdir, str(tmp_path / "tokenizer.json"))
    assert tokens.tokenizer.digest == own.digest
    assert tokens.digest == build(text_file, workdir, own).digest
    small = tokenizers.characters("abc", end_token=False)
    with pytest.raises(DataError, match="does not know the character"):
        build(text_file, workdir, small)
    assert len(list((workdir / "data").iterdir())) == 1  # Nothing half-written stays.


def test_manifest(text_file, workdir):
    tokens = build(text_file, workdir)
    manifest = json.loads((tokens.path / "manifest.json").read_text())
    assert manifest == tokens.manifest
    assert manifest["documents"] == manifest["source"]["files"] == 1
    assert manifest["bytes"] == manifest["characters"] == text_file.stat().st_size
    assert manifest["tokens"] == manifest["learned"] == len(tokens.tokens)
    assert manifest["source"]["digest"] == open_files(str(text_file)).digest()
    assert manifest["source"]["name"] == "words"
    assert manifest["source"]["origin"] == f"data.path={text_file}"
    assert manifest["tokenizer"]["digest"] == tokens.tokenizer.digest
    assert tokens.path.name == manifest["digest"][:16]


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_tiny_texts(tmp_path, workdir, kind):
    path = tmp_path / "a.txt"
    path.write_text("\U0001f642", encoding="utf-8")
    tokens = build(path, workdir, kind)
    assert tokens.tokenizer.decode(ids_of(tokens)) == "\U0001f642"


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_empty_text(tmp_path, workdir, kind, name):
    (tmp_path / name).write_text("\n" if name == "a.jsonl" else "", encoding="utf-8")
    with pytest.raises(DataError, match=r"^data.path=.*the text is empty"):
        build(tmp_path / name, workdir, kind)
    assert not list((workdir / "data").glob("[!.]*"))


def test_a_place_that_cannot_be_written(text_file, tmp_path):
    (tmp_path / "outputs").write_text("a file", encoding="utf-8")
    for kind in ("char", "byte"):
        with pytest.raises(OutputError, match="cannot write"):
            build(text_file, tmp_path / "outputs", kind)


def test_a_full_disk(text_file, workdir, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoding._Writer, "finish", full)
    with pytest.raises(StorageError, match=r"cannot write the token cache.*No space left"):
        build(text_file, workdir)
    assert not list((workdir / "data").iterdir())


@pytest.mark.parametrize("packed", [False, True])
def test_one_line_of_fifty_megabytes_in_bounded_memory(tmp_path, packed):
    path = tmp_path / "line.txt"
    rng = np.random.default_rng(0)
    vocabulary = ["".join(map(chr, rng.integers(97, 123, 5))) for _ in range(500)]
    with path.open("w", encoding="utf-8") as file:
        line = " ".join(rng.choice(vocabulary, 167_000))
        for _ in range(50):
            file.write(line)
    if packed:
        subprocess.run(["gzip", "-1", str(path)], check=True)
        path = path.with_suffix(".txt.gz")
    program = (
        "import re, sys; from pathlib import Path\n"
        "from craft_jax.data import tokenizers; from craft_jax.data.cache import builder\n"
        "from craft_jax.data.sources import files, formats\n"
        "c = builder.build(files.open_files(sys.argv[1]), tokenizer=tokenizers.bytes_(),\n"
        "    format=formats.Format(), folder=Path(sys.argv[2]))\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())\n"
        "print(c.manifest['bytes'], peak[1])"
    )
    # A program that spawns must be importable without running again.
    script = tmp_path / "program.py"
    body = program.replace("\n", "\n    ")
    script.write_text(f"if __name__ == '__main__':\n    {body}\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(path), str(tmp_path / "data")],
        env=environment() | {"TOKENIZERS_PARALLELISM": "true"},
        capture_output=True,
        text=True,
        check=True,
    )
    num_bytes, peak_kb = map(int, done.stdout.split())
    assert num_bytes > 50e6
    assert peak_kb < 400_000


def test_builders_beside_each_other_agree(text_file, workdir):
    program = (
        "import os, sys; from pathlib import Path\n"
        "from craft_jax.data import tokenizers\n"
        "from craft_jax.data.cache import builder, encoding\n"
        "from craft_jax.data.sources import files, formats\n"
        "files.PART_BYTES = 3000\n"
        "encode, count = encoding.Encoding._encode, [0]\n"
        "def counted(*args): count[0] += 1; encode(*args)\n"
        "encoding.Encoding._encode = counted\n"
        "c = builder.build(files.open_files(sys.argv[1]), tokenizer=tokenizers.bytes_(),\n"
        "    format=formats.Format(), folder=Path(sys.argv[2]))\n"
        "print(c.path.name, len(c.tokens), count[0])"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(text_file), str(workdir / "data")],
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = [child.communicate(timeout=60)[0].split() for child in children]
    assert all(child.returncode == 0 for child in children)
    assert len({tuple(words[:2]) for words in said}) == 1
    # One of them did all the work.
    assert sorted(int(words[2]) for words in said)[:2] == [0, 0]
    assert len(os.listdir(workdir / "data")) == 1


# Shards.


@pytest.mark.parametrize("size", [1, 700, 5000])
def test_many_shards_equal_one(tmp_path, monkeypatch, size):
    path = records(tmp_path)
    made = tokenizers.bytes_()
    one = build(path, tmp_path / "one", made, MASKED)
    monkeypatch.setattr(sources, "PART_BYTES", 200)
    monkeypatch.setattr(builder, "_SHARD_BYTES", size)
    many = build(path, tmp_path / "many", made, MASKED)
    assert (len(many.tokens.files) > 10) == (size == 1)
    assert everything(many) == everything(one)
    whole = np.array(ids_of(one))
    rng = np.random.default_rng(0)
    for start, stop in rng.integers(0, len(whole), (50, 2)):
        start, stop = min(start, stop), max(start, stop) + 1
        assert np.array_equal(many.tokens.read(start, stop), whole[start:stop])
    index = rng.integers(0, len(whole), 300)
    assert np.array_equal(many.tokens.take(index), whole[index])
    assert np.array_equal(one.tokens.take(index), whole[index])
    number = len(many.tokens.files) - 1
    last = int(many.tokens.bounds[number])
    assert many.tokens.place(last + 3) == f"{many.path}/tokens-{number:05}.bin token 3"


def test_a_last_part_without_text_makes_no_file(tmp_path, workdir, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 60)
    monkeypatch.setattr(builder, "_SHARD_BYTES", 1)
    lines = [json.dumps({"text": "some words"})] * 20
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n" * 300, encoding="utf-8")
    tokens = build(tmp_path / "a.jsonl", workdir, "byte")
    assert tokens.tokenizer.decode(ids_of(tokens)) == "some words" * 20
    assert len(tokens.documents) == 20


def test_shards_of_an_array(tmp_path):
    files, counts = [], [3, 1, 5]
    for n, count in enumerate(counts):
        files.append(tmp_path / f"{n}.bin")
        (np.arange(count, dtype=np.uint16) + 10 * n).tofile(files[-1])
    shards = Shards(files, counts, np.uint16)
    whole = [0, 1, 2, 10, 20, 21, 22, 23, 24]
    assert len(shards) == 9
    for start in range(9):
        for stop in range(start + 1, 10):
            assert shards.read(start, stop).tolist() == whole[start:stop]
    assert shards.take(np.array([8, 0, 3, 3])).tolist() == [24, 0, 10, 10]
