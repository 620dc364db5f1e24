"""Exports and imports stay small, whatever the size of the model; measured as a whole process."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import environment
from tests.interop.models import make_run, spec

MB = 10**6
BIG = spec(num_layers=16, d_model=480, num_heads=6, d_ff=1920, vocab_size=997)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 180 MB whose largest leaf has 4 MB."""
    return make_run(tmp_path_factory.mktemp("big") / "models" / "run", BIG)


def peak(*words):
    """Runs a command and returns the largest RssAnon seen, in bytes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "interop", *map(str, words)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    largest = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = status.read_text().splitlines()
        largest = max([largest, *(int(n.split()[1]) for n in lines if n.startswith("RssAnon"))])
        time.sleep(0.01)
    assert process.returncode == 0, words
    return largest * 1024


@pytest.mark.soak
@pytest.mark.parametrize("target", ["hf", "nanogpt"])
def test_memory_is_bounded_both_ways(run, tmp_path, target):
    out = tmp_path / "out"
    limits = ("--verify", "bits", "--probe", "none", "--max-memory", "16MB")
    # What the libraries take by themselves; importing needs JAX and Orbax.
    small = make_run(tmp_path / "models" / "small", spec(num_layers=1, d_ff=192))
    base = peak("export", small, tmp_path / "small", "--to", target, *limits)
    assert peak("export", run, out, "--to", target, *limits) < base + 100 * MB
    base = peak("import", tmp_path / "small", tmp_path / "models" / "one", *limits)
    assert peak("import", out, tmp_path / "models" / "new", *limits) < base + 160 * MB
