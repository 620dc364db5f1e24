"""The launcher, with real processes that stand in for training and die as they are told."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE

import pytest

from tests.conftest import ROOT, environment

# Reads its plan, one `STEP:ACTION` for each start, the last one for all further starts: it reports
# the step, then exits with the action's code, kills itself with `-N`, or waits for signals: `wait`
# exits 75 at the first, `wait2` 130 at the second.
TRAIN = """
import json, os, signal, sys, time
from pathlib import Path

plan, folder = sys.argv[1].split(","), Path(sys.argv[2])
starts = Path("starts")
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
step, action = plan[min(number, len(plan) - 1)].split(":")
if step:
    folder.mkdir(parents=True, exist_ok=True)
    status = {"state": "running", "step": int(step), "num_steps": 10}
    (folder / "status.json").write_text(json.dumps(status))
if action.startswith("wait"):
    left = int(action.removeprefix("wait") or 1)
    def receive(number, frame):
        global left
        left -= 1
        print(signal.Signals(number).name, flush=True)
        if not left:
            os._exit(130 if number == signal.SIGINT else 75)
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, receive)
    print("ready", os.getpid(), flush=True)
    while True:
        time.sleep(60)
if action.startswith("-"):
    os.kill(os.getpid(), -int(action))
sys.exit(int(action))
"""

RUN = "--run=mine"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def words(*own: str, command: list[str]) -> list[str]:
    return [sys.executable, "-m", "craft_jax.launch", *own, "--", *command]


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., list[str]]:
    """A train command that follows a plan."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)

    def command(plan: str, *more: str, folder: str = "outputs/models/mine") -> list[str]:
        return [sys.executable, "-S", str(script), plan, folder, *(more or (RUN,))]

    return command


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs the launcher to its end."""

    def run(command: list[str], *own: str) -> subprocess.CompletedProcess:
        return ran(words("--backoff=0.01", *own, command=command), tmp_path)

    return run


def ran(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts the launcher, which does not outlive the test."""
    with contextlib.ExitStack() as stack:

        def run(command: list[str], *own: str) -> subprocess.Popen:
            process = stack.enter_context(
                subprocess.Popen(
                    words(*own, command=command),
                    cwd=tmp_path,
                    env=environment(),
                    stdout=PIPE,
                    stderr=PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            return process

        yield run


def num_starts(folder: Path) -> int:
    return len((folder / "starts").read_text())


def wait_for_end(pid: int) -> None:
    """Waits until a process has ended; one that nobody reaped counts as ended."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return
        if stat.rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    pytest.fail(f"process {pid} is still there")


@pytest.mark.parametrize(
    ("action", "line"),
    [
        ("75", "preempted (exit code 75)"),
        ("76", "stalled, or lost a peer (exit code 76)"),
        ("134", "killed by SIGABRT"),
        ("-9", "killed by SIGKILL (out of memory?)"),
        ("137", "killed by SIGKILL (out of memory?)"),
        ("-15", "killed by SIGTERM before anything could be saved"),
    ],
)
def test_restarts(launch, train, tmp_path, action, line):
    ended = launch(train(f"4:{action},10:0"))
    assert ended.returncode == 0
    first, last = ended.stderr.splitlines()
    assert first.startswith(f"launch: {line}")
    assert first.endswith("at step 4 of 10; restart 1 of 100 in 0.01 s")
    assert last == "launch: done after 1 restart"
    assert num_starts(tmp_path) == 2


@pytest.mark.parametrize("code", [1, 2, 65, 69, 70, 73, 74, 77, 78, 130])
def test_what_a_restart_does_not_cure_ends_it(launch, train, tmp_path, code):
    ended = launch(train(f"4:{code}"))
    assert ended.returncode == code
    assert ended.stderr == (
        f"launch: exit code {code} at step 4 of 10; a restart does not cure it\n"
    )
    assert num_starts(tmp_path) == 1


def test_a_signal_that_no_restart_cures_ends_it_as_a_shell_would(launch, train):
    assert launch(train(f"4:-{signal.SIGBUS.value}")).returncode == 128 + signal.SIGBUS


def test_success_is_silent(launch, train):
    ended = launch(train("10:0"))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_gives_up_at_the_same_step(launch, train, tmp_path):
    ended = launch(train("2:-9,4:-9"), "--same_step=3")
    assert ended.returncode == 137
    assert num_starts(tmp_path) == 4
    assert (
        "giving up; deaths in a row without a new step: 3 (--same_step)"
        in ended.stderr.splitlines()[-1]
    )
    assert "outputs/models/mine" in ended.stderr.splitlines()[-1]


def test_giving_up_names_the_log(launch, train, tmp_path):
    folder = tmp_path / "outputs/models/mine"
    folder.mkdir(parents=True)
    names = ("log", "metrics", "samples", "events")
    files = {name: f"logs/train_gpt_1.{name}" for name in names}
    (folder / "run.json").write_text(json.dumps({"files": files}))
    ended = launch(train("4:76"), "--same_step=1")
    assert ended.returncode == 76
    assert ended.stderr.endswith(
        "; look at outputs/models/mine/status.json and the end of outputs/logs/train_gpt_1.log\n"
    )


def test_a_step_that_goes_back_is_no_progress(launch, train, tmp_path):
    assert launch(train("6:-9,5:-9,4:-9,10:0")).returncode == 137
    assert num_starts(tmp_path) == 3


def test_gives_up_without_any_step(launch, train, tmp_path):
    ended = launch(train(":139"), "--same_step=2")
    assert ended.returncode == 139
    assert num_starts(tmp_path) == 2
    assert "SIGSEGV" in ended.stderr and "at no known step" in ended.stderr


def test_progress_resets_deaths_and_backoff(launch, train):
    ended = launch(train("1:75,1:75,2:75,2:75,3:75,10:0"), "--same_step=3", "--max_backoff=0.015")
    assert ended.returncode == 0
    waits = [line.partition(" in ")[2] for line in ended.stderr.splitlines()[:-1]]
    assert waits == ["0.01 s", "0.015 s", "0.01 s", "0.015 s", "0.01 s"]


def test_gives_up_after_max_restarts(launch, train, tmp_path):
    ended = launch(train("1:75,2:75,3:75,4:75"), "--max_restarts=2")
    assert ended.returncode == 75
    assert num_starts(tmp_path) == 3
    assert "giving up; restarts: 2 (--max_restarts)" in ended.stderr


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        (["--run", "other"], "outputs/models/other"),
        (["--run=a", "--workdir=there", "--run=b"], "there/models/b"),
        (["--workdir", "there", "--", "--run=a"], "there/models/a"),
        (["--run=some/place"], "some/place"),
    ],
)
def test_finds_the_run(launch, train, flags, folder):
    assert "at step 7 of 10" in launch(train("7:75", *flags, folder=folder)).stderr


def test_the_command_is_passed_untouched(launch):
    given = ["", "a b", "--", "--help", "--run=x", "$HOME", "--"]
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    assert json.loads(launch([sys.executable, "-c", show, *given]).stdout) == given


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the train command is missing"),
        (["--"], "the train command is missing"),
        (["python", "train.py", RUN], "the train command is missing"),
        (["--", "python"], "the train command needs --run=NAME"),
        (["--", "python", "--run"], "the train command needs --run=NAME"),
        (["--", "python", "--run=latest"], "the train command needs --run=NAME"),
        (["--", "no-such-program", RUN], "cannot start 'no-such-program': No such file"),
        (["--", "/", RUN], "cannot start '/': Permission denied"),
        (["--same_step=0", "--", "python", RUN], "--same_step is 1 or more"),
        (["--backoff=nan", "--", "python", RUN], "the other numbers are 0 or more"),
        (["--max_restarts=x", "--", "python", RUN], "invalid int value: 'x'"),
        (["--nonsense", "--", "python", RUN], "unrecognized arguments: --nonsense"),
    ],
)
def test_usage_errors(tmp_path, arguments, message):
    ended = ran([sys.executable, "-m", "craft_jax.launch", *arguments], tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.startswith("launch: ") and ended.stderr.count("\n") == 1
    assert message in ended.stderr


def test_help_shows_an_example_and_needs_no_jax():
    show = (
        "import sys; from craft_jax import launch\n"
        "try:\n    launch.main(['--help'])\n"
        "finally:\n    assert 'jax' not in sys.modules"
    )
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [sys.executable, "-c", show], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "-- python -m craft_jax.main --config=configs/gpt.py --run=mine" in ended.stdout


@pytest.mark.parametrize("number", SIGNALS)
def test_passes_a_signal_on_and_ends_with_the_command(start, train, tmp_path, number):
    process = start(train("4:wait"))
    assert process.stdout.readline().startswith("ready")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    code = 130 if number == signal.SIGINT else 75
    assert (out, process.returncode) == (f"{number.name}\n", code)
    assert err == f"launch: stopped by {number.name} at step 4 of 10; exit code {code}\n"
    assert num_starts(tmp_path) == 1


def test_passes_a_second_ctrl_c_on(start, train):
    process = start(train("4:wait2"))
    assert process.stdout.readline().startswith("ready")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "SIGINT\n"
    process.communicate(timeout=60)
    assert process.returncode == 130


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_wait_before_a_restart(start, train, tmp_path, number):
    process = start(train("4:75"), "--backoff=1000", "--max_backoff=1000")
    assert "in 1000 s" in process.stderr.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 75)
    assert err == f"launch: stopped by {number.name} before the restart\n"
    assert num_starts(tmp_path) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_nothing_outlives_a_killed_launcher(start, train):
    process = start(train("4:wait"))
    pid = int(process.stdout.readline().split()[1])
    process.kill()
    assert process.communicate(timeout=60)[0] == "SIGTERM\n"
    wait_for_end(pid)


def test_what_a_dead_command_left_behind_is_ended(launch, tmp_path):
    # Holds the launcher's standard output open, so this test would run into its time limit.
    script = f"sleep 1000 & echo $! > left; kill -KILL $$ # {RUN}"
    ended = launch(["sh", "-c", script, RUN], "--same_step=2")
    assert ended.returncode == 137
    wait_for_end(int((tmp_path / "left").read_text()))


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--coordinator=auto"], 76, "restarts: 5 (--max_restarts)"),
        ([], 76, "deaths in a row without a new step: 3"),
    ],
)
def test_a_process_that_keeps_no_status(tmp_path, flags, code, words):
    """One of many gets on if it lives for a while; alone, it never made a step."""
    script = (
        "import sys; from craft_jax import launch; launch._LONG_LIFE_SECONDS = 0.2; "
        "sys.exit(launch.main(sys.argv[1:]))"
    )
    child = [sys.executable, "-c", "import os, time; time.sleep(0.3); os._exit(76)"]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            script,
            "--max_restarts=5",
            "--backoff=0",
            "--",
            *child,
            RUN,
            *flags,
        ],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code
    assert words in done.stderr
