"""Looks at files without converting them: `inspect` reads headers, `diff` compares bit for bit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interop.commands import verify
from interop.errors import InteropError
from interop.files.weights import open_weights
from interop.mapping.spec import Spec
from interop.mapping.tensors import LazyTensor, Tensors
from interop.sources import source
from interop.sources.source import Options, Source
from interop.targets import registry
from interop.targets.base import Answer
from interop.targets.registry import TARGETS


def inspect(path: str | Path, options: Options | None = None) -> dict[str, Any]:
    """Says what is at a path: tensors, dtypes, prefixes, architecture; reads headers only.

    Args:
      path: a run, a folder or a file.
      options: how to read a foreign source.

    Returns:
      Plain JSON. `model` is None, and `problem` says why, where the tensors can be listed and the
      model cannot be understood.

    Raises:
      InteropError: the tensors cannot even be listed.
    """
    place = Path(path).expanduser()
    try:
        opened = source.open_source(place, options)
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
    """Returns the tensors of something that is no model known here, or says why there are none."""
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


def diff(a: Any, b: Any, options: Options | None = None) -> list[dict[str, Any]]:
    """Returns one row for each leaf that two models do not have alike, bit for bit.

    Any two forms can be compared: both are read as leaves of craft_jax.

    Args:
      a, b: runs, checkpoints, or anything else that `open_source` opens.
      options: how to read foreign sources.

    Returns:
      Plain JSON: `name`, `what` and, for values, `count`, `first`, `values`, `largest`.
    """
    first, second = (
        model if isinstance(model, Source) else source.open_source(model, options)
        for model in (a, b)
    )
    return verify.differences(first, second)


def spec_of(model: Any) -> Spec:
    """Returns the spec of a path, or the spec itself."""
    return model if isinstance(model, Spec) else source.open_source(model).spec


def targets_for(model: Any) -> list[Answer]:
    """Returns where a model can go: an answer for each target, the exact ones first.

    Args:
      model: a `ModelSpec`, or the path of a run or of any other source.
    """
    return registry.targets_for(spec_of(model))


def explain(model: Any, target: str) -> list[str]:
    """Returns what stands in the way of an exact export to a target; empty if nothing does.

    Args:
      model: a `ModelSpec`, or the path of a run or of any other source.
      target: its name.

    Raises:
      KeyError: there is no such target.
    """
    return list(TARGETS[target].answer(spec_of(model)).reasons)
