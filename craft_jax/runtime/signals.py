"""Signals that ask a process to stop: Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator

from craft_jax.errors import INTERRUPTED, KILLED, PREEMPTED, StoppedError


class StopSignal:
    """Whether the process was asked to stop, and the exit code that answers it.

    Attributes:
      exit_code: 130 after Ctrl-C, 75 after SIGTERM, SIGUSR1 or SIGHUP, None before any.
      name: of the signal.
      on_deferred: called when a signal was noted, inside of its handler.
      on_abort: called with the exit code before a second signal ends the process.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self.name = ""
        self.on_deferred: Callable[[], object] = lambda: None
        self.on_abort: Callable[[int], None] = lambda exit_code: None
        self._is_deferred = False

    @property
    def is_set(self) -> bool:
        """Whether a signal came."""
        return self.exit_code is not None

    def defer(self) -> None:
        """From now on a signal is only noted: there is something to save first."""
        self._is_deferred = True

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While the context lasts a signal raises StoppedError: nothing is lost by dropping it."""
        before, self._is_deferred = self._is_deferred, False
        try:
            yield
        finally:
            self._is_deferred = before

    def receive(self, number: int) -> None:
        """Takes note of a signal.

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


# What reaches the process within this time of the first signal is the same wish: a scheduler
# signals every process of a job, and a launcher passes its own signal on.
_SAME_WISH_SECONDS = 0.2

# Among the numbers of signals in the pipe: no signal has it.
_DEFERRED = b"\0"


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Collects Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP while the context lasts.

    A second signal ends the process at once, even while its main thread is in a compiled program.
    Handlers that others installed before are called as well. Without a terminal SIGHUP is ignored.
    """
    asked = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield asked
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
        asked.receive(number)

    for number in numbers:
        before[number] = signal.signal(number, handle)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # The system writes to the pipe even while Python's own handlers have to wait.
    asked.on_deferred = lambda: os.write(writer, _DEFERRED)
    watcher = threading.Thread(target=_watch, args=(reader, numbers, asked))
    watcher.daemon = True
    watcher.start()
    try:
        yield asked
    finally:
        asked.on_deferred = lambda: None
        signal.set_wakeup_fd(wakeup)
        os.close(writer)
        watcher.join()
        os.close(reader)
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(reader: int, numbers: Collection[int], asked: StopSignal) -> None:
    """Says that a signal was noted, and ends the process at the second one."""
    first: float | None = None
    while byte := os.read(reader, 1):
        if byte == _DEFERRED:
            # Not in the handler, which may have interrupted a write to the same stream; and not
            # here, since a reader that is stuck must not keep the second signal from being seen.
            threading.Thread(target=_say_deferred, args=(asked.name,), daemon=True).start()
        if byte[0] not in numbers:
            continue
        now = time.monotonic()
        if first is None:
            first = now
        elif now - first > _SAME_WISH_SECONDS:
            exit_code = INTERRUPTED if byte[0] == signal.SIGINT else KILLED
            with contextlib.suppress(Exception):
                asked.on_abort(exit_code)
                os.write(2, b"\nstopped at once; the last checkpoint is whole\n")
            os._exit(exit_code)


def _say_deferred(name: str) -> None:
    logging.getLogger("craft_jax").info(
        "%s received: finishing this step and saving (once more stops at once)", name
    )
