"""Files of PyTorch and pickles, made by hand, and what is said of bad ones."""

import builtins
import functools
import io
import operator
import os
import pickle
import subprocess
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from interop.errors import CorruptFileError, UnsafePickleError
from interop.files.torch_writer import Placeholder, TorchFileWriter
from interop.files.torchfile import read_torch_file
from interop.mapping.tensors import Abstract

MAGIC = 0x1950A86A20F9469CFC6C
TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
BOTH = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


class Config:
    """A user's class, of a module that a reader does not have."""

    def __init__(self, **fields):
        self.__dict__.update(fields)


Config.__module__ = "gone.away"


class Evil:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def archive(path: Path, pickled: bytes, records: dict[str, bytes] | None = None) -> Path:
    """Writes a zip checkpoint by hand."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        for name, data in (records or {}).items():
            file.writestr(f"archive/{name}", data)
    return path


def legacy(path: Path, value: object, protocol: int = 2) -> Path:
    """Writes a legacy checkpoint by hand."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = (MAGIC, 1001, system, value, [])
    path.write_bytes(b"".join(pickle.dumps(part, protocol) for part in parts))
    return path


def tensor_pickle(
    kind: str = "FloatStorage",
    numel: int = 6,
    offset: object = 0,
    size: object = (2, 3),
    stride: object = (3, 1),
) -> bytes:
    """Returns the pickle of one tensor, with any numbers."""

    def plain(value: object) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(("
        + plain("storage")
        + f"ctorch\n{kind}\n".encode()
        + plain("0")
        + plain("cpu")
        + plain(numel)
        + b"tQ"
        + plain(offset)
        + plain(size)
        + plain(stride)
        + b"\x89NtR."
    )


def abstracts(value: dict) -> dict:
    return {k: Placeholder(k, Abstract(v.shape, v.dtype)) for k, v in value.items()}


def write(path: Path, value: dict[str, np.ndarray], **options: object) -> Path:
    with TorchFileWriter(path, abstracts(value), **options) as writer:
        for key in writer.keys:
            writer.write(key, value[key])
    return path


def some_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "wte.weight": rng.standard_normal((5, 4), np.float32),
        "bias": rng.standard_normal(3).astype(ml_dtypes.bfloat16),
        "steps": np.arange(7),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 3), np.float16),
    }


def odd_bits(dtype: np.dtype, shape: tuple[int, ...] = (6, 64)) -> np.ndarray:
    """Returns every kind of bit pattern: NaN payloads, infinities, -0.0, subnormals."""
    rng = np.random.default_rng(1)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    size = int(np.prod(shape)) * dtype.itemsize
    return rng.integers(0, 256, size, np.uint8).view(dtype).reshape(shape)


def refused(path: Path) -> CorruptFileError:
    """Returns the error, after checking that it names the file on one line."""
    with pytest.raises(CorruptFileError) as caught:
        read_torch_file(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 65
    return caught.value


def unsafe(path: Path, name: str, marker: Path) -> None:
    """Checks that a file is refused for a name, and that nothing was run."""
    with pytest.raises(UnsafePickleError) as caught:
        read_torch_file(path)
    message = str(caught.value)
    assert caught.value.exit_code == 77
    assert caught.value.details["name"] == name
    assert message.startswith(str(path))
    assert f"allow_globals={name}" in message
    assert "nothing was run" in message
    assert "\n" not in message
    assert not marker.exists()


def calls(marker: Path) -> dict[str, tuple[object, str]]:
    """Returns what a pickle can try, each with the name that must be refused."""
    touch = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    return {
        "system": (Evil(os.system, touch), "posix.system"),
        "eval": (Evil(builtins.eval, code), "builtins.eval"),
        "exec": (Evil(builtins.exec, code), "builtins.exec"),
        "import": (Evil(builtins.__import__, "antigravity"), "builtins.__import__"),
        "getattr": (Evil(builtins.getattr, "x", "upper"), "builtins.getattr"),
        "open": (Evil(builtins.open, str(marker), "w"), f"{io.open.__module__}.open"),
        "popen": (Evil(subprocess.Popen, ["touch", str(marker)]), "subprocess.Popen"),
        "output": (Evil(subprocess.getoutput, touch), "subprocess.getoutput"),
        "partial": (Evil(functools.partial, os.system, touch), "functools.partial"),
        "attrgetter": (Evil(operator.attrgetter, "system"), "operator.attrgetter"),
        "loads": (Evil(pickle.loads, pickle.dumps(Evil(os.system, touch))), "_pickle.loads"),
    }
