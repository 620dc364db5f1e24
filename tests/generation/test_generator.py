import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from craft_jax.errors import UsageError
from craft_jax.generation import generator as generation
from craft_jax.generation import generator as generator_module
from craft_jax.generation.generator import Generator, prepare_decode_params
from craft_jax.generation.sampling import SamplingConfig, choose
from craft_jax.models import base, kernels
from craft_jax.models.base import LanguageModel
from craft_jax.models.gpt import GPT, GPTConfig
from craft_jax.models.layers import Embedding
from craft_jax.models.seq2seq import Seq2SeqConfig, Transformer

V = 23
CONFIG = GPTConfig(vocab_size=V, num_layers=2, num_heads=2, d_model=32, max_seq_len=24)
GREEDY = SamplingConfig(temperature=0.0)


def draw(model_def, seed=0, std=0.2):
    """Parameters so large that the most likely token depends on the whole context."""
    keys = jax.random.split(jax.random.key(seed), len(model_def.shapes))
    return {
        path: 1.0 * path.endswith("scale") + std * jax.random.normal(key, leaf.shape)
        for key, (path, leaf) in zip(keys, model_def.shapes.items(), strict=True)
    }


@pytest.fixture(scope="module")
def params():
    return draw(base.define(GPT, CONFIG))


@pytest.fixture(scope="module")
def generator():
    return Generator(base.define(GPT, CONFIG), max_len=24, vocab_size=V, end_id=None)


@pytest.fixture(scope="module")
def narrow():
    """A generator that knows no more than 5 tokens of the vocabulary."""
    return Generator(base.define(GPT, CONFIG), max_len=24, vocab_size=5, end_id=None)


@jax.jit
def logits(params, tokens_BT):
    return base.define(GPT, CONFIG).merge(params)(tokens_BT)[0]


def by_full_forward(params, prompt, count, vocab_size=V):
    """Greedy decoding without a cache: the definition."""
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


@pytest.mark.parametrize(
    "config",
    [pytest.param(GREEDY, marks=pytest.mark.soak), SamplingConfig(temperature=1.3, top_k=9)],
)
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


def test_a_row_ends_at_its_end_token(params, generator):
    free = generator.generate(params, [[1], [2]], max_new_tokens=20, config=GREEDY)
    end = free[0][6]
    ending = Generator(base.define(GPT, CONFIG), max_len=24, vocab_size=V, end_id=end)
    got = ending.generate(params, [[1], [2]], max_new_tokens=20, config=GREEDY)
    for ended, whole in zip(got, free, strict=True):
        assert ended == whole[: whole.index(end)] if end in whole else ended == whole


def test_padding_rows_of_the_vocabulary_are_never_chosen(params, narrow):
    got = narrow.generate(params, [[1]], max_new_tokens=20, config=SamplingConfig(temperature=50.0))
    assert max(got[0]) < 5
    greedy = narrow.generate(params, [[1]], max_new_tokens=9, config=GREEDY)[0]
    assert greedy == by_full_forward(params, [1], 9, vocab_size=5)


@pytest.mark.parametrize(
    "extreme",
    [{"temperature": 1e-3}, {"top_p": 1e-300}, pytest.param({"top_k": 1}, marks=pytest.mark.soak)],
)
def test_the_narrowest_sampling_is_greedy(params, generator, extreme):
    options = {"max_new_tokens": 20, "seed": 3}
    greedy = generator.generate(params, [[1, 2]], config=GREEDY, **options)
    config = SamplingConfig(**extreme)
    assert generator.generate(params, [[1, 2]], config=config, **options) == greedy


def test_extreme_sampling_values_choose_tokens_of_the_vocabulary(params, narrow):
    for wide in ({"temperature": 1e3}, {"repetition_penalty": 1e3}, {"repetition_penalty": 1e-3}):
        config = SamplingConfig(**wide)
        (new,) = narrow.generate(params, [[1]], max_new_tokens=40, config=config)
        assert max(new) < 5


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


# With sources, and with beams. Small models of both kinds, and what they say of whole texts.

END, SMALL_V, LENGTH = 3, 4, 10
SMALL = dict(vocab_size=SMALL_V + 2, num_layers=1, num_heads=2, d_model=16, max_seq_len=LENGTH)
DEFS = {
    "gpt": base.define(GPT, GPTConfig(**SMALL)),
    "seq2seq": base.define(Transformer, Seq2SeqConfig(**SMALL, num_decoder_layers=1)),
}
PROMPTS = [[END], [0, 1, 2], [END, 2], [1, 1, 1, 1, 1, 0]]
SOURCES = [[0, END], [1, 2, 0, 0, 1, 2, 0, 1, 2, END], [2, 2, 2, END], [END]]


class Small:
    """A generator of one kind of model, and the same by full forward passes."""

    def __init__(self, kind, end_id=END):
        self.has_source = kind == "seq2seq"
        self.model_def = DEFS[kind]
        self.generator = Generator(
            self.model_def, max_len=LENGTH, vocab_size=SMALL_V, end_id=end_id
        )
        self._logits = jax.jit(self._all_logits)

    def _all_logits(self, params, tokens_BT, source_BS, source_mask_BS):
        source = {"source_BS": source_BS, "source_mask_BS": source_mask_BS}
        return self.model_def.merge(params)(tokens_BT, **(source if self.has_source else {}))[0]

    def options(self, rows=slice(None)):
        return {"sources": SOURCES[rows]} if self.has_source else {}

    def logps(self, params, texts, source):
        """Log-probabilities of the next token after every token of each text, in float64."""
        tokens = np.zeros((len(texts), LENGTH), np.int32)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = text
        # The source as it is, without padding.
        source = np.tile(np.array(source, np.int32), (len(texts), 1))
        logits = self._logits(params, tokens, source, np.ones(source.shape, bool))
        logits = np.asarray(logits, np.float64)[..., :SMALL_V]
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def score(self, params, prompt, new, source, penalty=0.0):
        text = [*prompt, *new]
        logps = self.logps(params, [text[:LENGTH]], source)[0]
        each = [logps[i - 1, text[i]] for i in range(len(prompt), len(text))]
        return sum(each) / len(each) ** penalty

    def greedy(self, params, prompt, source, limit):
        new = []
        while len(new) < limit and END not in new and len(prompt) + len(new) <= LENGTH:
            text = [*prompt, *new]
            new.append(int(self.logps(params, [text], source)[0, len(text) - 1].argmax()))
        return new


@functools.cache
def small_of(kind):
    return Small(kind)


@pytest.fixture(scope="module", params=DEFS)
def small(request):
    return small_of(request.param)


def ended(new, limit, prompt):
    """New tokens with the end token that was left out, unless they were cut."""
    return new if len(new) == min(limit, LENGTH + 1 - len(prompt)) else [*new, END]


def test_targets_with_cache_equal_full_forward_and_end_at_the_context():
    made = small_of("seq2seq")
    lengths = set()
    for seed in range(6):
        params = draw(made.model_def, seed, std=0.4)
        got = made.generator.generate(
            params, PROMPTS, sources=SOURCES, max_new_tokens=30, config=GREEDY
        )
        for prompt, source, new in zip(PROMPTS, SOURCES, got, strict=True):
            assert ended(new, 30, prompt) == made.greedy(params, prompt, source, 30)
            lengths.add(len(prompt) + len(new))
    assert LENGTH + 1 in lengths and len(lengths) > 3


def test_sources_of_different_length_equal_one_by_one():
    made = small_of("seq2seq")
    params = draw(made.model_def)
    options = {"max_new_tokens": 9, "config": SamplingConfig(temperature=1.2), "seed": 4}
    together = made.generator.generate(params, PROMPTS, sources=SOURCES, **options)
    alone = [
        made.generator.generate(params, [prompt], sources=[source], **options)[0]
        for prompt, source in zip(PROMPTS, SOURCES, strict=True)
    ]
    assert together == alone
    assert len(set(map(tuple, together))) > 1
    model = made.model_def.merge(params)
    got = generation.generate(model, PROMPTS, sources=SOURCES, max_new_tokens=2, config=GREEDY)
    assert [len(new) for new in got] == [2] * 4


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_beams_never_score_below_greedy_and_say_what_a_text_scores(small, penalty):
    better = 0
    for seed in range(25):
        params = draw(small.model_def, seed, std=0.4)
        found = small.generator.beam_search(
            params,
            PROMPTS,
            num_beams=3,
            max_new_tokens=7,
            length_penalty=penalty,
            **small.options(),
        )
        for prompt, source, (new, score) in zip(PROMPTS, SOURCES, found, strict=True):
            assert max(new, default=0) < SMALL_V
            # The best text may end here, or go on: what it scores tells which.
            scores = [
                small.score(params, prompt, text, source, penalty)
                for text in ([*new, END], new)
                if 0 < len(text) <= min(7, LENGTH + 1 - len(prompt))
            ]
            assert min(abs(score - s) for s in scores) < 1e-5
            greedy = small.greedy(params, prompt, source, 7)
            least = small.score(params, prompt, greedy, source, penalty)
            assert score > least - 1e-5
            better += score > least + 1e-3
    assert better > 5


@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_enough_beams_find_the_best_of_all_texts(small, penalty):
    limit = 4
    texts = [
        text
        for length in range(1, limit + 1)
        for text in map(list, itertools.product(range(SMALL_V), repeat=length))
        if END not in text[:-1] and (text[-1] == END or length == limit)
    ]
    for seed in range(4):
        params = draw(small.model_def, seed, std=0.4)
        found = small.generator.beam_search(
            params,
            PROMPTS[:3],
            num_beams=130,
            max_new_tokens=limit,
            length_penalty=penalty,
            **small.options(slice(3)),
        )
        for prompt, source, (new, score) in zip(PROMPTS, SOURCES, found, strict=False):
            logps = small.logps(params, [[*prompt, *text] for text in texts], source)
            scores = [
                sum(row[len(prompt) + i - 1, token] for i, token in enumerate(text))
                / len(text) ** penalty
                for row, text in zip(logps, texts, strict=True)
            ]
            best = int(np.argmax(scores))
            assert score == pytest.approx(scores[best], abs=1e-5)
            assert new == [token for token in texts[best] if token != END]


class Cache(NamedTuple):
    """What a model of the user's own keeps: the field, and no method of ours."""

    length_B: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableConfig:
    vocab_size: int
    max_seq_len: int = LENGTH


class Table(LanguageModel):
    """Looks the logits of the next token up by the last one."""

    Config = TableConfig

    def __init__(self, config, *, rngs):
        self.config = config
        self.table = Embedding(config.vocab_size, config.vocab_size, rngs=rngs)

    def init_cache(self, batch_size, max_len, dtype):
        return Cache(jnp.zeros(batch_size, jnp.int32))

    def hidden(self, tokens_BT, cache=None, *, key=None, remat=False):
        if cache is not None:
            cache = Cache(cache.length_B + tokens_BT.shape[1])
        return self.table(tokens_BT), cache

    def logits(self, x_BTD):
        return x_BTD


def test_the_greedy_text_keeps_its_beam():
    """Where all other beams are better for a while, and worse in the end."""
    start, a, b, c, d, e, end = range(7)
    probs = np.full((7, 7), 1 / 7)
    probs[start, [a, b]] = 0.4, 0.35
    probs[a, d], probs[d, end] = 0.2, 0.999
    probs[b, [c, e]] = 0.5, 0.45
    for row in (start, a, b, d):
        rest = probs[row] == 1 / 7
        probs[row, rest] = (1 - probs[row, ~rest].sum()) / rest.sum()
    generator = Generator(
        base.define(Table, TableConfig(vocab_size=7)), max_len=LENGTH, vocab_size=7, end_id=end
    )
    params = {"table.embedding": jnp.asarray(np.log(probs), jnp.float32)}
    for num_beams in (1, 2, 3):
        ((new, score),) = generator.beam_search(
            params, [[start]], num_beams=num_beams, max_new_tokens=3
        )
        assert new == [a, d]
        assert score == pytest.approx(np.log(0.4 * 0.2 * 0.999), abs=1e-5)
    assert generator.generate(params, [[start]], max_new_tokens=3, config=GREEDY) == [[a, d]]


def test_one_beam_is_greedy(small):
    for seed in range(6):
        params = draw(small.model_def, seed, std=0.4)
        found = small.generator.beam_search(
            params, PROMPTS, num_beams=1, max_new_tokens=30, **small.options()
        )
        for (new, _), prompt, source in zip(found, PROMPTS, SOURCES, strict=True):
            assert ended(new, 30, prompt) == small.greedy(params, prompt, source, 30)


def test_beams_of_a_row_do_not_depend_on_the_others(small):
    params = draw(small.model_def, 11, std=0.4)
    options = {"num_beams": 3, "max_new_tokens": 7}
    together = small.generator.beam_search(params, PROMPTS, **options, **small.options())
    for i, (new, score) in enumerate(together):
        rows = slice(i, i + 1)
        ((alone, alone_score),) = small.generator.beam_search(
            params, PROMPTS[rows], **options, **small.options(rows)
        )
        assert alone == new
        assert alone_score == pytest.approx(score, abs=1e-5)


def test_beams_without_an_end_token():
    made = Small("gpt", end_id=None)
    params = draw(made.model_def)
    found = made.generator.beam_search(params, PROMPTS, num_beams=3, max_new_tokens=6)
    assert [len(new) for new, _ in found] == [6, 6, 6, 5]
    assert made.generator.beam_search(params, [[1]], num_beams=3, max_new_tokens=0) == [([], 0.0)]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gpt", {"num_beams": 0}, "`num_beams=0` must be from 1"),
        ("gpt", {"length_penalty": -1.0}, "`length_penalty=-1.0` must be 0"),
        ("gpt", {"length_penalty": float("nan")}, "`length_penalty=nan`"),
        ("gpt", {"sources": [[1]]}, "reads no source"),
        ("seq2seq", {}, "reads a source for each prompt"),
        ("seq2seq", {"sources": [[1], [2]]}, "2 sources for 1 prompts"),
        ("seq2seq", {"sources": [[]]}, "a source has 0 tokens; this model takes 1 to 10"),
        ("seq2seq", {"sources": [[1] * 11]}, "a source has 11 tokens"),
    ],
)
def test_searches_that_cannot_be(kind, options, message):
    generator = Generator(DEFS[kind], max_len=LENGTH, vocab_size=SMALL_V, end_id=END)
    with pytest.raises(UsageError, match=message):
        generator.beam_search({}, [[1]], **{"num_beams": 2, "max_new_tokens": 3} | options)


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


def test_transposed_kernels_change_no_token(params, monkeypatch):
    def generated():
        counts = []

        def prepare(*args):
            prepared = prepare_decode_params(*args)
            counts.append(sum(isinstance(v, kernels.DecodeKernel) for v in prepared.values()))
            return prepared

        monkeypatch.setattr(generator_module, "prepare_decode_params", prepare)
        generator = Generator(base.define(GPT, CONFIG), max_len=24, vocab_size=V, end_id=None)
        tokens = generator.generate(params, [[1, 2, 3]], max_new_tokens=40, config=GREEDY)
        return tokens, counts

    fast, counts = generated()
    assert counts == [12]
    monkeypatch.setattr(kernels, "MAX_TRANSPOSED_BYTES", 0)
    plain, counts = generated()
    assert counts == [0] and plain == fast
