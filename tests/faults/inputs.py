"""Inputs: workers, files, configs, weights, tokenizers and prompts."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.faults.harness import ROOT, Lab, Lost, Trials, need


def run_tests(words: str) -> Callable[[Lab], Trials]:
    """Returns a case that runs tests below `tests/`, each of them a trial."""

    def run(lab: Lab) -> Trials:
        # Without the project's own options, which leave the number of tests unsaid.
        command = [sys.executable, "-m", "pytest", "-q", "-n2", "-o", "addopts="]
        command += [f"tests/{word}" for word in words.split()]
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
    "E6": ("bad micro-batches, and float16's scale by itself", "training/test_step.py"),
    "E8": ("E8, E9: plateaus, spikes and levels by a table of cases", "training/test_plateau.py"),
    "G4": ("what is restored lies where it belongs, and is used up", "checkpoint/test_store.py"),
    "I1": ("workers that are killed, fail, or leave with any code", "data/test_workers.py"),
    "I4": ("every bad file", "data/sources/test_bad_files.py data/sources/test_files.py"),
    "J1": ("J1 to J5: every config mistake, one line", "test_config.py test_main.py"),
    "J8": ("random changes of single fields", "test_config_fuzz.py"),
    "K1": ("K1 to K3: weights that attack", "interop/test_bad_input.py interop/files"),
    "K8": ("no load path runs code", "test_security.py"),
    "L2": ("ids out of range", "data/cache/test_token_cache.py"),
    "N1": ("odd prompts and options", "commands/test_generate.py generation/test_generator.py"),
}


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
