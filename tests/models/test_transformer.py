import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from craft_jax import schema
from craft_jax.models import base
from craft_jax.models.layers import sinusoids
from craft_jax.models.transformer import TransformerConfig, TransformerLM, embed
from craft_jax.training import optim
from craft_jax.training.optim import OptimConfig

CONFIG = TransformerConfig(vocab_size=13, num_layers=2, num_heads=3, d_model=24, max_seq_len=10)
VARIANTS = {
    "as Craft had it last": {},
    "post-norm, relu": {"norm_first": False, "activation": "relu"},
    "no bias, nothing at the end": {"bias": False, "final_norm": False},
    "zeros": {"cross_attention": "zeros", "tie_embeddings": False, "head_bias": True},
    "empty, post-norm": {"cross_attention": "empty", "norm_first": False},
    "sinusoidal": {"positions": "sinusoidal", "embedding_scale": False, "head_bias": True},
}


@functools.cache
def drawn_of(config):
    """Initial parameters; with keys of threefry they would take seconds to compile."""
    init = functools.partial(base.init_params, TransformerLM, config)
    return jax.jit(init)(jax.random.key(0, impl="rbg"))


def by_default(*names):
    """The variants, of which only some are tested by default."""
    return [
        name if name in names else pytest.param(name, marks=pytest.mark.soak) for name in VARIANTS
    ]


def noisy(definition, seed=0, dtype=jnp.float32):
    """Parameters of which none is left at its initial value, but for constants."""
    rng = np.random.default_rng(seed)
    drawn = drawn_of(definition.config)
    wide = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32

    def drawn_near(value):
        return value.astype(wide) + jnp.asarray(0.3 * rng.standard_normal(value.shape), wide)

    return {
        path: (value if path.endswith("constant") else drawn_near(value)).astype(dtype)
        for path, value in drawn.items()
    }


def build(seed=0, dtype=jnp.float32, **changes):
    definition = base.define(TransformerLM, dataclasses.replace(CONFIG, **changes))
    return definition.merge(noisy(definition, seed, dtype))


@pytest.fixture
def tokens_BT():
    return jax.random.randint(jax.random.key(7), (2, 10), 0, 13)


# torch's causal stacks give the same numbers, to the last variant; see the end of this file.
@pytest.mark.parametrize("name", by_default("as Craft had it last", "empty, post-norm"))
def test_the_past_does_not_see_the_future(tokens_BT, name):
    model = build(**VARIANTS[name])
    later_BT = tokens_BT.at[:, 6:].set((tokens_BT[:, 6:] + 1) % 13)
    before, after = model(tokens_BT)[0], model(later_BT)[0]
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert jnp.all(jnp.any(before[:, 6:] != after[:, 6:], axis=-1))


# What is kept and where a token is placed vary with these alone.
@pytest.mark.parametrize("name", by_default("as Craft had it last", "zeros", "sinusoidal"))
def test_with_a_cache_as_without(tokens_BT, name):
    model = build(**VARIANTS[name])
    expected, none = model(tokens_BT)
    assert none is None
    cache, parts = model.init_cache(2, 10, jnp.float32), []
    for part in jnp.split(tokens_BT, [4, 5], axis=1):
        logits, cache = model(part, cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, atol=5e-5)
    assert cache.length_B.tolist() == [10, 10]


def test_padding_is_seen_by_nobody_else(tokens_BT):
    """Behind the text it changes nothing; before it, the text is computed as if it were absent."""
    model = build()
    mask_BT = jnp.arange(10)[None, :] < jnp.array([[7], [10]])
    masked, _ = model.hidden(tokens_BT, mask_BT=mask_BT)
    plain, _ = model.hidden(tokens_BT)
    np.testing.assert_allclose(masked[0, :7], plain[0, :7], atol=2e-5)
    np.testing.assert_allclose(masked[1], plain[1], atol=2e-5)
    mask_BT = jnp.arange(10)[None, :] >= jnp.array([[3], [0]])
    other_BT = tokens_BT.at[0, :3].set(0)
    one, two = (model.hidden(t, mask_BT=mask_BT)[0] for t in (tokens_BT, other_BT))
    np.testing.assert_array_equal(one[0, 3:], two[0, 3:])
    with pytest.raises(ValueError, match="a cache knows no padding"):
        model.hidden(tokens_BT, model.init_cache(2, 10, jnp.float32), mask_BT=mask_BT)


def test_remat_changes_nothing(tokens_BT):
    config = dataclasses.replace(CONFIG, num_layers=1, dropout=0.3, cross_attention="zeros")
    key = jax.random.key(3, impl="rbg")  # One of threefry takes seconds to compile.
    definition = base.define(TransformerLM, config)
    batch = {"tokens": tokens_BT, "targets": tokens_BT}

    def loss(params, remat):
        return definition.merge(params).loss(batch, key=key, remat=remat).loss

    params = noisy(definition)
    gradients = jax.jit(jax.grad(loss), static_argnums=1)
    plain, again = (gradients(params, remat) for remat in (False, True))
    for path, value in plain.items():
        np.testing.assert_allclose(again[path], value, rtol=1e-4, atol=1e-4)


def test_dropout_needs_a_key_and_follows_it(tokens_BT):
    model = build(dropout=0.5)
    plain = model(tokens_BT)[0]
    assert jnp.array_equal(plain, model(tokens_BT)[0])
    one, same, other = (model(tokens_BT, key=jax.random.key(k))[0] for k in (0, 0, 1))
    assert jnp.array_equal(one, same) and not jnp.allclose(one, other)
    assert not jnp.allclose(one, plain)


def test_cross_attention_to_nothing_adds_a_constant(tokens_BT):
    """One zero vector gives the value's bias, an empty memory nothing, each through `out`."""
    for kind in ("zeros", "empty"):
        model = build(cross_attention=kind)
        cross = model.blocks[0].cross
        x_BTD = jax.random.normal(jax.random.key(1), (2, 5, 24))
        memory_BSD = jnp.zeros((2, 1 if kind == "zeros" else 0, 24))
        y_BTD = cross(x_BTD, cross.keys_and_values(memory_BSD))
        bias_D = cross.out.bias[...]
        if kind == "zeros":
            bias_D = bias_D + cross.value.bias[...] @ cross.out.kernel[...]
        np.testing.assert_allclose(y_BTD, jnp.broadcast_to(bias_D, y_BTD.shape), atol=1e-5)
        logits, _ = model(tokens_BT)
        assert jnp.isfinite(logits).all()


def test_a_sinusoidal_table_never_moves(tokens_BT):
    definition = base.define(TransformerLM, dataclasses.replace(CONFIG, positions="sinusoidal"))
    assert definition.constants == {"position_embedding.constant"}
    params = noisy(definition)
    table = params["position_embedding.constant"]
    np.testing.assert_allclose(table, sinusoids(10, 24), atol=1e-7)
    batch = {"tokens": tokens_BT, "targets": tokens_BT}
    optimizer = optim.make_optimizer(OptimConfig(weight_decay=0.5), definition.constants)

    @jax.jit
    def moved_from(params):
        grads = jax.grad(lambda p: definition.merge(p).loss(batch).loss)(params)
        return optimizer.apply(grads, optimizer.init(params), params, jnp.float32(0.1))[0]

    with jax.numpy_dtype_promotion("standard"):  # The optimizer needs it.
        moved = moved_from(params)
    np.testing.assert_array_equal(moved["position_embedding.constant"], table)
    assert not np.array_equal(
        moved["token_embedding.embedding"], params["token_embedding.embedding"]
    )


def test_the_scale_is_not_rounded_to_bfloat16():
    """sqrt(3072) is 55.43, and 55.5 in bfloat16 (as Gemma had it once)."""
    model = build(dtype=jnp.bfloat16, d_model=3072, num_layers=0, num_heads=1, d_ff=1)
    table = model.token_embedding.embedding[...]
    from_model = embed(
        model.config, jnp.array([[3]]), model.token_embedding, model.position_embedding, None, None
    )
    exact = (table[3].astype(jnp.float32) * np.sqrt(3072)).astype(jnp.bfloat16)
    position = model.position_embedding.embedding[...][0]
    np.testing.assert_array_equal(from_model[0, 0], exact + position)


def test_norms_may_have_biases_of_their_own():
    def biased(**changes):
        shapes = base.define(TransformerLM, dataclasses.replace(CONFIG, **changes)).shapes
        return {path.split(".")[-2] for path in shapes if path.endswith("bias")}

    dense = {"query", "key", "value", "out", "up", "down"}
    norms = {"attn_norm", "mlp_norm"}
    assert biased() == dense | norms | {"final_norm"}
    assert biased(bias=False) == set()
    assert biased(bias=False, norm_bias=True) == norms | {"final_norm"}
    assert biased(bias=False, final_norm_bias=True) == {"final_norm"}
    assert biased(norm_bias=False) == dense


def test_impossible_configs_are_named():
    (problem,) = schema.problems(dataclasses.replace(CONFIG, num_heads=5), "model")
    assert "model.num_heads=5 does not divide model.d_model=24; try 4 or 6" in problem
    with pytest.raises(ValueError, match="11 tokens exceed max_seq_len=10"):
        build()(jnp.zeros((1, 11), jnp.int32))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("is_padded", "name"),
    [
        *((True, name) for name in VARIANTS),
        (False, "as Craft had it last"),
        *(
            pytest.param(False, name, marks=pytest.mark.soak)
            for name in VARIANTS
            if name != "as Craft had it last"
        ),
    ],
)
def test_the_same_numbers_as_torch(x64, tokens_BT, is_padded, name):
    """torch.nn's stacks with the same weights, in float64, with and without padding in front."""
    torch = pytest.importorskip("torch")
    model = build(dtype=jnp.float64, **VARIANTS[name])
    config, mask_BT = model.config, np.ones((2, 10), bool)
    if is_padded:
        mask_BT[0, 7:] = False
    stack = torch_stack(torch, model).eval()
    ids = torch.tensor(np.asarray(tokens_BT)).long()
    x = torch.tensor(np.asarray(model.token_embedding.embedding[...]))[ids]
    x = x * (24**0.5 if config.embedding_scale else 1)
    table = model.position_embedding
    x = x + torch.tensor(np.asarray(table(jnp.arange(10))))
    future = torch.triu(torch.ones(10, 10, dtype=torch.bool), 1)
    padding = torch.tensor(~mask_BT)
    if config.cross_attention == "none":
        y = stack(x, mask=future, src_key_padding_mask=padding)
    else:
        memory = torch.zeros(2, 1 if config.cross_attention == "zeros" else 0, 24).double()
        y = stack(x, memory, tgt_mask=future, tgt_key_padding_mask=padding)
    ours, _ = model.hidden(tokens_BT, mask_BT=mask_BT if is_padded else None)
    np.testing.assert_allclose(ours, y.detach().numpy(), rtol=0, atol=1e-11)


def torch_stack(torch, model):
    """The torch.nn module of a model, with its weights."""
    config = model.config
    options = {
        "d_model": 24,
        "nhead": 3,
        "dim_feedforward": 96,
        "dropout": 0.0,
        "activation": config.activation,
        "batch_first": True,
        "norm_first": config.norm_first,
        "bias": config.bias,
    }
    norm = torch.nn.LayerNorm(24, bias=config.bias) if config.final_norm else None
    if config.cross_attention == "none":
        layer = torch.nn.TransformerEncoderLayer(**options)
        stack = torch.nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
    else:
        layer = torch.nn.TransformerDecoderLayer(**options)
        stack = torch.nn.TransformerDecoder(layer, 2, norm)
    state = {}

    def put(name, module, kernel="kernel"):
        state[f"{name}.weight"] = getattr(module, kernel)[...].T
        if module.bias is not None:
            state[f"{name}.bias"] = module.bias[...]

    def attention(name, module):
        parts = (module.query, module.key, module.value)
        state[f"{name}.in_proj_weight"] = np.concatenate([p.kernel[...].T for p in parts])
        if config.bias:
            state[f"{name}.in_proj_bias"] = np.concatenate([p.bias[...] for p in parts])
        put(f"{name}.out_proj", module.out)

    for i, block in enumerate(model.blocks):
        norms = [block.attn_norm, *([block.cross_norm] if block.cross else []), block.mlp_norm]
        for number, one in enumerate(norms, 1):
            put(f"layers.{i}.norm{number}", one, "scale")
        attention(f"layers.{i}.self_attn", block.attn)
        if block.cross:
            attention(f"layers.{i}.multihead_attn", block.cross)
        put(f"layers.{i}.linear1", block.mlp.up)
        put(f"layers.{i}.linear2", block.mlp.down)
    if norm is not None:
        put("norm", model.final_norm, "scale")
    stack = stack.double()
    stack.load_state_dict({n: torch.tensor(np.asarray(a)) for n, a in state.items()}, strict=True)
    return stack
