"""Builds a token cache: parts in a folder beside its place, joined, and renamed."""

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

_LOOK_SECONDS = 0.5

_STALE_SECONDS = 30 * 24 * 3600


def build(source: Source, *, tokenizer: Tokenizer, format: Format, folder: Path) -> TokenCache:
    """Tokenizes a source, or finds it tokenized already.

    Args:
      source: the documents.
      tokenizer: of the ids.
      format: what is read of records.
      folder: where caches live.

    Raises:
      DataError: the source is empty or unreadable, or changes while it is read.
      OutputError: the folder cannot be made.
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
        # Another process may have finished it meanwhile.
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
    """Makes the folder in which a cache is written, for one process at a time; others wait.

    A folder that is left with nothing in it is removed.
    """
    with _locked(partial):
        try:
            yield partial
        finally:
            if partial.exists() and not any(f.suffix == ".json" for f in partial.iterdir()):
                shutil.rmtree(partial, ignore_errors=True)


def _locked(partial: Path) -> IO[str]:
    has_said = False
    while True:
        try:
            partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write the token cache {partial}: {error}") from error
        try:
            handle = (partial / _LOCK).open("a", encoding="utf-8")
        except FileNotFoundError:  # Finished between the two.
            continue
        except OSError as error:
            raise OutputError(f"cannot write the token cache {partial}: {error}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle.fileno()), os.stat(partial / _LOCK)):
                return handle
        except BlockingIOError:
            if not has_said:
                logger.info("data: waiting for another process that prepares the same text")
            has_said = True
            time.sleep(_LOOK_SECONDS)
        except FileNotFoundError:
            pass
        except BaseException:
            handle.close()
            raise
        handle.close()


def _remove_stale(folder: Path, own: Path) -> None:
    """Removes what was begun long ago and will hardly be gone on with, unless it is now."""
    for left in {*folder.glob(".*.partial")} - {own}:
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                logger.info("data: removing %s, which was begun a month ago", left)
                shutil.rmtree(left, ignore_errors=True)


class _Totals(NamedTuple):
    """What all parts hold together, and the files that they became."""

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
        logger.info("data: going on with %s: %d of %d parts are done", path, ready, len(parts))
    try:
        encoding.run(Encoding(parts, format, tokenizer, path, dtype, source.name), parts)
    except DataError:
        _check_unchanged(source, recipe["source"])
        raise
    _check_unchanged(source, recipe["source"])
    found = [encoding.done(path, n) or {} for n in range(len(parts))]
    if not sum(facts["characters"] for facts in found):
        raise DataError(f"{source.origin}: the text is empty; name a file with text in it")
    totals = _joined(path, found, dtype)
    (path / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    made = recipe | totals.facts
    made["source"] = {"name": source.name, "origin": source.origin, "digest": recipe["source"]}
    made["source"] |= source.describe()
    made["tokenizer"] = {"digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size}
    made |= {"dtype": dtype.str, "shards": totals.shards, "files": totals.files}
    made["command"] = shlex.join(sys.argv)
    made["created"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    made["checksum"] = checksum_of(made)
    words = json.dumps(made, indent=2, sort_keys=True, ensure_ascii=False)
    (path / "manifest.json").write_text(words + "\n", encoding="utf-8")
    for left in path.glob("part-*"):
        left.unlink()
    seconds = time.monotonic() - start
    logger.info(
        "data: %s documents, %.1f MB, became %s tokens in %.1f s (%.2f bytes per token)",
        f"{made['documents']:,}",
        made["bytes"] / 1e6,
        f"{made['tokens']:,}",
        seconds,
        made["bytes"] / max(made["tokens"], 1),
    )


def _check_unchanged(source: Source, digest: str) -> None:
    """Sees that what was read in several passes was the same in all of them."""
    if source.digest() != digest:
        raise DataError(
            f"{source.origin}: the text changed while it was tokenized; start again when nothing "
            "writes to it"
        )


def _joined(path: Path, parts: list[dict[str, Any]], dtype: np.dtype) -> _Totals:
    """Joins the files of all parts into those of the cache."""
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
            # No file is empty: it could not be mapped.
            if tokens is None or (tokens.size >= _SHARD_BYTES and part["tokens"]):
                sizes.append(0)
                tokens = output(file_name("tokens", len(sizes) - 1))
                mask = output(file_name("mask", len(sizes) - 1)) if is_masked else None
            place = path / f"part-{number}"
            crc = tokens.copy(place.with_suffix(".tokens"))
            if crc != part["crc32"]:
                place.with_suffix(".json").unlink()  # So that it is made again.
                raise StorageError(f"{place}.tokens was damaged on the disk; start again")
            if mask and place.with_suffix(".mask").exists():
                mask.copy(place.with_suffix(".mask"))
            elif mask:
                mask.write(b"\1" * part["tokens"])
            rows = np.fromfile(place.with_suffix(".documents"), DOCUMENT)
            rows["start"] += position
            # Bytes before the first document of a part are those of the last one before it.
            if len(held):
                held["bytes"][-1] += part["leading_bytes"]
            if len(rows):
                documents.write(held.tobytes())
                held = rows
            sizes[-1] += part["tokens"]
            position += part["tokens"]
        documents.write(held.tobytes())
        for made in outputs:
            made.sync()
    files = {made.path.name: {"bytes": made.size, "crc32": made.crc32} for made in outputs}
    return _Totals(facts, files, [{"tokens": size} for size in sizes])


_SUMMED = ("tokens", "learned", "documents", "characters", "bytes")


class _Output:
    """A file of the cache while it is written.

    Attributes:
      path: where.
      size: bytes so far.
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
        """Adds the content of a file; returns its checksum."""
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
