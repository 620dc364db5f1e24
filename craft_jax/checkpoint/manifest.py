"""The manifest of a checkpoint: its files and arrays with their checksums.

    MANIFEST.json   format, step, bytes
                    files:  path -> size, crc32
                    leaves: path -> shape, dtype, crc32 (of the array in memory, before writing)
                    crc32 of the manifest itself

It is written last, so a folder without one is no checkpoint. Orbax only checks its indices and
loads flipped bits of arrays silently; these checksums cover every byte of every file.
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

from craft_jax.errors import StorageError

NAME = "MANIFEST.json"
FORMAT = 1
_BLOCK = 1 << 22
_SEAL = '"crc32": "'

Level = Literal["full", "fast", "none"]


class DamagedError(StorageError):
    """A checkpoint differs from what was written. The message is the reason alone."""


class Leaf(NamedTuple):
    """An array of a checkpoint."""

    shape: tuple[int, ...]
    dtype: str
    crc32: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a checkpoint.

    Attributes:
      step: its number.
      files: size and CRC-32 of each file, by its path from the checkpoint's folder.
      leaves: the arrays by `params/PATH` and `optimizer/PATH`.
    """

    step: int
    files: Mapping[str, tuple[int, int]]
    leaves: Mapping[str, Leaf]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())


def leaf_of(array: Any) -> Leaf:
    """Returns the shape, dtype and checksum of an array in memory."""
    return Leaf(tuple(array.shape), str(array.dtype), array_crc(array))


def array_crc(array: Any) -> int:
    """Returns the CRC-32 of the elements of a NumPy array in C order."""
    return zlib.crc32(array.ravel(order="C").view("uint8"))


def write(folder: Path, step: int, leaves: Mapping[str, Leaf]) -> None:
    """Writes the manifest of a folder that is complete but for it."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "crc32": _hex(crc)}
        for path, crc in zip(paths, _file_crcs(paths), strict=True)
    }
    body = {
        "format": FORMAT,
        "step": step,
        "bytes": sum(entry["size"] for entry in files.values()),
        "files": files,
        "leaves": {
            name: {"shape": list(leaf.shape), "dtype": leaf.dtype, "crc32": _hex(leaf.crc32)}
            for name, leaf in leaves.items()
        },
    }
    head = json.dumps(body, indent=1, ensure_ascii=False).removesuffix("\n}") + f",\n {_SEAL}"
    (folder / NAME).write_text(f'{head}{_hex(zlib.crc32(head.encode()))}"\n}}\n', encoding="utf-8")


def read(folder: Path) -> Manifest:
    """Reads the manifest of a checkpoint.

    Raises:
      DamagedError: it is missing, its own checksum is wrong, or a newer version wrote it.
    """
    try:
        text = (folder / NAME).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise DamagedError(f"{NAME} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{NAME}: {error}") from error
    head, seal, tail = text.rpartition(_SEAL)
    if tail != f'{_hex(zlib.crc32((head + seal).encode()))}"\n}}\n':
        raise DamagedError(f"{NAME}: crc32 mismatch")
    body = json.loads(text)
    if body["format"] > FORMAT:
        raise DamagedError(
            f"{NAME}: format {body['format']} was written by a newer craft_jax; this one reads "
            f"{FORMAT}"
        )
    if not folder.name.startswith(".") and folder.name != str(body["step"]):
        raise DamagedError(f"{NAME} belongs to step {body['step']}")
    return Manifest(
        step=body["step"],
        files={name: (e["size"], int(e["crc32"], 16)) for name, e in body["files"].items()},
        leaves={
            name: Leaf(tuple(e["shape"]), e["dtype"], int(e["crc32"], 16))
            for name, e in body["leaves"].items()
        },
    )


def check(folder: Path, level: Level = "full") -> Manifest:
    """Checks a checkpoint against its manifest, and returns the manifest.

    Args:
      folder: of the checkpoint.
      level: `full` reads every byte; `fast` reads small files and compares the sizes of others;
        `none` reads the manifest alone.

    Raises:
      DamagedError: names the first file that differs.
    """
    manifest = read(folder)
    if level == "none":
        return manifest
    for name, (size, _) in manifest.files.items():
        try:
            now = os.stat(folder / name).st_size
        except OSError:
            raise DamagedError(f"{name} is missing") from None
        if now != size:
            raise DamagedError(f"{name} has {now} bytes, not {size}")
    names = [
        name for name, (size, _) in manifest.files.items() if level == "full" or size <= _BLOCK
    ]
    for name, now in zip(names, _file_crcs([folder / name for name in names]), strict=True):
        if now != manifest.files[name][1]:
            raise DamagedError(f"{name}: crc32 mismatch")
    return manifest


def _file_crcs(paths: list[Path]) -> list[int]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_file_crc, paths))


def _file_crc(path: Path) -> int:
    crc = 0
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                crc = zlib.crc32(block, crc)
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read: {error.strerror}") from error
    return crc


def _hex(crc: int) -> str:
    return f"{crc:08x}"
