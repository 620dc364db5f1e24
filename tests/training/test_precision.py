import functools

import jax
import jax.numpy as jnp
import pytest

from craft_jax.models import base
from craft_jax.models.gpt import GPT, GPTConfig
from craft_jax.training.precision import Policy

CONFIG = GPTConfig(vocab_size=11, num_layers=2, num_heads=2, d_model=16, max_seq_len=8)
BATCH = {"tokens": jnp.zeros((2, 8), jnp.int32), "targets": jnp.ones((2, 8), jnp.int32)}


@functools.cache
def drawn():
    init = functools.partial(base.init_params, GPT, CONFIG)
    with jax.enable_x64(False):
        return jax.jit(init)(jax.random.key(0, impl="rbg"))


def loss(params, policy, key=None):
    return base.define(GPT, CONFIG).merge(policy.cast(params)).loss(BATCH, key=key).loss


def equations(jaxpr):
    """Every equation of a program, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def program(precision, dtype=jnp.float32):
    params = drawn()
    params = {k: v.astype(dtype) for k, v in params.items()}
    policy = Policy.named(precision)
    gradient = jax.value_and_grad(lambda p: loss(p, policy))
    return list(equations(jax.make_jaxpr(gradient)(params).jaxpr))


def operands(program, *names):
    return {
        v.aval.dtype.name
        for e in program
        if e.primitive.name in names
        for v in e.invars
        if hasattr(v.aval, "dtype")
    }


def test_bfloat16_computes_its_products_in_bfloat16():
    made = program("bfloat16")
    forward_products = [e for e in made if e.primitive.name == "dot_general"]
    assert len(forward_products) > 3 * CONFIG.num_layers
    kinds = [{v.aval.dtype.name for v in e.invars} for e in forward_products]
    # The cotangents of float32 scores and logits are float32; everything else is bfloat16.
    assert sum(kind == {"bfloat16"} for kind in kinds) > 0.8 * len(kinds)


def test_statistics_and_loss_stay_in_float32():
    made = program("bfloat16")
    assert operands(made, "exp", "log", "rsqrt", "reduce_max") <= {"float32"}


def test_float64_stays_float64(x64):
    made = program("float32", jnp.float64)
    floats = {
        v.aval.dtype.name
        for e in made
        for v in e.outvars
        if jnp.issubdtype(getattr(v.aval, "dtype", jnp.int32), jnp.floating)
    }
    assert floats == {"float64"}


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_cast(precision):
    cast = Policy.named(precision).cast({"a": jnp.ones(2), "b": jnp.ones(2, jnp.int32)})
    assert cast["a"].dtype == precision
    assert cast["b"].dtype == jnp.int32


def test_gradients_come_back_in_the_dtype_of_the_parameters():
    params = drawn()
    policy = Policy.named("bfloat16")
    grads = jax.jit(jax.grad(lambda params: loss(params, policy)))(params)
    assert {g.dtype.name for g in grads.values()} == {"float32"}
