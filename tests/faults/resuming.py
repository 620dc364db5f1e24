"""The same again: runs that are stopped anywhere, and compared to the bit."""

import os
import re
import shutil

from tests.faults.harness import Lab, Trials, need


def twice(lab: Lab) -> Trials:
    name = lab.name()
    lab.train(name).must(0)
    lab.same(name, lab.reference())
    yield


def any_step(lab: Lab) -> Trials:
    reference = lab.reference()
    steps = [39] if lab.is_quick else range(1, 40)
    for step in steps:
        name = lab.name()
        fault = f"step:{step}:term"  # Counts from the second step of a process.
        code = lab.train(name, fault=fault).code
        need(code in (75, 0), f"exit code {code}")
        lab.train(name).must(0)
        lab.same(name, reference)
        yield


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


def accumulated(lab: Lab) -> Trials:
    changes = {"training__accumulate": 4}
    for step in (6,) if lab.is_quick else (6, 13, 38):
        name = lab.name()
        lab.train(name, fault=f"step:{step}:term", **changes).must(75)
        lab.train(name, **changes).must(0)
        lab.same(name, lab.reference(**changes))
        yield


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


def workers(lab: Lab) -> Trials:
    reference = lab.reference()
    for count, ahead in ((2, 1), (1, 8), (0, 0), (3, 8))[: 1 if lab.is_quick else None]:
        name = lab.name()
        options = {"data__workers": count, "data__prefetch": ahead}
        lab.train(name, fault="step:11:term", **options).must(75)
        lab.train(name, data__workers=(count + 1) % 4, data__prefetch=2).must(0)
        lab.same(name, reference)
        yield


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


def longer(lab: Lab) -> Trials:
    name = lab.copy(lab.reference())
    said = lab.train(name, training__num_steps=50).must(0).said
    need(re.search(r"schedule horizon changed 40 -> 50, lr at step 41 goes \S+ -> \S+", said), said)
    yield


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
