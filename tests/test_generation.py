import jax
import jax.numpy as jnp
import numpy as np
import pytest

from craft_jax import generation
from craft_jax.errors import UsageError
from craft_jax.generation import Generator, SamplingConfig, choose
from craft_jax.models import base
from craft_jax.models.gpt import GPT, GPTConfig

V = 23
CONFIG = GPTConfig(vocab_size=V, num_layers=2, num_heads=2, d_model=32, max_seq_len=24)
GREEDY = SamplingConfig(temperature=0.0)


@pytest.fixture(scope="module")
def params():
    drawn = jax.jit(lambda k: base.init_params(GPT, CONFIG, k))(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(drawn))
    # Large enough that the most likely token depends on the whole context.
    return {
        path: value + 0.2 * jax.random.normal(key, value.shape)
        for key, (path, value) in zip(keys, drawn.items(), strict=True)
    }


@pytest.fixture(scope="module")
def generator():
    return Generator(base.define(GPT, CONFIG), max_len=24, vocab_size=V, end_id=None)


def by_full_forward(params, prompt, count, vocab_size=V):
    """Greedy decoding without a cache: the definition."""
    logits = jax.jit(lambda p, t: base.define(GPT, CONFIG).merge(p)(t)[0])
    text = list(prompt)
    for _ in range(count):
        context = text if len(text) <= 24 else None
        assert context is not None
        padded = np.zeros((1, 24), np.int32)
        padded[0, : len(context)] = context
        text.append(int(logits(params, padded)[0, len(context) - 1, :vocab_size].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("length", [1, 5, 23, 24])
def test_greedy_with_cache_equals_full_forward_up_to_the_context(params, generator, length):
    prompt = np.random.default_rng(length).integers(0, V, length).tolist()
    count = 24 - length + 1
    got = generator.generate(params, [prompt], max_new_tokens=count, config=GREEDY)
    assert got == [by_full_forward(params, prompt, count)]


@pytest.mark.parametrize("config", [GREEDY, SamplingConfig(temperature=1.3, top_k=9)])
def test_rows_of_different_length_equal_one_by_one(params, generator, config):
    prompts = [[1], [2, 3, 4, 5, 6, 7, 8], [9] * 20]
    options = {"max_new_tokens": 30, "config": config, "seed": 5}
    together = generator.generate(params, prompts, **options)
    alone = [generator.generate(params, [prompt], **options)[0] for prompt in prompts]
    assert together == alone
    assert [len(row) for row in together] == [30] * 3


def test_past_the_context_it_goes_on_from_the_last_half(params, generator):
    prompt, notes = [3] * 10, []
    got = generator.generate(
        params, [prompt], max_new_tokens=40, config=GREEDY, on_refill=notes.append
    )[0]
    text = prompt + by_full_forward(params, prompt, 15)
    while len(text) < 50:
        text += by_full_forward(params, text[-12:], 13)
    assert prompt + got == text[:50]
    assert notes == [12, 12]


def test_seeds_and_samples(params, generator):
    config = SamplingConfig(temperature=1.0)

    def sample(seed, index):
        return generator.generate(
            params, [[1]] * len(index), max_new_tokens=12, config=config, seed=seed,
            sample_index=index,
        )  # fmt: skip

    first = sample(0, [0, 1, 2])
    assert first == sample(0, [0, 1, 2])
    assert first[2:] == sample(0, [2])
    assert len({tuple(row) for row in first}) == 3
    assert first != sample(1, [0, 1, 2])


def test_a_row_ends_at_its_end_token(params):
    generator = Generator(base.define(GPT, CONFIG), max_len=24, vocab_size=V, end_id=None)
    free = generator.generate(params, [[1], [2]], max_new_tokens=20, config=GREEDY)
    end = free[0][6]
    ending = Generator(base.define(GPT, CONFIG), max_len=24, vocab_size=V, end_id=end)
    got = ending.generate(params, [[1], [2]], max_new_tokens=20, config=GREEDY)
    for ended, whole in zip(got, free, strict=True):
        assert ended == whole[: whole.index(end)] if end in whole else ended == whole


def test_padding_rows_of_the_vocabulary_are_never_chosen(params):
    narrow = Generator(base.define(GPT, CONFIG), max_len=24, vocab_size=5, end_id=None)
    got = narrow.generate(params, [[1]], max_new_tokens=20, config=SamplingConfig(temperature=50.0))
    assert max(got[0]) < 5
    greedy = narrow.generate(params, [[1]], max_new_tokens=9, config=GREEDY)[0]
    assert greedy == by_full_forward(params, [1], 9, vocab_size=5)


def test_from_a_model(params):
    model = base.define(GPT, CONFIG).merge(params)
    got = generation.generate(model, [[1, 2], [1, 2]], max_new_tokens=8)
    assert [len(row) for row in got] == [8, 8]
    assert got[0] != got[1]
    assert generation.generate(model, [[1]], max_new_tokens=0) == [[]]


@pytest.mark.parametrize("prompt", [[], [0] * 25])
def test_prompts_that_do_not_fit(params, generator, prompt):
    with pytest.raises(UsageError, match=f"{len(prompt)} tokens; this model takes 1 to 24"):
        generator.generate(params, [prompt], max_new_tokens=1, config=GREEDY)


# How a token is chosen.


def chosen(logits, config, seen=(), draws=400):
    """The tokens that are chosen over many keys."""
    logits_BV = jnp.tile(jnp.asarray(logits, jnp.float32)[None, :], (draws, 1))
    seen_BV = jnp.tile(jnp.isin(jnp.arange(len(logits)), jnp.array(seen))[None, :], (draws, 1))
    keys = jax.random.split(jax.random.key(0), draws)
    return np.asarray(jax.jit(choose, static_argnums=3)(logits_BV, seen_BV, keys, config))


LOGITS = np.log([0.5, 0.25, 0.15, 0.07, 0.03])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 0.0}, {0}),
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_p": 0.4}, {0}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.76}, {0, 1, 2}),
        ({"min_p": 0.4}, {0, 1}),
        ({"min_p": 0.1}, {0, 1, 2, 3}),
        ({"top_k": 4, "top_p": 0.8, "min_p": 0.45}, {0, 1}),
        ({"top_p": 1e-6}, {0}),
    ],
)
def test_filters(options, expected):
    assert set(chosen(LOGITS, SamplingConfig(**options))) == expected


def test_frequencies_follow_the_temperature():
    for temperature in (1.0, 2.0):
        expected = np.exp(LOGITS / temperature) / np.exp(LOGITS / temperature).sum()
        got = chosen(LOGITS, SamplingConfig(temperature=temperature), draws=20_000)
        frequency = np.bincount(got, minlength=5) / len(got)
        np.testing.assert_allclose(frequency, expected, atol=0.015)


def test_repetition_penalty_on_both_signs():
    config = SamplingConfig(temperature=0.0, repetition_penalty=2.0)
    assert set(chosen([3.0, 2.0, -1.0], config, seen=[0])) == {1}
    assert set(chosen([-1.0, -1.5], config, seen=[0])) == {1}
    assert set(chosen([3.0, 2.0], config)) == {0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "--temperature=-1.0 must be 0"),
        ({"temperature": float("nan")}, "--temperature=nan"),
        ({"top_k": 0}, "--top_k=0 must be from 1 to the vocabulary's 10"),
        ({"top_k": 11}, "--top_k=11"),
        ({"top_p": 0.0}, "--top_p=0.0"),
        ({"top_p": 1.5}, "--top_p=1.5"),
        ({"min_p": -0.1}, "--min_p=-0.1"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty=0.0"),
    ],
)
def test_impossible_values(options, message):
    with pytest.raises(UsageError, match=message):
        SamplingConfig(**options).check(10)
