import os
import re
import shutil
import time

import pytest

from craft_jax import main as cli
from craft_jax import runs
from craft_jax.checkpoint import lock
from craft_jax.config import Override
from craft_jax.errors import ConfigError, DataError, RunInUseError, StorageError
from craft_jax.models.gpt import GPT, GPTConfig
from tests.conftest import micro, words


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text.txt"
    text.write_text(words(2500), encoding="utf-8")
    options = {"training__eval_every": 6, "training__sample_every": 0}
    for name in ("first", "second"):
        assert cli.main([*micro(text, **options), f"--workdir={folder}", f"--run={name}"]) == 0
    return folder


def test_open_by_name_path_latest_and_checkpoint(workdir, monkeypatch):
    folder = workdir / "models/first"
    for where in ("first", folder, str(folder) + "/"):
        assert runs.open(where, workdir=workdir).paths.folder == folder
    assert runs.open("latest", workdir=workdir).paths.name == "second"
    assert runs.open(folder, workdir="elsewhere").step == 6
    assert runs.open(folder / "checkpoints/3").step == 3
    monkeypatch.chdir(workdir)
    assert runs.open("models/first").paths.folder == folder


def test_what_is_not_there(workdir):
    with pytest.raises(DataError, match=r"no such run.*the newest are first, second"):
        runs.open("third", workdir=workdir)
    with pytest.raises(DataError, match="no run below"):
        runs.open("latest", workdir=workdir / "nowhere")
    with pytest.raises(StorageError, match="no checkpoint of step 4"):
        runs.open(workdir / "models/first/checkpoints/4")


@pytest.mark.parametrize(
    ("seconds", "age"), [(7, "7 s"), (125, "2 min"), (3 * 3600, "3 h"), (5 * 86400, "5 d")]
)
def test_how_old_a_run_is(workdir, tmp_path, capsys, seconds, age):
    folder = tmp_path / "models/old"
    shutil.copytree(workdir / "models/first", folder)
    then = time.time() - seconds
    for path in folder.rglob("*"):
        os.utime(path, (then, then))
    assert cli.main(["runs", f"--workdir={tmp_path}"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("old "))
    # A second or two may go by.
    assert age in line or (seconds < 60 and re.search(r"\b(8|9) s\b", line)), line


def test_a_run_rebuilds_itself(workdir):
    run = runs.open("first", workdir=workdir)
    assert isinstance(run.model, GPT)
    assert run.model.config.vocab_size == run.tokenizer.vocab_size
    assert run.config.model.d_model == 16
    assert {v.dtype.name for v in run.params.values()} == {"float32"}


def test_overrides_that_a_trained_model_can_take(workdir):
    run = runs.open("first", workdir=workdir, overrides=[Override("data.batch_size", "3")])
    assert run.config.data.batch_size == 3
    for field in ("model.num_layers=2", "data.tokenizer=bpe"):
        with pytest.raises(ConfigError, match="which the run was trained with"):
            runs.open("first", workdir=workdir, overrides=[Override(*field.split("="))])


def test_a_vocabulary_must_hold_the_data():
    assert runs.with_sizes(GPTConfig(), {"vocab_size": 65}).vocab_size == 65
    assert runs.with_sizes(GPTConfig(vocab_size=128), {"vocab_size": 65}).vocab_size == 128
    with pytest.raises(ConfigError, match=r"model\.vocab_size=64 is less than the 65 tokens"):
        runs.with_sizes(GPTConfig(vocab_size=64), {"vocab_size": 65})


def test_the_lock(workdir):
    paths = runs.open("first", workdir=workdir).paths
    assert not lock.is_held(paths.folder)
    with lock.hold(paths.folder):
        assert lock.is_held(paths.folder)
        with pytest.raises(RunInUseError, match=f"process {os.getpid()}"), lock.hold(paths.folder):
            pass
    assert not lock.is_held(paths.folder)
    with lock.hold(paths.folder):
        pass
