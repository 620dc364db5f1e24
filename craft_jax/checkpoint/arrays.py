"""Named arrays in a folder, written and read by Orbax.

Takes and returns flat dicts of numpy arrays, with their checksums in memory. `store` imports this
module when it first needs it: importing Orbax takes half as long as importing JAX, and the first
step need not wait for it.
"""

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from craft_jax.checkpoint import manifest
from craft_jax.checkpoint.manifest import Leaf

# TensorStore keeps what it has not written yet in memory, up to one data file.
_IMPORTED_FILE_SIZE = 64 * 2**20


def write(
    folder: Path, arrays: Mapping[str, np.ndarray], *, is_imported: bool = False
) -> dict[str, Leaf]:
    """Writes arrays into a folder.

    Args:
      folder: where; it is made.
      arrays: by path.
      is_imported: whether they are views of mapped files: only one is in memory at a time, and a
        signal stops the write.

    Returns:
      Shape, dtype and checksum of each array, by path.
    """
    writer = _Writer(arrays, one_by_one=is_imported)
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, writer))
    size = _IMPORTED_FILE_SIZE if is_imported else None
    save = ocp.args.PyTreeSave(dict(arrays), ocdbt_target_data_file_size=size)
    with _quiet_absl(), _stopping(writer) if is_imported else contextlib.nullcontext():
        try:
            # Weights and moments hardly compress; trying is two fifths of what a save computes.
            with _checkpointer(
                ocp.PyTreeCheckpointHandler, type_handler_registry=registry, use_compression=False
            ) as checkpointer:
                checkpointer.save(folder, args=save)
        finally:
            if writer.failure:
                raise writer.failure
    return {name: writer.leaves[name] for name in arrays}


def read(folder: Path, shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Reads arrays from a folder, in the dtypes of `shapes`.

    Raises:
      Exception: they do not load; Orbax and TensorStore raise many kinds for damaged files.
    """
    arguments = ocp.args.PyTreeRestore(
        item=dict(shapes),
        restore_args={
            name: ocp.RestoreArgs(restore_type=np.ndarray, dtype=struct.dtype)
            for name, struct in shapes.items()
        },
    )
    with _quiet_absl(), _checkpointer(ocp.PyTreeCheckpointHandler) as checkpointer:
        return checkpointer.restore(folder, args=arguments)


def _checkpointer(handler: type, **options: Any) -> ocp.Checkpointer:
    """Returns a checkpointer of this process alone, which waits for no other one."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    return ocp.Checkpointer(
        handler(multiprocessing_options=alone, **options), multiprocessing_options=alone
    )


class _Writer(ocp.type_handlers.NumpyHandler):
    """Writes arrays with their checksums, and reports the first failure when all have ended.

    Orbax alone raises at once, so the remaining writes find its event loop closed and print errors.
    It also copies all arrays first, and its threads continue after a signal.

    Args:
      arrays: by path.
      one_by_one: keep only one in memory, and stop between two of them after a signal.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], one_by_one: bool) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self.leaves: dict[str, Leaf] = {}
        self.is_stopped = False
        self.failure: BaseException | None = None
        self._names = {id(array): name for name, array in arrays.items()}
        self._one_by_one = one_by_one
        self._turn: asyncio.Lock | None = None

    async def _open_and_write(self, value: np.ndarray, *args: Any, **kwargs: Any) -> None:
        if not self._one_by_one:
            await self._write(value, *args, **kwargs)
            return
        self._turn = self._turn or asyncio.Lock()
        async with self._turn:
            await self._write(value, *args, **kwargs)

    async def _write(self, value: np.ndarray, *args: Any, **kwargs: Any) -> None:
        if self.failure:
            return
        try:
            if self.is_stopped:
                raise InterruptedError("stopped by a signal")
            # TensorStore is slow on views whose rows are far apart, such as transposed ones.
            array = np.ascontiguousarray(value).reshape(value.shape)
            self.leaves[self._names[id(value)]] = manifest.leaf_of(array)
            await super()._open_and_write(array, *args, **kwargs)
        except Exception as error:
            self.failure = self.failure or error


@contextlib.contextmanager
def _stopping(handler: _Writer) -> Iterator[None]:
    """Stops a writer between two arrays on a signal, and raises the signal again afterwards."""
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
    """Silences tracebacks that Orbax logs for failures; the caller reports them."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        absl.setLevel(level)
