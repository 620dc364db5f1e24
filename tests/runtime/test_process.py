import contextlib
import io
import logging
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from craft_jax.errors import StoppedError
from craft_jax.runtime import process
from tests.conftest import environment


class Screen(io.StringIO):
    """Standard output that says that it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def logger():
    yield logging.getLogger("craft_jax.test")
    logging.getLogger("craft_jax").handlers.clear()


def test_a_live_line_is_rewritten_around_messages(logger, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Screen())
    monkeypatch.setenv("COLUMNS", "20")
    process.setup_logging()
    process.progress("step 1")
    process.progress("step 2 and very much more text")
    logger.info("a message")
    logger.info("hidden", extra=process.PLAIN_ONLY)
    process.progress("")
    shown = sys.stdout.getvalue()
    line = "step 2 and very muc"
    assert shown == f"step 1\r\x1b[K{line}\r\x1b[Ka message\n{line}\r\x1b[K"


def test_plain_lines_elsewhere(logger, capsys, tmp_path):
    process.setup_logging()
    with process.log_to(tmp_path / "a.log"):
        process.progress("step 1")
        logger.info("plain", extra=process.PLAIN_ONLY)
    logger.info("after")
    assert capsys.readouterr().out == "plain\nafter\n"
    assert (tmp_path / "a.log").read_text(encoding="utf-8").endswith(" plain\n")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_signals_are_collected_and_handlers_come_back(number, code):
    before = signal.getsignal(number)
    with process.stop_signals() as asked:
        assert not asked.is_set
        asked.defer()
        os.kill(os.getpid(), number)
        assert asked.is_set
        assert asked.exit_code == code
        os.kill(os.getpid(), number)  # So soon after the first it is the same wish.
    assert signal.getsignal(number) == before


def test_a_signal_ends_what_has_nothing_to_save():
    with process.stop_signals() as asked, pytest.raises(StoppedError, match="SIGTERM") as caught:
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.exit_code == asked.exit_code == 75


def test_a_signal_ends_a_wait():
    with process.stop_signals() as asked:
        asked.defer()
        with pytest.raises(StoppedError), asked.waiting():
            signal.raise_signal(signal.SIGUSR1)


class _SignalsWhileWriting(io.RawIOBase):
    """A file that is slow enough for a signal to come in the middle of a write."""

    def __init__(self):
        self.written = b""

    def writable(self):
        return True

    def write(self, text):
        if not self.written:
            signal.raise_signal(signal.SIGTERM)
        self.written += bytes(text)
        return len(text)


@pytest.mark.parametrize("is_deferred", [True, False])
def test_a_signal_in_the_middle_of_a_message(is_deferred, caplog, capsys):
    caplog.set_level(logging.INFO, "craft_jax")
    raw = _SignalsWhileWriting()
    handler = logging.StreamHandler(io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8"))
    logger = logging.getLogger("craft_jax")
    logger.addHandler(handler)
    try:
        with process.stop_signals() as asked:
            stops = contextlib.nullcontext() if is_deferred else pytest.raises(StoppedError)
            if is_deferred:
                asked.defer()
            with stops:
                logger.warning("a step")
            deadline = time.monotonic() + 10
            while is_deferred and b"SIGTERM received" not in raw.written:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        logger.removeHandler(handler)
    assert asked.exit_code == 75
    assert is_deferred == (b"a step" in raw.written)
    assert "Traceback" not in capsys.readouterr().err


def test_an_earlier_handler_is_called_too():
    seen = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with process.stop_signals() as asked:
            asked.defer()
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, old)
    assert seen == [signal.SIGTERM]


@pytest.mark.parametrize(("second", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_second_signal_ends_the_process_in_the_middle_of_compiled_code(tmp_path, second, code):
    script = (
        "import os, signal, threading, time\n"
        "from craft_jax import runtime\n"
        "with runtime.stop_signals() as asked:\n"
        "    asked.defer()\n"
        "    def press():\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(0.5)\n"
        f"        os.kill(os.getpid(), signal.{second})\n"
        "    threading.Thread(target=press).start()\n"
        "    import jax, jax.numpy as jnp\n"
        "    while True:\n"
        "        jnp.linalg.svd(jnp.ones((1500, 1500)))[0].block_until_ready()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code
    assert "stopped at once" in done.stderr


def test_devices_in_words():
    assert process.devices_in_words() == "8 cpu devices"


def test_keeping_freed_memory_does_no_harm():
    process.keep_freed_memory()
    process.return_freed_memory()


COMPILE = """
import jax
from craft_jax import runtime
runtime._CACHE_SECONDS = 0.0
runtime.keep_compiled()
print(jax.config.jax_compilation_cache_dir or "none")
print(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((8, 8))))
"""


def compiled_in(home, **more):
    env = environment() | {"XDG_CACHE_HOME": str(home), "JAX_COMPILATION_CACHE_DIR": ""} | more
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILE],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    folder, value = done.stdout.split()
    assert value == "512.0"
    return folder


def test_compiled_programs_are_kept_for_their_owner_alone(tmp_path):
    folder = compiled_in(tmp_path)
    assert folder.startswith(str(tmp_path / "craft_jax/xla-"))
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    first = {file.name: file.read_bytes() for file in _files(folder)}
    assert first
    os.chmod(folder, 0o755)
    assert compiled_in(tmp_path) == folder
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert {file.name: file.read_bytes() for file in _files(folder)} == first
    for file in _files(folder):  # As after a kill in the middle of a write.
        file.write_bytes(file.read_bytes()[:20])
    compiled_in(tmp_path)


def test_where_compiled_programs_cannot_be_kept(tmp_path):
    (tmp_path / "file").write_text("")
    assert compiled_in(tmp_path / "file") == "none"
    assert compiled_in("/proc/nowhere") == "none"
    assert compiled_in(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false") == "none"
    own = tmp_path / "own"
    assert compiled_in(tmp_path, JAX_COMPILATION_CACHE_DIR=str(own)) == str(own)
    folder = compiled_in(tmp_path)
    for file in _files(folder):
        file.unlink()
    os.rmdir(folder)
    os.symlink(tmp_path, folder)  # Another may have put it there.
    assert compiled_in(tmp_path) == "none"


def test_old_programs_are_removed(tmp_path):
    for number in range(5):
        file = tmp_path / str(number)
        file.write_bytes(bytes(10))
        os.utime(file, (1000 + number, 1000 + number))
    process._keep_newest(tmp_path, 25)
    assert sorted(os.listdir(tmp_path)) == ["3", "4"]


def _files(folder):
    return [path for path in Path(folder).iterdir() if path.is_file()]
