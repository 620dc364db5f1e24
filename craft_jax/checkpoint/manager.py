"""The policy of checkpoints: one save at a time, tolerated failures, which one is restored.

The trainer asks for a save or a restore; `CheckpointStore` reads and writes.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from craft_jax.checkpoint import manifest
from craft_jax.checkpoint.manifest import DamagedError
from craft_jax.checkpoint.settings import CheckpointConfig
from craft_jax.checkpoint.store import CheckpointStore
from craft_jax.errors import StorageError
from craft_jax.parallel import sharding
from craft_jax.parallel.processes import ALONE, ProcessGroup
from craft_jax.training.callbacks import improves
from craft_jax.training.state import TrainState

logger = logging.getLogger(__name__)

_FAILURES_IN_A_ROW = 3


class Restored(NamedTuple):
    """A state on the devices, and the meta of its checkpoint."""

    state: TrainState
    meta: dict


class LoadedCheckpoint(NamedTuple):
    """A checkpoint in the host's memory.

    Attributes:
      arrays: a state, or parameters by path, in numpy arrays; None in all processes but the first.
      meta: its meta.
      is_state: whether `arrays` is a whole state.
    """

    arrays: Any
    meta: dict
    is_state: bool


class States(Protocol):
    """Makes states; a train step does."""

    abstract_state: TrainState

    def state_from_params(self, params: Mapping | None) -> TrainState:
        """Returns the state of a run that starts with given parameters."""


class CheckpointManager:
    """Writes the checkpoints of a run and restores them.

    Args:
      store: the checkpoints.
      config: the policy.
      contents: what each checkpoint holds beside the state: `meta` (to which the trainer adds its
        own), `config` and `tokenizer`, see `CheckpointStore.save`.
      read_meta: returns the meta of a step; raises ConfigError if its data is not that of the run.
      states: the train step.
      group: the processes of the run, which all call the same methods; the first reads and writes.
    """

    def __init__(
        self,
        store: CheckpointStore,
        config: CheckpointConfig,
        contents: Mapping[str, Any],
        read_meta: Callable[[int], dict],
        states: States,
        group: ProcessGroup = ALONE,
    ):
        self._store, self._config, self._contents = store, config, contents
        self._read_meta, self._states, self._group = read_meta, states, group
        self._failures = 0

    def save(self, state: TrainState, meta: dict, *, is_final: bool = False) -> None:
        """Writes a checkpoint: in the background, unless it is the last of the run.

        Raises:
          StorageError: the last checkpoint, or several in a row, could not be written.
        """
        with self._tolerance():
            self._store.wait()
        contents = {**self._contents, "meta": {**meta, **self._contents["meta"]}}
        if is_final:
            self._store.save(int(state.step), state, **contents)
            return
        with self._tolerance():
            self._store.save(int(state.step), state, **contents, background=self._config.background)

    def poll(self) -> None:
        """Reports a save that failed in the background.

        Raises:
          StorageError: it was one too many in a row.
        """
        with self._tolerance():
            self._store.poll()

    def close(self) -> None:
        """Waits for the save under way."""
        with self._tolerance():
            self._store.wait()

    @contextlib.contextmanager
    def _tolerance(self) -> Iterator[None]:
        """Logs failures as warnings, until there are too many in a row."""
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
          DamagedError: it is damaged.
        """
        with self._tolerance():
            self._store.wait()
        name, mode = self._config.best_metric, self._config.best_mode

        def load() -> LoadedCheckpoint | None:
            best, here = self._store.best_steps(), metrics.get(name)
            if not best or not improves(self._store.meta(best[0])["metrics"][name], here, mode):
                return None
            if wrong := self._store.wrong(best[0]):
                raise DamagedError(f"checkpoint step {best[0]}: {wrong}")
            return self._read(best[0])

        return self._restore(load)

    def _restore(self, load: Callable[[], LoadedCheckpoint | None]) -> Restored | None:
        """Restores in all processes what `load` returns in the first."""
        loaded = self._group.from_first(
            load,
            lambda loaded: loaded and [loaded.meta, loaded.is_state],
            lambda sent: sent and LoadedCheckpoint(None, *sent),
        )
        if loaded is None:
            return None
        if loaded.is_state:
            state = sharding.spread(loaded.arrays, self._states.abstract_state)
        else:
            state = self._states.state_from_params(loaded.arrays)
        return Restored(state, loaded.meta)

    def _read(self, step: int) -> LoadedCheckpoint:
        meta, abstract = self._read_meta(step), self._states.abstract_state
        if not self._store.has_optimizer(step):
            params = self._store.read_params(step, abstract.params)
            return LoadedCheckpoint(params, meta, is_state=False)
        return LoadedCheckpoint(self._store.read_state(step, abstract), meta, is_state=True)

    def restore_step(self, step: int) -> Restored:
        """Returns the checkpoint of a step.

        Raises:
          DamagedError: it cannot be read.
        """
        restored = self._restore(lambda: self._read(step))
        assert restored is not None
        return restored

    def restore(self, is_verified: bool = False, before: int | None = None) -> Restored | None:
        """Returns the newest intact checkpoint; None where there is none.

        Damaged ones are renamed, once an older one has been read.

        Args:
          is_verified: whether the files have just been verified.
          before: restore an earlier step than this one; later ones are set aside.

        Raises:
          StorageError: there are checkpoints, and none can be read.
          ConfigError: they are of another model.
        """
        with self._tolerance():
            self._store.wait()
        level = "none" if is_verified else self._config.verify

        def load() -> LoadedCheckpoint | None:
            loaded = read_latest(self._store, level, self._read, before)
            if loaded is not None and before is not None:
                self._store.set_aside(after=loaded.meta["step"])
            return loaded

        return self._restore(load)


def read_latest(
    store: CheckpointStore,
    level: manifest.Level,
    read: Callable[[int], Any],
    before: int | None = None,
) -> Any | None:
    """Reads the newest checkpoint that is intact, and renames damaged ones that are newer.

    Args:
      store: the checkpoints; no other process writes to them.
      level: how closely to verify, see `manifest.check`.
      read: reads a step; raises DamagedError if it cannot.
      before: consider only earlier steps than this one.

    Returns:
      The result of `read`; None where there is no checkpoint, and never was one.

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
            result = read(step)
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
        return result
    reasons = [f"step {step}: {reason}" for step, reason in sorted(bad.items(), reverse=True)]
    reasons += [f"{name}: found damaged earlier" for name in store.corrupt()]
    if not reasons or before is not None:
        return None
    raise StorageError(
        f"no checkpoint below {store.folder} can be read ({'; '.join(reasons)}); to begin again "
        "from step 0 add `config.checkpoint.resume=none`, or use another `run`"
    )
