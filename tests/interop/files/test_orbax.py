import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from craft_jax.checkpoint.store import CheckpointStore
from craft_jax.models.gpt import GPT, GPTConfig
from craft_jax.parallel import sharding
from craft_jax.parallel.sharding import ParallelConfig
from craft_jax.training import optim
from craft_jax.training import state as states
from craft_jax.training.optim import OptimConfig
from interop.errors import CorruptFileError, UncommittedCheckpointError
from interop.files.orbax import read_params
from interop.mapping.tensors import same_bits
from tests.conftest import environment
from tests.interop.models import make_run, random_leaves, spec


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint as training writes it, from eight devices; and the parameters in it."""
    folder = tmp_path_factory.mktemp("trained")
    config = GPTConfig(vocab_size=64, num_layers=2, num_heads=2, d_model=32, max_seq_len=16)
    mesh = sharding.make_mesh(ParallelConfig(fsdp=4, tensor=2), jax.devices())
    optimizer = optim.make_optimizer(OptimConfig())
    state = states.init_state(GPT, config, optimizer, seed=0, mesh=mesh)
    state = state.replace(step=jnp.int32(3))
    CheckpointStore(folder).save(3, state, meta={}, config={}, tokenizer=None)
    return folder / "3" / "params", {n: np.asarray(p) for n, p in state.params.items()}


def test_checkpoints_of_eight_devices(trained):
    folder, params = trained
    found = read_params(folder)
    assert set(found) == set(params)
    for name, value in params.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype)
        assert same_bits(found[name].read(), value)


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
def test_checkpoints_of_imports(tmp_path, dtype):
    known = spec(num_layers=1)
    run = make_run(tmp_path / "models" / "run", known, dtype)
    found = read_params(run / "checkpoints" / "0" / "params")
    for name, leaf in random_leaves(known, dtype).items():
        assert same_bits(found[name].read(), leaf.read())


def test_neither_jax_nor_orbax_is_needed(trained):
    code = (
        "import sys; from pathlib import Path; from interop.files.orbax import read_params; "
        "found = read_params(Path(sys.argv[1])); [leaf.read() for leaf in found.values()]; "
        "sys.exit(any(name in sys.modules for name in ('jax', 'orbax', 'torch', 'flax')))"
    )
    env = environment()
    subprocess.run([sys.executable, "-c", code, str(trained[0])], env=env, check=True)


def test_a_folder_that_orbax_did_not_finish(trained, tmp_path):
    with pytest.raises(UncommittedCheckpointError, match="no finished Orbax checkpoint"):
        read_params(tmp_path)
    copy = shutil.copytree(trained[0], tmp_path / "params")
    (copy / "_METADATA").write_text("{")
    with pytest.raises(CorruptFileError, match="_METADATA"):
        read_params(copy)


def test_damaged_arrays(trained, tmp_path):
    copy = shutil.copytree(trained[0], tmp_path / "params")
    for file in copy.rglob("d/*"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
        file.write_bytes(data)
    with pytest.raises(CorruptFileError, match=str(copy)):
        [leaf.read() for leaf in read_params(copy).values()]
