"""Two processes on this machine; more of what they survive is in tests/faults/peers.py."""

import json
import os
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

from craft_jax import main as cli
from craft_jax import outputs, runs
from craft_jax.errors import LostPeerError
from craft_jax.parallel.processes import ProcessGroup
from tests.conftest import command, environment, micro


def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(index: int, address: str, workdir, *words: str, **env: str) -> subprocess.Popen:
    flags = [f"--coordinator={address}"]
    if address != "auto":
        flags += ["--num_processes=2", f"--process_id={index}"]
    return subprocess.Popen(
        command(*words, *flags, f"--workdir={workdir}"),
        env=environment() | {"XLA_FLAGS": ""} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(pair: list[subprocess.Popen], *codes: int) -> list[str]:
    said = [process.communicate(timeout=120)[0] for process in pair]
    assert [process.returncode for process in pair] == list(codes), "\n".join(said)
    return said


def exact(workdir, name: str) -> list[dict]:
    text = (workdir / "models" / name / "exact.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_signal_to_one_stops_both_and_they_go_on_without_a_disk_in_common(tmp_path, text_file):
    """All of the tests below in one: what it ends with is what a process alone computes."""
    words = micro(text_file, parallel__fsdp=2, parallel__data=1, training__num_steps=8)
    words += ["--config.training.sample_every=0", "--config.training.eval_every=0", "--run=mine"]
    places, job = [tmp_path / "first", tmp_path / "second"], str(port())

    def both(*words: str, fault: str = "") -> list[subprocess.Popen]:
        slurm = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
        return [
            start(
                index,
                "auto",
                places[index],
                *words,
                **slurm,
                SLURM_PROCID=str(index),
                SLURM_LOCALID=str(index),
                SLURM_STEP_NUM_NODES="1",
                CRAFT_FAULT=fault if index == 1 else "",
            )
            for index in (0, 1)
        ]

    first, second = finish(both(*words, fault="step:3:term"), 75, 75)
    assert "2 cpu devices of 2 processes, split as fsdp 2" in first
    assert "stopped at step" in first and "by SIGTERM" in first
    assert "step" not in second.partition("SIGTERM")[0]
    status = outputs.read_status(places[0] / "models/mine")
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert runs.open(places[0] / "models/mine").store.latest() == status["step"] < 8
    whole = sum(array.nbytes for array in runs.open(places[0] / "models/mine").params.values())
    shared = float(first.partition("parameters and optimizer ")[2].split()[0]) * 1e6
    assert shared < 0.75 * 3 * whole  # Of parameters and two moments.
    finish(both("--run=mine"), 0, 0)
    assert not (places[1] / "models").exists()
    alone = ["--config.parallel.fsdp=1", "--config.parallel.data=8", "--run=alone"]
    assert cli.main([*words, *alone, f"--workdir={places[0]}"]) == 0
    params = {name: runs.open(places[0] / "models" / name).params for name in ("mine", "alone")}
    for path, array in params["alone"].items():
        np.testing.assert_allclose(params["mine"][path], array, atol=1e-5, err_msg=path)


@pytest.mark.soak
def test_without_a_disk_in_common(tmp_path, text_file):
    """Process 0 alone has the run; the other gets config, tokenizer and arrays from it.

    Under SLURM's variables, from which `auto` learns who is who.
    """
    words = micro(text_file, log__exact=True, parallel__fsdp=2, parallel__data=1)
    places = [tmp_path / "first", tmp_path / "second"]
    job = str(port())  # The port of the coordinator follows from the number of the job.

    def both(*words: str) -> list[subprocess.Popen]:
        return [
            start(
                index,
                "auto",
                places[index],
                *words,
                SLURM_JOB_ID=job,
                SLURM_STEP_NODELIST="localhost",
                SLURM_NTASKS="2",
                SLURM_PROCID=str(index),
                SLURM_LOCALID=str(index),
                SLURM_STEP_NUM_NODES="1",
            )
            for index in (0, 1)
        ]

    first, second = finish(both(*words, "--run=mine"), 0, 0)
    assert "2 cpu devices of 2 processes, split as fsdp 2" in first
    assert "step" not in second
    before = runs.open(places[0] / "models/mine")
    whole, shared = (
        sum(array.nbytes for array in before.params.values()),
        float(first.partition("parameters and optimizer ")[2].split()[0]) * 1e6,
    )
    assert shared < 0.75 * 3 * whole  # Of parameters and two moments.
    finish(both("--run=mine", "--config.training.num_steps=8"), 0, 0)
    assert not (places[1] / "models").exists()
    assert [line["step"] for line in exact(places[0], "mine")] == list(range(1, 9))
    # What was written is what a process alone computes.
    alone = subprocess.run(
        command(*words, "--config.parallel.fsdp=1", "--run=alone", f"--workdir={places[0]}"),
        env=environment() | {"XLA_FLAGS": ""},
        check=True,
    )
    assert alone.returncode == 0
    for path, array in runs.open(places[0] / "models/alone").params.items():
        saved = runs.open(places[0] / "models/mine/checkpoints/6").params[path]
        np.testing.assert_allclose(saved, array, atol=1e-5, err_msg=path)


@pytest.mark.soak
def test_a_signal_to_one_stops_both_at_the_same_step(workdir, text_file):
    words = micro(text_file, training__num_steps=100_000, training__eval_every=0)
    words += ["--config.training.sample_every=0", "--run=mine"]
    address = f"127.0.0.1:{port()}"
    pair = [start(index, address, workdir, *words) for index in (0, 1)]
    status = workdir / "models/mine"
    deadline = time.monotonic() + 60
    while not ((outputs.read_status(status) or {}).get("step") or 0) > 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(pair[1].pid, signal.SIGTERM)
    first, _ = finish(pair, 75, 75)
    assert "stopped at step" in first and "by SIGTERM" in first
    state = outputs.read_status(status)
    assert (state["state"], state["exit_code"]) == ("preempted", 75)
    assert runs.open(status).store.latest() == state["step"]


@pytest.mark.soak
def test_each_process_makes_its_own_rows(workdir, text_file):
    """And with the digest of whole batches in the log, all of them: with the same result."""
    words = micro(text_file, training__num_steps=4, training__sample_every=0)
    found = {}
    for name, is_exact in (("parts", False), ("wholes", True)):
        address = f"127.0.0.1:{port()}"
        more = [f"--config.log.exact={is_exact}", f"--run={name}"]
        finish([start(n, address, workdir, *words, *more) for n in (0, 1)], 0, 0)
        found[name] = runs.open(workdir / "models" / name).params
    for path, array in found["parts"].items():
        np.testing.assert_array_equal(array, found["wholes"][path], err_msg=path)


def test_alone_nothing_is_shared():
    group = ProcessGroup()
    assert group.is_first
    assert group.from_first(lambda: {1: 2}, encode=pytest.fail) == {1: 2}
    assert group.in_turn(lambda: 3) == 3
    group.confirm()
    signals = object()
    assert group.shared(signals) is signals


def test_a_loss_has_a_name_only_where_there_are_others():
    error = ValueError("Gloo AllGather failed: Connection closed by peer")
    assert ProcessGroup().named(error) is error
    lost = ProcessGroup(None, index=1, count=2).named(error)
    assert (type(lost), lost.exit_code) == (LostPeerError, 76)
    assert str(lost).startswith("process 1 has lost another one (Gloo AllGather failed")
    other = ProcessGroup(None, index=1, count=2).named(KeyError("gloo"))
    assert isinstance(other, KeyError)
