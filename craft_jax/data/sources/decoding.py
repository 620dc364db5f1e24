"""Bytes of files to UTF-8 text, as streams, unpacking `.gz` and `.zst`.

A leading byte order mark is dropped. Errors name the file, the offset and a remedy.
"""

import codecs
import gzip
import importlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from craft_jax.data.sources.documents import shown
from craft_jax.errors import DataError

BLOCK_BYTES = 1 << 20
_PACKED_BLOCK_BYTES = 1 << 17
PACKED = {".gz": "gzip", ".zst": "zstd"}
_NOT_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)
_HEAD_BYTES = 1 << 10
_MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),  # Before UTF-16, whose mark is a prefix.
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


class FileSpan(NamedTuple):
    """A file, or a range of its bytes.

    Attributes:
      path: the file.
      start, stop: the range; `stop` is None for the end of the file.
    """

    path: Path
    start: int = 0
    stop: int | None = None


def open_plain(path: Path, field: str = "data.path") -> BinaryIO:
    """Opens a regular file to read bytes.

    Raises:
      DataError: it cannot be opened.
    """
    try:
        # Opening a named pipe would block until something writes into it.
        if path.exists() and not path.is_file() and not path.is_dir():
            raise DataError(f"{field}: {shown(path)} is not a file; name a text file")
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{field}: cannot read {shown(path)}: {error.strerror}") from error


def blocks(
    path: Path, field: str = "data.path", start: int = 0, stop: int | None = None
) -> Iterator[bytes]:
    """Yields the bytes of a file, unpacked if its name ends in .gz or .zst.

    Args:
      path: the file.
      field: the config field or flag that names it, for messages.
      start, stop: byte range on disk; `stop` is None for the end of the file.

    Raises:
      DataError: it cannot be read, or unpacked.
    """
    with open_plain(path, field) as plain:
        left = None if stop is None else stop - start
        kind = PACKED.get(path.suffix)
        unpacked: tuple[type[Exception], ...] = ()
        file: Any = plain
        if kind == "gzip":
            file, unpacked = gzip.GzipFile(fileobj=plain), _NOT_GZIP
        elif kind == "zstd":
            zstandard = importlib.import_module("zstandard")
            file, unpacked = _Zstd(plain, zstandard), (zstandard.ZstdError, EOFError)
        try:
            if start:
                plain.seek(start)
            while left != 0:
                block = file.read(BLOCK_BYTES if left is None else min(BLOCK_BYTES, left))
                if not block:
                    break
                left = None if left is None else left - len(block)
                yield block
        except unpacked as error:
            raise DataError(
                f"{field}: {shown(path)} is not a whole {kind} file: {error}"
            ) from error
        except OSError as error:
            raise DataError(f"{field}: cannot read {shown(path)}: {error.strerror}") from error


class _Zstd:
    """Reads a .zst file of any number of frames; raises EOFError if the last is cut off."""

    def __init__(self, plain: BinaryIO, zstandard: Any):
        self._plain, self._new = plain, zstandard.ZstdDecompressor().decompressobj
        self._frame, self._rest, self._is_open = self._new(), b"", False

    def read(self, size: int) -> bytes:
        del size  # Ignored: a frame yields at most a few megabytes per block.
        while packed := self._rest or self._plain.read(_PACKED_BLOCK_BYTES):
            found = self._frame.decompress(packed)
            self._rest, self._is_open = self._frame.unused_data, not self._frame.eof
            if self._frame.eof:
                self._frame = self._new()
            if found:
                return found
        if self._is_open:
            raise EOFError("it ends in the middle of a frame")
        return b""


def decoded(span: FileSpan) -> Iterator[str]:
    """Yields the text of a span in chunks.

    Raises:
      DataError: it cannot be read, or is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, is_start = span.start, span.start == 0
    for block in blocks(span.path, start=span.start, stop=span.stop):
        text = _decode(decoder, block, span.path, offset)
        offset += len(block)
        yield text.removeprefix("\ufeff") if is_start else text
        is_start = is_start and not text
    yield _decode(decoder, b"", span.path, offset, final=True)


def _decode(
    decoder: codecs.IncrementalDecoder, block: bytes, path: Path, offset: int, final: bool = False
) -> str:
    pending = len(decoder.getstate()[0])
    encoding = other_encoding(block) if offset == 0 else None
    try:
        text = decoder.decode(block, final)
    except UnicodeDecodeError as error:
        place = offset - pending + error.start
        is_binary = b"\0" in block and not encoding
        what = "looks like a binary file" if is_binary else f"is {encoding or 'not UTF-8'} text"
        raise DataError(
            f"data.path: {shown(path)} {what}: byte 0x{error.object[error.start]:02x} at offset "
            f"{place}; convert it to UTF-8 (iconv -f {encoding or '...'} -t utf-8) or leave it out"
        ) from None
    if "\0" in text:
        what, remedy = "looks like a binary file", ""
        if encoding:
            what, remedy = f"is {encoding} text", f"convert it (iconv -f {encoding} -t utf-8) or "
        raise DataError(
            f"data.path: {shown(path)} {what}: NUL byte at offset {offset + block.index(0)}; "
            f"{remedy}leave it out"
        )
    return text


def other_encoding(start: bytes) -> str | None:
    """Returns the encoding that the first bytes of a file suggest, if UTF-16 or UTF-32."""
    for encoding, marks in _MARKS.items():
        if start.startswith(marks):
            return encoding
    # Without a byte order mark: one of the two bytes of a Latin letter is 0.
    for encoding, high in (("UTF-16BE", 0), ("UTF-16LE", 1)):
        zeros = [start[:_HEAD_BYTES][side::2].count(0) for side in (high, 1 - high)]
        if zeros[0] > len(start[:_HEAD_BYTES]) // 3 and not zeros[1]:
            return encoding
    return None
