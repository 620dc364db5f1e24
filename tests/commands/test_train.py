import json
import os
import re
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
    abstract = states.abstract_state(run.model_def, optimizer, mesh)
    return store.digest(run.store.read_state(run.step, abstract))


def losses(paths: outputs.RunPaths) -> dict[int, str]:
    """The loss of every logged step, to the bit; each step must be there once."""
    lines = read_json_lines(paths.metrics)
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    return {line["step"]: float(line["loss"]).hex() for line in lines}


def test_a_run_leaves_everything_behind(text_file, workdir, capsys):
    assert train(*micro(text_file), f"--workdir={workdir}") == 0
    said = capsys.readouterr().out
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


def test_the_next_commands_that_it_prints_work(text_file, workdir, capsys):
    train(*micro(text_file), f"--workdir={workdir}")
    said = capsys.readouterr().out
    printed = re.findall(r"^  (?:evaluate|sample) +python -m craft_jax.main (.*)$", said, re.M)
    assert len(printed) == 2
    import shlex

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


@pytest.mark.parametrize(
    ("kind", "stop_at"), [("gpt", 1), ("gpt", 4), ("gpt", 7), ("image_gpt", 4), ("flow", 4)]
)
def test_resume_is_exact(text_file, workdir, kind, stop_at, tmp_path):
    """With dropout, accumulation and more than one epoch: every later bit is the same."""
    text_file.write_text(words(600), encoding="utf-8")
    config = command_words(kind, text_file, **HARD)
    assert train(*config, f"--workdir={workdir}", "--run=whole") == 0
    (tmp_path / "stop.py").write_text(
        "from craft_jax.training.callbacks import Callback, Stop\n"
        "class Now(Callback):\n"
        "    def on_step_end(self, record):\n"
        f"        return Stop('the test') if record.step == {stop_at} else None\n",
        encoding="utf-8",
    )
    stopping = f"--config.training.callbacks={tmp_path / 'stop.py'}:Now"
    assert train(*config, stopping, f"--workdir={workdir}", "--run=parts") == 0
    parts = run_paths(workdir, "parts")
    assert max(losses(parts)) in (stop_at, stop_at + 1)
    assert train("--run=parts", f"--workdir={workdir}") == 0
    assert losses(parts) == losses(run_paths(workdir, "whole"))
    assert final_digest(parts) == final_digest(run_paths(workdir, "whole"))
    assert len(list((workdir / "logs").glob("*.log"))) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_kill_9_and_resume(kind, precision, text_file, workdir, tmp_path, craft, monkeypatch):
    """Killed in the middle of writing a checkpoint: the run ends as if nothing had happened."""
    changes = {
        "training__precision": precision,
        "training__accumulate": 2,
        "training__sample_every": 0,
        "training__checkpoint_every": 2,
        "optim__ema_decay": 0.9,
        "model__dropout": 0.2,
    }
    config = command_words(kind, text_file, **changes)
    assert craft(*config, "--run=whole").returncode == 0
    monkeypatch.setenv("CRAFT_FAULT", "ckpt.before_commit:2:kill9")
    assert craft(*config, "--run=parts").returncode == -signal.SIGKILL
    monkeypatch.delenv("CRAFT_FAULT")
    done = craft(*config, "--run=parts")
    assert done.returncode == 0 and "resuming from step 2" in done.stdout, done.stdout
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
        ("gpt", signal.SIGINT, 130),
        ("gpt", signal.SIGTERM, 75),
        ("image_gpt", signal.SIGTERM, 75),
        ("flow", signal.SIGINT, 130),
    ],
)
def test_a_signal_saves_and_the_printed_command_continues(
    text_file, workdir, tmp_path, kind, number, code
):
    config = command_words(kind, text_file, training__num_steps=4000, training__eval_every=0)
    config += ["--config.training.checkpoint_every=0", "--config.training.sample_every=0"]
    said = tmp_path / "said.txt"
    with said.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(
            command(*config, f"--workdir={workdir}", "--run=mine"),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(),
            cwd=tmp_path,
        )
        deadline = time.monotonic() + 120
        while "step 5/" not in said.read_text(encoding="utf-8"):
            assert time.monotonic() < deadline and child.poll() is None, said.read_text()
            time.sleep(0.05)
        child.send_signal(number)
        assert child.wait(timeout=60) == code
    text = said.read_text(encoding="utf-8")
    assert "Traceback" not in text
    paths = run_paths(workdir, "mine")
    (stopped,) = re.findall(r"stopped at step (\d+) of 4000", text)
    assert store.CheckpointStore(paths.checkpoints).latest() == int(stopped)
    assert max(losses(paths)) == int(stopped)
    (again,) = re.findall(r"to continue: python -m craft_jax.main (.*)", text)
    more = f"--config.training.num_steps={int(stopped) + 2}"
    done = subprocess.run(
        command(*again.split(), more),
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"continuing mine at step {stopped}" in done.stdout
    assert f"changed: training.num_steps from 4000 to {int(stopped) + 2}" in done.stdout
    assert max(losses(paths)) == int(stopped) + 2


def test_the_same_command_again(text_file, workdir, capsys):
    """A run that is finished says so; one that is extended goes on in its own files."""
    config = [*micro(text_file), "--run=mine", f"--workdir={workdir}"]
    assert train(*config) == 0
    files = sorted(p for p in workdir.rglob("*") if p.is_file())
    capsys.readouterr()
    assert train(*config) == 0
    assert "run mine is finished: 6 of 6 steps" in capsys.readouterr().out
    assert sorted(p for p in workdir.rglob("*") if p.is_file()) == files
    assert train(*config, "--config.training.num_steps=8") == 0
    assert list(losses(run_paths(workdir))) == list(range(1, 9))


def test_a_longer_run_stays_longer(text_file, workdir, capsys):
    """The length that a run was given last is the one that the bare command goes by."""
    stop = text_file.with_name("stop.py")
    stop.write_text(
        "from craft_jax.training.callbacks import Callback, Stop\n"
        "class Now(Callback):\n"
        "    def on_step_end(self, record):\n"
        "        return Stop('the test') if record.step == 8 else None\n",
        encoding="utf-8",
    )
    config = micro(text_file, training__callbacks=f"{stop}:Now")
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


def test_a_run_refuses_another_config(text_file, workdir, capsys):
    config = [*micro(text_file), "--run=mine", f"--workdir={workdir}"]
    assert train(*config) == 0
    capsys.readouterr()
    assert train(*config, "--config.model.d_model=32", "--config.optim.beta1=0.8") == 78
    said = capsys.readouterr().err
    assert "model.d_model=32 differs from 16, with which run mine began" in said
    assert "optim.beta1=0.8 differs from 0.9" in said


def test_a_run_refuses_other_data(text_file, workdir, capsys):
    config = [*micro(text_file), f"--workdir={workdir}"]
    assert train(*config, "--run=mine") == 0
    text_file.write_text(words(2500, seed=1), encoding="utf-8")
    assert train("--run=mine", f"--workdir={workdir}", "--config.training.num_steps=8") == 78
    assert "the data of run mine has changed since step 6" in capsys.readouterr().err


def test_two_trainers_on_one_run(text_file, workdir, capsys):
    assert train(*micro(text_file), "--run=mine", f"--workdir={workdir}") == 0
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
    config = micro(text_file, data__val_fraction=0.001, training__num_steps=2)
    assert train(*config, f"--workdir={workdir}") == 0  # Padded.
    config = micro(text_file, data__val_fraction=0.0001)
    assert train(*config, f"--workdir={workdir}/other") == 65
    assert "but the validation split has" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["line\r\n" * 400, "\u6f22\u5b57 \U0001f642 caf\u00e9\n" * 200, "no newline at all " * 200],
)
@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
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
    config = [*micro(text_file, training__num_steps=2), f"--workdir={workdir}"]
    assert train(*config, "--config.training.remat", "--run=remat") == 0
    assert train(*config, "--run=plain") == 0
    one, two = (list(losses(run_paths(workdir, n)).values()) for n in ("remat", "plain"))
    assert [float.fromhex(x) for x in one] == pytest.approx([float.fromhex(x) for x in two], 1e-5)


def test_the_config_in_the_checkpoint_is_json(text_file, workdir):
    train(*micro(text_file), f"--workdir={workdir}")
    saved = json.loads((run_paths(workdir).checkpoints / "6/config.json").read_text())
    assert saved["data"]["path"] == str(text_file)
    assert set(saved) == {
        "init_from", "model", "data", "optim", "training", "parallel", "loss", "plateau", "profile",
        "early_stopping", "checkpoint", "log",
    }  # fmt: skip
