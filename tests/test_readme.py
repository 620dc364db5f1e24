"""Every command of the README is executed, and what it shows is what the project prints.

The two commands at the top install and train for minutes; scripts/check.sh runs the second as it
stands. Here the first is run from its training part on, as a process of its own, in a folder that
holds nothing but the configs; the others follow in the process of the test. All are shortened.
"""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from craft_jax import main as cli
from craft_jax.training.loggers import read_json_lines
from interop import __main__ as interop_cli
from tests.conftest import MICRO, ROOT, environment, overrides

README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALL = "python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt -e"
# In the shapes of many other tests, whose compiled programs are kept.
SHORT = {
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.d_model": 16,
    "data.batch_size": 8,
    "training.num_steps": MICRO["training.num_steps"],
    "training.sample_tokens": 8,
}
TEXT = {"data.seq_len": 16, "model.max_seq_len": 16, "model.vocab_size": 300}
SHORT_OF = {
    "configs/gpt.py": SHORT | TEXT | {"data.vocab_size": 300},
    "configs/shakespeare_char.py:cpu": SHORT | TEXT,
    "configs/seq2seq.py": SHORT | {"data.num_pairs": 50},
    "configs/flow.py": SHORT | {"model.patch_size": 4},
    "configs/image_gpt.py": SHORT,
}


def commands() -> list[str]:
    """Every command line of the README, in order, without the installation before it."""
    lines = re.findall(r"^    (.*python (?:-m (?:craft_jax|interop)|out/).*)$", README, re.M)
    return [f"python {line.rpartition('python ')[2].partition('#')[0]}" for line in lines]


def test_the_two_commands_at_the_top():
    first, second = re.findall(r"^    (python3 -m venv .*)$", README, re.M)
    assert first == f"{INSTALL} . && python -m craft_jax.main --config=configs/gpt.py"
    assert second == f"{INSTALL} '.[dev]' && pytest"
    assert README.index(first) < 1500


def test_every_command_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    found = commands()
    assert len(found) >= 6
    trained = 0
    for number, command in enumerate(found):
        given = shlex.split(command)[1:]
        if given[0] != "-m":
            if importlib.util.find_spec("transformers"):
                subprocess.run([sys.executable, *given], check=True)
            continue
        module, *rest = given[1:]
        if module == "interop":
            assert interop_cli.main(rest) == 0, command
            continue
        if "--help" in rest:
            continue
        # The shapes of a run are fixed when it begins.
        short = {}
        for config in (word for word in rest if word.startswith("--config=")):
            short = SHORT_OF[config.removeprefix("--config=")]
            trained += 1
            if "--run=wide" in rest:  # A later command trains it up to step 5, by the same program.
                short = short | {"training.num_steps": 3, "optim.decay_steps": 5}
        given = [*given, *overrides(short)]
        if not number:
            subprocess.run([sys.executable, *given], check=True, env=environment())
            assert {path.name for path in tmp_path.iterdir()} == {"configs", "outputs"}
            write_texts()
        else:
            assert cli.main(given[2:]) == 0, command
    logs = list(Path("outputs/logs").glob("*.jsonl"))
    assert len(logs) == trained
    for log in logs:
        assert "val_loss" in read_json_lines(log)[-1], log


def write_texts() -> None:
    """Writes what the commands name as text of one's own."""
    for place in re.findall(r"--config\.data\.path=(\S+)", README):
        path = Path(place) / "words.txt" if place.endswith("/") else Path(place)
        path.parent.mkdir(exist_ok=True)
        path.write_text(README * 2, encoding="utf-8")


@pytest.mark.parametrize("script", ["scripts/check.sh", ".ci/run"])
def test_scripts_are_sound(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)
