"""The only place that spells `outputs/...`: where runs, logs, samples and pictures go.

    {workdir}/models/{model}_{size}_{precision}_{date}_{time}/   a run: run.json, status.json,
                                                                 config.json, checkpoints/
    {workdir}/logs/train_{model}_{date}_{time}.log, .jsonl, /    log, metrics, TensorBoard events
    {workdir}/logs/eval_{model}_{date}_{time}.log
    {workdir}/samples/sample_{date}_{time}.txt .png
    {workdir}/evaluation/eval_{model}_{dataset}_{date}_{time}.json
    {workdir}/visualizations/{type}_{model}_{date}_{time}.png
    {workdir}/benchmarks/benchmark_{test}_{hardware}_{date}_{time}.json
    {workdir}/data/{digest}/                                     a token cache

Files are created here, empty, so that two processes in the same second cannot share one.
"""

import contextlib
import dataclasses
import datetime
import errno
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from craft_jax.checkpoint import manifest
from craft_jax.errors import DataError, OutputError, StorageError, UsageError

PARAMS, AVERAGE, OPTIMIZER = "params", "average", "optimizer"
"""The folders of a checkpoint's arrays."""

_META, _CONFIG, _TOKENIZER = "meta.json", "config.json", "tokenizer.json"

_NAME = re.compile(r"[\w][\w.+=-]*")
# What the project itself leaves beside checkpoints: partial, removed and damaged ones.
_SET_ASIDE = re.compile(r"^\.\d+\.(tmp|trash)-|^\d+\.(corrupt|aside)(-\d+)?$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPaths:
    """The files of one run.

    Attributes:
      folder: `{workdir}/models/{name}`.
      log, metrics, samples: text log, JSON lines, samples of the model's text.
      events: folder of the TensorBoard events.
    """

    folder: Path
    log: Path
    metrics: Path
    samples: Path
    events: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def workdir(self) -> Path:
        return _workdir(self.folder)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def config(self) -> Path:
        return self.folder / "config.json"

    @property
    def bad_steps(self) -> Path:
        return self.folder / "bad_steps"

    @property
    def exact(self) -> Path:
        return self.folder / "exact.jsonl"

    def to_json(self) -> dict[str, str]:
        """Returns the paths as text."""
        return {name: str(path) for name, path in vars(self).items()}

    @classmethod
    def from_json(cls, paths: Mapping[str, str]) -> "RunPaths":
        """Returns what `to_json` was called on."""
        return cls(**{name: Path(path) for name, path in paths.items()})


def create_run(
    workdir: Path, *, name: str | None, model: str, size: str, precision: str
) -> RunPaths:
    """Makes the folder of a new run and reserves its files.

    Args:
      workdir: the root of all outputs.
      name: of the run; None for `{model}_{size}_{precision}_{date}_{time}`.
      model, size, precision: words for the names of files.

    Raises:
      UsageError: the name cannot be a folder's.
      OutputError: the place cannot be written.
    """
    if name is not None:
        check_name(name)
    made: list[Path] = []

    def make(stamp: str) -> RunPaths:
        folder = workdir / "models" / (name or f"{model}_{size}_{precision}_{stamp}")
        log = workdir / "logs" / f"train_{model}_{stamp}.log"
        paths = RunPaths(
            folder=folder,
            log=log,
            metrics=log.with_suffix(".jsonl"),
            samples=workdir / "samples" / f"sample_{stamp}.txt",
            events=log.with_suffix(""),
        )
        for file in (paths.log, paths.metrics, paths.samples):
            _create(file)
            made.append(file)
        folder.mkdir(parents=True, exist_ok=name is not None)
        return paths

    try:
        paths = _with_free_stamp(make, made)
        write_index(paths)
    except OSError as error:
        for file in made:
            file.unlink(missing_ok=True)
        raise OutputError(f"cannot write outputs below {workdir}: {error}") from error
    return paths


class Checkpoints:
    """The step folders of one run, without their arrays; needs no JAX.

    A folder is a checkpoint if its name is a step and its manifest is whole; everything
    else beside it is left alone.

    Args:
      folder: where the step folders stand.
    """

    def __init__(self, folder: Path):
        self.folder = folder.absolute()

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, in order."""
        return sorted(step for step, wrong in self._surveyed().items() if wrong is None)

    def damaged(self) -> dict[int, str]:
        """Returns the steps whose folder holds something, but no whole manifest, and why."""
        return {step: wrong for step, wrong in sorted(self._surveyed().items()) if wrong}

    def corrupt(self) -> list[str]:
        """Returns the names of damaged checkpoints that were set aside."""
        if not self.folder.is_dir():
            return []
        return sorted(p.name for p in self.folder.iterdir() if ".corrupt" in p.name)

    def foreign(self) -> list[str]:
        """Returns the names of entries that are not the project's."""
        if not self.folder.is_dir():
            return []
        surveyed = {str(step) for step in self._surveyed()}
        return sorted(
            path.name
            for path in self.folder.iterdir()
            if path.name not in surveyed and not _SET_ASIDE.search(path.name)
        )

    def _surveyed(self) -> dict[int, str | None]:
        """Returns, by step, what is wrong with the folder of that name; None for nothing."""
        found: dict[int, str | None] = {}
        if not self.folder.is_dir():
            return found
        for path in self.folder.iterdir():
            if not (path.name.isdecimal() and path.name.isascii() and path.is_dir()):
                continue
            if path.name != str(int(path.name)):
                continue
            try:
                manifest.read(path)
                found[int(path.name)] = None
            except manifest.DamagedError as error:
                with contextlib.suppress(OSError):  # Another process may be removing it.
                    if any(path.iterdir()):
                        found[int(path.name)] = str(error)
        return found

    def newest_good(
        self, level: manifest.Level = "full", below: int | None = None
    ) -> tuple[int | None, dict[int, str]]:
        """Returns the newest step that is as it was written, and what is wrong with newer ones.

        Args:
          level: how closely to look, see `manifests.check`.
          below: only steps before this one; None for all.
        """
        surveyed = self._surveyed()
        bad: dict[int, str] = {}
        for step in sorted(surveyed, reverse=True):
            if below is not None and step >= below:
                continue
            wrong = surveyed[step] or self.wrong(step, level)
            if wrong is None:
                return step, bad
            bad[step] = wrong
        return None, bad

    def wrong(self, step: int, level: manifest.Level = "full") -> str | None:
        """Returns what is wrong with a checkpoint; None for nothing."""
        try:
            manifest.check(self.folder / str(step), level)
        except manifest.DamagedError as error:
            return str(error)
        return None

    def latest(self) -> int | None:
        """Returns the newest step, or None."""
        return max(self.steps(), default=None)

    def meta(self, step: int) -> dict:
        """Returns what was stored beside the arrays."""
        return self._read_json(step, _META)

    def config(self, step: int) -> dict:
        """Returns the config of the run, as JSON."""
        return self._read_json(step, _CONFIG)

    def tokenizer_file(self, step: int) -> Path | None:
        """Returns the path of the tokenizer, or None if the run has none."""
        path = self.folder / str(step) / _TOKENIZER
        return path if path.is_file() else None

    def params_part(self, step: int, *, last: bool = False) -> str:
        """Returns which part of a checkpoint has the parameters that are used.

        Args:
          step: of the checkpoint.
          last: those of the last update, even where there is an average of them.
        """
        return PARAMS if last or not self.has_average(step) else AVERAGE

    def has_average(self, step: int) -> bool:
        """Whether the optimizer kept an average of the parameters."""
        return (self.folder / str(step) / AVERAGE).is_dir()

    def has_optimizer(self, step: int) -> bool:
        """Whether a checkpoint can be continued to the bit; an imported one has weights only."""
        return (self.folder / str(step) / OPTIMIZER).is_dir()

    def _read_json(self, step: int, name: str) -> dict:
        path = self.folder / str(step) / name
        try:
            return json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        except (OSError, ValueError) as error:
            raise StorageError(f"checkpoint file {path} cannot be read: {error}") from error


def describe_run(folder: Path, model: str) -> RunPaths:
    """Returns the files of a run that was not trained yet; none of them exists."""
    workdir = _workdir(folder)
    log = workdir / "logs" / f"train_{model}_{folder.name}.log"
    return RunPaths(
        folder=folder,
        log=log,
        metrics=log.with_suffix(".jsonl"),
        samples=workdir / "samples" / f"sample_{folder.name}.txt",
        events=log.with_suffix(""),
    )


def write_index(paths: RunPaths, folder: Path | None = None) -> None:
    """Writes `run.json`, which names a run's files, into `folder` if that becomes the run's."""
    files = {
        field.name: os.path.relpath(getattr(paths, field.name), paths.workdir)
        for field in dataclasses.fields(paths)
        if field.name != "folder"
    }
    created = utc_now()
    write_json((folder or paths.folder) / "run.json", {"created": created, "files": files})


def make_files(paths: RunPaths) -> None:
    """Makes the files of a run that do not exist yet: an imported one has none.

    Raises:
      OutputError: the place cannot be written.
    """
    try:
        for file in (paths.log, paths.metrics, paths.samples):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    except OSError as error:
        raise OutputError(f"cannot write outputs below {paths.workdir}: {error}") from error


def open_run(folder: Path) -> RunPaths:
    """Finds the files of a run that exists.

    Raises:
      DataError: its `run.json` is missing or damaged.
    """
    try:
        files = json.loads((folder / "run.json").read_text(encoding="utf-8"))["files"]
        workdir = _workdir(folder)
        return RunPaths(folder=folder, **{kind: workdir / file for kind, file in files.items()})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is no run: its run.json cannot be read ({error})") from error


def _workdir(folder: Path) -> Path:
    """Returns what a run's files are relative to; an imported run may stand anywhere."""
    return folder.parent.parent if folder.parent.name == "models" else folder.parent


def all_runs(workdir: Path) -> list[Path]:
    """Returns the folders of all runs, oldest first."""
    found = [p.parent for p in (workdir / "models").glob("*/run.json")]
    return sorted(found, key=lambda folder: ((folder / "run.json").stat().st_mtime_ns, folder))


def check_name(name: str) -> None:
    """Checks that a run's name can be a folder's.

    Raises:
      UsageError: it cannot.
    """
    if not _NAME.fullmatch(name) or len(name) > 200:
        raise UsageError(
            f"--run={name!r} is no name for a run; use letters, digits, '_', '-', '.', '+' and '='"
        )


def eval_log(workdir: Path, model: str) -> Path:
    """Reserves `logs/eval_{model}_{date}_{time}.log`."""
    return _reserve(workdir, lambda stamp: f"logs/eval_{model}_{stamp}.log")


def sample_file(workdir: Path, ending: str = "txt") -> Path:
    """Reserves `samples/sample_{date}_{time}.txt`, or with another ending."""
    return _reserve(workdir, lambda stamp: f"samples/sample_{stamp}.{ending}")


def evaluation_file(workdir: Path, model: str, dataset: str) -> Path:
    """Reserves `evaluation/eval_{model}_{dataset}_{date}_{time}.json`."""
    return _reserve(workdir, lambda stamp: f"evaluation/eval_{model}_{dataset}_{stamp}.json")


def picture_file(workdir: Path, kind: str, model: str) -> Path:
    """Reserves `visualizations/{kind}_{model}_{date}_{time}.png`."""
    return _reserve(workdir, lambda stamp: f"visualizations/{kind}_{model}_{stamp}.png")


def benchmark_file(workdir: Path, test: str, hardware: str) -> Path:
    """Reserves `benchmarks/benchmark_{test}_{hardware}_{date}_{time}.json`."""
    return _reserve(workdir, lambda stamp: f"benchmarks/benchmark_{test}_{hardware}_{stamp}.json")


def write_beside_arrays(
    folder: Path, step: int, meta: Mapping, config: Mapping, tokenizer: str | None
) -> None:
    """Writes the files of a checkpoint that are not arrays."""
    if tokenizer is not None:
        write_text(folder / _TOKENIZER, tokenizer)
    write_json(folder / _CONFIG, config)
    write_json(folder / _META, {"step": step, **meta})


def utc_now() -> str:
    """Returns the time as `2026-01-31T23:59:59Z`."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


_STATUS = "status.json"


def write_status(folder: Path, status: Mapping[str, Any]) -> None:
    """Writes `status.json` of a run; a reader sees the old one or the new one."""
    write_text(folder / _STATUS, json.dumps(status, indent=2) + "\n", sync=False)


def read_status(folder: Path) -> dict | None:
    """Returns how a run's last process is doing, or how it ended; None where that is not known.

    Keys: `state` (running, preempted, interrupted, stalled, failed, done), `step`, `num_steps`,
    `loss`, `reason`, `exit_code`, `pid`, `host`, `started`, `updated` (UTC).
    """
    try:
        status = json.loads((folder / _STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return status if isinstance(status, dict) and "state" in status else None


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is whole or unchanged, whatever happens."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Writes UTF-8 text so that the file is whole or unchanged, whatever happens.

    Args:
      path, text: where and what.
      sync: whether to wait for the disk, so that this holds for a machine that loses power, too.
    """
    partial = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        # Names of files need not be Unicode.
        with partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            file.write(text)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(workdir: Path) -> None:
    """Checks that outputs can be written below a folder, and leaves nothing there.

    Raises:
      OutputError: they cannot.
    """
    missing = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise OutputError(f"cannot write outputs below {workdir}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            for folder in missing:
                folder.rmdir()


def _reserve(workdir: Path, name: Callable[[str], str]) -> Path:
    def make(stamp: str) -> Path:
        path = workdir / name(stamp)
        _create(path)
        return path

    try:
        return _with_free_stamp(make, [])
    except OSError as error:
        raise OutputError(f"cannot write outputs below {workdir}: {error}") from error


def _create(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, "is not a folder", str(path.parent)) from error
    path.touch(exist_ok=False)


def _with_free_stamp(make: Callable[[str], Any], made: list[Path]) -> Any:
    """Calls `make` with the time as `{date}_{time}`, or the next second for which it succeeds."""
    moment = datetime.datetime.now()
    while True:
        try:
            return make(moment.strftime("%Y%m%d_%H%M%S"))
        except FileExistsError:
            for file in made:
                file.unlink(missing_ok=True)
            made.clear()
            moment += datetime.timedelta(seconds=1)
