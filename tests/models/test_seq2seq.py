import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from craft_jax.models import base
from craft_jax.models.seq2seq import Seq2SeqConfig, Transformer

CONFIG = Seq2SeqConfig(
    vocab_size=13, num_layers=2, num_decoder_layers=1, num_heads=3, d_model=24, max_seq_len=10
)


def build(seed=0, dtype=jnp.float32, **changes):
    definition = base.define(Transformer, dataclasses.replace(CONFIG, **changes))
    rng = np.random.default_rng(seed)
    return definition.merge(
        {
            path: jnp.asarray(path.endswith("scale") + 0.3 * rng.standard_normal(leaf.shape), dtype)
            for path, leaf in definition.shapes.items()
        }
    )


@pytest.fixture
def pair():
    keys = jax.random.split(jax.random.key(7))
    source_BS = jax.random.randint(keys[0], (2, 8), 0, 13)
    mask_BS = jnp.arange(8)[None, :] < jnp.array([[5], [8]])
    return {"source_BS": source_BS, "source_mask_BS": mask_BS}, jax.random.randint(
        keys[1], (2, 10), 0, 13
    )


def test_the_target_sees_its_past_and_all_of_the_source(pair):
    source, tokens_BT = pair
    model = build()
    plain, none = model(tokens_BT, **source)
    assert none is None
    later = model(tokens_BT.at[:, 6:].set((tokens_BT[:, 6:] + 1) % 13), **source)[0]
    np.testing.assert_array_equal(plain[:, :6], later[:, :6])
    changed = source["source_BS"].at[:, 4].set((source["source_BS"][:, 4] + 1) % 13)
    other = model(tokens_BT, **source | {"source_BS": changed})[0]
    assert jnp.all(jnp.any(plain != other, axis=-1))


def test_padding_of_the_source_means_nothing(pair):
    source, tokens_BT = pair
    model = build()
    plain = model(tokens_BT, **source)[0]
    changed = source["source_BS"].at[0, 5:].set(0)
    np.testing.assert_array_equal(plain, model(tokens_BT, **source | {"source_BS": changed})[0])
    short = {"source_BS": source["source_BS"][:1, :5], "source_mask_BS": None}
    np.testing.assert_allclose(plain[:1], model(tokens_BT[:1], **short)[0], atol=2e-5)


@pytest.mark.parametrize("changes", [{}, {"norm_first": False, "share_embeddings": False}])
def test_with_a_cache_as_without(pair, changes):
    source, tokens_BT = pair
    model = build(**changes)
    expected = model(tokens_BT, **source)[0]
    cache = model.init_cache_from(*source.values(), 10, jnp.float32)
    parts = []
    for part in jnp.split(tokens_BT, [4, 5], axis=1):
        logits, cache = model(part, cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, atol=5e-5)
    assert cache.length_B.tolist() == [10, 10]
    assert cache._replace(length_B=jnp.array([3, 4])).length_B.tolist() == [3, 4]


def test_the_source_is_given_once(pair):
    source, tokens_BT = pair
    model = build()
    cache = model.init_cache(2, 10, jnp.float32)
    assert jnp.isfinite(model(tokens_BT, cache)[0]).all()  # A source of length 0.
    for arguments in ((tokens_BT,), (tokens_BT, cache, None, source)):
        with pytest.raises(ValueError, match="the source is given once"):
            model(*arguments[:3], **(arguments[3] if len(arguments) > 3 else {}))
    with pytest.raises(ValueError, match="a cache knows no padding"):
        model(tokens_BT, cache, mask_BT=jnp.ones((2, 10), bool))


def test_the_loss_counts_whole_rows(pair):
    source, tokens_BT = pair
    model = build()
    logits = model(tokens_BT, **source)[0]
    best_BT = jnp.argmax(logits, axis=-1)
    weights_BT = jnp.ones((2, 10)).at[0, 6:].set(0)
    wrong_BT = best_BT.at[0, 8].add(1) % 13  # Where nothing counts.
    batch = {"source": source["source_BS"], "source_mask": source["source_mask_BS"]}
    batch |= {"tokens": tokens_BT, "targets": wrong_BT, "weights": weights_BT}
    sums = model.loss(batch)
    assert (sums.exact, sums.rows, sums.correct, sums.weight) == (2, 2, 16, 16)
    sums = model.loss(batch | {"targets": best_BT.at[1, 3].add(1) % 13})
    assert (sums.exact, sums.rows, sums.correct) == (1, 2, 15)
    sums = model.loss(batch | {"weights": weights_BT.at[1].set(0)})
    assert (sums.exact, sums.rows, sums.weight) == (1, 1, 6)


def test_remat_and_dropout(pair):
    source, tokens_BT = pair
    definition = base.define(Transformer, dataclasses.replace(CONFIG, num_layers=1, dropout=0.3))
    params = base.split(build(num_layers=1))
    batch = {"source": source["source_BS"], "source_mask": source["source_mask_BS"]}
    batch |= {"tokens": tokens_BT, "targets": tokens_BT, "weights": jnp.ones((2, 10))}

    def loss(params, remat, key):
        return definition.merge(params).loss(batch, key=key, remat=remat).loss

    # Keys of threefry take seconds to compile.
    key, other = (jax.random.key(seed, impl="rbg") for seed in (3, 4))
    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (value, plain), (_, again) = (both(params, remat, key) for remat in (False, True))
    for path, gradient in plain.items():
        np.testing.assert_allclose(again[path], gradient, rtol=1e-4, atol=1e-4)
    assert both(params, False, key)[0] == value != both(params, False, other)[0]
    evaluate = jax.jit(functools.partial(loss, remat=False, key=None))
    assert evaluate(params) == evaluate(params) != value


def test_embeddings_may_be_one_or_several():
    def tables(**changes):
        shapes = base.define(Transformer, dataclasses.replace(CONFIG, **changes)).shapes
        return {path for path in shapes if path.endswith(("embedding", "constant"))}

    positions = {"source_positions.embedding", "target_positions.embedding"}
    target, source = "target_embedding.embedding", "source_embedding.embedding"
    assert tables() == positions | {target}
    assert tables(share_embeddings=False) == positions | {target, source}
    assert tables(tie_embeddings=False) == positions | {target, "head.embedding"}
    assert {path.partition(".")[2] for path in tables(positions="sinusoidal")} == {
        "constant",
        "embedding",
    }


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize(
    ("bias", "norm_first"),
    [
        (True, True),
        (False, False),
        pytest.param(True, False, marks=pytest.mark.soak),
        pytest.param(False, True, marks=pytest.mark.soak),
    ],
)
def test_the_same_numbers_as_torch(x64, pair, bias, norm_first):
    """torch.nn.Transformer with the same weights, padding in source and target, in float64."""
    torch = pytest.importorskip("torch")
    source, tokens_BT = pair
    model = build(dtype=jnp.float64, norm_first=norm_first, bias=bias, share_embeddings=False)
    mask_BT = np.ones((2, 10), bool)
    mask_BT[1, 7:] = False
    ours, _ = model.hidden(tokens_BT, **source, mask_BT=mask_BT)

    state = {}

    def put(name, module, kernel="kernel"):
        state[f"{name}.weight"] = getattr(module, kernel)[...].T
        if module.bias is not None:
            state[f"{name}.bias"] = module.bias[...]

    def attention(name, module):
        parts = (module.query, module.key, module.value)
        state[f"{name}.in_proj_weight"] = np.concatenate([p.kernel[...].T for p in parts])
        if bias:
            state[f"{name}.in_proj_bias"] = np.concatenate([p.bias[...] for p in parts])
        put(f"{name}.out_proj", module.out)

    for stack, blocks in (("encoder", model.encoder), ("decoder", model.decoder)):
        for i, block in enumerate(blocks):
            norms = [block.attn_norm, *([block.cross_norm] if block.cross else []), block.mlp_norm]
            for number, norm in enumerate(norms, 1):
                put(f"{stack}.layers.{i}.norm{number}", norm, "scale")
            attention(f"{stack}.layers.{i}.self_attn", block.attn)
            if block.cross:
                attention(f"{stack}.layers.{i}.multihead_attn", block.cross)
            put(f"{stack}.layers.{i}.linear1", block.mlp.up)
            put(f"{stack}.layers.{i}.linear2", block.mlp.down)
        put(f"{stack}.norm", getattr(model, f"{stack}_norm"), "scale")
    options = {"activation": "gelu", "batch_first": True, "norm_first": norm_first, "bias": bias}
    layers = {"num_encoder_layers": 2, "num_decoder_layers": 1, "dim_feedforward": 96}
    theirs = torch.nn.Transformer(24, 3, dropout=0.0, **layers, **options).double()
    theirs.encoder.enable_nested_tensor = False
    theirs.load_state_dict({n: torch.tensor(np.asarray(a)) for n, a in state.items()}, strict=True)

    def embedded(ids, table, positions):
        x = np.asarray(table.embedding[...])[np.asarray(ids)] * 24**0.5
        return torch.tensor(x + np.asarray(positions.embedding[...])[: ids.shape[1]])

    padding = torch.tensor(~np.asarray(source["source_mask_BS"]))
    y = theirs(
        embedded(source["source_BS"], model.source_embedding, model.source_positions),
        embedded(tokens_BT, model.target_embedding, model.target_positions),
        tgt_mask=torch.triu(torch.ones(10, 10, dtype=torch.bool), 1),
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
        tgt_key_padding_mask=torch.tensor(~mask_BT),
    )
    np.testing.assert_allclose(ours, y.detach().numpy(), rtol=0, atol=1e-11)
