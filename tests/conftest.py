"""Strict numerics for every test, and the small things that many of them need."""

import importlib.util
import os
from pathlib import Path

# Before jax is imported: several devices, so that sharding is real; and a quarter of the time to
# compile, since a test computes little.
QUICK_COMPILE = "--xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK_COMPILE}"

# Many tests compile the same program, some of them in processes of their own: all workers share a
# cache, which stays for the next run.
ROOT = Path(__file__).parent.parent
_CACHE = ROOT / ".pytest_cache/xla"
_CACHE.mkdir(parents=True, exist_ok=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# What is set up once in a process holds for all tests in it.
os.environ["WANDB_MODE"] = "offline"

# torch's bfloat16 products use instructions that some processors announce and do not have.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import random
import subprocess
import sys
from collections.abc import Callable

import jax
import numpy as np
import pytest

from craft_jax.checkpoint import manifest as manifests
from craft_jax.runtime import compilation_cache

jax.config.update("jax_numpy_rank_promotion", "raise")

_MAX_WORKER_BYTES = 2 << 30
_MAX_CACHE_BYTES = 1 << 30

# A model that compiles in a second.
MICRO = {
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.d_model": 16,
    "model.max_seq_len": 16,
    "data.seq_len": 16,
    "data.batch_size": 8,
    "data.tokenizer": "char",
    "data.val_fraction": 0.1,
    "training.num_steps": 6,
    "training.eval_every": 3,
    "training.checkpoint_every": 3,
    "training.sample_every": 3,
    "training.sample_tokens": 8,
    "training.log_every": 1,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out the tests marked `torch` where torch is not installed, and only those."""
    if importlib.util.find_spec("torch") is None:
        for item in items:
            if item.get_closest_marker("torch"):
                item.add_marker(pytest.mark.skip(reason="torch is not installed"))


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory():
    """Drops compiled programs after a file where they fill the worker."""
    yield
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    if pages * os.sysconf("SC_PAGE_SIZE") > _MAX_WORKER_BYTES:
        jax.clear_caches()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keeps the newest compiled programs for the next run."""
    if not hasattr(session.config, "workerinput"):
        compilation_cache.keep_newest(_CACHE, _MAX_CACHE_BYTES)


def words(count: int, seed: int = 0) -> str:
    """Returns text of sentences that some structure can be learned from."""
    rng = random.Random(seed)
    vocabulary = ["the", "a", "red", "blue", "cat", "dog", "fox", "sees", "finds", "and", "not"]
    text = []
    while len(text) < count:
        text += [*rng.choices(vocabulary, k=rng.randint(3, 8)), "\n"]
    return " ".join(text[:count])


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A file of some 12 kB of text."""
    path = tmp_path / "words.txt"
    path.write_text(words(2500), encoding="utf-8")
    return path


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """An empty place for outputs."""
    return tmp_path / "outputs"


@pytest.fixture
def rng() -> np.random.Generator:
    """Seeded randomness."""
    return np.random.default_rng(0)


@pytest.fixture
def x64():
    """Runs the test with 64-bit types switched on."""
    with jax.enable_x64(True):
        yield


def overrides(values: dict) -> list[str]:
    """Returns config values as command-line words."""
    return [f"--config.{field}={value}" for field, value in values.items()]


def micro(text: Path, **changes: object) -> list[str]:
    """Returns the words that make a config so small that training takes seconds.

    Changes are given with `__` for the dot: `training__num_steps=3`.
    """
    values = MICRO | {"data.path": text}
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return [f"--config={ROOT / 'configs/gpt.py'}", *overrides(values)]


def seal(checkpoint: Path) -> None:
    """Writes the manifest of a checkpoint that a test has changed on purpose anew."""
    manifest = manifests.read(checkpoint)
    (checkpoint / manifests.NAME).unlink()
    manifests.write(checkpoint, manifest.step, manifest.leaves)


@pytest.fixture
def craft(tmp_path: Path, workdir: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs `python -m craft_jax.main` in a process of its own, in an empty folder."""
    here = tmp_path / "here"
    here.mkdir()

    def run(*words: object, **options: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            command(*words, f"--workdir={workdir}"),
            cwd=here,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            **options,
        )

    return run


def command(*words: object) -> list[str]:
    """Returns the command line of `python -m craft_jax.main`."""
    return [sys.executable, "-m", "craft_jax.main", *map(str, words)]


def environment() -> dict[str, str]:
    """Returns the environment of a newcomer: one device, and the checkout on the path."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return env | {"XLA_FLAGS": QUICK_COMPILE} if "XLA_FLAGS" in os.environ else env
