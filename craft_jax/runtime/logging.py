"""The project's log: standard output with a live line, and files."""

import contextlib
import io
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from craft_jax.messages import one_line

PLAIN_ONLY = {"plain_only": True}
"""`extra=` of a message that a terminal shows in its live line instead."""

FILE_ONLY = {"file_only": True}
"""`extra=` of a message that `main` prints itself."""


class _Terminal(logging.StreamHandler):
    """Writes log messages to standard output, around a live line that is rewritten in place."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self.live = ""
        self.is_live = sys.stdout.isatty()

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        if self.is_live and getattr(record, "plain_only", False):
            return
        try:
            self._erase()
            self.stream.write(self.format(record) + self.terminator)
            self.flush()
            self._draw()
        except (OSError, ValueError):
            self._go_silent()

    def progress(self, line: str) -> None:
        if not self.is_live:
            return
        with self.lock:  # Checkpoints log from a thread of their own.
            try:
                self._erase()
                self.live = line
                self._draw()
            except (OSError, ValueError):
                self._go_silent()

    def _go_silent(self) -> None:
        """Stops writing after the reader has closed, as `| head` does; the log file continues."""
        self.stream, self.is_live, self.live = io.StringIO(), False, ""
        self.setLevel(logging.CRITICAL + 1)

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
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger("craft_jax")
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def side_task(name: str) -> Iterator[None]:
    """Logs an error of work that training does not depend on, such as a sample or a picture."""
    try:
        yield
    except Exception as error:  # A run is worth more than any of its side tasks.
        reason = one_line(str(error)) or type(error).__name__
        logging.getLogger(__name__).warning("%s failed: %s; training goes on", name, reason)


def progress(line: str) -> None:
    """Shows a live line on a terminal, instead of the one before; empty removes it."""
    for handler in logging.getLogger("craft_jax").handlers:
        if isinstance(handler, _Terminal):
            handler.progress(line)
