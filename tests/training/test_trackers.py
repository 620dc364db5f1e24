"""Weights & Biases and MLflow: their own packages, without a server."""

import json
import math

import pytest

from craft_jax.training import trackers
from craft_jax.training.callbacks import StepRecord
from craft_jax.training.loggers import LogConfig

SETTINGS = {"optim": {"name": "adamw", "learning_rate": 0.1}, "init_from": None}


def record(step: int, num_steps: int = 4, **norms: float) -> StepRecord:
    metrics = {"loss": 1 / step, "grad_norm": math.nan}
    return StepRecord(step=step, num_steps=num_steps, metrics=metrics, norms=norms)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A file store of MLflow."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    return MlflowClient()


def life(config: LogConfig, folder, steps) -> None:
    made = trackers.make(config, 2, folder, SETTINGS)
    for logger in made:
        logger.on_train_begin(record(steps[0]))
        for step in steps:
            logger.on_step_end(record(step, **({"gradient_norms/a": 2.0} if step == 3 else {})))
        logger.on_train_end(record(steps[-1]))


@pytest.mark.filterwarnings("ignore")
def test_mlflow_continues_its_run(store, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    config = LogConfig(mlflow="letters")
    life(config, folder, [1, 2, 3])
    life(config, folder, [3, 4])
    experiment = store.get_experiment_by_name("letters").experiment_id
    (run,) = store.search_runs([experiment])
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.params == {"optim.name": "adamw", "optim.learning_rate": "0.1"}
    losses = store.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in losses if m.step != 3] == [(2, 0.5), (4, 0.25)]
    (norm, _) = store.get_metric_history(run.info.run_id, "gradient_norms/a")
    assert norm.value == 2.0


@pytest.mark.filterwarnings("ignore")
def test_a_tracker_that_fails_costs_one_warning(store, tmp_path, caplog, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    (logger,) = trackers.make(LogConfig(mlflow="letters"), 1, folder, SETTINGS)
    # Its folder is gone, as a server may be.
    monkeypatch.setattr(logger, "_id", "0" * 32)
    with caplog.at_level("WARNING", "craft_jax"):
        for step in (1, 2, 3, 4):
            logger.on_step_end(record(step))
        logger.on_train_end(record(4))
    assert [r.message.partition(":")[0] for r in caplog.records] == [
        "mlflow takes no more numbers of this run"
    ]


@pytest.mark.filterwarnings("ignore")
def test_wandb_continues_its_run(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    config = LogConfig(wandb="letters")
    life(config, folder, [1, 2, 3])
    first = json.loads((folder / "trackers.json").read_text(encoding="utf-8"))["wandb"]
    life(config, folder, [3, 4])
    assert json.loads((folder / "trackers.json").read_text(encoding="utf-8"))["wandb"] == first
    files = list(folder.rglob(f"run-{first}.wandb"))
    assert len(files) == 2
    content = b"".join(path.read_bytes() for path in files)
    for word in (b"letters", b"learning_rate", b"gradient_norms"):
        assert word in content


@pytest.mark.filterwarnings("ignore")
def test_a_tracker_that_cannot_begin_is_left_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://here")
    with caplog.at_level("WARNING", "craft_jax"):
        assert trackers.make(LogConfig(mlflow="letters"), 1, tmp_path, SETTINGS) == []
    (message,) = [record.message for record in caplog.records if record.name.startswith("craft")]
    assert message.startswith("log.mlflow=letters: ")
    assert message.endswith("; the run goes on without it")
