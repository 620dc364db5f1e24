"""What `tokenizer` and `data` say, and what they refuse."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from craft_jax import main as cli
from craft_jax.commands.data import in_words
from craft_jax.data import tokenizers
from craft_jax.data.tokenizers import Tokenizer
from tests.conftest import ROOT, micro, overrides

CONFIG = f"--config={ROOT / 'configs/gpt.py'}"


def run(capfd, *words_: object) -> tuple[int, str, str]:
    code = cli.main(list(map(str, words_)))
    said = capfd.readouterr()
    return code, said.out, said.err


def test_the_tokenizer_command(text_file, workdir, tmp_path, capfd):
    out = tmp_path / "made/tokenizer.json"
    config = [*micro(text_file, data__tokenizer="bpe"), f"--workdir={workdir}"]
    config.append("--config.data.vocab_size=300")
    code, said, _ = run(capfd, "tokenizer", *config, f"--out={out}")
    assert code == 0
    made = Tokenizer.load(out)
    assert f"{made.vocab_size:,} tokens, digest {made.digest[:16]}" in said
    text = text_file.read_text(encoding="utf-8")
    expected = len(text.encode()) / len(made.encode(text))
    found = float(re.search(r"bytes per token  ([\d.]+)", said)[1])
    assert found == pytest.approx(expected, abs=0.01)
    assert "sample split" in said
    # Training takes the same one.
    few = ["--config.training.num_steps=1", "--config.training.sample_every=0"]
    assert run(capfd, *config, *few)[0] == 0
    (kept,) = (workdir / "data/tokenizers").iterdir()
    assert Tokenizer.load(kept).digest == made.digest
    code, _, errors = run(capfd, "tokenizer", *config, f"--out={out}")
    assert (code, errors.count("\n")) == (73, 1)


def test_the_data_command_shows_a_mixture(text_file, workdir, tmp_path, capfd):
    lines = [json.dumps({"prompt": f"{a}+1=", "text": str(a + 1)}) for a in range(100)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines), encoding="utf-8")
    values = {
        "data.mixture": f"{tmp_path / 'sums.jsonl'}=3,{tmp_path / 'more.jsonl'}=1",
        "data.prompt_field": "prompt",
        "data.tokenizer": "byte",
        "data.layout": "packed",
        "data.seq_len": 32,
        "data.batch_size": 8,
        "training.num_steps": 10,
    }
    (tmp_path / "more.jsonl").write_text("\n".join(lines[:50]), encoding="utf-8")
    code, said, _ = run(capfd, "data", CONFIG, *overrides(values), f"--workdir={workdir}")
    assert code == 0
    assert re.search(r"sums +train +0\.750 ", said)
    assert re.search(r"more +train +0\.250 ", said)
    assert "segments int32 (8, 32)" in said
    assert re.search(r"\| \[\[<\|endoftext\|>\d+\+1=]]\d+<\|endoftext\|>\n  \| ---\n", said)
    assert said.count("\nrow ") == 4


@pytest.mark.parametrize(
    ("words_", "code", "expected"),
    [
        ([], 2, "needs a config"),
        ([CONFIG, "--step=-1"], 2, "--step=-1"),
        ([CONFIG, f"--config.data.path={__file__}", "--config.data.tokenizer=byte", "--split=test"],
         65, "nothing is held out"),
        ([CONFIG, "--config.data.source=digit"], 78, "did you mean 'digits'?"),
        ([CONFIG, "--config.data.source=tfds"], 78, "needs data.name"),
        ([CONFIG, "--config.data.mixture=x"], 78, "'x' is not SOURCE=WEIGHT"),
        ([CONFIG, "--config.data.mixture=stdlib=many"], 78, "does not end in a weight such as 0.7"),
        ([CONFIG, "--config.data.mixture=stdlib=0"], 78, "weights of batch 0 are all 0"),
        ([CONFIG, "--config.data.test_fraction=0.99"], 78, "leave nothing to train on"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown(workdir, capfd, words_, code, expected):
    got, _, errors = run(capfd, "data", *words_, f"--workdir={workdir}")
    assert (got, errors.count("\n")) == (code, 1) or code == 2
    assert expected in errors


def test_a_dataset_that_is_not_here(workdir, tmp_path, capfd):
    values = {"data.source": "tfds", "data.name": "tiny_shakespeare", "data.data_dir": tmp_path}
    code, _, errors = run(capfd, CONFIG, *overrides(values), f"--workdir={workdir}")
    assert (code, errors.count("\n")) == (65, 1)
    assert "craft_jax.main prepare" in errors
    assert not (workdir / "models").exists()


def test_images_of_a_folder(workdir, tmp_path, capfd):
    rng = np.random.default_rng(0)
    for n in range(40):
        file = tmp_path / f"pictures/{'ab'[n % 2]}/{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).save(file)
    values = {
        "data.source": "images",
        "data.path": tmp_path / "pictures",
        "data.image_size": 8,
        "data.batch_size": 8,
    }
    config = [CONFIG, *overrides(values), f"--workdir={workdir}"]
    code, said, _ = run(capfd, "data", *config)
    assert code == 0
    assert "images float32 (8, 8, 8, 3)" in said
    picture = re.search(r"picture +(.*)", said)[1]
    with Image.open(picture) as image:
        assert image.size[0] > 8 * 8
    code, _, errors = run(capfd, *config)
    assert (code, errors.count("\n")) == (78, 1)
    assert "model.name=gpt reads tokens" in errors


def test_rows_in_words():
    tokenizer = tokenizers.bytes_()
    end = tokenizer.end_id
    ids = [end, *tokenizer.encode("ask: say"), end]
    row = {
        "tokens": np.array([*ids[:-1], 0, 0], np.int32),
        "targets": np.array([*ids[1:], 0, 0], np.int32),
        "weights": np.array([0] * 5 + [1] * 4 + [0] * 2, np.float32),
    }
    assert in_words(row, tokenizer) == (
        "[[<|endoftext|>ask: ]]say<|endoftext|>\n(2 of 11 places are padding)"
    )


def test_running_text_has_no_fields(text_file, workdir, capfd):
    config = [*micro(text_file), "--config.data.prompt_field=prompt", f"--workdir={workdir}"]
    code, _, errors = run(capfd, "data", *config)
    assert (code, errors.count("\n")) == (65, 1)
    assert "is running text" in errors
