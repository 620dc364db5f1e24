"""The first losses of a fixed small run, against recorded ones.

They catch what no other test does: a change of numerics that nobody meant. When one was meant, run
`python scripts/update_golden.py`, look at the difference, and commit it with the reason.
"""

import json

import jax
import numpy as np
import pytest

from craft_jax.data import tokenizers
from craft_jax.models import base
from craft_jax.models.gpt import GPT, GPTConfig
from craft_jax.parallel import sharding
from craft_jax.parallel.sharding import ParallelConfig
from craft_jax.training import optim
from craft_jax.training import state as states
from craft_jax.training.optim import OptimConfig
from craft_jax.training.precision import Policy
from craft_jax.training.step import make_train_step
from tests.conftest import ROOT, words
from tests.data.windows import TrainingWindows

pytestmark = pytest.mark.frozen

FILE = ROOT / "tests/golden/first_steps.json"
STEPS = 5
CASES = {
    "plain": {},
    "dropout and accumulation": {"dropout": 0.2, "accumulate": 2},
    "untied, no bias, tanh": {"tie_embeddings": False, "bias": False, "activation": "gelu_tanh"},
    "bfloat16": {"precision": "bfloat16"},
}


def first_losses(accumulate: int = 1, precision: str = "float32", **model: object) -> list[float]:
    """Trains a small GPT on words for `STEPS` steps and returns the losses."""
    text = words(2000)
    tokenizer = tokenizers.characters(text, end_token=False)
    data = TrainingWindows(tokenizer.encode(text), seq_len=16, batch_size=8, seed=0)
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=2,
        num_heads=2,
        d_model=32,
        max_seq_len=16,
        **model,
    )
    optimizer = optim.make_optimizer(OptimConfig())
    mesh = sharding.make_mesh(ParallelConfig(), jax.devices()[:1])
    state = states.init_state(GPT, config, optimizer, seed=0, mesh=mesh)
    step = jax.jit(
        make_train_step(
            base.define(GPT, config),
            optimizer,
            optim.make_schedule(OptimConfig(warmup_steps=0), 100),
            Policy.named(precision),
            seed=0,
            accumulate=accumulate,
        )
    )
    losses = []
    for i in range(STEPS):
        state, metrics = step(state, sharding.put_batch(data.batch(i), mesh))
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.parametrize("case", CASES)
def test_first_losses_are_the_recorded_ones(case):
    recorded = json.loads(FILE.read_text(encoding="utf-8"))[case]
    tolerance = 2e-3 if case == "bfloat16" else 2e-5
    np.testing.assert_allclose(
        first_losses(**CASES[case]),
        recorded,
        rtol=tolerance,
        err_msg="The numerics have changed. If you meant it: python scripts/update_golden.py",
    )
