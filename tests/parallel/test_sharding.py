import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from craft_jax import schema
from craft_jax.errors import ConfigError
from craft_jax.models import base
from craft_jax.models.gpt import GPT
from craft_jax.parallel import sharding
from craft_jax.parallel.sharding import ParallelConfig
from craft_jax.training import optim
from craft_jax.training import state as states
from craft_jax.training.optim import OptimConfig
from craft_jax.training.precision import Policy
from craft_jax.training.step import make_train_step
from tests.kinds import KINDS

# Most of a flow's gradients begin at zero, and Adam divides their rounding by its own size; with a
# larger epsilon it does not.
EPS = {"gpt": 1e-8, "image_gpt": 1e-8, "flow": 1e-3}


def train(parallel: ParallelConfig, num_devices: int, steps: int = 20, kind: str = "gpt"):
    cls, config = KINDS[kind].cls, dataclasses.replace(KINDS[kind].config, num_layers=1)
    mesh = sharding.make_mesh(parallel, jax.devices()[:num_devices])
    optimizer = optim.make_optimizer(OptimConfig(ema_decay=0.9, eps=EPS[kind]))
    state = states.init_state(cls, config, optimizer, seed=0, mesh=mesh)
    train_step = make_train_step(
        base.define(cls, config),
        optimizer,
        optim.make_schedule(OptimConfig(), 100),
        Policy.named("float32"),
        seed=0,
        axis_name=sharding.AXIS_NAME if parallel.mode == "pmap" else None,
    )
    step = sharding.compile_step(train_step, mesh, parallel.mode)
    losses = []
    for i in range(steps):
        batch = KINDS[kind].batch(i, 8)
        state, metrics = step(state, sharding.put_batch(batch, mesh, parallel.mode))
        losses.append(float(metrics["loss"]))
    return state, losses


@functools.cache
def alone(kind):
    """The losses of one device."""
    return train(ParallelConfig(), 1, kind=kind)[1]


SHAPES = {
    "data 8": (8, ParallelConfig()),
    "fsdp 8": (8, ParallelConfig(data=1, fsdp=-1)),
    "data 2, fsdp 2, tensor 2": (8, ParallelConfig(data=2, fsdp=2, tensor=2)),
    "pmap 8": (8, ParallelConfig(mode="pmap")),
    "data 2": (2, ParallelConfig()),
    "fsdp 2": (2, ParallelConfig(data=1, fsdp=2)),
    "tensor 2": (2, ParallelConfig(data=1, tensor=2)),
    "data 2, fsdp 2": (4, ParallelConfig(fsdp=2)),
}
# Each axis of a mesh, alone and with the others, each mode and each kind; a flow has kernels of its
# own, which all axes split.
BY_DEFAULT = {
    ("gpt", "data 2, fsdp 2, tensor 2"),
    ("gpt", "pmap 8"),
    ("image_gpt", "fsdp 8"),
    ("flow", "data 2, fsdp 2, tensor 2"),
}


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        pytest.param(kind, shape, marks=() if (kind, shape) in BY_DEFAULT else pytest.mark.soak)
        for kind in KINDS
        for shape in (SHAPES if kind == "gpt" else list(SHAPES)[:4])
    ],
)
def test_many_devices_give_the_losses_of_one(kind, shape):
    num_devices, parallel = SHAPES[shape]
    state, losses = train(parallel, num_devices, kind=kind)
    np.testing.assert_allclose(losses, alone(kind), rtol=0, atol=1e-5)
    mesh = sharding.make_mesh(parallel, jax.devices()[:num_devices])
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    moments = next(s.mu for s in state.opt_state if hasattr(s, "mu"))
    for tree in (state.params, moments, state.average):
        kernels = [array for path, array in tree.items() if path.endswith(".kernel")]
        assert len(kernels) >= 6  # Of one layer.
        assert all(bytes_of_first_device(k) == k.nbytes // parts for k in kernels)
    total = sum(map(bytes_of_first_device, jax.tree.leaves(state)))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert total < whole * (1 if parts == 1 else 0.5 + 0.7 / parts) + 1


def bytes_of_first_device(array):
    return array.addressable_shards[0].data.nbytes


def test_rules():
    mesh = sharding.make_mesh(ParallelConfig(data=2, fsdp=2, tensor=2), jax.devices())
    shapes = base.define(GPT, KINDS["gpt"].config).shapes
    specs = {path: s.spec for path, s in sharding.tree_shardings(shapes, mesh).items()}
    assert specs["token_embedding.embedding"] == PartitionSpec("fsdp", None)
    assert specs["blocks.0.attn.query.kernel"] == PartitionSpec("fsdp", "tensor")
    assert specs["blocks.0.attn.out.kernel"] == PartitionSpec("tensor", "fsdp")
    assert specs["blocks.1.mlp_norm.scale"] == PartitionSpec()
    odd = {"token_embedding.embedding": jax.ShapeDtypeStruct((15, 16), jnp.float32)}
    assert sharding.tree_shardings(odd, mesh)["token_embedding.embedding"].spec == PartitionSpec(
        None, None
    )


def test_sizes_must_fit_the_devices():
    with pytest.raises(ConfigError, match="do not multiply to the 8 devices"):
        sharding.make_mesh(ParallelConfig(data=3, fsdp=-1), jax.devices())
    mesh = sharding.make_mesh(ParallelConfig(data=-1, fsdp=2), jax.devices())
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}


def test_batches_must_fit_the_devices():
    mesh = sharding.make_mesh(ParallelConfig(), jax.devices())
    sharding.check_batch(16, 2, mesh)
    with pytest.raises(ConfigError, match=r"batch_size=20 is not divisible by 16.*try 16 or 32"):
        sharding.check_batch(20, 2, mesh)
    with pytest.raises(ConfigError, match=r"try 8$"):
        sharding.check_batch(3, 1, mesh)


def test_contradictions():
    assert schema.problems(ParallelConfig(), "parallel") == []
    both = dataclasses.replace(ParallelConfig(), fsdp=-1)
    assert "at most one" in schema.problems(both, "parallel")[0]
    mapped = ParallelConfig(mode="pmap", fsdp=2)
    assert "use parallel.mode=jit" in schema.problems(mapped, "parallel")[0]
    assert "parallel.tensor=0" in schema.problems(ParallelConfig(tensor=0), "parallel")[0]
