"""Disks: full ones, and places that cannot be written."""

import contextlib
import re
import subprocess
from pathlib import Path

from tests.faults.harness import Child, Lab, Trials, need, small_files


def no_room(lab: Lab) -> Trials:
    if not lab.is_quick:
        yield from _from_the_start(lab)
    name = lab.name()
    lab.train(name, fault="ckpt.after_commit:2:kill9")
    lab.train(name, limit=small_files(100_000)).must(74, "still safe at step 10")
    need(lab.store(name).steps() == [5, 10], "the earlier ones are not as they were")
    lab.train(name).must(0, "resuming from step 10")
    lab.same(name, lab.reference())
    yield
    if not lab.is_quick and (tmpfs := _tmpfs(lab)) is not None:
        yield from _full_disk(lab, tmpfs)


def _from_the_start(lab: Lab) -> Trials:
    name = lab.name()
    said = lab.train(name, limit=small_files(100_000)).must(74).said
    words = "checkpoint at step 5 failed: ", "; training goes on", "checkpoint at step 15 failed"
    need(all(word in said for word in words), said)
    need(lab.status(name)["exit_code"] == 74, lab.status(name))
    lab.tidy(name)
    lab.train(name).must(0)
    lab.same(name, lab.reference())
    yield


def _tmpfs(lab: Lab) -> Path | None:
    """Returns a small disk of its own, where disks may be mounted."""
    place = lab.folder / "disk"
    place.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)]
    done = subprocess.run(words, capture_output=True, check=False)
    return place if done.returncode == 0 else None


def _full_disk(lab: Lab, disk: Path) -> Trials:
    """The checkpoints stand on a disk that fills up, and is cleared while the run goes on."""
    try:
        name, reference = lab.name(), lab.reference()
        (disk / "checkpoints").mkdir()
        lab.run(name).mkdir(parents=True)
        (lab.run(name) / "checkpoints").symlink_to(disk / "checkpoints")
        child = lab.start(name, fault="step:12:sleep=1,step:18:sleep=1")
        child.until(lambda: "step 11/40" in child.said)
        ballast = disk / "ballast"
        with ballast.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        failed = r"checkpoint at step 1[05] failed: no space left on .* still safe at step (5|10);"
        child.until(lambda: re.search(failed, child.said))
        ballast.unlink()
        child.wait().must(0, "step 20: checkpoint saved")
        lab.same(name, reference)
        lab.tidy(name)
        yield
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def last_save_fails(lab: Lab) -> Trials:
    name = lab.name()
    options = {"training__checkpoint_every": 0, "training__eval_every": 0}
    said = lab.train(name, limit=small_files(100_000), **options).must(74).said
    need("checkpoint at step 40 failed" in said, said)
    need(lab.status(name)["state"] == "failed", lab.status(name))
    yield


def heals(lab: Lab) -> Trials:
    name = lab.name()
    said = lab.train(name, fault="ckpt.before_commit:2:raise").must(0).said
    need("checkpoint at step 10 failed" in said and "step 15: checkpoint saved" in said, said)
    lab.same(name, lab.reference())
    lab.tidy(name)
    yield


def unwritable(lab: Lab) -> Trials:
    file = lab.folder / "a_file"
    file.write_text("", encoding="utf-8")
    for place in (file, file / "below", Path("/proc/nowhere")):
        words = lab.words("x", f"--workdir={place}")
        ended = Child(words, lab.environment(), lab.folder).wait().must(73, "cannot write")
        need(ended.seconds < 5, f"took {ended.seconds:.1f} s")
        need(ended.said.count("\n") == 1, ended.said)
        yield
