"""The token cache: a source, tokenized once, as memory-mapped arrays on disk.

A cache is a folder `{workdir}/data/<digest>/` with `train.bin` and `val.bin` (little-endian ids,
documents one after another, each ended by the end token where the vocabulary has one),
`tokenizer.json`, and `manifest.json`, which says what it was made from. The digest covers the text,
the tokenizer's recipe and the split, so an equal request finds the cache of an earlier one, and a
changed text cannot. It is written beside its place and renamed: a cache is whole or absent. What
is read from it later is checked first, by a checksum and the largest id of each split.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import json
import logging
import os
import shutil
import socket
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from craft_jax import durable
from craft_jax.data import tokenizers
from craft_jax.data.sources import Source
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import DataError, OutputError, StorageError

logger = logging.getLogger(__name__)

SPLITS = ("train", "val")
_FORMAT = 3
_BPE_SAMPLE_CHARS = 32 << 20
_BLOCK_BYTES = 1 << 22
_CHARACTER_LIMIT = 65536


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenCache:
    """A tokenized source.

    Attributes:
      path: the folder.
      manifest: what it holds and was made from (see `manifest.json`).
      tokenizer: the tokenizer of its ids.
    """

    path: Path
    manifest: dict
    tokenizer: Tokenizer

    def tokens(self, split: str) -> np.ndarray:
        """Returns the ids of `train` or `val`, uint16 or uint32 (tokens,), mapped from disk."""
        count = self.manifest["splits"][split]["tokens"]
        dtype = np.dtype(self.manifest["dtype"])
        if not count:
            return np.zeros(0, dtype)
        return np.memmap(self.path / f"{split}.bin", dtype, mode="r", shape=(count,))

    def num_bytes(self, split: str) -> int:
        """Returns how many UTF-8 bytes of text the split was made from."""
        return self.manifest["splits"][split]["bytes"]

    @property
    def digest(self) -> str:
        """Identifies text, tokenizer and split together."""
        return self.manifest["digest"]


def build(
    source: Source,
    *,
    tokenizer: str | Tokenizer,
    vocab_size: int,
    val_fraction: float,
    max_val_chars: int | None = None,
    folder: Path,
) -> TokenCache:
    """Tokenizes a source, or finds it tokenized already.

    The first `1 - val_fraction` of the characters train, the rest, or the last `max_val_chars` of
    it, validate.

    Args:
      source: the documents.
      tokenizer: `char`, `byte`, `bpe`, the path of a `tokenizer.json`, or a tokenizer.
      vocab_size: the size of the vocabulary to train; `bpe` only.
      val_fraction: the part of the characters, at the end, that validates; in [0, 1).
      max_val_chars: the most characters that validate; None for no limit.
      folder: where caches live.

    Raises:
      DataError: the source is empty or unreadable, or changes while it is read.
      OutputError: the folder cannot be made.
      StorageError: the cache cannot be written.
    """
    if isinstance(tokenizer, str) and tokenizer not in tokenizers.KINDS:
        tokenizer = Tokenizer.load(tokenizer)
    recipe = {
        "format": _FORMAT,
        "source": source.digest(),
        "tokenizer": tokenizer if isinstance(tokenizer, str) else tokenizer.digest,
        "vocab_size": vocab_size if tokenizer == "bpe" else None,
        "val_fraction": val_fraction,
        "max_val_chars": max_val_chars,
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    path = folder / digest[:16]
    if cache := _open(path, digest):
        logger.info("data: %s (prepared already)", path)
        return cache
    partial = path.with_name(f".{path.name}{_partial_mark()}{os.getpid()}")
    try:
        _remove_left(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot write the token cache {path}: {error}") from error
    try:
        _write(partial, source, tokenizer, recipe | {"digest": digest})
        with contextlib.suppress(OSError):  # Another process may have finished the same cache.
            partial.rename(path)
    except OSError as error:
        raise StorageError(f"cannot write the token cache {path}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    cache = _open(path, digest)
    if cache is None:
        raise StorageError(f"the token cache {path} cannot be read back; delete it and try again")
    return cache


def _open(path: Path, digest: str) -> TokenCache | None:
    """Opens a cache; None if there is none. One that is not whole is moved out of the way."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        tokenizer, dtype = Tokenizer.load(path / "tokenizer.json"), np.dtype(manifest["dtype"])
        for split in SPLITS:
            promised = manifest["splits"][split]
            expected = promised["tokens"] * dtype.itemsize
            if (path / f"{split}.bin").stat().st_size != expected:
                raise ValueError(f"{split}.bin does not have {expected} bytes")
            found = _Ids()
            with (path / f"{split}.bin").open("rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    found.add(np.frombuffer(block, dtype))
            if found.crc32 != promised["crc32"]:
                raise ValueError(f"{split}.bin: crc32 mismatch")
            if found.largest != promised["largest"] or found.largest >= tokenizer.vocab_size:
                raise ValueError(f"{split}.bin has ids up to {found.largest}")
        if (manifest["digest"], manifest["tokenizer"]["digest"]) != (digest, tokenizer.digest):
            raise ValueError("its digests do not agree")
    except (OSError, ValueError, KeyError, TypeError, DataError) as error:
        if path.exists():
            logger.warning("token cache %s is damaged (%s); making it again", path, error)
            shutil.rmtree(path)
        return None
    return TokenCache(path=path, manifest=manifest, tokenizer=tokenizer)


def _write(
    path: Path,
    source: Source,
    tokenizer: str | Tokenizer,
    recipe: dict,
) -> None:
    start = time.monotonic()
    survey = _survey(source, want_alphabet=tokenizer == "char")
    logger.info(
        "data: reading %s: %s documents, %.1f MB",
        source.origin,
        f"{survey.documents:,}",
        survey.num_bytes / 1e6,
    )
    cut = int(survey.characters * (1 - recipe["val_fraction"]))
    if recipe["max_val_chars"] is not None:
        cut = max(cut, survey.characters - recipe["max_val_chars"])
    if tokenizer == "char":
        tokenizer = tokenizers.characters(survey.alphabet, end_token=survey.documents > 1)
    elif tokenizer == "byte":
        tokenizer = tokenizers.bytes_()
    elif tokenizer == "bpe":
        vocab_size = recipe["vocab_size"]
        logger.info("data: training a BPE tokenizer of %s tokens", f"{vocab_size:,}")
        tokenizer = tokenizers.train_bpe(_bpe_sample(source, cut), vocab_size)
    assert isinstance(tokenizer, Tokenizer)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    try:
        splits = _encode(source, tokenizer, cut, path, dtype)
    except DataError:
        _check_unchanged(source, recipe["source"])
        raise
    _check_unchanged(source, recipe["source"])
    (path / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    manifest = recipe | {
        "source": {
            "name": source.name,
            "origin": source.origin,
            "digest": recipe["source"],
            "files": len(source.paths),
            "documents": survey.documents,
            "characters": survey.characters,
            "bytes": survey.num_bytes,
        },
        "tokenizer": {
            "kind": recipe["tokenizer"],
            "digest": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
        },
        "dtype": dtype.str,
        "splits": splits,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False)
    (path / "manifest.json").write_text(text + "\n", encoding="utf-8")
    logger.info(
        "data: %s training and %s validation tokens in %.1f s",
        f"{splits['train']['tokens']:,}",
        f"{splits['val']['tokens']:,}",
        time.monotonic() - start,
    )


def _check_unchanged(source: Source, digest: str) -> None:
    """Sees that what was read in several passes was the same in all of them."""
    if source.digest() != digest:
        raise DataError(
            f"{source.origin}: the text changed while it was tokenized; start again when nothing "
            "writes to it"
        )


def _partial_mark() -> str:
    """Returns what stands before the process id in the name of a folder that is being written."""
    host = "".join(c for c in socket.gethostname() if c.isalnum() or c in "-_")
    return f".tmp-{host}-"


def _remove_left(folder: Path) -> None:
    """Removes what processes of this machine left that were killed while they wrote a cache."""
    mark = _partial_mark()
    for left in folder.glob(f".*{mark}*"):
        pid = left.name.rpartition(mark)[2]
        if pid.isdigit() and not durable.is_alive(int(pid)):
            logger.info("data: removing %s, which a killed process left", left)
            shutil.rmtree(left, ignore_errors=True)


class _Ids:
    """Keeps a checksum of ids, and the largest, while they pass.

    Attributes:
      largest: -1 before there are any.
    """

    def __init__(self) -> None:
        self.largest, self._crc = -1, 0

    def add(self, ids: np.ndarray) -> None:
        self._crc = zlib.crc32(ids, self._crc)
        if ids.size:
            self.largest = max(self.largest, int(ids.max()))

    @property
    def crc32(self) -> str:
        return f"{self._crc:08x}"


@dataclasses.dataclass
class _Survey:
    documents: int = 0
    characters: int = 0
    num_bytes: int = 0
    alphabet: set[str] = dataclasses.field(default_factory=set)


def _survey(source: Source, want_alphabet: bool) -> _Survey:
    survey = _Survey()
    for document in source.documents():
        before = survey.characters
        for piece in document.pieces():
            survey.characters += len(piece)
            survey.num_bytes += len(piece.encode())
            if want_alphabet:
                survey.alphabet |= set(piece)
        survey.documents += survey.characters > before
    if not survey.characters:
        raise DataError(f"{source.origin}: the text is empty; name a file with text in it")
    if len(survey.alphabet) > _CHARACTER_LIMIT:
        raise DataError(
            f"{source.origin}: {len(survey.alphabet)} different characters are too many for "
            "data.tokenizer=char; use byte or bpe"
        )
    return survey


def _split_at(source: Source, cut: int) -> Iterator[tuple[str, str, bool]]:
    """Yields (split, piece, whether it ends a document), cutting the piece that straddles."""
    position = 0
    for document in source.documents():
        held: tuple[str, str] | None = None
        for piece in document.pieces():
            first = max(0, min(len(piece), cut - position))
            position += len(piece)
            for split, part in zip(SPLITS, (piece[:first], piece[first:]), strict=True):
                if part:
                    if held:
                        yield *held, False
                    held = split, part
        if held:
            yield *held, True


def _bpe_sample(source: Source, cut: int) -> Iterator[str]:
    """Yields training text, thinned evenly to at most `_BPE_SAMPLE_CHARS` characters."""
    stride = max(1, -(-cut // _BPE_SAMPLE_CHARS))
    pieces = (piece for split, piece, _ in _split_at(source, cut) if split == "train")
    return itertools.islice(pieces, 0, None, stride)


def _encode(
    source: Source, tokenizer: Tokenizer, cut: int, path: Path, dtype: np.dtype
) -> dict[str, dict]:
    counts: dict[str, dict] = {split: {"tokens": 0, "bytes": 0} for split in SPLITS}
    written = {split: _Ids() for split in SPLITS}
    marks, texts = itertools.tee(_split_at(source, cut))
    encoded = tokenizer.encode_pieces(_known(tokenizer, (piece for _, piece, _ in texts), source))
    with contextlib.ExitStack() as stack:
        files = {s: stack.enter_context((path / f"{s}.bin").open("wb")) for s in SPLITS}
        for (split, piece, is_end), ids in zip(marks, encoded, strict=True):
            if is_end and tokenizer.end_id is not None:
                ids.append(tokenizer.end_id)
            ids_N = np.array(ids, dtype)
            files[split].write(ids_N.tobytes())
            written[split].add(ids_N)
            counts[split]["tokens"] += len(ids)
            counts[split]["bytes"] += len(piece.encode())
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    for split, ids in written.items():
        counts[split] |= {"crc32": ids.crc32, "largest": ids.largest}
    return counts


def _known(tokenizer: Tokenizer, pieces: Iterable[str], source: Source) -> Iterator[str]:
    for piece in pieces:
        if unknown := tokenizer.unknown_characters(piece):
            raise DataError(
                f"{source.origin}: the tokenizer does not know the character {unknown[0]!r} "
                f"(U+{ord(unknown[0]):04X}); choose data.tokenizer=byte or bpe"
            )
        yield piece
