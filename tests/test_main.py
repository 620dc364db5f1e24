import subprocess
import sys
import time

import pytest

from craft_jax import main as cli
from craft_jax.main import COMMANDS, main
from tests.conftest import ROOT, command, environment


def test_help_is_quick_and_imports_no_framework(craft):
    code = (
        "import sys; from craft_jax.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'jax', 'flax', 'grain', 'numpy', 'tokenizers', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert time.monotonic() - start < 3
    for name in COMMANDS:
        assert name in done.stdout
    assert "examples:" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert COMMANDS[name].summary in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["evalute"], "'evalute' is no command; did you mean 'evaluate'?"),
        (["xyzzy"], "there are train, evaluate"),
        ([], "a new run needs a config: --config=configs/gpt.py"),
        (["--confg=x.py"], "did you mean --config=x.py?"),
        (["generate", "--top_k=many"], "--top_k: invalid int value: 'many'"),
        (["generate", "--num_samples=0"], "must be at least 1"),
        (["evaluate", "--split=tests"], "invalid choice: 'tests'"),
        (["prepare"], "needs a config"),
        (["--run=a b", "--config=x.py"], "is no name for a run"),
    ],
)
def test_usage_errors(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr()
    assert expected in said.err
    assert said.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["evaluate", "generate", "visualize", "train"])
def test_latest_where_there_is_no_run(name, capsys, tmp_path):
    assert main([name, "--run=latest", f"--workdir={tmp_path}"]) == 65
    assert "there is no run below" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "overrides", "rest"),
    [
        (["--config.a.b=1", "x"], [("a.b", "1")], ["x"]),
        (["--config.a.b", "1", "--run=r"], [("a.b", "1")], ["--run=r"]),
        (["--config.a.b", "--run=r"], [("a.b", "true")], ["--run=r"]),
        (["--config.a.b"], [("a.b", "true")], []),
        (["--config.a.b=x=y"], [("a.b", "x=y")], []),
        (["--config=f.py", "--config.a.b=-1"], [("a.b", "-1")], ["--config=f.py"]),
        (["--config.a.b", "-1"], [("a.b", "-1")], []),
    ],
)
def test_overrides_are_taken_out(words, overrides, rest):
    assert cli._take_overrides(words) == (overrides, rest)


def test_five_mistakes_end_with_78_and_write_nothing(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict({'optim': {'learning_rat': 1e-3}})\n",
        encoding="utf-8",
    )
    words = [
        "--config=mine.py",
        "--config.model.num_layer=4",
        "--config.data.batch_size=2.5",
        "--config.model.dropout=1.5",
        "--config.model.num_heads=3",
    ]
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        command(*words),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78
    lines = done.stderr.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("config error: ") for line in lines)
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_imports_torch_or_tensorflow():
    """Even where they are installed: every module, as the commands load it."""
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in sorted((ROOT / "craft_jax").rglob("*.py"))
        if p.name != "__init__.py"
    ]
    code = (
        f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
        "print({'torch', 'tensorflow', 'transformers', 'tensorboardX'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_what_no_step_needs_is_imported_later():
    code = (
        "import sys, craft_jax.commands.train\n"
        "print({'orbax', 'tensorstore', 'tensorboard', 'matplotlib', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
