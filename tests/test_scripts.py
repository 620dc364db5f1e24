"""The scripts for TPU VMs and SLURM: what they would do, and that other shells understand it.

Stand-ins for `gcloud`, `srun` and `scontrol` hand the commands to a shell of this machine.
"""

import os
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WHERE = ("--name=mine", "--zone=us-east5-a")
GCLOUD = "gcloud compute tpus tpu-vm"


def script(name: str, *words: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", ROOT / "scripts" / name, *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | env,
    )


def dry(action: str, *words: str) -> list[str]:
    done = script("tpu_vm.sh", action, *WHERE, "--dry-run", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def stand_in(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


def test_what_is_run_on_a_tpu_vm():
    assert dry("create", "--type=v5litepod-16", "--spot", "--project=p") == [
        f"{GCLOUD} create mine --zone=us-east5-a --project=p --accelerator-type=v5litepod-16 "
        "--version=v2-alpha-tpuv5-lite --spot"
    ]
    archive, copied, installed, counted = dry("install")
    assert archive.startswith(f"git -C {ROOT} archive --format=tar.gz --output=/")
    assert copied.startswith(f"{GCLOUD} scp /")
    assert copied.endswith(" mine:craft_jax.tar.gz --zone=us-east5-a --worker=all")
    assert installed == (
        f"{GCLOUD} ssh mine --zone=us-east5-a --worker=all --command='mkdir -p craft_jax && tar "
        "-xzf craft_jax.tar.gz -C craft_jax && cd craft_jax && python3 -m venv .venv && "
        ".venv/bin/pip install -q -c constraints.txt -e '\\''.[tpu]'\\'''"
    )
    assert "jax.distributed.initialize()" in counted
    assert dry("run", "--", "--config=configs/gpt.py:124m", "--run=first") == [
        f"{GCLOUD} ssh mine --zone=us-east5-a --worker=all --command='cd craft_jax && {{ setsid "
        "nohup .venv/bin/python -m craft_jax.launch -- .venv/bin/python -m craft_jax.main "
        "--coordinator=auto --config=configs/gpt.py:124m --run=first > train.log 2>&1 & echo $! > "
        "train.pid; }'"
    ]
    (tail,) = dry("tail")
    assert tail.endswith("--worker=0 --command='tail -n 100 -F craft_jax/train.log'")
    (stop,) = dry("stop")
    assert stop.endswith("--worker=all --command='kill -TERM $(cat craft_jax/train.pid)'")
    assert dry("delete") == [f"{GCLOUD} delete mine --zone=us-east5-a --quiet"]


def test_a_bucket_outlives_the_machine():
    _, copy = dry("run", "--bucket=gs://b/x/", "--", "--config=c.py", "--run=first")
    assert "--worker=0" in copy and "outputs gs://b/x/outputs" in copy
    fetch, start, copy = dry("resume", "--bucket=gs://b/x", "--", "--run=first")
    assert "rsync -r gs://b/x/outputs craft_jax/outputs" in fetch
    assert "--coordinator=auto --run=first >" in start
    assert "sleep 300" in copy


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["fly", *WHERE], "fly is none of create, install, run"),
        (["create", *WHERE], "--type is missing"),
        (["run", "--name=mine", "--", "--run=a"], "--zone is missing"),
        (["run", "--name=Mine", "--zone=z", "--", "--run=a"], "--name=Mine"),
        (["run", *WHERE, "--", "--config=c.py"], "needs --run=NAME"),
        (["run", *WHERE, "--", "--run=a b"], "--run=a b is no name"),
        (["run", *WHERE, "--config=c.py"], "stands behind --"),
        (["run", *WHERE, "--bucket=b", "--", "--run=a"], "--bucket=b is not gs://"),
    ],
)
def test_words_that_make_no_sense(words, complaint):
    done = script("tpu_vm.sh", *words, "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_other_shell_understands(tmp_path):
    """Words with spaces and quotes arrive as they were typed."""
    home, tools = tmp_path / "home", tmp_path / "bin"
    (home / "craft_jax/.venv/bin").mkdir(parents=True)
    tools.mkdir()
    stand_in(home / "craft_jax/.venv/bin", "python", 'printf "%s\\n" "$@" > words')
    stand_in(
        tools,
        "gcloud",
        'for w in "$@"; do case $w in --command=*) cd "$HOME" && bash -c "${w#*=}" ;; esac; done',
    )
    odd = ["--run=first", "--config.data.path=my $HOME 'text'/*", '--config.a="b"\\']
    path = f"{tools}:{os.environ['PATH']}"
    done = script("tpu_vm.sh", "run", *WHERE, "--", *odd, HOME=str(home), PATH=path)
    assert done.returncode == 0, done.stderr
    file = home / "craft_jax/words"
    while not (file.is_file() and file.read_text().count("\n") == 10):
        time.sleep(0.01)  # It runs in the background.
    assert file.read_text().splitlines()[-3:] == odd
    assert (home / "craft_jax/train.pid").read_text().strip().isdecimal()


@pytest.mark.parametrize(
    ("code", "restarts", "ends"),
    [(0, 0, 0), (78, 0, 78), (75, 0, 0), (76, 3, 0), (134, 0, 0), (137, 0, 0), (75, 100, 75)],
)
def test_a_job_of_slurm(tmp_path, code, restarts, ends):
    stand_in(tmp_path, "srun", f'printf "%s\\n" "$@" > {tmp_path}/srun.txt; exit {code}')
    stand_in(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/scontrol.txt')
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_RESTART_COUNT": str(restarts),
        "PYTHON": "python",
    }
    done = script("slurm.sh", "--config=c.py", "--run=first", **env)
    assert done.returncode == ends
    words = (tmp_path / "srun.txt").read_text().splitlines()
    assert words[1:] == [
        "python", "-m", "craft_jax.main", "--coordinator=auto", "--config=c.py", "--run=first",
    ]  # fmt: skip
    requeued = tmp_path / "scontrol.txt"
    assert requeued.exists() == (code in (75, 76, 134, 137) and restarts < 100)
    assert not requeued.exists() or requeued.read_text() == "requeue 77\n"


def test_a_job_of_slurm_says_what_it_would_do():
    done = script("slurm.sh", "--dry-run", "--config=c.py", "--run=a", SLURM_JOB_ID="7")
    assert done.stdout == (
        "srun --kill-on-bad-exit=0 .venv/bin/python -m craft_jax.main --coordinator=auto "
        "--config=c.py --run=a\n"
    )
    done = script("slurm.sh", "--config=c.py")
    assert done.returncode == 2 and "needs --run=NAME" in done.stderr
