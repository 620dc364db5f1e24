"""The watchdog: ends a process that makes no progress, with the stacks of its threads."""

import contextlib
import faulthandler
import logging
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from craft_jax.errors import STALLED

logger = logging.getLogger(__name__)

_LEAST_SECONDS = 60.0
_USUAL_FACTOR = 20.0
_SLOW_SECONDS = 1800.0


class Watchdog:
    """Ends the process with exit code 76 when it is not notified of progress in time.

    A step may take 20 times the median of the steps before it, and at least a minute. Compiling and
    other work of unknown length may take half an hour.

    Args:
      limit: seconds without progress; None for the limits above, 0 for none.
      log: a file for the stacks of all threads, which also go to standard error.
      on_stall: called with the reason before the process ends.
    """

    def __init__(
        self,
        limit: float | None,
        log: Path | None = None,
        on_stall: Callable[[str], None] = lambda reason: None,
    ):
        self._limit, self._log, self._on_stall = limit, log, on_stall
        self._intervals: deque[float] = deque(maxlen=50)
        self._last = time.monotonic()
        # The first step compiles.
        self._slow, self._has_stepped = 0, False
        self._ended = threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches while the context lasts."""
        if self._limit == 0:
            yield
            return
        self._last = time.monotonic()
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def step(self) -> None:
        """Notifies of the end of a step."""
        now = time.monotonic()
        if self._has_stepped:
            self._intervals.append(now - self._last)
        self._last, self._has_stepped = now, True

    def restart(self) -> None:
        """Notifies of other progress."""
        self._last = time.monotonic()

    @contextlib.contextmanager
    def slow_work(self) -> Iterator[None]:
        """Allows half an hour for work such as compiling, while the context lasts."""
        self._slow += 1
        self.restart()
        try:
            yield
        finally:
            self._slow -= 1
            self.restart()

    @property
    def limit(self) -> float:
        """The limit of seconds without progress now."""
        if self._slow or not self._has_stepped:
            return max(_SLOW_SECONDS, self._limit or 0)
        if self._limit is not None:
            return self._limit
        usual = statistics.median(self._intervals) if self._intervals else 0.0
        return max(_LEAST_SECONDS, _USUAL_FACTOR * usual)

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.limit / 4)):
            waited = time.monotonic() - self._last
            if waited > self.limit:
                self._give_up(waited)

    def _give_up(self, waited: float) -> None:
        reason = f"no progress for {waited:.0f} s (the limit is {self.limit:.0f} s)"
        logger.error("stalled: %s; the stacks of all threads follow", reason)
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if self._log:
            with contextlib.suppress(Exception), self._log.open("a", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        with contextlib.suppress(Exception):
            self._on_stall(reason)
        os._exit(STALLED)
