import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from craft_jax import outputs
from craft_jax.checkpoint import manifest
from craft_jax.checkpoint import store as checkpointing
from craft_jax.checkpoint.store import CheckpointStore
from craft_jax.errors import ConfigError, StorageError
from craft_jax.models import base
from craft_jax.models.gpt import GPT, GPTConfig
from craft_jax.parallel import sharding
from craft_jax.parallel.sharding import ParallelConfig
from craft_jax.training import optim
from craft_jax.training import state as states
from craft_jax.training.optim import OptimConfig
from craft_jax.training.precision import Policy
from craft_jax.training.step import make_train_step

CONFIG = GPTConfig(vocab_size=16, num_layers=1, num_heads=2, d_model=16, max_seq_len=8)
OPTIMIZER = optim.make_optimizer(OptimConfig())


def mesh(num_devices=1, **sizes):
    return sharding.make_mesh(ParallelConfig(**sizes), jax.devices()[:num_devices])


def abstract(config=CONFIG, where=None):
    return states.abstract_state(base.define(GPT, config), OPTIMIZER, where or mesh())


@pytest.fixture(scope="module")
def state():
    made = states.init_state(GPT, CONFIG, OPTIMIZER, seed=0, mesh=mesh())
    return made.replace(step=jnp.int32(7), lr_scale=jnp.float32(0.5))


def save(store, state, step, **metrics):
    return store.save(step, state, meta={"metrics": metrics}, config={"a": 1}, tokenizer='{"b": 2}')


def restore(store, step, abstract):
    """Reads a state onto the devices that `abstract` names."""
    return sharding.spread(store.read_state(step, abstract), abstract)


def test_a_state_comes_back_to_the_bit(tmp_path, state):
    store = CheckpointStore(tmp_path / "checkpoints")
    save(store, state, 7)
    again = restore(store, 7, abstract())
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
    again = restore(store, 1, abstract(where=mesh(8, data=1, fsdp=8)))
    kernel = again.params["blocks.0.mlp.up.kernel"]
    assert len(kernel.sharding.device_set) == 8
    assert checkpointing.digest(again) == checkpointing.digest(state)


@pytest.mark.parametrize(
    "sizes",
    [
        # What they do, replicating and splitting, the last does to one leaf or another.
        pytest.param({"data": 4}, marks=pytest.mark.soak),
        pytest.param({"data": 1, "fsdp": 4}, marks=pytest.mark.soak),
        {"fsdp": 2, "tensor": 2},
    ],
)
def test_what_is_restored_lies_where_it_belongs_and_is_used_up(tmp_path, state, sizes):
    """A resumed step needs no more memory than a fresh one: it overwrites what was restored."""
    where = mesh(4, **sizes)
    store = CheckpointStore(tmp_path)
    save(store, state, 7)
    again = restore(store, 7, abstract(where=where))
    fresh = states.init_state(GPT, CONFIG, OPTIMIZER, seed=0, mesh=where)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(fresh), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
    step = sharding.compile_step(
        make_train_step(
            base.define(GPT, CONFIG),
            OPTIMIZER,
            optim.make_schedule(OptimConfig(), 10),
            Policy.named("float32"),
            seed=0,
        ),
        where,
    )
    ids = np.zeros((4, 8), np.int32)
    for before in (again, fresh):
        after, _ = step(before, sharding.put_batch({"tokens": ids, "targets": ids}, where))
        del after
        kept = [leaf for leaf in jax.tree.leaves(before) if leaf.size > 1 and not leaf.is_deleted()]
        assert not kept
    assert step._cache_size() == 1  # The same program, without a copy to another place.


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
    assert (store.latest(), store.best_steps()) == (5, [2])
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["2", "4", "5"]


def test_only_whole_checkpoints_count(tmp_path, state):
    store = CheckpointStore(tmp_path)
    assert (store.steps(), store.latest(), store.best_steps()) == ([], None, [])
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
    assert restore(store, 3, abstract()).step == 8


def test_another_model_is_refused(tmp_path, state):
    store = CheckpointStore(tmp_path)
    save(store, state, 1)
    wider = dataclasses.replace(CONFIG, d_model=32)
    with pytest.raises(ConfigError, match=r"attn.key.bias is \[16\] float32, not \[32\].* more$"):
        store.read_state(1, abstract(wider))
    deeper = dataclasses.replace(CONFIG, num_layers=2)
    with pytest.raises(ConfigError, match=r"params/blocks.1.attn.key.bias is missing"):
        store.read_state(1, abstract(deeper))
    half = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16, sharding=s.sharding), abstract()
    )
    with pytest.raises(ConfigError, match=r"float32, not .* bfloat16"):
        store.read_state(1, half)


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

    monkeypatch.setattr(outputs, "write_json", full)
    with pytest.raises(
        StorageError, match=r"step 2 failed: no space left on .*; still safe at step 1"
    ):
        save(store, state, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


def test_a_bit_of_any_file_is_noticed(tmp_path, state, rng):
    store = CheckpointStore(tmp_path)
    save(store, state, 1)
    save(store, state, 2)
    for path in files(tmp_path / "2"):
        whole = path.read_bytes()
        flip(path, rng)
        assert store.newest_good()[0] == 1, path
        path.write_bytes(b"")
        assert store.newest_good("fast")[0] == 1, path
        path.unlink()
        assert store.newest_good("fast")[0] == 1, path
        path.write_bytes(whole)
        assert store.newest_good() == (2, {})


def test_every_bit_of_the_manifest(tmp_path, state):
    store = CheckpointStore(tmp_path)
    save(store, state, 1)
    path = tmp_path / "1" / manifest.NAME
    whole = path.read_bytes()
    assert store.steps() == [1]
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        assert store.steps() == [], place


def test_a_copy_under_another_name_is_no_checkpoint(tmp_path, state):
    store = CheckpointStore(tmp_path)
    save(store, state, 3)
    shutil.copytree(tmp_path / "3", tmp_path / "8")
    assert store.steps() == [3]
    assert store.damaged() == {8: "MANIFEST.json belongs to step 3"}


def test_arrays_are_compared_with_what_was_in_memory(tmp_path, state):
    """Files that agree with their checksums, of arrays that were damaged before."""
    store = CheckpointStore(tmp_path)
    save(store, state, 1)
    leaves = dict(manifest.read(tmp_path / "1").leaves)
    name = "params/final_norm.scale"
    leaves[name] = leaves[name]._replace(crc32=leaves[name].crc32 ^ 1)
    (tmp_path / "1" / manifest.NAME).unlink()
    manifest.write(tmp_path / "1", 1, leaves)
    assert store.newest_good() == (1, {})
    with pytest.raises(manifest.DamagedError, match=r"params/final_norm.scale: crc32 mismatch"):
        store.read_state(1, abstract())


def test_in_the_background(tmp_path, state):
    store = CheckpointStore(tmp_path)
    arguments = {"meta": {}, "config": {}, "tokenizer": None}
    store.save(1, state, **arguments, background=True)
    store.save(2, state, **arguments, background=True)  # Waits for the one before.
    assert 1 in store.steps()
    store.wait()
    store.poll()
    assert store.steps() == [1, 2]
    assert store.written == 2


def test_a_failure_in_the_background_is_told(tmp_path, state):
    store = CheckpointStore(tmp_path / "file")
    (tmp_path / "file").write_text("", encoding="utf-8")
    store.save(1, state, meta={}, config={}, tokenizer=None, background=True)
    with pytest.raises(StorageError, match="checkpoint at step 1 failed"):
        store.wait()
    store.wait()  # Told once.


def test_the_state_is_copied_before_it_is_written(tmp_path, state):
    """The train step overwrites its buffers while a checkpoint of them is under way."""
    store = CheckpointStore(tmp_path)
    before = checkpointing.digest(state)
    state = jax.tree.map(jnp.copy, state)  # Of the tests in this file all others need theirs.
    store.save(7, state, meta={}, config={}, tokenizer=None, background=True)
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    assert state.params["blocks.0.mlp.up.kernel"].is_deleted()
    store.wait()
    assert checkpointing.digest(restore(store, 7, abstract())) == before


def test_what_is_read_is_not_removed(tmp_path, state):
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, state, 1)
    pin = store.pin(1)
    for step in (2, 3, 4):
        save(store, state, step)
    assert store.steps() == [1, 3, 4]
    del pin
    save(store, state, 5)
    assert store.steps() == [4, 5]
    assert store.pin(1) is None


def test_leftovers_of_killed_processes(tmp_path, state):
    store = CheckpointStore(tmp_path)
    save(store, state, 3)
    for name in (".6.tmp-1", ".1.trash-1", "9", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "12").write_text("", encoding="utf-8")
    assert store.remove_leftovers() == [6]
    assert store.foreign() == ["12", "9", "notes"]
    save(store, state, 9)
    assert store.steps() == [3, 9]


def test_damaged_ones_are_set_aside(tmp_path, state):
    store = CheckpointStore(tmp_path)
    save(store, state, 3)
    assert store.mark_corrupt(3).name == "3.corrupt"
    save(store, state, 3)
    assert store.mark_corrupt(3).name == "3.corrupt-2"
    assert store.corrupt() == ["3.corrupt", "3.corrupt-2"]
    assert store.foreign() == []
    save(store, state, 3)
    assert [path.name for path in store.set_aside()] == ["3.aside", "3.aside-2", "3.aside-3"]
    assert store.steps() == store.corrupt() == store.foreign() == []
