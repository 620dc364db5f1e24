import io
import logging
import sys

import pytest

from craft_jax.runtime.logging import PLAIN_ONLY, log_to, progress, setup_logging


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
    setup_logging()
    progress("step 1")
    progress("step 2 and very much more text")
    logger.info("a message")
    logger.info("hidden", extra=PLAIN_ONLY)
    progress("")
    shown = sys.stdout.getvalue()
    line = "step 2 and very muc"
    assert shown == f"step 1\r\x1b[K{line}\r\x1b[Ka message\n{line}\r\x1b[K"


def test_plain_lines_elsewhere(logger, capsys, tmp_path):
    setup_logging()
    with log_to(tmp_path / "a.log"):
        progress("step 1")
        logger.info("plain", extra=PLAIN_ONLY)
    logger.info("after")
    assert capsys.readouterr().out == "plain\nafter\n"
    assert (tmp_path / "a.log").read_text(encoding="utf-8").endswith(" plain\n")
