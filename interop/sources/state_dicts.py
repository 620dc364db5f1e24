"""Models and state dicts in memory: `from_pretrained`, `to_state_dict`, `from_state_dict`."""

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from craft_jax.errors import UsageError
from craft_jax.models.base import Model
from interop.commands.plan import as_source
from interop.mapping import dtypes
from interop.mapping.keys import cleaned
from interop.mapping.shapes import leaves
from interop.mapping.tensors import LazyTensor, Tensors, lazy
from interop.sources import live
from interop.sources.opening import open_source
from interop.sources.source import Options, Source
from interop.targets.base import Allowed
from interop.targets.registry import TARGETS, Target


def from_pretrained(
    path: str | Path, *, source: str = "auto", dtype: str = "keep", **options: Any
) -> Model:
    """Returns a model of craft_jax with the weights of any source.

    Args:
      path: anything that `open_source` opens.
      source: `auto`, or the name of a target.
      dtype: keep, fp32, bf16 or fp16; with keep, leaves may have several.
      **options: see `Options`.

    Raises:
      UsageError, InteropError: it cannot be read.
    """
    opened = open_source(path, Options(kind=source, **options))
    wanted = dtypes.named(dtype)
    dtypes.check_dtypes(opened.leaves, wanted)
    return live.model_of(opened.spec, dtypes.as_dtype(opened.leaves, wanted))


class StateDict(Mapping[str, Any]):
    """The tensors of a target by name, each computed on access."""

    def __init__(self, tensors: Tensors, convert: Any):
        self.abstract: Tensors = tensors
        self._convert = convert

    def __getitem__(self, name: str) -> Any:
        return self._convert(self.abstract[name].read())

    def __iter__(self) -> Iterator[str]:
        return iter(self.abstract)

    def __len__(self) -> int:
        return len(self.abstract)


def to_state_dict(
    model: Any,
    target: str,
    *,
    as_: Literal["numpy", "torch"] = "numpy",
    allow_approx: Any = None,
) -> StateDict:
    """Returns a model's tensors by the names, and in the layout, of a target.

    Args:
      model: a path, a `craft_jax.runs.Run`, or a model of craft_jax with its parameters.
      target: the name of a target.
      as_: arrays of numpy (bfloat16 by `ml_dtypes`), or tensors of torch that own their memory.
      allow_approx: see `plan`.

    Raises:
      UsageError, InteropError: the target cannot hold it.
    """
    opened = as_source(model)
    if not isinstance(opened, Source):
        opened = open_source(opened)
    chosen = _target(target)
    reading = chosen.fit(opened.spec, Allowed.of(allow_approx))
    tensors = chosen.mapping(reading.spec).forward(opened.leaves)
    if as_ == "torch":
        return StateDict(tensors, importlib.import_module("interop.pytorch.tensors").to_torch)
    if as_ != "numpy":
        raise UsageError(f"as_={as_!r} is not 'numpy' or 'torch'")
    return StateDict(tensors, np.ascontiguousarray)


def from_state_dict(state_dict: Mapping[str, Any], spec: Any, source: str) -> dict[str, np.ndarray]:
    """Returns the parameters of craft_jax, by path, of a state dict in memory.

    Args:
      state_dict: arrays of numpy or JAX, or tensors of torch, by the names of a target.
      spec: a `ModelSpec`, or a model's config such as `GPTConfig`.
      source: the name of the target whose names these are.

    Raises:
      UsageError, InteropError: names, shapes or values do not match the model.
    """
    chosen, known = _target(source), live.spec_of(spec)
    given = {name: _as_lazy(value) for name, value in state_dict.items()}
    anchors = [(chosen.anchor, "")]
    tensors = cleaned(given, anchors).tensors
    found = chosen.mapping(known).inverse(tensors, leaves(known))
    return {name: np.ascontiguousarray(leaf.read()) for name, leaf in found.items()}


def _as_lazy(value: Any) -> LazyTensor:
    if type(value).__module__.partition(".")[0] == "torch":
        value = importlib.import_module("interop.pytorch.tensors").to_numpy(value)
    return lazy(value)


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise UsageError(f"{name!r} is not a target; there are {', '.join(TARGETS)}")
    return TARGETS[name]
