"""Documents from text files: the source of the standard library, or files of the user's.

Files are read as streams, large ones in parts, so memory grows neither with the corpus nor with the
length of a line.
"""

import contextlib
import functools
import glob
import hashlib
import io
import json
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from craft_jax.data.sources import decoding, parquet
from craft_jax.data.sources.decoding import PACKED, FileSpan, blocks, decoded, open_plain
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

_MAX_SPANS = 4096
# In order of preference: before a space between words, before a newline, between characters.
_BYTE_CUTS = tuple(
    map(re.compile, (rb"[0-9A-Za-z](?= [0-9A-Za-z])", rb"\S(?=\n\S)", rb"[\s\S](?=[^\x80-\xbf])"))
)
_TEXT_SUFFIXES = {
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".tsv", ".json", ".jsonl",
    ".yaml", ".yml", ".toml", ".py", ".pyi", ".ipynb", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu",
    ".java", ".kt", ".go", ".rs", ".js", ".ts", ".jsx", ".tsx", ".css", ".rb", ".php", ".swift",
    ".scala", ".hs", ".ml", ".lua", ".r", ".jl", ".sh", ".sql",
}  # fmt: skip
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


class FilePart(Part):
    """Consecutive text files, or a part of a long one.

    Args:
      spans: the files, or their parts.
      num_bytes: their approximate size.
      separator: between the documents of a text file; None if each file is one document.
    """

    def __init__(self, spans: Sequence[FileSpan], num_bytes: int, separator: str | None):
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
                    read=functools.partial(decoded, span),
                    starts=span.start == 0,
                    ends=span.stop is None,
                )


class FileSource(Source):
    """Files of the user's, or of the standard library, sorted by name.

    Args:
      name, origin: see `Source`.
      root: names in the digest are relative to this folder.
      paths: the files.
      separator: between the documents of a text file; None if each file is one document.
      columns: of Parquet files to read; None for all.
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
        spans: list[FileSpan] = []
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
            if size > 2 * PART_BYTES and path.suffix not in PACKED:
                flush()
                for span, count in _divided(path, size, self.separator):
                    found.append(FilePart([span], count, self.separator))
                continue
            if waiting + size > PART_BYTES:
                flush()
            spans.append(FileSpan(path))
            waiting += size
        flush()
        return found

    def digest(self) -> str:
        digest = hashlib.sha256()
        if self.separator:
            digest.update(f"{self.separator}\0".encode())
        # One thread per core: hashing releases the GIL.
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
      separator: between the documents of a text file; None if each file is one document.
      columns: of Parquet files to read; None for all.
      field: the config field that names the path, for messages.

    Raises:
      DataError: there is no such file, or no text file.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib")).resolve()
        found = _walk(root, leave_out=_NOT_STDLIB)
        paths = sorted(p for p in found if p.suffix == ".py" and p.is_file())
        if not paths:
            raise DataError(
                f"data.source=stdlib: {root} contains no Python source; set data.path to your text"
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
                f"{origin}: the folder contains no text file (.txt, .md, .py, .jsonl, .parquet, "
                "..., or one of these with .gz or .zst); name a file or a glob to read another kind"
            )
        return target, tuple(paths)
    if os.path.exists(target):
        if not os.path.isfile(target):
            raise DataError(f"{origin}: neither a file nor a folder; name a text file or a folder")
        return target.parent, (target,)
    if os.path.islink(target):
        raise DataError(
            f"{origin}: broken symlink to {shown(os.readlink(target))}; name an existing file or "
            "folder"
        )
    paths = sorted(p for p in map(Path, _matches(str(target))) if p.is_file())
    if not paths:
        what = "no file matches" if glob.has_magic(str(target)) else "no such file or folder"
        hint = f" (the current folder is {Path.cwd()})" if not target.is_absolute() else ""
        raise DataError(f"{origin}: {what}{hint}; name a file, a folder or a glob pattern of text")
    parents = {str(p.parent) for p in paths}
    return Path(os.path.commonpath(parents)), tuple(paths)


def _matches(pattern: str) -> Iterator[str]:
    """Yields each file of a glob pattern once, even if symlinks to folders form a cycle."""
    seen = set()
    for path in sorted(glob.iglob(pattern, recursive=True), key=len):
        folder, name = os.path.split(path)
        place = os.path.join(os.path.realpath(folder), name)
        if place not in seen:
            seen.add(place)
            yield path


def _walk(root: Path, leave_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yields every file below a folder, skipping hidden folders and those in `leave_out`."""
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
    with contextlib.suppress(OSError):  # Reading it reports the error.
        return path.stat().st_size
    return 0


def _file_digest(path: Path) -> bytes:
    with open_plain(path) as file:
        try:
            return hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise DataError(f"data.path: cannot read {shown(path)}: {error.strerror}") from error


def _divided(path: Path, size: int, separator: str | None) -> Iterator[tuple[FileSpan, int]]:
    """Divides a large file into spans of about `PART_BYTES`, as a function of its content alone.

    Lines of `.jsonl` and separated documents stay whole; running text is cut where `pieces` may
    cut it.
    """
    length = max(PART_BYTES, size // _MAX_SPANS)
    cuts = [0]
    with open_plain(path) as file:
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
        yield FileSpan(path, start, stop), (stop or size) - start


def _after(file: BinaryIO, start: int, mark: bytes) -> int | None:
    """Returns the end of the first `mark` from `start` on; None without one.

    Skips marks that overlap an earlier one: a reader from the start of the file skips them too.
    """
    pattern = re.compile(b"(?=%s)" % re.escape(mark))
    place, rest, last = max(0, start - len(mark)), b"", -len(mark)
    file.seek(place)
    while block := file.read(decoding.BLOCK_BYTES):
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
    """Returns an offset near `start` where running text may be cut; see `pieces`."""
    file.seek(start)
    block = file.read(PIECE_CHARS)
    for pattern in _BYTE_CUTS:
        if found := pattern.search(block):
            return start + found.start() + 1
    return None


def _jsonl_documents(span: FileSpan) -> Iterator[Document]:
    for number, line in enumerate(_lines(span), start=1):
        if not line.strip():
            continue
        place = functools.partial(_line_place, span, number)
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            words = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise DataError(f"{place()} is not JSON: {words}; correct or remove it") from None
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise DataError(
                f"{place()} is a {kind}, not an object with fields; correct or remove it"
            )
        yield Document(place=place, fields=record)


def _line_place(span: FileSpan, number: int) -> str:
    before = sum(block.count(b"\n") for block in blocks(span.path, stop=span.start))
    return f"data.path: {shown(span.path)} line {before + number}"


def _lines(span: FileSpan) -> Iterator[str]:
    rest = io.StringIO()
    for chunk in decoded(span):
        *whole, tail = chunk.split("\n")
        for line in whole:
            rest.write(line)
            yield rest.getvalue()
            rest = io.StringIO()
        rest.write(tail)
    yield rest.getvalue()


def _separated_documents(span: FileSpan, separator: str) -> Iterator[Document]:
    place, waiting, starts = f"data.path: {shown(span.path)}", "", True

    def document(text: str, ends: bool) -> Document:
        return Document(place=place, read=lambda: iter((text,)), starts=starts, ends=ends)

    for chunk in decoded(span):
        *whole, waiting = (waiting + chunk).split(separator)
        for text in whole:
            yield document(text, ends=True)
            starts = True
        if len(waiting) > decoding.BLOCK_BYTES:  # Bounds memory for long documents.
            stop = cut(waiting, len(waiting) - max(len(separator), 2), 0)
            yield document(waiting[:stop], ends=False)
            waiting, starts = waiting[stop:], False
    if waiting or not starts:
        yield document(waiting, ends=True)
