"""Measures what the trainer costs beside its step: python scripts/overhead.py [--config=...].

The real train command, with its default callbacks and loggers, and a callback that makes as many
steps of the bare compiled step, on the same batch size, after every segment. Prints the ratio of
the median steps per second, with its spread, and the last line as JSON. Segments in which an
evaluation, a sample or a checkpoint falls are left out: they are work of their own.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax
import numpy as np

from craft_jax import config as configs
from craft_jax import main as cli
from craft_jax import runs
from craft_jax.models import base
from craft_jax.parallel import sharding
from craft_jax.training import optim
from craft_jax.training import state as states
from craft_jax.training import step as steps
from craft_jax.training.callbacks import Callback, StepRecord
from craft_jax.training.precision import Policy

_SETTINGS = "CRAFT_OVERHEAD"


class Alternate(Callback):
    """Times segments of the run, and as many bare steps after each of them."""

    def __init__(self) -> None:
        settings = json.loads(os.environ[_SETTINGS])
        self._length, self._result = settings["steps"], Path(settings["result"])
        self._config = configs.load(
            settings["config"], [configs.Override(*pair) for pair in settings["overrides"]]
        )
        self._times: dict[str, list[float]] = {"trainer": [], "bare": []}
        self._was_long = True  # The first segment compiles.

    def wants_state(self, step: int, is_last: bool) -> bool:
        return step % self._length == 0

    def on_train_begin(self, record: StepRecord) -> None:
        config = self._config
        model_def = base.define(
            config.model_class,
            runs.with_sizes(config.model, {"vocab_size": config.data.vocab_size}),
        )
        optimizer = optim.make_optimizer(config.optim)
        mesh = sharding.make_mesh(config.parallel, jax.devices())
        train_step = steps.make_train_step(
            model_def,
            optimizer,
            optim.make_schedule(config.optim, config.training.num_steps),
            Policy.named(config.training.precision),
            seed=0,
            accumulate=config.training.accumulate,
        )
        self._train_step = sharding.compile_step(train_step, mesh)
        self._state = states.init_state(
            config.model_class, model_def.config, optimizer, seed=0, mesh=mesh
        )
        shape = (config.data.batch_size, config.data.seq_len)
        ids = np.random.default_rng(0).integers(config.data.vocab_size, size=shape)
        self._batch = sharding.put_batch(
            dict.fromkeys(("tokens", "targets"), ids.astype(np.int32)), mesh
        )
        self._bare()
        self._start = time.monotonic()

    def on_evaluate_end(self, record: StepRecord) -> None:
        self._was_long = True

    def on_save(self, record: StepRecord) -> None:
        self._was_long = True

    def on_sync(self, record: StepRecord) -> None:
        jax.block_until_ready(record.state)
        seconds = time.monotonic() - self._start
        bare = self._bare()
        if not self._was_long:
            self._times["trainer"].append(seconds)
            self._times["bare"].append(bare)
            print(f"trainer {seconds:.2f} s, bare {bare:.2f} s", flush=True)
        self._was_long = False
        self._start = time.monotonic()

    def on_train_end(self, record: StepRecord) -> None:
        self._result.write_text(json.dumps(self._times), encoding="utf-8")

    def _bare(self) -> float:
        """Makes a segment of bare steps, one handed over while the one before runs."""
        start = time.monotonic()
        for _ in range(self._length):
            self._state, _ = self._train_step(self._state, self._batch)
        jax.block_until_ready(self._state)
        return time.monotonic() - start


def main() -> None:
    """Runs the command and prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=str(ROOT / "configs/gpt.py:small"))
    parser.add_argument("--batch_size", type=int, default=8, help="the preset small has 64")
    parser.add_argument("--steps", type=int, default=5, help="in a segment")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="overhead_"))
    # What is not a step would come at the end only.
    overrides = {
        "data.batch_size": args.batch_size,
        "training.num_steps": args.steps * (args.rounds + 1),
        "training.sample_every": 0,
    }
    settings = {
        "config": args.config,
        "steps": args.steps,
        "overrides": [[field, str(value)] for field, value in overrides.items()],
        "result": str(folder / "times.json"),
    }
    os.environ[_SETTINGS] = json.dumps(settings)
    words = [f"--config.{field}={value}" for field, value in overrides.items()]
    words.append(f"--config.training.callbacks={Path(__file__).resolve()}:Alternate")
    try:
        code = cli.main([f"--config={args.config}", *words, f"--workdir={folder}/outputs"])
        if code:
            sys.exit(code)
        times = json.loads((folder / "times.json").read_text(encoding="utf-8"))
        ratios = sorted(b / t for b, t in zip(times["bare"], times["trainer"], strict=True))
        ratio = statistics.median(times["bare"]) / statistics.median(times["trainer"])
        print(
            f"{len(ratios)} pairs of {args.steps} steps: the trainer makes {100 * ratio:.1f} % of "
            f"the bare step's steps per second [{100 * ratios[0]:.1f} to {100 * ratios[-1]:.1f}]"
        )
        print(json.dumps({"ratio": ratio, "median_of_pairs": statistics.median(ratios)}))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
