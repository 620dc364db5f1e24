"""PyTorch checkpoint files, written tensor by tensor, without torch.

Plain data flows in first, with a `Placeholder` where each tensor goes, then the arrays, one at a
time; a zip archive that `torch.load(weights_only=True)` reads flows out. Writing needs memory for
one array. `torchfile` reads such files.
"""

import collections
import contextlib
import dataclasses
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from interop.files.pickles import STORAGES, UNTYPED
from interop.mapping.tensors import Abstract

_ALIGNMENT = 64
_CHUNK = 1 << 24
_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
_UNTYPED_NAMES = {dtype: name for name, dtype in UNTYPED.items()}
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}


@dataclasses.dataclass(frozen=True)
class Placeholder:
    """Where a tensor goes.

    Attributes:
      key: names the array; places with the same key share its memory.
      abstract: its shape and dtype.
    """

    key: str
    abstract: Abstract


class TorchFileWriter:
    """Writes a checkpoint that `torch.load(weights_only=True)` reads, one array at a time.

    The same input gives the same bytes. As a context manager it finishes the file, unless it is
    left by an exception; a file that was not finished is no zip archive and does not load.

    Attributes:
      keys: the arrays, in the order in which `write` wants them.
    """

    def __init__(self, path: str | Path, value: Any, *, name: str = "archive"):
        """Starts the file.

        Args:
          path: the file; replaced if it is there.
          value: dicts, lists, tuples, text, numbers and None, with a `Placeholder` for each tensor.
          name: of the folder inside the archive. torch.save takes the stem of the file.

        Raises:
          TypeError: `value` has something else in it, named by its path.
          ValueError: two placeholders have one key and are not the same.
        """
        emitter = _Emitter()
        data = emitter.emit(value)
        self._arrays = emitter.arrays
        self.keys = tuple(self._arrays)
        self._written = 0
        self._name = name
        self._file = open(path, "wb")  # noqa: SIM115  # Stays open until `close`.
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True)
        with self._abandoning():
            self._record("data.pkl", data)
            # No `.format_version`: with it torch computes where records are as if it had written
            # them itself, with a descriptor behind each.
            self._record("byteorder", b"little")

    def write(self, key: str, array: Any) -> None:
        """Writes the next array.

        Raises:
          ValueError: another is next, or it has another shape or dtype.
        """
        array = np.asarray(array)
        following = next(iter(self.keys[self._written : self._written + 1]), None)
        if key != following:
            raise ValueError(f"the next array is {following!r}, not {key!r}")
        abstract = self._arrays[key]
        if (array.shape, array.dtype) != (abstract.shape, abstract.dtype):
            raise ValueError(
                f"{key!r} is {array.dtype}{list(array.shape)}, not "
                f"{abstract.dtype}{list(abstract.shape)}"
            )
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._record(f"data/{self._written}", memoryview(flat))
        self._written += 1

    def add_record(self, name: str, data: bytes) -> None:
        """Adds a record of the caller's own, which torch.load passes over.

        Raises:
          ValueError: the name is one of PyTorch's, or used already.
        """
        reserved = ("data/", "code/", ".data/")
        if name in ("version", "constants.pkl") or name.startswith(reserved):
            raise ValueError(f"a record cannot be called {name!r}; PyTorch gives that a meaning")
        if f"{self._name}/{name}" in self._zip.NameToInfo:
            raise ValueError(f"there is a record {name!r} already")
        self._record(name, data)

    def close(self) -> None:
        """Finishes the file, and waits until it is on disk.

        Raises:
          ValueError: an array was not written.
        """
        if self._file.closed:
            return
        if missing := self.keys[self._written :]:
            self.abandon()
            raise ValueError(f"{len(missing)} arrays were not written: {', '.join(missing[:10])}")
        self._record("version", b"3\n")
        with self._abandoning():
            self._zip.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def abandon(self) -> None:
        """Closes the file without finishing it."""
        # Else it would write the directory that makes the file look whole.
        self._zip.fp = None
        with contextlib.suppress(OSError):  # It may still have to write what fits no more.
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _record(self, name: str, data: bytes | memoryview) -> None:
        info = zipfile.ZipInfo(f"{self._name}/{name}")  # Of 1980, whatever the clock says.
        info.create_system = 3
        info.external_attr = 0o600 << 16
        info.file_size = len(data)
        info.CRC = 0  # zipfile fills it in when the data was written.
        with self._abandoning():
            info.extra = self._padding(info)
            with self._zip.open(info, "w") as record:
                for start in range(0, len(data), _CHUNK):
                    record.write(data[start : start + _CHUNK])

    def _padding(self, info: zipfile.ZipInfo) -> bytes:
        """Returns an extra field, as torch writes it, that makes the data begin at 64 bytes."""
        self._file.seek(0, os.SEEK_END)
        header = len(info.FileHeader(info.file_size * 1.05 > zipfile.ZIP64_LIMIT))
        fill = -(self._file.tell() + header + 4) % _ALIGNMENT
        return struct.pack("<2sH", b"FB", fill) + b"Z" * fill

    @contextlib.contextmanager
    def _abandoning(self) -> Iterator[None]:
        """Gives the file up if writing fails, so that nothing takes it for a whole one."""
        try:
            yield
        except BaseException:
            self.abandon()
            raise


class _Emitter:
    """Makes the pickle of a checkpoint: protocol 2, with only what weights_only=True reads."""

    def __init__(self):
        self.arrays: dict[str, Abstract] = {}
        self._numbers: dict[str, int] = {}

    def emit(self, value: Any) -> bytes:
        """Returns the pickle, and collects `arrays`."""
        return b"\x80\x02" + b"".join(self._any(value, "")) + b"."

    def _any(self, value: Any, path: str) -> Iterator[bytes]:
        dot = f"{path}." if path else ""
        if isinstance(value, Placeholder):
            yield from self._tensor(value)
        elif isinstance(value, Mapping):
            yield _ORDERED_DICT if isinstance(value, collections.OrderedDict) else b"}"
            yield b"("
            for key, child in value.items():
                yield _scalar(key, path)
                yield from self._any(child, dot + str(key))
            yield b"u"
        elif isinstance(value, (list, tuple)):
            yield b"](" if isinstance(value, list) else b"("
            for i, child in enumerate(value):
                yield from self._any(child, f"{dot}{i}")
            yield b"e" if isinstance(value, list) else b"t"
        else:
            yield _scalar(value, path)

    def _tensor(self, place: Placeholder) -> Iterator[bytes]:
        abstract = place.abstract
        if self.arrays.setdefault(place.key, abstract) != abstract:
            raise ValueError(f"the array {place.key!r} has two shapes or dtypes")
        number = self._numbers.setdefault(place.key, len(self._numbers))
        name = _UNTYPED_NAMES.get(abstract.dtype)
        if name is None and abstract.dtype not in _STORAGE_NAMES:
            raise ValueError(f"{place.key!r} has dtype {abstract.dtype}, which PyTorch lacks")
        kind = "torch.storage\nUntypedStorage"
        if not name:
            kind = f"torch\n{_STORAGE_NAMES[abstract.dtype]}"
        yield b"ctorch._utils\n_rebuild_tensor_v%d\n" % (3 if name else 2)
        yield b"((" + _scalar("storage") + f"c{kind}\n".encode()
        yield _scalar(str(number)) + _scalar("cpu")
        yield _scalar(abstract.nbytes if name else abstract.size)
        yield b"tQ" + _scalar(0) + _counts(abstract.shape) + _counts(_strides(abstract.shape))
        yield _scalar(False) + _ORDERED_DICT
        if name:
            yield "c{}\n{}\n".format(*name.split(".")).encode()
        yield b"tR"


def _scalar(value: Any, path: str = "") -> bytes:
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(text)) + text
    if isinstance(value, int):
        if -(1 << 31) <= value < 1 << 31:
            return b"J" + struct.pack("<i", value)
        number = int(value).to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        if len(number) < 256:
            return b"\x8a" + bytes([len(number)]) + number
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    what = f"{value!r:.80} ({type(value).__name__})"
    raise TypeError(f"{path or 'the value'}: {what} is no plain data")


def _counts(counts: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_scalar, counts)) + b"t"


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides that torch gives a contiguous tensor; a size of 0 counts as 1."""
    steps, step = [], 1
    for n in reversed(shape):
        steps.append(step)
        step *= max(n, 1)
    return tuple(reversed(steps))
