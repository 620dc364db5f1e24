"""Loggers that send the numbers of a run to Weights & Biases or to MLflow.

Both packages are optional and are imported when they are asked for. Where they send to is their own
business (`WANDB_MODE`, `MLFLOW_TRACKING_URI`); a server that fails while the run goes on costs a
warning. The ids of their runs are kept in `trackers.json`, so that a resumed run continues them.
"""

import importlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from craft_jax import outputs
from craft_jax.training.callbacks import StepRecord
from craft_jax.training.loggers import LogConfig, StepLogger

logger = logging.getLogger(__name__)

_FILE = "trackers.json"


def make(
    config: LogConfig, every: int, folder: Path, settings: Mapping[str, Any]
) -> list[StepLogger]:
    """Returns the trackers that a config names, without those that cannot begin: a warning says so.

    A run that goes on after a preemption does not wait for a server that is down.

    Args:
      config: names them.
      every: steps between lines.
      folder: of the run; its name is that of the tracked run.
      settings: the config of the run as JSON.
    """
    made: list[StepLogger] = []
    for field, place, cls in (
        ("log.wandb", config.wandb, WandbLogger),
        ("log.mlflow", config.mlflow, MlflowLogger),
    ):
        if not place:
            continue
        try:
            made.append(cls(place, every, folder, settings))
        except Exception as error:  # They have many kinds.
            reason = str(error).strip().splitlines()
            logger.warning(
                "%s=%s: %s; the run goes on without it",
                field,
                place,
                reason[0] if reason else repr(error),
            )
    return made


class _Tracker(StepLogger):
    """Says once that a tracker does not take what it is sent, and goes on without it."""

    name: str

    def __init__(self, every: int, folder: Path):
        super().__init__(every)
        self._folder, self._is_broken = folder, False

    def known_id(self) -> str | None:
        """Returns what the tracker called this run in an earlier life of it."""
        return self._ids().get(self.name)

    def keep_id(self, run_id: str) -> None:
        """Notes what the tracker calls this run."""
        outputs.write_json(self._folder / _FILE, self._ids() | {self.name: run_id})

    def _ids(self) -> dict[str, str]:
        try:
            return json.loads((self._folder / _FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def attempt(self, send: Callable[[], object]) -> None:
        """Sends something, if that is possible."""
        if self._is_broken:
            return
        try:
            send()
        except Exception as error:  # The run is worth more than its curves.
            self._is_broken = True
            logger.warning("%s takes no more numbers of this run: %s", self.name, error)


class WandbLogger(_Tracker):
    """Weights & Biases.

    Args:
      project: where the run appears.
      every, folder, settings: see `make`.
    """

    name = "wandb"

    def __init__(self, project: str, every: int, folder: Path, settings: Mapping[str, Any]):
        super().__init__(every, folder)
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_CONSOLE", "off")  # The run has a log of its own.
        self._run = importlib.import_module("wandb").init(
            project=project,
            name=folder.name,
            id=self.known_id(),
            resume="allow",
            dir=folder,
            config=dict(settings),
        )
        self.keep_id(self._run.id)
        # Its own counter cannot go back, as a run does that goes on from a checkpoint.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: StepRecord) -> None:
        self.attempt(lambda: self._run.log({"step": record.step, **record.numbers}))

    def on_train_end(self, record: StepRecord) -> None:
        super().on_train_end(record)
        self.attempt(self._run.finish)

    def on_roll_back(self, record: StepRecord) -> None:
        """Nothing begins again: see `step_metric`."""


class MlflowLogger(_Tracker):
    """MLflow, at `MLFLOW_TRACKING_URI`.

    Args:
      experiment: where the run appears; made if it is new.
      every, folder, settings: see `make`.
    """

    name = "mlflow"

    def __init__(self, experiment: str, every: int, folder: Path, settings: Mapping[str, Any]):
        super().__init__(every, folder)
        tracking = importlib.import_module("mlflow.tracking")
        self._entities = importlib.import_module("mlflow.entities")
        self._client = tracking.MlflowClient()
        self._id = self.known_id() or self._begin(experiment, settings)
        self._client.update_run(self._id, status="RUNNING")
        self.keep_id(self._id)

    def _begin(self, experiment: str, settings: Mapping[str, Any]) -> str:
        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else self._client.create_experiment(experiment)
        run_id = self._client.create_run(place, run_name=self._folder.name).info.run_id
        fields = [
            self._entities.Param(f"{section}.{name}", str(value)[:500])
            for section, values in settings.items()
            if isinstance(values, Mapping)
            for name, value in values.items()
            if value is not None
        ]
        for first in range(0, len(fields), 100):  # As many as it takes at a time.
            self._client.log_batch(run_id, params=fields[first : first + 100])
        return run_id

    def write(self, record: StepRecord) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._entities.Metric(name, float(value), now, record.step)
            for name, value in record.numbers.items()
            if value is not None
        ]
        for first in range(0, len(metrics), 1000):  # As many as it takes at a time.
            part = metrics[first : first + 1000]
            self.attempt(lambda part=part: self._client.log_batch(self._id, metrics=part))

    def on_train_end(self, record: StepRecord) -> None:
        super().on_train_end(record)
        status = "FINISHED" if record.is_last else "KILLED"
        self.attempt(lambda: self._client.set_terminated(self._id, status))

    def on_roll_back(self, record: StepRecord) -> None:
        """Nothing begins again: it keeps every value of a step."""
