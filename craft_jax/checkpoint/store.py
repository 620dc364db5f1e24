"""Checkpoints: the whole state of a run at one step, in a folder that is complete or absent.

    {run}/checkpoints/{step}/params/         parameters by path (Orbax)
                             average/        an average of them, where the optimizer keeps one
                             optimizer/      all other arrays of the state (Orbax)
                             meta.json       step, metrics, callback state, environment
                             config.json     the whole config
                             tokenizer.json
                             MANIFEST.json   checksums of all of it (`manifest`), written last

A folder is written under a temporary name, synced, and renamed when it is complete. The trainer's
state is flattened to dicts of arrays by path. This module and `listing` decide which folders are
checkpoints, which are damaged and which are kept; Orbax only stores the arrays.
"""

import contextlib
import errno
import hashlib
import importlib
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from craft_jax.checkpoint import atomic, lock, manifest
from craft_jax.checkpoint.listing import (
    AVERAGE,
    OPTIMIZER,
    PARAMS,
    Checkpoints,
    write_beside_arrays,
)
from craft_jax.checkpoint.lock import Pin
from craft_jax.checkpoint.manifest import DamagedError, Leaf
from craft_jax.checkpoint.settings import DEFAULTS, CheckpointConfig
from craft_jax.errors import ConfigError, StorageError
from craft_jax.models.base import Params
from craft_jax.parallel import sharding
from craft_jax.runtime import fault_injection

logger = logging.getLogger(__name__)

_LEFTOVER = re.compile(r"\.(\d+)\.(tmp|trash)-\d+")
_FULL = {
    errno.ENOSPC: "no space left on",
    errno.EDQUOT: "the quota is used up on",
    errno.EFBIG: "a file would be too large for",
}


class CheckpointStore(Checkpoints):
    """The checkpoints of one run, with their arrays.

    Args:
      folder: of the step folders; made by the first save.
      keep_last: how many of the newest are kept.
      config: which others are kept.

    Attributes:
      written: how many checkpoints this object has written.
    """

    def __init__(self, folder: Path, keep_last: int = 2, config: CheckpointConfig = DEFAULTS):
        super().__init__(folder)
        self._keep_last, self._config = keep_last, config
        self._pool: ThreadPoolExecutor | None = None
        self._under_way: Future[None] | None = None
        self.written = 0

    # Writing.

    def save(
        self,
        step: int,
        state: Any,
        *,
        meta: Mapping,
        config: Mapping,
        tokenizer: str | None,
        background: bool = False,
    ) -> None:
        """Writes a checkpoint, then removes those that are no longer kept.

        All processes call it, since each holds a part of the state; the first one writes.

        Args:
          step: its number.
          state: a tree of arrays with mappings `params` and `average`, which may be None; it is
            copied before this returns.
          meta, config: JSON to store beside it.
          tokenizer: the text of `tokenizer.json`, or None.
          background: return at once; `poll` and `wait` raise the error of a failure.

        Raises:
          StorageError: this checkpoint, or the previous one in the background, could not be
            written; older checkpoints are unchanged.
        """
        self.wait()
        fault_injection.point("ckpt.begin")
        # Copies: the next train step overwrites the buffers.
        parts = {
            part: {name: sharding.to_host(leaf) for name, leaf in leaves.items()}
            for part, leaves in _split(state).items()
        }
        if jax.process_index() != 0:
            return

        def write() -> None:
            self._write(step, parts, meta, config, tokenizer)

        if not background:
            write()
            return
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way = self._pool.submit(write)

    def poll(self) -> None:
        """Raises the StorageError of a save in the background that has failed."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save in the background; raises its StorageError."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def _write(
        self,
        step: int,
        parts: Mapping[str, Mapping[str, np.ndarray]],
        meta: Mapping,
        config: Mapping,
        tokenizer: str | None,
    ) -> None:
        partial = self._aside(step, "tmp")
        num_bytes = sum(array.nbytes for part in parts.values() for array in part.values())
        start = time.monotonic()
        try:
            atomic.remove(partial)
            partial.mkdir(parents=True)
            if num_bytes > shutil.disk_usage(partial).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            leaves: dict[str, Leaf] = {}
            for part, arrays in parts.items():
                leaves |= _write_part(partial, part, arrays)
                fault_injection.point("ckpt.mid_write")
            write_beside_arrays(partial, step, meta, config, tokenizer)
            self._commit(partial, step, leaves)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a full disk.
            atomic.remove(partial)
            raise self._failed(step, error, num_bytes) from error
        logger.info(
            "step %d: checkpoint saved (%.1f MB in %.1f s)",
            step,
            num_bytes / 1e6,
            time.monotonic() - start,
        )
        self.written += 1
        self._prune()

    def _commit(self, partial: Path, step: int, leaves: Mapping[str, Leaf]) -> None:
        """Turns a complete folder into a checkpoint, atomically."""
        manifest.write(partial, step, leaves)
        atomic.sync_tree(partial)
        fault_injection.point("ckpt.before_commit")
        place, old = self.folder / str(step), self._aside(step, "trash")
        atomic.remove(old)
        if place.exists() and step not in self.steps():
            self.mark_corrupt(step)
        atomic.put_in_place(partial, place, old)
        fault_injection.point("ckpt.after_commit")
        atomic.remove(old)

    def _failed(self, step: int, error: Exception, num_bytes: int) -> StorageError:
        """Returns the error of a failed save, with the newest checkpoint that is safe."""
        reason = _full_disk(error)
        if reason is not None:
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(self.folder).free
                reason += (
                    f" {self.folder} (need ~{num_bytes / 1e6:,.0f} MB, {free / 1e6:,.0f} MB free)"
                )
        else:
            lines = str(error).strip().splitlines()
            reason = lines[0][:300] if lines else repr(error)
        safe = self.latest()
        still = "no earlier one is safe" if safe is None else f"still safe at step {safe}"
        return StorageError(f"checkpoint at step {step} failed: {reason}; {still}")

    def _aside(self, step: int, what: str) -> Path:
        return self.folder / f".{step}.{what}-{os.getpid()}"

    def remove_leftovers(self) -> list[int]:
        """Removes unfinished saves of killed processes, and returns their steps.

        The caller holds the lock of the run.
        """
        found = set()
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if leftover := _LEFTOVER.fullmatch(path.name):
                    atomic.remove(path)
                    if leftover.group(2) == "tmp":
                        found.add(int(leftover.group(1)))
        return sorted(found - set(self.steps()))

    def mark_corrupt(self, step: int) -> Path:
        """Renames a damaged checkpoint, so that it is kept but never loaded."""
        return self._rename(str(step), "corrupt")

    def set_aside(self, after: int | None = None) -> list[Path]:
        """Renames checkpoints, so that a run can continue from an earlier step without losing them.

        Args:
          after: rename later steps than this one; None for all, damaged ones included.
        """
        if after is not None:
            return [self._rename(str(step), "aside") for step in self.steps() if step > after]
        names = [*map(str, (*self.steps(), *self.damaged())), *self.corrupt()]
        return [self._rename(name, "aside") for name in names]

    def _rename(self, name: str, word: str) -> Path:
        step = name.partition(".")[0]
        names = [f"{step}.{word}", *(f"{step}.{word}-{n}" for n in range(2, 10_000))]
        place = next(p for p in (self.folder / n for n in names) if not os.path.lexists(p))
        (self.folder / name).rename(place)
        return place

    def _prune(self) -> None:
        steps = self.steps()
        keep = {*steps[-self._keep_last :], *self.best_steps()}
        if every := self._config.keep_multiples:
            keep |= {step for step in steps if step % every == 0}
        for step in steps:
            if step not in keep and not lock.is_pinned(self.folder / str(step) / manifest.NAME):
                # Renamed first: a folder that is half removed is no checkpoint any more.
                trash = self._aside(step, "trash")
                atomic.remove(trash)
                (self.folder / str(step)).rename(trash)
                fault_injection.point("ckpt.mid_gc")
                atomic.remove(trash)

    def best_steps(self) -> list[int]:
        """Returns the steps with the best evaluations that are kept, the best first."""
        ranked = self.ranked(self._config.best_metric, self._config.best_mode)
        return [step for step, _ in ranked[: self._config.keep_best]]

    # Reading.

    def pin(self, step: int) -> Pin | None:
        """Keeps trainers from removing a checkpoint while the pin exists; None if it is gone."""
        return lock.pin(self.folder / str(step) / manifest.NAME)

    def read_state(self, step: int, abstract: Any) -> Any:
        """Returns a whole state in numpy arrays, checked against the checksums of the arrays saved.

        Args:
          step: of the checkpoint.
          abstract: the structure of the saved state, with `jax.ShapeDtypeStruct` leaves.

        Raises:
          DamagedError: it cannot be read, or has other bits.
          ConfigError: it is the state of another model or optimizer.
        """
        wanted = _split(abstract)
        self._check_leaves(step, wanted)
        return _join(abstract, {part: self._read(step, part, wanted[part]) for part in wanted})

    def restore_params(
        self, step: int, shapes: Mapping[str, jax.ShapeDtypeStruct], *, last: bool = False
    ) -> Params:
        """Returns the parameters on devices, by the shardings of `shapes`; see `read_params`.

        A shape without a sharding goes to the default device.
        """
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = {
            name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=s.sharding or here)
            for name, s in shapes.items()
        }
        return sharding.spread(self.read_params(step, placed, last=last), placed)

    def read_params(
        self, step: int, shapes: Mapping[str, jax.ShapeDtypeStruct], *, last: bool = False
    ) -> dict[str, np.ndarray]:
        """Returns the parameters, or their average where there is one, in the dtypes of `shapes`.

        Args:
          step: of the checkpoint.
          shapes: by path; an imported model may be stored in other dtypes.
          last: return the parameters of the last update, even where there is an average.

        Raises:
          DamagedError: they cannot be read.
          ConfigError: they are those of another model.
        """
        part = self.params_part(step, last=last)
        self._check_leaves(step, {part: shapes}, any_dtype=True)
        return self._read(step, part, shapes)

    def _check_leaves(
        self, step: int, wanted: Mapping[str, Mapping[str, Any]], any_dtype: bool = False
    ) -> None:
        """Checks names, shapes and dtypes of the stored arrays; Orbax would cast silently."""
        stored = {
            name: leaf
            for name, leaf in manifest.read(self.folder / str(step)).leaves.items()
            if name.partition("/")[0] in wanted
        }
        expected = {
            f"{part}/{name}": struct
            for part, structs in wanted.items()
            for name, struct in structs.items()
        }
        wrong = [f"{name} is not in the model" for name in sorted(stored.keys() - expected.keys())]
        for name, struct in expected.items():
            leaf = stored.get(name)
            if leaf is None:
                wrong.append(f"{name} is missing")
            elif leaf.shape != struct.shape or not (any_dtype or leaf.dtype == str(struct.dtype)):
                wrong.append(
                    f"{name} is {list(leaf.shape)} {leaf.dtype}, not {list(struct.shape)} "
                    f"{struct.dtype}"
                )
        if wrong:
            more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ConfigError(
                f"checkpoint {self.folder / str(step)} is of another model or optimizer: "
                f"{'; '.join(wrong[:5])}{more}"
            )

    def _read(self, step: int, part: str, shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
        path = self.folder / str(step) / part
        leaves = manifest.read(self.folder / str(step)).leaves
        try:
            restored = _array_files().read(path, shapes)
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files.
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise DamagedError(f"{part} does not load: {reason[:200]}") from error
        for name, array in restored.items():
            leaf = leaves[f"{part}/{name}"]
            if str(array.dtype) == leaf.dtype and manifest.array_crc(array) != leaf.crc32:
                raise DamagedError(f"{part}/{name}: crc32 mismatch")
        return restored

    # Imported models.

    def save_imported(
        self,
        step: int,
        params: Mapping[str, np.ndarray],
        *,
        meta: Mapping,
        config: Mapping,
        tokenizer: str | None,
    ) -> Path:
        """Writes a checkpoint of parameters alone, with one array at a time in memory.

        Args:
          step: its number.
          params: by path, in the dtypes to store; views of mapped files, for instance.
          meta, config, tokenizer: see `save`.

        Raises:
          StorageError: it could not be written.
        """
        place, partial = self.folder / str(step), self._aside(step, "tmp")
        try:
            partial.mkdir(parents=True)
            leaves = _write_part(partial, PARAMS, params, is_imported=True)
            write_beside_arrays(partial, step, meta, config, tokenizer)
            self._commit(partial, step, leaves)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a full disk.
            raise StorageError(f"cannot write checkpoint {place}: {error}") from error
        return place


def _write_part(
    folder: Path, part: str, arrays: Mapping[str, np.ndarray], *, is_imported: bool = False
) -> dict[str, Leaf]:
    """Writes one part of a checkpoint; returns its leaves by `part/path`."""
    leaves = _array_files().write(folder / part, arrays, is_imported=is_imported)
    return {f"{part}/{name}": leaf for name, leaf in leaves.items()}


def _array_files() -> ModuleType:
    # Imports Orbax, which takes a while.
    return importlib.import_module("craft_jax.checkpoint.arrays")


def _full_disk(error: BaseException | None) -> str | None:
    """Returns words for a failure to write that a full disk or a limit has caused."""
    while error is not None:
        for number, words in _FULL.items():
            # TensorStore has only the text of the system's error.
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return words
        error = error.__cause__ or error.__context__
    return None


def _split(state: Any) -> dict[str, dict[str, Any]]:
    """Returns the leaves of a state by path, in one dict for each part of a checkpoint."""
    parts = {PARAMS: dict(state.params)}
    if state.average is not None:
        parts[AVERAGE] = dict(state.average)
    leaves = jax.tree_util.tree_leaves_with_path(state.replace(params={}, average=None))
    return parts | {OPTIMIZER: {_name(path): leaf for path, leaf in leaves}}


def _join(abstract: Any, parts: Mapping[str, dict[str, Any]]) -> Any:
    """Inverts `_split`."""
    empty, rest = abstract.replace(params={}, average=None), parts[OPTIMIZER]
    filled = jax.tree_util.tree_map_with_path(lambda path, _: rest[_name(path)], empty)
    return filled.replace(params=parts[PARAMS], average=parts.get(AVERAGE))


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def digest(state: Any) -> str:
    """Returns the SHA-256 of the path, dtype, shape and bytes of each leaf."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(leaf)
        total.update(f"{_name(path)} {array.dtype} {array.shape}\0".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
