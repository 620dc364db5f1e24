"""What flows between files and rules: arrays that are described before they are read.

Everything is numpy; bfloat16 and float8 are `ml_dtypes`. Nothing here imports JAX or torch.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

# Names as in safetensors headers; the first column is also how messages call them.
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
    """An array that is read when it is asked for.

    Attributes:
      read: returns it; may be a read-only view of a mapped file.
    """

    read: Callable[[], np.ndarray] = dataclasses.field(compare=False, repr=False)


Tensors = Mapping[str, LazyTensor]


def lazy(array: Any) -> LazyTensor:
    """Wraps an array that is there already."""
    array = np.asarray(array)
    return LazyTensor(array.shape, array.dtype, lambda: array)


def bits(array: np.ndarray) -> np.ndarray:
    """Returns an array as unsigned integers, so that -0.0, NaN payloads and all else compare."""
    contiguous = np.ascontiguousarray(array)
    return contiguous.view(np.dtype(f"u{array.dtype.itemsize}")).reshape(array.shape)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have the same dtype, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(bits(a), bits(b))


def is_one(tensors: Tensors, name: str, other: str) -> bool:
    """Whether two names stand for one array: it is stored once, or `other` has its bits."""
    if other not in tensors:
        return True
    a, b = tensors[name], tensors[other]
    memory = getattr(a, "memory", None)
    if memory is not None and memory == getattr(b, "memory", None):
        return True
    return (a.shape, a.dtype) == (b.shape, b.dtype) and same_bits(a.read(), b.read())
