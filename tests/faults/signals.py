"""Signals and stalls: saved, and ended in time."""

import signal
import sys
import time

from tests.faults.harness import Child, Lab, Trials, need


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


def preempted_anywhere(lab: Lab) -> Trials:
    reference = lab.reference()
    for fault, words in (
        ("eval:2:sleep=2", "step 20/40"),
        ("ckpt.mid_write:3:sleep=2", "step 9/40"),
        ("ckpt.begin:2:sleep=2", "step 9/40"),
        ("data:12:sleep=3", "step 9/40"),
    )[:: 4 if lab.is_quick else 1]:
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
