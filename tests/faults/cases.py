"""The fault tests: each case breaks something many times and counts what was survived.

A case is a generator: it yields after each trial that kept every promise, and raises `Lost` for one
that did not. The names are those of docs/reliability.md.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.harness import ROOT, Child, Lab, Lost, damage, files, need, small_files

Trials = Iterator[None]
CASES: dict[str, tuple[str, Callable[[Lab], Trials]]] = {}
# What is also tried in CI, with fewer trials: the rest repeats it in other places.
QUICK = "A1 A2 A5 B1 B2 C1 C1b C2 D1 D3 F2 F6 I2 M1 M2".split()


def case(name: str, title: str) -> Callable[[Callable[[Lab], Trials]], Callable[[Lab], Trials]]:
    """Registers a case."""

    def register(function: Callable[[Lab], Trials]) -> Callable[[Lab], Trials]:
        CASES[name] = title, function
        return function

    return register


# A. Crashes.


@case("A1", "kill -9 around a checkpoint, in the foreground and in the background")
def kills_around_saves(lab: Lab) -> Trials:
    reference, kills = lab.reference(), 5 if lab.is_quick else 50
    done = 0
    while done < kills:
        name = lab.name()
        background = done % 2 == 0
        while done < kills:
            child = lab.start(name, checkpoint__background=background)
            folder = lab.run(name) / "checkpoints"
            seen, wanted = set(), lab.rng.randint(1, 2)

            def saving(folder=folder, seen=seen, wanted=wanted) -> bool:
                seen |= {p.name for p in folder.glob(".*.tmp-*")} if folder.is_dir() else set()
                return len(seen) >= wanted

            if not child.until(saving):
                child.wait().must(0)
                break
            time.sleep(lab.rng.uniform(0, 0.25))
            child.kill()
            done += 1
            yield
        lab.train(name, checkpoint__background=background).must(0)
        lab.same(name, reference)
        lab.tidy(name)
    yield


@case("A2", "kill -9 at each point of a save")
def kills_at_points(lab: Lab) -> Trials:
    reference = lab.reference()
    points = ("before_commit", "mid_gc", "begin", "mid_write", "after_commit")
    for point in points[: 2 if lab.is_quick else None]:
        name = lab.name()
        lab.train(name, fault=f"ckpt.{point}:2:kill9")
        again = lab.train(name).must(0)
        if point == "before_commit":
            words = "resuming from step 5", "step 10 was incomplete and has been removed"
            need(all(word in again.said for word in words), again.said)
        lab.same(name, reference)
        lab.tidy(name)
        yield


@case("A3", "kill -9 while an old checkpoint is removed, then damage to the newer ones")
def kill_while_removing(lab: Lab) -> Trials:
    reference, name = lab.reference(), lab.name()
    lab.train(name, fault="ckpt.mid_gc:1:kill9")
    store = lab.store(name)
    need(len(store.steps()) == 2, f"checkpoints {store.steps()}")
    damage(store.folder / str(store.latest()) / "meta.json", "half", lab.rng)
    lab.train(name).must(0, "falling back to step")
    lab.same(name, reference)
    yield


@case("A5", "junk among the checkpoints")
def junk(lab: Lab) -> Trials:
    reference, name = lab.reference(), lab.name()
    lab.train(name, fault="ckpt.after_commit:3:kill9")
    folder = lab.store(name).folder
    for junk in ("19", "-5", "best", "4.orbax-checkpoint-tmp", ".30.tmp-99"):
        (folder / junk).mkdir()
    (folder / "12").write_text("", encoding="utf-8")
    shutil.copytree(folder / "15", folder / "18")
    (folder / "18" / "MANIFEST.json").unlink()
    shutil.copytree(folder / "15", folder / "33")
    said = lab.train(name).must(0, "resuming from step 15", "falling back to step 15").said
    for ignored in ("19", "-5", "best", "12"):
        need(f"{folder / ignored} is no checkpoint" in said, said)
        need((folder / ignored).exists(), f"{ignored} was touched")
    need(not (folder / ".30.tmp-99").exists(), "what is half-written stays")
    lab.same(name, reference)
    yield


# B. Signals.


def _stopped(lab: Lab, child: Child, name: str, code: int = 75) -> int:
    """Waits for a run that was told to stop; returns the step that it saved."""
    start = time.monotonic()
    ended = child.wait().must(code, "everything is saved")
    need(time.monotonic() - start < 8, f"took {time.monotonic() - start:.1f} s to stop")
    status = lab.status(name)
    need(status["state"] in ("preempted", "interrupted"), status)
    need(status["exit_code"] == code, status)
    step = lab.store(name).latest()
    need(step == status["step"], f"checkpoint {step}, status {status}")
    need(f"stopped at step {step} " in ended.said, ended.said)
    return step


@case("B1", "SIGTERM in the middle of a run")
def preempted(lab: Lab) -> Trials:
    reference = lab.reference()
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    for number in numbers[: 1 if lab.is_quick else None]:
        name = lab.name()
        child = lab.start(name, training__checkpoint_every=1000, fault="step:9:sleep=1")
        child.until(lambda child=child: "step 7/40" in child.said)
        child.signal(number)
        _stopped(lab, child, name, 130 if number == signal.SIGINT else 75)
        lab.train(name).must(0)
        lab.same(name, reference)
        yield


@case("B2", "SIGTERM while it compiles, evaluates, saves, waits for data; first and last step")
def preempted_anywhere(lab: Lab) -> Trials:
    reference = lab.reference()
    for fault, words in (
        ("eval:2:sleep=2", "step 20/40"),
        ("ckpt.mid_write:3:sleep=2", "step 9/40"),
        ("ckpt.begin:2:sleep=2", "step 9/40"),
        ("data:12:sleep=3", "step 9/40"),
    )[:: 3 if lab.is_quick else 1]:
        name = lab.name()
        child = lab.start(name, fault=fault)
        child.until(lambda child=child, words=words: words in child.said)
        time.sleep(0.7)
        child.signal(signal.SIGTERM)
        _stopped(lab, child, name)
        lab.train(name).must(0)
        lab.same(name, reference)
        yield
    for fault, words in (
        ("start:1:sleep=3", ""),
        ("data:1:sleep=5", "batch "),
        ("compile:1:sleep=3", "batch "),
    )[2 if lab.is_quick else 0 :]:
        name = lab.name()
        child = lab.start(name, fault=fault)
        child.until(lambda child=child, words=words: words in child.said)
        time.sleep(0.5 if words else 3.5)
        child.signal(signal.SIGTERM)
        child.wait().must(75)
        need(lab.store(name).latest() is None, "there was nothing to save")
        lab.train(name).must(0)
        lab.same(name, reference)
        yield
    name = lab.name()
    child = lab.start(name, fault="step:40:sleep=2")
    child.until(lambda: "step 38/40" in child.said)
    time.sleep(0.5)
    child.signal(signal.SIGTERM)
    child.wait().must(0)
    lab.same(name, reference)
    yield


@case("B3", "a second signal, SIGHUP without a terminal")
def pressed_twice(lab: Lab) -> Trials:
    reference = lab.reference()
    for second, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        name = lab.name()
        child = lab.start(name, fault="step:13:sleep=20")
        child.until(lambda child=child: "step 11/40" in child.said)
        time.sleep(0.5)
        child.signal(signal.SIGTERM)
        time.sleep(0.6)
        start = time.monotonic()
        child.signal(second)
        need(child.wait().code == code, "another exit code")
        need(time.monotonic() - start < 2, "not at once")
        lab.train(name).must(0, "resuming from step 10")
        lab.same(name, reference)
        yield
    name = lab.name()
    child = lab.start(name, fault="step:9:sleep=1")
    child.until(lambda: "step 7/40" in child.said)
    child.signal(signal.SIGHUP)
    child.wait().must(0)
    lab.same(name, reference)
    yield


@case("B7", "a step that never ends: stacks and exit 76; the launcher goes on")
def stalled(lab: Lab) -> Trials:
    reference, name = lab.reference(), lab.name()
    options = {"training__stall_seconds": 2, "fault": "step:17:sleep=60"}
    ended = lab.train(name, **options)
    need(ended.code == 76, ended.said)
    need("no progress for" in ended.said and "most recent call first" in ended.said, ended.said)
    need(lab.status(name)["state"] == "stalled", lab.status(name))
    lab.train(name, training__stall_seconds=2).must(0, "resuming from step 15")
    lab.same(name, reference)
    yield
    name = lab.name()
    env = lab.environment(CRAFT_FAULT="step:23:kill9")
    launch = [sys.executable, "-m", "craft_jax.launch", "--backoff=0.1", "--"]
    child = Child([*launch, *lab.words(name)], env, lab.folder)
    ended = child.wait()
    need(ended.code == 0, ended.said)
    need("killed by SIGKILL" in ended.said, ended.said)
    lab.same(name, reference)
    yield


# C. Damage.


def _damage_in_process(lab: Lab, kinds: str, trials: int | None) -> Trials:
    """Tries damages one after the other in one process, which imports JAX once."""
    base = lab.reference(training__num_steps=20)
    words = [sys.executable, "-m", "tests.faults.damages", str(lab.folder), base, kinds]
    words += [str(trials)] if trials else []
    ended = Child(words, lab.environment(), lab.folder).wait(1800)
    for _ in range(ended.said.count("survived")):
        yield
    need(ended.code == 0, ended.said[-3000:])


@case("C1", "each file of the newest checkpoint deleted, emptied, halved, one bit flipped")
def damaged(lab: Lab) -> Trials:
    yield from _damage_in_process(lab, "delete,empty,half,flip", 4 if lab.is_quick else None)


@case("C1b", "one flipped bit in any file of the newest checkpoint")
def flipped(lab: Lab) -> Trials:
    yield from _damage_in_process(lab, "flip", 4 if lab.is_quick else 100)


@case("C2", "every checkpoint damaged: refused, never begun again")
def all_damaged(lab: Lab) -> Trials:
    for kind in ("flip",) if lab.is_quick else ("flip", "delete"):
        name = lab.copy(lab.reference())
        for path in sorted(lab.store(name).folder.glob("*/meta.json")):
            damage(path, kind, lab.rng)
        for _ in range(2):
            said = lab.train(name, training__num_steps=60).must(74).said
            need(said.count("step 40: meta.json") == 1 and "resume=none" in said, said)
        again = lab.train(name, "--config.checkpoint.resume=none").must(0)
        need("the checkpoint is set aside" in again.said, again.said)
        lab.same(name, lab.reference())
        yield


@case("C3", "a checkpoint of another model, optimizer or dtype")
def another_model(lab: Lab) -> Trials:
    name = lab.copy(lab.reference())
    for field, value in (
        ("model.num_layers", 3),
        ("model.d_model", 32),
        ("model.bias", False),
        ("optim.clip_norm", "none"),
        ("data.tokenizer", "byte"),
        ("training.precision", "bfloat16"),
    ):
        change = {field.replace(".", "__"): value}
        said = lab.train(name, **change).must(78).said
        need(said.count("\n") == 1 and f"config error: {field}=" in said, said)
        yield
    lab.train(name).must(0, "is finished")


@case("C5", "verify finds a flipped bit in any file")
def verified(lab: Lab) -> Trials:
    name = lab.copy(lab.reference())
    lab.command("verify", f"--run={lab.run(name)}").must(0, "whole")
    paths = files(lab.store(name).folder / "40")
    for path in lab.rng.sample(paths, 3 if lab.is_quick else 12):
        whole = path.read_bytes()
        damage(path, "flip", lab.rng)
        lab.command("verify", f"--run={lab.run(name)}").must(70, "step 40: damaged: ")
        path.write_bytes(whole)
        yield


# D. Disks.


@case("D1", "no room for a checkpoint: training goes on, and halts at the third in a row")
def no_room(lab: Lab) -> Trials:
    name = lab.name()
    said = lab.train(name, limit=small_files(100_000)).must(74).said
    words = "checkpoint at step 5 failed: ", "; training goes on", "checkpoint at step 15 failed"
    need(all(word in said for word in words), said)
    need(lab.status(name)["exit_code"] == 74, lab.status(name))
    lab.tidy(name)
    lab.train(name).must(0)
    lab.same(name, lab.reference())
    yield
    name = lab.name()
    lab.train(name, fault="ckpt.after_commit:2:kill9")
    said = lab.train(name, limit=small_files(100_000)).must(74, "still safe at step 10").said
    need(lab.store(name).steps() == [5, 10], "the earlier ones are not as they were")
    lab.train(name).must(0, "resuming from step 10")
    lab.same(name, lab.reference())
    yield
    if not lab.is_quick and (tmpfs := _tmpfs(lab)) is not None:
        yield from _full_disk(lab, tmpfs)


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


@case("D2", "the last checkpoint cannot be written")
def last_save_fails(lab: Lab) -> Trials:
    name = lab.name()
    options = {"training__checkpoint_every": 0, "training__eval_every": 0}
    said = lab.train(name, limit=small_files(100_000), **options).must(74).said
    need("checkpoint at step 40 failed" in said, said)
    need(lab.status(name)["state"] == "failed", lab.status(name))
    yield


@case("D3", "a checkpoint fails once, and the next one succeeds in the same process")
def heals(lab: Lab) -> Trials:
    name = lab.name()
    said = lab.train(name, fault="ckpt.before_commit:2:raise").must(0).said
    need("checkpoint at step 10 failed" in said and "step 15: checkpoint saved" in said, said)
    lab.same(name, lab.reference())
    lab.tidy(name)
    yield


@case("D4", "outputs that cannot be written: exit 73 before anything is compiled")
def unwritable(lab: Lab) -> Trials:
    file = lab.folder / "a_file"
    file.write_text("", encoding="utf-8")
    for place in (file, file / "below", Path("/proc/nowhere")):
        words = lab.words("x", f"--workdir={place}")
        ended = Child(words, lab.environment(), lab.folder).wait().must(73, "cannot write")
        need(ended.seconds < 5, f"took {ended.seconds:.1f} s")
        need(ended.said.count("\n") == 1, ended.said)
        yield


# F. The same again.


@case("F1", "the same command twice")
def twice(lab: Lab) -> Trials:
    name = lab.name()
    lab.train(name).must(0)
    lab.same(name, lab.reference())
    yield


@case("F2", "stopped after any step, and continued")
def any_step(lab: Lab) -> Trials:
    reference = lab.reference()
    steps = [7, 39] if lab.is_quick else range(1, 40)
    for step in steps:
        name = lab.name()
        fault = f"step:{step}:term"  # Counts from the second step of a process.
        code = lab.train(name, fault=fault).code
        need(code in (75, 0), f"exit code {code}")
        lab.train(name).must(0)
        lab.same(name, reference)
        yield


@case("F3", "stopped around the end of an epoch")
def epochs(lab: Lab) -> Trials:
    changes = {"data__seq_len": 32, "data__batch_size": 64, "training__eval_every": 0}
    reference = lab.reference(**changes)
    log = next((lab.workdir / "logs").glob("*.log")).parent
    texts = [p.read_text(encoding="utf-8") for p in log.glob("*.log")]
    epoch = min(int(n) for t in texts for n in re.findall(r"an epoch is (\d+) steps", t))
    need(2 * epoch < 40, f"an epoch has {epoch} steps")
    steps = sorted({k * epoch + d for k in (1, 2) for d in (-2, -1, 0)})
    for step in steps[:2] if lab.is_quick else steps:
        name = lab.name()
        lab.train(name, fault=f"step:{step}:term", **changes).must(75)
        lab.train(name, **changes).must(0)
        lab.same(name, reference)
        yield


@case("F4", "stopped with gradients of several micro-batches")
def accumulated(lab: Lab) -> Trials:
    changes = {"training__accumulate": 4}
    for step in (6,) if lab.is_quick else (6, 13, 38):
        name = lab.name()
        lab.train(name, fault=f"step:{step}:term", **changes).must(75)
        lab.train(name, **changes).must(0)
        lab.same(name, lab.reference(**changes))
        yield


@case("F5", "dropout after a resume: the same masks, and they matter")
def dropout(lab: Lab) -> Trials:
    other = lab.reference(model__dropout=0.0)
    name = lab.name()
    lab.train(name, fault="step:9:term").must(75)
    lab.train(name).must(0)
    lab.same(name, lab.reference())
    ours, without = lab.exact(name), lab.exact(other)
    need(ours[20]["batch_md5"] == without[20]["batch_md5"], "other batches")
    need(ours[20]["loss_hex"] != without[20]["loss_hex"], "dropout changes nothing")
    yield


@case("F6", "any number of worker processes and batches ahead, also changed on resume")
def workers(lab: Lab) -> Trials:
    reference = lab.reference()
    for count, ahead in ((2, 1), (1, 8), (0, 0), (3, 8))[: 1 if lab.is_quick else None]:
        name = lab.name()
        options = {"data__workers": count, "data__prefetch": ahead}
        lab.train(name, fault="step:11:term", **options).must(75)
        lab.train(name, data__workers=(count + 1) % 4, data__prefetch=2).must(0)
        lab.same(name, reference)
        yield


@case("F7", "data that has changed: refused, and named")
def changed_data(lab: Lab) -> Trials:
    name = lab.copy(lab.reference())
    for field, value in (
        ("training.seed", 1),
        ("data.batch_size", 16),
        ("data.seq_len", 16),
        ("data.tokenizer", "byte"),
        ("data.val_fraction", 0.2),
    ):
        change = {field.replace(".", "__"): value}
        lab.train(name, training__num_steps=60, **change).must(78, f"{field}={value} differs")
        yield
    before = lab.text.read_text(encoding="utf-8")
    try:
        lab.text.write_text(before + "the cat sees a dog\n", encoding="utf-8")
        lab.train(name, training__num_steps=42).must(78, f"data.path={lab.text}: the data of run")
        lab.train(name, training__num_steps=42, data__allow_change=True).must(0, "counted from 0")
    finally:
        lab.text.write_text(before, encoding="utf-8")
    yield


@case("F8", "evaluating, saving and sampling more or less often changes no number")
def looking(lab: Lab) -> Trials:
    theirs = lab.exact(lab.reference())
    for changes in (
        {"training__eval_every": 1, "training__checkpoint_every": 1, "training__sample_every": 7},
        {"training__eval_every": 0, "training__checkpoint_every": 0, "training__log_every": 100},
    ):
        name = lab.name()
        lab.train(name, **changes).must(0)
        need(lab.exact(name) == theirs, "other losses")
        need(lab.leaves(name) == lab.leaves(lab.reference()), "another state")
        yield


@case("F9", "a longer run: the learning rates of both schedules are said")
def longer(lab: Lab) -> Trials:
    name = lab.copy(lab.reference())
    said = lab.train(name, training__num_steps=50).must(0).said
    need(re.search(r"schedule horizon changed 40 -> 50, lr at step 41 goes \S+ -> \S+", said), said)
    yield


@case("F12", "fewer cores: said, and nearly the same losses")
def cores(lab: Lab) -> Trials:
    if not shutil.which("taskset") or len(os.sched_getaffinity(0)) < 2:
        return
    name = lab.name()
    lab.train(name, fault="step:19:term").must(75)
    core = str(min(os.sched_getaffinity(0)))
    said = lab.train(name, prefix=("taskset", "-c", core)).must(0).said
    need(re.search(r"not bit-exact: cpu cores \d+ -> 1", said), said)
    ours, theirs = lab.exact(name), lab.exact(lab.reference())
    for step in ours:
        pair = [float.fromhex(run[step]["loss_hex"]) for run in (ours, theirs)]
        need(abs(pair[0] - pair[1]) < 1e-4, f"step {step}: {pair}")
    yield


# I to N: what pytest tests, in full.


def _pytest(*words: str) -> Callable[[Lab], Trials]:
    def run(lab: Lab) -> Trials:
        command = [sys.executable, "-m", "pytest", "-q", "-n2", "--no-header", *words]
        env = lab.environment(CRAFT_FAULTS_FULL="" if lab.is_quick else "1")
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
        counts = {w: int(n) for n, w in re.findall(r"(\d+) (passed|failed|errors?)", done.stdout)}
        for _ in range(counts.get("passed", 0)):
            yield
        if done.returncode:
            raise Lost(done.stdout[-3000:] + done.stderr[-1000:])

    return run


PYTEST = {
    "I1": ("workers that are killed, fail, or leave with any code", "data/test_workers.py"),
    "I4": ("every bad file", "data/test_bad_files.py data/test_sources.py"),
    "J1": ("J1 to J5: every config mistake, one line", "test_config.py test_main.py"),
    "J8": ("random changes of single fields", "test_config_fuzz.py"),
    "K1": ("K1 to K3: weights that attack", "interop/test_bad_input.py interop/files"),
    "K8": ("no load path runs code", "test_security.py"),
    "L2": ("ids out of range", "data/test_cache.py"),
    "N1": ("odd prompts and options", "commands/test_generate.py test_generation.py"),
}
for _name, (_title, _words) in PYTEST.items():
    CASES[_name] = _title, _pytest(*(f"tests/{word}" for word in _words.split()))


@case("I2", "kill -9 of a trainer: its workers end")
def orphans(lab: Lab) -> Trials:
    for _ in range(1 if lab.is_quick else 5):
        before = set(os.listdir("/dev/shm"))
        name = lab.name()
        child = lab.start(name, data__workers=2, fault="step:9:sleep=5")
        child.until(lambda child=child: "step 7/40" in child.said)
        need(len(_children(child.process.pid)) >= 2, "there are no workers")
        os.kill(child.process.pid, signal.SIGKILL)
        child.wait()
        need(set(os.listdir("/dev/shm")) <= before, "shared memory is left behind")
        lab.train(name, data__workers=2).must(0)
        lab.same(name, lab.reference())
        yield


def _children(pid: int) -> list[str]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [child for task in tasks for child in task.read_text().split()]


@case("L1", "another tokenizer, in training and in sampling")
def another_tokenizer(lab: Lab) -> Trials:
    name = lab.copy(lab.reference())
    theirs = lab.store(name).tokenizer_file(40)
    other = lab.folder / "other.json"
    other.write_text(theirs.read_text(encoding="utf-8").replace('"t"', '"Z"'), encoding="utf-8")
    said = lab.command("generate", f"--run={name}", f"--tokenizer={other}").must(78).said
    need(said.count("digest") == 2, said)
    yield
    mine = lab.folder / "mine.json"
    shutil.copy(theirs, mine)
    name = lab.name()
    lab.train(name, data__tokenizer=mine, training__num_steps=5).must(0)
    text = mine.read_text(encoding="utf-8")
    first, second = re.findall(r'"([a-z])": (\d+)', text)[:2]
    swapped = text.replace(f'"{first[0]}": {first[1]},', f'"{first[0]}": {second[1]},')
    swapped = swapped.replace(f'"{second[0]}": {second[1]},', f'"{second[0]}": {first[1]},', 1)
    mine.write_text(swapped, encoding="utf-8")
    said = lab.train(name, data__tokenizer=mine, training__num_steps=8).must(78).said
    need(said.count("digest") >= 1 and str(mine) in said, said)
    yield


# M. Neighbours and surroundings.


@case("M1", "two trainers on one run: the second ends with 69 in less than 3 s")
def two_trainers(lab: Lab) -> Trials:
    reference = lab.reference()
    for _ in range(1 if lab.is_quick else 3):
        name = lab.name()
        child = lab.start(name, fault="step:13:sleep=8")
        child.until(lambda child=child: "step 11/40" in child.said)
        second = lab.train(name).must(69, f"in use by process {child.process.pid} on host")
        need(second.seconds < 3, f"took {second.seconds:.1f} s")
        need(second.said.count("\n") == 1, second.said)
        child.wait().must(0)
        lab.same(name, reference)
        yield


@case("M1b", "two new trainers of one name at the same moment")
def two_at_once(lab: Lab) -> Trials:
    for _ in range(1 if lab.is_quick else 4):
        name = lab.name()
        children = [lab.start(name) for _ in range(2)]
        codes = sorted(child.wait().code for child in children)
        need(codes in ([0, 69], [0, 0]), f"exit codes {codes}")
        lab.same(name, lab.reference())
        yield


@case("M2", "the lock of a process that was killed")
def stale_lock(lab: Lab) -> Trials:
    name = lab.name()
    child = lab.start(name, fault="step:9:sleep=5")
    child.until(lambda: "step 7/40" in child.said)
    child.kill()
    rows = lab.command("runs").must(0).said
    need(re.search(rf"^{name}\s+killed\s+\d+/40", rows, re.M), rows)
    lab.train(name).must(0)
    lab.same(name, lab.reference())
    yield


@case("M3", "evaluating and sampling while the trainer saves and removes")
def readers(lab: Lab) -> Trials:
    name = lab.name()
    child = lab.start(name, training__checkpoint_every=1, fault="step:39:sleep=20")
    child.until(lambda: (lab.store(name).latest() or 0) >= 2)
    child.until(lambda: "step 38/40" in child.said)
    for _ in range(1 if lab.is_quick else 3):
        lab.command("evaluate", f"--run={name}").must(0)
        lab.command("generate", f"--run={name}", "--max_new_tokens=3").must(0)
        lab.command("verify", f"--run={name}").must(0)
        yield
    child.wait().must(0)


@case("M4", "runs without a name that begin in the same second")
def same_second(lab: Lab) -> Trials:
    words = [w for w in lab.words("x", training__num_steps=2) if not w.startswith("--run=")]
    before = set((lab.workdir / "models").iterdir())
    children = [Child(words, lab.environment(), lab.folder) for _ in range(3)]
    for child in children:
        child.wait().must(0)
    need(len(set((lab.workdir / "models").iterdir()) - before) == 3, "a run is missing")
    yield


@case("M5", "clocks and places of the world that change between lives")
def clocks(lab: Lab) -> Trials:
    name = lab.name()
    lab.train(name, fault="step:19:term", env={"TZ": "Pacific/Kiritimati"}).must(75)
    old = time.time() - 3 * 86400
    for path in lab.run(name).rglob("*"):
        os.utime(path, (old, old))
    lab.train(name, env={"TZ": "America/Adak"}).must(0)
    lab.same(name, lab.reference())
    need(lab.status(name)["updated"].endswith("Z"), lab.status(name))
    yield


@case("M6", "locales, pipes, missing HOME, odd folders")
def surroundings(lab: Lab) -> Trials:
    for env in (
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "tr_TR.UTF-8", "COLUMNS": "40"},
    ):
        name = lab.name()
        lab.train(name, env=env).must(0)
        lab.same(name, lab.reference())
        yield
    name = lab.name()
    home = lab.environment()
    home.pop("HOME", None)
    Child(lab.words(name), home, lab.folder).wait().must(0)
    lab.same(name, lab.reference())
    yield
    name = lab.name()
    shell = subprocess.run(
        ["bash", "-c", '"$@" 2>stderr.txt | head -1', "bash", *lab.words(name)],
        env=lab.environment(), cwd=lab.folder, check=False, capture_output=True, text=True,
    )  # fmt: skip
    errors = (lab.folder / "stderr.txt").read_text(encoding="utf-8")
    need(not errors and shell.stdout.count("\n") == 1, errors)
    deadline = time.monotonic() + 30
    while lab.status(name).get("state") != "done":
        need(time.monotonic() < deadline, "the run ended with its reader")
        time.sleep(0.1)
    lab.same(name, lab.reference())
    yield
    odd = lab.folder / ("a space, \u00fcml\u00e4uts and \u6f22\u5b57 " + "x" * 150)
    odd.mkdir()
    words = lab.words("mine", "--workdir=here and there")
    Child(words, lab.environment(), odd).wait().must(0)
    need((odd / "here and there/models/mine/checkpoints/40").is_dir(), "no checkpoint there")
    yield
