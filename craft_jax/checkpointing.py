"""Checkpoints: the whole state of a run at one step, in a folder that is complete or absent.

    {run}/checkpoints/{step}/params/       parameters by path (Orbax)
                             optimizer/    all other arrays of the state (Orbax)
                             meta.json     step, metrics, callback state, data fingerprint, versions
                             config.json   the whole config
                             tokenizer.json

A folder is written beside its place and renamed when it is whole. What flows in and out are flat
dicts of arrays; the trainer's state is flattened here.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from craft_jax import outputs
from craft_jax.errors import StorageError
from craft_jax.models.base import Params
from craft_jax.outputs import OPTIMIZER, PARAMS, Checkpoints

logger = logging.getLogger(__name__)

# TensorStore keeps what it has not written yet in memory, up to one data file.
_IMPORTED_FILE_SIZE = 64 * 2**20

_LEFTOVER = re.compile(r"\.\d+\.(tmp|trash)-\d+")


class CheckpointStore(Checkpoints):
    """The checkpoints of one run, with their arrays.

    Args:
      folder: where the step folders stand; made by the first save.
      keep_last: how many of the newest stay. The best by validation loss stays as well.
    """

    def __init__(self, folder: Path, keep_last: int = 2):
        super().__init__(folder)
        self._keep_last = keep_last

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
                checkpointer.save(partial / PARAMS, dict(state.params))
                checkpointer.wait_until_finished()
                checkpointer.save(partial / OPTIMIZER, _rest(state))
            outputs.write_beside_arrays(partial, step, meta, config, tokenizer)
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
        params = self._restore(step, PARAMS, dict(abstract.params))
        rest = self._restore(step, OPTIMIZER, _rest(abstract))
        return _join(abstract, params, rest)

    def restore_params(self, step: int, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
        """Reads the parameters alone, in the dtypes of `shapes`.

        An imported model may have been stored in other dtypes.

        Args:
          step: which.
          shapes: with shardings; onto the default device where there is none.

        Raises:
          StorageError: they cannot be read, or have other shapes.
        """
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = {
            name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=s.sharding or here)
            for name, s in shapes.items()
        }
        return self._restore(step, PARAMS, placed)

    def save_imported(
        self,
        step: int,
        params: Mapping[str, np.ndarray],
        *,
        meta: Mapping,
        config: Mapping,
        tokenizer: str | None,
    ) -> Path:
        """Writes a checkpoint of parameters alone, one array after the other.

        Arrays may be views of mapped files: no more than one of them is in memory at a time.

        Args:
          step: its number.
          params: by path, in the dtypes that are to be stored.
          meta, config, tokenizer: see `save`.

        Raises:
          StorageError: it could not be written.
        """
        place = self.folder / str(step)
        writer = _OneByOne()
        registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, writer))
        arrays = ocp.args.PyTreeSave(dict(params), ocdbt_target_data_file_size=_IMPORTED_FILE_SIZE)
        try:
            place.mkdir(parents=True)
            with _quiet_absl(), _stopping(writer):
                handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
                with ocp.Checkpointer(handler) as checkpointer:
                    checkpointer.save(place / PARAMS, args=arrays)
            outputs.write_beside_arrays(place, step, meta, config, tokenizer)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a full disk.
            raise StorageError(f"cannot write checkpoint {place}: {error}") from error
        return place

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

    def _prune(self) -> None:
        keep = {*self.steps()[-self._keep_last :], self.best()}
        for step in self.steps():
            if step not in keep:
                trash = self.folder / f".{step}.trash-{os.getpid()}"
                (self.folder / str(step)).rename(trash)
                shutil.rmtree(trash, ignore_errors=True)


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Writes arrays one after the other, until it is told to stop.

    Orbax alone holds a copy of all of them, and goes on in its threads when the program is told to
    end.
    """

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self.is_stopped = self._has_failed = False
        self._turn: asyncio.Lock | None = None

    async def _open_and_write(self, value: np.ndarray, *args: Any, **kwargs: Any) -> None:
        self._turn = self._turn or asyncio.Lock()
        await self._turn.acquire()
        try:
            if self._has_failed:
                return  # One failure is enough for Orbax, and a second is printed.
            if self.is_stopped:
                raise InterruptedError("told to stop")
            # TensorStore is slow on views whose rows are far apart, such as transposed ones.
            await super()._open_and_write(np.ascontiguousarray(value), *args, **kwargs)
        except BaseException:
            self._has_failed = True
            raise
        finally:
            with contextlib.suppress(RuntimeError):  # After a failure the event loop is gone.
                self._turn.release()


@contextlib.contextmanager
def _stopping(handler: _OneByOne) -> Iterator[None]:
    """Lets signals stop a handler between two arrays, and passes them on when it has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        handler.is_stopped = True

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        for number in seen[:1]:
            signal.raise_signal(number)


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """Keeps Orbax from printing tracebacks of failures that are reported in our own words."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        absl.setLevel(level)


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
