"""What the models of images make, measured: likelihoods beside a histogram, labels, no copies.

With `CRAFT_TESTS_FULL` set the configs train as they are; else for as many steps as a test may
take, and what is asked of the likelihood is less.
"""

import json
import os
import subprocess
import sys

import pytest

from craft_jax import main as cli
from tests.conftest import ROOT, environment

IS_FULL = bool(os.environ.get("CRAFT_TESTS_FULL"))
STEPS = 400
BITS_RATIO = 0.7 if IS_FULL else 0.8


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("outputs")
    words = [f"--workdir={workdir}", *([] if IS_FULL else [f"--steps={STEPS}"])]
    # In a process of its own, whose programs are compiled to be quick, unlike those of tests.
    env = {k: v for k, v in environment().items() if k != "XLA_FLAGS"}
    script = [sys.executable, str(ROOT / "scripts/generative.py"), *words]
    done = subprocess.run(script, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1]), workdir


@pytest.mark.soak
def test_the_samples_of_a_flow_are_what_was_asked_for_and_no_copies(figures):
    found, _ = figures
    assert found["classifier_on_held_out"] > 0.97
    assert found["flow_accuracy"] >= 0.9
    least, low, median, _ = found["flow_distance"]
    real_least, real_low, real_median, _ = found["held_out_distance"]
    assert least > 0.5 * real_least
    assert low > 0.7 * real_low
    assert median > 0.8 * real_median


@pytest.mark.soak
def test_a_gpt_of_pixels_knows_more_than_a_histogram(figures):
    found, _ = figures
    assert 2.3 < found["histogram_bits_per_dim"] < 2.6
    assert found["bits_ratio"] <= BITS_RATIO


@pytest.mark.soak
def test_completions_of_held_out_digits(figures, capsys):
    _, workdir = figures
    words = ["generate", "--run=image_gpt", f"--workdir={workdir}", "--image=val"]
    assert cli.main([*words, "--num_samples=3"]) == 0
    said = capsys.readouterr()
    assert said.out.strip().endswith(".png")
    assert "8 images, their upper halves, and 3 completions of each" in said.err
