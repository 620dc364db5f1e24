"""Images from both kinds of models, the same wherever they stand in a batch, and completed ones."""

import functools

import jax
import numpy as np
import pytest

from craft_jax.data.images.format import ImageFormat
from craft_jax.errors import UsageError
from craft_jax.generation.images import AT_ONCE, ImageGenerator
from craft_jax.models import base
from craft_jax.models.flow import Flow, FlowConfig
from craft_jax.models.gpt import GPT, GPTConfig

PALETTE = ((0,), (100,), (200,))
IMAGES = ImageFormat(height=4, width=3, channels=1, label_names=("x", "y"), palette=PALETTE)
SMALL = {"num_layers": 1, "num_heads": 2, "d_model": 16}
MODELS = {
    "gpt": (GPT, GPTConfig(vocab_size=IMAGES.vocab_size + 2, max_seq_len=14, **SMALL)),
    "flow": (
        Flow,
        FlowConfig(height=4, width=3, channels=1, num_classes=2, patch_size=1, **SMALL),
    ),
}


@functools.cache
def build(name):
    cls, config = MODELS[name]
    definition = base.define(cls, config)
    rng = np.random.default_rng(0)
    params = {
        path: (0.2 * rng.normal(size=shape.shape)).astype(np.float32)
        for path, shape in definition.shapes.items()
    }
    return ImageGenerator(cls, definition, IMAGES), params


OPTIONS = {"gpt": {}, "flow": {"num_steps": 2}}
every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_an_image_for_each_label(name):
    make, params = build(name)
    made = make.generate(params, [0, 1, 1], seed=4, **OPTIONS[name])
    assert made.shape == (3, 4, 3, 1) and made.dtype == np.uint8
    if name == "gpt":
        assert set(np.unique(made)) <= {0, 100, 200}
    assert not np.array_equal(made[1], made[2])
    np.testing.assert_array_equal(made, make.generate(params, [0, 1, 1], seed=4, **OPTIONS[name]))
    other = make.generate(params, [0, 1, 1], seed=5, **OPTIONS[name])
    assert not np.array_equal(made, other)


@every_model
def test_an_image_does_not_depend_on_how_many_there_are(name):
    make, params = build(name)
    labels = [n % 2 for n in range(AT_ONCE + 3)]
    many = make.generate(params, labels, **OPTIONS[name])
    few = make.generate(params, labels[:5], **OPTIONS[name])
    assert len(many) == AT_ONCE + 3
    assert np.abs(many[:5].astype(int) - few).max() <= (0 if name == "gpt" else 1)
    assert not np.array_equal(many[0], many[AT_ONCE])


def test_a_completion_keeps_what_is_given():
    make, params = build("gpt")
    given = np.random.default_rng(1).choice([0, 100, 200], (6, 4, 3, 1)).astype(np.uint8)
    made = make.complete(params, given, [0, 1, None, None, 0, 1], num_rows=2)
    np.testing.assert_array_equal(made[:, :2], given[:, :2])
    assert not np.array_equal(made[:, 2:], given[:, 2:])
    others = given.copy()
    others[:, 2:] = 0
    again = make.complete(params, others, [0, 1, None, None, 0, 1], num_rows=2)
    np.testing.assert_array_equal(made, again)


def test_a_missing_label_is_drawn_by_its_likelihood():
    """The share of draws is the softmax of the log-likelihoods, which the model itself gives."""
    make, params = build("gpt")
    half = np.random.default_rng(2).choice([0, 100, 200], (1, 4, 3, 1)).astype(np.uint8)
    tokens_1T = IMAGES.tokens(half)[:, :6]
    cls, config = MODELS["gpt"]
    model = base.define(cls, config).merge(params)
    log = []
    for first in IMAGES.first_tokens(np.arange(2)):
        row = np.concatenate([[[first]], tokens_1T[:, :-1]], axis=1)
        logits = jax.nn.log_softmax(model(row)[0][0])
        log.append(float(sum(logits[t, token] for t, token in enumerate(tokens_1T[0]))))
    expected = 1 / (1 + np.exp(log[0] - log[1]))
    drawn = make._labels(params, np.repeat(tokens_1T, 2000, axis=0), [None] * 2000, 0, 0)
    assert 0.02 < expected < 0.98
    assert drawn.mean() == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize(
    ("name", "labels", "options", "message"),
    [
        ("gpt", [2], {}, "label 2 is none of the 2 classes"),
        ("gpt", [], {}, "no image is asked for"),
        ("gpt", [0], {"num_steps": 3}, "--num_steps is nothing that model.name=gpt knows"),
        ("gpt", [0], {"top_k": 4}, "from 1 to the vocabulary's 3"),
        ("gpt", [0], {"seed": -1}, "seed=-1"),
        ("flow", [0], {"temperature": 1.0}, "--temperature is nothing that model.name=flow knows"),
        ("flow", [0], {"solver": "rk4"}, "is not one of euler, heun"),
        ("flow", [0], {"num_steps": 0}, "num_steps=0"),
    ],
)
def test_what_cannot_be(name, labels, options, message):
    make, params = build(name)
    with pytest.raises(UsageError, match=message):
        make.generate(params, labels, **options)


def test_a_flow_completes_nothing():
    make, params = build("flow")
    with pytest.raises(UsageError, match="makes whole images"):
        make.complete(params, np.zeros((1, 4, 3, 1), np.uint8), [0], num_rows=2)


@pytest.mark.parametrize("cls", [base.Model])
def test_a_model_that_makes_nothing(cls):
    with pytest.raises(UsageError, match="no model that makes images"):
        ImageGenerator(cls, base.define(Flow, MODELS["flow"][1]), IMAGES)
