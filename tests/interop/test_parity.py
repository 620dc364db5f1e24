"""float64 on both sides, at full context: the logits, their gradients, and every way to be wrong.

The mutants stand for the mistakes that converters make; each must be seen by the same comparison
that passes the true model.
"""

import jax
import numpy as np
import pytest

from craft_jax import losses
from interop.live import Reference, definition
from interop.targets import TARGETS
from interop.tensors import lazy
from interop.verification import TOLERANCE
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


def tokens(model, seed=0):
    ids = np.random.default_rng(seed).integers(0, model.vocab_size, (2, model.max_seq_len))
    ids[0, 0], ids[1, -1] = 0, model.vocab_size - 1
    return ids


def gap(a, b):
    return float(np.max(np.abs(a - b) / np.maximum(1, np.abs(a))))


@pytest.mark.parametrize(("target", "name"), CASES)
def test_logits(target, name):
    known = spec(**SPECS[name])
    leaves = random_leaves(known)
    ids = tokens(known)
    with torch.no_grad():
        theirs = torch_models.logits(torch_models.build(target, known, leaves), torch.tensor(ids))
    assert theirs.dtype == torch.float64
    assert gap(Reference(known, leaves).logits(ids), theirs.numpy()) <= TOLERANCE


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-12])
@pytest.mark.parametrize("target", ["gpt2", "craft-torch"])
def test_epsilon(target, eps):
    known = spec(norm_eps=eps, num_layers=1)
    # Small activations, where an epsilon matters.
    leaves = {n: lazy(1e-4 * t.read()) for n, t in random_leaves(known).items()}
    ids = tokens(known)
    reference = Reference(known, leaves).logits(ids)
    for other in (1e-5, 1e-6, 1e-12):
        model = torch_models.build(target, spec(norm_eps=other, num_layers=1), leaves)
        with torch.no_grad():
            theirs = torch_models.logits(model, torch.tensor(ids)).numpy()
        # Logits are tiny here: compare them in their own size.
        scale = np.max(np.abs(reference))
        same = np.max(np.abs(reference - theirs)) <= TOLERANCE * scale
        assert same == (other == eps)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients(target, bias):
    known = spec(d_ff=192, bias=bias, num_layers=2)
    leaves = random_leaves(known)
    ids, targets = tokens(known), tokens(known, 1)
    model = torch_models.build(target, known, leaves)
    found = torch_models.logits(model, torch.tensor(ids))
    loss = torch.nn.functional.cross_entropy(found.flatten(0, 1), torch.tensor(targets).flatten())
    loss.backward()
    shared = dict(model.named_parameters(remove_duplicate=False))
    theirs = {}
    for one in torch_models.rules(target, known).rules:
        if one.sources:
            grads = tuple(shared[name].grad.numpy() for name in one.targets)
            shapes = tuple(leaves[name] for name in one.sources)
            theirs |= dict(zip(one.sources, one.chain.inverse(grads, shapes), strict=True))
    with jax.enable_x64(True):
        params = {n: jax.numpy.asarray(t.read().astype(np.float64)) for n, t in leaves.items()}
        model_def = definition(known)

        def mean_loss(params):
            logits = model_def.merge(params)(jax.numpy.asarray(ids))[0]
            sums = losses.cross_entropy(logits, jax.numpy.asarray(targets))
            return sums.loss / sums.weight

        ours = jax.grad(mean_loss)(params)
        assert abs(float(mean_loss(params)) - loss.item()) < 1e-12
    assert set(ours) == set(theirs)
    worst = max(float(np.max(np.abs(np.asarray(ours[n]) - theirs[n]))) for n in ours)
    assert worst <= 1e-9


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
    *((target, name) for target, changes in CONFIGS.items() for name in changes),
]


@pytest.fixture(scope="module")
def truth():
    known = spec(d_ff=192)
    leaves = random_leaves(known)
    return known, leaves, Reference(known, leaves).logits(tokens(known))


@pytest.mark.parametrize(("target", "mutant"), MUTANTS)
def test_every_mutant_is_caught(truth, target, mutant):
    known, leaves, reference = truth
    weights = CRAFT_WEIGHTS if target == "craft-torch" else WEIGHTS
    if mutant in weights:
        model = torch_models.build(target, known, leaves)
        made = torch_models.forward(target, known, leaves)
        true = {n: np.ascontiguousarray(t.read()) for n, t in made.items()}
        changed = weights[mutant](true)
        assert any(not np.array_equal(true[n], changed[n]) for n in true)
        model.load_state_dict(
            {n: torch.tensor(a).double() for n, a in changed.items()},
            strict=target != "gpt2",
        )
    else:
        model = torch_models.build(target, known, leaves, **CONFIGS[target][mutant])
    with torch.no_grad():
        theirs = torch_models.logits(model, torch.tensor(tokens(known))).numpy()
    assert gap(reference, theirs) > 1e3 * TOLERANCE
