"""Every file that a person may name by mistake: it trains, or ends with 65 and one line."""

import codecs
import os
import random
import subprocess
import sys

import pytest

from craft_jax import main as cli
from craft_jax.data import pipeline
from craft_jax.data.settings import DataConfig
from craft_jax.data.sources import files
from tests.conftest import environment, micro

TEXT = "the cat sees a dog and finds the red fox\n" * 60

TRAINS = {
    "newlines": b"\n" * 3000,
    "bom": b"\xef\xbb\xbf" + TEXT.encode(),
    "crlf": TEXT.replace("\n", "\r\n").encode(),
    "one_letter_lines": b"a\nb\n" * 3000,
    "nfd_and_nfc": ("caf\u00e9 cafe\u0301 \u00fc u\u0308\n" * 200).encode(),
    "emoji": ("\U0001f468\u200d\U0001f469 \U0001f1e9\U0001f1ea \u05d0\u05d1\n" * 200).encode(),
    "end_tokens": ("<|endoftext|> in a text <|endoftext|>\n" * 100).encode(),
    "no_newline_at_the_end": TEXT.strip().encode(),
}  # fmt: skip
REFUSED = {
    "empty": (b"", "the text is empty"),
    "one_byte": (b"x", "needs at least"),
    "shorter_than_a_window": (b"ab", "needs at least"),
    "nul": (b"abc\0def" * 100, "NUL byte at offset 3"),
    "binary": (random.Random(0).randbytes(1 << 20), "at offset"),
    "not_utf8": (b"abc \xff\xfe def", "byte 0xff at offset 4"),
    "utf16": (TEXT.encode("utf-16"), "is UTF-16 text: byte 0xff at offset 0; convert"),
    "utf16_without_mark": (TEXT.encode("utf-16-le"), "is UTF-16LE text: NUL byte at offset 1"),
    "utf16_big_endian": (TEXT.encode("utf-16-be"), "is UTF-16BE text: NUL byte at offset 0"),
    "utf32": (TEXT.encode("utf-32"), "is UTF-32 text: byte 0xff at offset 0; convert"),
    "latin1": ("caf\u00e9\n" * 300).encode("latin-1"),
}
REFUSED["latin1"] = (REFUSED["latin1"], "byte 0xe9 at offset 3")


def train(path, workdir, capfd, **changes):
    """Trains: by one program, whatever the tokenizer, that other tests compile, too."""
    options = {"training__sample_every": 0, "model__vocab_size": 300} | changes
    code = cli.main([*micro(path, **options), f"--workdir={workdir}"])
    return code, capfd.readouterr().err


def read(path, workdir, capfd, **changes):
    """Reads all that a training would read, and trains nothing."""
    code = cli.main(["data", *micro(path, **changes), f"--workdir={workdir}"])
    return code, capfd.readouterr().err


def refused(path, workdir, capfd, said):
    before = set(workdir.glob("models/*"))
    check_refused(*train(path, workdir, capfd), said)
    assert set(workdir.glob("models/*")) == before


def check_refused(code, errors, said):
    assert code == 65, errors
    assert said in errors
    assert errors.startswith("data.")
    assert errors.count("\n") == 1


# Batches of all of them are made by default; these train, too, and the others on request.
TRAINED = ["newlines", "emoji"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in TRAINED else pytest.mark.soak) for n in TRAINS]
)
def test_texts_that_train(tmp_path, workdir, name, capfd):
    path = tmp_path / name
    path.write_bytes(TRAINS[name])
    code, errors = train(path, workdir, capfd, data__tokenizer="byte")
    assert code == 0, errors


@pytest.mark.parametrize("name", TRAINS)
def test_batches_of_texts_that_train(tmp_path, workdir, name, capfd):
    path = tmp_path / name
    path.write_bytes(TRAINS[name])
    code, errors = read(path, workdir, capfd, data__tokenizer="byte")
    assert code == 0, errors


@pytest.mark.parametrize("name", TRAINS)
@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_texts_round_trip(tmp_path, workdir, name, tokenizer):
    path = tmp_path / name
    path.write_bytes(TRAINS[name])
    config = DataConfig(path=str(path), tokenizer=tokenizer, vocab_size=300)
    (prepared,) = pipeline.prepare(config, workdir)
    tokens = prepared.caches["train"]
    ids = tokens.tokens.read(0, len(tokens.tokens))
    if tokenizer != "char":
        assert ids[-1] == tokens.tokenizer.end_id
    assert tokens.tokenizer.decode(ids).encode() == TRAINS[name].removeprefix(codecs.BOM_UTF8)


@pytest.mark.parametrize("name", REFUSED)
def test_texts_that_do_not(tmp_path, workdir, name, capfd):
    content, said = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content)
    refused(path, workdir, capfd, said)


def test_missing_files(tmp_path, workdir, capfd):
    places = {
        "nothing_here": "no such file or folder",
        "*.nothing": "no file matches",
        "folder": "contains no text file",
        "pipe": "neither a file nor a folder",
        "broken": "broken symlink",
        "loop": "broken symlink",
    }
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, said in places.items():
        refused(tmp_path / name, workdir, capfd, said)


ODD_NAMES = ["a space.txt", "\u6f22\u5b57.txt", "a\nline.txt", "x" * 200 + ".txt", b"caf\xe9.txt"]


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_odd_names(tmp_path, workdir, name, capfd):
    # A config value need not be able to spell them: they can stand in a folder.
    folder = tmp_path / "texts"
    folder.mkdir()
    path = folder / os.fsdecode(name)
    path.write_text(TEXT, encoding="utf-8")
    code, errors = read(folder, workdir, capfd, data__tokenizer="byte")
    assert code == 0, errors
    path.write_bytes(b"abc\xff")
    code, errors = train(folder, workdir, capfd)
    assert (code, errors.count("\n")) == (65, 1), errors
    assert "byte 0xff at offset 3" in errors
    assert files.shown(path) in errors


def test_names_are_shown_in_one_line():
    assert files.shown("a b/\u6f22.txt") == "a b/\u6f22.txt"
    assert files.shown(os.fsdecode(b"a\nb\t\xe9")) == r"a\nb\t\udce9"


@pytest.mark.parametrize("name", ["a space.txt", "\u6f22\u5b57.txt", "x" * 200])
def test_odd_names_in_the_config(tmp_path, workdir, name, capfd):
    path = tmp_path / name
    path.write_text(TEXT, encoding="utf-8")
    code, errors = read(path, workdir, capfd, data__tokenizer="byte")
    assert code == 0, errors
    refused(path.with_name("y" + name[1:]), workdir, capfd, "no such file or folder")


def test_an_unknown_home(workdir, capfd):
    refused("~nobody_of_this_name/text.txt", workdir, capfd, "no such file or folder")


def test_named_pipes_do_not_block(tmp_path, workdir, capfd):
    os.mkfifo(tmp_path / "pipe.tsv")
    words = micro("none", data__pairs=tmp_path / "pipe.tsv", data__tokenizer="char")
    del words[words.index("--config.data.path=none")]
    code = cli.main([*words, "--config.model.name=seq2seq", f"--workdir={workdir}"])
    check_refused(code, capfd.readouterr().err, "is not a file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path, workdir, capfd):
    path = tmp_path / "secret.txt"
    path.write_text(TEXT, encoding="utf-8")
    path.chmod(0)
    refused(path, workdir, capfd, "Permission denied")


@pytest.mark.soak
def test_a_line_of_a_gigabyte(tmp_path, workdir):
    path = tmp_path / "long.txt"
    with path.open("wb") as file:
        for _ in range(1000):
            file.write(b"the cat and the dog " * 50_000)
    # The `ru_maxrss` of a process begins with the peak of its parent, which is this one here.
    program = """if __name__ == "__main__":
        import pathlib, re, resource, sys
        from craft_jax.main import main
        code = main(sys.argv[1:])
        peak = re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())
        print(max(int(peak[1]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
        sys.exit(code)
    """
    script = tmp_path / "program.py"
    script.write_text(program, encoding="utf-8")
    words = ["prepare", *micro(path, data__tokenizer="byte"), f"--workdir={workdir}"]
    done = subprocess.run(
        [sys.executable, script, *words],
        env=environment(),
        cwd=tmp_path,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert int(done.stdout.split()[-1]) < 500_000
