"""Several processes on this machine that train one run, some of which die, hang or disagree."""

import contextlib
import functools
import math
import signal
import socket
import time
from collections.abc import Mapping, Sequence

from tests.faults.harness import Child, Ended, Lab, Trials, need

# What `processes` and `rendezvous` wait for, and the time allowed on top.
HEARTBEAT_SECONDS, MEETING_SECONDS, MARGIN_SECONDS = 20, 60, 15
PLAIN = {"model__dropout": 0.0}
TWO = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
FOUR = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}


def _port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _flags(index: int, count: int, port: int) -> list[str]:
    return [
        f"--coordinator=127.0.0.1:{port}",
        f"--num_processes={count}",
        f"--process_id={index}",
    ]


def _start(
    lab: Lab, name: str, faults: Mapping[int, str] = {}, count: int = 2, **changes: object
) -> list[Child]:
    """Starts the processes of a run, with a fault in some of them."""
    port = _port()
    return [
        lab.start(name, *_flags(index, count, port), fault=faults.get(index, ""), **changes)
        for index in range(count)
    ]


def _ended(children: Sequence[Child], seconds: float = 120) -> list[Ended]:
    """Waits for all of them; none is left, whatever is raised."""
    try:
        return [child.wait(seconds) for child in children]
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                child.signal(signal.SIGKILL)


def _train(lab: Lab, name: str, *codes: int, **options: object) -> list[Ended]:
    """Trains a run in two processes, which must end with these exit codes."""
    ended = _ended(_start(lab, name, **options))
    for child, code in zip(ended, codes, strict=True):
        child.must(code)
    return ended


def _near(lab: Lab, name: str, reference: str, limit: float) -> float:
    """Checks that two runs saw the same batches and had nearly the same losses."""
    ours, theirs = lab.exact(name), lab.exact(reference)
    need(list(ours) == list(theirs), f"the steps {list(ours)}")
    worst = 0.0
    for step, line in theirs.items():
        need(ours[step]["batch_md5"] == line["batch_md5"], f"step {step}: another batch")
        one, other = (float.fromhex(found["loss_hex"]) for found in (ours[step], line))
        need(math.isfinite(one) and abs(one - other) <= limit, f"step {step}: {one} and {other}")
        worst = max(worst, abs(one - other))
    return worst


def _reference(lab: Lab, **changes: object) -> str:
    """Returns a run of two processes that nothing happened to."""
    return _made(lab, tuple(sorted(changes.items())))


@functools.cache
def _made(lab: Lab, changes: tuple[tuple[str, object], ...]) -> str:
    name = lab.name()
    _train(lab, name, 0, 0, **dict(changes))
    return name


def like_one(lab: Lab) -> Trials:
    """Two processes train as one with two devices does, and the first alone writes."""
    for changes in (
        {},
        {"parallel__fsdp": 2, "parallel__data": 1},
        {"parallel__tensor": 2, "parallel__data": 1},
    ):
        options = PLAIN | changes
        one, two = lab.name(), lab.name()
        lab.train(one, env=TWO, **options).must(0)
        before = len(list((lab.workdir / "logs").iterdir()))
        first, second = _train(lab, two, 0, 0, **options)
        _near(lab, two, one, 1e-6)
        need("2 cpu devices of 2 processes" in first.said, first.said)
        need("step 40" in first.said and "step" not in second.said, second.said)
        made = len(list((lab.workdir / "logs").iterdir())) - before
        need(made == 3, f"{made} logs, not a text log, metrics and events of one process")
        lab.tidy(two)
        yield


def _all_end(children: Sequence[Child], begin: float, seconds: float) -> list[Ended]:
    ended = _ended(children, seconds)
    took = time.monotonic() - begin
    need(took <= seconds, f"the last one ended after {took:.0f} s")
    need(all(child.code != 0 for child in ended), f"exit codes {[c.code for c in ended]}")
    return ended


def _killed(lab: Lab, victim: int) -> Trials:
    """One process is killed: all end, and the run goes on to the bit."""
    reference = _reference(lab)
    for step in (7,) if lab.is_quick else (7, 18, 33):
        name = lab.name()
        children = _start(lab, name, {victim: f"step:{step}:kill9"})
        children[victim].until(lambda: False, 90)
        _all_end(children, time.monotonic(), HEARTBEAT_SECONDS + MARGIN_SECONDS)
        _train(lab, name, 0, 0)
        lab.same(name, reference)
        yield


def worker_killed(lab: Lab) -> Trials:
    yield from _killed(lab, 1)


def coordinator_killed(lab: Lab) -> Trials:
    yield from _killed(lab, 0)


def stuck(lab: Lab) -> Trials:
    """A process that is stopped, and one that hangs in Python while its heart beats."""
    name = lab.name()
    children = _start(lab, name, training__num_steps=100_000)
    children[0].until(lambda: "step 20/" in children[0].said, 90)
    begin = time.monotonic()
    children[1].signal(signal.SIGSTOP)
    try:
        first = children[0].wait(HEARTBEAT_SECONDS + MARGIN_SECONDS)
        need(first.code in (76, -signal.SIGABRT), f"exit code {first.code}")
    finally:
        children[1].signal(signal.SIGKILL)
    need(time.monotonic() - begin < HEARTBEAT_SECONDS + MARGIN_SECONDS, "it took too long")
    children[1].wait()
    yield
    name = lab.name()
    # Both wait for each other, so either of them may be the first to notice.
    children = _start(lab, name, {1: "step:9:sleep=1000"}, training__stall_seconds=8)
    ended = _ended(children)
    said = "".join(child.said for child in ended)
    need({child.code for child in ended} <= {76, -signal.SIGABRT}, f"{[c.code for c in ended]}")
    need("stalled: no progress for" in said and "Current thread" in said, said[-3000:])
    _train(lab, name, 0, 0)
    lab.same(name, _reference(lab))
    yield


def one_fails(lab: Lab) -> Trials:
    """What one process meets ends all of them, in its words and with its exit code."""
    for victim in (0, 1):
        for fault in ("data:9:raise", "step:9:raise", "eval:2:raise"):
            name = lab.name()
            begin = time.monotonic()
            ended = _ended(_start(lab, name, {victim: fault}))
            need({child.code for child in ended} <= {65, 74}, f"{[c.code for c in ended]}")
            for child in ended:
                child.must(child.code, "a fault that CRAFT_FAULT asked for")
            need(f"process {victim} failed: " in ended[1 - victim].said, ended[1 - victim].said)
            need(time.monotonic() - begin < 60, "it took too long")
            need(lab.status(name)["state"] == "failed", f"{lab.status(name)}")
            _train(lab, name, 0, 0)
            lab.same(name, _reference(lab))
            yield


def late(lab: Lab) -> Trials:
    """A process that comes 40 s late to an evaluation is waited for."""
    for changes in ({}, {"parallel__fsdp": 2, "parallel__data": 1}):
        name = lab.name()
        _train(lab, name, 0, 0, faults={1: "eval:1:sleep=40"}, **changes)
        lab.same(name, _reference(lab, **changes))
        yield


def not_found(lab: Lab) -> Trials:
    """Nobody there, the port taken, two that disagree: one line, exit 76, within the time."""
    name = lab.name()

    def fails(child: Child, code: int, *words: str) -> None:
        ended = child.wait(MEETING_SECONDS + MARGIN_SECONDS).must(code, *words)
        lines = [line for line in ended.said.splitlines() if line.strip()]
        need(len(lines) == 1, f"not one line:\n{ended.said}")
        need(ended.seconds < MEETING_SECONDS + MARGIN_SECONDS, f"{ended.seconds:.0f} s")

    waiting = [
        (lab.start(name, *_flags(1, 2, _port())), "process 0 was not found at 127.0.0.1"),
        (lab.start(lab.name(), *_flags(0, 3, _port())), "process 1, 2 of 3 did not come"),
    ]
    for child, words in waiting:
        fails(child, 76, words)
        yield
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        fails(lab.start(name, *_flags(0, 2, port)), 76, f"port {port}", "is in use")
    yield
    port = _port()
    pair = [lab.start(name, *_flags(0, 2, port)), lab.start(name, *_flags(1, 3, port))]
    for child in pair:
        fails(child, 76, "process 1 says --num_processes=3, and process 0 says 2")
    yield
    port = _port()
    three = [lab.start(name, *_flags(index, 3, port)) for index in (0, 1, 1)]
    for child in three:
        fails(child, 76, "two processes say --process_id=1")
    yield
    for flags, words in (
        (_flags(2, 2, port), "--process_id=2 is not one of --num_processes=2"),
        (["--coordinator=here", *_flags(0, 2, port)[1:]], "'here' is not HOST:PORT, nor auto"),
        (["--coordinator=auto"], "--coordinator=auto: this is neither a TPU pod nor"),
        (_flags(0, 2, port)[1:], "need --coordinator"),
        (_flags(0, 2, port)[:1], "needs --num_processes, and --process_id"),
    ):
        fails(lab.start(name, *flags), 2, words)
        yield


def disagreeing(lab: Lab) -> Trials:
    """Configs that differ or are wrong: named, in both processes, before anything is made."""
    port = _port()
    pair = [
        lab.start("other", *_flags(index, 2, port), optim__learning_rate=0.001 * (1 + index))
        for index in (0, 1)
    ]
    for child in _ended(pair):
        child.must(78, "optim.learning_rate is 0.002 in process 1 and 0.001 in process 0")
    need(not lab.run("other").exists(), "a run was made")
    yield
    for child in _ended(_start(lab, "other", data__batch_size=7)):
        child.must(78, "data.batch_size=7 is not divisible by 2")
    need(not lab.run("other").exists(), "a run was made")
    yield
    for child in _ended(_start(lab, "other", parallel__mode="pmap")):
        child.must(78, "parallel.mode=pmap trains in one process")
    yield


def preempted(lab: Lab) -> Trials:
    """SIGTERM to one of them, or to both: all save and end with 75; the run goes on to the bit."""
    reference = _reference(lab)
    for victims in ((0,), (1,), (0, 1)):
        for step in (3,) if lab.is_quick else (1, 19, 30):
            name = lab.name()
            _train(lab, name, 75, 75, faults=dict.fromkeys(victims, f"step:{step}:term"))
            need(lab.status(name)["state"] == "preempted", f"{lab.status(name)}")
            _train(lab, name, 0, 0)
            lab.same(name, reference)
            lab.tidy(name)
            yield


def other_processes(lab: Lab) -> Trials:
    """Two processes, then one with four devices, then two again, and one with one."""
    reference = lab.reference(**PLAIN)
    for changes in ({}, {"parallel__fsdp": 2}):
        name = lab.name()
        options = PLAIN | {"parallel__data": -1} | changes
        _train(lab, name, 75, 75, faults={0: "step:9:term"}, **options)
        lab.train(name, env=FOUR, fault="step:9:term", **options).must(75, "not bit-exact")
        _train(lab, name, 75, 75, faults={1: "step:9:term"}, **options)
        lab.train(name, **PLAIN).must(0)
        _near(lab, name, reference, 1e-5)
        yield
