"""Checkpoints: the whole state of a run at one step, in a folder that is complete or absent.

    {run}/checkpoints/{step}/params/       parameters by path (Orbax)
                             optimizer/    all other arrays of the state (Orbax)
                             meta.json     step, metrics, callback state, data fingerprint, versions
                             config.json   the whole config
                             tokenizer.json

A folder is written beside its place and renamed when it is whole. What flows in and out are flat
dicts of arrays; the trainer's state is flattened here.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from craft_jax import outputs
from craft_jax.errors import StorageError
from craft_jax.models.base import Params

logger = logging.getLogger(__name__)

_LEFTOVER = re.compile(r"\.\d+\.(tmp|trash)-\d+")
_META, _CONFIG, _TOKENIZER = "meta.json", "config.json", "tokenizer.json"


class CheckpointStore:
    """The checkpoints of one run.

    Args:
      folder: where the step folders stand; made by the first save.
      keep_last: how many of the newest stay. The best by validation loss stays as well.
    """

    def __init__(self, folder: Path, keep_last: int = 2):
        self.folder, self._keep_last = folder.absolute(), keep_last

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, in order."""
        if not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if p.name.isdecimal() and (p / _META).is_file()]
        return sorted(int(p.name) for p in found)

    def latest(self) -> int | None:
        """Returns the newest step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Returns the step with the lowest validation loss, or None where none was evaluated."""
        losses = {s: self.meta(s).get("metrics", {}).get("val_loss") for s in self.steps()}
        known = {s: loss for s, loss in losses.items() if loss is not None}
        return min(known, key=known.__getitem__, default=None)

    def meta(self, step: int) -> dict:
        """Returns what was stored beside the arrays."""
        return self._read_json(step, _META)

    def config(self, step: int) -> dict:
        """Returns the config of the run, as JSON."""
        return self._read_json(step, _CONFIG)

    def tokenizer_file(self, step: int) -> Path | None:
        """Returns the path of the tokenizer, or None if the run has none."""
        path = self.folder / str(step) / _TOKENIZER
        return path if path.is_file() else None

    def save(
        self, step: int, state: Any, *, meta: Mapping, config: Mapping, tokenizer: str | None
    ) -> Path:
        """Writes a checkpoint, then removes those that are no longer kept.

        Args:
          step: its number.
          state: a tree of arrays with a mapping `params`.
          meta: JSON to store beside it.
          config: the config as JSON.
          tokenizer: the text of `tokenizer.json`, or None.

        Raises:
          StorageError: it could not be written; older checkpoints are as they were.
        """
        place = self.folder / str(step)
        partial = self.folder / f".{step}.tmp-{os.getpid()}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(partial / "params", dict(state.params))
                checkpointer.wait_until_finished()
                checkpointer.save(partial / "optimizer", _rest(state))
            if tokenizer is not None:
                outputs.write_text(partial / _TOKENIZER, tokenizer)
            outputs.write_json(partial / _CONFIG, config)
            outputs.write_json(partial / _META, {"step": step, **meta})
            if place.exists():
                shutil.rmtree(place)
            partial.rename(place)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a full disk.
            safe = self.latest()
            still = f"; the checkpoint of step {safe} is whole" if safe is not None else ""
            raise StorageError(f"cannot write checkpoint {place}: {error}{still}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._prune()
        return place

    def remove_leftovers(self) -> None:
        """Removes what saves of processes that were killed left behind; to be called under lock."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if _LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)

    def restore_state(self, step: int, abstract: Any) -> Any:
        """Reads a whole state.

        Args:
          step: which.
          abstract: a tree of `jax.ShapeDtypeStruct` with shardings, as `state` was saved.

        Raises:
          StorageError: it cannot be read, or has other shapes.
        """
        params = self._restore(step, "params", dict(abstract.params))
        rest = self._restore(step, "optimizer", _rest(abstract))
        return _join(abstract, params, rest)

    def restore_params(self, step: int, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
        """Reads the parameters alone, onto the default device.

        Raises:
          StorageError: they cannot be read, or have other shapes.
        """
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return self._restore(
            step,
            "params",
            {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here) for k, s in shapes.items()},
        )

    def _restore(self, step: int, part: str, abstract: dict) -> dict:
        path = self.folder / str(step) / part
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                restored = checkpointer.restore(path, abstract)
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files.
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            others = ", ".join(str(other) for other in self.steps() if other != step)
            remedy = f"; move it away to go on from another of steps {others}" if others else ""
            raise StorageError(
                f"checkpoint {path} does not load: {reason[:200]}{remedy}"
            ) from error
        wrong = [
            f"{name} is {got.shape} {got.dtype}, not {want.shape} {want.dtype}"
            for name, want in abstract.items()
            for got in [restored[name]]
            if (got.shape, got.dtype) != (want.shape, want.dtype)
        ]
        if wrong:
            raise StorageError(f"checkpoint {path} is of another model: {'; '.join(wrong[:5])}")
        # Own the memory: the train step donates these buffers, and the reader may share them.
        return jax.tree.map(jnp.copy, restored)

    def _read_json(self, step: int, name: str) -> dict:
        path = self.folder / str(step) / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StorageError(f"checkpoint file {path} cannot be read: {error}") from error

    def _prune(self) -> None:
        keep = {*self.steps()[-self._keep_last :], self.best()}
        for step in self.steps():
            if step not in keep:
                trash = self.folder / f".{step}.trash-{os.getpid()}"
                (self.folder / str(step)).rename(trash)
                shutil.rmtree(trash, ignore_errors=True)


def _rest(state: Any) -> dict[str, Any]:
    """Returns everything but the parameters as a flat dict, by the path in the state."""
    leaves = jax.tree_util.tree_leaves_with_path(state.replace(params={}))
    return {_name(path): leaf for path, leaf in leaves}


def _join(abstract: Any, params: dict, rest: dict) -> Any:
    empty = abstract.replace(params={})
    filled = jax.tree_util.tree_map_with_path(lambda path, _: rest[_name(path)], empty)
    return filled.replace(params=params)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def digest(state: Any) -> str:
    """Returns the SHA-256 over each leaf's path, dtype, shape and bytes: equal is bit-equal."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(leaf)
        total.update(f"{_name(path)} {array.dtype} {array.shape}\0".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
