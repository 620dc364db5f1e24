"""Reads the arrays of a craft_jax checkpoint leaf by leaf: no model, no mesh, no devices, no JAX.

Orbax writes its arrays as Zarr into an OCDBT database, both of them formats of TensorStore, and
lists them in `_METADATA`. TensorStore alone reads them here, in a tenth of the time that importing
Orbax takes.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from interop.errors import CorruptFileError, UncommittedCheckpointError
from interop.mapping.tensors import LazyTensor

_METADATA = "_METADATA"


def read_params(folder: Path) -> dict[str, LazyTensor]:
    """Opens every array of an Orbax folder; reads none.

    Args:
      folder: what Orbax calls an item: it holds `_METADATA`.

    Raises:
      UncommittedCheckpointError: Orbax did not finish it, or did not write it.
      CorruptFileError: it is damaged.
    """
    metadata = folder / _METADATA
    if not metadata.is_file():
        raise UncommittedCheckpointError(
            f"{folder} is no finished Orbax checkpoint: it has no {_METADATA}; use one that is"
        )
    try:
        described = json.loads(metadata.read_text(encoding="utf-8"))
        names = [_name(entry) for entry in described["tree_metadata"].values()]
        is_ocdbt = bool(described.get("use_ocdbt", (folder / "manifest.ocdbt").is_file()))
        driver = "zarr3" if described.get("use_zarr3") else "zarr"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{metadata} cannot be read: {error!r}") from error
    waiting = {name: _open(folder, name, driver, is_ocdbt) for name in names}
    return {name: _lazy(folder, name, store) for name, store in waiting.items()}


def _name(entry: dict[str, Any]) -> str:
    return ".".join(str(key["key"]) for key in entry["key_metadata"])


def _open(folder: Path, name: str, driver: str, is_ocdbt: bool) -> Any:
    base = f"file://{folder.absolute()}/"
    kvstore: Any = (
        {"driver": "ocdbt", "base": base, "path": f"{name}/"} if is_ocdbt else f"{base}{name}/"
    )
    return ts.open({"driver": driver, "kvstore": kvstore}, open=True, read=True, context=_CONTEXT)


# No cache: every chunk is read once.
_CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": 0}})


def _lazy(folder: Path, name: str, waiting: Any) -> LazyTensor:
    try:
        store = waiting.result()
    except Exception as error:  # TensorStore raises ValueError and others, by the damage.
        raise CorruptFileError(f"{folder}: {name} cannot be opened: {_short(error)}") from error
    dtype = np.dtype(store.dtype.numpy_dtype)
    return LazyTensor(tuple(store.shape), dtype, functools.partial(_read, folder, name, store))


def _read(folder: Path, name: str, store: Any) -> np.ndarray:
    try:
        return store.read().result()
    except Exception as error:
        raise CorruptFileError(f"{folder}: {name} cannot be read: {_short(error)}") from error


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else repr(error))[:300]
