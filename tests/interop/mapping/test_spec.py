import dataclasses

import pytest

from craft_jax.models import MODELS, model_class
from craft_jax.models.gpt import GPTConfig
from interop.errors import NotRepresentableError, UnknownArchitectureError
from interop.mapping.spec import FAMILIES, FlowSpec, ModelSpec, read_spec
from tests.interop.models import SPEC, spec

SAVED = dataclasses.asdict(GPTConfig(num_layers=2, num_heads=2, d_model=16))


@pytest.mark.parametrize("name", MODELS)
def test_it_knows_every_field_of_every_model(name):
    fields = {field.name for field in dataclasses.fields(model_class(name).Config)}
    sizes = {"vocab_size": 77, "height": 4, "width": 6, "channels": 1, "num_classes": 0}
    model = dataclasses.asdict(model_class(name).Config(num_heads=2, d_model=16))
    found = read_spec(model, sizes)
    if name in FAMILIES:
        assert fields == set(FAMILIES[name].fields)
    else:
        assert fields == {field.name for field in dataclasses.fields(FlowSpec)}
    assert model_class(name).Config(**found.model_config()).hidden_width == 64


def test_no_other_family_than_the_registry():
    assert {*FAMILIES, "flow"} == set(MODELS)


def test_equal_models_have_equal_specs():
    assert spec(norm_bias=True) == SPEC and spec(bias=False, norm_bias=False) == spec(bias=False)
    kept = spec(bias=False, norm_bias=True)
    assert kept != spec(bias=False) and kept.has_norm_bias and kept.has_final_norm_bias
    assert spec(bias=False).has_norm_bias is False


def test_the_first_family_that_can_be_it():
    plain = {f.name: getattr(SPEC, f.name) for f in dataclasses.fields(SPEC) if f.name != "name"}
    assert ModelSpec.simplest(**plain).name == "gpt"
    assert ModelSpec.simplest(**plain | {"embedding_scale": True}).name == "transformer"
    with pytest.raises(UnknownArchitectureError, match="cross_attention='source'"):
        ModelSpec.simplest(**plain | {"cross_attention": "source"})
    assert ModelSpec.simplest(**plain).differences(spec(name="transformer")) == []


def test_settings_from_before_they_were_there():
    old = {k: v for k, v in SAVED.items() if k not in ("norm_bias", "head_bias")}
    assert ModelSpec.from_model_config(old, 77) == ModelSpec.from_model_config(SAVED, 77)


def test_defaults_of_a_config_are_filled_in():
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
        ({"name": "mamba"}, "name='mamba'"),
        ({"positions": "rotary"}, "positions='rotary'"),
        ({"embedding_scale": True}, "embedding_scale=True, which gpt cannot have"),
        ({"name": "seq2seq", "cross_attention": "source"}, "num_decoder_layers=0"),
        ({"head_bias": 1}, "head_bias=1 is not true or false"),
    ],
)
def test_impossible_values_are_named(change, words):
    with pytest.raises(UnknownArchitectureError, match=words):
        spec(**change)


def test_differences_are_those_that_change_numbers():
    assert SPEC.differences(spec(dropout=0.5)) == []
    assert SPEC.differences(spec(norm_eps=1e-6)) == ["norm_eps is 1e-05 and 1e-06"]
