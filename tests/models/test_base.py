import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from craft_jax.models import base
from craft_jax.models.base import ImageModel, LanguageModel, Model
from craft_jax.models.gpt import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=11, num_layers=2, num_heads=2, d_model=8, max_seq_len=8)


def test_params_are_a_flat_dict_by_path():
    params = base.init_params(GPT, CONFIG, jax.random.key(0))
    assert params["blocks.1.attn.query.kernel"].shape == (8, 8)
    shapes = base.define(GPT, CONFIG).shapes
    assert {k: (v.shape, v.dtype) for k, v in params.items()} == {
        k: (v.shape, v.dtype) for k, v in shapes.items()
    }


def test_merge_and_split_are_inverse():
    params = base.init_params(GPT, CONFIG, jax.random.key(0))
    again = base.split(base.define(GPT, CONFIG).merge(params))
    assert again.keys() == params.keys()
    assert all(jnp.array_equal(again[k], params[k]) for k in params)


def test_merge_names_a_missing_parameter():
    params = base.init_params(GPT, CONFIG, jax.random.key(0))
    del params["final_norm.scale"]
    with pytest.raises(KeyError, match=r"final_norm\.scale"):
        base.define(GPT, CONFIG).merge(params)


def test_a_model_has_no_state_but_parameters():
    class Stateful(Model):
        def __init__(self, config, *, rngs):
            self.weight = nnx.Param(jnp.zeros(3))
            self.calls = nnx.Variable(jnp.zeros(()))

        def loss(self, batch, *, key=None, remat=False): ...

    with pytest.raises(TypeError, match=r"Stateful.calls is a Variable"):
        base.define(Stateful, None)


@pytest.mark.parametrize("cls", [Model, ImageModel, LanguageModel])
def test_interfaces_are_abstract(cls):
    with pytest.raises(TypeError, match="abstract"):
        cls(CONFIG, rngs=nnx.Rngs(0))


def test_definition_makes_no_array():
    big = GPTConfig(vocab_size=50257, num_layers=48, num_heads=25, d_model=1600, max_seq_len=1024)
    assert base.define(GPT, big).num_params == 1_557_611_200
