"""Loggers: callbacks that write down the numbers of a run.

To the terminal and the text log, to JSON lines, and to TensorBoard events.
"""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from craft_jax import outputs
from craft_jax.runtime.logging import PLAIN_ONLY, progress
from craft_jax.schema import Contradiction, setting
from craft_jax.training.callbacks import Callback, StepRecord

logger = logging.getLogger(__name__)

_SHOWN = {
    "loss": "validation loss",
    "bits_per_byte": "bits per byte",
    "exact_match": "exact match",
    "accuracy": "accuracy",
}


_STATUS_SECONDS = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is logged in addition to the defaults."""

    exact: bool = setting(
        False,
        "write exact.jsonl into the run: losses in hexadecimal and a digest of each batch",
        resumable=True,
    )
    norms_every: int = setting(
        0,
        "steps between the norms of each parameter, its gradient and its update; 0 for none",
        minimum=0,
        resumable=True,
    )
    wandb: str | None = setting(
        None, "a project of Weights & Biases that gets the metrics", resumable=True
    )
    mlflow: str | None = setting(
        None, "an experiment of MLflow that gets the metrics", resumable=True
    )

    def contradictions(self) -> Iterator[Contradiction]:
        for name in ("wandb", "mlflow"):
            if getattr(self, name) and importlib.util.find_spec(name) is None:
                field = f"log.{name}"
                yield Contradiction(
                    (field,),
                    f"{field}={getattr(self, name)} needs a package that is not installed: pip "
                    f"install 'craft_jax[{name}]'",
                )


class StepLogger(Callback):
    """Base of loggers: holds a step until it is known what an evaluation adds, and writes it once.

    Args:
      every: steps between lines.
    """

    def __init__(self, every: int):
        self._every = max(1, every)
        self._held: StepRecord | None = None

    def write(self, record: StepRecord) -> None:
        """Writes one step; to be overridden."""
        raise NotImplementedError

    def on_step_end(self, record: StepRecord) -> None:
        self._flush()
        is_due = record.step % self._every == 0 or record.is_last
        if is_due or record.norms or record.metrics.get("skipped"):
            self._held = record

    def on_evaluate_end(self, record: StepRecord) -> None:
        self._held = record

    def on_save(self, record: StepRecord) -> None:
        self._flush()

    def on_roll_back(self, record: StepRecord) -> None:
        self.on_train_end(record)
        self.on_train_begin(record)

    def on_train_end(self, record: StepRecord) -> None:
        self._flush()

    def _flush(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            self.write(held)


class ConsoleLogger(Callback):
    """A live progress line on a terminal, plain lines elsewhere and in the text log.

    Args:
      every: steps between plain lines.
      unit: what throughput counts, such as `tokens`.
    """

    def __init__(self, every: int, unit: str):
        self._every, self._unit = max(1, every), unit
        self._first_step = 0

    def on_train_begin(self, record: StepRecord) -> None:
        self._first_step = record.step

    def on_step_end(self, record: StepRecord) -> None:
        metrics = record.metrics
        if metrics.get("skipped") and "loss_scale" in metrics:
            logger.info(
                "step %d: float16 overflowed: update skipped, loss scale %g -> %g",
                record.step,
                metrics["loss_scale"],
                max(metrics["loss_scale"] / 2, 1),
            )
        elif metrics.get("skipped"):
            logger.warning(
                "step %d: loss %s, gradient norm %s: update skipped (batch %s)",
                record.step,
                metrics["loss"],
                metrics["grad_norm"],
                record.batch_index,
            )
        line = self._line(record)
        progress(line)
        if record.step % self._every == 0 or record.is_last:
            logger.info("%s", line, extra=PLAIN_ONLY)

    def on_evaluate_end(self, record: StepRecord) -> None:
        values = {name: record.metrics.get(f"val_{name}") for name in _SHOWN}
        # Beside whole targets it must be said what the accuracy counts.
        words = _SHOWN if values["exact_match"] is None else _SHOWN | {"accuracy": "token accuracy"}
        shown = ", ".join(f"{words[k]} {v:.4f}" for k, v in values.items() if v is not None)
        logger.info("step %d: %s", record.step, shown)

    def on_train_end(self, record: StepRecord) -> None:
        progress("")

    def _line(self, record: StepRecord) -> str:
        metrics, done = record.metrics, record.step - self._first_step
        left = record.elapsed / max(1, done) * (record.num_steps - record.step)
        rate = metrics.get(f"{self._unit}_per_second", 0.0)
        return (
            f"step {record.step}/{record.num_steps}  loss {metrics['loss']:.4f}  "
            f"lr {metrics['learning_rate']:.2e}  {rate:,.0f} {self._unit}/s  "
            f"{_clock(record.elapsed)} elapsed, {_clock(left)} left"
        )


class JsonLinesLogger(StepLogger):
    """One flat JSON object for each logged step.

    Args:
      path: the file; continued if it exists, after dropping steps that are to be done again.
      every: steps between lines.
    """

    def __init__(self, path: Path, every: int):
        super().__init__(every)
        self._path = path
        self._file: IO[str] | None = None

    def on_train_begin(self, record: StepRecord) -> None:
        self._file = continued(self._path, record.step - record.is_open)

    def write(self, record: StepRecord) -> None:
        assert self._file is not None
        line = {"step": record.step, **record.numbers}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def on_train_end(self, record: StepRecord) -> None:
        super().on_train_end(record)
        if self._file is not None:
            self._file.close()


class TensorBoardLogger(StepLogger):
    """TensorBoard events; see `event_files`.

    Args:
      folder: where the event file goes.
      every: steps between events.
    """

    def __init__(self, folder: Path, every: int):
        super().__init__(every)
        self._folder = folder
        self._first_step = 0
        self._file: IO[bytes] | None = None
        self._writer: Any = None

    def on_train_begin(self, record: StepRecord) -> None:
        self._first_step, self._writer = record.step + (not record.is_open), None
        self._folder.mkdir(parents=True, exist_ok=True)
        # A name of its own for each life of a run; TensorBoard reads them in this order.
        name = f"events.out.tfevents.{time.time_ns()}.craft_jax"
        self._file = (self._folder / name).open("wb")

    def write(self, record: StepRecord) -> None:
        if self._writer is None:
            # With TensorBoard, which takes a while to import.
            events = importlib.import_module("craft_jax.training.event_files")
            self._writer = events.EventWriter(self._file, self._first_step)
        numbers = {_tag(name): x for name, x in record.numbers.items() if x is not None}
        self._writer.scalars(record.step, numbers)

    def on_train_end(self, record: StepRecord) -> None:
        super().on_train_end(record)
        if self._file is not None:
            self._file.close()


class ExactLogger(Callback):
    """Each step to the bit, as JSON lines: floats in hexadecimal, and a digest of the batch.

    Args:
      path: the file; continued if it exists.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file: IO[str] | None = None

    def on_train_begin(self, record: StepRecord) -> None:
        self._file = continued(self._path, record.step)

    def on_step_end(self, record: StepRecord) -> None:
        assert self._file is not None
        line = {
            "step": record.step,
            "loss_hex": record.metrics["loss"].hex(),
            "grad_norm_hex": record.metrics["grad_norm"].hex(),
            "lr_hex": record.metrics["learning_rate"].hex(),
            "batch_md5": record.batch_md5,
            "skipped": record.metrics["skipped"],
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def on_roll_back(self, record: StepRecord) -> None:
        self.on_train_end(record)
        self.on_train_begin(record)

    def on_train_end(self, record: StepRecord) -> None:
        if self._file is not None:
            self._file.close()


class StatusFile(Callback):
    """How the run is doing, in a small file that others read.

    Args:
      folder: of the run; see `outputs.read_status` for what is written.
      num_steps: the length of the run.
    """

    def __init__(self, folder: Path, num_steps: int):
        self._folder = folder
        self._status: dict[str, Any] = {
            "state": "running",
            "step": None,
            "num_steps": num_steps,
            "loss": None,
            "reason": None,
            "exit_code": None,
            "pid": os.getpid(),
            "host": os.uname().nodename,
            "started": outputs.utc_now(),
        }
        self._next = 0.0

    def on_train_begin(self, record: StepRecord) -> None:
        self._update(step=record.step)

    def on_step_end(self, record: StepRecord) -> None:
        self._status |= {"step": record.step, "loss": _finite(record.metrics["loss"])}
        if time.monotonic() >= self._next:
            self._update()

    def finish(self, state: str, reason: str | None, exit_code: int, **more: Any) -> None:
        """Writes how the process ends."""
        self._update(state=state, reason=reason, exit_code=exit_code, **more)

    def _update(self, **changes: Any) -> None:
        self._next = time.monotonic() + _STATUS_SECONDS
        self._status |= changes | {"updated": outputs.utc_now()}
        with contextlib.suppress(OSError):  # A full disk is reported by what needs the disk.
            outputs.write_status(self._folder, self._status)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def continued(path: Path, last_step: int) -> IO[str]:
    """Opens a file of JSON lines to add to, without the steps after one: they are done again."""
    lines = read_json_lines(path)
    kept = [line for line in lines if line["step"] <= last_step]
    outputs.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return path.open("a", encoding="utf-8")


def read_json_lines(path: Path) -> list[dict]:
    """Reads the whole lines of a metrics file; a line cut off by a crash is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


def _tag(name: str) -> str:
    if "/" in name:
        return name
    return f"val/{name[4:]}" if name.startswith("val_") else f"train/{name}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
