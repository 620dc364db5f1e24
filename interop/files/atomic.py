"""Atomic outputs: written under a temporary name, synced, and renamed.

An earlier output stays as it was until the new one replaces it in one step. Partial outputs are
removed on failure; those of a killed process, by the next conversion.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from craft_jax.checkpoint import atomic
from interop.errors import DiskSpaceError, OutputExistsError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Overwriting replaces only models: folders with one of these names, files that begin like this.
_OF_MODELS = {"interop_manifest.json", "config.json", "run.json"}
_OF_CHECKPOINTS = (b"", b"PK", b"\x80\x02")


def check_place(
    out: Path, inputs: Sequence[Path], overwrite: bool, *, is_folder: bool = True
) -> None:
    """Checks that an output may be written.

    Args:
      out: a file or a folder.
      inputs: the sources.
      overwrite: whether it may replace an earlier model.
      is_folder: whether the output is a folder, or a checkpoint file.

    Raises:
      OutputExistsError: it exists, cannot be created, or is an input or inside one.
    """
    place = out.resolve()
    for source in inputs:
        other = source.resolve()
        if place == other:
            raise OutputExistsError(f"{out} is the input itself; choose another output")
        if other in place.parents or place in other.parents:
            raise OutputExistsError(
                f"{out} and the input {source} lie within each other; choose another output"
            )
    if os.path.lexists(out) and not overwrite:
        raise OutputExistsError(f"{out} exists already; choose another output, or set `overwrite`")
    if os.path.lexists(out) and not _is_replaceable(out, is_folder):
        kind = "folder" if is_folder else "checkpoint file"
        raise OutputExistsError(
            f"{out} is not an earlier {kind} of a model, so `overwrite` does not replace it; move "
            "it away, or choose another output"
        )
    parent = next(folder for folder in place.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputExistsError(
            f"{out} cannot be created: {parent} is not a writable folder; choose another output"
        )


def _is_replaceable(out: Path, is_folder: bool) -> bool:
    """Returns whether the output is an earlier model, or an empty folder or file."""
    if out.is_symlink() or out.is_dir() != is_folder:
        return False
    if is_folder:
        inside = {path.name for path in out.iterdir()}
        return not inside or bool(inside & _OF_MODELS)
    with out.open("rb") as file:
        return file.read(2) in _OF_CHECKPOINTS


@contextlib.contextmanager
def output(out: Path, *, overwrite: bool, num_bytes: int = 0) -> Iterator[Path]:
    """Yields a temporary path, which is renamed to `out` if no exception leaves the context.

    Args:
      out: a file or a folder; missing parents are created.
      overwrite: whether it may replace an earlier output.
      num_bytes: the size of the output.

    Yields:
      A free path beside `out`, for a file or a folder.

    Raises:
      OutputExistsError: `out` appeared in the meantime, or cannot be created.
      DiskSpaceError: there is no room.
    """
    partial = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    created = _create_parents(out)
    try:
        _remove_leftovers(out)
        atomic.remove(partial)
        free = shutil.disk_usage(out.parent).free
        if num_bytes > free:
            raise DiskSpaceError(
                f"{out} needs {num_bytes:,} bytes, and its disk has {free:,} free; nothing was "
                "written"
            )
        yield partial
        atomic.sync_tree(partial)
        _publish(partial, out, overwrite)
        created = []
    except OSError as error:
        if error.errno in _FULL:
            raise DiskSpaceError(
                f"{out} could not be written: {os.strerror(error.errno)}; nothing of it is left, "
                "and the source is as it was"
            ) from error
        raise
    finally:
        atomic.remove(partial)
        for folder in created:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _create_parents(out: Path) -> list[Path]:
    """Creates missing parents; returns them, innermost first."""
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputExistsError(f"{out} cannot be created: {error}") from error
    return missing


def _publish(partial: Path, out: Path, overwrite: bool) -> None:
    exists = f"{out} was created by another process in the meantime; nothing was overwritten"
    if not overwrite:
        try:
            if partial.is_dir():
                if os.path.lexists(out):
                    raise OutputExistsError(exists)
                partial.rename(out)
            else:
                os.link(partial, out)
        except (FileExistsError, NotADirectoryError) as error:
            raise OutputExistsError(exists) from error
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                raise OutputExistsError(exists) from error
            raise
    elif partial.is_file() and not out.is_dir():
        partial.replace(out)
    elif not os.path.lexists(out):
        partial.rename(out)
    elif not atomic.exchange(partial, out):
        old = out.with_name(f"{out.name}.old-{os.getpid()}")
        out.rename(old)
        partial.rename(out)
        atomic.remove(old)
    atomic.sync(out.parent)


def _remove_leftovers(out: Path) -> None:
    """Removes temporary outputs of dead processes beside `out`; restores an output they moved."""
    pattern = re.compile(re.escape(out.name) + r"\.(tmp|old)-(\d+)")
    for path in out.parent.iterdir():
        found = pattern.fullmatch(path.name)
        if not found or atomic.is_alive(int(found.group(2))):
            continue
        if found.group(1) == "old" and not os.path.lexists(out):
            path.rename(out)
        else:
            atomic.remove(path)
