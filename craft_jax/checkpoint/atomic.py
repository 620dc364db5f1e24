"""Files and folders that survive a crash: synced to disk, and renamed atomically."""

import contextlib
import ctypes
import os
import shutil
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def sync_tree(path: Path) -> None:
    """Waits until a file, or everything in a folder, is on the disk."""
    if not path.is_dir():
        sync(path)
        return
    for folder, _, names in os.walk(path):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))


def sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exchange(a: Path, b: Path) -> bool:
    """Swaps two paths in one step; returns False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    paths = (os.fsencode(a), os.fsencode(b))
    return renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0


def put_in_place(partial: Path, place: Path, old: Path) -> None:
    """Renames a synced folder to its place; a folder that was there is moved to `old`.

    Where the system can swap paths, the place is never empty in between.
    """
    if not os.path.lexists(place):
        partial.rename(place)
    elif exchange(partial, place):
        partial.rename(old)
    else:
        place.rename(old)
        partial.rename(place)
    sync(place.parent)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def is_alive(pid: int) -> bool:
    """Returns whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
