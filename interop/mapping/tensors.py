"""Lazy tensors: arrays with a known shape and dtype that are read later.

Everything is numpy; bfloat16 and float8 are `ml_dtypes`. Nothing here imports JAX or torch.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

# Names as in safetensors headers; messages use them too.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class Abstract:
    """The shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class LazyTensor(Abstract):
    """An array that is read on demand.

    Attributes:
      read: returns it; may be a read-only view of a mapped file.
      memory: equal for two tensors that are the same elements of one storage; None if unknown.
    """

    read: Callable[[], np.ndarray] = dataclasses.field(compare=False, repr=False)
    memory: Hashable = dataclasses.field(default=None, compare=False, repr=False)


Tensors = Mapping[str, LazyTensor]


def lazy(array: Any) -> LazyTensor:
    """Wraps an array in memory."""
    array = np.asarray(array)
    return LazyTensor(array.shape, array.dtype, lambda: array)


def bits(array: np.ndarray) -> np.ndarray:
    """Returns an array as unsigned integers, so that -0.0, NaN payloads and all else compare."""
    contiguous = np.ascontiguousarray(array)
    return contiguous.view(np.dtype(f"u{array.dtype.itemsize}")).reshape(array.shape)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Returns whether two arrays have the same dtype, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(bits(a), bits(b))


def is_one(tensors: Tensors, name: str, other: str) -> bool:
    """Returns whether two names are one array: stored once, or with the same bits."""
    if other not in tensors:
        return True
    a, b = tensors[name], tensors[other]
    if a.memory is not None and a.memory == b.memory:
        return True
    return (a.shape, a.dtype) == (b.shape, b.dtype) and same_bits(a.read(), b.read())
