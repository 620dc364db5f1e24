import jax
import numpy as np
import pytest

from craft_jax.data import pair_sources, pairs
from craft_jax.models import base
from craft_jax.models.gpt import GPT
from craft_jax.models.seq2seq import Seq2SeqConfig, Transformer
from craft_jax.models.transformer import TransformerLM
from craft_jax.parallel import sharding
from craft_jax.parallel.sharding import ParallelConfig
from craft_jax.training.evaluation import Evaluator
from craft_jax.training.precision import Policy
from craft_jax.training.tasks import LANGUAGE, PAIRS, task_of


def test_each_kind_of_model_has_its_task():
    assert task_of(GPT) is task_of(TransformerLM) is LANGUAGE
    assert task_of(Transformer) is PAIRS


@pytest.fixture
def data():
    _, val = pairs.open_pairs(
        "sort", num_pairs=21, val_fraction=0.5, tokenizer="char", vocab_size=300, seq_len=12,
        batch_size=8, seed=0,
    )  # fmt: skip
    return val


def test_tokens_of_both_sides_count(data):
    texts = [pair.source + pair.target for pair in pair_sources.generate("sort", 21).val[:8]]
    count = PAIRS.count
    # An end token on each side; none in rows that fill up the last batch but one they look at.
    assert count(data.batch(0)) == len("".join(texts)) + 2 * 8
    texts = [pair.source + pair.target for pair in pair_sources.generate("sort", 21).val[16:]]
    assert count(data.batch(2)) == len("".join(texts)) + 2 * 5 + 3


@pytest.mark.parametrize("num_devices", [1, 8])
def test_an_evaluation_adds_what_the_loss_returns_and_skips_the_filling(data, num_devices):
    config = Seq2SeqConfig(
        vocab_size=data.vocab_size, num_layers=1, num_decoder_layers=1, num_heads=2, d_model=16,
        max_seq_len=12,
    )  # fmt: skip
    model_def = base.define(Transformer, config)
    params = jax.jit(lambda key: base.init_params(Transformer, config, key))(jax.random.key(0))
    mesh = sharding.make_mesh(ParallelConfig(), jax.devices()[:num_devices])
    sums = Evaluator(model_def, Policy.named("float32"), mesh)(params, data)
    # One row at a time, without what fills up batches and rows.
    loss = jax.jit(lambda params, batch: model_def.merge(params).loss(batch))
    batches = [data.batch(step) for step in range(3)]
    rows = [{k: v[n : n + 1] for k, v in b.items()} for b in batches for n in range(8)]
    each = [loss(params, row)._asdict() for row in rows if row["weights"].any()]
    assert len(each) == sums["rows"] == 21
    for name, total in sums.items():
        np.testing.assert_allclose(sum(float(e[name]) for e in each), total, rtol=1e-5)
    metrics = PAIRS.metrics(sums, data)
    assert metrics["loss"] == pytest.approx(np.log(data.vocab_size), abs=0.3)
    assert metrics["pairs"] == 21
