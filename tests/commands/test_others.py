import json
import shutil

import pytest

from craft_jax import main as cli
from craft_jax import outputs, runs
from craft_jax.training.loggers import read_json_lines
from interop import __main__ as interop_cli
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
    assert lines[0].split() == ["run", "state", "step", "loss", "val", "loss", "best", "age"]
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


def test_the_best_checkpoint_is_named_and_used(text_file, workdir, capsys):
    # The loss falls, so that by the highest loss the best checkpoint is an early one.
    changes = {"training__num_steps": 20, "training__eval_every": 5, "training__sample_every": 0}
    changes |= {"checkpoint__best_mode": "max"}
    flags = [*micro(text_file, **changes), f"--workdir={workdir}", "--run=mine"]
    assert cli.main(flags) == 0
    said = capsys.readouterr().out
    paths = outputs.open_run(workdir / "models" / "mine")
    evaluated = {
        line["step"]: line["val_loss"]
        for line in read_json_lines(paths.metrics)
        if "val_loss" in line
    }
    best = max(evaluated, key=evaluated.__getitem__)
    assert best < 20
    assert (
        f"best: step {best}, val_loss {evaluated[best]:.4f}; use it with --checkpoint=best" in said
    )
    status = outputs.read_status(paths.folder)
    assert status["best"] == {"step": best, "value": evaluated[best], "metric": "val_loss"}
    assert cli.main(["runs", f"--workdir={workdir}"]) == 0
    assert f"{evaluated[best]:.4f} at {best} " in capsys.readouterr().out
    for checkpoint, step in (("best", best), ("last", 20), ("20", 20)):
        flags = [f"--workdir={workdir}", "--run=mine", f"--checkpoint={checkpoint}"]
        assert cli.main(["evaluate", *flags]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (found["step"], found["loss"]) == (step, pytest.approx(evaluated[step], rel=1e-6))
        assert cli.main(["verify", *flags]) == 0
        assert capsys.readouterr().out.startswith(f"step {step}: whole")
        assert runs.open("mine", workdir=workdir, checkpoint=checkpoint).step == step
        out = workdir / f"out_{checkpoint}"
        flags = ["export", str(paths.folder), str(out), "--probe=none"]
        assert interop_cli.main([*flags, f"--checkpoint={checkpoint}"]) == 0
        manifest = json.loads((out / "interop_manifest.json").read_text(encoding="utf-8"))
        assert manifest["source"]["step"] == step
        capsys.readouterr()
    for flags, code, answer in (
        (["--run=mine", "--checkpoint=bset"], 2, "--checkpoint=bset is not best, last or a step"),
        (["--run=mine", "--checkpoint=7"], 74, f"no checkpoint of step 7; it has {best}, "),
        ([f"--run={paths.checkpoints / '20'}", "--checkpoint=best"], 2, "leave --checkpoint=best"),
    ):
        assert cli.main(["evaluate", f"--workdir={workdir}", *flags]) == code
        assert answer in capsys.readouterr().err


def test_a_run_without_an_evaluation_has_no_best(text_file, workdir, capsys):
    flags = micro(text_file, training__num_steps=1, data__val_fraction=0)
    assert cli.main([*flags, f"--workdir={workdir}", "--run=mine"]) == 0
    assert "best: " not in capsys.readouterr().out
    assert cli.main(["generate", f"--workdir={workdir}", "--checkpoint=best"]) == 2
    assert "no checkpoint of this run was evaluated; use last" in capsys.readouterr().err
