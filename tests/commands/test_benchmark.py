"""What `benchmark` measures adds up, and is written down."""

import json
import re

import pytest
from PIL import Image

from craft_jax import main as cli
from craft_jax.runtime import hardware
from tests.conftest import micro


def test_a_benchmark(text_file, workdir, capfd):
    words = [*micro(text_file), f"--workdir={workdir}", "--steps=3"]
    assert cli.main(["benchmark", *words, "--decode_batches", "1", "2"]) == 0
    said = capfd.readouterr().out
    (file,) = (workdir / "benchmarks").glob("*.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    parts = [found[f"{name}_seconds"] for name in ("forward", "backward", "optimizer")]
    assert min(parts) >= 0 < found["step_seconds"]
    assert len(found["step_seconds_all"]) == 3
    tokens = 8 * 16 / found["step_seconds"]
    assert found["tokens_per_second"] == pytest.approx(tokens)
    peak = found["peak_flops"]
    work = 6 * found["parameters"] + 12 * 1 * 2 * 8 * 16
    assert found["flops_per_token"] == work
    assert found["mfu"] == pytest.approx(
        work * tokens / (peak["per_device"] * peak["devices"]), rel=1e-6
    )
    assert [s["rows"] for s in found["sampling"]] == [1, 2]
    start = found["start_up_seconds"]
    assert 0 < start["imports"] < start["data"] < start["first_step"]
    assert found["memory"]["host_peak_bytes"] > 1e8
    assert json.loads(said.splitlines()[-1])["mfu"] == found["mfu"]
    with Image.open(re.search(r"picture +(.*)", said)[1]) as image:
        assert image.width > 500
    assert not (workdir / "models").exists()


def test_a_benchmark_of_a_run(text_file, workdir):
    words = micro(text_file, training__num_steps=1, training__sample_every=0)
    assert cli.main([*words, f"--workdir={workdir}", "--run=mine"]) == 0
    words = ["--run=mine", f"--workdir={workdir}", "--steps=1", "--decode_batches=1"]
    assert cli.main(["benchmark", *words, "--config.data.batch_size=16"]) == 0
    (file,) = (workdir / "benchmarks").glob("*.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["tokens_per_second"] == pytest.approx(16 * 16 / found["step_seconds"])


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--steps=0"], 2), (["--decode_batches", "0"], 2), (["--steps=many"], 2)],
)
def test_what_cannot_be_measured(text_file, workdir, capfd, words, code):
    assert cli.main(["benchmark", *micro(text_file), *words, f"--workdir={workdir}"]) == code
    assert not workdir.exists()


def test_it_needs_a_config(capfd):
    assert cli.main(["benchmark"]) == 2
    assert "--config=configs/gpt.py" in capfd.readouterr().err


def test_flops_are_those_of_the_formula():
    sizes = {"num_layers": 12, "num_heads": 12, "head_width": 64, "seq_len": 1024}
    assert hardware.flops_per_token(124_000_000, **sizes) == 6 * 124_000_000 + 12 * 9216 * 1024


def test_a_known_chip_has_its_stated_peak():
    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"

    assert hardware.peak_flops(Device())[0] == 989e12
