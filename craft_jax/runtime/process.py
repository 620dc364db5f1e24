"""What is decided once per process: logging, the terminal, signals, and the devices.

Nothing here is about a model. JAX is not started by importing this file.
"""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import logging
import os
import platform
import shutil
import signal
import stat
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import jax

from craft_jax.errors import INTERRUPTED, KILLED, PREEMPTED, StoppedError

PLAIN_ONLY = {"plain_only": True}
"""`extra=` of a log message that a terminal shows as the live line instead."""

FILE_ONLY = {"file_only": True}
"""`extra=` of a log message that `main` shows in its own way."""


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
        with self.lock:  # Checkpoints are announced from a thread of their own.
            try:
                self._erase()
                self.live = line
                self._draw()
            except (OSError, ValueError):
                self._go_silent()

    def _go_silent(self) -> None:
        """The reader is gone, as behind `| head`: the run goes on, and its log has everything."""
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


def progress(line: str) -> None:
    """Shows a live line on a terminal, instead of the one before; empty removes it."""
    for handler in logging.getLogger("craft_jax").handlers:
        if isinstance(handler, _Terminal):
            handler.progress(line)


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


def return_freed_memory() -> None:
    """Gives the system back what is free now; to be called while a step has its scratch memory.

    That takes another place now and then, where something small was put beside the old one.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def keep_compiled() -> None:
    """Keeps compiled programs in a folder of the user's own, so that the next start is quick.

    It is `craft_jax/xla-...` below `$XDG_CACHE_HOME` (else `~/.cache`), mode 0700, for what lies in
    it is run; its name holds what the processor can do, since XLA compiles for that. What was used
    longest ago is removed above `_CACHE_BYTES`. Where JAX_COMPILATION_CACHE_DIR names a folder, JAX
    has that one instead, and with JAX_ENABLE_COMPILATION_CACHE=false none. A folder that cannot be
    had, or is another's, is done without: only time is lost.
    """
    # Of an entry that was cut off, JAX says so, and compiles.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(home).expanduser() / "craft_jax" / f"xla-{_processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        info = folder.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
            raise PermissionError(f"{folder} is another's")
        folder.chmod(0o700)
        _keep_newest(folder, _CACHE_BYTES)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home.
        logging.getLogger(__name__).debug("compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _CACHE_SECONDS)


_CACHE_BYTES = 1 << 30
_CACHE_SECONDS = 0.1
"""What compiles quicker is not worth a file."""


def _processor() -> str:
    """Returns a word for what the processor can do."""
    words = [platform.machine()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        words += [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return hashlib.sha256("".join(words).encode()).hexdigest()[:12]


def _keep_newest(folder: Path, limit: int) -> None:
    """Removes the files of a folder that were used longest ago, until the rest fits a limit."""
    found = sorted(
        ((max(i.st_atime, i.st_mtime), i.st_size, path) for path, i in _files(folder)), reverse=True
    )
    for (_, _, path), total in zip(
        found, itertools.accumulate(size for _, size, _ in found), strict=True
    ):
        if total > limit:
            path.unlink(missing_ok=True)


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # Another process was quicker.
            yield path, path.stat()


def devices_in_words() -> str:
    """Returns, for example, `1 cpu device` or `8 gpu devices (NVIDIA H200)`."""
    devices = jax.devices()
    kind = devices[0].device_kind
    words = f"{len(devices)} {devices[0].platform} device{'s' * (len(devices) > 1)}"
    if jax.process_count() > 1:
        words += f" of {jax.process_count()} processes"
    return words if kind.lower() == devices[0].platform else f"{words} ({kind})"
