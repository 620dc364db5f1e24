"""Conversions of a model's leaves before any table: dtypes, padding rows, non-finite values.

They apply on request only and are recorded; after them, every table is exact again.
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from craft_jax.errors import UsageError
from interop.errors import DtypeError, listed
from interop.mapping.tensors import DTYPES, LazyTensor, Tensors, bits

_NAMES = {
    "fp32": "F32",
    "float32": "F32",
    "bf16": "BF16",
    "bfloat16": "BF16",
    "fp16": "F16",
    "float16": "F16",
    "fp64": "F64",
    "float64": "F64",
}
_KEPT = ("F32", "BF16", "F16")
_SLAB = 1 << 20


def named(dtype: str) -> np.dtype | None:
    """Returns the dtype that an option names; None for `keep`.

    Raises:
      UsageError: it names none.
    """
    if dtype == "keep":
        return None
    if dtype not in _NAMES:
        raise UsageError(f"`dtype={dtype}` is not one of keep, fp32, bf16, fp16, fp64")
    return DTYPES[_NAMES[dtype]]


def check_dtypes(tensors: Mapping[str, Any], dtype: np.dtype | None) -> None:
    """Checks that every tensor has a dtype that a model can have.

    Raises:
      DtypeError: it has not; float64 is accepted only with an explicit dtype.
    """
    kept = {DTYPES[name] for name in _KEPT}
    for name, tensor in tensors.items():
        if tensor.dtype in kept or (tensor.dtype == np.float64 and dtype is not None):
            continue
        if tensor.dtype == np.float64:
            raise DtypeError(
                f"{name} is float64, which training here does not use; `dtype=fp32` rounds it, "
                "`dtype=fp64` keeps it"
            )
        raise DtypeError(
            f"{name} is {tensor.dtype.name}, a quantised or counting dtype; convert the weights to "
            "float32, bfloat16 or float16 first"
        )


def as_dtype(tensors: Tensors, dtype: np.dtype | None) -> dict[str, LazyTensor]:
    """Returns the tensors in another dtype, rounded to nearest when they are read; None keeps."""
    if dtype is None:
        return dict(tensors)

    def read(name: str) -> np.ndarray:
        return _rounded(name, tensors[name].read(), dtype)

    return {
        name: tensor
        if tensor.dtype == dtype
        else LazyTensor(tensor.shape, dtype, functools.partial(read, name))
        for name, tensor in tensors.items()
    }


def _rounded(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(dtype)
    overflown = count_nonfinite(result) - count_nonfinite(array)
    if overflown:
        raise DtypeError(
            f"{name}: {overflown} values are too large for {dtype.name}; use bf16, or keep"
        )
    return result


def trimmed(tensors: Tensors, names: tuple[str, ...], rows: int) -> dict[str, LazyTensor]:
    """Returns the tensors with only the first rows of some of them."""

    def read(name: str) -> np.ndarray:
        return tensors[name].read()[:rows]

    return {
        name: LazyTensor((rows, *tensor.shape[1:]), tensor.dtype, functools.partial(read, name))
        if name in names
        else tensor
        for name, tensor in tensors.items()
    }


def count_nonfinite(array: np.ndarray) -> int:
    """Counts NaN and infinite values by their exponent bits, in bounded memory."""
    masks = {
        "float64": 0x7FF0 << 48,
        "float32": 0x7F80 << 16,
        "bfloat16": 0x7F80,
        "float16": 0x7C00,
    }
    mask = masks.get(array.dtype.name)
    if mask is None or not array.size:
        return 0
    unsigned = np.dtype(f"u{array.dtype.itemsize}")
    mask = unsigned.type(mask)
    flat = array.reshape(-1) if array.flags.c_contiguous else bits(array).reshape(-1)
    return sum(
        int(np.count_nonzero((flat[i : i + _SLAB].view(unsigned) & mask) == mask))
        for i in range(0, flat.size, _SLAB)
    )


def nonfinite_notes(counts: Mapping[str, int], strict: bool) -> list[str]:
    """Returns a warning about tensors that hold NaN or infinities; empty if none does.

    Raises:
      DtypeError: one does, and `strict` is set.
    """
    if not counts:
        return []
    text = f"{sum(counts.values())} values are NaN or infinite, in {listed(counts)}"
    if strict:
        raise DtypeError(f"{text}; refused because of `strict_finite`")
    return [f"warning: {text}"]


def digest(array: np.ndarray) -> str:
    """Returns the SHA-256 of an array's bytes in C order, little-endian, as hexadecimal."""
    contiguous = np.ascontiguousarray(array)
    return hashlib.sha256(contiguous.reshape(-1).view(np.uint8)).hexdigest()


def digest_text(text: str) -> str:
    """Returns the SHA-256 of a text's UTF-8, as hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
