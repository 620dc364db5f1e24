"""Safetensors files, read without loading them and written without holding them.

A path flows in; arrays that are views of the mapped file flow out when they are asked for. The
other way, names with shapes and dtypes decide where each byte goes, and arrays flow in, in any
order and from any thread. The `safetensors` package is not used: for numpy it wants all tensors in
memory at once, saves wrong numbers for arrays that are not contiguous, and has no float8.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import mmap
import os
import re
import reprlib
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from interop.errors import CorruptFileError, DtypeError, listed, nearest
from interop.files.sniff import HEAD_BYTES, describe_bad_file
from interop.mapping.tensors import DTYPES, Abstract, LazyTensor

MAX_HEADER_BYTES = 100_000_000
"""The longest header that the official library reads."""

_LENGTH_BYTES = 8
_MAX_BYTES = 2**63 - 1
_MAX_DIMENSIONS = 64
_CHUNK = 1 << 24
_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
# As the official library orders tensors in a file, which keeps each of them aligned.
_ORDER = "U64 I64 F64 F32 U32 I32 BF16 F16 U16 I16 F8_E4M3 F8_E5M2 I8 U8 BOOL".split()
_RANKS = {DTYPES[name]: rank for rank, name in enumerate(_ORDER)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Dtypes of the format that have none here.
_FOREIGN = {
    "C64": "complex",
    "F4": "packed 4-bit",
    "F6_E2M3": "packed 6-bit",
    "F6_E3M2": "packed 6-bit",
    "F8_E4M3FNUZ": "an 8-bit float of its own kind",
    "F8_E5M2FNUZ": "an 8-bit float of its own kind",
    "F8_E8M0": "a quantisation scale",
}
_PICKLE = re.compile(rb"\x80[\2-\5]")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


@dataclasses.dataclass(frozen=True)
class SafetensorsFile:
    """The contents of a file.

    Attributes:
      path: where it is.
      tensors: in the order of the header. What they read is read-only, and a view of the mapped
        file, or a copy of a part that is not aligned for its dtype.
      metadata: text that its writer added.
      nbytes: bytes of all tensors.
    """

    path: Path
    tensors: dict[str, LazyTensor]
    metadata: dict[str, str]
    nbytes: int


def read_safetensors(path: Path) -> SafetensorsFile:
    """Reads the header of a file, and checks that it accounts for every byte.

    Raises:
      CorruptFileError: there is no such file, it is damaged, or it is something else.
      DtypeError: a tensor has a dtype that numpy does not have.
    """
    path = Path(path)
    try:
        with _opened(path) as file:
            source = _Source(path, _version(file))
            text, begin = _read_header(file, source.version.size)
        header = _parse(text)
        metadata = _checked_metadata(header.pop(_METADATA, {}))
        entries = [_entry(name, described) for name, described in header.items()]
        nbytes = _covered(entries, begin, source.version.size)
    except _DamagedError as error:
        raise CorruptFileError(f"{path} {error}", path=str(path)) from None
    except _RefusedError as error:
        raise DtypeError(f"{path}: {error}", path=str(path)) from None
    tensors = {
        entry.name: LazyTensor(
            entry.shape,
            entry.dtype,
            functools.partial(source.read, entry.shape, entry.dtype, begin + entry.begin),
        )
        for entry in entries
    }
    return SafetensorsFile(path, tensors, metadata, nbytes)


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a dict of a JSON object; an `object_pairs_hook`.

    Raises:
      ValueError: a name is there twice, or is not Unicode.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found or not _is_unicode(name):
            what = "there twice" if name in found else "not Unicode"
            raise ValueError(f"the name {_SHORT.repr(name)} is {what}")
        found[name] = value
    return found


def _is_unicode(text: str) -> bool:
    """Returns whether a text has no lone surrogates, which cannot be encoded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class _DamagedError(Exception):
    """A file is damaged; the message continues a sentence that begins with its path."""


class _RefusedError(Exception):
    """Which tensor cannot be read, and why."""


@dataclasses.dataclass(frozen=True)
class _Version:
    """Identifies the content of a file: it changes when the file is rewritten."""

    size: int
    inode: int
    modified: int


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor of the header; its bytes count from the end of the header."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    begin: int
    end: int


class _Source:
    """A file that is mapped when something is first read from it."""

    def __init__(self, path: Path, version: _Version):
        self.version = version
        self._path = path
        self._lock = threading.Lock()
        self._map: mmap.mmap | None = None

    def read(self, shape: tuple[int, ...], dtype: np.dtype, begin: int) -> np.ndarray:
        """Returns the array that begins at a byte of the file."""
        view = np.ndarray(shape, dtype, buffer=self._mapped(), offset=begin)
        if view.flags.aligned:
            return view
        # Not every library that takes arrays looks at this flag.
        copy = view.copy()
        copy.flags.writeable = False
        return copy

    def _mapped(self) -> mmap.mmap:
        with self._lock:
            if self._map is None:
                self._map = self._map_file()
            return self._map

    def _map_file(self) -> mmap.mmap:
        try:
            with _opened(self._path) as file:
                # A header that belongs to other bytes gives wrong numbers, or kills the process.
                if _version(file) != self.version:
                    raise _DamagedError("changed after its header was read; start again")
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except _DamagedError as error:
            raise CorruptFileError(f"{self._path} {error}", path=str(self._path)) from None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file; a pipe would wait forever."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise _DamagedError("is a folder, where a file is needed; name the file in it")
        if not stat.S_ISREG(mode):
            raise _DamagedError("is a device or a pipe, where a file is needed; copy it to a file")
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise _DamagedError("does not exist: no such file; check the path") from None
    except OSError as error:
        raise _DamagedError(f"cannot be opened: {error.strerror}; check the path") from None
    with file:
        yield file


def _version(file: BinaryIO) -> _Version:
    status = os.fstat(file.fileno())
    return _Version(status.st_size, status.st_ino, status.st_mtime_ns)


# ---- the header


def _read_header(file: BinaryIO, size: int) -> tuple[bytes, int]:
    """Returns the text of the header, and where it ends."""
    head = file.read(min(HEAD_BYTES, size))
    if size < _LENGTH_BYTES:
        raise _stranger(head, size, f"{size} bytes, shorter than the {_LENGTH_BYTES} of a length")
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    begin = _LENGTH_BYTES + length
    if begin > size:
        raise _stranger(head, size, f"{size} bytes, where its header alone would need {begin}")
    if length > MAX_HEADER_BYTES:
        raise _stranger(head, size, f"a header of {length} bytes, more than {MAX_HEADER_BYTES}")
    if not length:
        raise _stranger(head, size, "no header, as after a save that was not finished")
    if head[_LENGTH_BYTES : _LENGTH_BYTES + 1] != b"{":
        first = head[_LENGTH_BYTES : min(begin, _LENGTH_BYTES + 8)]
        raise _stranger(head, size, f"a header that begins with {first!r}, not '{{'")
    file.seek(_LENGTH_BYTES)
    text = file.read(length)
    if len(text) != length:
        raise _DamagedError(f"ended after {len(text)} of the {length} bytes of its header")
    return text, begin


def _stranger(head: bytes, size: int, has: str) -> _DamagedError:
    what = describe_bad_file(head, size)
    if what is None and _PICKLE.match(head):
        what = f"a pickle ({size} bytes), perhaps of PyTorch; name it .pt"
    # A recognised header means that only its length is wrong, which `has` says better.
    if what and not what.startswith("a safetensors file"):
        return _DamagedError(f"is not a safetensors file, but {what}")
    return _DamagedError(f"is not a safetensors file, or a damaged one: it has {has}; get it again")


def _parse(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise _DamagedError(f"is damaged: its header is no JSON: {error}; get it again") from None
    # It begins with a brace, so it is an object.
    return header


def _checked_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise _DamagedError(f"is damaged: its {_METADATA} is {_SHORT.repr(metadata)}, not texts")
    for key, value in metadata.items():
        if not isinstance(value, str) or not _is_unicode(value):
            raise _DamagedError(
                f"is damaged: {_METADATA} {_SHORT.repr(key)} is {_SHORT.repr(value)}, not text; "
                "save it again"
            )
    return metadata


def _entry(name: str, described: Any) -> _Entry:
    if not isinstance(described, dict) or set(described) != set(_FIELDS):
        raise _misdescribed(name, described)
    dtype, shape, offsets = (described[field] for field in _FIELDS)
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(offsets):
        raise _misdescribed(name, described)
    if len(offsets) != 2:
        raise _misdescribed(name, described)
    found = _dtype(name, dtype)
    needed, has = _num_bytes(name, shape, found), offsets[1] - offsets[0]
    if needed != has:
        raise _DamagedError(
            f"is damaged: tensor {_SHORT.repr(name)} is {dtype} {shape}, which is {needed} bytes, "
            f"and its data_offsets span {has}; save it again"
        )
    return _Entry(name, tuple(shape), found, *offsets)


def _misdescribed(name: str, described: Any) -> _DamagedError:
    return _DamagedError(
        f"is damaged: tensor {_SHORT.repr(name)} is described by {_SHORT.repr(described)}, not by "
        "a dtype, a shape and two data_offsets; save it again"
    )


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= _MAX_BYTES for v in values)


def _dtype(name: str, dtype: str) -> np.dtype:
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype in _FOREIGN:
        raise _RefusedError(
            f"tensor {_SHORT.repr(name)} has dtype {dtype} ({_FOREIGN[dtype]}); convert or "
            "dequantise it with the tool that made it, then save it as F32, BF16 or F16"
        )
    raise _DamagedError(
        f"is damaged: tensor {_SHORT.repr(name)} has dtype {_SHORT.repr(dtype)}, which the format "
        f"does not have; known are {', '.join(DTYPES)}"
    )


def _num_bytes(name: str, shape: list[int], dtype: np.dtype) -> int:
    if len(shape) > _MAX_DIMENSIONS:
        raise _DamagedError(
            f"is damaged: tensor {_SHORT.repr(name)} has {len(shape)} dimensions; numpy has at "
            f"most {_MAX_DIMENSIONS}"
        )
    # Zeros do not excuse the others: numpy makes no such shape either.
    size = dtype.itemsize
    for count in shape:
        size *= count or 1
        if size > _MAX_BYTES:
            raise _DamagedError(
                f"is damaged: tensor {_SHORT.repr(name)} of shape {_SHORT.repr(shape)} would be "
                f"larger than {_MAX_BYTES} bytes; save it again"
            )
    return 0 if 0 in shape else size


def _covered(entries: Iterable[_Entry], begin: int, size: int) -> int:
    """Checks that the tensors follow each other up to the end of the file; returns their bytes."""
    position, previous = 0, ""
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin < position:
            raise _DamagedError(
                f"is damaged: tensors {_SHORT.repr(previous)} and {_SHORT.repr(entry.name)} "
                "overlap; save it again"
            )
        if entry.begin > position:
            raise _DamagedError(
                f"is damaged: {entry.begin - position} bytes before tensor "
                f"{_SHORT.repr(entry.name)} belong to none; save it again"
            )
        position, previous = entry.end, entry.name
    if begin + position > size:
        raise _DamagedError(
            f"is truncated: its header describes {begin + position} bytes, and it has {size}; "
            "copy or download it again"
        )
    if begin + position < size:
        raise _DamagedError(
            f"is damaged, file not fully covered: its header describes {begin + position} bytes, "
            f"and it has {size}; copy or download it again"
        )
    return position


# ---- writing


class SafetensorsWriter:
    """Writes a file tensor by tensor, byte for byte as the official library would.

    The first write makes the file, or entering the context does. Its header comes last: a file
    that was not finished is not mistaken for one.

    Attributes:
      path: where the file goes; nothing may be there.
      order: the names, as they lie in the file.
      header_size: bytes before the first tensor.
      nbytes: bytes of the whole file.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, Abstract], metadata: Mapping[str, str]
    ) -> None:
        """Plans the layout; nothing is written.

        Args:
          path: the file to make.
          tensors: what will be written.
          metadata: text to put into the header.

        Raises:
          DtypeError: a tensor has a dtype that the format does not have.
          ValueError: a name or the metadata cannot be written.
        """
        self.path = Path(path)
        self._tensors = dict(tensors)
        _check_dtypes(self._tensors, self.path)
        self.order = tuple(sorted(tensors, key=lambda name: (_RANKS[tensors[name].dtype], name)))
        self._header, self._begins = _layout(self.order, self._tensors, metadata)
        self.header_size = len(self._header)
        self.nbytes = self.header_size + sum(tensor.nbytes for tensor in self._tensors.values())
        self._lock = threading.Lock()
        self._handle: int | None = None
        self._is_ended = self._is_complete = False
        self._unclaimed = set(self.order)
        self._unwritten = set(self.order)

    def __enter__(self) -> Self:
        with self._lock:
            self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor; several threads may do so at once.

        Args:
          name: which one.
          array: its values, in any memory layout.

        Raises:
          ValueError: it is not one of the tensors, is not as announced, or is written already.
          OSError: the file cannot be made or written, for instance because the disk is full.
        """
        array = np.asarray(array)
        self._check(name, array)
        with self._lock:
            if name not in self._unclaimed:
                raise ValueError(f"{self.path}: tensor {name!r} is written twice")
            # A handle of its own: the number of one that `abort` closes may become another file's.
            handle = os.dup(self._open())
            self._unclaimed.discard(name)
        try:
            _write_at(handle, _bytes_of(array), self._begins[name])
        finally:
            os.close(handle)
        with self._lock:
            self._unwritten.discard(name)

    def close(self) -> None:
        """Finishes the file: writes the header, and waits until all of it is on the disk.

        Raises:
          ValueError: a tensor was not written, or the file was given up.
          OSError: as `write`.
        """
        with self._lock:
            if self._is_complete:
                return
            try:
                handle = self._open()
                if self._unwritten:
                    missing = listed(name for name in self.order if name in self._unwritten)
                    raise ValueError(f"{self.path} is not finished: it lacks {missing}")
                _write_at(handle, memoryview(self._header), 0)
                os.fsync(handle)
                self._is_complete = True
            finally:
                self._end()

    def abort(self) -> None:
        """Gives the file up, unless it is finished. What is there stays, without a header."""
        with self._lock:
            self._end()

    def _open(self) -> int:
        """Returns the handle of the file; makes the file if need be."""
        if self._is_ended:
            raise ValueError(f"{self.path} is closed already")
        if self._handle is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            handle = os.open(self.path, flags, 0o666)
            try:
                os.ftruncate(handle, self.nbytes)
            except OSError:
                os.close(handle)
                self.path.unlink()
                raise
            self._handle = handle
        return self._handle

    def _end(self) -> None:
        self._is_ended = True
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def _check(self, name: str, array: np.ndarray) -> None:
        want = self._tensors.get(name)
        if want is None:
            close = nearest(name, self.order)
            raise ValueError(f"{self.path} has no place for tensor {name!r}{close}")
        if (array.shape, array.dtype) != (want.shape, want.dtype):
            raise ValueError(
                f"{self.path}: tensor {name!r} is {array.dtype} {list(array.shape)}, announced as "
                f"{want.dtype} {list(want.shape)}"
            )


def _check_dtypes(tensors: Mapping[str, Abstract], path: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in _RANKS:
            raise DtypeError(
                f"{path}: tensor {name!r} has dtype {tensor.dtype}, which safetensors files cannot "
                f"have; cast it to one of {', '.join(map(str, _RANKS))}",
                path=str(path),
            )


def _layout(
    order: Iterable[str], tensors: Mapping[str, Abstract], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Returns the length and the header as bytes, and where in the file each tensor begins."""
    header: dict[str, Any] = {_METADATA: _sorted_texts(metadata)} if metadata else {}
    begins, position = {}, 0
    for name in order:
        if name == _METADATA:
            raise ValueError(f"a tensor cannot have the name {name!r}, which the format uses")
        tensor = tensors[name]
        begins[name], end = position, position + tensor.nbytes
        described = (_NAMES[tensor.dtype], list(tensor.shape), [position, end])
        header[name] = dict(zip(_FIELDS, described, strict=True))
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _LENGTH_BYTES)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(
            f"a header of {len(text)} bytes is more than the {MAX_HEADER_BYTES} that readers take; "
            "use several files"
        )
    whole = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return whole, {name: len(whole) + begin for name, begin in begins.items()}


def _sorted_texts(metadata: Mapping[str, str]) -> dict[str, str]:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"metadata {key!r} is {_SHORT.repr(value)}; both must be text")
    return dict(sorted(metadata.items()))


def _bytes_of(array: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _write_at(handle: int, data: memoryview, position: int) -> None:
    """Writes all of `data`, of which the system may take a part at a time."""
    while data:
        count = os.pwrite(handle, data[:_CHUNK], position)
        if not count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        data, position = data[count:], position + count
