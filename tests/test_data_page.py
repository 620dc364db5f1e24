"""docs/data.md is run as it stands: its files written down, its commands executed."""

import json
import re
import shlex
import sys

import pytest

from craft_jax import main as cli
from scripts import make_tfds
from tests.conftest import MICRO, ROOT, overrides, words

PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.S))
SNIPPETS = re.findall(r"```python\n(from .*?)```", PAGE, re.S)
COMMANDS = re.findall(r"^    python -m craft_jax\.main (.*)$", PAGE, re.M)
SMALL = {
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.d_model": 16,
    "data.seq_len": 64,
    "data.batch_size": 8,
}
# All that trains has the shapes of one program, which other tests compile, too.
SMALL_TRAINING = SMALL | {
    "model.max_seq_len": 16,
    "model.vocab_size": 300,
    "data.seq_len": 16,
    "training.num_steps": MICRO["training.num_steps"],
    "training.sample_tokens": 8,
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with everything that the page names."""
    here = tmp_path_factory.mktemp("page")
    (here / "configs").symlink_to(ROOT / "configs")
    for name, content in FILES.items():
        (here / name).write_text(content, encoding="utf-8")
    (here / "texts").mkdir()
    for n in range(12):
        (here / f"texts/{n}.txt").write_text(words(300, n), encoding="utf-8")
    sums = [{"prompt": f"{a} + 2 = ", "text": str(a + 2)} for a in range(200)]
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"Hello {a}?"},
                {"role": "assistant", "content": f"Hello, {a}."},
            ]
        }
        for a in range(200)
    ]
    for name, records in (("sums", sums), ("chats", chats)):
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        (here / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    (here / "my_dataset/data").mkdir(parents=True)
    for split, count in (("train", 40), ("validation", 20)):
        table = arrow.table({"text": [words(60, n) for n in range(count)]})
        parquet.write_table(table, here / f"my_dataset/data/{split}-00000-of-00001.parquet")
    (command,) = re.findall(r"^    python (scripts/make_tfds.py .*)$", PAGE, re.M)
    script, *rest = shlex.split(command)
    # In this process; tests/data/sources/test_tfds.py runs the script in one of its own.
    assert script == "scripts/make_tfds.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(sys, "argv", [script, *rest])
        assert make_tfds.main() == 0
    return here


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page(command, here, monkeypatch, capfd):
    monkeypatch.chdir(here)
    first, *rest = shlex.split(command)
    if first == "evaluate":
        return  # Of a run that is there: test_evaluate.py.
    small = SMALL_TRAINING if first.startswith("--") else SMALL
    if "tokenizer" not in command:
        small = small | {"data.vocab_size": 300}
    code = cli.main([first, *rest, *overrides(small)])
    said = capfd.readouterr()
    if first == "prepare":  # There is no network where the tests run, or there is.
        assert code in (0, 65)
        assert code == 0 or said.err.count("\n") == 1
        return
    assert code == 0, said.err
    if "chats.jsonl" in command:
        assert re.search(r"]]Hello, \d+\.<\|im_end\|>", said.out)
    if "sums.jsonl --" in command:
        assert re.search(r"\[\[<\|endoftext\|>\d+ \+ 2 = ]]\d+<\|endoftext\|>", said.out)


def test_the_page_has_what_this_test_reads():
    assert set(FILES) == {"poems.py", "evens.py"}
    assert len(COMMANDS) == 14
    assert len(SNIPPETS) == 1


def test_the_program_of_the_page(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    exec(compile(SNIPPETS[0], "docs/data.md", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out == "(8, 64)\n" * 3
