"""Numbers that are not finite, and devices that come and go."""

import re
from collections.abc import Iterator

import numpy as np

from craft_jax.checkpoint import manifest
from interop.files import orbax
from tests.faults.harness import Lab, Trials, need

EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
TWO = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
# Every checkpoint stays, so that the state after each step can be looked at.
KEPT = {"training__checkpoint_every": 1, "training__keep_checkpoints": 100}
LADDER = {"training__reduce_after": 3, "training__roll_back_after": 6, "training__num_steps": 30}


def _poison(kind: str) -> dict[str, str]:
    return {"CRAFT_POISON": kind}


def _state(lab: Lab, name: str, step: int) -> dict[str, int]:
    """Returns the checksums of everything but the counter of steps."""
    leaves = manifest.read(lab.store(name).folder / str(step)).leaves
    return {path: leaf.crc32 for path, leaf in leaves.items() if path != "optimizer/step"}


def _skipped(lab: Lab, name: str) -> list[int]:
    return [step for step, line in lab.exact(name).items() if line["skipped"]]


def one_bad_step(lab: Lab) -> Trials:
    """Parameters, moments, average and counters stay; the run goes on, also after a resume."""
    changes = {**KEPT, "optim__ema_decay": 0.9}
    for kind, step in (("nan", 12), ("inf", 12), ("nan", 1), ("nan", 40)):
        whole, parts, env = lab.name(), lab.name(), _poison(f"{kind}:{step}")
        lab.train(whole, env=env, **changes).must(0)
        need(_skipped(lab, whole) == [step], f"skipped: {_skipped(lab, whole)}")
        if step > 1:
            need(_state(lab, whole, step) == _state(lab, whole, step - 1), "the state has moved")
        if 1 < step < 40:
            lab.train(parts, env=env, fault=f"step:{step}:term", **changes).must(75)
            lab.train(parts, env=env, **changes).must(0)
            lab.same(parts, whole)
        yield


def on_one_of_eight(lab: Lab) -> Trials:
    """A bad element in the part that one device has: all of them skip the step."""
    for changes in ({"parallel__fsdp": 8}, {"parallel__fsdp": 2, "parallel__tensor": 2}, {}):
        name = lab.name()
        options = {**KEPT, **changes, "env": EIGHT | _poison("inf:12")}
        lab.train(name, **options).must(0)
        need(_skipped(lab, name) == [12], f"skipped: {_skipped(lab, name)}")
        need(_state(lab, name, 12) == _state(lab, name, 11), "the state has moved")
        yield


def ladder(lab: Lab) -> Trials:
    """Each rung is said, the batches are skipped, and a kill on the way changes nothing."""
    whole, env = lab.name(), _poison("nan:12-1000")
    said = lab.train(whole, env=env, **LADDER).must(70).said
    for words in (
        "learning rate scaled by 0.5: 3 updates in a row were skipped up to step 14",
        "rolled back from step 18 to step 10: 6 updates in a row were skipped up to step 17; "
        "batches 10 to 17 are skipped",
        "training diverged",
    ):
        need(words in said, f"{words!r} is not in:\n{said[-3000:]}")
    need(said.count("rolled back") == 3, "the run went back another number of times")
    text = (lab.run(whole) / "bad_steps" / "step_12.txt").read_text(encoding="utf-8")
    need('"batch": ' in text and "row 7: " in text, text)
    yield
    points = ("step:20:kill9", "step:13:kill9", "ckpt.after_commit:5:kill9")
    for point in points[: 1 if lab.is_quick else None]:
        name = lab.name()
        lab.train(name, env=env, fault=point, **LADDER).must(-9)
        lab.train(name, env=env, **LADDER).must(70)
        need(lab.exact(name) == lab.exact(whole), "another history")
        yield


def never_committed(lab: Lab) -> Trials:
    """Every array of every checkpoint of a run that diverges is finite; also of those set aside."""
    name = lab.name()
    lab.train(name, env=_poison("nan:12-1000"), **LADDER, **KEPT).must(70)
    folders = [p for p in lab.store(name).folder.iterdir() if (p / "MANIFEST.json").is_file()]
    need(len(folders) > 12, f"{len(folders)} checkpoints")
    for folder in folders:
        for path, array in _arrays(folder):
            need(np.isfinite(array).all(), f"{folder.name}: {path} is not finite")
    yield


def _arrays(folder) -> Iterator[tuple[str, np.ndarray]]:
    for part in ("params", "average", "optimizer"):
        if (folder / part).is_dir():
            for path, leaf in orbax.read_params(folder / part).items():
                array = np.asarray(leaf.read())
                if array.dtype.kind == "f":
                    yield f"{part}/{path}", array


def statistics(lab: Lab) -> Trials:
    """A loss that is not finite enters no average: no later step is held for a spike."""
    spikes = {"plateau__spike": 3.0, "plateau__window": 8}
    for step in (20, 2):
        name = lab.name()
        said = lab.train(name, env=_poison(f"nan:{step}"), **spikes).must(0).said
        need(_skipped(lab, name) == [step], f"skipped: {_skipped(lab, name)}")
        need("learning rate scaled" not in said, said)
        yield


def half(lab: Lab) -> Trials:
    """float16: overflows halve the scale, which survives a resume; then the way to float32."""
    changes, env = {"training__precision": "float16"}, _poison("inf:5-6")
    whole, parts = lab.name(), lab.name()
    said = lab.train(whole, env=env, **changes).must(0).said
    need("loss scale 65536 -> 32768" in said and "32768 -> 16384" in said, said)
    lab.train(parts, env=env, fault="step:8:term", **changes).must(75)
    lab.train(parts, env=env, **changes).must(0)
    lab.same(parts, whole)
    yield
    changes |= {"training__max_overflows": 4}
    whole, parts, env = lab.name(), lab.name(), _poison("inf:8-11")
    said = lab.train(whole, env=env, **changes).must(0).said
    need("goes on in float32 after step 12" in said, said)
    lab.train(parts, env=env, fault="step:11:term", **changes).must(75)
    lab.train(parts, env=env, **changes).must(0)
    lab.same(parts, whole)
    yield


def elastic(lab: Lab) -> Trials:
    """One device, then eight, then two, with the same batches and nearly the same losses."""
    changes = {"model__dropout": 0.0}
    theirs = lab.exact(lab.reference(**changes))
    for second, third in (
        ({}, {}),
        ({"parallel__fsdp": 8}, {"parallel__fsdp": 2}),
        ({"parallel__fsdp": 2, "parallel__tensor": 2}, {"parallel__mode": "pmap"}),
    ):
        name = lab.name()
        lab.train(name, fault="step:19:term", **changes).must(75)
        lab.train(name, env=EIGHT, fault="step:9:term", **changes, **second).must(75)
        lab.train(name, env=TWO, **changes, **third).must(0)
        ours = lab.exact(name)
        need(list(ours) == list(theirs), "other steps")
        for step, line in theirs.items():
            need(ours[step]["batch_md5"] == line["batch_md5"], f"step {step}: another batch")
            one, other = (float.fromhex(found["loss_hex"]) for found in (ours[step], line))
            need(abs(one - other) <= 1e-5, f"step {step}: {one} and {other}")
        yield


def indivisible(lab: Lab) -> Trials:
    """A batch that the devices cannot share: one line with what they can."""
    said = lab.train(lab.name(), env=EIGHT, data__batch_size=12).must(78).said
    need(re.search(r"batch_size=12 is not divisible by 8 .*try 8 or 16", said), said)
    yield
