import jax
import pytest

from craft_jax.errors import ConfigError
from craft_jax.models import base
from craft_jax.models.gpt import GPT, GPTConfig
from craft_jax.parallel import memory, sharding
from craft_jax.parallel.sharding import ParallelConfig
from craft_jax.training import optim
from craft_jax.training import state as states
from craft_jax.training.optim import OptimConfig

MODEL = GPTConfig(vocab_size=1024, num_layers=2, num_heads=2, d_model=256, max_seq_len=8)


def need(num_devices=1, parallel=None, **values):
    mesh = sharding.make_mesh(parallel or ParallelConfig(), jax.devices()[:num_devices])
    optimizer = optim.make_optimizer(OptimConfig(**values))
    state = states.abstract_state(base.define(GPT, MODEL), optimizer, mesh)
    sizes = {"batch_size": 8, "seq_len": 8, "accumulate": 1}
    return memory.least(state, MODEL, **sizes, mesh=mesh), state, mesh


@pytest.mark.parametrize(
    ("values", "copies"),
    [
        ({}, 4),
        ({"moment_dtype": "bfloat16"}, 3.5),
        ({"ema_decay": 0.9}, 5),
        ({"name": "lion"}, 3),
        ({"name": "sgd"}, 3),
        ({"name": "adafactor"}, 2),
        ({"name": "schedule_free_adamw"}, 5),
    ],
)
def test_what_each_optimizer_keeps(values, copies):
    """Parameters, gradients, and moments, in copies of the parameters."""
    found, state, _ = need(**values)
    size = sum(leaf.size * 4 for leaf in state.params.values())
    assert found.state == pytest.approx(copies * size, rel=0.02)


def test_devices_share_it():
    whole, parts = need()[0].state, need(8, ParallelConfig(fsdp=8, data=1))[0].state
    assert parts == pytest.approx(whole / 8, rel=0.05)
    assert need(8)[0].state == whole


def test_what_cannot_fit_is_refused():
    found, _, mesh = need()
    memory.check(found, mesh)
    with pytest.raises(ConfigError, match=r"needs at least 1,000 PB.*optimizer.*lower model"):
        memory.check(memory.Need(10**18, 1), mesh)
