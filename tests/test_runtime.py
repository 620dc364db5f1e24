import io
import logging
import os
import signal
import sys

import pytest

from craft_jax import runtime


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
    runtime.setup_logging()
    runtime.progress("step 1")
    runtime.progress("step 2 and very much more text")
    logger.info("a message")
    logger.info("hidden", extra=runtime.PLAIN_ONLY)
    runtime.progress("")
    shown = sys.stdout.getvalue()
    line = "step 2 and very muc"
    assert shown == f"step 1\r\x1b[K{line}\r\x1b[Ka message\n{line}\r\x1b[K"


def test_plain_lines_elsewhere(logger, capsys, tmp_path):
    runtime.setup_logging()
    with runtime.log_to(tmp_path / "a.log"):
        runtime.progress("step 1")
        logger.info("plain", extra=runtime.PLAIN_ONLY)
    logger.info("after")
    assert capsys.readouterr().out == "plain\nafter\n"
    assert (tmp_path / "a.log").read_text(encoding="utf-8").endswith(" plain\n")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_signals_are_collected_and_handlers_come_back(number, code):
    before = signal.getsignal(number)
    with runtime.stop_signals() as asked:
        assert asked.exit_code is None
        os.kill(os.getpid(), number)
        assert asked.exit_code == code
        assert signal.getsignal(number) == before  # The second one acts at once.
    assert signal.getsignal(number) == before


def test_devices_in_words():
    assert runtime.devices_in_words() == "8 cpu devices"


def test_keeping_freed_memory_does_no_harm():
    runtime.keep_freed_memory()
