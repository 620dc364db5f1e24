"""Turns objects of other libraries in a pickle into plain data: OmegaConf, argparse, OrderedDict.

Stubs flow in, dicts and lists flow out. A stub that is none of these stays as it is.
"""

from collections.abc import Mapping
from typing import Any

from interop.files.pickles import Stub

_MAX_DEPTH = 64


def plain(value: Any, depth: int = 0) -> Any:
    """Returns nested data without the objects that only wrap it.

    Interpolations of OmegaConf (`${a.b}`) stay the texts that they are, and what is missing is
    None.
    """
    if depth > _MAX_DEPTH:
        return None
    if isinstance(value, Mapping):
        return {key: plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item, depth + 1) for item in value]
    if not isinstance(value, Stub):
        return value
    fields = value.fields
    if value.name.startswith("omegaconf."):
        inner = fields.get("_content", fields.get("_val"))
        return None if inner == "???" else plain(inner, depth + 1)
    if value.name == "argparse.Namespace":
        return plain(fields, depth + 1)
    return value
