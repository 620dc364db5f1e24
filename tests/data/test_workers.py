import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from craft_jax.data import loading, pipeline, rows
from craft_jax.data.cache import token_cache
from craft_jax.data.settings import DataConfig
from craft_jax.data.text import ValidationWindows
from craft_jax.errors import ConfigError, DataError, UsageError
from tests.conftest import environment
from tests.data.windows import TrainingWindows

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


@pytest.mark.parametrize(
    ("workers", "ahead"), [(0, 0), (0, 1), (0, 8), (1, 0), (1, 8), (2, 1), (3, 0), (3, 8)]
)
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


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("sys.exit(3)", r"exited with code 3 in the middle of a batch \(.*mine.py:13\)"),
        ("raise KeyError('x' + chr(10) + 'y')", r"failed with KeyError: 'x\\ny' \(.*mine.py:13\)"),
        # Not where the library raises it, but where it is called.
        ("np.stack([])", r"failed with ValueError: need at least one.*mine.py:13\)"),
        ("return None", "failed with TypeError: it returned a NoneType, not a dict of arrays"),
        ("return {'tokens': [1]}", "failed with TypeError: its 'tokens' is a list, not an array"),
    ],
)
def test_errors_have_a_place_and_a_traceback(tmp_path, fault, said, workers):
    with pytest.raises(DataError, match=f"batch 7 {said}") as caught:
        load(own(tmp_path, fault), workers=workers)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    if workers:
        assert "Traceback" in str(caught.value.__cause__)


def test_a_batch_that_does_not_pickle_is_named(tmp_path):
    data = own(tmp_path, "return {'tokens': np.array([lambda: 0])}")
    with pytest.raises(DataError, match=r"batch 7 failed with .*(pickle|local object)"):
        load(data, workers=1)


def test_a_dataset_that_workers_cannot_build(tmp_path):
    data = own(tmp_path)
    (tmp_path / "mine.py").unlink()
    with pytest.raises(ConfigError, match="no such file"):
        load(data, workers=1)
    (tmp_path / "mine.py").write_text(
        SOURCE.format(fault="pass").replace("self.seed = seed", "raise EOFError('cut short')")
    )
    with pytest.raises(
        DataError, match=r"building the dataset.*EOFError: cut short \(.*mine.py:10\)"
    ):
        load(data, workers=2)


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


@pytest.mark.parametrize("bad", [-1, 90])
@pytest.mark.parametrize("kind", [TrainingWindows, ValidationWindows])
def test_a_bad_id_is_located_in_its_file(tmp_path, kind, bad):
    file = tmp_path / "tokens.bin"
    ids = np.arange(1000, dtype=np.int32) % 90
    ids[456] = bad
    ids.tofile(file)
    options = {"seed": 1} if kind is TrainingWindows else {}
    data = kind(np.memmap(file, np.int32, "r"), seq_len=16, batch_size=4, **options)
    data.vocab_size = 90
    with pytest.raises(DataError, match=rf"id {bad} in .*\({file} token 456\).*90 tokens"):
        list(loading.prefetch(lambda step: loading.read_batch(data, step), 0, len(data)))


def test_leaving_early_ends_the_workers():
    data = windows()
    data.vocab_size = 90
    batches = loading.load_batches(data, 0, 100, workers=2, ahead=1, then=lambda batch: batch)
    next(batches)
    children = [int(pid) for pid in _children()]
    batches.close()
    assert len(children) >= 2
    assert not set(children) & set(_children())


def test_leaving_does_not_wait_for_a_busy_worker(tmp_path):
    data = own(tmp_path, "import time; time.sleep(600)")
    batches = loading.load_batches(data, 6, 100, workers=1, ahead=2, then=lambda batch: batch)
    next(batches)
    time.sleep(0.2)
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 2
    assert not _children()


def test_workers_leave_signals_to_the_parent(tmp_path):
    batches = loading.load_batches(
        own(tmp_path), 8, 100, workers=2, ahead=0, then=lambda batch: batch
    )
    next(batches), next(batches)
    for child in _children():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.kill(child, number)
    assert [next(batches)["tokens"][0, 0] for _ in range(4)] == [13, 14, 15, 16]
    batches.close()


SCRIPT = """
import sys, time
from craft_jax.data import loading, pipeline
from craft_jax.data.settings import DataConfig

def main():
    config = DataConfig(dataset=sys.argv[1], tokenizer=None)
    data = pipeline.open_datasets(config, workdir=None, seed=0).train
    batches = loading.load_batches(data, 6, 99, workers=2, ahead=1, then=lambda batch: batch)
    next(batches)
    pids = [worker.process.pid for worker in batches.gi_frame.f_locals["pool"]._workers]
    print(*pids, flush=True)
    next(batches)

{guard}
    main()
"""


def script(tmp_path, guard, fault="pass"):
    (tmp_path / "script.py").write_text(SCRIPT.format(guard=guard), encoding="utf-8")
    own(tmp_path, fault)
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), f"{tmp_path / 'mine.py'}:Mine"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_workers_die_with_the_parent(tmp_path):
    parent = script(tmp_path, 'if __name__ == "__main__":', "import time; time.sleep(600)")
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(workers) == 2
    parent.kill()
    parent.communicate(timeout=20)
    deadline = time.monotonic() + 10
    while any(map(_is_worker, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_script_without_a_guard_is_told(tmp_path):
    parent = script(tmp_path, "if True:")
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == 1
    assert (
        "exited with code 1 before its first batch; a script must train under `if __name__ =="
        in (errors)
    )


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="utf-8") as file:
        return [int(pid) for pid in file.read().split() if _is_worker(int(pid))]


def _is_worker(pid: int) -> bool:
    try:
        return "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
    except OSError:
        return False


def test_a_dataset_that_does_not_pickle_is_named():
    data = windows()
    data.secret = lambda: None
    with pytest.raises(ConfigError, match=r"data.workers=1.*cannot be sent"):
        load(data, workers=1)


@pytest.mark.parametrize("layout", ["concatenated", "rows"])
def test_a_cache_is_sent_as_its_name(tmp_path, layout):
    path = tmp_path / "a.txt"
    path.write_text("the cat sees a dog " * 20_000, encoding="utf-8")
    config = DataConfig(path=str(path), tokenizer="byte", layout=layout, seq_len=16, batch_size=4)
    data = pipeline.open_datasets(config, workdir=tmp_path / "outputs", seed=1)
    stream = rows.Stream(*_cached(tmp_path / "outputs"))
    for sendable in (stream, data.train, data.val):
        if layout == "concatenated":
            assert len(pickle.dumps(sendable)) < 5000
        again = pickle.loads(pickle.dumps(sendable))
        if sendable is stream:
            assert np.array_equal(again.read(5, 100_000)[0], stream.read(5, 100_000)[0])
        else:
            assert np.array_equal(again.batch(3)["tokens"], sendable.batch(3)["tokens"])


def _cached(workdir):
    (file,) = workdir.glob("data/*/tokens-00000.bin")
    count = file.stat().st_size // 2
    return token_cache.Shards([file], [count], np.dtype("<u2")), np.array([[0, count]])


def test_a_part_of_a_mapped_file_is_sent_as_it_is(tmp_path):
    file = tmp_path / "tokens.bin"
    (np.arange(2000) % 90).astype("<u2").tofile(file)
    data = TrainingWindows(np.memmap(file, "<u2", "r")[7:500], seq_len=16, batch_size=4, seed=1)
    again = pickle.loads(pickle.dumps(data))
    assert np.array_equal(again.batch(3)["tokens"], data.batch(3)["tokens"])
