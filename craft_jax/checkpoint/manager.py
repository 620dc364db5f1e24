"""When checkpoints are written and chosen, and what is done when that fails.

The trainer asks for a save or a restore; `CheckpointStore` does it. What stands between is policy:
one save at a time in the background, failures on the way that do not end a run at once, and the
way back to the newest checkpoint that is as it was written.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from craft_jax.checkpoint import manifest
from craft_jax.checkpoint.manifest import DamagedError
from craft_jax.checkpoint.store import CheckpointConfig, CheckpointStore
from craft_jax.errors import StorageError
from craft_jax.parallel.processes import ALONE, ProcessGroup
from craft_jax.training.callbacks import improves
from craft_jax.training.state import TrainState

logger = logging.getLogger(__name__)

_FAILURES_IN_A_ROW = 3

Restored = tuple[TrainState, dict]


class Found(NamedTuple):
    """A checkpoint that was read.

    Attributes:
      arrays: a state, or parameters by path, in numpy arrays; None in all processes but the first.
      meta: its meta.
      is_whole: whether it is a state.
    """

    arrays: Any
    meta: dict
    is_whole: bool


def _told(found: Found | None) -> list | None:
    return None if found is None else [found.meta, found.is_whole]


def _heard(told: list | None) -> Found | None:
    return None if told is None else Found(None, *told)


class Saver:
    """Writes a run's checkpoints and finds the one to go on from.

    Args:
      store: the checkpoints.
      config: the policy.
      complete: adds to the trainer's meta what the run knows; returns the arguments of
        `CheckpointStore.save` but for step and state.
      read: reads a step; raises DamagedError where it cannot be read.
      place: puts on the devices what was read.
      group: the processes of the run, which all call the same methods; the first reads and writes.
    """

    def __init__(
        self,
        store: CheckpointStore,
        config: CheckpointConfig,
        complete: Callable[[dict], Mapping[str, Any]],
        read: Callable[[int], Found],
        place: Callable[[Found], TrainState],
        group: ProcessGroup = ALONE,
    ):
        self._store, self._config = store, config
        self._complete, self._read, self._place = complete, read, place
        self._group = group
        self._failures = 0

    def save(self, state: TrainState, meta: dict, *, is_final: bool = False) -> None:
        """Writes a checkpoint; in the background unless it is the last thing that is done.

        Raises:
          StorageError: the last checkpoint, or several in a row, could not be written.
        """
        with self._tolerance():
            self._store.wait()
        arguments = self._complete(meta)
        if is_final:
            self._store.save(int(state.step), state, **arguments)
            return
        with self._tolerance():
            self._store.save(
                int(state.step), state, **arguments, background=self._config.background
            )

    def poll(self) -> None:
        """Learns of a save that failed in the background.

        Raises:
          StorageError: it was one too many.
        """
        with self._tolerance():
            self._store.poll()

    def close(self) -> None:
        """Waits for what is under way."""
        with self._tolerance():
            self._store.wait()

    @contextlib.contextmanager
    def _tolerance(self) -> Iterator[None]:
        """Turns failures into warnings, up to a number of them in a row."""
        written = self._store.written
        try:
            yield
            if self._store.written > written:
                self._failures = 0
        except StorageError as error:
            self._failures += 1
            if self._config.on_error == "halt" or self._failures >= _FAILURES_IN_A_ROW:
                raise
            logger.warning("%s; training goes on", error)

    def restore_best(self, metrics: Mapping[str, float]) -> Restored | None:
        """Returns the best checkpoint by the config's metric; None where none is better than this.

        Args:
          metrics: of the state as it is now.

        Raises:
          DamagedError: it is not as it was written.
        """
        with self._tolerance():
            self._store.wait()
        name, mode = self._config.best_metric, self._config.best_mode

        def find() -> Found | None:
            best, here = self._store.best_steps(), metrics.get(name)
            if not best or not improves(self._store.meta(best[0])["metrics"][name], here, mode):
                return None
            if wrong := self._store.wrong(best[0]):
                raise DamagedError(f"checkpoint step {best[0]}: {wrong}")
            return self._read(best[0])

        return self._restored(find)

    def _restored(self, find: Callable[[], Found | None]) -> Restored | None:
        """Restores what `find` finds in the first process, in all of them."""
        found = self._group.from_first(find, _told, _heard)
        return None if found is None else (self._place(found), found.meta)

    def restore(self, is_checked: bool = False, before: int | None = None) -> Restored | None:
        """Returns the newest checkpoint that is as it was written; None where there is none.

        Damaged ones are renamed, once an older one has been read.

        Args:
          is_checked: whether every file has just been read and found to be as it was.
          before: restore an earlier step than this one; later ones are set aside.

        Raises:
          StorageError: there are checkpoints, and none can be read.
          ConfigError: they are of another model.
        """
        with self._tolerance():
            self._store.wait()
        level = "none" if is_checked else self._config.verify

        def find() -> Found | None:
            found = go_back(self._store, level, self._read, before)
            if found is not None and before is not None:
                self._store.set_aside(after=found.meta["step"])
            return found

        return self._restored(find)


def go_back(
    store: CheckpointStore,
    level: manifest.Level,
    read: Callable[[int], Any],
    before: int | None = None,
) -> Any | None:
    """Reads the newest checkpoint that can be read, and sets the damaged ones before it aside.

    Args:
      store: the checkpoints; no other process writes to them.
      level: how closely to look, see `manifests.check`.
      read: reads what is wanted of a step; raises DamagedError where it cannot.
      before: look at earlier steps than this one only.

    Returns:
      What `read` returned; None where there is no checkpoint, and there never was one.

    Raises:
      StorageError: there are checkpoints, and none can be read.
    """
    bad: dict[int, str] = {}
    while True:
        step, worse = store.newest_good(level, below=min(bad, default=before))
        bad |= worse
        if step is None:
            break
        try:
            found = read(step)
        except DamagedError as error:
            bad[step] = str(error)
            continue
        for damaged, reason in bad.items():
            place = store.mark_corrupt(damaged)
            logger.warning(
                "checkpoint step %d is damaged (%s); falling back to step %d; it stays as %s",
                damaged,
                reason,
                step,
                place.name,
            )
        return found
    reasons = [f"step {step}: {reason}" for step, reason in sorted(bad.items(), reverse=True)]
    reasons += [f"{name}: found damaged earlier" for name in store.corrupt()]
    if not reasons or before is not None:
        return None
    raise StorageError(
        f"no checkpoint below {store.folder} can be read ({'; '.join(reasons)}); to begin again "
        "from step 0 add --config.checkpoint.resume=none, or use another --run"
    )
