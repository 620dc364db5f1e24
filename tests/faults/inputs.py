"""Inputs: workers that lose their trainer, and another tokenizer."""

import os
import re
import shutil
import signal
from pathlib import Path

from tests.faults.harness import Lab, Trials, need


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
