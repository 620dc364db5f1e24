"""Several processes that train one model, each with its own devices.

Process 0 owns the run's folder: the lock, the checkpoints, the logs. The others only compute. A
collective hangs if a peer has died, so decisions and failures are exchanged before each collective,
through JAX's coordination service and with time limits. A signal to one process is exchanged inside
the train step (`SharedStop`), so that all processes stop at the same step.
"""

import contextlib
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, final

import jax
import jax.numpy as jnp
import numpy as np

# The state of `jax.distributed` has no public names.
from jax._src import distributed
from jax._src.clusters import ClusterEnv
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from craft_jax.errors import (
    INTERRUPTED,
    PREEMPTED,
    CraftError,
    LostPeerError,
    StoppedError,
    UsageError,
    exit_code_of,
)
from craft_jax.parallel import rendezvous
from craft_jax.runtime.signals import StopFlag, StopSignal

logger = logging.getLogger(__name__)

T = TypeVar("T")

AUTO = "auto"
"""The `coordinator` of TPU pods and of jobs of SLURM and Open MPI, where JAX detects it."""

# A process without a heartbeat for this long is dead; JAX's default is 100 s.
_HEARTBEAT_SECONDS = 20
_SHUTDOWN_SECONDS = 300
# The longest work of process 0 while the others wait, such as tokenizing.
_PATIENCE_SECONDS = 1800.0

_POLL_MS = 1000
_FAILURE = "craft_jax/failure"
# Process 0 hosts the coordination service, and stays until the others have read its failure.
_LINGER_SECONDS = 3.0
# Time for the main thread to meet a failure itself, where its error is more specific.
_GRACE_SECONDS = 1.5

_VOTES, _AGREED = "votes", "agreed"
_SIGNS_OF_LOSS = ("gloo", "nccl", "coordination", "heartbeat", "connection", "unavailable")


class ProcessGroup:
    """The processes of a run; a single one if there is no `client`.

    Attributes:
      index: of this process, from 0.
      count: the number of processes.
      on_failure: called with a reason and an exit code before the failure of another process ends
        this one.
    """

    def __init__(self, client: Any = None, index: int = 0, count: int = 1):
        self.index, self.count = index, count
        self.on_failure: Callable[[str, int], object] = lambda reason, code: None
        self._client, self._turn = client, 0
        self._ended, self._is_leaving = threading.Event(), False
        self._failure: tuple[str, int] | None = None

    @property
    def is_first(self) -> bool:
        """Returns whether this process owns the run's folder."""
        return self.index == 0

    def from_first(
        self,
        get: Callable[[], T],
        encode: Callable[[T], Any] = lambda value: value,
        decode: Callable[[Any], T] = lambda sent: sent,
    ) -> T:
        """Returns `get()` of process 0 in all processes, which all call it in the same order.

        Args:
          get: called in process 0 alone.
          encode: returns the JSON that is sent to the others.
          decode: returns the result in the others from the JSON.

        Raises:
          LostPeerError: process 0 has died, or takes too long.
        """
        self._turn += 1
        key = f"craft_jax/{self._turn}"
        if not self.is_first:
            return decode(json.loads(self._wait_for(key)))
        value = get()
        if self.count > 1:
            self._client.key_value_set(key, json.dumps(encode(value)))
        return value

    def in_turn(self, work: Callable[[], T]) -> T:
        """Returns `work()`, which process 0 ends before the others begin; they find its files."""
        done = self.from_first(work, lambda _: None)
        return done if self.is_first else work()

    def confirm(self) -> None:
        """Makes process 0 wait until all others have come here without a failure.

        Raises:
          LostPeerError, CraftError: one has failed.
        """
        self._turn += 1
        key = f"craft_jax/{self._turn}"
        if not self.is_first:
            self._client.key_value_set(f"{key}/{self.index}", "")
            return
        for other in range(1, self.count):
            self._wait_for(f"{key}/{other}")

    def _wait_for(self, key: str) -> str:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            if self._failure is not None:
                raise _PeerFailedError(*self._failure)
            try:
                return self._client.blocking_key_value_get(key, _POLL_MS)
            except Exception as error:  # Its type differs between versions of JAX.
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise LostPeerError(_lost_words(self.index, error)) from error
            if time.monotonic() > deadline:
                raise LostPeerError(
                    f"process {self.index} has waited for another {_PATIENCE_SECONDS:.0f} s; where "
                    "process 0 tokenizes much text, do that first: python -m craft_jax.main prepare"
                )

    def shared(self, stop_signal: StopSignal) -> StopFlag:
        """Returns a stop flag that all processes share; a single process keeps its own."""
        return stop_signal if self.count == 1 else SharedStop(stop_signal)

    # Failures.

    def named(self, error: BaseException) -> BaseException:
        """Returns an error, as LostPeerError if it means that another process has died."""
        if self.count > 1 and _is_loss(error):
            return LostPeerError(_lost_words(self.index, error))
        return error

    def _watch(self) -> None:
        """Ends this process when another one has reported a failure."""
        while not self._ended.is_set():
            try:
                failure = json.loads(self._client.blocking_key_value_get(_FAILURE, _POLL_MS))
            except Exception as error:
                if "DEADLINE_EXCEEDED" in str(error):
                    continue
                return  # The coordination service is gone: JAX ends this process.
            if failure["process"] == self.index:
                return
            words = f"process {failure['process']} failed: {failure['reason']}"
            self._failure = (words, failure["code"])
            if self._ended.wait(_GRACE_SECONDS) or self._is_leaving:
                return
            with contextlib.suppress(Exception):
                self.on_failure(*self._failure)
                print(words, file=sys.stderr, flush=True)
            os._exit(failure["code"])

    def _leave(self, error: BaseException) -> BaseException:
        """Reports a failure of this process to the others; returns the error to raise."""
        self._is_leaving = True
        named = self.named(error)
        if named is not error:
            # The process that caused it may have reported why.
            time.sleep(_GRACE_SECONDS)
            if self._failure is not None:
                return _PeerFailedError(*self._failure)
            error = named
        code = exit_code_of(error)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        with contextlib.suppress(Exception):  # Reported by another one, or no service.
            failure = {"process": self.index, "reason": reason, "code": code}
            self._client.key_value_set(_FAILURE, json.dumps(failure))
            if self.is_first:
                time.sleep(_LINGER_SECONDS)
        return error


ALONE = ProcessGroup()
"""A single process."""


class _PeerFailedError(CraftError):
    def __init__(self, message: str, exit_code: int):
        self.exit_code = exit_code
        super().__init__(message)


@contextlib.contextmanager
def joined(coordinator: str | None, count: int | None, index: int | None) -> Iterator[ProcessGroup]:
    """Joins the other processes of a run, for as long as the context lasts.

    Enter it before JAX starts; it ends when all processes have come to its end. An error that
    leaves the context ends the other processes too, with its first line and its exit code. An error
    that is not meant for users is printed, and ends this process.

    Args:
      coordinator: `HOST:PORT` of process 0, `auto`, or None for a single process.
      count, index: the number of processes, and of this one; None for `auto`.

    Raises:
      LostPeerError: the others were not found.
      UsageError: the arguments contradict each other.
    """
    if coordinator is None:
        yield ProcessGroup()
        return
    group = _join(coordinator, count, index)
    watcher = threading.Thread(target=group._watch, name="peers", daemon=True)
    watcher.start()
    try:
        yield group
        group.from_first(lambda: None)  # Process 0 has written everything.
        group._ended.set()
        watcher.join()
        jax.distributed.shutdown()
    except BaseException as error:
        reported = group._leave(error)
        if reported is not error:
            raise reported from error
        if isinstance(error, (CraftError, StoppedError, OSError, KeyboardInterrupt)):
            raise
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _join(coordinator: str, count: int | None, index: int | None) -> ProcessGroup:
    # It would replace the handler of SIGTERM; `SharedStop` does its work.
    jax.config.update("jax_enable_preemption_service", False)
    local_device_ids = None
    if coordinator == AUTO:
        coordinator, count, index, local_device_ids = _detected(count, index)
    if count is None or index is None:
        raise UsageError(
            f"`coordinator={coordinator}` needs `num_processes`, and `process_id` from 0"
        )
    if not 0 <= index < count:
        raise UsageError(
            f"`process_id={index}` is not one of `num_processes={count}`, which are 0 to "
            f"{count - 1}"
        )
    try:
        host, _ = rendezvous.split(coordinator)
    except ValueError as error:
        raise UsageError(f"`coordinator={coordinator}`: {error}, nor {AUTO}") from None
    rendezvous.meet(coordinator, count, index)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            local_device_ids=local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=int(rendezvous.SECONDS),
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            # By default it listens on all addresses of the machine.
            coordinator_bind_address=coordinator if host in ("127.0.0.1", "localhost") else None,
        )
        jax.devices()  # Exchanges the topology, which fails if a process is missing.
    except RuntimeError as error:
        raise LostPeerError(_lost_words(index, error)) from error
    if index:
        logging.getLogger("craft_jax").setLevel(logging.WARNING)
    return ProcessGroup(distributed.global_state.client, index, count)


def _detected(count: int | None, index: int | None) -> tuple:
    """Returns address, number of processes, number of this one, and its devices (None for all)."""
    found = ClusterEnv.auto_detect_unset_distributed_params(
        None, count, index, None, None, int(rendezvous.SECONDS)
    )
    if found[0] is None:
        raise UsageError(
            f"`coordinator={AUTO}`: this is neither a TPU pod nor a job of SLURM or Open MPI; name "
            "`coordinator=HOST:PORT`, `num_processes` and `process_id`"
        )
    return found


def _is_loss(error: BaseException) -> bool:
    """Returns whether an error of JAX means that another process has died."""
    if isinstance(error, CraftError) or not isinstance(error, (ValueError, RuntimeError)):
        return False
    text = str(error).lower()
    return any(sign in text for sign in _SIGNS_OF_LOSS)


def _lost_words(index: int, error: BaseException) -> str:
    text = str(error).strip()
    reason = text.splitlines()[0][:200] if text else type(error).__name__
    return (
        f"process {index} has lost another one ({reason}); start all of them again: the run goes "
        "on from its newest checkpoint"
    )


# The stop flag of several processes.


@final
class SharedStop(StopFlag):
    """A stop flag that is set in all processes at the same step, whichever received the signal.

    Each process attaches its exit code to its shard of a batch; the step reduces them.

    Args:
      own: the flag of this process.
    """

    def __init__(self, own: StopSignal):
        super().__init__()
        self._own = own

    def defer(self) -> None:
        self._own.defer()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        # Not interruptible: the other processes would hang in the collectives of this step.
        yield

    def attach(
        self, batch: Mapping[str, jax.Array], mesh: Mesh, elapsed: float
    ) -> dict[str, jax.Array]:
        votes = np.array([[self._own.exit_code or 0, elapsed]], np.float32)
        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        shape = (mesh.size, votes.shape[1])
        return dict(batch) | {
            _VOTES: jax.make_array_from_callback(shape, sharding, lambda index: votes)
        }

    @staticmethod
    def reducing(train_step: Callable) -> Callable:
        """Returns a train step that also reduces the values of `attach`."""

        def step(state: Any, batch: Mapping[str, jax.Array]) -> tuple[Any, dict]:
            own = {name: array for name, array in batch.items() if name != _VOTES}
            state, metrics = train_step(state, own)
            return state, metrics | {_AGREED: jnp.max(batch[_VOTES], axis=0)}

        return step

    def agree(self, metrics: dict[str, jax.Array]) -> float:
        exit_code, elapsed = np.asarray(metrics.pop(_AGREED)).tolist()
        if exit_code and not self.is_set:
            self.exit_code = int(exit_code)
            own = self._own.name if self._own.exit_code == self.exit_code else ""
            self.name = own or {INTERRUPTED: "SIGINT", PREEMPTED: "SIGTERM"}[self.exit_code]
        return elapsed
