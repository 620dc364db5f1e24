"""What is decided once per process: logging, the terminal, signals, and the devices.

Nothing here is about a model. JAX is not started by importing this file.
"""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import logging
import platform
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from craft_jax.errors import INTERRUPTED, PREEMPTED

PLAIN_ONLY = {"plain_only": True}
"""`extra=` of a log message that a terminal shows as the live line instead."""


class _Terminal(logging.StreamHandler):
    """Writes log messages to standard output, around a live line that is rewritten in place."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self.live = ""
        self.is_live = sys.stdout.isatty()

    def emit(self, record: logging.LogRecord) -> None:
        if self.is_live and getattr(record, "plain_only", False):
            return
        self._erase()
        super().emit(record)
        self._draw()

    def progress(self, line: str) -> None:
        if self.is_live:
            self._erase()
            self.live = line
            self._draw()

    def _erase(self) -> None:
        if self.live:
            self.stream.write("\r\x1b[K")

    def _draw(self) -> None:
        if self.live:
            self.stream.write(self.live[: shutil.get_terminal_size().columns - 1])
            self.stream.flush()


def setup_logging() -> None:
    """Sends the project's messages to standard output, warnings and errors of others to stderr."""
    root = logging.getLogger("craft_jax")
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False
    root.addHandler(_Terminal())


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Also writes every message to a file, with its time, while the context lasts."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger("craft_jax")
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def progress(line: str) -> None:
    """Shows a live line on a terminal, instead of the one before; empty removes it."""
    for handler in logging.getLogger("craft_jax").handlers:
        if isinstance(handler, _Terminal):
            handler.progress(line)


class StopSignal:
    """Whether the process was asked to stop, and the exit code that answers it.

    Attributes:
      exit_code: 130 after Ctrl-C, 75 after SIGTERM or SIGUSR1, None before either.
    """

    exit_code: int | None = None


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Collects Ctrl-C, SIGTERM and SIGUSR1 while the context lasts; a second one acts at once."""
    asked = StopSignal()
    codes = {
        signal.SIGINT: INTERRUPTED,
        signal.SIGTERM: PREEMPTED,
        signal.SIGUSR1: PREEMPTED,
    }
    before = {}

    def handle(number: int, frame: object) -> None:
        asked.exit_code = codes[signal.Signals(number)]
        for other, handler in before.items():
            signal.signal(other, handler)
        logging.getLogger("craft_jax").info(
            "%s received: finishing this step and saving (once more stops at once)",
            signal.Signals(number).name,
        )

    for number in codes:
        before[number] = signal.signal(number, handle)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next allocation instead of giving it back.

    XLA:CPU allocates the scratch memory of a program at every call. Returned to the system each
    time, it comes back as page faults: about a third of a train step of a 10M model. To be called
    before JAX starts its threads. Memory stays at its peak, which the next step needs again. The
    price is one arena for all threads, so tokenizing takes longer. Nothing happens with another C
    library, nor where JAX has a plugin for an accelerator, whose memory it manages itself.
    """
    accelerators = importlib.metadata.entry_points(group="jax_plugins")
    if platform.libc_ver()[0] != "glibc" or accelerators or importlib.util.find_spec("libtpu"):
        return
    # The numbers are those of malloc.h; a value that glibc refuses is ignored.
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_arena_max, 1)


def devices_in_words() -> str:
    """Returns, for example, `1 cpu device` or `8 gpu devices (NVIDIA H200)`."""
    devices = jax.devices()
    kind = devices[0].device_kind
    words = f"{len(devices)} {devices[0].platform} device{'s' * (len(devices) > 1)}"
    return words if kind.lower() == devices[0].platform else f"{words} ({kind})"
