"""float64 on both sides, at full context: the logits, their gradients, and every way to be wrong.

The mutants stand for the mistakes that converters make; each must be seen by the same comparison
that passes the true model.
"""

import functools

import jax
import numpy as np
import pytest

from craft_jax.models import losses
from interop.commands.verify import TOLERANCE
from interop.mapping.tensors import lazy
from interop.sources.live import Reference, definition
from interop.targets.registry import TARGETS
from tests.interop.models import SPECS, random_leaves, spec

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from tests.interop import torch_models  # noqa: E402

pytestmark = pytest.mark.torch

CASES = [
    (target, name)
    for name, changes in SPECS.items()
    for target in TARGETS
    if TARGETS[target].answer(spec(**changes)).exact
]


# A row for each architecture; the layouts that a row adds have no gradients of their own.
GRADIENTS = [
    (target, name)
    for target, name in CASES
    if name
    in (
        "nanogpt",
        "nanogpt, no bias",
        "craft d",
        "craft e",
        "craft e, post-norm, relu",
        "craft f",
        "craft c",
        "craft b",
        "seq2seq",
        "seq2seq, post-norm, no bias, all apart",
    )
]


def tokens(model, seed=0):
    ids = np.random.default_rng(seed).integers(0, model.vocab_size, (2, model.max_seq_len))
    ids[0, 0], ids[1, -1] = 0, model.vocab_size - 1
    return ids


def inputs(model):
    """What a model reads: two rows at full context and, for an encoder, a padded source."""
    found = {"tokens": tokens(model)}
    if model.num_decoder_layers:
        mask = np.ones((2, model.max_seq_len), bool)
        mask[1, 20:] = False
        found |= {"source": tokens(model, 2), "source_mask": mask}
    return found


def gap(a, b):
    return float(np.max(np.abs(a - b) / np.maximum(1, np.abs(a))))


@functools.cache
def reference(name):
    """The leaves of a spec, and what craft_jax makes of them: the same for every target."""
    known = spec(**SPECS[name])
    leaves = random_leaves(known)
    return leaves, Reference(known, leaves).logits(inputs(known))


@pytest.mark.parametrize(("target", "name"), CASES)
def test_logits(target, name):
    known = spec(**SPECS[name])
    leaves, ours = reference(name)
    model = torch_models.build(target, known, leaves)
    with torch.no_grad():
        theirs = torch_models.logits(model, inputs(known))
    assert theirs.dtype == torch.float64
    assert gap(ours, theirs.numpy()) <= TOLERANCE


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-12])
@pytest.mark.parametrize("target", ["gpt2", "craft-torch"])
def test_epsilon(target, eps):
    known = spec(norm_eps=eps, num_layers=1)
    # Small activations, where an epsilon matters.
    leaves = {n: lazy(1e-4 * t.read()) for n, t in random_leaves(known).items()}
    ids = tokens(known)
    reference = Reference(known, leaves).logits({"tokens": ids})
    for other in (1e-5, 1e-6, 1e-12):
        model = torch_models.build(target, spec(norm_eps=other, num_layers=1), leaves)
        with torch.no_grad():
            theirs = torch_models.logits(model, ids).numpy()
        # Logits are tiny here: compare them in their own size.
        scale = np.max(np.abs(reference))
        same = np.max(np.abs(reference - theirs)) <= TOLERANCE * scale
        assert same == (other == eps)


@functools.cache
def our_gradients(name):
    """The loss of a spec, and its gradient with respect to every leaf."""
    known = spec(**SPECS[name])
    leaves, _ = reference(name)
    with jax.enable_x64(True):
        params = {n: jax.numpy.asarray(t.read().astype(np.float64)) for n, t in leaves.items()}
        model_def = definition(known)
        given, targets = inputs(known), jax.numpy.asarray(tokens(known, 1))

        def mean_loss(params):
            logits = Reference._apply(model_def.merge(params), given)
            sums = losses.cross_entropy(logits, targets)
            return sums.loss / sums.weight

        loss, grads = jax.jit(jax.value_and_grad(mean_loss))(params)
        return float(loss), {n: np.asarray(g) for n, g in grads.items()}


@pytest.mark.parametrize(("target", "name"), GRADIENTS)
def test_gradients(target, name):
    known = spec(**SPECS[name])
    leaves, _ = reference(name)
    model = torch_models.build(target, known, leaves)
    found = torch_models.logits(model, inputs(known)).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(found, torch.tensor(tokens(known, 1)).flatten())
    loss.backward()
    shared = dict(model.named_parameters(remove_duplicate=False))
    our_loss, ours = our_gradients(name)
    assert abs(our_loss - loss.item()) < 1e-12
    compared = 0
    for one in torch_models.rules(target, known).rules:
        # Buffers and tables that never train have no gradient on either side.
        there = [shared.get(tensor) for tensor in one.targets]
        if not one.sources or not all(p is not None and p.requires_grad for p in there):
            continue
        if "constant" in one.sources[0]:
            continue
        grads = tuple((torch.zeros_like(p) if p.grad is None else p.grad).numpy() for p in there)
        shapes = tuple(leaves[leaf] for leaf in one.sources)
        theirs = one.chain.inverse(grads, shapes)
        for leaf, grad in zip(one.sources, theirs, strict=True):
            assert np.max(np.abs(ours[leaf] - grad)) <= 1e-9, leaf
            compared += 1
    assert compared >= len(ours) - sum("constant" in leaf for leaf in ours)


# Mutants.


def swap(a, b):
    return lambda found: found | {a: found[b], b: found[a]}


def turn(name):
    def change(found):
        return found | {name: found[name].T.copy()}

    return change


def drop(name):
    return lambda found: found | {name: np.zeros_like(found[name])}


def rolled(suffix):
    """Moves what a layer has to the next one."""

    def change(found):
        names = [name for name in found if name.endswith(suffix)]
        values = [found[name] for name in names]
        return found | dict(zip(names, [values[-1], *values[:-1]], strict=True))

    return change


def swap_qk(found):
    name = next(n for n in found if n.endswith("h.1.attn.c_attn.weight"))
    axis = 1 if found[name].shape[0] < found[name].shape[1] else 0
    q, k, v = np.split(found[name], 3, axis)
    return found | {name: np.concatenate([k, q, v], axis)}


def interleaved(found):
    """q, k and v head by head, as GPT-NeoX has them."""
    name = next(n for n in found if n.endswith("h.1.attn.c_attn.weight"))
    array = found[name] if found[name].shape[0] > found[name].shape[1] else found[name].T
    mixed = array.reshape(3, 6, 8, 48).transpose(1, 0, 2, 3).reshape(144, 48)
    return found | {name: mixed if found[name].shape == mixed.shape else mixed.T.copy()}


H = "transformer.h.1."
WEIGHTS = {
    "a square turned": turn(f"{H}attn.c_proj.weight"),
    "norms swapped": swap(f"{H}ln_1.weight", f"{H}ln_2.weight"),
    "norm biases swapped": swap(f"{H}ln_1.bias", f"{H}ln_2.bias"),
    "query and key swapped": swap_qk,
    "heads interleaved": interleaved,
    "bias of a norm lost": drop("transformer.ln_f.bias"),
    "bias of attention lost": drop(f"{H}attn.c_proj.bias"),
    "bias of the MLP lost": drop(f"{H}mlp.c_fc.bias"),
    "bias of q, k and v lost": drop(f"{H}attn.c_attn.bias"),
    "layers off by one": rolled("mlp.c_proj.weight"),
    "norms off by one": rolled("ln_2.weight"),
    "attention off by one": rolled("attn.c_attn.weight"),
    "token rows shifted": lambda f: (
        f | {n: np.roll(f[n], 1, 0) for n in f if n in ("transformer.wte.weight", "lm_head.weight")}
    ),
    "positions shifted": lambda f: (
        f | {"transformer.wpe.weight": np.roll(f["transformer.wpe.weight"], 1, 0)}
    ),
}
STACK_WEIGHTS = {
    "a square turned": turn("encoder.layers.1.self_attn.out_proj.weight"),
    "norms swapped": swap("encoder.layers.1.norm1.weight", "encoder.layers.1.norm2.weight"),
    "query and key swapped": lambda f: (
        f | {_IN: np.roll(f[_IN].reshape(3, 48, 48), 1, 0).reshape(144, 48)}
    ),
    "bias of the MLP lost": drop("encoder.layers.1.linear1.bias"),
    "layers off by one": rolled("linear2.weight"),
    "positions shifted": lambda f: (
        f | {"position_embedding.weight": np.roll(f["position_embedding.weight"], 1, 0)}
    ),
}
_IN = "encoder.layers.1.self_attn.in_proj_weight"
CONFIGS = {
    "gpt2": {
        "tanh for erf": {"activation_function": "gelu_new"},
        "eps": {"layer_norm_epsilon": 1e-6},
        "heads": {"n_head": 8},
        "no scale": {"scale_attn_weights": False},
        "scale by layer": {"scale_attn_by_inverse_layer_idx": True},
    },
    "craft-torch": {
        "tanh for erf": {"activation": "gelu_tanh"},
        "eps": {"norm_eps": 1e-6},
        "heads": {"num_heads": 8},
    },
    "nanogpt": {"heads": {"n_head": 8}},
    "biogpt": {
        "tanh for erf": {"hidden_act": "gelu_new"},
        "heads": {"num_attention_heads": 8},
        "scaled": {"scale_embedding": True},
    },
    "opt": {
        "tanh for erf": {"activation_function": "gelu_new"},
        "heads": {"num_attention_heads": 8},
    },
    "torch-encoder": {
        "tanh for erf": {"activation": "gelu_tanh"},
        "eps": {"norm_eps": 1e-6},
        "heads": {"num_heads": 8},
        "norms after the sums": {"norm_first": False},
        "scaled": {"embedding_scale": True},
    },
}
CRAFT_WEIGHTS = {
    "a square turned": turn("blocks.1.attn.out.kernel"),
    "query turned": turn("blocks.1.attn.query.kernel"),
    "norms swapped": swap("blocks.1.attn_norm.scale", "blocks.1.mlp_norm.scale"),
    "query and key swapped": swap("blocks.1.attn.query.kernel", "blocks.1.attn.key.kernel"),
    "bias of the MLP lost": drop("blocks.1.mlp.up.bias"),
    "layers off by one": rolled("mlp.down.kernel"),
}
MUTANTS = [
    *((target, name) for target in ("gpt2", "nanogpt") for name in WEIGHTS),
    *(("craft-torch", name) for name in CRAFT_WEIGHTS),
    *(("torch-encoder", name) for name in STACK_WEIGHTS),
    *((target, name) for target, changes in CONFIGS.items() for name in changes),
]


@pytest.fixture(scope="module")
def truth():
    known = spec(d_ff=192)
    leaves = random_leaves(known)
    return known, leaves, Reference(known, leaves).logits(inputs(known))


@pytest.mark.parametrize(("target", "mutant"), MUTANTS)
def test_every_mutant_is_caught(truth, target, mutant):
    known, leaves, reference = truth
    weights = {"craft-torch": CRAFT_WEIGHTS, "torch-encoder": STACK_WEIGHTS}.get(target, WEIGHTS)
    if mutant in weights:
        model = torch_models.build(target, known, leaves)
        made = torch_models.forward(target, known, leaves)
        true = {n: np.ascontiguousarray(t.read()) for n, t in made.items()}
        changed = weights[mutant](true)
        assert any(not np.array_equal(true[n], changed[n]) for n in true)
        model.load_state_dict(
            {n: torch.tensor(a).double() for n, a in changed.items()},
            strict=target not in ("gpt2", "biogpt", "opt"),
        )
    else:
        model = torch_models.build(target, known, leaves, **CONFIGS[target][mutant])
    with torch.no_grad():
        theirs = torch_models.logits(model, tokens(known)).numpy()
    assert gap(reference, theirs) > 1e3 * TOLERANCE
