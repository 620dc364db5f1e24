"""Encodes the parts of a source to token ids on disk, in one process or several.

Part n becomes the files `part-{n}.tokens` (ids), `.documents` (starts) and, if some tokens do not
count in the loss, `.mask`. Its `.json` is written last, so that a part is complete or absent, also
after a kill.
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from craft_jax.data.base import Batch, Dataset
from craft_jax.data.sources.documents import Document, Part
from craft_jax.data.sources.formats import Format, TextSpan
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.data.workers import Workers
from craft_jax.errors import DataError, StorageError, UsageError

DOCUMENT = np.dtype([("start", "<i8"), ("key", "<u8"), ("bytes", "<i8")])
"""For each document: its first token, the key that decides its split, and its UTF-8 bytes."""

_GROUP_CHARS = 1 << 17
_IN_ONE_PROCESS = 1 << 23
_MAX_PROCESSES = 32


def document_key(spans: Sequence[TextSpan]) -> int:
    """Returns a hash of the text in [0, 2**64), which decides the split of a document.

    Hashes only the first piece of running text, so that a document need not fit in memory.
    """
    digest = hashlib.blake2b(digest_size=8)
    for span in spans:
        digest.update(f"{span.text}\0".encode())
    return int.from_bytes(digest.digest(), "little")


class Keyed(NamedTuple):
    """A span of a document, with the key and the end of the document.

    Attributes:
      span: text; None at the end of a document without more text.
      key: of the document, on its first span; else None.
      ends: whether the document ends here.
      document: the document.
    """

    span: TextSpan | None
    key: int | None
    ends: bool
    document: Document


def keyed(document: Document, format: Format) -> Iterator[Keyed]:
    """Yields the non-empty spans of a document.

    Raises:
      DataError: see `Format.spans`.
    """
    spans = (s for s in format.spans(document) if s.text)
    if document.fields is not None:
        found = list(spans)
        for n, span in enumerate(found):
            key = None if n else document_key(found)
            yield Keyed(span, key, n == len(found) - 1, document)
        return
    held = next(spans, None)
    key = document_key([held]) if held and document.starts else None
    for span in spans:
        yield Keyed(held, key, False, document)
        held, key = span, None
    if held or not document.starts:
        yield Keyed(held, key, document.ends, document)


class Encoding(Dataset):
    """Encodes parts to files: a dataset with a batch for each part, so that `Workers` can run it.

    Args:
      parts: of the source.
      format, tokenizer: see `builder.build`.
      folder: of the files.
      dtype: of the ids.
      name: of the source, for messages.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        format: Format,
        tokenizer: Tokenizer,
        folder: Path,
        dtype: np.dtype,
        name: str,
    ):
        self._parts, self._format, self._tokenizer = parts, format, tokenizer
        self._folder, self._dtype, self.name = folder, dtype, name

    def __len__(self) -> int:
        return len(self._parts)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Each core has a process already.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        vars(self).update(state)

    def batch(self, step: int) -> Batch:
        """Writes the files of a part, if they are missing."""
        part = self._parts[step]
        try:
            if not done(self._folder, step):
                self._encode(step, part)
        except OSError as error:
            raise StorageError(f"cannot write the token cache {self._folder}: {error}") from error
        return {"num_bytes": np.array(part.num_bytes)}

    def _encode(self, number: int, part: Part) -> None:
        writer = _Writer(self._folder, number, self._dtype)
        with contextlib.closing(writer):
            waiting: list[Keyed] = []
            chars = 0
            for document in part.documents():
                for item in keyed(document, self._format):
                    waiting.append(item)
                    chars += len(item.span.text) if item.span else 0
                    if chars >= _GROUP_CHARS:
                        self._write(writer, waiting)
                        waiting, chars = [], 0
            self._write(writer, waiting)
            writer.finish()

    def _write(self, writer: "_Writer", items: list[Keyed]) -> None:
        spans = [item.span for item in items if item.span]
        texts = [self._plain(span) for span in spans if not span.is_markup]
        marks = {span.text for span in spans if span.is_markup}
        try:
            encoded = iter(self._tokenizer.encode_batch(texts))
            markup = {text: self._tokenizer.encode_markup(text) for text in marks}
        except UsageError as error:  # A character vocabulary trained on other text.
            raise self._unknown(items) from error
        end_id = self._tokenizer.end_id
        for span, key, ends, _ in items:
            ids, in_loss = np.zeros(0, np.int32), True
            if span is not None:
                in_loss = span.in_loss
                ids = markup[span.text] if span.is_markup else next(encoded)
            if key is not None:
                writer.begin(key)
            writer.add(ids, in_loss, span.text if span else "")
            if ends and end_id is not None:
                writer.add(np.array([end_id], np.int32), in_loss, "")

    def _plain(self, span: TextSpan) -> str:
        """Returns the text to encode, without its first space if `Tokenizer.drops_space`."""
        drops = span.continues and span.text[0] == " " and self._tokenizer.drops_space
        return span.text[1:] if drops else span.text

    def _unknown(self, items: list[Keyed]) -> DataError:
        for item in items:
            text = item.span.text if item.span else ""
            if unknown := self._tokenizer.unknown_characters(text):
                return DataError(
                    f"{item.document.where()}: the tokenizer does not know the character "
                    f"{unknown[0]!r} (U+{ord(unknown[0]):04X}); choose data.tokenizer=byte or bpe"
                )
        raise AssertionError("no text has an unknown character")


class _Writer:
    """Writes the files of one part."""

    def __init__(self, folder: Path, number: int, dtype: np.dtype):
        self._place, self._dtype = folder / f"part-{number}", dtype
        self._tokens = self._open(".tokens")
        self._runs: list[list[int]] = []
        self._documents: list[tuple[int, int, int]] = []
        self._count = self._in_loss = self._characters = self._crc = self._leading = 0
        self._largest = -1

    def _open(self, suffix: str) -> BinaryIO:
        return self._place.with_suffix(suffix).open("wb")

    def begin(self, key: int) -> None:
        self._documents.append((self._count, key, 0))

    def add(self, ids: np.ndarray, in_loss: bool, text: str) -> None:
        num_bytes = len(text.encode())
        if self._documents:
            start, key, before = self._documents[-1]
            self._documents[-1] = (start, key, before + num_bytes)
        else:
            self._leading += num_bytes
        self._characters += len(text)
        if not ids.size:
            return
        self._largest = max(self._largest, int(ids.max()))
        packed = ids.astype(self._dtype).tobytes()
        self._tokens.write(packed)
        self._crc = zlib.crc32(packed, self._crc)
        if not self._runs or self._runs[-1][0] != in_loss:
            self._runs.append([in_loss, 0])
        self._runs[-1][1] += len(ids)
        self._count += len(ids)
        self._in_loss += len(ids) if in_loss else 0

    def finish(self) -> None:
        documents = np.array(self._documents, DOCUMENT)
        with contextlib.ExitStack() as stack:
            files = [self._tokens, stack.enter_context(self._open(".documents"))]
            files[1].write(documents.tobytes())
            if self._in_loss < self._count:
                files.append(stack.enter_context(self._open(".mask")))
                for in_loss, count in self._runs:
                    files[2].write((b"\1" if in_loss else b"\0") * count)
            for file in files:
                file.flush()
                os.fsync(file.fileno())
            sizes = {Path(file.name).name: file.tell() for file in files}
        facts = {
            "tokens": self._count,
            "learned": self._in_loss,
            "documents": len(documents),
            "characters": self._characters,
            "leading_bytes": self._leading,
            "bytes": self._leading + int(documents["bytes"].sum()),
            "largest": self._largest,
            "crc32": f"{self._crc:08x}",
            "sizes": sizes,
        }
        partial = self._place.with_suffix(".new")
        partial.write_text(json.dumps(facts), encoding="utf-8")
        partial.rename(self._place.with_suffix(".json"))

    def close(self) -> None:
        self._tokens.close()


def done(folder: Path, number: int) -> dict[str, Any] | None:
    """Returns the facts of a complete part; None for any other."""
    try:
        facts = json.loads((folder / f"part-{number}.json").read_text(encoding="utf-8"))
        is_whole = all((folder / f).stat().st_size == n for f, n in facts["sizes"].items())
        return facts if is_whole else None
    except (OSError, ValueError, KeyError):
        return None


def run(encoding: Encoding, parts: Sequence[Part]) -> None:
    """Encodes all missing parts, in one process per core, with a progress bar on a terminal.

    Raises:
      DataError, StorageError: a part cannot be read, or written.
    """
    total = sum(part.num_bytes for part in parts)
    count = min(len(os.sched_getaffinity(0)), len(parts), _MAX_PROCESSES)
    with contextlib.ExitStack() as stack:
        make = encoding.batch
        if count > 1 and total > _IN_ONE_PROCESS:
            pool = Workers(encoding, 0, len(parts), count=count, ahead=1)
            make = stack.enter_context(pool).get
        bar = stack.enter_context(
            tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None)
        )
        for number in range(len(parts)):
            bar.update(int(make(number)["num_bytes"]))
