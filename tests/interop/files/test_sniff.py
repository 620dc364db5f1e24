"""What a file is said to be, when it is not what a reader needs."""

import gzip
import io
import json
import tarfile
import zipfile

import numpy as np
import pytest

from interop.files.sniff import HEAD_BYTES, describe_bad_file

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548118077\n"


def describe(data: bytes) -> str | None:
    return describe_bad_file(data[:HEAD_BYTES], len(data))


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", "b")
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"), io.BytesIO())
    return buffer.getvalue()


def safetensors(length: int = 0) -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    header = header.ljust(length)
    return len(header).to_bytes(8, "little") + header + bytes(4)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "an empty file (0 bytes)"),
        (bytes(5000), "5000 bytes that start with zeros"),
        (LFS, f"a git-lfs pointer of {len(LFS)} bytes, not the weights; run: git lfs pull"),
        (b"\n  <!DOCTYPE html>\n<html>", "an HTML page (25 bytes)"),
        (b"\xef\xbb\xbf<HTML><head>", "an HTML page (15 bytes)"),
        (b'{"a": 1}', "JSON text (8 bytes)"),
        (b"[1, 2]", "JSON text (6 bytes)"),
        (b"{}", "JSON text (2 bytes)"),
        (gzip.compress(b"x", mtime=0), "a gzip archive; unpack it first"),
        (zipped(), "a zip archive"),
        (tarred(), "a tar archive (10240 bytes); unpack it first"),
        (b"\x93NUMPY\x01\x00", "a numpy .npy file"),
        (b"\x89HDF\r\n\x1a\nrest", "an HDF5 file"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b"Entry not found", "text (15 bytes) that starts with 'Entry not found'"),
        ("é".encode() * 4000, "text (8000 bytes)"),
        (safetensors(), "a safetensors file"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_descriptions_of_bad_files(data, words):
    assert words in describe(data)


@pytest.mark.parametrize("length", [0x8B1F, 0x4250, 640])
def test_a_header_length_that_spells_a_magic_number_is_a_header(length):
    assert describe(safetensors(length)).startswith("a safetensors file")


def test_a_truncated_safetensors_file_names_both_sizes():
    data = safetensors(1000)[:500]
    assert describe(data).startswith(
        "a truncated safetensors file (500 bytes; its header alone needs 1008)"
    )


def test_a_character_cut_by_the_end_of_the_head_is_still_text():
    data = b"a" * (HEAD_BYTES - 1) + "é".encode()
    assert describe(data).startswith(f"text ({HEAD_BYTES + 1} bytes)")


def test_a_long_first_line_is_cut():
    assert len(describe(b"x" * 4000)) < 120


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_not_recognised(seed):
    noise = np.random.default_rng(seed).integers(0, 256, 4096, dtype=np.uint8).tobytes()
    assert describe(noise) is None


@pytest.mark.parametrize(
    "data",
    [b"\x80", b"\x80\x02", b"\x80\x02}q\x00.", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."],
)
def test_a_pickle_is_not_recognised(data):
    assert describe(data) is None
