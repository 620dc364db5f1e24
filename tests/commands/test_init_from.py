"""A run that begins with the weights of another, and one that was imported and never trained."""

import json
import shutil

import numpy as np
import pytest

from craft_jax import main as cli
from craft_jax import outputs, runs
from craft_jax.data import tokenizers
from craft_jax.training.loggers import read_json_lines
from tests.conftest import micro, words
from tests.interop.models import make_run, spec

TEXT = words(2500)
ONE_STEP = {"training__num_steps": 1, "training__sample_every": 0, "training__eval_every": 0}
ONE_STEP["optim__decay_steps"] = 1


@pytest.fixture
def tokenizer():
    return tokenizers.characters(TEXT, end_token=True)


@pytest.fixture
def imported(workdir, tokenizer):
    known = spec(num_layers=1, vocab_size=tokenizer.vocab_size + 3, dropout=0.25)
    return make_run(workdir / "models" / "imported", known, "bfloat16", tokenizer=tokenizer)


@pytest.fixture
def bare(workdir):
    """A run that has no tokenizer."""
    return make_run(workdir / "models" / "bare", spec(num_layers=1))


def main(workdir, *given):
    return cli.main([*map(str, given), f"--workdir={workdir}"])


def fine_tune(text, **changes):
    """The words of a small run whose model is that of its weights."""
    return [word for word in micro(text, **changes) if not word.startswith("--config.model.")]


def test_a_new_run_has_the_weights_the_model_and_the_tokenizer(text_file, workdir, imported):
    given = fine_tune(text_file, init_from="imported", **ONE_STEP)
    # So little that it is lost in rounding.
    given += ["--config.optim.learning_rate=1e-30", "--config.optim.min_learning_rate=1e-30"]
    given = [word for word in given if "tokenizer" not in word]
    assert main(workdir, "--run=new", *given) == 0
    new, old = runs.open("new", workdir=workdir), runs.open(imported)
    assert new.config.model == old.config.model
    assert new.tokenizer.digest == old.tokenizer.digest
    assert new.config.init_from == str(imported / "checkpoints" / "0")
    for name, value in old.params.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(new.params[name], value)
    # The same command again continues the run, which is finished.
    assert main(workdir, "--run=new", *given) == 0
    assert main(workdir, "--run=new", "--config.training.num_steps=2") == 0


def test_what_the_weights_do_not_fit_is_named(text_file, workdir, imported, capsys):
    given = fine_tune(text_file, init_from=imported, **ONE_STEP)
    assert main(workdir, "--run=new", *given, "--config.model.num_layers=5") == 78
    said = capsys.readouterr().err
    assert "model.num_layers=5 differs from 1" in said and "leave it out" in said
    assert not (workdir / "models" / "new").exists()
    assert main(workdir, "--run=new", *given, "--config.model.dropout=0.5") == 0
    assert runs.open("new", workdir=workdir).config.model.dropout == 0.5


def test_places_that_hold_no_run(text_file, workdir, tmp_path, capsys):
    assert main(workdir, *micro(text_file, init_from="nowhere")) == 65
    assert "init_from=nowhere" in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    assert main(workdir, *micro(text_file, init_from=tmp_path / "folder")) == 65
    assert "python -m interop import" in capsys.readouterr().err
    assert not workdir.exists()


def test_an_imported_run_evaluates_generates_and_trains(text_file, workdir, imported, capsys):
    assert main(workdir, "evaluate", "--run=imported", f"--text={text_file}") == 0
    before = json.loads(capsys.readouterr().out.splitlines()[-1])["loss"]
    assert main(workdir, "generate", "--run=imported", "--prompt=the", "--max_new_tokens=4") == 0
    assert main(workdir, "runs") == 0
    assert "imported  imported  -" in capsys.readouterr().out
    assert main(workdir, "evaluate", "--run=imported") == 2
    assert main(workdir, "--run=imported") == 2
    assert "data.path is empty" in capsys.readouterr().err
    training = [f"--config.data.path={text_file}", "--config.data.batch_size=8"]
    training += ["--config.training.num_steps=20", "--config.training.log_every=5"]
    training += ["--config.training.sample_every=0", "--config.optim.decay_steps=22"]
    assert main(workdir, "--run=imported", *training) == 0
    assert main(workdir, "--run=imported", *training) == 0
    capsys.readouterr()
    assert main(workdir, "evaluate", "--run=imported", f"--text={text_file}") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["loss"] < before
    # From here on it is a run like any other.
    assert main(workdir, "--run=imported", "--config.optim.learning_rate=1") == 78
    assert "optim.learning_rate" in capsys.readouterr().err
    assert main(workdir, "--run=imported", "--config.training.num_steps=22") == 0


def test_the_shape_of_an_imported_model_is_fixed(workdir, imported, text_file, capsys):
    given = ["--run=imported", f"--config.data.path={text_file}", "--config.model.num_heads=3"]
    assert main(workdir, *given) == 78
    assert "model.num_heads=3" in capsys.readouterr().err


def test_what_was_not_saved_yet_begins_with_the_weights_again(text_file, workdir, imported):
    """A process that is killed before its first checkpoint leaves a run that has none."""
    given = fine_tune(text_file, init_from="imported", **ONE_STEP)
    given = [word for word in given if "tokenizer" not in word]

    def first_loss():
        return read_json_lines(outputs.open_run(workdir / "models" / "new").metrics)[0]["loss"]

    assert main(workdir, "--run=new", *given) == 0
    loss, folder = first_loss(), workdir / "models" / "new"
    for given_words in ([*given, "--run=new"], ["--run=new"]):
        shutil.rmtree(folder / "checkpoints")
        assert main(workdir, *given_words) == 0
        assert first_loss() == loss
    assert main(workdir, "--run=new", "--config.checkpoint.resume=none") == 0
    assert first_loss() == loss
    assert (folder / "checkpoints" / "1.aside").is_dir()


def test_without_a_tokenizer_it_is_asked_for(bare, workdir, tmp_path, text_file, tokenizer, capsys):
    file = tmp_path / "tokenizer.json"
    file.write_text(tokenizer.json)
    for command in (
        ["generate", "--run=bare", "--prompt=the"],
        ["evaluate", "--run=bare", f"--text={text_file}"],
        fine_tune(text_file, init_from="bare"),
        ["--run=bare", f"--config.data.path={text_file}", "--config.data.batch_size=8"],
    ):
        given = [word for word in command if "data.tokenizer" not in word]
        assert main(workdir, *given) == 2, given
        assert "--tokenizer=PATH" in capsys.readouterr().err
        more = [f"--tokenizer={file}", "--config.training.num_steps=1"]
        more.append("--config.training.sample_every=0")
        more = more if given[0].startswith("--") else more[:1]
        more += ["--max_new_tokens=4"] if given[0] == "generate" else []
        assert main(workdir, *given, *more) == 0, given


def test_a_tokenizer_that_cannot_be(bare, imported, workdir, tmp_path, tokenizer, capsys):
    file = tmp_path / "tokenizer.json"
    file.write_text(tokenizer.json)
    assert main(workdir, "generate", "--run=imported", "--prompt=a", f"--tokenizer={file}") == 0
    for run, given, said, code in [
        ("imported", "byte", "is not the tokenizer of run imported", 78),
        ("bare", "bpe", "needs training text", 2),
        ("bare", "byte", "has 257 tokens", 65),
        ("bare", tmp_path / "none", "no such file", 65),
    ]:
        given = f"--tokenizer={given}"
        assert main(workdir, "generate", f"--run={run}", "--prompt=a", given) == code
        assert said in capsys.readouterr().err
