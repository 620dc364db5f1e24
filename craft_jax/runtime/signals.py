"""Signals that ask a process to stop: Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP."""

import abc
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, final

from craft_jax.errors import INTERRUPTED, KILLED, PREEMPTED, StoppedError


class StopFlag(abc.ABC):
    """A request to stop the run, with its exit code.

    Attributes:
      exit_code: 130 after Ctrl-C, 75 after SIGTERM, SIGUSR1 or SIGHUP, None before any.
      name: of the signal.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self.name = ""

    @property
    def is_set(self) -> bool:
        """Returns whether a signal arrived."""
        return self.exit_code is not None

    @abc.abstractmethod
    def defer(self) -> None:
        """Records signals instead of raising from now on, since there is state to save."""

    @abc.abstractmethod
    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which a signal raises StoppedError, where no work is lost."""

    @abc.abstractmethod
    def attach(self, batch: Mapping[str, Any], mesh: Any, elapsed: float) -> Mapping[str, Any]:
        """Returns a batch with the values that processes exchange in this step."""

    @abc.abstractmethod
    def agree(self, metrics: dict[str, Any]) -> float | None:
        """Removes the exchanged values from the metrics of a step, and sets the flag from them.

        Returns:
          The seconds that the run has taken, where processes exchange them.
        """


@final
class StopSignal(StopFlag):
    """The stop flag of one process, set by its signals.

    Attributes:
      on_deferred: called inside the signal handler when a signal was recorded.
      on_abort: called with the exit code before a second signal ends the process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on_deferred: Callable[[], object] = lambda: None
        self.on_abort: Callable[[int], None] = lambda exit_code: None
        self._is_deferred = False

    def defer(self) -> None:
        self._is_deferred = True

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        before, self._is_deferred = self._is_deferred, False
        try:
            yield
        finally:
            self._is_deferred = before

    def attach(self, batch: Mapping[str, Any], mesh: Any, elapsed: float) -> Mapping[str, Any]:
        return batch

    def agree(self, metrics: dict[str, Any]) -> float | None:
        return None

    def receive(self, number: int) -> None:
        """Records a signal.

        Raises:
          StoppedError: there is nothing to save, or the process waits.
        """
        if self.is_set:
            return
        self.name = signal.Signals(number).name
        self.exit_code = INTERRUPTED if number == signal.SIGINT else PREEMPTED
        if not self._is_deferred:
            raise StoppedError(f"stopped by {self.name}; nothing was under way", self.exit_code)
        self.on_deferred()


# Signals within this window count as one: schedulers and launchers both forward them.
_DEBOUNCE_SECONDS = 0.2

# Written to the pipe beside the numbers of signals; no signal has it.
_DEFERRED = b"\0"


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Collects Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP while the context lasts.

    A second signal ends the process at once, even while its main thread is in a compiled program.
    Handlers that others installed before are called as well. Without a terminal SIGHUP is ignored.
    """
    flag = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    before = {}
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        if any(stream and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
            numbers.append(signal.SIGHUP)
        else:
            before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def handle(number: int, frame: object) -> None:
        old = before[signal.Signals(number)]
        gives_way = old is signal.default_int_handler or getattr(old, "gives_way", False)
        if callable(old) and not gives_way:
            old(number, frame)
        flag.receive(number)

    for number in numbers:
        before[number] = signal.signal(number, handle)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # The system writes to the pipe even while Python's own handlers have to wait.
    flag.on_deferred = lambda: os.write(writer, _DEFERRED)
    watcher = threading.Thread(target=_watch, args=(reader, numbers, flag))
    watcher.daemon = True
    watcher.start()
    try:
        yield flag
    finally:
        flag.on_deferred = lambda: None
        signal.set_wakeup_fd(wakeup)
        os.close(writer)
        watcher.join()
        os.close(reader)
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(reader: int, numbers: Collection[int], flag: StopSignal) -> None:
    """Logs that a signal was recorded, and ends the process at the second one."""
    first: float | None = None
    while byte := os.read(reader, 1):
        if byte == _DEFERRED:
            # Not in the handler, which may have interrupted a write to the same stream; and not
            # here, since a reader that is stuck must not keep the second signal from being seen.
            threading.Thread(target=_say_deferred, args=(flag.name,), daemon=True).start()
        if byte[0] not in numbers:
            continue
        now = time.monotonic()
        if first is None:
            first = now
        elif now - first > _DEBOUNCE_SECONDS:
            exit_code = INTERRUPTED if byte[0] == signal.SIGINT else KILLED
            with contextlib.suppress(Exception):
                flag.on_abort(exit_code)
                os.write(2, b"\nstopped at once; the last checkpoint is whole\n")
            os._exit(exit_code)


def _say_deferred(name: str) -> None:
    logging.getLogger("craft_jax").info(
        "%s received: finishing this step and saving (once more stops at once)", name
    )
