"""Restarts a train command when it dies of something that a restart cures.

    python -m craft_jax.launch -- python -m craft_jax.main --config=configs/gpt.py --run=mine

What goes in is a command whose run has a name, so that each start continues the same run; what
comes out is the exit code of its last process. How far a run came is read from its `status.json`.
The launcher's own lines go to standard error.
"""

import argparse
import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from craft_jax import errors, outputs
from craft_jax.errors import CraftError, DataError, UsageError

# What a restart may cure. A process that a signal killed ends with 128 and the signal's number.
_RESUMABLE = {
    errors.PREEMPTED: "preempted (exit code 75)",
    errors.STALLED: "stalled, or lost a peer (exit code 76)",
    128 + signal.SIGABRT: "killed by SIGABRT (a peer was lost?)",
    128 + signal.SIGKILL: "killed by SIGKILL (out of memory?)",
    128 + signal.SIGSEGV: "killed by SIGSEGV (a crash in compiled code?)",
    errors.KILLED: "killed by SIGTERM before anything could be saved",
}

_EXAMPLE = """\
example:
  python -m craft_jax.launch -- python -m craft_jax.main --config=configs/gpt.py --run=mine

The command is restarted when it was preempted (75), stalled (76) or was killed by SIGABRT, SIGKILL,
SIGSEGV or SIGTERM (134, 137, 139, 143); any other exit code of it ends the launcher with that code.
Ctrl-C, SIGTERM and SIGUSR1 are passed on, and nothing is restarted after them. In a script of your
own, start the training with `exec`, so that signals reach it.
"""

# Where no step is known: longer than processes wait for each other in vain.
_LONG_LIFE_SECONDS = 300.0

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)

# How long what a dead command left behind may take to end, after each signal.
_LEFTOVERS_SECONDS = ((signal.SIGTERM, 30.0), (signal.SIGKILL, 5.0))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a train command until it needs no restart, and returns its exit code."""
    try:
        args, command = _parse(list(sys.argv[1:] if argv is None else argv))
        return _keep_running(args, command)
    except CraftError as error:
        _say(str(error))
        return error.exit_code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (python -m craft_jax.launch --help)")


def _parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    end = words.index("--") if "--" in words else len(words)
    own, command = words[:end], list(words[end + 1 :])
    parser = _Parser(
        prog="python -m craft_jax.launch",
        usage="python -m craft_jax.launch [flags] -- TRAIN COMMAND",
        description="Restarts a train command when it dies of something that a restart cures.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, default, text in (
        ("--max_restarts", 100, "give up after this many"),
        ("--backoff", 1.0, "seconds before a restart; they double while no step is new"),
        ("--max_backoff", 300.0, "the most of these seconds"),
        ("--same_step", 3, "give up after this many deaths in a row without a new step"),
    ):
        about = f"{text} (default: {default:g})"
        parser.add_argument(name, metavar="N", type=type(default), default=default, help=about)
    if not command and not {"-h", "--help"} & set(own):
        parser.error("the train command is missing; give it behind `--`")
    args = parser.parse_args(own)
    at_least_0 = (args.max_restarts, args.same_step - 1, args.backoff, args.max_backoff)
    if not all(number >= 0 for number in at_least_0):
        parser.error("--same_step is 1 or more, and the other numbers are 0 or more")
    args.run = _flag(command, "--run", "")
    args.workdir = Path(_flag(command, "--workdir", "outputs")).expanduser()
    if args.run in ("", "latest"):
        raise UsageError(
            "the train command needs --run=NAME, so that a restart continues the same run"
        )
    return args, command


def _flag(command: Sequence[str], name: str, default: str) -> str:
    """Returns the last value that a command gives a flag, as `--name=value` or `--name value`."""
    value = default
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == name:
            value = "" if following.startswith("-") else following
        elif word.startswith(f"{name}="):
            value = word.removeprefix(f"{name}=")
    return value


def _keep_running(args: argparse.Namespace, command: Sequence[str]) -> int:
    child = _Child(command)
    step = _status(args).get("step")
    deaths = restarts = 0
    # Only the first of several processes keeps the status of a run.
    is_one_of_many = bool(_flag(command, "--coordinator", ""))
    while True:
        start = time.monotonic()
        code = child.run()
        lived = time.monotonic() - start
        before, status = step, _status(args)
        step = status.get("step")
        at = "at no known step" if step is None else f"at step {step} of {status.get('num_steps')}"
        if child.stop:
            _say(f"stopped by {child.stop.name} {at}; exit code {code}")
            return code
        if code not in _RESUMABLE:
            if code != errors.OK:
                _say(f"exit code {code} {at}; a restart does not cure it")
            elif restarts:
                _say(f"done after {restarts} restart{'s' if restarts > 1 else ''}")
            return code
        if step is None:
            has_progressed = is_one_of_many and lived >= _LONG_LIFE_SECONDS
        else:
            has_progressed = before is None or step > before
        deaths = 1 if has_progressed else deaths + 1
        limit = None
        if deaths >= args.same_step:
            limit = f"deaths in a row without a new step: {deaths} (--same_step)"
        elif restarts >= args.max_restarts:
            limit = f"restarts: {restarts} (--max_restarts)"
        if limit:
            _say(f"{_RESUMABLE[code]} {at}; giving up; {limit}; {_where_to_look(args)}")
            return code
        restarts += 1
        # Beyond 2^30 times, any backoff but 0 is longer than anyone waits.
        wait = min(args.backoff * 2 ** min(deaths - 1, 30), args.max_backoff)
        _say(f"{_RESUMABLE[code]} {at}; restart {restarts} of {args.max_restarts} in {wait:g} s")
        if stop := child.stop_within(wait):
            _say(f"stopped by {stop.name} before the restart")
            return errors.INTERRUPTED if stop == signal.SIGINT else errors.PREEMPTED


class _Child:
    """The processes of a command, one at a time, and the signals that are passed on to them.

    Attributes:
      stop: the signal that asked the launcher to end; None before any.
    """

    def __init__(self, command: Sequence[str]):
        self.stop: signal.Signals | None = None
        self._command, self._process = command, None
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        # Training outlives a terminal only if it does not write to one, or is run with `nohup`.
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            if any(os.isatty(stream) for stream in range(3)):
                numbers.append(signal.SIGHUP)
            else:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in numbers:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        self.stop = signal.Signals(number)
        self._pass_on()

    def _pass_on(self) -> None:
        if self._process is None or self._process.returncode is not None:
            return
        # As from a terminal, Ctrl-C is for all; other signals are for the trainer, which may need
        # its workers to come to an end.
        send = os.killpg if self.stop == signal.SIGINT else os.kill
        with contextlib.suppress(ProcessLookupError):
            send(self._process.pid, self.stop)

    def run(self) -> int:
        """Runs the command to its end and returns the exit code, as a shell would."""
        try:
            # A session of its own, so that a terminal's Ctrl-C comes once: from the launcher.
            self._process = subprocess.Popen(
                self._command,
                start_new_session=True,
                preexec_fn=functools.partial(_end_with, os.getpid()),  # noqa: PLW1509
            )
        except OSError as error:
            raise UsageError(f"cannot start {self._command[0]!r}: {error.strerror}") from None
        if self.stop:  # It came before there was a process to pass it on to.
            self._pass_on()
        code = self._process.wait()
        _end_leftovers(self._process.pid)
        return 128 - code if code < 0 else code

    def stop_within(self, seconds: float) -> signal.Signals | None:
        """Waits, and returns early with the signal that asks to stop."""
        end = time.monotonic() + seconds
        while not self.stop and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        return self.stop


def _end_with(parent: int) -> None:
    """Makes the process that calls it get SIGTERM when its parent dies, where Linux runs."""
    # The launcher's handler would take note of the signal and forget it with the coming exec.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # It died before it was watched.
        os._exit(errors.KILLED)


def _end_leftovers(group: int) -> None:
    """Ends what is left of a dead command: it may hold memory, devices and the run's lock."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        for number, seconds in _LEFTOVERS_SECONDS:
            os.killpg(group, number)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                with contextlib.suppress(ChildProcessError):  # Ours if we are a container's init.
                    os.waitpid(-group, os.WNOHANG)
                os.killpg(group, 0)
                time.sleep(0.02)


def _folder(args: argparse.Namespace) -> Path:
    named, path = args.workdir / "models" / args.run, Path(args.run).expanduser()
    return path if path.is_dir() and not named.is_dir() else named


def _status(args: argparse.Namespace) -> dict:
    status = outputs.read_status(_folder(args)) or {}
    return status if isinstance(status.get("step"), int) else {}


def _where_to_look(args: argparse.Namespace) -> str:
    folder = _folder(args)
    with contextlib.suppress(DataError):
        return f"look at {folder}/status.json and the end of {outputs.open_run(folder).log}"
    return f"look at what it printed above; {folder} has no run.json that names a log"


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # The terminal may be gone; the training need not know.
        os.write(2, os.fsencode(f"launch: {line}\n"))


if __name__ == "__main__":
    sys.exit(main())
