"""What docs/extending.md and docs/generative.md tell to write is written down, and run."""

import re
import shlex
from pathlib import Path

import pytest

from craft_jax import main as cli
from craft_jax.training.loggers import read_json_lines
from tests.conftest import MICRO, ROOT, overrides

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.S))
COMMANDS = re.findall(r"^    python -m craft_jax\.main (.*)$", PAGE, re.M)
SHORT = {
    "data.seq_len": 8,
    "data.batch_size": 8,
    "data.tokenizer": "char",
    "training.num_steps": 40,
    "training.eval_every": 4,
    "training.sample_every": 0,
    "training.checkpoint_every": 0,
}
SMALL = {"model.num_layers": 1, "model.num_heads": 2, "model.d_model": 16}
# The shapes of a program that other tests compile, too; so few steps are enough to learn to count.
COUNTING = {
    "model.max_seq_len": 16,
    "model.vocab_size": 300,
    "data.seq_len": 16,
    "training.num_steps": MICRO["training.num_steps"],
    "training.eval_every": 2,
}


def test_the_page_has_what_this_test_reads():
    assert set(FILES) == {"patience.py", "counting.py", "bigram.py", "bigram_config.py"}
    assert len(COMMANDS) == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page(command, tmp_path, monkeypatch, text_file, capsys):
    for name, content in FILES.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    values = SHORT | ({} if "bigram" in command else SMALL)
    if "counting" in command:
        values |= COUNTING
    else:
        values["data.path"] = text_file
    if "patience" in command:  # Nothing is learned, so nothing improves for long.
        values |= {"optim.learning_rate": 1e-30, "optim.min_learning_rate": 0}
    words = [*shlex.split(command), *overrides(values), "--run=mine"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    (metrics,) = Path("outputs/logs").glob("*.jsonl")
    lines = read_json_lines(metrics)
    if "patience" in command:
        assert "stopped at step" in said
        assert "by no improvement" in said
    else:
        assert lines[-1]["step"] == values["training.num_steps"]
        losses = [line["val_loss"] for line in lines if "val_loss" in line]
        assert losses[-1] < losses[0]
    if "bigram" in command:  # From another folder, without the config file.
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        run = f"--run={tmp_path / 'outputs/models/mine'}"
        assert cli.main(["generate", run, "--max_new_tokens=5", "--prompt=the"]) == 0
        assert cli.main(["evaluate", run]) == 0


def test_a_vae_in_one_file(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs/generative.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"```python\n# (vae\w*\.py)\n(.*?)```", page, re.S))
    assert set(files) == {"vae.py", "vae_config.py"}
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    short = {"training.num_steps": 60, "training.eval_every": 20, "training.sample_every": 30}
    assert "    python -m craft_jax.main --config=vae_config.py\n" in page
    assert cli.main(["--config=vae_config.py", "--run=mine", *overrides(short)]) == 0
    (metrics,) = Path("outputs/logs").glob("*.jsonl")
    losses = [line["val_loss"] for line in read_json_lines(metrics) if "val_loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    assert len(list(Path("outputs/samples").glob("*.png"))) == 2
    run = f"--run={tmp_path / 'outputs/models/mine'}"
    assert cli.main(["evaluate", run]) == 0
    capsys.readouterr()
    assert cli.main(["generate", run, "--label=3", "--label=5", "--num_samples=4"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    assert cli.main(["generate", run, "--guidance=2"]) == 2
    assert "--guidance is nothing that model.name=" in capsys.readouterr().err
