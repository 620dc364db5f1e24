"""Assigns the tensors of a Hugging Face folder to files of a limited size."""

import dataclasses
import re
import reprlib
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from interop.mapping.tensors import Abstract

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SIZE = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([kmgt]i?b|b|)", re.IGNORECASE)
_MAX_SIZE = 2**63 - 1
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file to write.

    Attributes:
      file: its name.
      names: its tensors.
    """

    file: str
    names: tuple[str, ...]


def plan_shards(tensors: Mapping[str, Abstract], max_shard_size: int) -> list[Shard]:
    """Assigns tensors to files in their order.

    Args:
      tensors: the tensors to write.
      max_shard_size: bytes of tensors that a file may have; a larger tensor is alone in one.

    Raises:
      ValueError: the limit is below one byte.
    """
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size={max_shard_size} must be >= 1")
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > max_shard_size:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    if len(groups) == 1:
        return [Shard(SINGLE, tuple(groups[0]))]
    return [
        Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(names))
        for i, names in enumerate(groups, 1)
    ]


def index_json(shards: Iterable[Shard], tensors: Mapping[str, Abstract]) -> dict[str, Any]:
    """Returns the content of `model.safetensors.index.json`."""
    home = {name: shard.file for shard in shards for name in shard.names}
    return {
        "metadata": {
            "total_parameters": sum(tensors[name].size for name in home),
            "total_size": sum(tensors[name].nbytes for name in home),
        },
        "weight_map": dict(sorted(home.items())),
    }


def parse_size(size: str | int) -> int:
    """Returns a number of bytes.

    Args:
      size: such as `5GB` (10^9 each), `1.5 GiB` (2^30 each), or `1000` (bytes).

    Raises:
      ValueError: it is not a whole number of bytes from 1 to 2^63 - 1.
    """
    problem = f"{_SHORT.repr(size)} is not a size; give bytes, or a size such as 500MB or 5GiB"
    if isinstance(size, bool) or not isinstance(size, (str, int)):
        raise ValueError(problem)
    found = _SIZE.fullmatch(str(size).strip()) if isinstance(size, str) else None
    if isinstance(size, str) and not found:
        raise ValueError(problem)
    value = Decimal(found[1]) * _unit(found[2].lower()) if found else Decimal(size)
    if value != int(value) or not 1 <= value <= _MAX_SIZE:
        raise ValueError(f"{_SHORT.repr(size)} is not a whole number of bytes from 1 to 2^63 - 1")
    return int(value)


def _unit(name: str) -> int:
    base = 1024 if name.endswith("ib") else 1000
    return base ** " kmgt".index(name[0]) if name not in ("", "b") else 1
