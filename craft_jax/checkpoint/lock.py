"""Locks: one process trains in a run's folder at a time, and a checkpoint that is read stays.

Both are `flock`, which the system releases when the process ends, however it ends.
"""

import contextlib
import fcntl
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from craft_jax import outputs
from craft_jax.errors import OutputError, RunInUseError

_NAME = ".lock"


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in a run's folder while the context lasts.

    A missing folder is created, and removed at the end if it is still empty.

    Raises:
      RunInUseError: another process trains in it.
      OutputError: the folder cannot be made or written.
    """
    made: list[Path] = []
    try:
        made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        handle = _open_locked(folder)
    except OSError as error:
        _remove_empty(made)
        raise OutputError(f"cannot write outputs below {folder}: {error}") from error
    with handle:
        with contextlib.suppress(OSError):  # The lock holds without its text on a full disk.
            handle.truncate(0)
            host = os.uname().nodename
            handle.write(f"process {os.getpid()} on host {host} since {outputs.utc_now()}")
            handle.flush()
        try:
            yield
        finally:
            if made and os.listdir(folder) == [_NAME]:
                (folder / _NAME).unlink()
                _remove_empty(made)


def check_free(folder: Path) -> None:
    """Raises RunInUseError if a process trains in a run's folder; does not take the lock."""
    if is_held(folder):
        raise _in_use(folder, (folder / _NAME).read_text(encoding="utf-8", errors="replace"))


def is_held(folder: Path) -> bool:
    """Returns whether a process trains in a run's folder now."""
    try:
        with (folder / _NAME).open(encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _open_locked(folder: Path) -> IO[str]:
    while True:
        handle = (folder / _NAME).open("a+", encoding="utf-8")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The file may have been removed, and made again, between opening and locking it.
            if os.path.samestat(os.fstat(handle.fileno()), os.stat(folder / _NAME)):
                return handle
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read()
            handle.close()
            raise _in_use(folder, holder) from None
        except FileNotFoundError:
            folder.mkdir(parents=True, exist_ok=True)
        except BaseException:
            handle.close()
            raise
        handle.close()


def _in_use(folder: Path, holder: str) -> RunInUseError:
    return RunInUseError(
        f"run {folder.name} is in use by {holder.strip() or 'another process'}; wait for it, or "
        "use another `run`"
    )


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


class Pin:
    """Keeps a checkpoint from being removed while this object exists."""

    def __init__(self, file: Path):
        self.handle = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self.handle)
        with contextlib.suppress(OSError):  # Not every network disk has locks.
            fcntl.flock(self.handle, fcntl.LOCK_SH | fcntl.LOCK_NB)


def pin(file: Path) -> Pin | None:
    """Pins the checkpoint of a manifest; None if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        made = Pin(file)
        if os.path.samestat(os.stat(file), os.fstat(made.handle)):
            return made
    return None


def is_pinned(file: Path) -> bool:
    """Returns whether a process reads the checkpoint of a manifest now."""
    try:
        with file.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
