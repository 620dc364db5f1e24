"""Runs the pickles of PyTorch without running anything: inert data comes out, whatever goes in.

A pickle is a program. Bytes of a mapped file flow in, and run on a machine that imports nothing and
calls nothing but the stand-in functions of `_CALLS`; a name that is not known to be harmless ends
the reading. Plain data flows out, with a `StoredTensor` for each tensor, a view of the mapped file,
and a `Stub` for each object of a class. Where the pickles and the storages are in the file is for
`torchfile` to know.
"""

import _compat_pickle
import collections
import dataclasses
import functools
import mmap
import pathlib
import pickletools
import re
import struct
import sys
from collections.abc import Callable, Collection, Hashable, Iterator
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np

from interop.errors import UnsafePickleError
from interop.mapping.tensors import Abstract, LazyTensor

STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "UntypedStorage": np.dtype(np.uint8),
}
# Storages without a dtype here, and the bytes of an element: refused, but only if a tensor uses it.
_FOREIGN_STORAGES = {
    "ComplexDoubleStorage": 16,
    "ComplexFloatStorage": 8,
    "QInt8Storage": 1,
    "QInt32Storage": 4,
    "QUInt8Storage": 1,
    "QUInt4x2Storage": 1,
    "QUInt2x4Storage": 1,
}
# Dtypes that have no storage class; torch keeps them as bytes and names the dtype beside.
UNTYPED: dict[str, np.dtype] = {
    "torch.float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "torch.float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "torch.uint16": np.dtype(np.uint16),
    "torch.uint32": np.dtype(np.uint32),
    "torch.uint64": np.dtype(np.uint64),
}
# Names that are values: they become the text that torch prints for them.
_WORDS = frozenset(
    [
        "torch." + name
        for name in (
            "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex32 "
            "complex64 complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz "
            "float8_e8m0fnu float4_e2m1fn_x2 uint16 uint32 uint64 qint8 qint32 quint8 quint4x2 "
            "quint2x4 bits8 bits16 bits1x8 bits2x4 bits4x2 per_tensor_affine per_tensor_symmetric "
            "per_channel_affine per_channel_symmetric per_channel_affine_float_qparams "
            "contiguous_format channels_last channels_last_3d preserve_format"
        ).split()
    ]
    + [
        "numpy." + name
        for name in (
            "float64 float32 float16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool bool_"
        ).split()
    ]
)
# Classes of the standard library, numpy and torch that may become stubs.
_STUBS = frozenset(
    "builtins.object builtins.int builtins.float builtins.str builtins.bool builtins.bytes "
    "builtins.slice builtins.type datetime.datetime datetime.date datetime.time datetime.timedelta "
    "datetime.timezone decimal.Decimal typing.Any typing.Dict typing.List typing.Optional "
    "typing.Tuple typing.Union numpy.dtype numpy.ndarray torch.Tensor "
    "torch.nn.parameter.Buffer".split()
)
_TORCH_CLASSES = ("torch.nn.modules.", "torch.optim.")
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_CLASS = re.compile(r"_*[A-Z]\w*")
_NUMPY_CODE = re.compile(r"b1|[iu][1248]|f[248]|c(8|16)|[US]\d{1,6}")
# What needs no look inside.
PLAIN = (bool, int, float, complex, str, bytes, bytearray, type(None))
# What code that reads bytes without checking each may raise if they are damaged.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)

_MAX_READ = 1 << 30
_MIN_COPIES = 1 << 24
_MAX_EXPANDED = 1 << 30
_MAX_DIMENSIONS = 64


@dataclasses.dataclass(frozen=True)
class StoredTensor(LazyTensor):
    """A tensor of a file.

    Attributes:
      memory: equal for two tensors that are the same elements of the same storage.
    """

    memory: Hashable = dataclasses.field(compare=False, repr=False)


@dataclasses.dataclass(eq=False, slots=True)
class Stub:
    """A class that was not imported, or an object of one: inert, with what the pickle gave it.

    Attributes:
      name: the class, as in "omegaconf.dictconfig.DictConfig".
      args: what it was called with; None for the class itself.
      kwargs: as `args`, by name.
      state: what its `__setstate__` would get: mostly a dict of its attributes.
      entries: its items, if it is a kind of dict.
      elements: its items, if it is a kind of list or set.
    """

    name: str
    args: tuple | None = None
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    state: Any = dataclasses.field(default=None, repr=False)
    entries: dict = dataclasses.field(default_factory=dict, repr=False)
    elements: list = dataclasses.field(default_factory=list, repr=False)

    def __repr__(self) -> str:
        return f"Stub({self.name!r})"

    @property
    def fields(self) -> dict:
        """Keyword arguments, items and attributes by name."""
        states = self.state if isinstance(self.state, tuple) else (self.state,)
        found = {**self.kwargs, **self.entries}
        for state in states:
            found |= state if isinstance(state, dict) else {}
        return found


class DamagedError(Exception):
    """A file is damaged; the message continues a sentence that begins with its path."""


class Reader:
    """A part of a mapped file as what `pickletools` reads from; never copies what is not there.

    Attributes:
      end: where the part ends in the file.
    """

    def __init__(self, data: mmap.mmap, begin: int, end: int):
        self._data = data
        self._begin = self._position = begin
        self.end = end

    @property
    def size(self) -> int:
        """The number of bytes of the part."""
        return self.end - self._begin

    def read(self, count: int) -> bytes:
        """Returns `count` bytes, or none if there are fewer."""
        if not 0 <= count <= min(self.end - self._position, _MAX_READ):
            return b""
        found = self._data[self._position : self._position + count]
        self._position += count
        return found

    def readline(self) -> bytes:
        """Returns the bytes up to a line break, with it, or none if there is none."""
        limit = min(self.end, self._position + _MAX_READ)
        end = self._data.find(b"\n", self._position, limit)
        return self.read(end + 1 - self._position) if end >= 0 else b""

    def tell(self) -> int:
        """Returns the place in the file."""
        return self._position

    def rewind(self) -> None:
        """Goes back to the begin of the part."""
        self._position = self._begin


@dataclasses.dataclass(eq=False)
class Storage:
    """The bytes that tensors are views of.

    Attributes:
      begin: where they are in the file; known once the file was read so far.
      whole: the storage that this one is a part of, from the byte `delta` on.
    """

    data: mmap.mmap
    kind: str
    key: str
    dtype: np.dtype | None
    itemsize: int
    nbytes: int
    begin: int = -1
    delta: int = 0
    whole: "Storage | None" = None

    @classmethod
    def of(cls, data: mmap.mmap, identity: Any, length: int) -> Self:
        """Returns the storage that a pickle names by a tuple of `length` parts."""
        if not isinstance(identity, tuple) or len(identity) != length or identity[0] != "storage":
            raise DamagedError("is damaged: its pickle names an object that is no storage")
        _, stub, key, _, numel = identity[:5]
        kind = stub.name.rpartition(".")[2] if isinstance(stub, Stub) else ""
        if kind not in STORAGES and kind not in _FOREIGN_STORAGES:
            raise DamagedError(
                f"is damaged: its pickle has a storage of unknown class {stub!r:.80}"
            )
        if type(key) is not str:
            raise DamagedError("is damaged: its pickle has a storage without a key")
        _check_sizes(numel)
        dtype = STORAGES.get(kind)
        itemsize = dtype.itemsize if dtype is not None else _FOREIGN_STORAGES[kind]
        return cls(data, kind, key, dtype, itemsize, numel * itemsize)

    def view(self, metadata: Any) -> Self:
        """Returns the part of this storage that a legacy pickle names."""
        _, offset, numel = metadata
        _check_sizes(offset, numel)
        if (offset + numel) * self.itemsize > self.nbytes:
            raise DamagedError(f"is damaged: a view of storage {self.key} leaves it")
        size, delta = numel * self.itemsize, offset * self.itemsize
        return dataclasses.replace(self, nbytes=size, delta=delta, whole=self)


class Refused:
    """Stands where a tensor would be that cannot be read."""

    def __init__(self, why: str):
        self.why = why


class Machine:
    """Runs pickles, one after the other, on stand-ins.

    Every name is a `Stub`. Calling one looks it up in `_CALLS`, or makes another stub.
    """

    def __init__(
        self,
        reader: Reader,
        path: Path,
        allowed: Collection[str],
        storage: Callable[[Any], Any],
    ):
        self._reader = reader
        self._path = path
        self._allowed = allowed
        self._storage = storage
        self._copied = 0

    def load(self) -> Any:
        """Returns the value of the next pickle.

        Raises:
          DamagedError: it makes no sense.
          UnsafePickleError: as in `find`.
        """
        self._stack: list = []
        self._marks: list[list] = []
        self._memo: dict[int, Any] = {}
        # What a BUILD completes, by identity, and how. Holds the object, so that its id stays its.
        self._unfinished: dict[int, tuple[Any, Callable[[Any], None]]] = {}
        start = self._reader.tell()
        try:
            for opcode, argument, _ in pickletools.genops(self._reader):
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._do(opcode.name, argument)
        except DAMAGE as error:
            raise DamagedError(
                f"is damaged or truncated: its pickle at byte {start} breaks at byte "
                f"{self._reader.tell()} ({type(error).__name__}: {one_line(error)}); copy or "
                "download it again"
            ) from None
        raise DamagedError("is damaged: its pickle has no end")

    def check(self) -> None:
        """Runs all there is; raises UnsafePickleError if a name in it, run or not, is forbidden."""
        for module, name in _named_globals(self._reader):
            self.find(module, name)
        self._reader.rewind()
        try:
            while True:
                self.load()
        except DamagedError:
            return

    def find(self, module: str, attribute: str) -> Any:
        """Returns the stand-in for a name.

        Raises:
          UnsafePickleError: the name is not known to be harmless.
        """
        # As pickle does: protocols 0 to 2 write the names that Python 2 had for things.
        renamed = (_compat_pickle.IMPORT_MAPPING.get(module, module), attribute)
        module, attribute = _compat_pickle.NAME_MAPPING.get((module, attribute), renamed)
        name = f"{module}.{attribute}"
        if name in _WORDS:
            return name
        if name in _CALLS or name in self._allowed or _is_harmless(module, attribute):
            return Stub(name)
        shown = one_line(name if name.isprintable() else ascii(name))
        raise UnsafePickleError(
            f"{self._path}: its pickle asks for {shown}, which is not known to be harmless; "
            f"nothing was run. To read it as an inert stub, give `allow_globals={shown}`",
            path=str(self._path),
            name=name,
        )

    def call(self, function: Any, args: Any, kwargs: Any = None) -> Any:
        """Returns what calling a stand-in gives."""
        if not isinstance(function, Stub) or function.args is not None:
            raise TypeError("a call of what is no function")
        if not isinstance(args, tuple) or not isinstance(kwargs or {}, dict):
            raise TypeError("a call without arguments")
        if handler := _CALLS.get(function.name):
            return handler(self, *args, **(kwargs or {}))
        return Stub(function.name, args, dict(kwargs or {}))

    def copied(self, items: Any) -> Any:
        """Returns `items`, unless the pickle copies so much that it must mean to fill memory."""
        self._copied += len(items)
        if self._copied > max(2 * self._reader.size, _MIN_COPIES):
            raise ValueError("the pickle copies its own data over and over")
        return items

    def unfinished(self, value: Any, finish: Callable[[Any], None]) -> Any:
        """Returns `value`, which the next BUILD on it completes."""
        self._unfinished[id(value)] = (value, finish)
        return value

    def _do(self, name: str, argument: Any) -> None:
        if name in _PUSHES:
            self._push(argument)
        elif make := _MAKES.get(name):
            self._push(make())
        else:
            _ACTIONS[name](self, argument)

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self, count: int) -> list:
        if len(self._stack) < count:
            raise IndexError("the stack is empty")
        items = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return items

    def _pop_mark(self) -> list:
        items = self._stack
        self._stack = self._marks.pop()
        return items

    def _mark(self, _: Any) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _pop_one(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _get(self, index: Any) -> None:
        self._push(self._memo[index])

    def _put(self, index: Any) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def _append(self, items: list) -> None:
        target = self._stack[-1]
        if isinstance(target, Stub):
            target.elements.extend(items)
        elif isinstance(target, set):
            target.update(_keys(items))
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise TypeError("an APPEND to what is no list")

    def _set_items(self, items: list) -> None:
        target = self._stack[-1]
        entries = target.entries if isinstance(target, Stub) else target
        if not isinstance(entries, dict):
            raise TypeError("a SETITEM of what is no dict")
        entries.update(_pairs(items))

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push(self.find(module, name))

    def _stack_global(self, _: Any) -> None:
        module, name = self._pop(2)
        if type(module) is not str or type(name) is not str:
            raise TypeError("a name that is no text")
        self._push(self.find(module, name))

    def _reduce(self, _: Any) -> None:
        self._push(self.call(*self._pop(2)))

    def _new_with_keywords(self, _: Any) -> None:
        self._push(self.call(*self._pop(3)))

    def _inst(self, argument: str) -> None:
        items = self._pop_mark()
        self._global(argument)
        self._push(self.call(self._stack.pop(), tuple(items)))

    def _obj(self, _: Any) -> None:
        function, *items = self._pop_mark()
        self._push(self.call(function, tuple(items)))

    def _build(self, _: Any) -> None:
        [state] = self._pop(1)
        target = self._stack[-1]
        if isinstance(target, Stub):
            target.state = state
        elif id(target) in self._unfinished:
            self._unfinished.pop(id(target))[1](state)
        elif not isinstance(target, dict):  # A dict has attributes in torch: `_metadata`.
            raise TypeError("a BUILD of what has no attributes")

    def _persistent(self, _: Any) -> None:
        self._push(self._storage(self._pop(1)[0]))


_PUSHES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 FLOAT "
    "BINFLOAT".split()
)
_MAKES: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
# Called with the machine and the argument of the opcode. What is missing here is refused.
_ACTIONS: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": Machine._mark,
    "POP": Machine._pop_one,
    "POP_MARK": lambda machine, _: machine._pop_mark(),
    "DUP": lambda machine, _: machine._push(machine._stack[-1]),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Machine._get),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), Machine._put),
    "TUPLE1": lambda machine, _: machine._push(tuple(machine._pop(1))),
    "TUPLE2": lambda machine, _: machine._push(tuple(machine._pop(2))),
    "TUPLE3": lambda machine, _: machine._push(tuple(machine._pop(3))),
    "TUPLE": lambda machine, _: machine._push(tuple(machine._pop_mark())),
    "LIST": lambda machine, _: machine._push(machine._pop_mark()),
    "DICT": lambda machine, _: machine._push(dict(_pairs(machine._pop_mark()))),
    "FROZENSET": lambda machine, _: machine._push(frozenset(_keys(machine._pop_mark()))),
    "APPEND": lambda machine, _: machine._append(machine._pop(1)),
    "APPENDS": lambda machine, _: machine._append(machine._pop_mark()),
    "ADDITEMS": lambda machine, _: machine._append(machine._pop_mark()),
    "SETITEM": lambda machine, _: machine._set_items(machine._pop(2)),
    "SETITEMS": lambda machine, _: machine._set_items(machine._pop_mark()),
    "GLOBAL": Machine._global,
    "STACK_GLOBAL": Machine._stack_global,
    "REDUCE": Machine._reduce,
    "NEWOBJ": Machine._reduce,
    "NEWOBJ_EX": Machine._new_with_keywords,
    "INST": Machine._inst,
    "OBJ": Machine._obj,
    "BUILD": Machine._build,
    "BINPERSID": Machine._persistent,
    **dict.fromkeys(
        ("EXT1", "EXT2", "EXT4"),
        lambda machine, code: machine._push(machine.find("copyreg", f"extension_{code}")),
    ),
}


def _is_harmless(module: str, attribute: str) -> bool:
    """Returns whether a name may become a stub: a class, and not one of Python, numpy or torch."""
    if f"{module}.{attribute}" in _STUBS:
        return True
    # Without dots, as attributes of attributes are a way to reach anything.
    if not _CLASS.fullmatch(attribute) or not _MODULE.fullmatch(module):
        return False
    top = module.partition(".")[0]
    if top == "torch":
        return f"{module}.".startswith(_TORCH_CLASSES) or (
            module in ("torch", "torch.cuda", "torch.storage")
            and (attribute in STORAGES or attribute in _FOREIGN_STORAGES)
        )
    return top != "numpy" and top not in sys.stdlib_module_names


def _keys(items: list) -> list:
    """Returns `items` if hashing them is cheap: a deep tuple takes the stack, or for ever."""
    for item in items:
        todo, count = [item], 0
        while todo:
            one = todo.pop()
            count += 1
            if isinstance(one, (tuple, frozenset)) and count < 1000:
                todo.extend(one)
            elif not isinstance(one, (*PLAIN, Stub, tuple, frozenset)) or count >= 1000:
                raise TypeError("a key that is no text, number or short tuple")
    return items


def _pairs(items: list) -> Iterator[tuple[Any, Any]]:
    if len(items) % 2:
        raise ValueError("a key without a value")
    return zip(_keys(items[::2]), items[1::2], strict=True)


def one_line(text: Any) -> str:
    """Returns `text` on one line, cut to what a message can hold."""
    words = " ".join(str(text).split())
    return words if len(words) <= 160 else f"{words[:157]}..."


def is_pickle(data: mmap.mmap) -> bool:
    """Returns whether a file can be a pickle, by its header or by valid opcodes to the end."""
    if data[:1] == b"\x80" and data[1:2] <= b"\x05":
        return True
    try:
        collections.deque(pickletools.genops(Reader(data, 0, len(data))), maxlen=0)
    except ValueError:
        return False
    return True


def _named_globals(reader: Reader) -> Iterator[tuple[str, str]]:
    """Yields the modules and names in a pickle without running it, as far as it makes sense."""
    texts: list[str] = []
    memo: dict[int, str] = {}
    try:
        for opcode, argument, _ in pickletools.genops(reader):
            if opcode.name in ("GLOBAL", "INST"):
                module, _, name = argument.partition(" ")
                yield module, name
            elif opcode.name == "STACK_GLOBAL" and len(texts) > 1:
                yield texts[-2], texts[-1]
            elif opcode.name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
                memo[len(memo) if argument is None else argument] = texts[-1] if texts else ""
            elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
                texts.append(memo.get(argument, ""))
            elif isinstance(argument, str):
                texts.append(argument)
            del texts[:-2]
    except ValueError:
        return


def _check_sizes(*sizes: Any) -> None:
    if not all(type(size) is int and 0 <= size < 1 << 63 for size in sizes):
        raise DamagedError("is damaged: a tensor has a size, stride or offset that is no count")


def _tensor(
    storage: Any, dtype: np.dtype, offset: Any, shape: Any, strides: Any
) -> StoredTensor | Refused:
    if not (isinstance(shape, tuple) and isinstance(strides, tuple)):
        raise DamagedError("is damaged: a tensor has no shape")
    _check_sizes(offset, *shape, *strides)
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise DamagedError(
            f"is damaged: a tensor has {len(shape)} dimensions and {len(strides)} strides"
        )
    abstract = Abstract(shape, dtype)
    reach = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if abstract.size and (offset + reach) * dtype.itemsize > storage.nbytes:
        raise DamagedError(
            f"is damaged: a tensor of shape {shape} reaches byte "
            f"{(offset + reach) * dtype.itemsize} of a storage of {storage.nbytes}"
        )
    if abstract.nbytes > max(len(storage.data), _MAX_EXPANDED):
        raise DamagedError(
            f"is damaged: a tensor of shape {shape} repeats {storage.nbytes} bytes to "
            f"{abstract.nbytes}"
        )
    start = storage.delta + offset * dtype.itemsize
    read = functools.partial(_read, storage, start, abstract, strides, reach)
    memory = (storage.key, start, shape, strides, str(dtype))
    return StoredTensor(shape, dtype, read, memory)


def _read(
    storage: Storage, start: int, abstract: Abstract, strides: tuple[int, ...], reach: int
) -> np.ndarray:
    dtype = abstract.dtype
    if not abstract.size:
        array = np.empty(abstract.shape, dtype)
        array.flags.writeable = False
        return array
    begin = (storage.whole or storage).begin + start
    raw = np.frombuffer(storage.data, np.uint8, reach * dtype.itemsize, begin)
    if begin % dtype.itemsize:
        raw = raw.copy()
    if _is_contiguous(abstract.shape, strides):
        array = raw.view(dtype).reshape(abstract.shape)
    else:
        # As unsigned integers, since copying floats may not keep the bits of a NaN.
        flat = raw.view(np.dtype(f"u{dtype.itemsize}"))
        steps = [step * dtype.itemsize for step in strides]
        array = np.lib.stride_tricks.as_strided(flat, abstract.shape, steps, writeable=False)
        array = np.ascontiguousarray(array).view(dtype)
    array.flags.writeable = False
    return array


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != step:
            return False
        step *= n
    return True


def _rebuild_tensor(
    machine: Machine,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = None,
    hooks: Any = None,
    metadata: Any = None,
) -> StoredTensor | Refused:
    if not isinstance(storage, Storage):
        raise TypeError("a tensor without a storage")
    if storage.dtype is None:
        return Refused(f"of dtype torch.{storage.kind.removesuffix('Storage').lower()}")
    if metadata:
        return Refused("a conjugate or negative view, which is kept as a flag")
    return _tensor(storage, storage.dtype, offset, size, stride)


def _rebuild_tensor_v3(
    machine: Machine,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> StoredTensor | Refused:
    if not isinstance(storage, Storage) or type(dtype) is not str:
        raise TypeError("a tensor without a storage or a dtype")
    known = UNTYPED.get(dtype)
    if known is None or metadata:
        return Refused(f"of dtype {dtype}")
    return _tensor(storage, known, offset, size, stride)


def _refuse(what: str) -> Callable[..., Refused]:
    return lambda machine, *args, **kwargs: Refused(what)


def _first(machine: Machine, value: Any, *rest: Any) -> Any:
    if not isinstance(value, (LazyTensor, Refused)):
        raise TypeError("a parameter without a tensor")
    return value


def _sequence(make: Callable[[Any], Any]) -> Callable[..., Any]:
    def handler(machine: Machine, items: Any = ()) -> Any:
        if not isinstance(items, (list, tuple, set, frozenset)):
            raise TypeError("a collection of what is none")
        items = machine.copied(items)
        return make(_keys(list(items)) if make in (set, frozenset) else items)

    return handler


def _size(machine: Machine, sizes: Any = ()) -> tuple[int, ...]:
    _check_sizes(*machine.copied(sizes))
    return tuple(sizes)


def _mapping(machine: Machine, *args: Any, **kwargs: Any) -> dict:
    """`dict`, `OrderedDict`, `Counter`; or `defaultdict`, whose first argument makes values."""
    items = args[-1] if args and not isinstance(args[-1], Stub) else None
    if not items:
        return dict(kwargs)
    machine.copied(items)
    if isinstance(items, dict):
        return dict(items)
    if not isinstance(items, (list, tuple)):
        raise TypeError("a dict of what has no pairs")
    flat = [part for key, value in items for part in (key, value)]
    return dict(_pairs(flat))


def _namespace(machine: Machine, **fields: Any) -> dict:
    def fill(state: Any) -> None:
        if not isinstance(state, dict):
            raise TypeError("a namespace whose fields are no dict")
        fields.update(machine.copied(state))

    return machine.unfinished(fields, fill)


def _bytearray(machine: Machine, value: Any = b"", encoding: str = "") -> bytearray:
    return bytearray(_encoded(machine, value, encoding))


def _encoded(machine: Machine, value: Any, encoding: Any = "utf-8") -> bytes:
    if isinstance(value, str) and encoding in ("latin1", "latin-1", "utf-8", "ascii"):
        return machine.copied(value).encode(encoding)
    if isinstance(value, (bytes, bytearray)):
        return bytes(machine.copied(value))
    raise TypeError("bytes made of what is no text")


def _complex(machine: Machine, real: Any = 0.0, imaginary: Any = 0.0) -> complex:
    if not all(type(part) in (int, float) for part in (real, imaginary)):
        raise TypeError("a complex number of what are no numbers")
    return complex(real, imaginary)


def _path(flavour: type[pathlib.PurePath]) -> Callable[..., str]:
    def handler(machine: Machine, *parts: Any) -> str:
        if not all(isinstance(part, str) for part in parts):
            raise TypeError("a path of what is no text")
        for part in parts:
            machine.copied(part)
        return str(flavour(*parts))

    return handler


def _name(machine: Machine, kind: Any, index: Any = None) -> str:
    """A device or a layout, as text."""
    if type(kind) is not str or type(index) not in (int, type(None)):
        raise TypeError("a device or layout without a name")
    return kind if index is None else f"{kind}:{index}"


def _reconstructor(machine: Machine, kind: Any, base: Any, state: Any = None) -> Any:
    """`copyreg._reconstructor`: how protocols 0 and 1 make objects."""
    made = machine.call(kind, ())
    if isinstance(made, Stub) and state is not None:
        made.args = (state,)
    return made


def _numpy_dtype(stub: Any) -> np.dtype:
    """Returns the dtype that the pickle of one describes."""
    if not isinstance(stub, Stub) or stub.name != "numpy.dtype" or not stub.args:
        raise TypeError("numpy data without a dtype")
    code, state = stub.args[0], stub.state
    if type(code) is not str or not _NUMPY_CODE.fullmatch(code):
        raise TypeError(f"numpy data of dtype {code!r:.40}, which is no number")
    if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|"):
        raise TypeError("a numpy dtype without a byte order")
    return np.dtype(code).newbyteorder(state[1])


def _numpy_scalar(machine: Machine, kind: Any, data: Any) -> Any:
    dtype = _numpy_dtype(kind)
    if not isinstance(data, bytes) or len(data) != dtype.itemsize:
        raise ValueError("a numpy number with too few or too many bytes")
    return np.frombuffer(data, dtype)[0].item()


def _numpy_filled(machine: Machine, data: Any, kind: Any, shape: Any, order: Any) -> StoredTensor:
    dtype = _numpy_dtype(kind)
    if not isinstance(data, (bytes, bytearray)):
        raise TypeError("a numpy array of objects")
    if not isinstance(shape, tuple) or order not in ("C", "F"):
        raise TypeError("a numpy array without a shape")
    _check_sizes(*shape)
    flat = np.frombuffer(bytes(machine.copied(data)), dtype)
    native = flat.astype(dtype.newbyteorder("="), copy=False)
    array = np.ascontiguousarray(native.reshape(shape, order=order)).reshape(shape)
    return StoredTensor(array.shape, array.dtype, lambda: array, object())


def _numpy_array(machine: Machine, *args: Any) -> StoredTensor:
    """`numpy.core.multiarray._reconstruct`: an empty array, which a BUILD completes."""
    tensor = StoredTensor((0,), np.dtype(np.uint8), lambda: np.empty(0, np.uint8), object())

    def build(state: Any) -> None:
        _, shape, dtype, fortran, data = state
        filled = _numpy_filled(machine, data, dtype, shape, "F" if fortran else "C")
        for name in ("shape", "dtype", "read"):
            # Frozen; but the pickle may have put it into a tuple before it was complete.
            object.__setattr__(tensor, name, getattr(filled, name))

    return machine.unfinished(tensor, build)


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    **dict.fromkeys(
        (
            "torch._tensor._rebuild_from_type_v2",
            "torch._tensor._rebuild_from_type",
            "torch.tensor._rebuild_from_type",
        ),
        lambda machine, function, kind, args, state: machine.call(function, args),
    ),
    "torch._utils._rebuild_qtensor": _refuse("quantised"),
    "torch._utils._rebuild_sparse_tensor": _refuse("sparse"),
    "torch._utils._rebuild_sparse_csr_tensor": _refuse("sparse"),
    "torch._utils._rebuild_nested_tensor": _refuse("nested"),
    "torch._utils._rebuild_meta_tensor_no_storage": _refuse("on the device meta, without data"),
    "torch._utils._rebuild_wrapper_subclass": _refuse("of a class of its own, without data"),
    "torch.Size": _size,
    "torch.device": _name,
    "torch.serialization._get_layout": _name,
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "collections.defaultdict": _mapping,
    "builtins.dict": _mapping,
    "collections.deque": lambda machine, items=(), maxlen=None: _sequence(list)(machine, items),
    "builtins.list": _sequence(list),
    "builtins.tuple": _sequence(tuple),
    "builtins.set": _sequence(set),
    "builtins.frozenset": _sequence(frozenset),
    "builtins.bytearray": _bytearray,
    "builtins.complex": _complex,
    "_codecs.encode": _encoded,
    "copyreg._reconstructor": _reconstructor,
    "copyreg.__newobj__": lambda machine, kind, *args: machine.call(kind, args),
    "copyreg.__newobj_ex__": Machine.call,
    "argparse.Namespace": _namespace,
    "types.SimpleNamespace": _namespace,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "numpy.core.multiarray._reconstruct": _numpy_array,
    "numpy._core.multiarray._reconstruct": _numpy_array,
    "numpy.core.numeric._frombuffer": _numpy_filled,
    "numpy._core.numeric._frombuffer": _numpy_filled,
    **{
        f"{module}.{name}": _path(flavour)
        for module in ("pathlib", "pathlib._local")
        for name, flavour in (
            ("Path", pathlib.PurePosixPath),
            ("PosixPath", pathlib.PurePosixPath),
            ("PurePosixPath", pathlib.PurePosixPath),
            ("WindowsPath", pathlib.PureWindowsPath),
            ("PureWindowsPath", pathlib.PureWindowsPath),
        )
    },
}
