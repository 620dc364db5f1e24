"""An encoder-decoder on pairs of text, through all commands."""

import json
import re
import shlex
import shutil
import subprocess

import pytest

from craft_jax import main as cli
from craft_jax import runs
from craft_jax.errors import UsageError
from craft_jax.models.seq2seq import Transformer
from tests.commands.test_train import final_digest, losses, run_paths
from tests.conftest import ROOT, command, environment, overrides, seal

MICRO = {
    "model.num_layers": 1,
    "model.num_decoder_layers": 1,
    "model.num_heads": 2,
    "model.d_model": 64,
    "model.max_seq_len": 12,
    "data.seq_len": 8,
    "data.batch_size": 8,
    "training.num_steps": 6,
    "training.eval_every": 3,
    "training.checkpoint_every": 3,
    "training.sample_every": 3,
    "training.log_every": 1,
}
NUMBERS = "zero one two three four five six seven eight nine".split()
PAIRS = [(word, str(i)) for i, word in enumerate(NUMBERS)] + [("ten", "10"), ("none", "0")]


def micro(file, **changes):
    """Words of a config that trains in seconds; changes are given with `__` for the dot."""
    values = MICRO | {"data.pairs": file}
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return [f"--config={ROOT / 'configs/seq2seq.py'}", *overrides(values)]


def main(workdir, *words):
    return cli.main([*map(str, words), f"--workdir={workdir}"])


def write(path, rows):
    path.write_text("".join(f"{s}\t{t}\n" for s, t in rows), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "numbers.tsv", PAIRS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Outputs with one run that knows all pairs but the last two by heart."""
    folder = tmp_path_factory.mktemp("seq2seq")
    config = micro(
        write(folder / "numbers.tsv", PAIRS), data__batch_size=32,
        training__num_steps=600, training__eval_every=0, training__checkpoint_every=0,
        training__sample_every=0, training__log_every=100,
    )  # fmt: skip
    # Compiled well, and on one device, it takes seconds.
    words = command(*config, "--run=mine", f"--workdir={folder}")
    subprocess.run(words, env=environment() | {"XLA_FLAGS": ""}, cwd=folder, check=True)
    return folder


def said(workdir, capsys, *words, code=0):
    capsys.readouterr()
    assert main(workdir, *words) == code
    return capsys.readouterr()


# Training.


def test_a_run_says_what_it_does_and_leaves_everything_behind(file, workdir, capsys):
    text = said(workdir, capsys, *micro(file)).out
    for words in (
        "8 pairs, up to 8 tokens in a source and in a target",
        r"step 3: validation loss \d\.\d+, exact match \d\.\d+, token accuracy \d\.\d+",
        r"sample at step 3\n  \| ten -> ",
        r"sample at step 6\n  \| ten -> ",
        r"  \| none -> .*  \(right: 0\)",
        r"finished: .*, exact match \d\.\d+",
        r"generate --run=\S+ .*--prompt=ten",
    ):
        assert re.search(words, text), words
    paths = run_paths(workdir)
    assert re.fullmatch(r"seq2seq_0\.1m_float32_\d{8}_\d{6}", paths.name)
    last = json.loads(paths.metrics.read_text(encoding="utf-8").splitlines()[-1])
    assert {"val_loss", "val_perplexity", "val_accuracy", "val_exact_match"} <= set(last)
    assert last["tokens_per_second"] > 0
    printed = re.findall(r"^  (?:evaluate|sample) +python -m craft_jax.main (.*)$", text, re.M)
    assert len(printed) == 2
    for line in printed:
        assert cli.main(shlex.split(line)) == 0
    assert "finished  6/6" in said(workdir, capsys, "runs").out
    assert said(workdir, capsys, "visualize").out.strip().endswith(".png")


def test_a_resumed_run_is_the_whole_run_to_the_bit(file, workdir, capsys):
    config = micro(
        file, model__dropout=0.2, training__num_steps=8, training__sample_every=0,
        training__checkpoint_every=4, training__eval_every=0,
        data__batch_size=16, model__d_model=16, log__exact=True,
    )  # fmt: skip
    assert main(workdir, *config, "--run=mine") == 0
    paths = run_paths(workdir, "mine")
    before = losses(paths), paths.exact.read_text(encoding="utf-8"), final_digest(paths)
    shutil.rmtree(paths.checkpoints / "8")
    assert "from step 4" in said(workdir, capsys, "--run=mine").out
    assert len(before[0]) == 8
    assert losses(paths) == before[0]
    assert paths.exact.read_text(encoding="utf-8") == before[1]
    assert final_digest(paths) == before[2]


def test_a_run_refuses_other_pairs(file, workdir, capsys):
    assert main(workdir, *micro(file, training__sample_every=0), "--run=mine") == 0
    write(file, [*PAIRS[:-1], ("noon", "0")])
    longer = "--config.training.num_steps=8"
    assert (
        "the data of run mine has changed"
        in said(workdir, capsys, "--run=mine", longer, code=78).err
    )


def test_a_run_that_begins_with_the_weights_of_another(trained, tmp_path, capsys):
    file = write(tmp_path / "more.tsv", [*PAIRS, ("neon", "10"), ("tone", "2")])
    config = micro(file, init_from="mine", training__sample_every=0, training__eval_every=0)
    config = [word for word in config if not word.startswith("--config.model.")]
    assert main(trained, *config, "--run=new") == 0
    new, old = runs.open("new", workdir=trained), runs.open("mine", workdir=trained)
    assert new.tokenizer.digest == old.tokenizer.digest
    assert new.model_def.config == old.model_def.config
    write(file, [*PAIRS, ("\u00f6ne", "1")])
    text = said(trained, capsys, *config, "--run=newer", code=65).err
    assert "line 13: the tokenizer does not know the character '\u00f6'" in text


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["--config.data.pairs=none"], 78, "model.name=seq2seq reads pairs, but data.pairs is"),
        (["--config.data.pairs=date"], 78, "did you mean 'dates'?"),
        (["--config.data.path=x.txt"], 78, "contradicts data.path="),
        (["--config.data.seq_len=5"], 65, "line 4: the source has 6 tokens with its end token"),
        (["--config.data.seq_len=13"], 78, "is longer than model.max_seq_len=12"),
    ],
)
def test_what_cannot_be_trained(file, workdir, capsys, words, code, expected):
    text = said(workdir, capsys, *micro(file), *words, code=code).err
    assert expected in text
    assert text.count("\n") == 1
    assert not workdir.exists()


def test_prepare_counts(file, workdir, capsys):
    text = said(workdir, capsys, "prepare", *micro(file)).out
    assert "pairs need no preparation; 10 train, 2 validate, " in text
    assert (
        "50 train, 50 validate"
        in said(
            workdir, capsys, "prepare", *micro("sort", data__num_pairs=50, data__seq_len=12)
        ).out
    )
    assert not workdir.exists()


# Evaluating.


def evaluate(workdir, capsys, *words):
    return json.loads(said(workdir, capsys, "evaluate", "--run=mine", *words).out.splitlines()[-1])


def test_evaluate(trained, capsys):
    result = evaluate(trained, capsys)
    assert set(result) == {
        "split", "loss", "perplexity", "accuracy", "exact_match", "tokens", "pairs", "step", "run",
    }  # fmt: skip
    # The last two of twelve validate, each with an end token.
    assert (result["pairs"], result["tokens"]) == (2, 5)
    train = evaluate(trained, capsys, "--split=train")
    assert (train["pairs"], train["tokens"]) == (10, 20)
    assert train["exact_match"] == train["accuracy"] == 1.0
    assert train["loss"] < 0.1 < result["loss"]


def test_evaluate_on_a_file(trained, capsys, tmp_path):
    rows = [*PAIRS[:3], ("three", "4")]
    result = evaluate(trained, capsys, f"--text={write(tmp_path / 'other.tsv', rows)}")
    assert (result["split"], result["pairs"], result["exact_match"]) == ("other.tsv", 4, 0.75)
    assert list((trained / "evaluation").glob("eval_seq2seq_other_*.json"))
    (tmp_path / "x.txt").write_text("one", encoding="utf-8")
    words = ["evaluate", "--run=mine", f"--text={tmp_path / 'x.txt'}"]
    assert "name a .tsv or .jsonl file" in said(trained, capsys, *words, code=2).err


# Generating.


def generate(workdir, capsys, *words, code=0):
    return said(workdir, capsys, "generate", "--run=mine", *words, code=code)


def test_generate_writes_targets_alone_one_a_line(trained, capsys, tmp_path):
    before = set((trained / "samples").iterdir())
    shown = generate(trained, capsys, "--prompt=seven")
    assert shown.out == "7\n"
    (file,) = set((trained / "samples").iterdir()) - before
    assert file.read_text(encoding="utf-8") == shown.out
    (tmp_path / "sources.txt").write_text("four\nnine\n", encoding="utf-8")
    words = ["--prompt=seven", f"--prompt_file={tmp_path / 'sources.txt'}"]
    assert generate(trained, capsys, *words).out == "7\n4\n9\n"
    assert generate(trained, capsys, *words, "--num_beams=3").out == "7\n4\n9\n"


def test_generate_samples(trained, capsys):
    words = ["--prompt=seven", "--num_samples=5", "--temperature=30", "--seed=1"]
    made = generate(trained, capsys, *words).out
    assert len(set(made.splitlines())) > 1
    assert made == generate(trained, capsys, *words).out
    assert made != generate(trained, capsys, *words[:3], "--seed=2").out
    one = generate(trained, capsys, "--prompt=seven", "--temperature=30", "--top_k=1").out
    assert one == "7\n"
    # A target ends where the positions do: one begins it.
    longest = max(len(line) for line in made.splitlines())
    assert longest <= 12


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "a model of pairs needs a source: give --prompt=TEXT"),
        (["--prompt="], "the source is empty"),
        (["--prompt=one", "--prompt="], "source 2 of 2 is empty"),
        (["--prompt=one\u20ac"], "the source has characters that this character tokenizer does"),
        (["--prompt=oneoneoneone"], "has 12 tokens and an end, but the context of this model is"),
        (["--prompt=one", "--num_beams=0"], "--num_beams=0 must be 1"),
        (["--prompt=one", "--length_penalty=1"], "is for a search; give --num_beams"),
        (["--prompt=one", "--num_beams=2", "--length_penalty=-1"], "must be 0 (none) or more"),
        (
            ["--prompt=one", "--num_beams=2", "--temperature=0.5", "--seed=1", "--num_samples=2"],
            "leave --temperature, --seed, --num_samples out",
        ),
    ],
)
def test_what_cannot_be_generated(trained, capsys, words, expected):
    shown = generate(trained, capsys, *words, code=2)
    assert expected in shown.err
    assert shown.out == ""


def test_from_a_notebook(trained):
    run = runs.open("mine", workdir=trained)
    assert isinstance(run.model, Transformer)
    assert run.generate("seven") == "7"
    assert run.generate(["seven", "two"], num_beams=4, length_penalty=0.5) == ["7", "2"]
    assert run.generate("seven", temperature=30.0, seed=1) != "7"
    with pytest.raises(UsageError, match="leave `temperature`, `seed` out"):
        run.generate("seven", num_beams=2, temperature=1.0, seed=3)


def test_a_run_that_names_no_pairs_generates_but_does_not_train(trained, capsys):
    """As one that was imported."""
    config = micro(trained / "numbers.tsv", training__sample_every=0, training__eval_every=0)
    assert main(trained, *config, "--run=bare") == 0
    paths = run_paths(trained, "bare")
    for place in (paths.config, paths.checkpoints / "6/config.json"):
        saved = json.loads(place.read_text(encoding="utf-8"))
        saved["data"]["pairs"] = None
        place.write_text(json.dumps(saved), encoding="utf-8")
    seal(paths.checkpoints / "6")
    assert main(trained, "generate", "--run=bare", "--prompt=two") == 0
    for words in (["evaluate", "--run=bare"], ["--run=bare", "--config.training.num_steps=8"]):
        assert (
            "name yours with --config.data.pairs=PATH" in said(trained, capsys, *words, code=2).err
        )
    words = ["evaluate", "--run=bare", f"--text={trained / 'numbers.tsv'}"]
    assert main(trained, *words) == 0
