"""Modules of `torch.nn`'s parts, and Craft's lineages: their names, and their numbers in float64.

The tensors are mapped here by hand, without the tables of interop.
"""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from interop.mapping.shapes import leaves as leaves_of  # noqa: E402
from interop.pytorch import builders  # noqa: E402
from tests.interop.models import random_leaves  # noqa: E402
from tests.interop.pytorch import reference  # noqa: E402
from tests.interop.pytorch.reference import gap, gpt, ids, lm, mask, pair  # noqa: E402

pytestmark = pytest.mark.torch
EXACT = 1e-10
SCALED = {"embedding_scale": True}
APART = {"tie_embeddings": False}

# Where each kind has what craft_jax calls by the name on the left.
ENCODER_LAYER = {
    "attn_norm": "norm1", "mlp_norm": "norm2", "attn": "self_attn", "mlp.up": "linear1",
    "mlp.down": "linear2",
}  # fmt: skip
DECODER_LAYER = ENCODER_LAYER | {
    "cross_norm": "norm2", "cross": "multihead_attn", "mlp_norm": "norm3",
}  # fmt: skip
D_LAYER = {
    "attn_norm": "norm1", "mlp_norm": "norm2", "attn": "self_attn", "mlp.up": "ff.fc1",
    "mlp.down": "ff.fc2",
}  # fmt: skip
LM_NAMES = {"token_embedding": "token_embedding", "position_embedding": "position_embedding"}
DECODER_NAMES = {
    "blocks": "transformer_decoder.layers", "final_norm": "transformer_decoder.norm",
    "head": "output_layer",
}  # fmt: skip
# kind: its layer, the modules around, the models to try.
KINDS = {
    "torch-encoder": (
        ENCODER_LAYER,
        LM_NAMES | {"blocks": "encoder.layers", "final_norm": "encoder.norm", "head": "head"},
        {
            "pre-norm": lm(),
            "post-norm": lm(norm_first=False, **SCALED),
            "no final norm": lm(final_norm=False, activation="relu", head_bias=True),
            "untied": lm(bias=False, final_norm_bias=True, activation="silu", **APART),
            "sinusoidal": lm(positions="sinusoidal", activation="gelu_tanh", norm_eps=1e-12),
            "gpt": gpt(norm_bias=True, head_bias=True),
        },
    ),
    "torch-decoder": (
        DECODER_LAYER,
        LM_NAMES | {"blocks": "decoder.layers", "final_norm": "decoder.norm", "head": "head"},
        {
            "zeros": lm(cross_attention="zeros", **SCALED),
            "empty, post-norm": lm(cross_attention="empty", norm_first=False, head_bias=True),
            "zeros, post-norm": lm(cross_attention="zeros", norm_first=False, final_norm=False),
            "no bias": lm(cross_attention="empty", bias=False, final_norm_bias=True, **APART),
            "none": lm(activation="silu"),
        },
    ),
    "torch-transformer": (
        DECODER_LAYER,
        {
            name: name
            for name in (
                "source_embedding", "target_embedding", "source_positions", "target_positions",
                "head",
            )
        }
        | {
            "encoder_norm": "transformer.encoder.norm",
            "decoder_norm": "transformer.decoder.norm",
            "encoder": "transformer.encoder.layers",
            "decoder": "transformer.decoder.layers",
        },
        reference.PAIRS,
    ),
    "craft-b": (
        ENCODER_LAYER,
        {
            "token_embedding": "embedding",
            "position_embedding": "positional_encoding.position_embeddings",
            "blocks": "transformer_encoder.layers",
            "final_norm": "transformer_encoder.norm",
            "head": "decoder",
        },
        {
            "learned": lm(head_bias=True, **SCALED, **APART),
            "sinusoidal": lm(head_bias=True, positions="sinusoidal", **SCALED, **APART),
        },
    ),
    "craft-c": (
        DECODER_LAYER,
        LM_NAMES | DECODER_NAMES,
        {
            "bias": lm(cross_attention="zeros", head_bias=True, **APART),
            "no bias": lm(
                cross_attention="zeros", bias=False, final_norm_bias=True, activation="relu",
                **APART,
            ),
        },
    ),
    "craft-d": (
        D_LAYER,
        LM_NAMES | {"blocks": "layers", "final_norm": "ln_f", "head": "out_proj"},
        {
            "bias": gpt(head_bias=True, **APART),
            "no bias": gpt(bias=False, norm_bias=True, activation="relu", **APART),
        },
    ),
    "craft-e": (
        ENCODER_LAYER,
        LM_NAMES
        | {"blocks": "transformer_layers", "final_norm": "layer_norm", "head": "output_head"},
        {
            "pre-norm": lm(**SCALED),
            "post-norm": lm(norm_first=False, activation="relu", **SCALED),
            "no bias": lm(bias=False, **SCALED),
        },
    ),
    "craft-f": (
        DECODER_LAYER,
        LM_NAMES | DECODER_NAMES,
        {
            "pre-norm": lm(cross_attention="empty", **SCALED, **APART),
            "post-norm": lm(
                cross_attention="empty", norm_first=False, activation="relu", **SCALED, **APART
            ),
            "no bias": lm(
                cross_attention="empty", bias=False, final_norm_bias=True, **SCALED, **APART
            ),
        },
    ),
}  # fmt: skip
CASES = [(kind, name) for kind, (_, _, models) in KINDS.items() for name in models]


def mapped(kind, known, values):
    """Returns a state dict of arrays: craft_jax's leaves under the names of a kind."""
    layer, around, _ = KINDS[kind]
    has_apart = kind == "craft-d"

    def array(name):
        return values[name].T if name.endswith("kernel") else values[name]

    found = {}
    for name in values:
        first, _, rest = name.partition(".")
        module, _, leaf = name.rpartition(".")
        tail = "bias" if leaf == "bias" else "weight"
        if first in ("blocks", "encoder", "decoder"):
            i, _, part = rest.partition(".")
            stem, block = f"{around[first]}.{i}", part.rpartition(".")[0]
            which = layer if f"{first}.{i}.cross.out.kernel" in values else ENCODER_LAYER
            which = layer if kind in ("torch-decoder", "craft-d") else which
            if block in which:
                found[f"{stem}.{which[block]}.{tail}"] = array(name)
                continue
            attention, _, dense = block.partition(".")
            place = f"{stem}.{which[attention]}"
            if dense == "out":
                found[f"{place}.out_proj.{tail}"] = array(name)
            elif has_apart:
                found[f"{place}.{dense}.{tail}"] = array(name)
            elif dense == "query":
                names = [name.replace("query", each) for each in ("query", "key", "value")]
                found[f"{place}.in_proj_{tail}"] = np.concatenate([array(n) for n in names])
        elif leaf == "constant" and kind == "craft-b":
            found["positional_encoding.pe"] = array(name)[None]
        else:
            found[f"{around[module]}.{tail}"] = array(name)
    twins = {"head": "target_embedding" if known.name == "seq2seq" else "token_embedding"}
    twins = twins if known.tie_embeddings else {}
    twins |= {"source_embedding": "target_embedding"} if known.share_embeddings else {}
    for name, same in twins.items():
        found[f"{around[name]}.weight"] = found[f"{around[same]}.weight"]
    if kind == "craft-b" and known.positions == "learned":
        found["positional_encoding.position_ids"] = np.arange(known.max_seq_len)[None]
    if kind == "torch-decoder" and known.cross_attention == "none":
        for name in [name for name in found if ".self_attn." in name]:
            found[name.replace("self_attn", "multihead_attn")] = np.zeros_like(found[name])
        for i in range(known.num_layers):
            for tail in ("weight", "bias"):
                found[f"decoder.layers.{i}.norm2.{tail}"] = np.ones(known.d_model)
    return found


def values_of(known):
    """Every leaf random, a table of sines too."""
    found = {name: leaf.read().astype(np.float64) for name, leaf in random_leaves(known).items()}
    rng = np.random.default_rng(1)
    return {
        name: 0.5 * rng.standard_normal(array.shape) if name.endswith("constant") else array
        for name, array in found.items()
    }


def built(kind, known):
    """Returns a kind's module in float64, and the values of craft_jax that are in it."""
    model = builders.build(kind, dataclasses.asdict(known)).double().eval()
    values = values_of(known)
    state = {name: torch.tensor(array) for name, array in mapped(kind, known, values).items()}
    model.load_state_dict(state, strict=True)
    return model, values


def inputs_of(known, masks):
    """Returns what craft_jax takes beside tokens, and what a module takes."""
    names = {"mask_BT": "mask"} if masks else {}
    arrays = {"mask_BT": mask(33, 20)} if masks else {}
    if known.name == "seq2seq":
        names |= {"source_BS": "source"} | ({"source_mask_BS": "source_mask"} if masks else {})
        arrays |= {"source_BS": ids(31, seed=1), "source_mask_BS": mask(17, 31, width=31)}
    return (
        {name: arrays[name] for name in names},
        {other: torch.tensor(arrays[name]) for name, other in names.items()},
    )


def ours(known, values, **inputs):
    return reference.logits(known, reference.lazies(values), ids(), **inputs)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_logits(kind, name):
    """With gradients and without, and with padding where a kind takes it."""
    known = KINDS[kind][2][name]
    model, values = built(kind, known)
    tokens = torch.tensor(ids())
    can_pad = kind.startswith("torch") and known.name != "gpt"
    for masks in (False, True) if can_pad else (False,):
        jax_inputs, inputs = inputs_of(known, masks)
        if can_pad and not masks:
            # Masks that are all true: the same in craft_jax, and compiled once.
            whole, _ = inputs_of(known, True)
            jax_inputs = {n: np.ones_like(a) if "mask" in n else a for n, a in whole.items()}
        expected = ours(known, values, **jax_inputs)
        with torch.no_grad():
            assert gap(expected, model(tokens, **inputs)) <= EXACT
        logits = model(tokens, **inputs)
        assert gap(expected, logits) <= EXACT
        assert torch.backends.mha.get_fastpath_enabled()
    logits.square().mean().backward()
    grads = {n: p.grad is not None for n, p in model.named_parameters() if p.requires_grad}
    assert all(grads.values()), grads


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_names_and_shapes(kind, name):
    """On the meta device too, of models with other sizes."""
    known = dataclasses.replace(KINDS[kind][2][name], num_layers=2, d_model=18, num_heads=3)
    with torch.device("meta"):
        model = builders.build(kind, dataclasses.asdict(known))
    values = {leaf: np.zeros(shape.shape) for leaf, shape in leaves_of(known).items()}
    wanted = {n: a.shape for n, a in mapped(kind, known, values).items()}
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == wanted


def test_names_of_crafts_lineages():
    """As they stand in the files of the original, of one layer; sorted."""

    def names(kind, name):
        known = dataclasses.replace(KINDS[kind][2][name], num_layers=1)
        return set(builders.build(kind, dataclasses.asdict(known)).state_dict())

    def both(*modules):
        return {f"{module}.{tail}" for module in modules for tail in ("weight", "bias")}

    def attention(module):
        return {f"{module}.in_proj_weight", f"{module}.in_proj_bias"} | both(f"{module}.out_proj")

    encoder = "transformer_encoder.layers.0"
    b = attention(f"{encoder}.self_attn") | {"embedding.weight"}
    b |= both(*(f"{encoder}.{part}" for part in ("linear1", "linear2", "norm1", "norm2")))
    b |= both("transformer_encoder.norm", "decoder")
    learned = {"position_embeddings.weight", "position_ids"}
    assert names("craft-b", "learned") == b | {f"positional_encoding.{name}" for name in learned}
    assert names("craft-b", "sinusoidal") == b | {"positional_encoding.pe"}

    tables = {"token_embedding.weight", "position_embedding.weight"}
    decoder = "transformer_decoder.layers.0"
    parts = ("linear1", "linear2", "norm1", "norm2", "norm3")
    f = tables | attention(f"{decoder}.self_attn") | attention(f"{decoder}.multihead_attn")
    f |= both(*(f"{decoder}.{part}" for part in parts), "transformer_decoder.norm")
    f |= {"output_layer.weight"}
    assert names("craft-f", "pre-norm") == f
    assert names("craft-c", "bias") == f | {"output_layer.bias"}
    bare = {name for name in f if "bias" not in name} | {"transformer_decoder.norm.bias"}
    assert names("craft-f", "no bias") == bare == names("craft-c", "no bias")

    parts = ("query", "key", "value", "out_proj")
    d = tables | both(*(f"layers.0.self_attn.{part}" for part in parts))
    d |= both("layers.0.ff.fc1", "layers.0.ff.fc2", "layers.0.norm1", "layers.0.norm2")
    d |= both("ln_f", "out_proj")
    assert names("craft-d", "bias") == d

    e = tables | attention("transformer_layers.0.self_attn") | {"output_head.weight"}
    parts = ("linear1", "linear2", "norm1", "norm2")
    e |= both(*(f"transformer_layers.0.{part}" for part in parts), "layer_norm")
    assert names("craft-e", "pre-norm") == e
    assert names("craft-e", "no bias") == {name for name in e if "bias" not in name}


def test_a_mask_appears_in_d():
    """And a fresh model does not take it."""
    known = gpt(head_bias=True, **APART)
    model, _ = built("craft-d", known)
    model(torch.tensor(ids(5)))
    with torch.no_grad():
        model(torch.tensor(ids(9)))
        again = model(torch.tensor(ids(5)))
    state = model.state_dict()
    masks = {name: t for name, t in state.items() if name.endswith("self_attn.causal_mask")}
    assert len(masks) == known.num_layers
    wanted = torch.full((9, 9), -torch.inf).triu(1)
    assert all(torch.equal(t, wanted) for t in masks.values())
    with pytest.raises(RuntimeError, match="causal_mask"):
        builders.build("craft-d", dataclasses.asdict(known)).load_state_dict(state)
    assert torch.isfinite(again).all()


def test_the_sines_of_b_are_those_of_its_files():
    known = KINDS["craft-b"][2]["sinusoidal"]
    table = builders.build("craft-b", dataclasses.asdict(known)).positional_encoding.pe
    assert table.dtype == torch.float32 and table.shape == (1, 33, 48)
    rates = torch.exp(torch.arange(0, 48, 2).float() * (-np.log(10000.0) / 48))
    angles = torch.arange(33, dtype=torch.float32)[:, None] * rates
    assert torch.equal(table[0, :, 0::2], torch.sin(angles))
    assert torch.equal(table[0, :, 1::2], torch.cos(angles))


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_path_is_not_taken(kind, monkeypatch):
    """Submodules are called, with hooks and without."""

    def taken(*args):
        raise AssertionError("fast path")

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", taken)
    monkeypatch.setattr(torch, "_native_multi_head_attention", taken)
    known = next(iter(KINDS[kind][2].values()))
    model, _ = built(kind, known)
    attentions = [m for name, m in model.named_modules() if name.endswith("_attn")]
    with torch.no_grad():
        model(torch.tensor(ids()), **inputs_of(known, False)[1])
        calls = []
        for module in attentions:
            module.register_forward_hook(lambda *_: calls.append(1))
        model(torch.tensor(ids()), **inputs_of(known, False)[1])
    assert len(calls) == len(attentions) > 0


def test_tied_tables_are_one():
    for kind, name, one, other in [
        ("torch-encoder", "pre-norm", "head", "token_embedding"),
        ("torch-decoder", "zeros", "head", "token_embedding"),
        ("torch-transformer", "tied, head bias", "head", "target_embedding"),
        ("torch-transformer", "seq2seq", "source_embedding", "target_embedding"),
        ("craft-e", "pre-norm", "output_head", "token_embedding"),
    ]:
        model, _ = built(kind, KINDS[kind][2][name])
        assert model.get_submodule(one).weight is model.get_submodule(other).weight


@pytest.mark.parametrize(
    ("kind", "known", "words"),
    [
        ("torch-encoder", lm(bias=False, norm_bias=True), "norm_bias=False, not True"),
        ("torch-encoder", lm(cross_attention="zeros"), "cross_attention='none', not 'zeros'"),
        ("torch-encoder", pair(), "num_decoder_layers=0, not 2"),
        ("torch-decoder", lm(norm_first=False), "one more norm in each block"),
        ("torch-transformer", lm(), "cross_attention='source', not 'none'"),
        ("craft-b", lm(), "final_norm|embedding_scale|head_bias"),
        ("craft-d", gpt(head_bias=True), "tie_embeddings=False, not True"),
        ("craft-e", lm(), "embedding_scale=True, not False"),
        ("craft-f", lm(cross_attention="zeros", **SCALED, **APART), "'empty', not 'zeros'"),
    ],
)
def test_specs_that_a_kind_refuses(kind, known, words):
    with pytest.raises(ValueError, match=words):
        builders.build(kind, dataclasses.asdict(known))
