"""Checkpoints: the whole state of a run at one step, in a folder that is complete or absent.

    {run}/checkpoints/{step}/params/         parameters by path (Orbax)
                             average/        an average of them, where the optimizer keeps one
                             optimizer/      all other arrays of the state (Orbax)
                             meta.json       step, metrics, callback state, environment
                             config.json     the whole config
                             tokenizer.json
                             MANIFEST.json   checksums of all of it (`manifests`), written last

A folder is written beside its place, synced, and renamed when it is whole. What flows in and out
are flat dicts of arrays; the trainer's state is flattened here. Which folder is a checkpoint, which
stay and which are damaged is decided here and in `outputs`, never by Orbax.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib
import logging
import math
import os
import re
import shutil
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import jax
import numpy as np

from craft_jax.checkpoint import atomic, manifest
from craft_jax.checkpoint.listing import (
    AVERAGE,
    OPTIMIZER,
    PARAMS,
    Checkpoints,
    write_beside_arrays,
)
from craft_jax.checkpoint.manifest import DamagedError, Leaf
from craft_jax.errors import ConfigError, StorageError
from craft_jax.models.base import Params
from craft_jax.parallel import sharding
from craft_jax.runtime import fault_injection
from craft_jax.schema import setting

logger = logging.getLogger(__name__)

_LEFTOVER = re.compile(r"\.(\d+)\.(tmp|trash)-\d+")
_FULL = {
    errno.ENOSPC: "no space left on",
    errno.EDQUOT: "the quota is used up on",
    errno.EFBIG: "a file would be too large for",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How checkpoints are written, chosen and kept; how often and how many is in `training`."""

    resume: Literal["auto", "must", "none"] = setting(
        "auto",
        "auto: continue from the newest good checkpoint; must: an error where there is none; none: "
        "set those that are there aside and begin again",
        resumable=True,
    )
    verify: Literal["full", "fast", "none"] = setting(
        "full",
        "before a checkpoint is used: full reads every byte, fast the sizes of large files",
        resumable=True,
    )
    every_minutes: float = setting(
        0.0,
        "minutes between checkpoints, beside training.checkpoint_every; 0 for none",
        minimum=0,
        resumable=True,
    )
    best_metric: str = setting("val_loss", "the metric whose best evaluations stay", resumable=True)
    best_mode: Literal["min", "max"] = setting(
        "min", "whether lower or higher is better", resumable=True
    )
    keep_best: int = setting(1, "how many of the best stay", minimum=1, resumable=True)
    keep_multiples: int = setting(
        0,
        "checkpoints whose step is a multiple of this stay forever; 0 for none",
        minimum=0,
        resumable=True,
    )
    background: bool = setting(True, "write while training goes on", resumable=True)
    on_error: Literal["warn", "halt"] = setting(
        "warn",
        "when a checkpoint on the way cannot be written: warn goes on, and halts at the third "
        "failure in a row; the last checkpoint of a run always halts",
        resumable=True,
    )


class CheckpointStore(Checkpoints):
    """The checkpoints of one run, with their arrays.

    Args:
      folder: where the step folders stand; made by the first save.
      keep_last: how many of the newest stay.
      config: which others stay.

    Attributes:
      written: how many checkpoints this object has written.
    """

    def __init__(
        self, folder: Path, keep_last: int = 2, config: CheckpointConfig = CheckpointConfig()
    ):
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

        Args:
          step: its number.
          state: a tree of arrays with mappings `params` and `average`, the latter may be None; it
            is copied before this returns.
          meta: JSON to store beside it.
          config: the config as JSON.
          tokenizer: the text of `tokenizer.json`, or None.
          background: return at once; `poll` and `wait` tell how it went.

        Of several processes all call it, since each holds a part of the state; the first writes.

        Raises:
          StorageError: it, or the one before in the background, could not be written; older
            checkpoints are as they were.
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
        """Raises what went wrong in the background, if it has ended.

        Raises:
          StorageError: the checkpoint could not be written.
        """
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Waits for what is written in the background.

        Raises:
          StorageError: the checkpoint could not be written.
        """
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
        """Makes a folder that holds everything a checkpoint: whatever happens, whole or absent."""
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
        """Says what went wrong with a save, and what is still safe."""
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
        """Removes what saves of processes that were killed left behind; to be called under lock.

        Returns:
          The steps that were under way and are no checkpoints.
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
        """Renames a damaged checkpoint, so that it is looked at by people alone."""
        return self._rename(str(step), "corrupt")

    def set_aside(self, after: int | None = None) -> list[Path]:
        """Renames checkpoints, so that a run can go another way without losing them.

        Args:
          after: only those of later steps than this one; None for all, damaged ones included.
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
            if step not in keep and not self._is_pinned(step):
                # Renamed first: a folder that is half removed is no checkpoint any more.
                trash = self._aside(step, "trash")
                atomic.remove(trash)
                (self.folder / str(step)).rename(trash)
                fault_injection.point("ckpt.mid_gc")
                atomic.remove(trash)

    def best_steps(self) -> list[int]:
        """Returns the steps with the best evaluations, the best first."""
        config, found = self._config, {}
        for step in self.steps():
            value = self.meta(step).get("metrics", {}).get(config.best_metric)
            if value is not None and math.isfinite(value):
                found[step] = value if config.best_mode == "min" else -value
        return sorted(found, key=found.__getitem__)[: config.keep_best]

    # Reading.

    def pin(self, step: int) -> "Pin | None":
        """Keeps a trainer from removing a checkpoint, for as long as what this returns is there.

        Returns:
          None if the checkpoint is gone.
        """
        file = self.folder / str(step) / manifest.NAME
        try:
            made = Pin(file)
            if os.path.samestat(os.stat(file), os.fstat(made.handle)):
                return made
        except FileNotFoundError:
            pass
        return None

    def _is_pinned(self, step: int) -> bool:
        """Whether someone reads a checkpoint now; it is removed after a later save then."""
        try:
            with (self.folder / str(step) / manifest.NAME).open("rb") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def read_state(self, step: int, abstract: Any) -> Any:
        """Reads a whole state, and compares it with the checksums taken before it was written.

        Args:
          step: which.
          abstract: a tree of `jax.ShapeDtypeStruct`, as `state` was saved.

        Returns:
          The state in numpy arrays.

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
        """Reads the parameters alone onto devices; see `read_params`.

        Args:
          step: which.
          shapes: with shardings; onto the default device where there is none.
          last: see `read_params`.
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
        """Reads the parameters alone, in the dtypes of `shapes`; their average where there is one.

        An imported model may have been stored in other dtypes.

        Args:
          step: which.
          shapes: by path.
          last: those of the last update, even where there is an average of them.

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
        """Checks that a checkpoint holds the arrays that are wanted: Orbax would cast silently."""
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
        """Writes a checkpoint of parameters alone, one array after the other.

        Arrays may be views of mapped files: no more than one of them is in memory at a time.

        Args:
          step: its number.
          params: by path, in the dtypes that are to be stored.
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
    """Writes one part of a checkpoint; returns what was in memory, by `part/path`."""
    leaves = _array_files().write(folder / part, arrays, is_imported=is_imported)
    return {f"{part}/{name}": leaf for name, leaf in leaves.items()}


def _array_files() -> ModuleType:
    # With Orbax, which takes a while to import.
    return importlib.import_module("craft_jax.checkpoint.arrays")


def _full_disk(error: BaseException | None) -> str | None:
    """Returns what a failure to write means, if the disk or a limit is the cause of it."""
    while error is not None:
        for number, words in _FULL.items():
            # TensorStore has only the text of the system's error.
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return words
        error = error.__cause__ or error.__context__
    return None


class Pin:
    """A checkpoint that is being read: while this object is there, no trainer removes it."""

    def __init__(self, file: Path):
        self.handle = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self.handle)
        with contextlib.suppress(OSError):  # Not every network disk has locks.
            fcntl.flock(self.handle, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _split(state: Any) -> dict[str, dict[str, Any]]:
    """Returns the leaves of a state in flat dicts: by their path, for the rest in the state."""
    parts = {PARAMS: dict(state.params)}
    if state.average is not None:
        parts[AVERAGE] = dict(state.average)
    leaves = jax.tree_util.tree_leaves_with_path(state.replace(params={}, average=None))
    return parts | {OPTIMIZER: {_name(path): leaf for path, leaf in leaves}}


def _join(abstract: Any, parts: Mapping[str, dict[str, Any]]) -> Any:
    """Returns the state that `_split` took apart."""
    empty, rest = abstract.replace(params={}, average=None), parts[OPTIMIZER]
    filled = jax.tree_util.tree_map_with_path(lambda path, _: rest[_name(path)], empty)
    return filled.replace(params=parts[PARAMS], average=parts.get(AVERAGE))


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
