import dataclasses

import pytest

from craft_jax.models.gpt import GPTConfig
from interop.errors import NotRepresentableError, UnknownArchitectureError
from interop.spec import ModelSpec
from tests.interop.models import SPEC, spec

SAVED = dataclasses.asdict(GPTConfig(num_layers=2, num_heads=2, d_model=16))


def test_it_knows_every_field_of_the_model():
    assert {f.name for f in dataclasses.fields(ModelSpec)} == set(SAVED)


def test_what_a_config_leaves_to_others_is_filled_in():
    found = ModelSpec.from_model_config(SAVED, 77)
    assert (found.vocab_size, found.d_ff) == (77, 64)
    assert GPTConfig(**found.model_config()).hidden_width == 64
    assert ModelSpec.from_model_config(SAVED | {"vocab_size": 128}, 77).vocab_size == 128


def test_a_setting_of_a_later_version_is_never_ignored():
    with pytest.raises(NotRepresentableError, match=r"model\.window=64") as caught:
        ModelSpec.from_model_config(SAVED | {"window": 64}, 77)
    assert caught.value.exit_code == 78
    with pytest.raises(NotRepresentableError, match=r"lacks model\.bias"):
        ModelSpec.from_model_config({k: v for k, v in SAVED.items() if k != "bias"}, 77)


def test_a_model_of_the_users_own():
    with pytest.raises(NotRepresentableError, match=r"mine\.py:Mine"):
        ModelSpec.from_model_config(SAVED | {"name": "mine.py:Mine"}, 77)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide d_model=48"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"vocab_size": "x"}, "vocab_size='x'"),
        ({"d_ff": True}, "d_ff=True"),
        ({"activation": "mish"}, "activation='mish'"),
        ({"norm_eps": 0}, "norm_eps=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_impossible_values_are_named(change, words):
    with pytest.raises(UnknownArchitectureError, match=words):
        spec(**change)


def test_differences_are_those_that_change_numbers():
    assert SPEC.differences(spec(dropout=0.5)) == []
    assert SPEC.differences(spec(norm_eps=1e-6)) == ["norm_eps is 1e-05 and 1e-06"]
