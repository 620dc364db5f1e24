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

from craft_jax.errors import DataError, OutputError, UsageError

_NAME = re.compile(r"[\w][\w.+=-]*")


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
        paths = _paths(folder, model, stamp)
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


def describe_run(folder: Path, model: str) -> RunPaths:
    """Returns the files of a run that was not trained yet; none of them exists."""
    return _paths(folder, model, folder.name)


def _paths(folder: Path, model: str, stamp: str) -> RunPaths:
    workdir = _workdir(folder)
    log = workdir / "logs" / f"train_{model}_{stamp}.log"
    return RunPaths(
        folder=folder,
        log=log,
        metrics=log.with_suffix(".jsonl"),
        samples=workdir / "samples" / f"sample_{stamp}.txt",
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
            f"`run={name!r}` is no name for a run; use letters, digits, '_', '-', '.', '+' and '='"
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
    `loss`, `reason`, `exit_code`, `pid`, `host`, `started`, `updated` (UTC), and at the end `best`:
    the `step`, `value` and `metric` of the checkpoint with the best evaluation.
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
