import os
import pickle

import numpy as np
import pytest

from craft_jax.data import loading, pipeline
from craft_jax.data.pipeline import DataConfig
from craft_jax.data.text import TrainingWindows
from craft_jax.errors import ConfigError, DataError, UsageError

SOURCE = """
import ctypes, os, signal, sys
import numpy as np
from craft_jax.data.base import Dataset
from craft_jax.errors import UsageError

class Mine(Dataset):
    vocab_size = 100
    def __init__(self, config, split, seed):
        self.seed = seed
    def batch(self, step):
        if step == 7:
            {fault}
        tokens = np.full((2, 4), (step + self.seed) % 100, np.int32)
        return {{"tokens": tokens, "targets": tokens}}
    def __len__(self):
        return 5
"""


def own(tmp_path, fault="pass"):
    file = tmp_path / "mine.py"
    file.write_text(SOURCE.format(fault=fault), encoding="utf-8")
    config = DataConfig(dataset=f"{file}:Mine", tokenizer=None)
    return pipeline.open_datasets(config, workdir=tmp_path, seed=3).train


def load(dataset, first=0, last=12, workers=2, ahead=2):
    batches = loading.load_batches(
        dataset, first, last, workers=workers, ahead=ahead, then=lambda b: b["tokens"].copy()
    )
    return list(batches)


def windows():
    return TrainingWindows(np.arange(5000) % 90, seq_len=16, batch_size=4, seed=1)


@pytest.mark.parametrize(("workers", "ahead"), [(0, 0), (0, 8), (1, 1), (2, 0), (3, 2)])
def test_the_same_batches_from_any_number_of_workers(workers, ahead):
    data = windows()
    data.vocab_size = 90
    expected = [data.batch(step)["tokens"] for step in range(3, 15)]
    assert np.array_equal(load(data, 3, 15, workers, ahead), expected)


def test_a_dataset_of_ones_own(tmp_path):
    assert [batch[0, 0] for batch in load(own(tmp_path))] == list(range(3, 15))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
        ("ctypes.string_at(0)", "was killed by SIGSEGV"),
        ("os._exit(0)", "exited with code 0 in the middle of a batch"),
        ("sys.exit(0)", "exited with code 0 in the middle of a batch"),
        ("os._exit(3)", "exited with code 3 in the middle of a batch"),
        ("raise ValueError('no such record')", "failed with ValueError: no such record"),
    ],
)
def test_deaths_of_every_kind(tmp_path, fault, said, workers):
    data = own(tmp_path, fault)
    with pytest.raises(DataError) as caught:
        load(data, workers=workers)
    message = str(caught.value)
    assert said in message
    assert "batch 7" in message
    assert f"data.dataset={tmp_path / 'mine.py'}:Mine" in message
    assert "\n" not in message


def test_an_answer_to_the_user_passes_through(tmp_path):
    data = own(tmp_path, "raise UsageError('mend this')")
    for workers in (0, 2):
        with pytest.raises(UsageError, match=r"^mend this$"):
            load(data, workers=workers)


def test_ids_outside_the_vocabulary(tmp_path):
    data = own(tmp_path, "return {'tokens': np.array([[1, 100]]), 'targets': np.array([[1, 2]])}")
    for workers in (0, 1):
        with pytest.raises(
            DataError, match=r"batch 7 has the id 100 in tokens\[0, 1\].* 100 tokens"
        ):
            load(data, workers=workers)


def test_leaving_early_ends_the_workers():
    data = windows()
    data.vocab_size = 90
    batches = loading.load_batches(data, 0, 100, workers=2, ahead=1, then=lambda batch: batch)
    next(batches)
    children = [int(pid) for pid in _children()]
    batches.close()
    assert len(children) >= 2
    assert not set(children) & set(_children())


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="utf-8") as file:
        return [int(pid) for pid in file.read().split() if _is_worker(int(pid))]


def _is_worker(pid: int) -> bool:
    with open(f"/proc/{pid}/cmdline", encoding="utf-8") as file:
        return "spawn_main" in file.read()


def test_what_cannot_be_sent_is_named():
    data = windows()
    data.secret = lambda: None
    with pytest.raises(ConfigError, match=r"data.workers=1.*cannot be sent"):
        load(data, workers=1)


def test_a_mapped_file_is_sent_as_its_name(tmp_path):
    file = tmp_path / "tokens.bin"
    (np.arange(200_000) % 90).astype("<u2").tofile(file)
    data = TrainingWindows(np.memmap(file, "<u2", "r"), seq_len=16, batch_size=4, seed=1)
    sent = pickle.dumps(data)
    assert len(sent) < 5000
    assert np.array_equal(pickle.loads(sent).batch(3)["tokens"], data.batch(3)["tokens"])
