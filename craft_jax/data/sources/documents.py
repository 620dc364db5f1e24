"""The interface of text sources: documents, in parts that are read independently.

A `Source` lists its `Part`s without reading them; each part yields its `Document`s in order, in any
process. Parts depend on the content alone, so results are the same for any number of processes.
"""

import abc
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from craft_jax.errors import DataError

PIECE_CHARS = 1 << 16
PART_BYTES = 1 << 22
"""Approximate bytes of a part: few enough to lose, enough to be worth a message to a process."""
_LOOK_BACK = 1 << 13
_MAX_WORD = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """One running text, or one record with fields.

    Attributes:
      place: its location, for messages, such as `data.path: texts/a.jsonl line 3`; a function
        if it is slow to compute.
      fields: of a record, such as a line of `.jsonl`; None for running text.
      read: yields running text in order, in chunks of any size; None for records.
      starts, ends: whether the document begins and ends here; a long one continues in the next.
    """

    place: str | Callable[[], str]
    fields: Mapping[str, Any] | None = None
    read: Callable[[], Iterator[str]] | None = None
    starts: bool = True
    ends: bool = True

    def where(self) -> str:
        """Returns `place` as text."""
        return self.place if isinstance(self.place, str) else self.place()


def pieces(chunks: Iterable[str]) -> Iterator[str]:
    """Yields running text in order, in pieces of about `PIECE_CHARS` characters.

    A piece ends before a single space between two letters or digits, else before a newline, else
    anywhere. In nearly every vocabulary such a space separates tokens, so the tokens of the pieces
    are those of the whole text.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > PIECE_CHARS:
            stop = cut(rest, start + PIECE_CHARS, start)
            yield rest[start:stop]
            start = stop
        rest = rest[start:]
    if rest:
        yield rest


def cut(text: str, near: int, start: int) -> int:
    """Returns the best index in (start, near] to cut running text; see `pieces`.

    `text` must be longer than `near`.
    """
    lowest = max(start, near - _LOOK_BACK)
    place = near
    while (place := text.rfind(" ", lowest + 1, place)) > 0:
        if text[place - 1].isalnum() and text[place + 1].isalnum():
            return place
    place = near
    while (place := text.rfind("\n", lowest + 1, place)) > 0:
        if not (text[place - 1].isspace() or text[place + 1].isspace()):
            return place
    return near


class Part(abc.ABC):
    """Consecutive documents of a source; it pickles.

    Attributes:
      num_bytes: approximate bytes that it reads, for a progress bar.
    """

    num_bytes: int

    @abc.abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yields its documents in order.

        Raises:
          DataError: something in it cannot be read.
        """


class Source(abc.ABC):
    """An ordered collection of documents.

    Attributes:
      name: for file names and tables.
      origin: the config value that names it, for messages.
    """

    name: str
    origin: str

    @abc.abstractmethod
    def digest(self) -> str:
        """Returns a SHA-256 of its content, hexadecimal.

        Raises:
          DataError: something in it cannot be read.
        """

    @functools.cached_property
    def first_digest(self) -> str:
        """The first value of `digest`, cached because it reads the whole source."""
        return self.digest()

    @abc.abstractmethod
    def parts(self) -> Sequence[Part]:
        """Returns its parts in order.

        Raises:
          DataError: something in it cannot be read.
        """

    def describe(self) -> dict[str, Any]:
        """Returns further facts for the manifest, such as the number of files."""
        return {}


# Messages.


def plain_name(target: Path) -> str:
    """Returns a short word for file names: letters, digits and underscores of a path."""
    word = "".join(c if c.isalnum() else "_" for c in target.name.split(".")[0]).strip("_")
    return word[:_MAX_WORD] or "text"


def shown(path: str | Path) -> str:
    """Returns a path in one line, with non-printable characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))


def one_line(error: BaseException, most: int = 200) -> str:
    """Returns the message of an error in one line, shortened to `most` characters."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= most else f"{words[:most]}..."


# Files.


def file_digest(path: Path, field: str) -> bytes:
    """Returns the SHA-256 of the bytes of a file.

    Args:
      path: the file.
      field: the config field that names it, for messages.

    Raises:
      DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise DataError(f"{field}: cannot read {shown(path)}: {error.strerror}") from error
