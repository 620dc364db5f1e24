import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from craft_jax import main as cli
from craft_jax import outputs, runs
from craft_jax.checkpoint import lock, store
from craft_jax.parallel import sharding
from craft_jax.parallel.sharding import ParallelConfig
from craft_jax.training import optim
from craft_jax.training import state as states
from craft_jax.training.loggers import read_json_lines
from craft_jax.training.precision import Policy
from tests.conftest import command, environment, micro, words
from tests.kinds import KINDS, command_words


def train(*words: object) -> int:
    return cli.main([str(word) for word in words])


def run_paths(workdir: Path, name: str | None = None) -> outputs.RunPaths:
    folder, _ = runs.locate(name or "latest", workdir)
    return outputs.open_run(folder)


def final_digest(paths: outputs.RunPaths) -> str:
    """The digest of the whole state in the newest checkpoint."""
    import jax

    run = runs.open(paths.folder)
    mesh = sharding.make_mesh(ParallelConfig(), jax.devices()[:1])
    optimizer = optim.make_optimizer(run.config.optim)
    policy = Policy.named(run.config.training.precision)
    abstract = states.abstract_state(run.model_def, optimizer, mesh, policy)
    return store.digest(run.store.read_state(run.step, abstract))


def losses(paths: outputs.RunPaths) -> dict[int, str]:
    """The loss of every logged step, to the bit; each step must be there once."""
    lines = read_json_lines(paths.metrics)
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    return {line["step"]: float(line["loss"]).hex() for line in lines}


def surroundings(**more: str) -> dict[str, str]:
    """The environment of a process with as many devices as this one, whose runs go on here."""
    return environment() | {"XLA_FLAGS": os.environ["XLA_FLAGS"]} | more


def stop_at(path: Path, *steps: int) -> str:
    """Writes a callback that stops after any of these steps; returns what names it."""
    path.write_text(
        "from craft_jax.training.callbacks import Callback, Stop\n"
        "class Now(Callback):\n"
        "    def on_step_end(self, record):\n"
        f"        return Stop('the test') if record.step in {steps} else None\n",
        encoding="utf-8",
    )
    return f"{path}:Now"


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    """The words that trained the run `mine`, and its outputs, which tests only read."""
    folder = tmp_path_factory.mktemp("finished")
    text = folder / "words.txt"
    text.write_text(words(2500), encoding="utf-8")
    # The same schedule for more steps: the same program.
    config = [*micro(text, training__sample_every=0, optim__decay_steps=6), "--run=mine"]
    assert train(*config, f"--workdir={folder / 'outputs'}") == 0
    return config, folder / "outputs"


@pytest.fixture
def finished(finished_once, workdir):
    """The words that trained the run `mine`, whose outputs are in a copy at `workdir`."""
    config, outputs_ = finished_once
    shutil.copytree(outputs_, workdir)
    return [*config, f"--workdir={workdir}"]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """The text and the outputs of a run without a name, which tests only add to, and its words."""
    folder = tmp_path_factory.mktemp("first")
    text = folder / "words.txt"
    text.write_text(words(2500), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert train(*micro(text), f"--workdir={folder / 'outputs'}") == 0
    return text, folder / "outputs", said.getvalue()


def test_a_run_leaves_everything_behind(first_run):
    _, workdir, said = first_run
    for words_ in (
        "devices    8 cpu devices",
        "precision  float32",
        "num_layers=1",
        "token_embedding",
        "8 sequences of 16 tokens: 128 tokens per step",
        "step 6/6  loss",
        "step 3: validation loss",
        "sample at step 3",
        "sample at step 6",
        "finished: training loss",
        "python -m craft_jax.main evaluate --run=",
        "python -m craft_jax.main generate --run=",
        "--config.training.num_steps=",
    ):
        assert words_ in said, words_
    names = {p.relative_to(workdir).as_posix() for p in workdir.rglob("*") if p.is_file()}
    stamp = r"\d{8}_\d{6}"
    for pattern in (
        rf"models/gpt_0\.0m_float32_{stamp}/checkpoints/6/meta\.json",
        rf"models/gpt_0\.0m_float32_{stamp}/config\.json",
        rf"logs/train_gpt_{stamp}\.log",
        rf"logs/train_gpt_{stamp}\.jsonl",
        rf"logs/train_gpt_{stamp}/events\.out\.tfevents.*",
        rf"samples/sample_{stamp}\.txt",
        rf"visualizations/curves_gpt_{stamp}\.png",
        r"data/[0-9a-f]{16}/manifest\.json",
    ):
        assert any(re.fullmatch(pattern, name) for name in names), pattern
    paths = run_paths(workdir)
    lines = read_json_lines(paths.metrics)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second"} <= set(lines[0])
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 6]
    assert "=== step 6 ===" in paths.samples.read_text(encoding="utf-8")
    assert "step 6/6" in paths.log.read_text(encoding="utf-8")


def test_the_next_commands_that_it_prints_work(first_run):
    _, _, said = first_run
    printed = re.findall(r"^  (?:evaluate|sample) +python -m craft_jax.main (.*)$", said, re.M)
    assert len(printed) == 2
    for line in printed:
        assert train(*shlex.split(line)) == 0


HARD = {
    "model__dropout": 0.2,
    "data__batch_size": 16,
    "training__accumulate": 2,
    "training__num_steps": 9,
    "training__checkpoint_every": 0,
    "training__eval_every": 4,
    "training__sample_every": 0,
}


def test_resume_is_exact(text_file, workdir, tmp_path):
    """With dropout, accumulation and more than one epoch: every later bit is the same."""
    text_file.write_text(words(600), encoding="utf-8")
    config = command_words("gpt", text_file, **HARD)
    assert train(*config, f"--workdir={workdir}", "--run=whole") == 0
    stopping = f"--config.training.callbacks={stop_at(tmp_path / 'stop.py', 1, 4, 7)}"
    for stop, given in ((1, [*config, stopping]), (4, []), (7, [])):
        assert train(*given, f"--workdir={workdir}", "--run=parts") == 0
        parts = run_paths(workdir, "parts")
        assert max(losses(parts)) in (stop, stop + 1)
    assert train("--run=parts", f"--workdir={workdir}") == 0
    assert losses(parts) == losses(run_paths(workdir, "whole"))
    assert final_digest(parts) == final_digest(run_paths(workdir, "whole"))
    assert len(list((workdir / "logs").glob("*.log"))) == 2


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param("image_gpt", {"training__precision": "bfloat16"}, id="image_gpt"),
        pytest.param(
            "flow", {"training__precision": "float16", "optim__ema_decay": 0.9}, id="flow"
        ),
    ],
)
def test_the_second_half_once_more_is_exact(text_file, workdir, kind, changes, capsys):
    """The loss scale of float16 and the average of the parameters go on too."""
    saving = {"training__checkpoint_every": 5, "training__keep_checkpoints": 9}
    changes = HARD | saving | changes
    config = command_words(kind, text_file, **changes)
    config += [f"--workdir={workdir}", "--run=mine"]
    assert train(*config) == 0
    paths = run_paths(workdir, "mine")
    before = losses(paths), final_digest(paths)
    for step in (8, 9):  # The best and the last.
        shutil.rmtree(paths.checkpoints / str(step))
    capsys.readouterr()
    assert train(*config) == 0
    assert "from step 5" in capsys.readouterr().out
    assert len(before[0]) == 9
    assert (losses(paths), final_digest(paths)) == before


@pytest.mark.parametrize(
    ("precision", "kind"),
    [
        # `scripts/faults.sh` kills more, and the tests above resume the other kinds.
        pytest.param(p, kind, marks=[] if (p, kind) == ("float32", "gpt") else pytest.mark.soak)
        for p in ("float32", "float16")
        for kind in KINDS
    ],
)
def test_kill_9_and_resume(kind, precision, text_file, workdir, tmp_path, capsys):
    """Killed in the middle of writing a checkpoint: the run ends as if nothing had happened."""
    changes = {
        "training__precision": precision,
        "data__batch_size": 16,
        "training__accumulate": 2,
        "training__sample_every": 0,
        "training__checkpoint_every": 2,
        "optim__ema_decay": 0.9,
        "model__dropout": 0.2,
    }
    config = command_words(kind, text_file, **changes)
    config.append(f"--workdir={workdir}")
    assert train(*config, "--run=whole") == 0
    killed = subprocess.run(
        command(*config, "--run=parts"),
        env=surroundings(CRAFT_FAULT="ckpt.before_commit:2:kill9"),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    capsys.readouterr()
    assert train(*config, "--run=parts") == 0
    said = capsys.readouterr().out
    assert "resuming from step 2" in said, said
    whole, parts = run_paths(workdir, "whole"), run_paths(workdir, "parts")
    assert losses(parts) == losses(whole)
    digests = {
        (last, name): store.digest(runs.open(paths.folder, last=last).params)
        for last in (True, False)
        for name, paths in (("whole", whole), ("parts", parts))
    }
    assert digests[True, "whole"] == digests[True, "parts"]
    assert digests[False, "whole"] == digests[False, "parts"] != digests[True, "parts"]


@pytest.mark.parametrize(
    ("kind", "number", "code"),
    [
        # `scripts/faults.sh` sends more.
        pytest.param("gpt", signal.SIGINT, 130, marks=pytest.mark.soak),
        ("gpt", signal.SIGTERM, 75),
        pytest.param("image_gpt", signal.SIGTERM, 75, marks=pytest.mark.soak),
        ("flow", signal.SIGINT, 130),
    ],
)
def test_a_signal_saves_and_the_printed_command_continues(
    text_file, workdir, tmp_path, kind, number, code, monkeypatch, capsys
):
    config = command_words(kind, text_file, training__num_steps=4000, training__eval_every=0)
    config += ["--config.training.checkpoint_every=0", "--config.training.sample_every=0"]
    output = tmp_path / "said.txt"
    with output.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(
            command(*config, f"--workdir={workdir}", "--run=mine"),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=surroundings(),
            cwd=tmp_path,
        )
        deadline = time.monotonic() + 120
        while "step 5/" not in output.read_text(encoding="utf-8"):
            assert time.monotonic() < deadline and child.poll() is None, output.read_text()
            time.sleep(0.05)
        child.send_signal(number)
        assert child.wait(timeout=60) == code
    text = output.read_text(encoding="utf-8")
    assert "Traceback" not in text
    paths = run_paths(workdir, "mine")
    (stopped,) = re.findall(r"stopped at step (\d+) of 4000", text)
    assert store.CheckpointStore(paths.checkpoints).latest() == int(stopped)
    assert max(losses(paths)) == int(stopped)
    (again,) = re.findall(r"to continue: python -m craft_jax.main (.*)", text)
    more = f"--config.training.num_steps={int(stopped) + 2}"
    monkeypatch.chdir(tmp_path)
    assert train(*again.split(), more) == 0
    said = capsys.readouterr().out
    assert f"continuing mine at step {stopped}" in said
    assert f"changed: training.num_steps from 4000 to {int(stopped) + 2}" in said
    assert max(losses(paths)) == int(stopped) + 2


def test_the_same_command_again(finished, workdir, capsys):
    """A run that is finished says so; one that is extended goes on in its own files."""
    config = finished
    files = sorted(p for p in workdir.rglob("*") if p.is_file())
    capsys.readouterr()
    assert train(*config) == 0
    assert "run mine is finished: 6 of 6 steps" in capsys.readouterr().out
    assert sorted(p for p in workdir.rglob("*") if p.is_file()) == files
    assert train(*config, "--config.training.num_steps=8") == 0
    assert list(losses(run_paths(workdir))) == list(range(1, 9))


def test_a_longer_run_stays_longer(text_file, workdir, capsys):
    """The length that a run was given last is the one that the bare command goes by."""
    changes = {"training__eval_every": 0, "training__sample_every": 0, "optim__decay_steps": 6}
    stopping = stop_at(text_file.with_name("stop.py"), 8)
    config = micro(text_file, training__callbacks=stopping, **changes)
    assert train(*config, "--run=mine", f"--workdir={workdir}") == 0
    again = ["--run=mine", f"--workdir={workdir}"]
    assert train(*again, "--config.training.num_steps=12") == 0
    assert max(losses(run_paths(workdir))) in (8, 9)
    assert train(*again) == 0
    assert max(losses(run_paths(workdir))) == 12


def test_a_callback_that_is_missing_leaves_nothing(text_file, workdir, capsys):
    config = micro(text_file, training__callbacks="nope.py:Missing")
    assert train(*config, f"--workdir={workdir}") == 78
    assert "training.callbacks=" in capsys.readouterr().err
    assert not workdir.exists()


def test_a_run_refuses_another_config(finished, capsys):
    assert train(*finished, "--config.model.d_model=32", "--config.optim.beta1=0.8") == 78
    said = capsys.readouterr().err
    assert "model.d_model=32 differs from 16, with which run mine began" in said
    assert "optim.beta1=0.8 differs from 0.9" in said


def test_a_run_refuses_other_data(text_file, workdir, capsys):
    config = [*micro(text_file, training__sample_every=0), f"--workdir={workdir}"]
    assert train(*config, "--run=mine") == 0
    text_file.write_text(words(2500, seed=1), encoding="utf-8")
    assert train("--run=mine", f"--workdir={workdir}", "--config.training.num_steps=8") == 78
    assert "the data of run mine has changed since step 6" in capsys.readouterr().err


def test_two_trainers_on_one_run(finished, workdir, capsys):
    with lock.hold(run_paths(workdir).folder):
        again = ["--run=mine", f"--workdir={workdir}", "--config.training.num_steps=9"]
        assert train(*again) == 69
    said = capsys.readouterr().err
    assert re.search(rf"run mine is in use by process {os.getpid()} on ", said)
    assert train(*again) == 0


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the text is empty"),
        (b"x", "data.seq_len=16 needs at least 17 tokens, but the training split has 1"),
        (b"\xff\xfe\0a", "is UTF-16 text: byte 0xff at offset 0"),
        (b"abc\xe9\n" * 100, "not UTF-8 text: byte 0xe9 at offset 3"),
        (None, "no such file or folder"),
    ],
)
def test_texts_that_cannot_be_trained_on(tmp_path, workdir, content, expected, capsys):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    assert train(*micro(path), f"--workdir={workdir}") == 65
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
    assert not (workdir / "models").exists()


def test_a_window_longer_than_the_validation_split(text_file, workdir, capsys):
    config = micro(text_file, data__val_fraction=0.001, training__sample_every=0)
    assert train(*config, f"--workdir={workdir}") == 0  # Padded.
    config = micro(text_file, data__val_fraction=0.0001)
    assert train(*config, f"--workdir={workdir}/other") == 65
    assert "but the validation split has" in capsys.readouterr().err


LINES = "line\r\n" * 400
WIDE = "\u6f22\u5b57 \U0001f642 caf\u00e9\n" * 200
ONE_LINE = "no newline at all " * 200


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        pytest.param("char", LINES, id="char-lines", marks=pytest.mark.soak),
        pytest.param("char", WIDE, id="char-wide"),
        pytest.param("char", ONE_LINE, id="char-one_line"),
        pytest.param("bpe", LINES, id="bpe-lines"),
        pytest.param("bpe", WIDE, id="bpe-wide", marks=pytest.mark.soak),
        pytest.param("bpe", ONE_LINE, id="bpe-one_line", marks=pytest.mark.soak),
    ],
)
def test_texts_that_can(tmp_path, workdir, text, tokenizer):
    path = tmp_path / "fine.txt"
    path.write_bytes(text.encode())
    changes = {"training__num_steps": 2, "data__tokenizer": tokenizer, "data__vocab_size": 260}
    assert train(*micro(path, **changes), f"--workdir={workdir}") == 0


def test_without_validation_and_samples(text_file, workdir):
    changes = {"data__val_fraction": 0.0, "training__sample_every": 0}
    assert train(*micro(text_file, **changes), f"--workdir={workdir}") == 0
    assert "val_loss" not in read_json_lines(run_paths(workdir).metrics)[-1]


def test_a_place_that_cannot_be_written(text_file, tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert train(*micro(text_file), f"--workdir={tmp_path / 'file'}") == 73
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.soak  # tests/training/test_step.py compares the steps.
def test_bfloat16_ends_near_float32(text_file, workdir, craft, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # Worth compiling well: bfloat16 is slow otherwise.
    config = micro(text_file, training__num_steps=150, model__d_model=32, training__eval_every=0)
    final = {}
    for precision in ("float32", "bfloat16"):
        options = [f"--run={precision}", f"--config.training.precision={precision}"]
        assert craft(*config, *options).returncode == 0
        final[precision] = read_json_lines(run_paths(workdir, precision).metrics)[-1]["val_loss"]
    assert final["float32"] < 2.2
    assert abs(final["bfloat16"] / final["float32"] - 1) < 0.02


def test_remat_and_bare_flags(text_file, workdir):
    changes = {"training__sample_every": 0, "training__eval_every": 0}
    config = [*micro(text_file, **changes), f"--workdir={workdir}"]
    assert train(*config, "--config.training.remat", "--run=remat") == 0
    assert train(*config, "--run=plain") == 0
    one, two = (list(losses(run_paths(workdir, n)).values()) for n in ("remat", "plain"))
    assert [float.fromhex(x) for x in one] == pytest.approx([float.fromhex(x) for x in two], 1e-5)


def test_the_config_in_the_checkpoint_is_json(first_run):
    text_file, workdir, _ = first_run
    saved = json.loads((run_paths(workdir).checkpoints / "6/config.json").read_text())
    assert saved["data"]["path"] == str(text_file)
    assert set(saved) == {
        "init_from", "model", "data", "optim", "training", "parallel", "loss", "plateau", "profile",
        "early_stopping", "checkpoint", "log",
    }  # fmt: skip
