"""Parts of a source to token ids on disk, each part on its own, in this process or in several.

Part n becomes the files `part-{n}.tokens` (ids), `.documents` (what begins where) and, where some
tokens are not learned, `.mask`; its `.json` is written last, so that a part is done or not, and one
that is done stays so after a kill.
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
from craft_jax.data.sources.formats import Format, Stretch
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.data.workers import Workers
from craft_jax.errors import DataError, StorageError, UsageError

DOCUMENT = np.dtype([("start", "<i8"), ("key", "<u8"), ("bytes", "<i8")])
"""Of each document: its first token, what decides its split, and how many bytes of UTF-8 it is."""

_GROUP_CHARS = 1 << 17
_IN_ONE_PROCESS = 1 << 23
_MAX_PROCESSES = 32


def document_key(stretches: Sequence[Stretch]) -> int:
    """Returns the number in [0, 2**64) that decides the split of a document, from its text.

    Of running text only the first piece counts, so that a document need not be held in memory.
    """
    digest = hashlib.blake2b(digest_size=8)
    for stretch in stretches:
        digest.update(f"{stretch.text}\0".encode())
    return int.from_bytes(digest.digest(), "little")


class Keyed(NamedTuple):
    """A stretch of a document, and what is known of the document by then.

    Attributes:
      stretch: text; None at the end of a document that ends without more.
      key: where a document begins here; None where it goes on.
      ends: whether it ends here.
      document: which one.
    """

    stretch: Stretch | None
    key: int | None
    ends: bool
    document: Document


def keyed(document: Document, format: Format) -> Iterator[Keyed]:
    """Yields the stretches of a document, without those that are empty.

    Raises:
      DataError: see `Format.stretches`.
    """
    stretches = (s for s in format.stretches(document) if s.text)
    if document.fields is not None:
        found = list(stretches)
        for n, stretch in enumerate(found):
            key = None if n else document_key(found)
            yield Keyed(stretch, key, n == len(found) - 1, document)
        return
    held = next(stretches, None)
    key = document_key([held]) if held and document.starts else None
    for stretch in stretches:
        yield Keyed(held, key, False, document)
        held, key = stretch, None
    if held or not document.starts:
        yield Keyed(held, key, document.ends, document)


class Encoding(Dataset):
    """What turns parts into files, as a dataset whose batches are the parts' counts.

    It is a dataset so that `Workers` run it.

    Args:
      parts: of the source.
      format, tokenizer: how.
      folder: where the files go.
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
        # There is a process for each core already.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        vars(self).update(state)

    def batch(self, step: int) -> Batch:
        """Makes the files of a part, if they are not there."""
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
                    chars += len(item.stretch.text) if item.stretch else 0
                    if chars >= _GROUP_CHARS:
                        self._write(writer, waiting)
                        waiting, chars = [], 0
            self._write(writer, waiting)
            writer.finish()

    def _write(self, writer: "_Writer", items: list[Keyed]) -> None:
        stretches = [item.stretch for item in items if item.stretch]
        texts = [self._plain(stretch) for stretch in stretches if not stretch.is_markup]
        marks = {stretch.text for stretch in stretches if stretch.is_markup}
        try:
            encoded = iter(self._tokenizer.encode_batch(texts))
            markup = {text: self._tokenizer.encode_markup(text) for text in marks}
        except UsageError as error:  # A character vocabulary of other text.
            raise self._unknown(items) from error
        end_id = self._tokenizer.end_id
        for stretch, key, ends, _ in items:
            ids, is_learned = np.zeros(0, np.int32), True
            if stretch is not None:
                is_learned = stretch.is_learned
                ids = markup[stretch.text] if stretch.is_markup else next(encoded)
            if key is not None:
                writer.begin(key)
            writer.add(ids, is_learned, stretch.text if stretch else "")
            if ends and end_id is not None:
                writer.add(np.array([end_id], np.int32), is_learned, "")

    def _plain(self, stretch: Stretch) -> str:
        """Returns what is encoded: without the space that a text was cut at, where it must go."""
        drops = stretch.goes_on and stretch.text[0] == " " and self._tokenizer.drops_space
        return stretch.text[1:] if drops else stretch.text

    def _unknown(self, items: list[Keyed]) -> DataError:
        for item in items:
            text = item.stretch.text if item.stretch else ""
            if unknown := self._tokenizer.unknown_characters(text):
                return DataError(
                    f"{item.document.where()}: the tokenizer does not know the character "
                    f"{unknown[0]!r} (U+{ord(unknown[0]):04X}); choose data.tokenizer=byte or bpe"
                )
        raise AssertionError("an unknown character that nothing has")


class _Writer:
    """The files of one part, while they are written."""

    def __init__(self, folder: Path, number: int, dtype: np.dtype):
        self._place, self._dtype = folder / f"part-{number}", dtype
        self._tokens = self._open(".tokens")
        self._runs: list[list[int]] = []
        self._documents: list[tuple[int, int, int]] = []
        self._count = self._learned = self._characters = self._crc = self._leading = 0
        self._largest = -1

    def _open(self, suffix: str) -> BinaryIO:
        return self._place.with_suffix(suffix).open("wb")

    def begin(self, key: int) -> None:
        self._documents.append((self._count, key, 0))

    def add(self, ids: np.ndarray, is_learned: bool, text: str) -> None:
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
        if not self._runs or self._runs[-1][0] != is_learned:
            self._runs.append([is_learned, 0])
        self._runs[-1][1] += len(ids)
        self._count += len(ids)
        self._learned += len(ids) if is_learned else 0

    def finish(self) -> None:
        documents = np.array(self._documents, DOCUMENT)
        with contextlib.ExitStack() as stack:
            files = [self._tokens, stack.enter_context(self._open(".documents"))]
            files[1].write(documents.tobytes())
            if self._learned < self._count:
                files.append(stack.enter_context(self._open(".mask")))
                for is_learned, count in self._runs:
                    files[2].write((b"\1" if is_learned else b"\0") * count)
            for file in files:
                file.flush()
                os.fsync(file.fileno())
            sizes = {Path(file.name).name: file.tell() for file in files}
        facts = {
            "tokens": self._count,
            "learned": self._learned,
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
    """Returns the facts of a part that is done; None for one that is not whole."""
    try:
        facts = json.loads((folder / f"part-{number}.json").read_text(encoding="utf-8"))
        is_whole = all((folder / f).stat().st_size == n for f, n in facts["sizes"].items())
        return facts if is_whole else None
    except (OSError, ValueError, KeyError):
        return None


def run(encoding: Encoding, parts: Sequence[Part]) -> None:
    """Encodes all parts that are not done, in as many processes as there are cores.

    Shows a progress bar on a terminal.

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
