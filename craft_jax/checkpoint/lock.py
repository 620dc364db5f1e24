"""One process trains in a run's folder at a time.

The lock is `flock` on `.lock` in the folder: it goes when its process does, however that ends.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from craft_jax import outputs
from craft_jax.errors import OutputError, RunInUseError

_NAME = ".lock"


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in a run's folder while the context lasts.

    A folder that is missing is made, and removed at the end if nothing came into it.

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
        with contextlib.suppress(OSError):  # On a full disk: the lock holds without its text.
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
    """Checks that no process trains in a run's folder, without taking its lock.

    Raises:
      RunInUseError: one does.
    """
    if is_held(folder):
        raise _in_use(folder, (folder / _NAME).read_text(encoding="utf-8", errors="replace"))


def is_held(folder: Path) -> bool:
    """Whether a process trains in a run's folder now."""
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
        "use another --run"
    )


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
