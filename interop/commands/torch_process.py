"""Runs the PyTorch side of a comparison in a process of its own."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from craft_jax.errors import UsageError
from interop.errors import InteropError, MissingDependencyError
from interop.sources.source import Source
from interop.targets.base import FILES
from interop.targets.registry import TARGETS

_WORKER = Path(__file__).parents[1] / "pytorch" / "worker.py"


def can_run(model: Source) -> bool:
    """Returns whether the packages that running a model needs are installed."""
    needed = ["torch"] + (["transformers"] if TARGETS[model.kind].container == "hf" else [])
    return all(importlib.util.find_spec(name) is not None for name in needed)


def ask(
    model: Source, request: dict[str, Any], inputs: dict[str, np.ndarray] | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Runs the torch side of a model in a process of its own.

    Raises:
      MissingDependencyError: torch or transformers is not installed.
      InteropError: it failed; says how.
    """
    target = TARGETS[model.kind]
    if not can_run(model):
        what = "torch and transformers" if target.container == "hf" else "torch"
        raise MissingDependencyError(
            f"running {model.path} needs {what}: pip install 'craft_jax[torch,hf]'"
        )
    if target.container not in FILES and not model.path.is_dir():
        raise UsageError(
            f"{model.path} is a file without a config, which PyTorch cannot run; import it, export "
            "it to a folder, and verify that"
        )
    request = request | {
        "container": target.container,
        "target": target.name,
        "path": str(model.path.absolute()),
        "model": dataclasses.asdict(model.spec),
        "names": {name: model.original.get(name, name) for name in _weights(model)},
    }
    with tempfile.TemporaryDirectory(prefix="interop_") as folder:
        place = Path(folder)
        (place / "request.json").write_text(json.dumps(request), encoding="utf-8")
        np.savez(place / "inputs.npz", **(inputs or {}))
        if problem := run_worker(place):
            raise InteropError(f"PyTorch cannot run {model.path}: {problem[:500]}")
        answer = json.loads((place / "answer.json").read_text(encoding="utf-8"))
        with np.load(place / "arrays.npz") as arrays:
            return answer, dict(arrays)


def run_worker(folder: Path) -> str | None:
    """Answers the request in a folder, in a process of its own; returns what went wrong, or None.

    A process may run out of memory, or meet an instruction that the CPU does not have.
    """
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(_WORKER), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if not done.returncode:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _weights(model: Source) -> list[str]:
    """Returns the names of the tensors that PyTorch's module loads: all but constants."""
    assert model.tensors is not None and model.rules is not None
    constants = {buffer.name for buffer in model.rules.buffers}
    return [name for name in model.tensors if name not in constants]
