import json
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest

from craft_jax.data import cache, tokenizers
from craft_jax.data.sources import open_source
from craft_jax.errors import DataError, OutputError
from tests.conftest import environment, words


def build(path, workdir, tokenizer="char", **options):
    source = open_source("files", str(path))
    options = {"vocab_size": 300, "val_fraction": 0.1} | options
    return cache.build(source, tokenizer=tokenizer, folder=workdir / "data", **options)


def test_one_file_is_split_by_characters(text_file, workdir):
    text = text_file.read_text(encoding="utf-8")
    tokens = build(text_file, workdir)
    cut = int(len(text) * 0.9)
    assert tokens.tokenizer.decode(tokens.tokens("train")) == text[:cut]
    assert tokens.tokenizer.decode(tokens.tokens("val")) == text[cut:]
    assert tokens.tokens("train").dtype == np.uint16
    assert tokens.tokenizer.end_id is None
    assert tokens.num_bytes("train") + tokens.num_bytes("val") == len(text.encode())
    assert {p.name for p in tokens.path.iterdir()} == {
        "train.bin",
        "val.bin",
        "tokenizer.json",
        "manifest.json",
    }


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_documents_are_separated_by_the_end_token(tmp_path, workdir, kind):
    texts = [words(300, seed) for seed in range(4)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    tokens = build(tmp_path, workdir, kind, val_fraction=0.5)
    end, ids = tokens.tokenizer.end_id, [*tokens.tokens("train"), *tokens.tokens("val")]
    assert ids.count(end) == 4
    assert ids[-1] == end
    assert tokens.tokenizer.decode(ids) == "".join(texts)
    documents = np.split(ids, np.flatnonzero(np.array(ids) == end)[:-1] + 1)
    assert [tokens.tokenizer.decode(d) for d in documents] == texts


def test_the_validation_split_can_have_a_limit(text_file, workdir):
    text = text_file.read_text(encoding="utf-8")
    limited = build(text_file, workdir, max_val_chars=100)
    assert limited.tokenizer.decode(limited.tokens("val")) == text[-100:]
    assert len(build(text_file, workdir, max_val_chars=10**9).tokens("val")) == -(-len(text) // 10)


def test_an_equal_request_finds_the_cache(text_file, workdir):
    first = build(text_file, workdir)
    stamp = (first.path / "train.bin").stat().st_mtime_ns
    second = build(text_file, workdir)
    assert second.path == first.path
    assert (second.path / "train.bin").stat().st_mtime_ns == stamp
    assert build(text_file, workdir, "byte").path != first.path
    assert build(text_file, workdir, val_fraction=0.2).path != first.path
    assert build(text_file, workdir, vocab_size=400).path == first.path  # bpe alone reads it
    text_file.write_text(words(2500, seed=1), encoding="utf-8")
    assert build(text_file, workdir).digest != first.digest


def test_a_damaged_cache_is_made_again(text_file, workdir):
    first = build(text_file, workdir)
    expected = first.tokens("train").tolist()
    for file, content in (("train.bin", b"\0"), ("manifest.json", b"{"), ("tokenizer.json", b"")):
        (first.path / file).write_bytes(content)
        assert build(text_file, workdir).tokens("train").tolist() == expected


def test_a_flipped_bit_is_found(text_file, workdir, caplog):
    first = build(text_file, workdir)
    expected = first.tokens("val").tolist()
    content = bytearray((first.path / "val.bin").read_bytes())
    content[17] ^= 1
    (first.path / "val.bin").write_bytes(content)
    assert build(text_file, workdir).tokens("val").tolist() == expected
    assert "is damaged (val.bin: crc32 mismatch); making it again" in caplog.text


def test_ids_beyond_the_vocabulary_are_found(text_file, workdir, caplog):
    first = build(text_file, workdir)
    assert first.manifest["splits"]["train"]["largest"] == first.tokens("train").max()
    expected = first.tokens("train").tolist()
    ids = first.tokens("train").copy()
    ids[5] = 60_000
    ids.tofile(first.path / "train.bin")
    promised = first.manifest["splits"]["train"]
    promised |= {"crc32": f"{zlib.crc32(ids):08x}", "largest": 60_000}
    (first.path / "manifest.json").write_text(json.dumps(first.manifest), encoding="utf-8")
    assert build(text_file, workdir).tokens("train").tolist() == expected
    assert "train.bin has ids up to 60000" in caplog.text


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_a_text_that_changes_while_it_is_read(text_file, workdir, monkeypatch, tokenizer):
    survey = cache._survey

    def and_replace(source, want_alphabet):
        found = survey(source, want_alphabet)
        text_file.write_text("NEW " + words(2400, seed=3), encoding="utf-8")
        return found

    monkeypatch.setattr(cache, "_survey", and_replace)
    with pytest.raises(DataError, match=r"^data.path=.*the text changed while it was tokenized"):
        build(text_file, workdir, tokenizer)
    assert not list((workdir / "data").iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_leaves_nothing(text_file, workdir, monkeypatch, error):
    def interrupted(*_):
        raise error

    monkeypatch.setattr(cache, "_encode", interrupted)
    with pytest.raises(error):
        build(text_file, workdir)
    assert not list((workdir / "data").iterdir())


def test_what_killed_builders_left_goes(text_file, workdir):
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from craft_jax.data import cache, sources\n"
        "cache._encode = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "cache.build(sources.open_source('files', sys.argv[1]), tokenizer='byte',\n"
        "    vocab_size=300, val_fraction=0.1, folder=Path(sys.argv[2]))\n"
    )
    folder = workdir / "data"
    killed = [sys.executable, "-c", program, str(text_file), str(folder)]
    assert subprocess.run(killed, env=environment(), check=False).returncode == -9
    (left,) = folder.iterdir()
    alive = folder / left.name.replace(left.name.rpartition("-")[2], str(os.getppid()))
    elsewhere = folder / ".0123456789abcdef.tmp-another-host-1"
    for other in (alive, elsewhere):
        other.mkdir()
    tokens = build(text_file, workdir)
    assert set(folder.iterdir()) == {tokens.path, alive, elsewhere}


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
    manifest = json.loads((build(text_file, workdir).path / "manifest.json").read_text())
    assert manifest["source"]["documents"] == manifest["source"]["files"] == 1
    assert manifest["source"]["bytes"] == text_file.stat().st_size
    assert manifest["source"]["digest"] == open_source("files", str(text_file)).digest()
    assert manifest["tokenizer"]["kind"] == "char"


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
@pytest.mark.parametrize("val_fraction", [0, 0.5])
def test_tiny_texts(tmp_path, workdir, kind, val_fraction):
    path = tmp_path / "a.txt"
    path.write_text("\U0001f642", encoding="utf-8")
    tokens = build(path, workdir, kind, val_fraction=val_fraction)
    ids = [*tokens.tokens("train"), *tokens.tokens("val")]
    assert tokens.tokenizer.decode(ids) == "\U0001f642"


def test_an_empty_text(tmp_path, workdir):
    (tmp_path / "a.txt").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="empty"):
        build(tmp_path / "a.txt", workdir)
    assert not list((workdir / "data").iterdir())


def test_a_place_that_cannot_be_written(text_file, tmp_path):
    (tmp_path / "outputs").write_text("a file", encoding="utf-8")
    with pytest.raises(OutputError, match="cannot write"):
        build(text_file, tmp_path / "outputs")


def test_one_line_of_fifty_megabytes_in_bounded_memory(tmp_path):
    path = tmp_path / "line.txt"
    rng = np.random.default_rng(0)
    vocabulary = ["".join(map(chr, rng.integers(97, 123, 5))) for _ in range(500)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(50):
            file.write(" ".join(rng.choice(vocabulary, 167_000)))
    program = (
        "import re, sys; from pathlib import Path\n"
        "from craft_jax.data import cache, sources\n"
        "c = cache.build(sources.open_source('files', sys.argv[1]), tokenizer='byte',\n"
        "    vocab_size=300, val_fraction=0.1, folder=Path(sys.argv[2]))\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())\n"
        "print(c.manifest['source']['bytes'], peak[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), str(tmp_path / "data")],
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
        "import sys; from pathlib import Path\n"
        "from craft_jax.data import cache, sources\n"
        "c = cache.build(sources.open_source('files', sys.argv[1]), tokenizer='bpe',\n"
        "    vocab_size=300, val_fraction=0.1, folder=Path(sys.argv[2]))\n"
        "print(c.path.name, len(c.tokens('train')))"
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
    said = {child.communicate(timeout=60)[0] for child in children}
    assert len(said) == 1
    assert all(child.returncode == 0 for child in children)
    assert len(os.listdir(workdir / "data")) == 1
