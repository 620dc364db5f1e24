"""Neighbours and surroundings: other processes, clocks, locales, pipes."""

import os
import re
import subprocess
import time

from tests.faults.harness import Child, Lab, Trials, need


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


def two_at_once(lab: Lab) -> Trials:
    for _ in range(1 if lab.is_quick else 4):
        name = lab.name()
        children = [lab.start(name) for _ in range(2)]
        codes = sorted(child.wait().code for child in children)
        need(codes in ([0, 69], [0, 0]), f"exit codes {codes}")
        lab.same(name, lab.reference())
        yield


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


def same_second(lab: Lab) -> Trials:
    words = [w for w in lab.words("x", training__num_steps=2) if not w.startswith("--run=")]
    before = set((lab.workdir / "models").iterdir())
    children = [Child(words, lab.environment(), lab.folder) for _ in range(3)]
    for child in children:
        child.wait().must(0)
    need(len(set((lab.workdir / "models").iterdir()) - before) == 3, "a run is missing")
    yield


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
