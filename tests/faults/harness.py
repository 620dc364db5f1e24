"""What the fault tests share: a small run, processes to kill, and what it means to lose nothing."""

import contextlib
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from craft_jax import outputs
from craft_jax.checkpoint import manifest as manifests
from craft_jax.checkpoint.listing import Checkpoints

ROOT = Path(__file__).parent.parent.parent

Trials = Iterator[None]

TINY = {
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.d_model": 64,
    "model.max_seq_len": 32,
    "model.dropout": 0.1,
    "data.seq_len": 32,
    "data.batch_size": 8,
    "data.tokenizer": "char",
    "data.val_fraction": 0.1,
    "training.num_steps": 40,
    "training.eval_every": 20,
    "training.checkpoint_every": 5,
    "training.sample_every": 0,
    "training.sample_tokens": 4,
    "training.log_every": 1,
    "log.exact": True,
}
"""A run of 40 steps with dropout, and a checkpoint every five."""


class Lost(AssertionError):  # noqa: N818
    """Something that was promised did not happen."""


def need(condition: object, message: str) -> None:
    """Raises Lost unless a promise was kept."""
    if not condition:
        raise Lost(message)


@dataclasses.dataclass
class Ended:
    """A process that has ended.

    Attributes:
      code: its exit code; minus the signal that killed it.
      said: standard output and error together.
      seconds: how long it ran.
    """

    code: int
    said: str
    seconds: float

    def must(self, code: int, *words: str) -> "Ended":
        """Checks exit code and words of the output."""
        need(self.code == code, f"exit code {self.code}, not {code}:\n{self.said[-2000:]}")
        need("Traceback" not in self.said, f"a traceback:\n{self.said[-3000:]}")
        for word in words:
            need(word in self.said, f"{word!r} is not in:\n{self.said[-3000:]}")
        return self


class Child:
    """A training process in a session of its own, whose output goes to a file."""

    def __init__(self, words: list[str], env: dict[str, str], cwd: Path, **options: object):
        self.file = cwd / f"said_{time.monotonic_ns()}.txt"
        self._start = time.monotonic()
        with self.file.open("wb") as file:
            self.process = subprocess.Popen(
                words,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=env,
                cwd=cwd,
                start_new_session=True,
                **options,
            )

    @property
    def said(self) -> str:
        """What it has written so far."""
        return self.file.read_text(encoding="utf-8", errors="replace")

    def until(self, condition: Callable[[], object], seconds: float = 60) -> bool:
        """Waits until something is so; False if the process ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                return bool(condition())
            need(time.monotonic() < deadline, f"waited {seconds} s in vain:\n{self.said[-2000:]}")
            time.sleep(0.002)
        return True

    def signal(self, number: int) -> None:
        """Sends a signal to the process alone."""
        self.process.send_signal(number)

    def kill(self) -> Ended:
        """Kills the whole session with SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.wait()

    def wait(self, seconds: float = 120) -> Ended:
        """Waits for the end; nothing of the session may be left a moment later."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise Lost(f"still running after {seconds} s:\n{self.said[-2000:]}") from None
        took = time.monotonic() - self._start
        deadline = time.monotonic() + 10
        while _group_lives(self.process.pid):
            need(time.monotonic() < deadline, "the process left children behind")
            time.sleep(0.01)
        return Ended(code, self.said, took)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


class Lab:
    """A folder to break things in.

    Args:
      folder: empty.
      is_quick: whether to try little.
    """

    def __init__(self, folder: Path, is_quick: bool):
        self.folder, self.is_quick = folder, is_quick
        self.workdir = folder / "outputs"
        self.text = folder / "text.txt"
        rng = random.Random(0)
        words = ["the", "cat", "dog", "sees", "finds", "a", "red", "blue", "fox", "and", "not"]
        lines = [" ".join(rng.choices(words, k=rng.randint(3, 9))) for _ in range(1200)]
        self.text.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.rng = random.Random(7)
        self._references: dict[tuple, Path] = {}
        self._count = 0

    def name(self) -> str:
        """Returns a new name for a run."""
        self._count += 1
        return f"run{self._count}"

    def environment(self, **more: str) -> dict[str, str]:
        """Returns the environment of a newcomer, with a cache of compiled programs."""
        kept = {k: v for k, v in os.environ.items() if k not in ("CRAFT_FAULT", "XLA_FLAGS")}
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        return kept | cache | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | more

    def words(self, run: str, *more: str, **changes: object) -> list[str]:
        """Returns the command that trains a run; `a__b=1` changes the field `a.b`."""
        values = TINY | {"data.path": self.text}
        values |= {name.replace("__", "."): value for name, value in changes.items()}
        fields = [f"--config.{field}={value}" for field, value in values.items()]
        config = f"--config={ROOT / 'configs/gpt.py'}"
        start = [sys.executable, "-m", "craft_jax.main", config, *fields]
        return [*start, f"--run={run}", f"--workdir={self.workdir}", *more]

    def start(
        self,
        run: str,
        *more: str,
        fault: str = "",
        limit: Callable[[], None] | None = None,
        prefix: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
        **changes: object,
    ) -> Child:
        """Starts to train a run.

        Args:
          run: its name.
          *more: further words of the command.
          fault: what `CRAFT_FAULT` is.
          limit: called in the child before it runs.
          prefix: words before the command, such as `taskset`.
          env: further variables of the environment.
          **changes: fields of the config, with `__` for the dot.
        """
        env = self.environment(**(env or {}), **({"CRAFT_FAULT": fault} if fault else {}))
        if limit:  # It would leave half-written entries in the cache of compiled programs.
            env["JAX_ENABLE_COMPILATION_CACHE"] = "0"
        words = [*prefix, *self.words(run, *more, **changes)]
        return Child(words, env, self.folder, preexec_fn=limit)

    def train(self, run: str, *more: str, **options: object) -> Ended:
        """Trains a run to its end, whatever that is; see `start`."""
        return self.start(run, *more, **options).wait()

    def command(self, *words: str, **options: object) -> Ended:
        """Runs another command of `craft_jax.main`."""
        words = [sys.executable, "-m", "craft_jax.main", *words, f"--workdir={self.workdir}"]
        return Child(words, self.environment(), self.folder, **options).wait()

    def reference(self, **changes: object) -> str:
        """Returns the name of a run that nothing happened to."""
        key = tuple(sorted(changes.items()))
        if key not in self._references:
            name = self._references[key] = f"reference{len(self._references)}"
            self.train(name, **changes).must(0)
        return self._references[key]

    def copy(self, run: str, name: str | None = None) -> str:
        """Copies a run with its files under a new name, and returns that."""
        name = name or self.name()
        folder = self.run(name)
        shutil.copytree(self.run(run), folder)
        (folder / ".lock").unlink(missing_ok=True)
        index = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        for kind, file in index["files"].items():
            new = f"{file}.{name}"
            if (self.workdir / file).is_file():
                shutil.copy(self.workdir / file, self.workdir / new)
            index["files"][kind] = new
        (folder / "run.json").write_text(json.dumps(index), encoding="utf-8")
        return name

    def remove(self, name: str) -> None:
        """Removes a run that is not needed any more."""
        shutil.rmtree(self.run(name))

    # What a run left.

    def run(self, name: str) -> Path:
        """Returns the folder of a run."""
        return self.workdir / "models" / name

    def store(self, name: str) -> Checkpoints:
        """Returns its checkpoints."""
        return Checkpoints(self.run(name) / "checkpoints")

    def status(self, name: str) -> dict:
        """Returns its `status.json`."""
        return outputs.read_status(self.run(name)) or {}

    def exact(self, name: str) -> dict[int, dict]:
        """Returns the lines of `exact.jsonl` by step; each step must be there once, in order."""
        lines = _json_lines(self.run(name) / "exact.jsonl")
        steps = [line["step"] for line in lines]
        need(steps == sorted(set(steps)), f"exact.jsonl has the steps {steps}")
        return {line["step"]: line for line in lines}

    def metrics(self, name: str) -> list[int]:
        """Returns the steps of the run's metrics file; each must be there once, in order."""
        steps = [line["step"] for line in _json_lines(outputs.open_run(self.run(name)).metrics)]
        need(steps == sorted(set(steps)), f"the metrics have the steps {steps}")
        return steps

    def same(self, name: str, reference: str, first: int = 1, state: bool = True) -> None:
        """Checks that a run is, to the bit, another one from a step on."""
        ours, theirs = self.exact(name), self.exact(reference)
        need(max(ours) == max(theirs), f"ended at step {max(ours)}, not {max(theirs)}")
        for step in range(first, max(theirs) + 1):
            need(ours.get(step) == theirs[step], f"step {step}: {ours.get(step)} {theirs[step]}")
        need(self.metrics(name) == self.metrics(reference), "the metrics have other steps")
        if state:
            one, other = self.leaves(name), self.leaves(reference)
            need(one == other, "the last states differ")
        log = outputs.open_run(self.run(name)).log
        need(log.is_file(), f"no log {log}")

    def leaves(self, name: str) -> dict:
        """Returns the checksums of all arrays of the newest checkpoint, after reading its files."""
        store = self.store(name)
        step = store.latest()
        need(step is not None, "there is no checkpoint")
        manifest = manifests.check(store.folder / str(step))
        return dict(manifest.leaves)

    def tidy(self, name: str, keep: int = 2) -> None:
        """Checks that nothing half-written is left, and no more checkpoints than asked for."""
        names = [path.name for path in self.store(name).folder.iterdir()]
        odd = [n for n in names if "tmp" in n or "trash" in n]
        need(not odd, f"left behind: {odd}")
        steps = self.store(name).steps()
        need(len(steps) <= keep + 1, f"checkpoints {steps}")  # The best stays as well.


def _json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files(folder: Path) -> list[Path]:
    """Returns the files in a folder that have a content."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def damage(path: Path, kind: str, rng: random.Random) -> None:
    """Damages a file: `delete`, `empty`, `half` or `flip` (one bit)."""
    if kind == "delete":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content if kind == "flip" else content[: len(content) // 2 * (kind == "half")])


def small_files(num_bytes: int) -> Callable[[], None]:
    """Returns a `preexec_fn` with which a child cannot make files larger than so many bytes."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    return limit
