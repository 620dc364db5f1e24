"""Builds a token cache: encodes parts in a temporary folder, joins them and renames it."""

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import logging
import os
import shlex
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np

from craft_jax.data.cache import encoding
from craft_jax.data.cache.encoding import DOCUMENT, Encoding
from craft_jax.data.cache.token_cache import (
    BLOCK_BYTES,
    TokenCache,
    checksum_of,
    file_name,
    open_cache,
)
from craft_jax.data.sources.documents import Source
from craft_jax.data.sources.formats import Format
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import DataError, OutputError, StorageError

logger = logging.getLogger(__name__)

_FORMAT = 4

_SHARD_BYTES = 1 << 30

_POLL_SECONDS = 0.5

_STALE_SECONDS = 30 * 24 * 3600


def build(source: Source, *, tokenizer: Tokenizer, format: Format, folder: Path) -> TokenCache:
    """Tokenizes a source, or opens its cache.

    Args:
      source: the documents.
      tokenizer: of the ids.
      format: how records become text.
      folder: of all caches.

    Raises:
      DataError: the source is empty or unreadable, or changes while it is read.
      OutputError: the folder cannot be created.
      StorageError: the cache cannot be written.
    """
    recipe = {
        "format": _FORMAT,
        "source": source.first_digest,
        "fields": dataclasses.asdict(format),
        "tokenizer": tokenizer.digest,
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    path = folder / digest[:16]
    if cache := open_cache(path, digest):
        logger.info("data: %s (prepared already)", path)
        return cache
    with _held(path.with_name(f".{path.name}.partial")) as partial:
        # Another process may have completed it meanwhile.
        if cache := open_cache(path, digest):
            return cache
        try:
            _remove_stale(folder, partial)
            _write(partial, source, tokenizer, format, recipe | {"digest": digest})
            partial.rename(path)
            (path / _LOCK).unlink()
        except OSError as error:
            raise StorageError(f"cannot write the token cache {path}: {error}") from error
    cache = open_cache(path, digest)
    if cache is None:
        raise StorageError(f"the token cache {path} cannot be read back; delete it and try again")
    return cache


# Writing.

_LOCK = ".lock"


@contextlib.contextmanager
def _held(partial: Path) -> Iterator[Path]:
    """Creates the folder in which one process at a time writes a cache; others wait.

    Removes it at the end unless a part is complete.
    """
    with _locked(partial):
        try:
            yield partial
        finally:
            if partial.exists() and not any(f.suffix == ".json" for f in partial.iterdir()):
                shutil.rmtree(partial, ignore_errors=True)


def _locked(partial: Path) -> IO[str]:
    has_logged = False
    while True:
        try:
            partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write the token cache {partial}: {error}") from error
        try:
            handle = (partial / _LOCK).open("a", encoding="utf-8")
        except FileNotFoundError:  # Completed and renamed since mkdir.
            continue
        except OSError as error:
            raise OutputError(f"cannot write the token cache {partial}: {error}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle.fileno()), os.stat(partial / _LOCK)):
                return handle
        except BlockingIOError:
            if not has_logged:
                logger.info("data: waiting for another process that tokenizes the same text")
            has_logged = True
            time.sleep(_POLL_SECONDS)
        except FileNotFoundError:
            pass
        except BaseException:
            handle.close()
            raise
        handle.close()


def _remove_stale(folder: Path, own: Path) -> None:
    """Removes temporary folders that have not changed for a month."""
    for left in {*folder.glob(".*.partial")} - {own}:
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                logger.info("data: removing %s, unchanged for a month", left)
                shutil.rmtree(left, ignore_errors=True)


class _Totals(NamedTuple):
    """The sums over all parts, and the files of the cache."""

    facts: dict[str, int]
    files: dict[str, dict[str, Any]]
    shards: list[dict[str, int]]


def _write(
    path: Path, source: Source, tokenizer: Tokenizer, format: Format, recipe: dict[str, Any]
) -> None:
    start = time.monotonic()
    parts = source.parts()
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    if ready := sum(encoding.done(path, n) is not None for n in range(len(parts))):
        logger.info("data: continuing %s: %d of %d parts are done", path, ready, len(parts))
    try:
        encoding.run(Encoding(parts, format, tokenizer, path, dtype, source.name), parts)
    except DataError:
        _check_unchanged(source, recipe["source"])
        raise
    _check_unchanged(source, recipe["source"])
    done = [encoding.done(path, n) or {} for n in range(len(parts))]
    if not sum(facts["characters"] for facts in done):
        raise DataError(f"{source.origin}: the text is empty; name a file that contains text")
    totals = _joined(path, done, dtype)
    (path / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    manifest = recipe | totals.facts
    manifest["source"] = {"name": source.name, "origin": source.origin, "digest": recipe["source"]}
    manifest["source"] |= source.describe()
    manifest["tokenizer"] = {"digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size}
    manifest |= {"dtype": dtype.str, "shards": totals.shards, "files": totals.files}
    manifest["command"] = shlex.join(sys.argv)
    manifest["created"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    manifest["checksum"] = checksum_of(manifest)
    words = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False)
    (path / "manifest.json").write_text(words + "\n", encoding="utf-8")
    for part in path.glob("part-*"):
        part.unlink()
    seconds = time.monotonic() - start
    logger.info(
        "data: %s documents, %.1f MB, encoded to %s tokens in %.1f s (%.2f bytes per token)",
        f"{manifest['documents']:,}",
        manifest["bytes"] / 1e6,
        f"{manifest['tokens']:,}",
        seconds,
        manifest["bytes"] / max(manifest["tokens"], 1),
    )


def _check_unchanged(source: Source, digest: str) -> None:
    """Checks that the source has not changed since its digest was computed.

    Raises:
      DataError: it has changed.
    """
    if source.digest() != digest:
        raise DataError(
            f"{source.origin}: the text changed while it was tokenized; try again when nothing "
            "writes to it"
        )


def _joined(path: Path, parts: list[dict[str, Any]], dtype: np.dtype) -> _Totals:
    """Concatenates the files of all parts."""
    facts = {name: sum(part[name] for part in parts) for name in _SUMMED}
    facts["largest"] = max(part["largest"] for part in parts)
    is_masked = facts["learned"] < facts["tokens"]
    sizes: list[int] = []
    outputs: list[_Output] = []

    def output(name: str) -> _Output:
        outputs.append(stack.enter_context(_Output(path / name)))
        return outputs[-1]

    with contextlib.ExitStack() as stack:
        documents = output("documents.bin")
        tokens, mask = None, None
        held, position = np.zeros(0, DOCUMENT), 0
        for number, part in enumerate(parts):
            # Empty files cannot be memory-mapped.
            if tokens is None or (tokens.size >= _SHARD_BYTES and part["tokens"]):
                sizes.append(0)
                tokens = output(file_name("tokens", len(sizes) - 1))
                mask = output(file_name("mask", len(sizes) - 1)) if is_masked else None
            place = path / f"part-{number}"
            crc = tokens.copy(place.with_suffix(".tokens"))
            if crc != part["crc32"]:
                place.with_suffix(".json").unlink()  # So that it is encoded again.
                raise StorageError(f"{place}.tokens is damaged; run the command again")
            if mask and place.with_suffix(".mask").exists():
                mask.copy(place.with_suffix(".mask"))
            elif mask:
                mask.write(b"\1" * part["tokens"])
            rows = np.fromfile(place.with_suffix(".documents"), DOCUMENT)
            rows["start"] += position
            # Bytes before the first document of a part belong to the previous document.
            if len(held):
                held["bytes"][-1] += part["leading_bytes"]
            if len(rows):
                documents.write(held.tobytes())
                held = rows
            sizes[-1] += part["tokens"]
            position += part["tokens"]
        documents.write(held.tobytes())
        for file in outputs:
            file.sync()
    files = {file.path.name: {"bytes": file.size, "crc32": file.crc32} for file in outputs}
    return _Totals(facts, files, [{"tokens": size} for size in sizes])


_SUMMED = ("tokens", "learned", "documents", "characters", "bytes")


class _Output:
    """A file of the cache, open for writing.

    Attributes:
      path: the file.
      size: bytes written.
    """

    def __init__(self, path: Path):
        self.path, self.size, self._crc = path, 0, 0
        self._file = path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._crc = zlib.crc32(content, self._crc)
        self.size += len(content)

    def copy(self, place: Path) -> str:
        """Appends the content of a file; returns its checksum."""
        crc = 0
        with place.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                self.write(block)
                crc = zlib.crc32(block, crc)
        return f"{crc:08x}"

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    @property
    def crc32(self) -> str:
        return f"{self._crc:08x}"
