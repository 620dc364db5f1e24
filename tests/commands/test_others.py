import json

import pytest

from craft_jax import main as cli
from tests.conftest import micro


@pytest.fixture
def trained(text_file, workdir, capsys):
    for name in ("one", "two"):
        config = micro(text_file, training__num_steps=3)
        assert cli.main([*config, f"--workdir={workdir}", f"--run={name}"]) == 0
    capsys.readouterr()
    return workdir


def test_visualize(trained, capsys):
    for words in (["--run=one"], ["--run=one", "--run=two"], []):
        assert cli.main(["visualize", *words, f"--workdir={trained}"]) == 0
        path = capsys.readouterr().out.strip()
        assert path.endswith(".png")
        with open(path, "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    assert cli.main(["visualize", "--run=three", f"--workdir={trained}"]) == 65


def test_runs(trained, capsys):
    assert cli.main(["runs", f"--workdir={trained}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "step", "loss", "val", "loss", "age"]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["one", "finished", "3/3"],
        ["two", "finished", "3/3"],
    ]


def test_runs_of_nothing(tmp_path, capsys):
    assert cli.main(["runs", f"--workdir={tmp_path}"]) == 0
    assert "no runs below" in capsys.readouterr().out


def test_prepare_and_train_share_the_cache(text_file, workdir, capsys):
    config = [*micro(text_file), f"--workdir={workdir}"]
    assert cli.main(["prepare", *config]) == 0
    said = capsys.readouterr().out.splitlines()
    manifest = json.loads("\n".join(said[said.index("{") : said.index("}") + 1]))
    assert manifest["bytes"] == text_file.stat().st_size
    assert cli.main(config) == 0
    assert "prepared already" in capsys.readouterr().out
    caches = [p.name for p in (workdir / "data").iterdir() if p.name != "tokenizers"]
    assert caches == [said[-1].rsplit("/", 1)[1]]
    assert cli.main(["prepare", "--run=latest", f"--workdir={workdir}"]) == 0
