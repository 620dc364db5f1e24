"""The token cache: a source, tokenized once, as memory-mapped arrays on disk.

A cache is a folder `{workdir}/data/<digest>/` with

  tokens-00000.bin ...   little-endian ids, documents one after another, each ended by the end token
                         where the vocabulary has one; a new file after each gigabyte
  mask-00000.bin ...     the loss mask, one byte for each id; only if some are 0
  documents.bin          for each document: first token, key, bytes (see `encoding.DOCUMENT`)
  tokenizer.json
  manifest.json          counts, checksums, digests, and the command that created it

The digest covers the text, its format and the tokenizer, so equal requests share a cache, and
changed text gets a new one. Splits are not part of it: they follow from the documents' keys. A
cache is written in parts to a temporary folder, which another process can complete after a kill,
and then renamed: it is whole or absent. Checksums and the largest id are checked when it is opened.
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
    """A memory-mapped array of one dimension in several files; it pickles.

    Args:
      files: in order.
      counts: elements in each.
      dtype: of the elements.
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
        """Returns where an element is stored, for messages."""
        shard = int(np.searchsorted(self.bounds, index, "right")) - 1
        return f"{self.files[shard]} token {index - self.bounds[shard]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenCache:
    """A tokenized source.

    Attributes:
      path: the folder.
      manifest: the content of `manifest.json`.
      tokenizer: of its ids.
    """

    path: Path
    manifest: dict
    tokenizer: Tokenizer

    @functools.cached_property
    def tokens(self) -> Shards:
        """All ids, uint16 or uint32."""
        return self._shards("tokens", np.dtype(self.manifest["dtype"]))

    @functools.cached_property
    def loss_mask(self) -> Shards | None:
        """For each id, whether it counts in the loss, uint8; None if all do."""
        if self.manifest["learned"] == self.manifest["tokens"]:
            return None
        return self._shards("mask", np.dtype(np.uint8))

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """The first token, key and bytes of each document (`encoding.DOCUMENT`)."""
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
    """Opens a cache; None if there is none. Deletes a damaged one."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["checksum"] != checksum_of(manifest):
            raise ValueError("manifest.json: checksum mismatch")
        tokenizer = Tokenizer.load(path / "tokenizer.json")
        files = [(file, facts) for file, facts in manifest["files"].items()]
        # CRC-32 releases the GIL.
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            largest = max(pool.map(lambda item: _check(path, *item, manifest["dtype"]), files))
        if largest != manifest["largest"] or largest >= tokenizer.vocab_size:
            raise ValueError(f"its largest id is {largest}")
        if (manifest["digest"], manifest["tokenizer"]["digest"]) != (digest, tokenizer.digest):
            raise ValueError("its digests do not agree")
    except (OSError, ValueError, KeyError, TypeError, DataError) as error:
        if path.exists():
            logger.warning("token cache %s is damaged (%s); building it again", path, error)
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
      ValueError: it differs from the manifest.
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
