"""Conversion between models of craft_jax in memory and sources. Needs JAX."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from craft_jax import config as configs
from craft_jax.errors import UsageError
from craft_jax.models import base
from craft_jax.models.base import Model, ModelDef
from interop.mapping.spec import Spec, read_spec
from interop.mapping.tensors import LazyTensor, Tensors
from interop.sources.source import CRAFT, Source

Inputs = Mapping[str, np.ndarray]
"""`tokens` (B, T) and, for an encoder-decoder, `source` (B, S) and `source_mask` (bool); for a flow
`x` (B, H, W, C), `t` and `labels` (B,).
"""


def source_of(model: Any) -> Source:
    """Returns a model in memory as a source.

    Raises:
      UsageError: it is not a model of craft_jax.
      NotRepresentableError: interop does not know its kind.
    """
    if not isinstance(model, Model):
        raise UsageError(f"{type(model).__name__} is not a path, a run or a model of craft_jax")
    leaves = {
        name: LazyTensor(leaf.shape, np.dtype(leaf.dtype), functools.partial(_fetch, leaf))
        for name, leaf in base.split(model).items()
    }
    return Source(
        path=Path("<model>"),
        kind=CRAFT,
        spec=spec_of(model.config),
        leaves=leaves,
        tokenizer=None,
    )


def _fetch(leaf: jax.Array) -> np.ndarray:
    return np.asarray(jax.device_get(leaf))


def spec_of(config: Any) -> Spec:
    """Returns the spec of a model's config dataclass, such as `GPTConfig`, or the spec itself.

    Raises:
      NotRepresentableError: see `ModelSpec.from_model_config`.
    """
    if isinstance(config, Spec):
        return config
    return read_spec(dataclasses.asdict(config), {})


def definition(spec: Spec) -> ModelDef:
    """Returns craft_jax's model of a spec, without parameters."""
    cls = configs.model_class(spec.name)
    return base.define(cls, cls.Config(**spec.model_config()))


def model_of(spec: Spec, leaves: Tensors) -> Model:
    """Returns craft_jax's model of a spec with these parameters, in their own dtypes."""
    params = {name: jax.numpy.asarray(leaf.read()) for name, leaf in leaves.items()}
    return definition(spec).merge(params)


class Reference:
    """A model of craft_jax that computes in float64 on the CPU, whatever dtype its leaves have.

    Args:
      spec, leaves: the model.
    """

    def __init__(self, spec: Spec, leaves: Tensors):
        self._spec, self._definition = spec, definition(spec)
        with _float64():
            self._params = {
                name: jax.numpy.asarray(leaf.read().astype(np.float64))
                for name, leaf in leaves.items()
            }
            self._forward = jax.jit(
                lambda params, inputs: self._apply(self._definition.merge(params), inputs)
            )

    def logits(self, inputs: Inputs) -> np.ndarray:
        """Returns float64 logits_BTV; of a flow, velocities v_BHWC."""
        with _float64():
            return np.asarray(self._forward(self._params, inputs))

    def greedy(self, prompt: list[int], count: int, inputs: Inputs) -> list[int]:
        """Returns the greedy continuation for the first source, within the model's context."""
        tokens = list(prompt)
        width = min(self._spec.max_seq_len, len(prompt) + count)
        first = {name: array[:1] for name, array in inputs.items()}
        while len(tokens) < width:
            padded = np.zeros((1, width), np.int32)
            padded[0, : len(tokens)] = tokens
            logits_BTV = self.logits(first | {"tokens": padded})
            tokens.append(int(np.argmax(logits_BTV[0, len(tokens) - 1])))
        return tokens[len(prompt) :]

    def states(self, inputs: Inputs, paths: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Returns the float64 outputs of the submodules at some paths."""
        with _float64():
            model = self._definition.merge(self._params)
            arrays = {name: jax.numpy.asarray(array) for name, array in inputs.items()}
            return _observed(model, lambda: self._apply(model, arrays), paths)

    def images(self, inputs: Inputs, num_steps: int) -> np.ndarray:
        """Returns the images of a flow for the noise `x` (B, H, W, C) and `labels` (B,)."""

        def generate(params: Any, inputs: Any) -> jax.Array:
            model = self._definition.merge(params)
            return model.generate(inputs["labels"], noise_BHWC=inputs["x"], num_steps=num_steps)

        with _float64():
            return np.asarray(jax.jit(generate)(self._params, dict(inputs)))

    @staticmethod
    def _apply(model: Model, inputs: Mapping[str, Any]) -> jax.Array:
        if "x" in inputs:
            return model(inputs["x"], inputs["t"], inputs["labels"])
        source = {
            name: inputs[key]
            for name, key in (("source_BS", "source"), ("source_mask_BS", "source_mask"))
            if key in inputs
        }
        return model(inputs["tokens"], **source)[0]


class _float64:  # noqa: N801
    """A context in which JAX computes in 64 bits on the CPU."""

    def __enter__(self):
        self._contexts = (jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]))
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: Any):
        for context in reversed(self._contexts):
            context.__exit__(*error)


def _observed(
    model: Model, run: Callable[[], Any], paths: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Runs a model eagerly and keeps the first array that each named submodule returns."""
    modules = {path: functools.reduce(_child, path.split("."), model) for path in paths}
    by_id = {id(module): path for path, module in modules.items()}
    seen: dict[str, np.ndarray] = {}
    originals = {cls: cls.__call__ for cls in {type(module) for module in modules.values()}}

    def watched(original: Callable) -> Callable:
        def call(self, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            if id(self) in by_id:
                first = result[0] if isinstance(result, tuple) else result
                seen[by_id[id(self)]] = np.asarray(first)
            return result

        return call

    try:
        for cls, original in originals.items():
            cls.__call__ = watched(original)
        run()
    finally:
        for cls, original in originals.items():
            cls.__call__ = original
    return seen


def _child(module: Any, name: str) -> Any:
    return module[int(name)] if name.isdecimal() else getattr(module, name)


def settings_of(model: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the whole config, as JSON, of a run that was imported and never trained."""
    return configs.from_values(
        {"model": model, "data": data}, origin="the imported model", check_files=False
    ).to_json()
