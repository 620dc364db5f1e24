import json
import shutil

import pytest

from craft_jax import main as cli
from tests.conftest import micro, words


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    text = folder / "words.txt"
    text.write_text(words(2500), encoding="utf-8")
    for name in ("one", "two"):
        config = micro(text, training__sample_every=0)
        assert cli.main([*config, f"--workdir={folder / 'outputs'}", f"--run={name}"]) == 0
    return folder / "outputs"


@pytest.fixture
def trained(trained_once, workdir):
    """A copy of outputs with two runs."""
    shutil.copytree(trained_once, workdir)
    return workdir


def test_visualize(trained, capsys):
    for given in (["--run=one"], ["--run=one", "--run=two"], []):
        assert cli.main(["visualize", *given, f"--workdir={trained}"]) == 0
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
        ["one", "finished", "6/6"],
        ["two", "finished", "6/6"],
    ]


def test_runs_of_nothing(tmp_path, capsys):
    assert cli.main(["runs", f"--workdir={tmp_path}"]) == 0
    assert "no runs below" in capsys.readouterr().out


def test_prepare_and_train_share_the_cache(text_file, workdir, capsys):
    config = [*micro(text_file, training__sample_every=0), f"--workdir={workdir}"]
    assert cli.main(["prepare", *config]) == 0
    said = capsys.readouterr().out.splitlines()
    manifest = json.loads("\n".join(said[said.index("{") : said.index("}") + 1]))
    assert manifest["bytes"] == text_file.stat().st_size
    assert cli.main(config) == 0
    assert "prepared already" in capsys.readouterr().out
    caches = [p.name for p in (workdir / "data").iterdir() if p.name != "tokenizers"]
    assert caches == [said[-1].rsplit("/", 1)[1]]
    assert cli.main(["prepare", "--run=latest", f"--workdir={workdir}"]) == 0
