"""Says what a file is, from its first bytes, when it is not what a reader needs.

The first bytes of a file flow in; half a sentence for a person flows out. Readers ask here after
their own check has failed, so nothing here can refuse a good file.
"""

import re
import string

HEAD_BYTES = 4096
"""How much of a file `describe_bad_file` looks at."""

_LFS = b"version https://git-lfs"
_BINARY: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ\0", "an xz archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive; unpack it first"),
    (b"Rar!\x1a\x07", "a RAR archive; unpack it first"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "a zip archive with nothing in it"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras or TensorFlow)"),
    (b"GGUF", "a GGUF file (llama.cpp)"),
    (b"\x93NUMPY", "a numpy .npy file"),
    (b"\x7fELF", "a program"),
    (b"%PDF-", "a PDF document"),
    (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (b"SQLite format 3\0", "an SQLite database"),
)
_HTML = re.compile(rb"\s*<(!doctype\s+html|html|head|body|!--)", re.IGNORECASE)
_JSON = re.compile(rb'\s*(\{\s*("|\})|\[\s*["\[{\d\]-])')
_TEXT = frozenset(string.printable.encode()) - frozenset(b"\x0b\x0c")
_TAR_MAGIC = slice(257, 262)


def describe_bad_file(head: bytes, size: int) -> str | None:
    """Returns what a file is, as in "the file is ...", or None if nothing is recognised.

    Args:
      head: its first `HEAD_BYTES` bytes, or all of them if there are fewer.
      size: its size in bytes.
    """
    if size == 0:
        return "an empty file (0 bytes); download or save it again"
    # Before the magic numbers: the length of a header can spell one.
    if found := _safetensors(head, size):
        return found
    if not head.strip(b"\0"):
        return f"{size} bytes that start with zeros; the download or the save was interrupted"
    if head.startswith(_LFS):
        return f"a git-lfs pointer of {size} bytes, not the weights; run: git lfs pull"
    for magic, what in _BINARY:
        if head.startswith(magic):
            return f"{what} ({size} bytes)"
    if head[_TAR_MAGIC] == b"ustar":
        return f"a tar archive ({size} bytes); unpack it first"
    return _text(head, size)


def _safetensors(head: bytes, size: int) -> str | None:
    length = int.from_bytes(head[:8], "little")
    if len(head) < 10 or head[8:9] != b"{" or length < 2 or not _JSON.match(head, 8):
        return None
    if 8 + length > size:
        return (
            f"a truncated safetensors file ({size} bytes; its header alone needs {8 + length}); "
            "download it again"
        )
    return f"a safetensors file ({size} bytes); name it .safetensors"


def _text(head: bytes, size: int) -> str | None:
    text = head.removeprefix(b"\xef\xbb\xbf")
    if _HTML.match(text):
        return f"an HTML page ({size} bytes), such as a login or error page; download it again"
    if not _is_text(text, cut=size > len(head)):
        return None
    if _JSON.match(text):
        return f"JSON text ({size} bytes)"
    first = text.decode("utf-8", "ignore").strip().split("\n")[0][:60].rstrip()
    return f"text ({size} bytes) that starts with {first!r}"


def _is_text(head: bytes, cut: bool) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if not cut or error.start < len(head) - 3:
            return False
    return all(byte in _TEXT or byte >= 0x80 for byte in head)
