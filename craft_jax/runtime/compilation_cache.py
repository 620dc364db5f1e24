"""JAX's persistent compilation cache, in a folder of the user's own."""

import contextlib
import hashlib
import itertools
import logging
import os
import platform
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax


def enable_compilation_cache() -> None:
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
        keep_newest(folder, _CACHE_BYTES)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home.
        logging.getLogger(__name__).debug("compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _CACHE_SECONDS)


_CACHE_BYTES = 1 << 30

_CACHE_SECONDS = 0.1
"""Seconds; programs that compile faster are not cached."""


def _processor() -> str:
    """Returns a word for what the processor can do."""
    words = [platform.machine()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        words += [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return hashlib.sha256("".join(words).encode()).hexdigest()[:12]


def keep_newest(folder: Path, limit: int) -> None:
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
