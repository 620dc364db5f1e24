"""Worker processes that load batches, for `loading`.

Worker w of n loads the batches whose number is w modulo n, on request; a pipe carries numbers to it
and batches back. The end of the pipe reveals a dead worker. Workers are spawned, not forked, since
the threads of JAX do not survive a fork. They have no state, so they are simply killed.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import sysconfig
import traceback
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, Self

from craft_jax import errors
from craft_jax.data import examples
from craft_jax.data.base import Batch, Dataset, Recipe
from craft_jax.errors import ConfigError, CraftError, DataError

_POLL_SECONDS = 1.0
_MAX_MESSAGE = 300
_PR_SET_PDEATHSIG = 1
# Terminals and schedulers send these to all processes of a run; the parent handles them.
_PARENT_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_HINTS = {signal.SIGKILL: " (out of memory?)", signal.SIGSEGV: " (a fault in native code?)"}
_NOT_OWN = ("<", *{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
_READY = "ready"
WHOLE = slice(None)
"""All rows of a batch."""


class Workers:
    """A context of worker processes for the batches `first` to `last - 1` of a dataset.

    Args:
      dataset: with the batches; it must pickle.
      first, last: their numbers.
      count: processes, at least one.
      ahead: batches that each worker prefetches.
      rows: of each batch.

    Raises:
      ConfigError: the dataset does not pickle.
    """

    def __init__(
        self,
        dataset: Dataset,
        first: int,
        last: int,
        *,
        count: int,
        ahead: int,
        rows: slice = WHOLE,
    ):
        try:
            # Copied to bytes: a view would outlive its buffer in an exception's reference cycle.
            self._pickled = bytes(ForkingPickler.dumps((_Sent(dataset), rows)))
        except Exception as error:
            raise ConfigError(
                f"data.workers={count}: the dataset {origin(dataset)} cannot be sent to processes "
                f"({_one_line(error)}); use data.workers=0, or name its class with data.dataset"
            ) from error
        self._dataset, self._requested, self._last = dataset, first, last
        self._ahead = ahead * count
        self._workers: list[_Worker] = []
        self._count = count

    def __enter__(self) -> Self:
        try:
            self._workers = [_Worker() for _ in range(self._count)]
            # Starts all before the first request, so that they start in parallel.
            for worker in self._workers:
                worker.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for worker in self._workers:
            worker.close()

    def kill(self) -> None:
        """Kills all workers; a `get` in another thread then raises."""
        for worker in self._workers:
            worker.kill()

    def get(self, step: int) -> Batch:
        """Returns a batch; must be called for all batches in order.

        Raises:
          DataError: the dataset failed, or the worker died.
          CraftError: from the dataset, unchanged.
        """
        for number in range(self._requested, min(step + self._ahead + 1, self._last)):
            self._worker(number).send(number, self._pickled)
            self._requested = number + 1
        answer = self._worker(step).receive()
        if isinstance(answer, _Failure):
            raise answer.error(self._dataset, step) from _WorkerTracebackError(answer.traceback)
        if answer is None:
            raise _death(self._dataset, step, self._worker(step))
        return answer

    def _worker(self, step: int) -> "_Worker":
        return self._workers[step % self._count]


class _WorkerTracebackError(Exception):
    """The traceback of an error in a worker, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Failure(NamedTuple):
    """An error, sent by a worker in place of a batch.

    Attributes:
      what: its message.
      traceback: its traceback as text.
      is_opening: whether the constructor of the dataset raised it.
      passed: class name, arguments and attributes of a CraftError; None for other errors.
    """

    what: str
    traceback: str
    is_opening: bool = False
    passed: tuple[str, tuple, dict] | None = None

    @classmethod
    def of(cls, error: BaseException, is_opening: bool = False) -> "_Failure":
        passed = None
        if isinstance(error, CraftError):
            # The parent may be unable to import a class of the user's.
            known = next(c for c in type(error).__mro__ if c.__module__ == errors.__name__)
            passed = (known.__name__, error.args, vars(error))
        return cls(_failed(error), traceback.format_exc(), is_opening, passed)

    def error(self, dataset: Dataset, step: int) -> CraftError:
        if self.passed:
            name, args, attributes = self.passed
            kind = getattr(errors, name)
            error = kind.__new__(kind, *args)  # Without `__init__`, which computed `args`.
            vars(error).update(attributes)
            return error
        if self.is_opening:
            return DataError(
                f"{origin(dataset)}: building the dataset in a worker process {self.what}; "
                "correct it, or use data.workers=0"
            )
        return _batch_error(dataset, step, self.what)


class _Worker:
    """The parent's side of a worker process."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, self._other_end = spawn.Pipe()
        self.process: BaseProcess = spawn.Process(
            target=_work, args=(self._other_end, os.getpid()), name="loader", daemon=True
        )
        self._has_dataset = False
        self.is_ready = False

    def start(self) -> None:
        # Started here, since `process.start` would start it with these signals blocked.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _PARENT_SIGNALS)
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._other_end.close()

    def send(self, step: int, pickled: Any) -> None:
        # `receive` reports a dead worker when its batch is due.
        with contextlib.suppress(OSError):
            if not self._has_dataset:
                self._pipe.send_bytes(pickled)
                self._has_dataset = True
            self._pipe.send(step)

    def receive(self) -> Any:
        """Returns the next message of the worker; None if it died."""
        while True:
            # A process that the dataset started may hold the pipe open, so this polls.
            while not connection.wait([self._pipe, self.process.sentinel], _POLL_SECONDS):
                if self.process.exitcode is not None:
                    break
            try:
                answer = self._pipe.recv() if self._pipe.poll() else None
            except (EOFError, OSError):
                return None
            if not isinstance(answer, str):
                return answer
            self.is_ready = True  # The message is `_READY`.

    def kill(self) -> None:
        with contextlib.suppress(AttributeError, ValueError):  # Not started, or closed.
            self.process.kill()

    def close(self) -> None:
        self._pipe.close()
        self._other_end.close()
        if self.process.pid is not None:
            self.process.join()
        self.process.close()


# In the worker.


def _work(pipe: Connection, parent: int) -> None:
    _die_with(parent)
    for number in _PARENT_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PARENT_SIGNALS)
    # A dataset that imports JAX must not take the accelerator from the parent.
    os.environ["JAX_PLATFORMS"] = "cpu"
    with contextlib.suppress(EOFError, OSError):  # The parent has gone.
        pickled = pipe.recv_bytes()
        try:
            sent, rows = ForkingPickler.loads(pickled)
            dataset = sent.dataset
        except BaseException as error:
            _send(pipe, _Failure.of(error, is_opening=True))
            return
        del pickled
        pipe.send(_READY)
        while True:
            step = pipe.recv()
            try:
                answer = make_batch(dataset, step, rows)
            except BaseException as error:
                answer = _Failure.of(error)
            _send(pipe, answer)


def _die_with(parent: int) -> None:
    """Ends this process when the thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # The parent ended before.
        os._exit(1)


def _send(pipe: Connection, answer: Any) -> None:
    try:
        pipe.send(answer)
    except OSError:
        raise
    except Exception as error:  # It does not pickle.
        pipe.send(_Failure.of(error))


class _Sent:
    """Pickles a dataset, or its recipe if it is of a class of the user's."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __reduce__(self) -> tuple:
        # The module of a user's file has another name in another process.
        recipe = self.dataset.recipe
        return (_rebuilt, (recipe,)) if recipe else (_Sent, (self.dataset,))


def _rebuilt(recipe: Recipe) -> _Sent:
    return _Sent(examples.build(recipe))


def make_batch(dataset: Dataset, step: int, rows: slice = WHOLE) -> Batch:
    """Returns a batch of a dataset, or some rows of it.

    Raises:
      TypeError: it is not a dict of arrays.
    """
    batch = dataset.batch(step) if rows == WHOLE else dataset.rows(step, rows)
    if not isinstance(batch, dict):
        raise TypeError(f"it returned a {type(batch).__name__}, not a dict of arrays")
    for name, array in batch.items():
        if not hasattr(array, "dtype"):
            raise TypeError(f"its {name!r} is a {type(array).__name__}, not an array")
    return batch


# Messages.


def origin(dataset: Dataset) -> str:
    """Returns the name of a dataset in messages: its config reference, or its `name`."""
    return f"data.dataset={dataset.recipe.reference}" if dataset.recipe else f"data {dataset.name}"


def batch_error(dataset: Dataset, step: int, error: BaseException) -> DataError:
    """Returns the error for a failed batch, with the source line of the failure."""
    return _batch_error(dataset, step, _failed(error))


def _batch_error(dataset: Dataset, step: int, what: str) -> DataError:
    return DataError(f"{origin(dataset)}: batch {step} {what}; correct its batch({step})")


def _failed(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_NOT_OWN)]
    place = [f" ({frame.filename}:{frame.lineno})" for frame in (own or frames)[-1:]]
    if isinstance(error, SystemExit):
        what = f"exited with code {_exit_code(error.code)} in the middle of a batch"
    else:
        what = f"failed with {_one_line(error)}"
    return what + "".join(place)


def _exit_code(code: Any) -> int:
    return code if isinstance(code, int) else 0 if code is None else 1


def _one_line(error: BaseException) -> str:
    words = " ".join(str(error).split())
    words = words if len(words) <= _MAX_MESSAGE else f"{words[:_MAX_MESSAGE]}..."
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _death(dataset: Dataset, step: int, worker: _Worker) -> DataError:
    worker.process.join(_POLL_SECONDS)
    code = worker.process.exitcode
    remedy = f"correct its batch({step})"
    if code is None:
        what = "closed its pipe"
    elif code < 0:
        what = f"was killed by {signal.Signals(-code).name}{_HINTS.get(-code, '')}"
        if -code == signal.SIGKILL:
            remedy = "use fewer data.workers or a smaller data.prefetch, or 0 workers"
    else:
        what = f"exited with code {code} in the middle of a batch"
    if not worker.is_ready and not (code and code < 0):
        what = f"exited with code {code} before its first batch"
        remedy = (
            'a script must train under `if __name__ == "__main__":`, since workers import it; '
            "else use data.workers=0"
        )
    return DataError(f"{origin(dataset)}: batch {step}: its worker process {what}; {remedy}")
