"""Where text comes from: the standard library's source, or the user's files, as documents.

Text is UTF-8; a byte order mark that a file begins with is no part of its text.
A source is read as a stream: a document yields its text in pieces of bounded size, so memory does
not grow with the corpus, nor with the length of a line. What flows out are `Document`s; what is
unreadable raises `DataError` with the file, the place in it and the remedy.
"""

import codecs
import dataclasses
import glob
import gzip
import hashlib
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from craft_jax.errors import DataError

PIECE_CHARS = 1 << 16
_BLOCK_BYTES = 1 << 20
_HEAD_BYTES = 1 << 10
_MAX_WORD = 60
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
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """One text of a source.

    Attributes:
      path: the file that it stands in.
      line: the line of a `.jsonl` file, from 1; None where the whole file is the document.
      text: the text of that line; None where it is to be read from the file.
    """

    path: Path
    line: int | None = None
    text: str | None = None

    def pieces(self) -> Iterator[str]:
        """Yields the text in order, in pieces of about `PIECE_CHARS` characters.

        Pieces end after a newline where there is one, else after a space, else anywhere.

        Raises:
          DataError: the file is not UTF-8 text.
        """
        chunks = [self.text] if self.text is not None else _decoded(self.path)
        rest = ""
        for chunk in chunks:
            rest += chunk
            start = 0
            while len(rest) - start > PIECE_CHARS:
                stop = _cut(rest, start)
                yield rest[start:stop]
                start = stop
            rest = rest[start:]
        if rest:
            yield rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """An ordered collection of documents.

    Attributes:
      name: what to call it in file names and tables.
      origin: the config value it came from, for error messages.
      root: names in the digest are relative to this folder.
      paths: the files, sorted by name.
      text_field: the field with the text in `.jsonl` lines.
    """

    name: str
    origin: str
    root: Path
    paths: tuple[Path, ...]
    text_field: str

    def documents(self) -> Iterator[Document]:
        """Yields every document, files in sorted order."""
        for path in self.paths:
            if ".jsonl" in path.suffixes:
                yield from _jsonl_documents(path, self.text_field)
            else:
                yield Document(path=path)

    def digest(self) -> str:
        """Returns the SHA-256 of all names and bytes, hexadecimal.

        Raises:
          DataError: a file cannot be read.
        """
        digest = hashlib.sha256(self.text_field.encode())
        for path in self.paths:
            digest.update(f"{path.relative_to(self.root).as_posix()}\0".encode("utf-8", "replace"))
            with _open_plain(path) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def open_source(kind: str, path: str | None, text_field: str = "text") -> Source:
    """Finds the files of a source.

    Args:
      kind: `stdlib`, `files`, or `auto` (files when `path` is given, else stdlib).
      path: a file, a folder or a glob pattern; needed for `files`.
      text_field: the field with the text in `.jsonl` lines.

    Raises:
      DataError: nothing there, or nothing that is text.
    """
    if kind == "stdlib" or (kind == "auto" and not path):
        root = Path(sysconfig.get_path("stdlib")).resolve()
        found = [p for p in root.rglob("*.py") if not _NOT_STDLIB & {*p.relative_to(root).parts}]
        paths = tuple(sorted(p for p in found if p.is_file()))
        if not paths:
            raise DataError(
                f"data.source=stdlib: {root} holds no Python source; name your text with data.path"
            )
        return Source(
            name="stdlib",
            origin="data.source=stdlib",
            root=root,
            paths=paths,
            text_field=text_field,
        )
    assert path is not None
    origin = f"data.path={shown(path)}"
    target = Path(os.path.expanduser(path))
    root, paths = _find_files(target, origin)
    return Source(
        name=plain_name(target), origin=origin, root=root, paths=paths, text_field=text_field
    )


def _find_files(target: Path, origin: str) -> tuple[Path, tuple[Path, ...]]:
    if os.path.isdir(target):
        paths = sorted(p for p in _walk(target) if _is_text_name(p) and p.is_file())
        if not paths:
            raise DataError(
                f"{origin}: the folder holds no text file (.txt, .md, .py, .jsonl, ..., or one of "
                "these with .gz); name a file or a glob to read another kind"
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


def _walk(root: Path) -> Iterator[Path]:
    """Yields every file below a folder that stands in no hidden folder."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if not s.startswith(".") and s != "__pycache__"]
        yield from (Path(folder) / name for name in names)


def _is_text_name(path: Path) -> bool:
    name = path.name.lower().removesuffix(".gz")
    return not name.startswith(".") and Path(name).suffix in _TEXT_SUFFIXES


def plain_name(target: Path) -> str:
    """Turns a path into a short word for file names: letters, digits and underscores."""
    word = "".join(c if c.isalnum() else "_" for c in target.name.split(".")[0]).strip("_")
    return word[:_MAX_WORD] or "text"


def shown(path: str | Path) -> str:
    """Returns a path as messages show it: in one line, with escapes for what cannot be printed."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))


def _open_plain(path: Path, field: str = "data.path") -> BinaryIO:
    try:
        # Opening a named pipe would wait for whoever writes into it.
        if path.exists() and not path.is_file() and not path.is_dir():
            raise DataError(f"{field}: {shown(path)} is no file; name one that holds text")
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{field}: cannot read {shown(path)}: {error.strerror}") from error


def blocks(path: Path, field: str = "data.path") -> Iterator[bytes]:
    """Yields the bytes of a file, unpacked if its name ends in .gz.

    Args:
      path: the file.
      field: the config field or flag that names it, for messages.

    Raises:
      DataError: it cannot be read, or unpacked.
    """
    with _open_plain(path, field) as plain:
        file = gzip.GzipFile(fileobj=plain) if path.suffix == ".gz" else plain
        try:
            while block := file.read(_BLOCK_BYTES):
                yield block
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{field}: {shown(path)} is not a whole gzip file: {error}") from error
        except OSError as error:
            raise DataError(f"{field}: cannot read {shown(path)}: {error.strerror}") from error


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, is_start = 0, True
    for block in blocks(path):
        text = _decode(decoder, block, path, offset)
        offset += len(block)
        yield text.removeprefix("\ufeff") if is_start else text
        is_start = is_start and not text
    yield _decode(decoder, b"", path, offset, final=True)


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


def _jsonl_documents(path: Path, text_field: str) -> Iterator[Document]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        here = f"data.path: {shown(path)} line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            words = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise DataError(f"{here} is not JSON: {words}; mend or remove it") from None
        text = record.get(text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            have = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{here} has no text in the field {text_field!r} (it has: {shown(have)}); set "
                "data.text_field"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{here} has half a character in the field {text_field!r}; mend or remove it"
            ) from None
        yield Document(path=path, line=number, text=text)


def _lines(path: Path) -> Iterator[str]:
    rest = io.StringIO()
    for chunk in _decoded(path):
        *whole, tail = chunk.split("\n")
        for line in whole:
            rest.write(line)
            yield rest.getvalue()
            rest = io.StringIO()
        rest.write(tail)
    yield rest.getvalue()


def _cut(text: str, start: int) -> int:
    stop = start + PIECE_CHARS
    for separator in "\n", " ":
        place = text.rfind(separator, start, stop)
        if place >= start:
            return place + 1
    return stop
