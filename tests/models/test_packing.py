"""Packed documents: each is computed as if it stood alone, whatever shares its row."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from craft_jax.models import base, layers
from craft_jax.models.base import LanguageModel
from craft_jax.models.gpt import GPT, GPTConfig
from craft_jax.models.layers import Embedding
from craft_jax.models.transformer import TransformerConfig, TransformerLM
from craft_jax.parallel import sharding
from craft_jax.parallel.sharding import ParallelConfig
from craft_jax.training import optim
from craft_jax.training import state as states
from craft_jax.training.optim import OptimConfig
from craft_jax.training.precision import Policy
from craft_jax.training.step import make_train_step

# A block of attention has 128 queries: the second document of 70 lies across its end.
ROWS = [[70, 7, 70], [7, 70, 7, 7], []]
T, VOCABULARY = 150, 13
SIZES = {"vocab_size": VOCABULARY, "num_layers": 2, "num_heads": 3, "d_model": 24}
MODELS = {
    "gpt": (GPT, GPTConfig(**SIZES, max_seq_len=T)),
    "learned": (TransformerLM, TransformerConfig(**SIZES, max_seq_len=T)),
    "sinusoidal": (
        TransformerLM,
        TransformerConfig(
            **SIZES,
            max_seq_len=T,
            positions="sinusoidal",
            norm_first=False,
            cross_attention="zeros",
        ),
    ),
}


def packed(rows=ROWS, width=T, vocabulary=VOCABULARY, seed=0):
    """A batch whose rows hold documents of these lengths, then padding."""
    rng = np.random.default_rng(seed)
    shape = (len(rows), width)
    batch = {n: rng.integers(0, vocabulary, shape, np.int32) for n in ("tokens", "targets")}
    batch |= {n: np.zeros(shape, np.int32) for n in ("segments", "positions")}
    batch["weights"] = np.zeros(shape, np.float32)
    for row, place, number in places(rows):
        batch["segments"][row, place] = number
        batch["positions"][row, place] = np.arange(place.stop - place.start)
        batch["weights"][row, place] = rng.integers(0, 2, place.stop - place.start)
    return batch


def places(rows=ROWS):
    """Row, slice and number of each document."""
    for row, lengths in enumerate(rows):
        ends = np.cumsum(lengths, dtype=int)
        for number, (end, length) in enumerate(zip(ends, lengths, strict=True), 1):
            yield row, slice(int(end) - length, int(end)), number


def alone(batch, row, place):
    """The batch of one document and nothing else."""
    return {n: batch[n][row : row + 1, place] for n in ("tokens", "targets", "weights")}


def make(name, dtype="float32", **changes):
    """The definition of a model, and parameters of which none is at its initial value."""
    cls, config = MODELS[name]
    definition = base.define(cls, dataclasses.replace(config, **changes))
    rng = np.random.default_rng(1)
    drawn = base.init_params(cls, definition.config, jax.random.key(0))
    return definition, {
        path: jnp.asarray(
            value
            if path.endswith("constant")
            else value
            + jnp.asarray(0.3 * rng.standard_normal(value.shape, np.float32), value.dtype),
            dtype,
        )
        for path, value in drawn.items()
    }


def logits_of(definition):
    """A jitted function of parameters and a batch."""

    @jax.jit
    def logits(params, batch):
        model = definition.merge(params)
        packing = {f"{n}_BT": batch[n] for n in ("segments", "positions") if n in batch}
        return model.logits(model.hidden(batch["tokens"], **packing)[0])

    return logits


# --- models ------------------------------------------------------------------------------------


TOLERANCES = {"float32": 1e-5, "float64": 1e-12}
BY_DEFAULT = {
    ("gpt", False, "float64"),
    ("learned", True, "float64"),
    ("sinusoidal", False, "float32"),
}


@pytest.mark.parametrize(
    ("name", "bias", "dtype"),
    [
        pytest.param(*cell, marks=() if cell in BY_DEFAULT else pytest.mark.soak)
        for cell in itertools.product(MODELS, (True, False), TOLERANCES)
    ],
)
def test_a_packed_document_has_the_logits_it_has_alone(name, bias, dtype):
    """Relative to the largest logit; measured 1e-6 in float32, 2e-15 in float64."""
    with jax.enable_x64(dtype == "float64"):
        definition, params = make(name, dtype, bias=bias)
        logits, batch = logits_of(definition), packed()
        together = np.asarray(logits(params, batch))
        assert together.dtype == dtype and np.isfinite(together).all()
        apart = np.asarray(logits(params, {"tokens": batch["tokens"]}))
        for row, place, number in places():
            expected = np.asarray(logits(params, alone(batch, row, place)))[0]
            scale = np.abs(expected).max()
            assert np.abs(together[row, place] - expected).max() <= TOLERANCES[dtype] * scale
            if number > 1:
                assert np.abs(apart[row, place] - expected).max() > 0.01 * scale


@pytest.mark.parametrize("name", MODELS)
def test_no_gradient_passes_between_documents(name):
    """That of one document's logits with respect to the embeddings of all tokens in its row."""
    rows, width = [[70, 7, 65]], 145
    definition, params = make(name, vocab_size=width, tie_embeddings=False)
    batch = packed(rows, width) | {"tokens": np.arange(width, dtype=np.int32)[None]}
    logits = logits_of(definition)

    @jax.jit
    def influence(params, is_chosen_T):
        """The embeddings are the rows of the table, since no token comes twice."""

        def chosen(table_VD):
            logits_TV = logits(params | {"token_embedding.embedding": table_VD}, batch)[0]
            return jnp.sum(jnp.where(is_chosen_T[:, None], logits_TV**2, 0))

        return jnp.abs(jax.grad(chosen)(params["token_embedding.embedding"])).max(axis=-1)

    for _, place, _ in places(rows):
        is_own_T = np.isin(np.arange(width), np.arange(width)[place])
        influence_T = np.asarray(influence(params, is_own_T))
        assert (influence_T[is_own_T] > 0).all()
        assert (influence_T[~is_own_T] == 0).all()


@pytest.mark.parametrize(
    "name", ["gpt", pytest.param("learned", marks=pytest.mark.soak), "sinusoidal"]
)
def test_the_loss_of_a_packed_batch_is_the_sum_of_those_of_its_documents(x64, name):
    definition, params = make(name, "float64")

    @jax.jit
    def sums_and_gradients(params, batch):
        def loss(params):
            sums = definition.merge(params).loss(batch)
            return sums.loss, sums

        return jax.value_and_grad(loss, has_aux=True)(params)

    batch = packed()
    (_, sums), grads = sums_and_gradients(params, batch)
    each = [sums_and_gradients(params, alone(batch, row, place)) for row, place, _ in places()]
    total, total_grads = jax.tree.map(lambda *x: sum(x), *[(s, g) for (_, s), g in each])
    assert sums.weight == total.weight > 100 and sums.correct == total.correct
    np.testing.assert_allclose(sums.loss, total.loss, rtol=1e-13)
    for path, grad in grads.items():
        np.testing.assert_allclose(grad, total_grads[path], rtol=0, atol=1e-11, err_msg=path)


@pytest.mark.parametrize("name", ["gpt", pytest.param("learned", marks=pytest.mark.soak)])
def test_remat_changes_nothing(name):
    definition, params = make(name, dropout=0.3)
    batch, key = packed(), jax.random.key(3, impl="rbg")

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(params, remat):
        return jax.grad(lambda p: definition.merge(p).loss(batch, key=key, remat=remat).loss)(
            params
        )

    plain, again = (gradients(params, remat) for remat in (False, True))
    for path, value in plain.items():
        np.testing.assert_allclose(
            again[path], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=path
        )


@pytest.mark.parametrize("name", ["gpt", "learned"])
def test_a_batch_of_padding_is_harmless(name):
    definition, params = make(name)
    batch = packed([[], []], 8)

    def loss(params):
        return definition.merge(params).loss(batch).loss

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert value == 0 and not any(np.any(grad) for grad in grads.values())


def test_a_mask_hides_tokens_of_a_packed_document_too():
    definition, params = make("learned")
    model, batch = definition.merge(params), packed([[4, 5]], 9)
    mask_BT = np.ones((1, 9), bool)
    mask_BT[0, 4:6] = False
    packing = {"segments_BT": batch["segments"], "positions_BT": batch["positions"]}
    x_BTD, _ = model.hidden(batch["tokens"], mask_BT=mask_BT, **packing)
    first, _ = model.hidden(batch["tokens"][:, :4])
    second, _ = model.hidden(batch["tokens"][:, 4:], mask_BT=mask_BT[:, 4:])
    np.testing.assert_allclose(x_BTD[:, :4], first, atol=2e-5)
    np.testing.assert_allclose(x_BTD[:, 6:], second[:, 2:], atol=2e-5)


@pytest.mark.parametrize("given", ["segments", "positions"])
@pytest.mark.parametrize("name", ["gpt", "learned"])
def test_a_cache_refuses_packed_documents(name, given):
    definition, params = make(name)
    model, batch = definition.merge(params), packed([[3]], 3)
    cache = model.init_cache(1, 8, jnp.float32)
    with pytest.raises(ValueError, match="a cache holds no packed documents"):
        model.hidden(batch["tokens"], cache, **{f"{given}_BT": batch[given]})


class Unpacked(LanguageModel):
    """A model of a user's own that has not heard of packed documents."""

    def __init__(self, config, *, rngs):
        self.embedding = Embedding(VOCABULARY, 4, rngs=rngs)

    def init_cache(self, batch_size, max_len, dtype): ...

    def hidden(self, tokens_BT, cache=None, *, key=None, remat=False):
        return self.embedding(tokens_BT), cache

    def logits(self, x_BTD):
        return self.embedding.attend(x_BTD)


def test_a_model_need_not_know_packed_documents():
    model, batch = Unpacked(None, rngs=nnx.Rngs(0)), packed()
    assert model.loss(alone(batch, 0, slice(0, 9))).loss > 0
    with pytest.raises(TypeError, match="segments_BT"):
        model.loss(batch)


@functools.cache
def losses_of(parallel, num_devices, accumulate):
    """Losses and norms of the gradients of a few steps on packed rows."""
    rows = [[5, 3], [8], [1, 1, 6], [2, 4], [7, 1], [4, 4], [3, 5], [6]]
    config = GPTConfig(**SIZES | {"num_heads": 2, "vocab_size": 16}, max_seq_len=8)
    mesh = sharding.make_mesh(parallel, jax.devices()[:num_devices])
    optimizer = optim.make_optimizer(OptimConfig())
    state = states.init_state(GPT, config, optimizer, seed=0, mesh=mesh)
    train_step = make_train_step(
        base.define(GPT, config),
        optimizer,
        optim.make_schedule(OptimConfig(), 100),
        Policy.named("float32"),
        seed=0,
        accumulate=accumulate,
        axis_name=sharding.AXIS_NAME if parallel.mode == "pmap" else None,
    )
    step, losses = sharding.compile_step(train_step, mesh, parallel.mode), []
    for seed in range(5):
        batch = packed(rows, 8, 16, seed)
        state, metrics = step(state, sharding.put_batch(batch, mesh, parallel.mode))
        losses += [float(metrics["loss"]), float(metrics["grad_norm"])]
    return losses


@pytest.mark.parametrize(
    ("parallel", "accumulate"),
    [
        # Its axis is one of those of the next mesh.
        pytest.param(ParallelConfig(), 1, marks=pytest.mark.soak),
        (ParallelConfig(data=2, fsdp=2, tensor=2), 2),
        (ParallelConfig(mode="pmap"), 1),
    ],
    ids=str,
)
def test_many_devices_give_the_losses_of_one(parallel, accumulate):
    """A mesh with an axis for the batch, for parameters and for heads; one with pmap."""
    with jax.numpy_dtype_promotion("standard"):  # The optimizer needs it.
        expected, got = losses_of(ParallelConfig(), 1, 1), losses_of(parallel, 8, accumulate)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


# --- attention ---------------------------------------------------------------------------------


CASES = {
    "one token": dict(T=1),
    "one head": dict(T=131, H=1, N=1),
    "ragged blocks": dict(T=263),
    "many blocks": dict(B=1, T=1031, H=2, N=2, K=4),
    "grouped query": dict(T=139, H=6, N=2),
    "multi query": dict(T=13, N=1),
}


def qkv(dtype="float32", B=2, T=13, H=4, N=4, K=8):
    rng = np.random.default_rng(0)
    shapes = [(B, T, H, K), (B, T, N, K), (B, T, N, K)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def random_segments(B, T):
    """Documents of some 20 tokens, with padding behind; no two rows alike."""
    rng = np.random.default_rng(1)
    segments_BT = 1 + np.cumsum(rng.random((B, T)) < 0.05, axis=1)
    segments_BT[:, T - T // 9 :] = 0
    return jnp.asarray(segments_BT, jnp.int32)


def value_and_gradients(f, *args):
    """f(*args) and its gradients under a fixed random cotangent, jitted."""

    def weighted(*args):
        y = f(*args)
        ct = np.random.default_rng(99).standard_normal(y.shape)
        return jnp.sum(y * jnp.asarray(ct, y.dtype)), y

    grads, y = jax.jit(jax.grad(weighted, argnums=tuple(range(len(args))), has_aux=True))(*args)
    return [np.asarray(x, np.float64) for x in (y, *grads)]


# Every case in one dtype and with one rate, and in turn with the others. Without segments all of
# them are in test_layers.py.
@pytest.mark.parametrize(
    ("dtype", "tolerance", "case", "rate"),
    [
        pytest.param(dtype, tolerance, case, rate, marks=() if is_default else pytest.mark.soak)
        for number, case in enumerate(CASES)
        for rate in (0.0, 0.3)
        for dtype, tolerance in (("float32", 1e-5), ("float64", 1e-13))
        for is_default in [
            (rate > 0, dtype == "float64") == (number % 2 == 1, number // 2 % 2 == 0)
        ]
    ],
)
def test_fast_attention_equals_reference(case, rate, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        args = qkv(dtype, **CASES[case])
        options = {
            "segments_BT": random_segments(*args[0].shape[:2]),
            "dropout_rate": rate,
            "key": jax.random.key(0, impl="rbg"),
        }
        results = [
            value_and_gradients(functools.partial(f, **options), *args)
            for f in (layers.causal_attention, layers.reference_attention)
        ]
    for fast, reference in zip(*results, strict=True):
        assert np.abs(fast - reference).max() <= tolerance * max(1.0, np.abs(reference).max())


def test_reference_attention_is_that_of_each_segment_alone(x64):
    """Where the segments lie in pieces too."""
    q, k, v = qkv("float64", T=12)
    segments_BT = jnp.array([[1] * 4 + [2] * 4 + [0] * 4, [1, 2, 0] * 4], jnp.int32)
    y = layers.reference_attention(q, k, v, segments_BT=segments_BT)
    for row in range(2):
        for segment in range(3):
            (place,) = np.nonzero(segments_BT[row] == segment)
            parts = (x[row : row + 1, place] for x in (q, k, v))
            expected = layers.causal_attention(*parts)[0]
            np.testing.assert_allclose(y[row, place], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_half_precision_attention(monkeypatch, backend):
    """What an accelerator would be given too, although it runs on the CPU here."""
    half, wide = qkv("bfloat16", T=139, N=2), qkv("float32", T=139, N=2)
    options = {"segments_BT": random_segments(2, 139)}
    exact = value_and_gradients(functools.partial(layers.reference_attention, **options), *wide)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention needs it.
        fast = value_and_gradients(functools.partial(layers.causal_attention, **options), *half)
    for x, y in zip(fast, exact, strict=True):
        assert np.abs(x - y).max() <= 0.03 * max(1.0, np.abs(y).max())


def test_segments_are_compared_block_by_block_and_only_where_there_are_any():
    """No array of B x T x T is made of them, and a program without them has no trace of them."""
    q, k, v = qkv(T=263)

    def compared(**options):
        def loss(q, k, v):
            return jnp.sum(layers.causal_attention(q, k, v, **options))

        jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, v).jaxpr
        return [e.outvars[0].aval.shape for e in equations(jaxpr) if e.primitive.name == "eq"]

    blocks = [(2, 128, 128), (2, 128, 256), (2, 7, 263)]
    assert compared(segments_BT=random_segments(2, 263)) == blocks
    assert compared() == []


def equations(jaxpr):
    """All equations of a jaxpr, nested functions included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for sub in value if isinstance(value, (tuple, list)) else [value]:
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    yield from equations(sub)
