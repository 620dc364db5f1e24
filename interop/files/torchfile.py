"""PyTorch checkpoint files (`.pt`, `.bin`, `.pth`, `.ckpt`), read without torch.

A path flows in; plain data with lazy arrays flows out, and what was found on the way: which objects
are stubs, and which arrays have several names. Here are the formats of such files (a zip archive,
and the legacy one), and what to say of those that are no checkpoint (tar archives, plain pickles).
The pickles in them run on the machine of `pickles`. Files are mapped, so that reading needs memory
for one tensor at most. `torch_writer` writes such files.
"""

import collections
import dataclasses
import functools
import mmap
import struct
import tarfile
import zipfile
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

from interop.errors import CorruptFileError, DtypeError
from interop.files.pickles import (
    DAMAGE,
    PLAIN,
    DamagedError,
    Machine,
    Reader,
    Refused,
    Storage,
    StoredTensor,
    Stub,
    is_pickle,
    one_line,
)
from interop.files.sniff import HEAD_BYTES, describe_bad_file

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_ZIP_MAGIC = b"PK\x03\x04"
_MAX_DEPTH = 200
_MAX_PLACES = 2_000_000


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """The contents of a file.

    Attributes:
      value: dicts, lists, tuples, sets, numbers, text, None, `StoredTensor` and `Stub`.
      dropped: "path: class" for the first stub of each class in `value`.
      format: "zip", or "legacy" (before torch 1.6).
      shared: for each array with several names, its names: dotted paths of keys.
    """

    value: Any
    dropped: tuple[str, ...]
    format: str
    shared: tuple[tuple[str, ...], ...]


def read_torch_file(path: str | Path, allow_globals: Collection[str] = ()) -> TorchFile:
    """Reads a checkpoint; nothing in it is run.

    Args:
      path: the file.
      allow_globals: names, such as "package.module.function", that become stubs rather than an
        error. They are not imported either.

    Raises:
      CorruptFileError: there is no such file, it is damaged, or it is something else.
      DtypeError: a tensor is complex, quantised, sparse, or without data.
      UnsafePickleError: its pickle asks for a name that is not known to be harmless.
    """
    source = _Source(Path(path), allow_globals)
    try:
        value, kind = source.read()
        dropped, shared = _survey(value, min(_MAX_PLACES, 4 * source.size + 1000))
    except DamagedError as error:
        raise CorruptFileError(f"{path} {error}", path=str(path)) from None
    except _RefusedError as error:
        raise DtypeError(f"{path}: {error}", path=str(path)) from None
    return TorchFile(value, dropped, kind, shared)


def read_record(path: Path, name: str, limit: int = 1 << 28) -> bytes | None:
    """Returns a record that a writer added to a zip checkpoint, or None if there is none.

    Args:
      path: the file, of whatever kind.
      name: of the record, inside the folder of the archive.
      limit: the most bytes that are read; what claims to be larger is none of ours.

    Raises:
      CorruptFileError: it is there and damaged.
    """
    found = None
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.partition("/")[2] == name and entry.file_size <= limit:
                    found = entry
                    return archive.read(entry)
    except (zipfile.BadZipFile, NotImplementedError, OSError, *DAMAGE) as error:
        if found is not None:
            raise CorruptFileError(f"{path}: its record {name} is damaged: {error}") from None
    return None


class _RefusedError(Exception):
    """Which tensor cannot be read, and why."""


class _Source:
    """A mapped file, and the formats that it may be in.

    Attributes:
      size: its bytes.
    """

    def __init__(self, path: Path, allowed: Collection[str]):
        self._path = path
        self._allowed = frozenset(allowed)
        self._data = _mapped(path)
        self.size = len(self._data)

    def read(self) -> tuple[Any, str]:
        """Returns the value and the format."""
        if self._data[:4] == _ZIP_MAGIC:
            return self._read_zip(), "zip"
        if self._data[257:262] == b"ustar":
            raise self._tar()
        reader = Reader(self._data, 0, self.size)
        try:
            if self._begins_with_magic(reader):
                return self._read_legacy(reader), "legacy"
        except DamagedError as error:
            what = describe_bad_file(self._data[:HEAD_BYTES], self.size)
            raise DamagedError(f"is {what}") if what else error from None
        raise self._stranger()

    def _machine(
        self, reader: Reader, storage: Callable[[Any], Any] = lambda identity: None
    ) -> Machine:
        return Machine(reader, self._path, self._allowed, storage)

    def _run(self, reader: Reader, *storage: Callable[[Any], Any]) -> Any:
        """Returns the value; a forbidden name behind the damage matters more than the damage."""
        begin = reader.tell()
        try:
            return self._machine(reader, *storage).load()
        except DamagedError:
            self._scan(begin, reader.end)
            raise

    def _scan(self, begin: int, end: int) -> None:
        """Raises UnsafePickleError if the pickles in a range name what is forbidden."""
        self._machine(Reader(self._data, begin, end)).check()

    def _read_zip(self) -> Any:
        entries = self._zip_entries()
        root = self._zip_root([entry.filename for entry in entries])
        records: dict[str, tuple[int, int]] = {}
        for entry in entries:
            if entry.filename in records:
                raise DamagedError(f"has two records {entry.filename!r}; copy or save it again")
            records[entry.filename] = self._zip_record(entry)
        for name, (begin, size) in records.items():
            if name.endswith(".pkl") and name != f"{root}/data.pkl":
                self._scan(begin, begin + size)
        self._check_byte_order(records.get(f"{root}/byteorder"))
        begin, size = records[f"{root}/data.pkl"]
        storage = functools.partial(self._zip_storage, records, root)
        return self._run(Reader(self._data, begin, begin + size), storage)

    def _zip_entries(self) -> list[zipfile.ZipInfo]:
        try:
            with zipfile.ZipFile(self._path) as archive:
                return archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, OSError, *DAMAGE) as error:
            raise DamagedError(
                f"is a truncated or damaged zip archive: {self.size} bytes, without a readable "
                f"directory at the end ({error}); copy or download it again"
            ) from None

    def _zip_record(self, entry: zipfile.ZipInfo) -> tuple[int, int]:
        """Returns where a record begins, and its size."""
        name = entry.filename
        if entry.flag_bits & 1:
            raise DamagedError(f"has an encrypted record {name!r}; PyTorch writes none")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise DamagedError(
                f"has a compressed record {name!r}; PyTorch writes none. If it is an archive of a "
                "folder, unpack it first"
            )
        header = self._data[entry.header_offset : entry.header_offset + 30]
        if entry.header_offset < 0 or len(header) < 30 or header[:4] != _ZIP_MAGIC:
            raise DamagedError(f"is damaged: its directory misplaces {name!r}; copy it again")
        begin = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        if begin + entry.file_size > self.size:
            raise DamagedError(
                f"is damaged: {name!r} would end at byte {begin + entry.file_size} of "
                f"{self.size}; copy it again"
            )
        return begin, entry.file_size

    def _zip_root(self, names: list[str]) -> str:
        """Returns the folder of the archive that has the checkpoint."""
        roots = [n.removesuffix("/data.pkl") for n in names if n.endswith("/data.pkl")]
        roots = [root for root in roots if "/" not in root]
        if len(set(roots)) != 1:
            some = ", ".join(names[:3]) or "nothing"
            raise DamagedError(
                f"is a zip archive ({self.size} bytes) with {len(roots)} records */data.pkl, not "
                f"a PyTorch checkpoint; it has {one_line(some)}"
            )
        [root] = set(roots)
        code = any(name.startswith(f"{root}/code/") for name in names)
        if code and f"{root}/constants.pkl" in names:
            raise DamagedError(
                "is a TorchScript program (torch.jit.save), not a checkpoint; save the state_dict "
                "of the model with torch.save"
            )
        return root

    def _check_byte_order(self, record: tuple[int, int] | None) -> None:
        if record is None:
            return
        begin, size = record
        order = self._data[begin : begin + min(size, 16)]
        if order != b"little":
            raise DamagedError(
                f"has byte order {order!r}, not b'little'; load and save it with PyTorch on a "
                "little-endian machine"
            )

    def _zip_storage(
        self, records: Mapping[str, tuple[int, int]], root: str, identity: Any
    ) -> Storage:
        storage = Storage.of(self._data, identity, 5)
        name = f"data/{storage.key}"
        record = records.get(f"{root}/{name}")
        if record is None:
            raise DamagedError(f"lacks the record {name}, which its pickle names")
        storage.begin, size = record
        if size != storage.nbytes:
            raise DamagedError(
                f"is damaged: {name} has {size} bytes, where its pickle says {storage.nbytes}"
            )
        return storage

    def _begins_with_magic(self, reader: Reader) -> bool:
        """Returns whether this is the legacy format. Leaves the reader behind the first pickle."""
        if not is_pickle(self._data):
            return False
        value = self._run(reader)
        return type(value) is int and value == _LEGACY_MAGIC

    def _read_legacy(self, reader: Reader) -> Any:
        """Reads the format before torch 1.6: pickles one after the other, then storages."""
        protocol, system = (self._machine(reader).load() for _ in range(2))
        if protocol != _LEGACY_PROTOCOL:
            raise DamagedError("is damaged: it has another version of the legacy format than 1001")
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise DamagedError(
                "was not written on a little-endian machine; load and save it with PyTorch on one"
            )
        storages: dict[str, Storage] = {}
        value = self._run(reader, functools.partial(self._legacy_storage, storages))
        keys = self._machine(reader).load()
        if not isinstance(keys, list) or not all(type(key) is str for key in keys):
            raise DamagedError("is damaged: its list of storages is none")
        self._place(storages, keys, reader.tell())
        return value

    def _legacy_storage(self, storages: dict[str, Storage], identity: Any) -> Any:
        if isinstance(identity, tuple) and identity[:1] == ("module",) and len(identity) > 1:
            return identity[1]
        storage = Storage.of(self._data, identity, 6)
        whole = storages.setdefault(storage.key, storage)
        if (whole.kind, whole.nbytes) != (storage.kind, storage.nbytes):
            raise DamagedError(f"is damaged: its pickle describes storage {whole.key} in two ways")
        return whole if identity[5] is None else whole.view(identity[5])

    def _place(self, storages: dict[str, Storage], keys: list[str], begin: int) -> None:
        """Finds the storages, each behind its number of elements."""
        for key in keys:
            if key not in storages:
                raise DamagedError(f"is damaged: nothing uses its storage {key[:40]!r}")
            storage = storages.pop(key)
            numel = int.from_bytes(self._data[begin : begin + 8], "little", signed=True)
            end = begin + 8 + storage.nbytes
            if end > self.size:
                raise DamagedError(
                    f"is truncated: storage {key} would end at byte {end} of {self.size}; copy or "
                    "download it again"
                )
            if numel * storage.itemsize != storage.nbytes:
                raise DamagedError(
                    f"is damaged: storage {key} has {numel} elements, where its pickle says "
                    f"{storage.nbytes // storage.itemsize}"
                )
            storage.begin = begin + 8
            begin = end
        if storages:
            raise DamagedError(f"is damaged: it lacks the storage {next(iter(storages))[:40]!r}")

    def _tar(self) -> DamagedError:
        """Returns why a tar archive is not read, after looking for what is forbidden."""
        try:
            with tarfile.open(self._path, "r:") as archive:
                members = [m for m in archive.getmembers() if m.isreg()]
        except (tarfile.TarError, OSError, *DAMAGE) as error:
            return DamagedError(f"is a damaged tar archive of {self.size} bytes ({error})")
        pickles = {"pickle", "tensors", "storages", "sys_info"}
        for member in members:
            if member.name in pickles or member.name.endswith((".pkl", ".pickle")):
                begin = min(max(member.offset_data, 0), self.size)
                self._scan(begin, min(begin + max(member.size, 0), self.size))
        if {"pickle", "tensors", "storages"} <= {member.name for member in members}:
            return DamagedError(
                "is in the tar format of PyTorch before 0.1.10; load it with torch.load("
                "weights_only=False) if you trust it, and save it again"
            )
        return DamagedError(f"is a tar archive ({self.size} bytes); unpack it first")

    def _stranger(self) -> DamagedError:
        """Returns what a file is instead of a checkpoint, after looking for what is forbidden."""
        if is_pickle(self._data):
            self._scan(0, self.size)
            return DamagedError(
                "is a plain pickle, not a PyTorch checkpoint; load it with what wrote it, and save "
                "a state_dict with torch.save"
            )
        what = describe_bad_file(self._data[:HEAD_BYTES], self.size)
        return DamagedError(
            f"is {what}"
            if what
            else f"is no PyTorch checkpoint ({self.size} bytes), or its start is damaged"
        )


def _mapped(path: Path) -> mmap.mmap:
    what = None
    try:
        if path.is_dir():
            what = "is a folder, not a file; name the file in it"
        elif not path.exists():
            what = "does not exist: no such file"
        elif not path.is_file():
            what = "is not a regular file"
        elif path.stat().st_size == 0:
            what = f"is {describe_bad_file(b'', 0)}"
        else:
            with open(path, "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
    raise CorruptFileError(f"{path} {what}", path=str(path))


def _survey(value: Any, limit: int) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Returns the notes on stubs and the names of shared arrays.

    Raises:
      DamagedError: the value is deeper or larger than one can walk, or holds itself.
      _RefusedError: a tensor in it cannot be read.
    """
    kinds: dict[str, str] = {}
    names: dict[Hashable, list[str]] = {}
    seen: set[int] = set()
    # Breadth first, so that the first path to a stub is the shortest. The last part of an entry is
    # the containers around it: a stub may point back to what holds it, plain data may not.
    queue: collections.deque = collections.deque([("", value, ())])
    places = 0
    while queue:
        path, node, around = queue.popleft()
        places += 1
        if places > limit:
            raise DamagedError(f"is damaged: its pickle unfolds to more than {limit} containers")
        if isinstance(node, StoredTensor):
            names.setdefault(node.memory, []).append(path)
            continue
        if id(node) in around or len(around) > _MAX_DEPTH:
            raise DamagedError(
                f"is damaged: {path[:160]!r} holds itself, or {_MAX_DEPTH} levels of containers"
            )
        inner = (*around, id(node))
        if isinstance(node, Stub):
            if id(node) in seen:
                continue
            seen.add(id(node))
            kinds.setdefault(node.name, path)
            inner = ()
        queue.extend((name, child, inner) for name, child in _children(path, node))
    shared = tuple(tuple(same) for same in names.values() if len(same) > 1)
    return tuple(f"{path or 'the whole file'}: {name}" for name, path in kinds.items()), shared


def _children(path: str, node: Any) -> Iterator[tuple[str, Any]]:
    """Yields what a node holds and is not plain, with its path."""
    dot = f"{path}." if path else ""
    if isinstance(node, dict):
        for key, child in node.items():
            if not isinstance(key, PLAIN):
                yield path, key
            if not isinstance(child, PLAIN):
                yield dot + _label(key), child
    elif isinstance(node, (list, tuple, set, frozenset)):
        for i, child in enumerate(node):
            if not isinstance(child, PLAIN):
                yield f"{dot}{i}", child
    elif isinstance(node, Stub):
        for part in (node.args, node.kwargs, node.state, node.entries, node.elements):
            if part:
                yield path, part
    elif isinstance(node, Refused):
        raise _RefusedError(
            f"the tensor {path!r} is {node.why}; save it as a dense tensor of real numbers"
        )
    elif isinstance(node, Storage):
        raise _RefusedError(f"{path!r} is a storage, not a tensor; save the tensor")
    elif not isinstance(node, PLAIN):
        raise DamagedError(f"is damaged: {path[:160]!r} is half of an object")


def _label(key: Any) -> str:
    try:
        return key if isinstance(key, str) else str(key)
    except ValueError:  # Python refuses to print integers of thousands of digits.
        return "(a large number)"
