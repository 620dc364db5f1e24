import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from craft_jax import checkpointing, optim, sharding
from craft_jax.checkpointing import CheckpointStore
from craft_jax.errors import StorageError
from craft_jax.models import base
from craft_jax.models.gpt import GPT, GPTConfig
from craft_jax.optim import OptimConfig
from craft_jax.sharding import ParallelConfig
from craft_jax.training import state as states

CONFIG = GPTConfig(vocab_size=16, num_layers=1, num_heads=2, d_model=16, max_seq_len=8)
OPTIMIZER = optim.make_optimizer(OptimConfig())


def mesh(num_devices=1, **sizes):
    return sharding.make_mesh(ParallelConfig(**sizes), jax.devices()[:num_devices])


def abstract(config=CONFIG, where=None):
    return states.abstract_state(base.define(GPT, config), OPTIMIZER, where or mesh())


@pytest.fixture
def state():
    made = states.init_state(GPT, CONFIG, OPTIMIZER, seed=0, mesh=mesh())
    return made.replace(step=jnp.int32(7), lr_scale=jnp.float32(0.5))


def save(store, state, step, **metrics):
    return store.save(step, state, meta={"metrics": metrics}, config={"a": 1}, tokenizer='{"b": 2}')


def test_a_state_comes_back_to_the_bit(tmp_path, state):
    store = CheckpointStore(tmp_path / "checkpoints")
    save(store, state, 7)
    again = store.restore_state(7, abstract())
    assert checkpointing.digest(again) == checkpointing.digest(state)
    assert type(again.opt_state) is type(state.opt_state)
    assert store.config(7) == {"a": 1}
    assert store.tokenizer_file(7).read_text() == '{"b": 2}'
    assert store.meta(7) == {"step": 7, "metrics": {}}


def test_the_digest_sees_one_bit(state):
    kernel = np.array(state.params["blocks.0.mlp.up.kernel"])
    kernel.view(np.uint32)[3, 4] ^= 1
    changed = state.replace(params=state.params | {"blocks.0.mlp.up.kernel": kernel})
    assert checkpointing.digest(changed) != checkpointing.digest(state)


def test_onto_other_devices(tmp_path, state):
    store = CheckpointStore(tmp_path)
    save(store, state, 1)
    again = store.restore_state(1, abstract(where=mesh(8, data=1, fsdp=8)))
    kernel = again.params["blocks.0.mlp.up.kernel"]
    assert len(kernel.sharding.device_set) == 8
    assert checkpointing.digest(again) == checkpointing.digest(state)


def test_parameters_alone(tmp_path, state):
    store = CheckpointStore(tmp_path)
    save(store, state, 1)
    params = store.restore_params(1, base.define(GPT, CONFIG).shapes)
    assert checkpointing.digest(params) == checkpointing.digest(dict(state.params))


def test_the_last_and_the_best_stay(tmp_path, state):
    store = CheckpointStore(tmp_path, keep_last=2)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        save(store, state, step, **({} if loss is None else {"val_loss": loss}))
    assert store.steps() == [2, 4, 5]
    assert (store.latest(), store.best()) == (5, 2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["2", "4", "5"]


def test_only_whole_checkpoints_count(tmp_path, state):
    store = CheckpointStore(tmp_path)
    assert (store.steps(), store.latest(), store.best()) == ([], None, None)
    save(store, state, 3)
    (tmp_path / "9").mkdir()
    (tmp_path / ".8.tmp-1").mkdir()
    (tmp_path / "best").mkdir()
    (tmp_path / "12").write_text("", encoding="utf-8")
    assert store.steps() == [3]


def test_saving_a_step_again_replaces_it(tmp_path, state):
    store = CheckpointStore(tmp_path)
    save(store, state, 3, val_loss=1.0)
    save(store, state.replace(step=jnp.int32(8)), 3, val_loss=2.0)
    assert store.meta(3)["metrics"] == {"val_loss": 2.0}
    assert store.restore_state(3, abstract()).step == 8


# Orbax gives up at the first error; reads that end later find its event loop closed, and say so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_another_model_is_refused(tmp_path, state):
    store = CheckpointStore(tmp_path)
    save(store, state, 1)
    wider = dataclasses.replace(CONFIG, d_model=32)
    with pytest.raises(StorageError):
        store.restore_state(1, abstract(wider))
    deeper = dataclasses.replace(CONFIG, num_layers=2)
    with pytest.raises(StorageError):
        store.restore_state(1, abstract(deeper))


def test_a_missing_file(tmp_path, state):
    store = CheckpointStore(tmp_path)
    save(store, state, 1)
    (tmp_path / "1/config.json").unlink()
    with pytest.raises(StorageError, match=r"config.json cannot be read"):
        store.config(1)


def test_a_failed_save_leaves_the_others(tmp_path, state, monkeypatch):
    store = CheckpointStore(tmp_path)
    save(store, state, 1)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpointing.outputs, "write_json", full)
    with pytest.raises(StorageError, match=r"No space left.*checkpoint of step 1 is whole"):
        save(store, state, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
