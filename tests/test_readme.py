"""Every command of the README is executed, and what it shows is what the project prints.

The two commands at the top install and train for minutes; scripts/check.sh runs the second as it
stands. Here the first is run from its training part on, shortened like all others.
"""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from craft_jax import main as cli
from interop import __main__ as interop_cli
from tests.conftest import ROOT, overrides, words

README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALL = "python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt -e"
SHORT = {
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.d_model": 16,
    "data.batch_size": 8,
    "training.num_steps": 3,
    "training.accumulate": 1,
    "training.sample_tokens": 8,
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
    for place in re.findall(r"--config\.data\.path=(\S+)", README):
        path = Path(place) / "words.txt" if place.endswith("/") else Path(place)
        path.parent.mkdir(exist_ok=True)
        path.write_text(words(3000), encoding="utf-8")
    found = commands()
    assert len(found) >= 6
    for command in found:
        given = shlex.split(command)[1:]
        if given[0] != "-m":
            if importlib.util.find_spec("transformers"):
                subprocess.run([sys.executable, *given], check=True)
            continue
        module, *given = given[1:]
        if module == "interop":
            assert interop_cli.main(given) == 0, command
            continue
        # The shapes of a run are fixed when it begins.
        short = SHORT if any(word.startswith("--config=") for word in given) else {}
        if "--help" in given:
            continue
        if given and given[0] == "prepare":
            short = {}
        assert cli.main([*given, *overrides(short)]) == 0, command


@pytest.mark.parametrize("script", ["scripts/check.sh", ".ci/run"])
def test_scripts_are_sound(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)
