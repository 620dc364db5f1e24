"""Every file that a person may name by mistake: it trains, or ends with 65 and one line."""

import os
import random
import resource
import subprocess

import pytest

from craft_jax import main as cli
from tests.conftest import command, environment, micro

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
    "utf16": (TEXT.encode("utf-16"), "byte 0xff at offset 0"),
    "latin1": ("caf\u00e9\n" * 300).encode("latin-1"),
}
REFUSED["latin1"] = (REFUSED["latin1"], "byte 0xe9 at offset 3")


def train(path, workdir, capfd, **changes):
    options = {"training__num_steps": 1, "training__sample_every": 0} | changes
    code = cli.main([*micro(path, **options), f"--workdir={workdir}"])
    return code, capfd.readouterr().err


def refused(path, workdir, capfd, said):
    code, errors = train(path, workdir, capfd)
    assert code == 65, errors
    assert said in errors
    assert errors.startswith("data.")
    assert errors.count("\n") == 1
    assert not (workdir / "models").exists()


@pytest.mark.parametrize("name", TRAINS)
@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_texts_that_train(tmp_path, workdir, name, tokenizer, capfd):
    path = tmp_path / name
    path.write_bytes(TRAINS[name])
    code, errors = train(path, workdir, capfd, data__tokenizer=tokenizer)
    assert code == 0, errors


@pytest.mark.parametrize("name", REFUSED)
def test_texts_that_do_not(tmp_path, workdir, name, capfd):
    content, said = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content)
    refused(path, workdir, capfd, said)


def test_what_is_no_file(tmp_path, workdir, capfd):
    places = {
        "nothing_here": "no such file or folder",
        "*.nothing": "no file matches",
        "folder": "holds no text file",
        "pipe": "neither a file nor a folder",
        "broken": "no such file or folder",
        "loop": "no such file or folder",
    }
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, said in places.items():
        refused(tmp_path / name, workdir, capfd, said)


@pytest.mark.parametrize("name", ["a space.txt", "\u6f22\u5b57.txt", "a\nline.txt", "x" * 200])
def test_odd_names(tmp_path, workdir, name, capfd):
    path = tmp_path / name
    path.write_text(TEXT, encoding="utf-8")
    code, errors = train(path, workdir, capfd)
    assert code == 0, errors
    path.write_bytes(b"abc\xff")
    code, errors = train(path, workdir, capfd)
    assert code == 65


def test_a_name_that_is_not_unicode(tmp_path, workdir, capfd):
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    path.write_text(TEXT, encoding="utf-8")
    assert train(path, workdir, capfd)[0] == 0


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("CRAFT_FAULTS_FULL"), reason="a gigabyte; set CRAFT_FAULTS_FULL"
)
def test_a_line_of_a_gigabyte(tmp_path, workdir):
    path = tmp_path / "long.txt"
    with path.open("wb") as file:
        for _ in range(1000):
            file.write(b"the cat and the dog " * 50_000)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    words = command("prepare", *micro(path), f"--workdir={workdir}")
    subprocess.run(words, env=environment(), cwd=tmp_path, check=True)
    peak = max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    assert peak < 500_000, f"{peak} kB"
