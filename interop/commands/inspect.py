"""inspect: describes a file, folder or run from its headers."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interop.commands import Result, add_models
from interop.commands.reading import add_reading, reading_options
from interop.errors import InteropError
from interop.files.weights import open_weights
from interop.mapping.tensors import LazyTensor, Tensors
from interop.sources import opening
from interop.sources.source import Options, Source


def inspect(path: str | Path, options: Options | None = None) -> dict[str, Any]:
    """Describes a path: tensors, dtypes, prefixes, architecture; reads headers only.

    Args:
      path: a run, a folder or a file.
      options: how to read a foreign source.

    Returns:
      Plain JSON. If the tensors can be listed but the model cannot be read, `model` is None and
      `problem` is the reason.

    Raises:
      InteropError: the tensors cannot even be listed.
    """
    place = Path(path).expanduser()
    try:
        opened = opening.open_source(place, options)
    except InteropError as error:
        tensors, notes = _listed(place, options or Options(), error)
        return {
            "path": str(place),
            "kind": None,
            "problem": str(error),
            "notes": list(notes),
            "model": None,
            **_described(tensors),
        }
    return {
        "path": str(place),
        "kind": opened.kind,
        "problem": None,
        "notes": list(opened.notes),
        "model": opened.spec.model_config(),
        "step": opened.step,
        "tokenizer": opened.tokenizer is not None,
        "images": opened.images.to_json() if opened.images else None,
        "exported_by": _exported(opened),
        **_described(opened.tensors or opened.leaves),
    }


def _listed(place: Path, options: Options, error: InteropError) -> tuple[Tensors, tuple[str, ...]]:
    """Returns the tensors of an unknown model; raises `error` if there are none."""
    try:
        weights = open_weights(place, options.allow_globals)
    except InteropError:
        raise error from None
    tensors = dict(weights.tensors) or dict(_leaves(weights.container))
    if not tensors:
        raise error
    return tensors, weights.notes


def _leaves(value: Any, path: str = "") -> list[tuple[str, LazyTensor]]:
    """Returns every tensor in nested data, by its dotted path."""
    if isinstance(value, LazyTensor):
        return [(path, value)]
    items = value.items() if isinstance(value, Mapping) else ()
    return [found for key, v in items for found in _leaves(v, f"{path}.{key}".lstrip("."))]


def _described(tensors: Tensors) -> dict[str, Any]:
    return {
        "parameters": sum(tensor.size for tensor in tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "dtypes": sorted({tensor.dtype.name for tensor in tensors.values()}),
        "tensors": {
            name: {"dtype": tensor.dtype.name, "shape": list(tensor.shape)}
            for name, tensor in tensors.items()
        },
    }


def _exported(opened: Source) -> dict[str, Any] | None:
    if not opened.manifest:
        return None
    names = ("source", "target", "exact", "approximations", "dtype", "model_sha256")
    return {name: opened.manifest.get(name) for name in names}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add_models(parser, "path")
    add_reading(parser)


def run(args: argparse.Namespace) -> Result:
    """Runs the command."""
    found = inspect(args.path, reading_options(args))
    lines = [
        f"{found['path']}: {found['kind'] or 'no model that interop knows'}, "
        f"{found['parameters']:,} parameters, {found['bytes']:,} bytes, "
        f"{', '.join(found['dtypes'])}"
    ]
    if found["problem"]:
        lines.append(f"problem: {found['problem']}")
    if found["model"]:
        lines.append("  ".join(f"{name}={value}" for name, value in found["model"].items()))
    for name, tensor in found["tensors"].items():
        lines.append(f"  {name}  {tensor['dtype']} {tensor['shape']}")
    return Result(found, lines, tuple(found["notes"]))
