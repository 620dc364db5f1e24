import errno
import os
import shutil

import pytest

from interop.errors import DiskSpaceError, OutputExistsError
from interop.files import atomic


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("is_folder", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_whole_or_absent(tmp_path, is_folder, overwrite):
    out = tmp_path / "deep" / "out"

    def write(text):
        with atomic.output(out, overwrite=overwrite) as place:
            if is_folder:
                place.mkdir()
            (place / "file" if is_folder else place).write_text(text)
            assert not out.exists() or (out / "file" if is_folder else out).read_text() != text

    write("one")
    assert (out / "file" if is_folder else out).read_text() == "one"
    assert names(out.parent) == ["out"]
    if overwrite:
        write("two")
        assert (out / "file" if is_folder else out).read_text() == "two"
    else:
        with pytest.raises(OutputExistsError, match="nothing was overwritten"):
            write("two")
        assert (out / "file" if is_folder else out).read_text() == "one"
    assert names(out.parent) == ["out"]


def fail(out, error, num_bytes=0):
    with atomic.output(out, overwrite=False, num_bytes=num_bytes) as place:
        place.mkdir()
        (place / "half").write_text("x")
        raise error


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
def test_nothing_is_left_behind(tmp_path, error):
    with pytest.raises(type(error)):
        fail(tmp_path / "a" / "b" / "out", error)
    assert names(tmp_path) == []


def test_a_full_disk_is_reported(tmp_path):
    with pytest.raises(DiskSpaceError, match="No space left") as caught:
        fail(tmp_path / "out", OSError(errno.ENOSPC, "full"))
    assert caught.value.exit_code == 74 and names(tmp_path) == []
    with pytest.raises(DiskSpaceError, match="free"):
        fail(tmp_path / "out", AssertionError("nothing may be written"), num_bytes=1 << 60)


def test_leftovers_of_dead_processes_are_removed_and_moved_outputs_restored(tmp_path):
    dead = 2**22 - 3
    (tmp_path / f"out.tmp-{dead}").mkdir()
    alive = tmp_path / f"out.tmp-{os.getppid()}"
    alive.mkdir()
    old = tmp_path / f"out.old-{dead}"
    old.write_text("old")
    with (
        pytest.raises(OutputExistsError),
        atomic.output(tmp_path / "out", overwrite=False) as place,
    ):
        place.write_text("new")
    assert names(tmp_path) == ["out", alive.name]
    assert (tmp_path / "out").read_text() == "old"


def test_without_exchange_of_the_system(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic.atomic, "exchange", lambda a, b: False)
    for text in ("one", "two"):
        with atomic.output(tmp_path / "out", overwrite=True) as place:
            place.mkdir()
            (place / "file").write_text(text)
    assert (tmp_path / "out" / "file").read_text() == "two"
    assert names(tmp_path) == ["out"]


def test_places_that_cannot_be(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for out, words in [
        (source, "input itself"),
        (source / "inside", "within each other"),
        (tmp_path, "within each other"),
    ]:
        with pytest.raises(OutputExistsError, match=words):
            atomic.check_place(out, [source], overwrite=True)
    with pytest.raises(OutputExistsError, match="exists already"):
        atomic.check_place(tmp_path / "source", [], overwrite=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputExistsError, match="not a writable folder"):
        atomic.check_place(tmp_path / "file" / "out", [], overwrite=False)
    link = tmp_path / "link"
    link.symlink_to(source)
    with pytest.raises(OutputExistsError, match="input itself"):
        atomic.check_place(link, [source], overwrite=True)
    shutil.rmtree(source)
