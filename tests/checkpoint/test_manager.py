"""The policy of checkpoints: a failure on the way is a warning, several in a row end the run."""

import jax
import pytest

from craft_jax.checkpoint.manager import CheckpointManager
from craft_jax.checkpoint.settings import CheckpointConfig
from craft_jax.checkpoint.store import CheckpointStore
from craft_jax.errors import StorageError
from craft_jax.models import base
from craft_jax.models.gpt import GPT, GPTConfig
from craft_jax.parallel import sharding
from craft_jax.parallel.sharding import ParallelConfig
from craft_jax.training import optim
from craft_jax.training import state as states
from craft_jax.training.optim import OptimConfig

CONFIG = GPTConfig(vocab_size=8, num_layers=1, num_heads=1, d_model=8, max_seq_len=8)


class States:
    """Makes states on one device."""

    def __init__(self):
        self.mesh = sharding.make_mesh(ParallelConfig(), jax.devices()[:1])
        self.optimizer = optim.make_optimizer(OptimConfig())
        definition = base.define(GPT, CONFIG)
        self.abstract_state = states.abstract_state(definition, self.optimizer, self.mesh)

    def first(self):
        return states.init_state(GPT, CONFIG, self.optimizer, seed=0, mesh=self.mesh)


@pytest.fixture(scope="module")
def made():
    return States()


@pytest.fixture(scope="module")
def state(made):
    return made.first()


def manager(folder, made, **settings):
    store = CheckpointStore(folder)
    contents = {"meta": {"vocab_size": 8}, "config": {}, "tokenizer": None}
    config = CheckpointConfig(background=False, **settings)
    return CheckpointManager(store, config, contents, store.meta, made)


def test_the_third_failure_in_a_row_ends_the_run(tmp_path, made, state, caplog):
    folder = tmp_path / "checkpoints"
    saving = manager(folder, made)
    folder.write_text("a file is in the way", encoding="utf-8")
    for _ in range(2):
        saving.save(state, {"metrics": {}})
    assert caplog.text.count("training goes on") == 2
    folder.unlink()
    saving.save(state, {"metrics": {}})
    assert saving.restore().meta == {"step": 0, "metrics": {}, "vocab_size": 8}
    folder.rename(tmp_path / "elsewhere")
    folder.write_text("in the way again", encoding="utf-8")
    for _ in range(2):
        saving.save(state, {"metrics": {}})
    with pytest.raises(StorageError, match="checkpoint at step 0 failed"):
        saving.save(state, {"metrics": {}})


def test_the_last_save_or_one_that_may_not_fail_ends_the_run_at_once(tmp_path, made, state):
    folder = tmp_path / "checkpoints"
    folder.write_text("a file is in the way", encoding="utf-8")
    with pytest.raises(StorageError):
        manager(folder, made).save(state, {"metrics": {}}, is_final=True)
    with pytest.raises(StorageError):
        manager(folder, made, on_error="halt").save(state, {"metrics": {}})
