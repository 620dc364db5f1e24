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
    """Keeps compiled programs in a folder of the user, so that the next start is faster.

    The folder is `craft_jax/xla-...` below `$XDG_CACHE_HOME` (else `~/.cache`), with mode 0700,
    since its files are executed. Its name depends on the features of the processor, for which XLA
    compiles. Above `_CACHE_BYTES` the least recently used files are removed. JAX's own variables
    JAX_COMPILATION_CACHE_DIR and JAX_ENABLE_COMPILATION_CACHE take precedence. Nothing is cached if
    the folder cannot be created, or belongs to another user.
    """
    # JAX warns of a truncated entry, and compiles again.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(home).expanduser() / "craft_jax" / f"xla-{_processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        info = folder.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
            raise PermissionError(f"{folder} belongs to another user")
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
    """Returns a hash of the features of the processor."""
    words = [platform.machine()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        words += [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return hashlib.sha256("".join(words).encode()).hexdigest()[:12]


def keep_newest(folder: Path, limit: int) -> None:
    """Removes the least recently used files of a folder until the others fit a limit."""
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
        with contextlib.suppress(FileNotFoundError):  # Removed by another process.
            yield path, path.stat()
