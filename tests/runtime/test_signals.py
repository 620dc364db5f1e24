import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from craft_jax.errors import StoppedError
from craft_jax.runtime import signals
from tests.conftest import environment


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_signals_are_collected_and_handlers_come_back(number, code):
    before = signal.getsignal(number)
    with signals.stop_signals() as asked:
        assert not asked.is_set
        asked.defer()
        os.kill(os.getpid(), number)
        assert asked.is_set
        assert asked.exit_code == code
        os.kill(os.getpid(), number)  # So soon after the first it is the same wish.
    assert signal.getsignal(number) == before


def test_a_signal_ends_what_has_nothing_to_save():
    with signals.stop_signals() as asked, pytest.raises(StoppedError, match="SIGTERM") as caught:
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.exit_code == asked.exit_code == 75


def test_a_signal_ends_a_wait():
    with signals.stop_signals() as asked:
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
        with signals.stop_signals() as asked:
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
        with signals.stop_signals() as asked:
            asked.defer()
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, old)
    assert seen == [signal.SIGTERM]


@pytest.mark.parametrize(("second", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_second_signal_ends_the_process_in_the_middle_of_compiled_code(tmp_path, second, code):
    script = (
        "import os, signal, threading, time\n"
        "from craft_jax.runtime.signals import stop_signals\n"
        "with stop_signals() as asked:\n"
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
