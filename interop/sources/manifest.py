"""The manifest of an export, and its effect on reading the model back."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from interop.errors import (
    CorruptFileError,
    ShapeMismatchError,
    UnknownArchitectureError,
    listed,
)
from interop.files import hugging_face
from interop.files.torchfile import read_record
from interop.mapping.spec import Spec
from interop.mapping.tensors import Tensors
from interop.sources.source import Options
from interop.targets.registry import Target

MANIFEST = "interop_manifest.json"


def manifest_in(folder: Path) -> dict[str, Any] | None:
    """Returns the manifest that an export put into a folder, or None."""
    file = folder / MANIFEST
    return _checked_manifest(hugging_face.read_json(file), file) if file.is_file() else None


def manifest_of(file: Path) -> dict[str, Any] | None:
    """Returns the manifest that an export put into a file of PyTorch, or None."""
    record = read_record(file, MANIFEST)
    if record is None:
        return None
    try:
        value = json.loads(record)
    except ValueError as error:
        raise CorruptFileError(f"{file}: its {MANIFEST} is no JSON: {error}") from error
    return _checked_manifest(value if isinstance(value, dict) else {}, file)


def _checked_manifest(value: dict[str, Any], file: Path) -> dict[str, Any]:
    kinds = {"source": dict, "synthetic": list, "canonical": dict, "dtype": str, "spec": dict}
    is_sound = all(isinstance(value.get(name), kind) for name, kind in kinds.items())
    if not is_sound or not isinstance(value["source"].get("step"), int):
        raise CorruptFileError(f"{file} is no manifest of an export; remove it")
    return value


_REMOVABLE = ("bias", "norm_bias", "final_norm_bias", "cross_attention")
"""Attributes whose tensors a target may demand although the model lacks them."""


def as_recorded(spec: Spec, manifest: Mapping[str, Any] | None) -> Spec:
    """Returns a spec in the family that an export recorded, if that family can express it."""
    name = (manifest or {}).get("spec", {}).get("name")
    try:
        return dataclasses.replace(spec, name=name) if isinstance(name, str) else spec
    except UnknownArchitectureError:
        return spec


def without_synthetic(
    spec: Spec,
    target: Target,
    tensors: Tensors,
    manifest: Mapping[str, Any] | None,
    options: Options,
    notes: list[str],
) -> tuple[Spec, Tensors]:
    """Removes zeros that an export added, and with `drop_zero_bias` all biases that are zero."""
    record = options.recorded or manifest or {}
    recorded, drop = tuple(record.get("synthetic", ())), options.drop_zero_bias
    if not spec.is_of_tokens or target.mapping(spec).synthetic:
        return spec, tensors  # The config has it already, and the table checks them.
    for simpler in _simpler_specs(spec, record if recorded else {}, drop):
        synthetic = target.mapping(simpler).synthetic
        if not synthetic or (not drop and set(synthetic) != set(recorded)):
            continue
        used = [name for name in synthetic if name in tensors and np.any(tensors[name].read())]
        if not used:
            notes.append(f"biases: all {len(synthetic)} are zeros, read as no biases")
            return simpler, tensors
        if not drop:
            notes.append(
                f"biases: {len(used)} of those that were made up as zeros are zero no more"
            )
            return spec, tensors
    if drop and spec.bias:
        synthetic = target.mapping(dataclasses.replace(spec, **_NO_BIAS)).synthetic
        used = [name for name in synthetic if name in tensors and np.any(tensors[name].read())]
        if used:
            raise ShapeMismatchError(
                f"`drop_zero_bias`: {len(used)} biases are not zero: {listed(used)}; leave it out"
            )
    return spec, tensors


_NO_BIAS = {"bias": False, "norm_bias": False, "final_norm_bias": False}


def _simpler_specs(spec: Spec, record: Mapping[str, Any], drop: bool) -> Iterator[Spec]:
    """Yields specs with fewer tensors: that of the manifest, or else those without biases."""
    candidates: list[dict[str, Any]] = []
    if recorded := record.get("spec"):
        # Manifests from before layer norms had a setting of their own have `bias` alone.
        candidates.append({name: recorded.get(name) for name in _REMOVABLE if name in recorded})
        candidates[0].setdefault("norm_bias", None)
        candidates[0].setdefault("final_norm_bias", None)
    if drop and spec.bias:
        candidates += [_NO_BIAS, {"norm_bias": False, "final_norm_bias": False}]
    for changes in candidates:
        with contextlib.suppress(UnknownArchitectureError):
            yield dataclasses.replace(spec, **changes)
