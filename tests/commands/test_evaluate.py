import json
import math
import shutil

import pytest

from craft_jax import main as cli
from craft_jax.training.loggers import read_json_lines
from tests.conftest import micro, words


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    text = folder / "words.txt"
    text.write_text(words(2500), encoding="utf-8")
    config = micro(text, training__sample_every=0)
    assert cli.main([*config, f"--workdir={folder / 'outputs'}"]) == 0
    return folder / "outputs"


@pytest.fixture
def trained(trained_once, workdir):
    """A copy of outputs with one run."""
    shutil.copytree(trained_once, workdir)
    return workdir


def evaluate(workdir, capsys, *words_):
    code = cli.main(["evaluate", f"--workdir={workdir}", *words_])
    said = capsys.readouterr()
    return json.loads(said.out.splitlines()[-1]) if code == 0 else (code, said.err)


def test_it_gives_what_training_printed(trained, capsys):
    result = evaluate(trained, capsys, "--run=latest")
    (metrics,) = (trained / "logs").glob("*.jsonl")
    last = read_json_lines(metrics)[-1]
    assert result["step"] == last["step"] == 6
    assert result["loss"] == pytest.approx(last["val_loss"], abs=1e-6)
    assert set(result) == {
        "split", "loss", "perplexity", "bits_per_byte", "accuracy", "tokens", "step", "run",
    }  # fmt: skip
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    (file,) = (trained / "evaluation").glob("eval_gpt_words_*.json")
    assert json.loads(file.read_text(encoding="utf-8")) == result
    (log,) = (trained / "logs").glob("eval_gpt_*.log")
    assert "bits_per_byte" in log.read_text(encoding="utf-8")


def test_an_earlier_checkpoint(trained, capsys):
    (folder,) = (trained / "models").iterdir()
    result = evaluate(trained, capsys, f"--run={folder / 'checkpoints/3'}")
    (metrics,) = (trained / "logs").glob("*.jsonl")
    assert result["step"] == 3
    assert result["loss"] == pytest.approx(read_json_lines(metrics)[2]["val_loss"], abs=1e-6)


def test_a_text_and_the_training_split(trained, capsys, tmp_path):
    path = tmp_path / "other.txt"
    path.write_text(words(100, seed=3), encoding="utf-8")
    result = evaluate(trained, capsys, f"--text={path}")
    assert result["split"] == "other.txt"
    assert result["tokens"] == len(words(100, seed=3)) - 1
    train = evaluate(trained, capsys, "--split=train")
    assert train["split"] == "train"
    assert train["tokens"] > 5 * result["tokens"]


def test_bits_per_byte_compare_tokenizers(text_file, workdir, capsys):
    """An untrained model of V tokens spends log2(V) bits on each, whatever a token is."""
    got = {}
    changes = {"training__num_steps": 1, "optim__learning_rate": 1e-9}
    changes |= {"training__sample_every": 0, "training__eval_every": 0}
    for kind in ("char", "byte"):
        config = micro(text_file, data__tokenizer=kind, optim__min_learning_rate=0, **changes)
        assert cli.main([*config, f"--run={kind}", f"--workdir={workdir}"]) == 0
        capsys.readouterr()
        got[kind] = evaluate(workdir, capsys, f"--run={kind}")
    assert got["byte"]["bits_per_byte"] == pytest.approx(math.log2(257), rel=0.02)
    assert got["char"]["bits_per_byte"] < 0.7 * got["byte"]["bits_per_byte"]
    # All of it is ASCII, and the byte tokenizer ends the text, of which a tenth validates.
    assert 0 <= got["byte"]["tokens"] - got["char"]["tokens"] <= 1


@pytest.mark.parametrize(
    ("words_", "code", "expected"),
    [
        (["--run=nothing"], 65, "--run=nothing: no such run"),
        (["--run=latest", "--text=missing.txt"], 65, "no such file"),
        (["--run=latest", "--config.model.d_model=32"], 78, "cannot replace 16"),
        (["--run=latest", "--config.model.width=32"], 78, "model.width is no field"),
    ],
)
def test_what_cannot_be_evaluated(trained, capsys, words_, code, expected):
    got, said = evaluate(trained, capsys, *words_)
    assert got == code
    assert expected in said


def test_a_text_with_unknown_characters(trained, capsys, tmp_path):
    (tmp_path / "x.txt").write_text("the \u20ac cat", encoding="utf-8")
    code, said = evaluate(trained, capsys, f"--text={tmp_path / 'x.txt'}")
    assert code == 65
    assert "'\u20ac' (U+20AC)" in said
