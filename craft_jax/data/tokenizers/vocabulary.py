"""Trains tokenizers on sources: of characters, or BPE on a sample.

Trained tokenizers are cached on disk under a digest of their inputs.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from craft_jax.data import splits, tokenizers
from craft_jax.data.cache.encoding import keyed
from craft_jax.data.sources.documents import Source
from craft_jax.data.sources.formats import Format
from craft_jax.data.splits import Fractions
from craft_jax.data.tokenizers import KINDS, Tokenizer
from craft_jax.errors import DataError, OutputError

logger = logging.getLogger(__name__)

_FORMAT = 1
_CHARACTER_LIMIT = 65536
_MAX_PARTS = 256


def train(
    kind: str,
    training: Sequence[Source],
    format: Format,
    *,
    fractions: Fractions,
    hold_out: str = "auto",
    vocab_size: int = 1024,
    special: Sequence[str] = (),
    max_chars: int = 32 << 20,
    folder: Path,
) -> Tokenizer:
    """Returns a tokenizer, trained on text if it is `char` or `bpe`.

    `char` covers the characters of all text; `bpe` is trained on the training split only.

    Args:
      kind: `char`, `byte`, `bpe`, or the path of a tokenizer.
      training: sources of the text.
      format: how records become text.
      fractions, hold_out: decide the training split; see `DataConfig`.
      vocab_size, max_chars: of `bpe`.
      special: special tokens beside the end token and those of the format's template.
      folder: of trained tokenizers.

    Raises:
      DataError: the tokenizer or the text cannot be read, or there is no text.
      OutputError: the tokenizer cannot be written.
    """
    special = [*dict.fromkeys([*format.special_tokens, *special])]
    if kind == "byte":
        return tokenizers.bytes_(special)
    if kind not in KINDS:
        return Tokenizer.load(kind)
    recipe = {
        "format": _FORMAT,
        "kind": kind,
        "sources": [source.first_digest for source in training],
        "fields": dataclasses.asdict(format),
        "special": special,
    }
    if kind == "bpe":
        recipe |= {"vocab_size": vocab_size, "chars": max_chars, "split": [fractions, hold_out]}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    file = folder / f"{digest[:16]}.json"
    if file.is_file():
        try:
            return Tokenizer.load(file)
        except DataError as error:
            logger.warning("%s; training it again", error)
    if kind == "char":
        tokenizer = _characters(training, format, special)
    else:
        tokenizer = _bpe(training, format, fractions, hold_out, vocab_size, special, max_chars)
    _write(tokenizer, file)
    return tokenizer


def _write(tokenizer: Tokenizer, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.new")
        partial.write_text(tokenizer.json, encoding="utf-8")
        partial.rename(file)
    except OSError as error:
        raise OutputError(f"cannot write the tokenizer {file}: {error}") from error


def _characters(training: Sequence[Source], format: Format, special: Sequence[str]) -> Tokenizer:
    seen, documents = np.zeros(sys.maxunicode + 1, bool), 0
    for source in training:
        for part in source.parts():
            for document in part.documents():
                for item in keyed(document, format):
                    documents += item.key is not None
                    if item.span:
                        packed = item.span.text.encode("utf-32-le", "surrogatepass")
                        seen[np.frombuffer(packed, "<u4")] = True
    points = np.flatnonzero(seen)
    origin = training[0].origin
    if not len(points):
        raise DataError(f"{origin}: the text is empty; name a file that contains text")
    if len(points) > _CHARACTER_LIMIT:
        raise DataError(
            f"{origin}: {len(points)} different characters are too many for data.tokenizer=char; "
            "use byte or bpe"
        )
    # Consecutive documents need a token between them.
    has_end = documents > 1 or bool(special)
    return tokenizers.characters(map(chr, points.tolist()), end_token=has_end, special=special)


def _bpe(
    training: Sequence[Source],
    format: Format,
    fractions: Fractions,
    hold_out: str,
    vocab_size: int,
    special: Sequence[str],
    max_chars: int,
) -> Tokenizer:
    start = time.monotonic()
    logger.info("data: training a BPE tokenizer of %s tokens", f"{vocab_size:,}")
    quota = max(1, max_chars // len(training))
    texts = itertools.chain.from_iterable(
        sample(source, format, fractions, hold_out, quota) for source in training
    )
    counted = _Counted(texts)
    tokenizer = tokenizers.train_bpe(counted, vocab_size, special, progress=sys.stderr.isatty())
    if not counted.characters and any(fractions):  # So short that all of it was held out.
        return _bpe(training, format, Fractions(), hold_out, vocab_size, special, max_chars)
    _trim_memory()
    if not counted.characters:
        raise DataError(f"{training[0].origin}: the text is empty; name a file that contains text")
    seconds = time.monotonic() - start
    logger.info(
        "data: %s tokens, trained on %.1f million characters in %.1f s",
        f"{tokenizer.vocab_size:,}",
        counted.characters / 1e6,
        seconds,
    )
    return tokenizer


def _trim_memory() -> None:
    """Returns freed memory to the system, for the encoding processes."""
    with contextlib.suppress(AttributeError, OSError):  # Not glibc.
        ctypes.CDLL(None).malloc_trim(0)


class _Counted:
    """Iterates over texts and counts their characters."""

    def __init__(self, texts: Iterator[str]):
        self._texts, self.characters = texts, 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.characters += len(text)
            yield text


def sample(
    source: Source, format: Format, fractions: Fractions, hold_out: str, max_chars: int
) -> Iterator[str]:
    """Yields training text of a source, spread evenly over it, of about `max_chars` characters.

    Raises:
      DataError: the text cannot be read.
    """
    parts = source.parts()
    parts = parts[:: -(-len(parts) // _MAX_PARTS)]
    stride = max(1, -(-sum(part.num_bytes for part in parts) // max_chars))
    is_tail = hold_out == "tail" or (hold_out == "auto" and _are_few(source, format))
    # Approximates the start of the tail by bytes.
    left = sum(part.num_bytes for part in parts) * (1 - sum(fractions)) if is_tail else None
    number, is_training = 0, True
    for part in parts:
        for document in part.documents():
            for item in keyed(document, format):
                if item.key is not None and not is_tail:
                    is_training = splits.name_of(item.key, fractions) == "train"
                if not item.span or item.span.is_markup or not is_training:
                    continue
                text = item.span.text
                if left is not None:
                    size = len(text.encode())
                    text = text[: max(0, int(len(text) * min(1, left / max(size, 1))))]
                    left -= size
                if number % stride == 0 and text:
                    yield text
                number += 1


def _are_few(source: Source, format: Format) -> bool:
    """Returns whether a source has too few documents to hold out whole ones."""
    documents = (d for part in source.parts() for d in part.documents() if d.starts)
    with_text = (d for d in documents if next(keyed(d, format), None))
    return len(list(itertools.islice(with_text, splits.FEWEST))) < splits.FEWEST
