"""Every config of the project builds, has the size it says, and trains."""

import pytest

from craft_jax import config as configs
from craft_jax import main as cli
from craft_jax import runs
from craft_jax.config import Override
from craft_jax.data import pipeline
from craft_jax.data.base import sizes_of
from craft_jax.models import base
from craft_jax.training.loggers import read_json_lines
from tests.conftest import ROOT, overrides

GPT2_VOCABULARY = 50257
SIZES = {
    "gpt.py": 940_800,
    "gpt.py:tiny": 940_800,
    "gpt.py:small": 11_139_072,
    "gpt.py:124m": 124_439_808,
    "gpt.py:350m": 354_823_168,
    "gpt.py:774m": 774_030_080,
    "gpt.py:1558m": 1_557_611_200,
    "transformer.py": 940_800,
    "transformer.py:tiny": 940_800,
    "transformer.py:small": 11_139_072,
    "transformer.py:124m": 124_439_808,
    "transformer.py:350m": 354_823_168,
    "transformer.py:774m": 774_030_080,
    "transformer.py:1558m": 1_557_611_200,
    "seq2seq.py": 239_168,
    "seq2seq.py:dates": 239_168,
    "seq2seq.py:reverse": 236_992,
    "seq2seq.py:sort": 236_992,
    "shakespeare_char.py": 10_745_088,
    "shakespeare_char.py:gpu": 10_745_088,
    "shakespeare_char.py:cpu": 804_096,
    "image_gpt.py": 606_720,
    "flow.py": 1_274_372,
}

# Of presets that differ in sizes alone, which are shrunk, one is enough: of each file, one that
# the README does not train (tests/test_readme.py) where there is one.
TRAINED = ["gpt.py:124m", "transformer.py", "seq2seq.py:sort", "shakespeare_char.py"]

# Shrinks any preset until it trains in a moment.
SHORT = {
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.d_model": 16,
    "data.batch_size": 8,
    "training.num_steps": 2,
    "training.accumulate": 1,
    "training.sample_every": 0,
    "training.sample_tokens": 8,
}
SHORT_TEXT = SHORT | {
    "model.vocab_size": 300,
    "data.seq_len": 16,
    "data.tokenizer": "char",
    "data.val_fraction": 0.1,
}
# Pairs are made, and must fit.
SHORT_PAIRS = SHORT | {"data.num_pairs": 50}
# Images have pixels enough.
SHORT_IMAGES = SHORT | {"training.sample_every": 1}


def load(name, **values):
    words = [Override(field, str(value)) for field, value in values.items()]
    return configs.load(str(ROOT / "configs" / name), words)


def is_of_pairs(name):
    return name.startswith("seq2seq")


def is_of_images(name):
    return name in ("image_gpt.py", "flow.py")


def test_every_config_is_here():
    assert {p.name for p in (ROOT / "configs").glob("*.py")} == {n.split(":")[0] for n in SIZES}


@pytest.mark.parametrize("name", SIZES)
def test_size(name):
    own_data = is_of_pairs(name) or is_of_images(name)
    config = load(name, **({} if own_data else {"data.path": "text.txt"}))
    vocab_size = 65 if "shakespeare" in name else config.data.vocab_size
    if is_of_pairs(name):
        vocab_size = 45 if config.data.pairs == "dates" else 27
    sizes = {"vocab_size": vocab_size}
    if is_of_images(name):
        opened = pipeline.open_datasets(config.data, workdir=ROOT / "outputs", seed=0)
        sizes = sizes_of(opened.train)
    model = runs.with_sizes(config.model, sizes)
    assert base.define(config.model_class, model).num_params == SIZES[name]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in TRAINED else pytest.mark.soak) for n in SIZES]
)
def test_it_trains(name, text_file, workdir):
    if is_of_pairs(name) or is_of_images(name):
        short = SHORT_PAIRS if is_of_pairs(name) else SHORT_IMAGES
    else:
        short = SHORT_TEXT | {"data.path": text_file}
    words = [f"--config={ROOT / 'configs' / name}", *overrides(short)]
    assert cli.main([*words, f"--workdir={workdir}"]) == 0
    (metrics,) = (workdir / "logs").glob("*.jsonl")
    assert "val_loss" in read_json_lines(metrics)[-1]


@pytest.mark.parametrize("name", ["gpt.py:huge", "seq2seq.py:hours", "shakespeare_char.py:tpu"])
def test_a_preset_that_does_not_exist(name):
    with pytest.raises(configs.ConfigError, match="is not one of"):
        load(name)


def test_the_setting_of_nanogpt():
    """The numbers of its CPU command, and of its GPU config."""
    cpu = load("shakespeare_char.py:cpu", **{"data.path": "text.txt"})
    assert (cpu.model.num_layers, cpu.model.num_heads, cpu.model.d_model) == (4, 4, 128)
    assert (cpu.data.seq_len, cpu.data.batch_size, cpu.training.num_steps) == (64, 12, 2000)
    assert (cpu.optim.learning_rate, cpu.optim.min_learning_rate) == (1e-3, 1e-4)
    assert (cpu.optim.warmup_steps, cpu.optim.beta2, cpu.model.dropout) == (100, 0.99, 0)
    gpu = load("shakespeare_char.py", **{"data.path": "text.txt"})
    assert (gpu.model.num_layers, gpu.model.num_heads, gpu.model.d_model) == (6, 6, 384)
    assert (gpu.data.seq_len, gpu.data.batch_size, gpu.training.num_steps) == (256, 64, 5000)
    assert gpu.model.dropout == 0.2
    assert not gpu.model.bias
