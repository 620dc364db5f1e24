"""layers.py: numerics of the building blocks, and fast CPU attention against its definition."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from craft_jax.models import layers

TOLERANCE = {"float32": 2e-5, "float64": 1e-12}


@pytest.fixture(autouse=True)
def strict_numerics():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def normal(seed, shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def random_key():
    """An rbg key: threefry takes seconds to compile in every program."""
    return jax.random.key(0, impl="rbg")


def qkv(dtype="float32", B=2, T=13, S=None, H=4, N=4, K=8):
    S = T if S is None else S
    shapes = [(B, T, H, K), (B, S, N, K), (B, S, N, K)]
    return [normal(i, shape, dtype) for i, shape in enumerate(shapes)]


def value_and_gradients(f, *args):
    """f(*args) and its gradients under a fixed random cotangent, jitted."""

    def weighted(*args):
        y = f(*args)
        return jnp.sum(y * normal(99, y.shape, "float32").astype(y.dtype)), y

    grads, y = jax.jit(jax.grad(weighted, argnums=tuple(range(len(args))), has_aux=True))(*args)
    return [y, *grads]


def assert_close(xs, ys, tolerance):
    for x, y in zip(xs, ys, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.max(np.abs(x - y)) <= tolerance * max(1.0, np.max(np.abs(y)))


def product_dtypes(f, *args):
    """Operand dtypes of every dot_general in f, nested functions included."""
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                found.append(tuple(str(v.aval.dtype) for v in eqn.invars))
            for value in eqn.params.values():
                for sub in value if isinstance(value, (tuple, list)) else [value]:
                    sub = getattr(sub, "jaxpr", sub)
                    if hasattr(sub, "eqns"):
                        walk(sub)

    walk(jax.make_jaxpr(f)(*args).jaxpr)
    return found


# --- Linear, Embedding, LayerNorm, gelu, dropout ----------------------------------------------


def test_modules_hold_only_named_params():
    rngs = nnx.Rngs(0)
    for module, names in [
        (layers.Linear(3, 5, rngs=rngs), {"kernel", "bias"}),
        (layers.Linear(3, 5, use_bias=False, rngs=rngs), {"kernel"}),
        (layers.Embedding(7, 4, rngs=rngs), {"embedding"}),
        (layers.LayerNorm(4), {"scale", "bias"}),
        (layers.LayerNorm(4, use_bias=False), {"scale"}),
    ]:
        _, params, rest = nnx.split(module, nnx.Param, ...)
        assert {path[-1] for path, _ in nnx.to_flat_state(params)} == names
        assert not nnx.to_flat_state(rest)


def test_linear_initialisation_and_product(dtype):
    layer = layers.Linear(64, 256, init_std=0.5, rngs=nnx.Rngs(0))
    assert abs(float(jnp.std(layer.kernel[...])) - 0.5) < 0.02
    assert not jnp.any(layer.bias[...])
    x, w, b = normal(0, (2, 3, 4), dtype), normal(1, (4, 5), dtype), normal(2, (5,), dtype)
    y = layers.linear(x, w, b)
    assert y.dtype == dtype
    assert_close([y], [np.asarray(x) @ np.asarray(w) + np.asarray(b)], TOLERANCE[dtype])
    assert layers.linear(x[0, 0], w, None).shape == (5,)


@pytest.mark.parametrize(
    ("x", "w", "y"),
    [("bfloat16", "bfloat16", "bfloat16"), ("bfloat16", "float32", "float32")],
)
def test_linear_works_in_the_promoted_dtype(x, w, y):
    args = normal(0, (2, 3, 4), x), normal(1, (4, 5), w), normal(2, (5,), w)
    assert layers.linear(*args).dtype == y
    forward_and_backward = functools.partial(value_and_gradients, layers.linear)
    assert set(product_dtypes(forward_and_backward, *args)) == {(y, y)}


def test_embedding_looks_up_and_attends(dtype):
    layer = layers.Embedding(7, 4, rngs=nnx.Rngs(0))
    table = normal(0, (7, 4), dtype)
    layer.embedding = nnx.Param(table)
    tokens = jnp.array([[0, 6, 3]])
    assert_close([layer(tokens)], [table[tokens]], 0)
    x = normal(1, (2, 3, 4), dtype)
    assert_close([layer.attend(x)], [np.asarray(x) @ np.asarray(table).T], TOLERANCE[dtype])


def test_bfloat16_logits_are_float32_of_bfloat16_products_in_both_directions():
    layer = layers.Embedding(7, 4, rngs=nnx.Rngs(0))
    layer.embedding = nnx.Param(layer.embedding[...].astype(jnp.bfloat16))
    graph, params = nnx.split(layer)
    x = normal(1, (2, 3, 4), "bfloat16")
    assert layer.attend(x).dtype == jnp.float32

    def forward_and_backward(params, x):
        return jax.grad(lambda p, x: jnp.sum(nnx.merge(graph, p).attend(x)), (0, 1))(params, x)

    products = product_dtypes(forward_and_backward, params, x)
    assert len(products) >= 3 and set(products) == {("bfloat16", "bfloat16")}


def test_layer_norm(dtype):
    x, scale, bias = normal(0, (2, 3, 8), dtype), normal(1, (8,), dtype), normal(2, (8,), dtype)
    n = np.asarray(x)
    expected = (n - n.mean(-1, keepdims=True)) / np.sqrt(n.var(-1, keepdims=True) + 1e-5)
    expected = expected * np.asarray(scale) + np.asarray(bias)
    y = layers.layer_norm(x, scale, bias)
    assert y.dtype == dtype
    assert_close([y], [expected], TOLERANCE[dtype])


def test_layer_norm_is_accurate_at_large_means_and_in_bfloat16():
    x = normal(0, (4, 384)) + 1000.0
    n = np.asarray(x, np.float64)
    expected = (n - n.mean(-1, keepdims=True)) / np.sqrt(n.var(-1, keepdims=True) + 1e-5)
    layer = layers.LayerNorm(384)
    assert np.max(np.abs(np.asarray(layer(x)) - expected)) < 2e-4
    x = normal(0, (4, 384), "bfloat16")
    y = layer(x)
    assert y.dtype == jnp.bfloat16
    assert_close([y], [layer(x.astype(jnp.float32)).astype(jnp.bfloat16)], 0)


def test_gelu_and_its_derivative(dtype):
    x = jnp.linspace(-9.0, 9.0, 257, dtype=dtype)
    cdf = np.array([0.5 * math.erfc(-float(v) / math.sqrt(2)) for v in np.asarray(x)])
    n = np.asarray(x, np.float64)
    pdf = np.exp(-0.5 * n * n) / math.sqrt(2 * math.pi)
    y, dx = jax.jit(jax.vmap(jax.value_and_grad(layers.gelu)))(x)
    assert y.dtype == dtype
    tolerance = {"float32": 1e-6, "float64": 1e-14}[dtype]
    assert np.max(np.abs(np.asarray(y) - n * cdf)) < tolerance
    assert np.max(np.abs(np.asarray(dx) - (cdf + n * pdf))) < tolerance
    tanh = 0.5 * n * (1 + np.tanh(math.sqrt(2 / math.pi) * (n + 0.044715 * n**3)))
    assert np.max(np.abs(np.asarray(layers.gelu(x, approximate=True)) - tanh)) < tolerance


def test_gelu_in_bfloat16_rounds_once():
    x = normal(0, (64,), "bfloat16") * 3
    for approximate in (False, True):
        y = layers.gelu(x, approximate)
        wide = layers.gelu(x.astype(jnp.float32), approximate)
        assert_close([y], [wide.astype(jnp.bfloat16)], 0)


def test_dropout():
    x = jnp.ones((100, 100))
    assert layers.dropout(x, 0.5, None) is x
    assert layers.dropout(x, 0.0, random_key()) is x
    y = layers.dropout(x, 0.25, random_key())
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert abs(float(jnp.mean(y)) - 1.0) < 0.02
    with pytest.raises(ValueError, match=r"rate=1\.0"):
        layers.dropout(x, 1.0, random_key())


# --- attention ---------------------------------------------------------------------------------

CASES = {
    "one block": dict(T=13),
    "ragged blocks": dict(T=150),
    "many blocks": dict(B=1, T=1100, H=2, N=2, K=4),
    "grouped query": dict(T=140, H=6, N=2),
    "multi query": dict(T=13, N=1),
    "one token": dict(T=1),
}


def in_one_dtype(*cells):
    """Cells in one dtype and, unless asked for, in the other: by turns."""
    return pytest.mark.parametrize(
        ("dtype", "cell"),
        [
            pytest.param(dtype, cell, marks=() if place == number % 2 else pytest.mark.soak)
            for number, cell in enumerate(cells)
            for place, dtype in enumerate(TOLERANCE)
        ],
        indirect=["dtype"],
    )


@in_one_dtype(
    ("one block", 0.0),
    ("ragged blocks", 0.0),
    ("many blocks", 0.0),
    ("grouped query", 0.0),
    ("multi query", 0.0),
    ("one token", 0.0),
    ("ragged blocks", 0.3),
    ("grouped query", 0.3),
)
def test_fast_attention_equals_reference(dtype, cell):
    case, rate = cell
    args = qkv(dtype, **CASES[case])
    options = dict(dropout_rate=rate, key=random_key())
    fast = functools.partial(layers.causal_attention, **options)
    reference = functools.partial(layers.reference_attention, **options)
    tolerance = TOLERANCE[dtype]
    assert_close(value_and_gradients(fast, *args), value_and_gradients(reference, *args), tolerance)


def test_reference_attention_against_numpy(dtype):
    q, k, v = (np.asarray(x) for x in qkv(dtype, B=1, T=5, H=4, N=2, K=3))
    y = np.zeros_like(q)
    for h in range(4):
        for t in range(5):
            s = k[0, : t + 1, h // 2] @ q[0, t, h] / math.sqrt(3)
            p = np.exp(s - s.max())
            y[0, t, h] = (p / p.sum()) @ v[0, : t + 1, h // 2]
    assert_close([layers.reference_attention(q, k, v)], [y], TOLERANCE[dtype])


def test_attention_is_causal():
    q, k, v = qkv(T=150)

    def one_query(k, v):
        return jnp.sum(layers.causal_attention(q, k, v)[:, 129])

    dk, dv = jax.jit(jax.grad(one_query, (0, 1)))(k, v)
    assert not jnp.any(dk[:, 130:]) and not jnp.any(dv[:, 130:])
    assert jnp.all(jnp.any(dv[:, :130] != 0, axis=(2, 3)))


@in_one_dtype(4, 2)
def test_offsets_continue_a_sequence(dtype, cell):
    num_kv_heads = cell
    q, k, v = qkv(dtype, T=12, N=num_kv_heads)
    full = layers.causal_attention(q, k, v)
    offset = jnp.array([3, 7], jnp.int32)
    part = jnp.stack([q[b, o : o + 4] for b, o in enumerate([3, 7])])
    expected = jnp.stack([full[b, o : o + 4] for b, o in enumerate([3, 7])])
    # what lies beyond the last query is not read
    position = jnp.arange(12, dtype=jnp.int32)[None, :, None, None]
    beyond = position > (offset + 3)[:, None, None, None]
    k, v = (jnp.where(beyond, jnp.asarray(1e4, dtype), x) for x in (k, v))
    y = layers.cached_attention(part, *map(layers.heads_first, (k, v)), offset)
    assert_close([y], [expected], TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("causal_attention", 0.3),
        ("reference_attention", 0.0),
        pytest.param("causal_attention", 0.0, marks=pytest.mark.soak),
        pytest.param("reference_attention", 0.3, marks=pytest.mark.soak),
    ],
)
def test_bfloat16_attention_multiplies_bfloat16(name, rate):
    args = qkv("bfloat16", T=140, H=4, N=2)
    attention = functools.partial(getattr(layers, name), dropout_rate=rate, key=random_key())
    results = functools.partial(value_and_gradients, attention)
    assert set(product_dtypes(results, *args)) == {("bfloat16", "bfloat16")}
    exact = value_and_gradients(attention, *(x.astype(jnp.float32) for x in args))
    half = results(*args)
    assert all(x.dtype == jnp.bfloat16 for x in half)
    assert_close([x.astype(jnp.float32) for x in half], exact, 0.03)


def test_attention_rejects_what_it_cannot_mean():
    q, k, v = qkv(H=4, N=3)
    with pytest.raises(ValueError, match="num_kv_heads=3 does not divide num_heads=4"):
        layers.causal_attention(q, k, v)
    q, k, v = qkv(T=3, S=5)
    with pytest.raises(ValueError, match="3 queries but 5 keys; use cached_attention"):
        layers.causal_attention(q, k, v)
    q, k, v = qkv(H=4, N=3)
    with pytest.raises(ValueError, match="num_kv_heads=3 does not divide num_heads=4"):
        layers.cached_attention(q, *map(layers.heads_first, (k, v)), jnp.zeros(2, jnp.int32))


# --- under transformations ---------------------------------------------------------------------


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = layers.LayerNorm(16)
        self.query, self.key, self.value, self.out = (
            layers.Linear(16, 16, init_std=0.3, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x, key=None):
        h = self.norm(x)
        q, k, v = (f(h).reshape(*x.shape[:2], 4, 4) for f in (self.query, self.key, self.value))
        y = layers.causal_attention(q, k, v, dropout_rate=0.2, key=key)
        return x + layers.gelu(self.out(y.reshape(x.shape)))


def block_loss():
    graph, params = nnx.split(Block(nnx.Rngs(0)))

    def loss(params, x, key=None, remat=False):
        block = nnx.merge(graph, params)
        call = nnx.remat(Block.__call__) if remat else Block.__call__
        return jnp.mean(jnp.square(call(block, x, key)))

    return loss, params


@pytest.mark.parametrize("key", [pytest.param(None, marks=pytest.mark.soak), 0])
def test_remat_changes_nothing(key):
    loss, params = block_loss()
    key = None if key is None else random_key()
    x = normal(0, (2, 12, 16))
    plain = jax.jit(jax.grad(loss))(params, x, key)
    for remat in (
        jax.grad(functools.partial(loss, remat=True)),
        jax.grad(jax.checkpoint(loss)),
    ):
        assert_close(jax.tree.leaves(jax.jit(remat)(params, x, key)), jax.tree.leaves(plain), 1e-6)


def test_scan_accumulates_the_gradient_of_the_whole_batch():
    loss, params = block_loss()
    x = normal(0, (4, 12, 16))

    @jax.jit
    def accumulated(params, x):
        def add(total, x):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, x)), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), x[:, None])
        return jax.tree.map(lambda g: g / 4, total)

    whole = jax.jit(jax.grad(loss))(params, x)
    assert_close(jax.tree.leaves(accumulated(params, x)), jax.tree.leaves(whole), 1e-6)


def test_a_batch_split_over_devices_gives_the_same_gradients():
    num_devices = min(4, jax.device_count())
    mesh = jax.make_mesh(
        (num_devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:num_devices]
    )
    loss, params = block_loss()
    x = normal(0, (4, 140, 16))
    whole = jax.jit(jax.grad(loss))(params, x)
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    split = jax.jit(jax.grad(loss))(params, x)
    assert_close(jax.tree.leaves(split), jax.tree.leaves(whole), 1e-5)


def test_attention_to_any_keys_is_the_causal_one_where_they_are_those(rng):
    q, k, v = (jnp.asarray(rng.standard_normal((2, 7, n, 4)), jnp.float32) for n in (6, 2, 2))
    visible = jnp.tril(jnp.ones((7, 7), bool))[None]
    np.testing.assert_allclose(
        layers.attention(q, *map(layers.heads_first, (k, v)), visible),
        layers.reference_attention(q, k, v),
        atol=1e-6,
    )


def test_attention_sees_what_it_may(rng):
    q = jnp.asarray(rng.standard_normal((2, 5, 3, 4)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((2, 3, 5, 4)), jnp.float32) for _ in range(2))
    mask_BS = jnp.array([[True, False, True, True, False], [True] * 5])
    y = layers.attention(q, k, v, mask_BS[:, None, :])
    kept = layers.attention(q[:1], k[:1, :, [0, 2, 3]], v[:1, :, [0, 2, 3]])
    np.testing.assert_allclose(y[:1], kept, atol=1e-6)
    np.testing.assert_allclose(y[1:], layers.attention(q[1:], k[1:], v[1:]), atol=1e-6)
    nothing = layers.attention(q, k[:, :, :0], v[:, :, :0])
    assert nothing.shape == q.shape and not nothing.any()
    blind = layers.attention(q, k, v, jnp.zeros((1, 1, 5), bool))
    np.testing.assert_allclose(blind, jnp.broadcast_to(v.mean(2)[:, None], q.shape), atol=1e-6)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_head_has_what_it_needs(rng, is_tied, use_bias):
    head = layers.Head(5, 3, is_tied=is_tied, use_bias=use_bias, rngs=nnx.Rngs(0))
    state = {path[0] for path, _ in nnx.to_flat_state(nnx.state(head))}
    assert state == {n for n, has in (("embedding", not is_tied), ("bias", use_bias)) if has}
    if use_bias:
        head.bias[...] = jnp.arange(5.0)
    x, tied = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((2, 4, 3), (5, 3)))
    logits = head(x, tied)
    table = tied if is_tied else head.embedding[...]
    expected = x.astype(jnp.float32) @ table.astype(jnp.float32).T
    expected = expected + (jnp.arange(5.0)[None, None] if use_bias else 0)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("d_model", [6, 7])
def test_sinusoids_are_those_of_the_paper(d_model):
    table = layers.sinusoids(9, d_model)
    for p, i in ((0, 0), (0, 1), (3, 2), (8, 5)):
        angle = p / 10000 ** (2 * (i // 2) / d_model)
        assert table[p, i] == pytest.approx(np.cos(angle) if i % 2 else np.sin(angle))
    module = layers.Sinusoids(9, d_model)
    grad = nnx.grad(lambda m: m(jnp.arange(4)).sum())(module)
    (constant,) = jax.tree.leaves(grad)
    assert not np.any(constant)
