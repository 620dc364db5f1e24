"""docs/interop.md is run as it stands: its commands in order, then its Python."""

import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from craft_jax import main as cli
from craft_jax.data import tokenizers
from interop import __main__ as interop_cli
from interop.targets.registry import TARGETS
from tests.conftest import ROOT, words
from tests.interop.models import make_run, spec

pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

PAGE = (ROOT / "docs/interop.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    python (.*)$", PAGE, re.M)
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.S)
# A run that takes seconds; the page has no room for it.
SHORT = ["--config.training.num_steps=2", "--config.data.seq_len=32", "--config.data.batch_size=8"]


def test_every_command_and_every_line_of_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    Path("my_texts").mkdir()
    text = words(3000)
    for name in ("my_texts/words.txt", "some.txt"):
        Path(name).write_text(text, encoding="utf-8")
    tokenizer = tokenizers.characters(text + "def", end_token=True)
    known = spec(d_ff=192, vocab_size=tokenizer.vocab_size + 1)
    for name in ("wide", "shakespeare"):
        make_run(Path("outputs/models").absolute() / name, known, tokenizer=tokenizer)
    assert len(COMMANDS) >= 12
    for command in COMMANDS:
        given = shlex.split(command)
        if given[0] == "sample.py":
            continue
        if given[0] != "-m":
            subprocess.run([sys.executable, *given], check=True)
        elif given[1] == "interop":
            assert interop_cli.main(given[2:]) == 0, command
        else:
            trains = given[2].startswith("--")
            assert cli.main([*given[2:], *(SHORT if trains else [])]) == 0, command
    code = [block for block in CODE if "rule(" not in block]
    assert len(code) == 4
    monkeypatch.syspath_prepend("out/torch")
    sys.modules.pop("modeling_craft", None)  # That of another folder.
    for block in code:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Those of other packages.
            exec(compile(block, "docs/interop.md", "exec"), {"__name__": "__main__"})
    assert Path(sys.modules.pop("modeling_craft").__file__).parent == tmp_path / "out/torch"


def test_every_target_is_in_the_table():
    table = PAGE[PAGE.index("| `--to` |") : PAGE.index("`--to auto`")]
    assert all(f"`{name}`" in table for name in TARGETS)
