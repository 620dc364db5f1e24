"""The token cache: a source, tokenized once, as memory-mapped arrays on disk.

A cache is a folder `{workdir}/data/<digest>/` with

  tokens-00000.bin ...   little-endian ids, documents one after another, each ended by the end token
                         where the vocabulary has one; a new file after each gigabyte
  mask-00000.bin ...     one byte for each id, 0 where it is not learned; only where there are such
  documents.bin          of each document: first token, key, bytes (see `encoding.DOCUMENT`)
  tokenizer.json
  manifest.json          what it holds, what it was made from, and by which command

The digest covers the text, how it is read, and the tokenizer, so an equal request finds the cache
of an earlier one, and a changed text cannot. Splits are no part of it: which documents validate is
worked out from their keys. A cache is written in parts beside its place, which a killed process
leaves for the next one to go on with, and renamed: it is whole or absent. What is read from it
later is checked first, by checksums and the largest id.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from craft_jax.data.cache.encoding import DOCUMENT
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import DataError

logger = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 22


class Shards:
    """An array of one dimension that lies in several files, mapped into memory; it pickles.

    Args:
      files: in order.
      counts: elements in each.
      dtype: of all.
    """

    def __init__(self, files: list[Path], counts: list[int], dtype: np.dtype):
        self.files, self.counts, self.dtype = files, counts, np.dtype(dtype)
        self.bounds = np.cumsum([0, *counts])
        self._maps = [
            np.memmap(file, self.dtype, "r", shape=(count,))
            for file, count in zip(files, counts, strict=True)
        ]

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __reduce__(self) -> tuple:
        return Shards, (self.files, self.counts, self.dtype)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the elements from `start` to `stop`."""
        shard = int(np.searchsorted(self.bounds, start, "right")) - 1
        if stop <= self.bounds[shard + 1]:
            offset = self.bounds[shard]
            return self._maps[shard][start - offset : stop - offset]
        middle = int(self.bounds[shard + 1])
        return np.concatenate([self.read(start, middle), self.read(middle, stop)])

    def take(self, index: np.ndarray) -> np.ndarray:
        """Returns the elements with these numbers, int (M,)."""
        if len(self._maps) == 1:
            return self._maps[0][index]
        found = np.empty(index.shape, self.dtype)
        shard = np.searchsorted(self.bounds, index, "right") - 1
        for number in np.unique(shard).tolist():
            here = shard == number
            found[here] = self._maps[number][index[here] - self.bounds[number]]
        return found

    def place(self, index: int) -> str:
        """Returns words for where an element is stored."""
        shard = int(np.searchsorted(self.bounds, index, "right")) - 1
        return f"{self.files[shard]} token {index - self.bounds[shard]}"


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

    @functools.cached_property
    def tokens(self) -> Shards:
        """All ids, uint16 or uint32."""
        return self._shards("tokens", np.dtype(self.manifest["dtype"]))

    @functools.cached_property
    def mask(self) -> Shards | None:
        """Of each id whether it is learned, uint8; None where all are."""
        if self.manifest["learned"] == self.manifest["tokens"]:
            return None
        return self._shards("mask", np.dtype(np.uint8))

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """Of each document its first token, key and bytes (`encoding.DOCUMENT`)."""
        count = self.manifest["documents"]
        return np.memmap(self.path / "documents.bin", DOCUMENT, "r", shape=(count,))

    @property
    def digest(self) -> str:
        """Identifies text and tokenizer together."""
        return self.manifest["digest"]

    def _shards(self, kind: str, dtype: np.dtype) -> Shards:
        counts = [shard["tokens"] for shard in self.manifest["shards"]]
        files = [self.path / file_name(kind, n) for n in range(len(counts))]
        return Shards(files, counts, dtype)


# Opening.


def file_name(kind: str, number: int) -> str:
    """Returns the name of a shard: `tokens-00000.bin`."""
    return f"{kind}-{number:05}.bin"


def open_cache(path: Path, digest: str) -> TokenCache | None:
    """Opens a cache; None if there is none. One that is not whole is moved out of the way."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["checksum"] != checksum_of(manifest):
            raise ValueError("manifest.json: checksum mismatch")
        tokenizer = Tokenizer.load(path / "tokenizer.json")
        files = [(file, facts) for file, facts in manifest["files"].items()]
        # CRC-32 needs no interpreter.
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            largest = max(pool.map(lambda item: _check(path, *item, manifest["dtype"]), files))
        if largest != manifest["largest"] or largest >= tokenizer.vocab_size:
            raise ValueError(f"it has ids up to {largest}")
        if (manifest["digest"], manifest["tokenizer"]["digest"]) != (digest, tokenizer.digest):
            raise ValueError("its digests do not agree")
    except (OSError, ValueError, KeyError, TypeError, DataError) as error:
        if path.exists():
            logger.warning("token cache %s is damaged (%s); making it again", path, error)
            shutil.rmtree(path)
        return None
    return TokenCache(path=path, manifest=manifest, tokenizer=tokenizer)


def checksum_of(manifest: dict[str, Any]) -> str:
    """Returns the SHA-256 of a manifest without its own `checksum`."""
    facts = {name: fact for name, fact in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _check(path: Path, name: str, facts: dict[str, Any], dtype: str) -> int:
    """Checks a file of a cache; returns the largest id in it.

    Raises:
      ValueError: it is not what the manifest promises.
    """
    if (path / name).stat().st_size != facts["bytes"]:
        raise ValueError(f"{name} does not have {facts['bytes']} bytes")
    crc, largest = 0, -1
    with (path / name).open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            crc = zlib.crc32(block, crc)
            if name.startswith("tokens"):
                largest = max(largest, int(np.frombuffer(block, dtype).max()))
    if f"{crc:08x}" != facts["crc32"]:
        raise ValueError(f"{name}: crc32 mismatch")
    return largest
