"""What a run shows of its inside when it is asked: norms, profiles, trackers."""

import gzip
import json

import numpy as np
import pytest

from craft_jax import main as cli
from craft_jax import outputs, runs
from craft_jax.training.loggers import read_json_lines
from tests.conftest import micro


@pytest.fixture
def train(text_file, workdir):
    def train(name, **changes):
        words = [*micro(text_file, **changes), f"--workdir={workdir}", f"--run={name}"]
        assert cli.main(words) == 0
        return outputs.open_run(workdir / "models" / name)

    return train


def test_norms_of_each_parameter(train):
    changes = {"training__num_steps": 8, "training__log_every": 100, "training__eval_every": 0}
    changes |= {"training__sample_every": 0, "optim__decay_steps": 6}
    changes |= {"training__keep_checkpoints": 9, "training__checkpoint_every": 1}
    with_norms = train("mine", log__norms_every=3, log__exact=True, **changes)
    without = train("other", log__exact=True, **changes)
    assert with_norms.exact.read_text() == without.exact.read_text()
    lines = {line["step"]: line for line in read_json_lines(with_norms.metrics)}
    assert sorted(lines) == [3, 6, 8]
    store = with_norms.checkpoints
    before, after = (runs.open(store / str(step)).params for step in (5, 6))
    line = lines[6]
    for path, array in after.items():
        assert line[f"parameter_norms/{path}"] == pytest.approx(np.linalg.norm(array), rel=1e-5)
        moved = np.linalg.norm(np.asarray(array) - np.asarray(before[path]))
        assert line[f"update_norms/{path}"] == pytest.approx(moved, rel=1e-3, abs=1e-6)
    squares = [v**2 for name, v in line.items() if name.startswith("gradient_norms/")]
    assert len(squares) == len(after)
    assert np.sqrt(sum(squares)) == pytest.approx(line["grad_norm"], rel=1e-5)
    assert not any("/" in name for name in lines[8])


def test_a_profile_of_some_steps(train, capsys):
    changes = {"training__sample_every": 0, "training__eval_every": 0, "optim__decay_steps": 6}
    paths = train("mine", profile__steps="3:4", log__exact=True, **changes)
    assert (
        f"profile of steps 3 to 4: tensorboard --logdir={paths.events}" in capsys.readouterr().out
    )
    (trace,) = paths.events.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("train_step" in event.get("name", "") for event in events)
    assert paths.exact.read_text() == train("other", log__exact=True, **changes).exact.read_text()
    # The first steps of a process, and of one that goes on; one that ends within its window.
    assert list(train("first", profile__steps="1:1", **changes).events.rglob("*.trace.json.gz"))
    again = train("first", profile__steps="7:99", **changes, training__num_steps=8)
    assert len(list(again.events.rglob("*.trace.json.gz"))) == 2


@pytest.mark.parametrize("steps", ["5:3", "0:2", "a:b", "3:", "-1:2", "1:2:3"])
def test_windows_that_are_none(text_file, workdir, capsys, steps):
    words = [*micro(text_file, profile__steps=steps), f"--workdir={workdir}"]
    assert cli.main(words) == 78
    assert f"profile.steps={steps} is not FIRST:LAST, such as 10:15" in capsys.readouterr().err
    assert not workdir.exists()


def test_trackers_follow_a_run(train, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    changes = {"training__sample_every": 0, "optim__decay_steps": 6, "log__mlflow": "letters"}
    train("mine", **changes)
    train("mine", **changes, training__num_steps=8)
    store = MlflowClient()
    (run,) = store.search_runs([store.get_experiment_by_name("letters").experiment_id])
    steps = {metric.step for metric in store.get_metric_history(run.info.run_id, "loss")}
    assert steps == set(range(1, 9))
    assert run.data.params["model.d_model"] == "16"


def test_a_bucket_is_no_folder(capsys):
    for command in (["--config=configs/gpt.py"], ["evaluate", "--run=latest"], ["runs"]):
        assert cli.main([*command, "--workdir=gs://bucket/outputs"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("--workdir=gs://bucket/outputs is no folder of a disk")
        assert len(said.splitlines()) == 1
