"""Text in files: the standard library's source, or the user's, as documents.

Text is UTF-8; a byte order mark that a file begins with is no part of its text. Files are read as
streams, large ones in parts, so memory does not grow with the corpus, nor with the length of a
line. What is unreadable raises `DataError` with the file, the place in it and the remedy.
"""

import codecs
import contextlib
import functools
import glob
import gzip
import hashlib
import importlib
import io
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from craft_jax.data.sources import parquet
from craft_jax.data.sources.documents import (
    PART_BYTES,
    PIECE_CHARS,
    Document,
    Part,
    Source,
    cut,
    plain_name,
    shown,
)
from craft_jax.errors import DataError

_BLOCK_BYTES = 1 << 20
_PACKED_BLOCK_BYTES = 1 << 17
_MAX_SPANS = 4096
_PACKED = {".gz": "gzip", ".zst": "zstd"}
_NOT_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)
# Before a space between two words, before a newline, or at least between two characters.
_BYTE_CUTS = tuple(
    map(re.compile, (rb"[0-9A-Za-z](?= [0-9A-Za-z])", rb"\S(?=\n\S)", rb"[\s\S](?=[^\x80-\xbf])"))
)
_HEAD_BYTES = 1 << 10
_MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),  # Begins as UTF-16 does.
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
_TEXT_SUFFIXES = {
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".tsv", ".json", ".jsonl",
    ".yaml", ".yml", ".toml", ".py", ".pyi", ".ipynb", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu",
    ".java", ".kt", ".go", ".rs", ".js", ".ts", ".jsx", ".tsx", ".css", ".rb", ".php", ".swift",
    ".scala", ".hs", ".ml", ".lua", ".r", ".jl", ".sh", ".sql",
}  # fmt: skip
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


class Span(NamedTuple):
    """A file, or a part of one.

    Attributes:
      path: the file.
      start, stop: bytes of it; `stop` is None for all that follows.
    """

    path: Path
    start: int = 0
    stop: int | None = None


class FilePart(Part):
    """Text files that follow each other, or a part of a long one.

    Args:
      spans: what to read.
      num_bytes: about how many bytes that is.
      separator: what stands between the documents of a text file; None where each is one document.
    """

    def __init__(self, spans: Sequence[Span], num_bytes: int, separator: str | None):
        self.spans, self.num_bytes, self.separator = tuple(spans), num_bytes, separator

    def documents(self) -> Iterator[Document]:
        for span in self.spans:
            if _is_jsonl(span.path):
                yield from _jsonl_documents(span)
            elif self.separator:
                yield from _separated_documents(span, self.separator)
            else:
                yield Document(
                    place=f"data.path: {shown(span.path)}",
                    read=functools.partial(_decoded, span),
                    starts=span.start == 0,
                    ends=span.stop is None,
                )


class FileSource(Source):
    """The user's files, or those of the standard library, sorted by name.

    Args:
      name, origin: see `Source`.
      root: names in the digest are relative to this folder.
      paths: the files.
      separator: what stands between the documents of a text file; None where each is one document.
      columns: what is read of Parquet files; None for all.
    """

    def __init__(
        self,
        name: str,
        origin: str,
        root: Path,
        paths: Sequence[Path],
        separator: str | None,
        columns: tuple[str, ...] | None = None,
    ):
        self.name, self.origin, self.root = name, origin, root
        self.paths, self.separator, self.columns = tuple(paths), separator, columns

    def parts(self) -> list[Part]:
        found: list[Part] = []
        spans: list[Span] = []
        waiting = 0

        def flush() -> None:
            nonlocal waiting
            if spans:
                found.append(FilePart(spans, waiting, self.separator))
            spans.clear()
            waiting = 0

        for path in self.paths:
            if path.suffix == ".parquet":
                flush()
                found += parquet.parquet_parts(path, self.origin, self.columns)
                continue
            size = _size(path)
            if size > 2 * PART_BYTES and path.suffix not in _PACKED:
                flush()
                for span, count in _divided(path, size, self.separator):
                    found.append(FilePart([span], count, self.separator))
                continue
            if waiting + size > PART_BYTES:
                flush()
            spans.append(Span(path))
            waiting += size
        flush()
        return found

    def digest(self) -> str:
        digest = hashlib.sha256()
        if self.separator:
            digest.update(f"{self.separator}\0".encode())
        # One thread for each core: hashing releases the interpreter.
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for path, found in zip(self.paths, pool.map(_file_digest, self.paths), strict=True):
                name = f"{path.relative_to(self.root).as_posix()}\0"
                digest.update(name.encode("utf-8", "replace"))
                digest.update(found)
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        return {"files": len(self.paths)}


def open_files(
    path: str | None,
    separator: str | None = None,
    columns: tuple[str, ...] | None = None,
    field: str = "data.path",
) -> FileSource:
    """Finds text files.

    Args:
      path: a file, a folder or a glob pattern; None for the Python standard library.
      separator: what stands between the documents of a text file; None where each is one document.
      columns: what is read of Parquet files; None for all.
      field: the config field that names the path, for messages.

    Raises:
      DataError: nothing there, or nothing that is text.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib")).resolve()
        found = _walk(root, leave_out=_NOT_STDLIB)
        paths = sorted(p for p in found if p.suffix == ".py" and p.is_file())
        if not paths:
            raise DataError(
                f"data.source=stdlib: {root} holds no Python source; name your text with data.path"
            )
        return FileSource("stdlib", "data.source=stdlib", root, paths, None)
    origin = f"{field}={shown(path)}"
    target = Path(os.path.expanduser(path))
    root, paths = _find_files(target, origin)
    return FileSource(plain_name(target), origin, root, paths, separator, columns)


def _find_files(target: Path, origin: str) -> tuple[Path, tuple[Path, ...]]:
    if os.path.isdir(target):
        paths = sorted(p for p in _walk(target) if _is_text_name(p) and p.is_file())
        if not paths:
            raise DataError(
                f"{origin}: the folder holds no text file (.txt, .md, .py, .jsonl, .parquet, ..., "
                "or one of these with .gz or .zst); name a file or a glob to read another kind"
            )
        return target, tuple(paths)
    if os.path.exists(target):
        if not os.path.isfile(target):
            raise DataError(f"{origin}: neither a file nor a folder; name one that holds text")
        return target.parent, (target,)
    if os.path.islink(target):
        raise DataError(
            f"{origin}: a link to {shown(os.readlink(target))}, which leads nowhere; mend it, or "
            "name what it should lead to"
        )
    paths = sorted(p for p in map(Path, _matches(str(target))) if p.is_file())
    if not paths:
        what = "no file matches" if glob.has_magic(str(target)) else "no such file or folder"
        hint = f" (the current folder is {Path.cwd()})" if not target.is_absolute() else ""
        raise DataError(f"{origin}: {what}{hint}; name a file, a folder or a glob pattern of text")
    parents = {str(p.parent) for p in paths}
    return Path(os.path.commonpath(parents)), tuple(paths)


def _matches(pattern: str) -> Iterator[str]:
    """Yields each file of a glob pattern once, also where links to folders go round in circles."""
    seen = set()
    for path in sorted(glob.iglob(pattern, recursive=True), key=len):
        folder, name = os.path.split(path)
        place = os.path.join(os.path.realpath(folder), name)
        if place not in seen:
            seen.add(place)
            yield path


def _walk(root: Path, leave_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yields every file below a folder that stands in no hidden folder, nor in one left out."""
    leave_out |= {"__pycache__"}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if not s.startswith(".") and s not in leave_out]
        yield from (Path(folder) / name for name in names)


def _is_text_name(path: Path) -> bool:
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    suffix = Path(name).suffix
    return not name.startswith(".") and (suffix in _TEXT_SUFFIXES or suffix == ".parquet")


def _is_jsonl(path: Path) -> bool:
    return ".jsonl" in path.suffixes


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):  # What is wrong with it is said when it is read.
        return path.stat().st_size
    return 0


def _file_digest(path: Path) -> bytes:
    with _open_plain(path) as file:
        try:
            return hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise DataError(f"data.path: cannot read {shown(path)}: {error.strerror}") from error


def _open_plain(path: Path, field: str = "data.path") -> BinaryIO:
    try:
        # Opening a named pipe would wait for whoever writes into it.
        if path.exists() and not path.is_file() and not path.is_dir():
            raise DataError(f"{field}: {shown(path)} is no file; name one that holds text")
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
      start, stop: which bytes of it, as they stand on the disk; `stop` is None for all that follow.

    Raises:
      DataError: it cannot be read, or unpacked.
    """
    with _open_plain(path, field) as plain:
        left = None if stop is None else stop - start
        kind = _PACKED.get(path.suffix)
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
                block = file.read(_BLOCK_BYTES if left is None else min(_BLOCK_BYTES, left))
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
    """Reads a .zst file of any number of frames, and notices one that is cut off."""

    def __init__(self, plain: BinaryIO, zstandard: Any):
        self._plain, self._new = plain, zstandard.ZstdDecompressor().decompressobj
        self._frame, self._rest, self._is_open = self._new(), b"", False

    def read(self, size: int) -> bytes:
        del size  # A frame gives what it gives: at most some megabytes for each block.
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


def _decoded(span: Span) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, is_start = span.start, span.start == 0
    for block in blocks(span.path, start=span.start, stop=span.stop):
        text = _decode(decoder, block, span.path, offset)
        offset += len(block)
        yield text.removeprefix("\ufeff") if is_start else text
        is_start = is_start and not text
    yield _decode(decoder, b"", span.path, offset, final=True)


def _divided(path: Path, size: int, separator: str | None) -> Iterator[tuple[Span, int]]:
    """Divides a large file into spans of about `PART_BYTES`, at places that depend on it alone.

    Lines of `.jsonl` stay whole, as do documents with a separator between them; running text is cut
    where `pieces` may cut it.
    """
    length = max(PART_BYTES, size // _MAX_SPANS)
    cuts = [0]
    with _open_plain(path) as file:
        for target in range(length, size - length // 2, length):
            if target <= cuts[-1]:
                continue
            if _is_jsonl(path):
                cut = _after(file, target, b"\n")
            elif separator:
                cut = _after(file, target, separator.encode())
            else:
                cut = _byte_cut(file, target)
            if cut is not None and cuts[-1] < cut < size:
                cuts.append(cut)
    for start, stop in zip(cuts, [*cuts[1:], None], strict=True):
        yield Span(path, start, stop), (stop or size) - start


def _after(file: BinaryIO, start: int, mark: bytes) -> int | None:
    """Returns where the first `mark` from `start` on ends; None without one.

    One that overlaps another before it does not count: read from the start of the file, it might
    not be one.
    """
    pattern = re.compile(b"(?=%s)" % re.escape(mark))
    place, rest, last = max(0, start - len(mark)), b"", -len(mark)
    file.seek(place)
    while block := file.read(_BLOCK_BYTES):
        text = rest + block
        for match in pattern.finditer(text):
            found = place + match.start()
            if found >= start and found - last >= len(mark):
                return found + len(mark)
            last = found
        rest = text[len(text) - len(mark) + 1 :]
        place += len(text) - len(rest)
    return None


def _byte_cut(file: BinaryIO, start: int) -> int | None:
    """Returns a place near `start` where running text may be cut; see `pieces`."""
    file.seek(start)
    block = file.read(PIECE_CHARS)
    for pattern in _BYTE_CUTS:
        if found := pattern.search(block):
            return start + found.start() + 1
    return None


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
    """Returns which of UTF-16 and UTF-32 a file that begins with these bytes is in, if one."""
    for encoding, marks in _MARKS.items():
        if start.startswith(marks):
            return encoding
    # Without a mark: of the two bytes of a Latin letter one is 0.
    for encoding, high in (("UTF-16BE", 0), ("UTF-16LE", 1)):
        zeros = [start[:_HEAD_BYTES][side::2].count(0) for side in (high, 1 - high)]
        if zeros[0] > len(start[:_HEAD_BYTES]) // 3 and not zeros[1]:
            return encoding
    return None


def _jsonl_documents(span: Span) -> Iterator[Document]:
    for number, line in enumerate(_lines(span), start=1):
        if not line.strip():
            continue
        place = functools.partial(_line_place, span, number)
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            words = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise DataError(f"{place()} is not JSON: {words}; mend or remove it") from None
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise DataError(f"{place()} is a {kind}, not an object with fields; mend or remove it")
        yield Document(place=place, fields=record)


def _line_place(span: Span, number: int) -> str:
    before = sum(block.count(b"\n") for block in blocks(span.path, stop=span.start))
    return f"data.path: {shown(span.path)} line {before + number}"


def _lines(span: Span) -> Iterator[str]:
    rest = io.StringIO()
    for chunk in _decoded(span):
        *whole, tail = chunk.split("\n")
        for line in whole:
            rest.write(line)
            yield rest.getvalue()
            rest = io.StringIO()
        rest.write(tail)
    yield rest.getvalue()


def _separated_documents(span: Span, separator: str) -> Iterator[Document]:
    place, waiting, starts = f"data.path: {shown(span.path)}", "", True

    def document(text: str, ends: bool) -> Document:
        return Document(place=place, read=lambda: iter((text,)), starts=starts, ends=ends)

    for chunk in _decoded(span):
        *whole, waiting = (waiting + chunk).split(separator)
        for text in whole:
            yield document(text, ends=True)
            starts = True
        if len(waiting) > _BLOCK_BYTES:  # So that memory does not grow with a document.
            stop = cut(waiting, len(waiting) - max(len(separator), 2), 0)
            yield document(waiting[:stop], ends=False)
            waiting, starts = waiting[stop:], False
    if waiting or not starts:
        yield document(waiting, ends=True)
