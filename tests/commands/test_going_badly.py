"""Runs whose numbers go wrong, that end early, or keep an average: through the command line."""

import json
import shutil

import jax
import numpy as np
import pytest

from craft_jax import main as cli
from craft_jax import outputs, runs
from craft_jax.commands import visualize
from craft_jax.errors import UsageError
from craft_jax.generation.previews import TextSampler
from craft_jax.runtime import fault_injection
from craft_jax.training.loggers import read_json_lines
from tests.conftest import micro


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture
def train(text_file, workdir):
    def train(name, **changes):
        return run(*micro(text_file, **changes), f"--workdir={workdir}", f"--run={name}")

    return train


def paths_of(workdir, name) -> outputs.RunPaths:
    return outputs.open_run(workdir / "models" / name)


LADDER = {
    "training__num_steps": 24,
    "training__checkpoint_every": 4,
    "training__eval_every": 0,
    "training__sample_every": 0,
    "training__reduce_after": 2,
    "training__roll_back_after": 3,
}


def test_the_ladder_and_what_it_leaves(train, workdir, monkeypatch, capsys):
    monkeypatch.setattr(fault_injection, "_POISONS", [("nan", 10, 10_000)])
    assert train("bad", **LADDER, training__max_roll_backs=1) == 70
    said = capsys.readouterr()
    assert "learning rate scaled by 0.5: 2 updates in a row were skipped up to step 11" in said.out
    assert "rolled back from step 12 to step 8: 3 updates" in said.out
    assert "batches 8 to 12 are skipped" in said.out
    assert "the last 3 steps, up to step 12, was not finite" in said.err
    assert "Traceback" not in said.err
    paths = paths_of(workdir, "bad")
    steps = [line["step"] for line in read_json_lines(paths.metrics)]
    assert steps == sorted(set(steps))
    params = runs.open(paths.checkpoints / "8").params
    assert all(np.isfinite(array).all() for array in params.values())
    facts, *rows = (paths.bad_steps / "step_10.txt").read_text(encoding="utf-8").splitlines()
    facts = json.loads(facts)
    assert (facts["step"], facts["batch"], facts["grad_norm"]) == (10, 14, "nan")
    assert len(rows) == 8

    # The step can be made again, from the checkpoint that remembers which batches are skipped.
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    monkeypatch.setattr(fault_injection, "_POISONS", [])
    assert run("--run=bad", "--replay_step=10", f"--workdir={workdir}") == 0
    said = capsys.readouterr().out
    assert f"step 10: loss {facts['loss']}" in said
    assert "batch 14:" in said
    assert rows[3] in said
    assert "gradients: 0 of 20 parameters are not finite" in said
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before


def test_a_replay_of_the_first_step_and_of_none(train, workdir, capsys):
    changes = {"training__sample_every": 0, "training__eval_every": 0}
    assert train("mine", **changes) == 0
    first = read_json_lines(paths_of(workdir, "mine").metrics)[0]
    capsys.readouterr()
    assert run("--run=mine", "--replay_step=1", f"--workdir={workdir}") == 0
    assert f"step 1: loss {first['loss']}" in capsys.readouterr().out
    assert run("--run=mine", "--replay_step=9", f"--workdir={workdir}") == 2
    assert "run mine has steps 1 to 6" in capsys.readouterr().err
    assert run("--run=other", "--replay_step=1", f"--workdir={workdir}") == 2


def test_early_stopping_ends_a_run_for_good(train, workdir, capsys):
    # To the highest loss every step is a step away, on any machine.
    values = {
        "training__num_steps": 12,
        "training__eval_every": 2,
        "training__checkpoint_every": 0,
        "training__sample_every": 0,
        "early_stopping__patience": 2,
        "early_stopping__mode": "max",
        "checkpoint__best_mode": "max",
        "plateau__mode": "max",
        "plateau__patience": 1,
        "optim__learning_rate": 0.01,
        "optim__warmup_steps": 0,
    }
    assert train("early", **values) == 0
    said = capsys.readouterr().out
    paths = paths_of(workdir, "early")
    store = runs.open(paths.folder).store
    best, last = store.best_steps()[0], store.latest()
    assert f"stopped at step {last} of 12 by early stopping: val_loss has not improved" in said
    assert f"the parameters of step {best} are restored" in said
    assert "learning rate scaled by 0.5: val_loss" in said
    assert store.meta(last)["metrics"]["val_loss"] == store.meta(best)["metrics"]["val_loss"]
    for path, array in runs.open(paths.checkpoints / str(last)).params.items():
        np.testing.assert_array_equal(
            array, runs.open(paths.checkpoints / str(best)).params[path], path
        )
    assert train("early", **values) == 0
    assert "run early is finished" in capsys.readouterr().out
    assert store.latest() == last
    assert train("early", **values | {"early_stopping__patience": 0}) == 0
    assert store.latest() == 12


def test_the_average_is_what_is_used(train, workdir, capsys):
    """By evaluations in training, by the commands, and by exports, unless the last is asked for."""
    assert train("mine", optim__ema_decay=0.5, training__sample_every=0) == 0
    trained = read_json_lines(paths_of(workdir, "mine").metrics)[-1]["val_loss"]
    losses = {}
    for weights in ("average", "last"):
        capsys.readouterr()
        words = ["evaluate", "--run=mine", f"--workdir={workdir}", f"--weights={weights}"]
        assert run(*words) == 0
        losses[weights] = json.loads(capsys.readouterr().out.splitlines()[-1])["loss"]
    assert losses["average"] == pytest.approx(trained, rel=1e-6)
    assert losses["last"] != losses["average"]

    from interop.__main__ import main as interop

    mine = str(workdir / "models" / "mine")
    for weights in ("average", "last"):
        made = str(workdir / f"{weights}.pt")
        assert interop(["export", mine, made, "--to", "nanogpt", "--weights", weights]) == 0
        for other in ("average", "last"):
            code = interop(["verify", mine, made, "--weights", other])
            assert code == (0 if other == weights else 70), (weights, other)
    assert interop(["export", mine, str(workdir / "x"), "--weights", "best"]) == 2


@pytest.mark.parametrize("name", ["muon", "schedule_free_adamw", "adafactor"])
def test_a_run_goes_on_with_other_optimizers(name, train, workdir, capsys):
    values = {"optim__name": name, "training__sample_every": 0, "training__eval_every": 0}
    assert train("mine", **values, log__exact="true") == 0
    paths = paths_of(workdir, "mine")

    def results():
        lines = [line["loss_hex"] for line in read_json_lines(paths.exact)]
        return lines, runs.open(paths.folder).params

    whole_lines, whole = results()
    # Once more from the middle, as if the second half had not been.
    shutil.rmtree(paths.checkpoints / "6")
    assert train("mine", **values, log__exact="true") == 0
    assert "from step 3" in capsys.readouterr().out
    lines, parts = results()
    assert len(lines) == 6
    assert lines == whole_lines
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), whole, parts))


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_float16_survives_an_overflow(mode, train, workdir, monkeypatch, capsys):
    monkeypatch.setattr(fault_injection, "_POISONS", [("inf", 3, 4)])
    values = {"training__precision": "float16", "parallel__mode": mode, "data__batch_size": 8}
    values |= {"training__sample_every": 0, "training__eval_every": 0}
    assert train("half", **values, training__num_steps=6) == 0
    said = capsys.readouterr().out
    assert "step 3: float16 overflowed: update skipped, loss scale 65536 -> 32768" in said
    assert "step 4: float16 overflowed: update skipped, loss scale 32768 -> 16384" in said
    assert not paths_of(workdir, "half").bad_steps.exists()


def test_a_loss_that_takes_no_config_is_refused(text_file, workdir, tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        "import dataclasses\n"
        "from craft_jax.models.gpt import GPT, GPTConfig\n"
        "@dataclasses.dataclass(frozen=True, kw_only=True)\n"
        "class OwnConfig(GPTConfig):\n"
        "    name: str = 'own'\n"
        "class Own(GPT):\n"
        "    Config = OwnConfig\n"
        "    def loss(self, batch, *, key=None, remat=False):\n"
        "        return super().loss(batch, key=key, remat=remat)\n",
        encoding="utf-8",
    )
    words = micro(text_file, model__name=f"{tmp_path}/own.py:Own", loss__z_loss=1e-4)
    assert run(*words, f"--workdir={workdir}") == 78
    assert "loss.z_loss is set, and the loss of model.name=" in capsys.readouterr().err


def test_a_note_that_cannot_be_written_ends_no_run(train, workdir, monkeypatch, capsys):
    monkeypatch.setattr(fault_injection, "_POISONS", [("nan", 2, 2)])
    values = {"training__num_steps": 1, "training__sample_every": 0, "optim__decay_steps": 4}
    values["training__eval_every"] = 0
    assert train("mine", **values) == 0
    paths_of(workdir, "mine").bad_steps.write_text("in the way", encoding="utf-8")
    assert train("mine", **values | {"training__num_steps": 4}) == 0
    assert "the batch of step 2 is not written down" in capsys.readouterr().out


def test_another_mesh_is_said(train, workdir, capsys):
    values = {"training__num_steps": 3, "training__sample_every": 0, "optim__decay_steps": 6}
    values["training__eval_every"] = 0
    assert train("mine", **values) == 0
    assert train("mine", **values | {"training__num_steps": 4}, parallel__fsdp=2) == 0
    assert "not bit-exact: parallel.fsdp 1 -> 2" in capsys.readouterr().out


def test_factors_of_paths_with_brackets(train, workdir):
    pattern = r"(query|key)\.kernel$=0"
    values = {"training__sample_every": 0, "training__eval_every": 0, "optim__weight_decay": 0}
    assert train("mine", **values, optim__lr_multipliers=pattern) == 0
    first, last = (
        runs.open(paths_of(workdir, "mine").checkpoints / step).params for step in ("3", "6")
    )
    still = {path for path in first if bool((first[path] == last[path]).all())}
    assert {path for path in still if "kernel" in path} == {
        "blocks.0.attn.query.kernel",
        "blocks.0.attn.key.kernel",
    }


def test_a_side_task_that_fails_ends_no_run(train, workdir, monkeypatch, capsys):
    def fail(*args, **options):
        raise UsageError("a prompt\nhas no tokens")

    monkeypatch.setattr(TextSampler, "__call__", fail)
    monkeypatch.setattr(visualize, "draw_runs", fail)
    assert train("mine", training__num_steps=4, training__sample_every=2) == 0
    said = capsys.readouterr().out
    for name in ("the sample of step 2", "the last sample", "the picture of the curves"):
        assert said.count(f"{name} failed: a prompt has no tokens; training goes on") == 1
    assert runs.open("mine", workdir=workdir).step == 4
