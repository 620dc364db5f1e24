"""Runs that earlier releases wrote: each must open, resume, evaluate, generate and export for ever.

`tests/golden/runs/RELEASE` holds runs of that release, trained for 4 of 8 steps, and what the
release itself then made of them (`expected.json`).
"""

import hashlib
import json
import shutil

import pytest

from craft_jax import main as cli
from craft_jax import runs
from interop import __main__ as interop_cli
from tests.conftest import ROOT, seal

pytestmark = pytest.mark.frozen

GOLDEN = ROOT / "tests/golden/runs"
RUNS = [
    pytest.param(folder, id=f"{folder.parent.name}-{folder.name}")
    for folder in sorted(GOLDEN.glob("*/*"))
    if folder.is_dir()
]


@pytest.fixture(scope="module", params=RUNS)
def golden(request, tmp_path_factory):
    """A copy of a run whose data is where it is now, and what is expected of it."""
    saved = request.param
    expected = json.loads((saved.parent / "expected.json").read_text("utf-8"))[saved.name]
    run = tmp_path_factory.mktemp("outputs") / "models" / saved.name
    shutil.copytree(saved, run)
    checkpoint = run / "checkpoints/4"
    for file in (run / "config.json", checkpoint / "config.json"):
        config = json.loads(file.read_text("utf-8"))
        if config["data"]["path"] is not None:
            config["data"]["path"] = str(saved.parent / "words.txt")
            file.write_text(json.dumps(config), encoding="utf-8")
            if file.parent == checkpoint:
                seal(checkpoint)
    return run, expected


def craft(run, *words):
    return cli.main([*words, f"--run={run.name}", f"--workdir={run.parents[1]}"])


@pytest.mark.parametrize("saved", RUNS)
def test_every_byte_is_as_it_was_written(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "models" / saved.name)
    assert craft(tmp_path / "models" / saved.name, "verify") == 0


def test_it_exports_the_same_weights(golden, tmp_path):
    run, expected = golden
    words = ["export", str(run / "checkpoints/4"), str(tmp_path / "out"), "--to", "craft-torch"]
    assert interop_cli.main([*words, "--probe", "none"]) == 0
    written = (tmp_path / "out/model.safetensors").read_bytes()
    assert hashlib.sha256(written).hexdigest() == expected["model.safetensors"]


def test_it_evaluates_as_it_did(golden, capsys):
    run, expected = golden
    assert craft(run, "evaluate") == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert numbers["step"] == 4
    assert numbers["loss"] == pytest.approx(expected["val_loss"], rel=2e-5)


def test_it_generates(golden):
    run, _ = golden
    opened = runs.open(run)
    if opened.tokenizer is None:
        assert opened.generate_images([3], num_steps=1).shape == (1, 8, 8, 1)
    else:
        assert opened.generate("the ", max_new_tokens=4, temperature=0) == "the     "


def test_it_resumes_to_the_same_losses(golden):
    run, expected = golden
    assert craft(run, "--config.training.num_steps=8") == 0
    lines = map(json.loads, (run / "exact.jsonl").read_text("utf-8").splitlines())
    resumed = {str(line["step"]): line for line in lines if line["step"] > 4}
    assert list(resumed) == list(expected["steps"])
    for step, line in resumed.items():
        wanted = expected["steps"][step]
        assert line["batch_md5"] == wanted["batch_md5"]
        # Not to the bit: processors differ in how they add up a product.
        assert float.fromhex(line["loss_hex"]) == pytest.approx(wanted["loss"], rel=2e-5)
