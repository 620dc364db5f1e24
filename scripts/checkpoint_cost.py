"""Measures what checkpoints cost a run: python scripts/checkpoint_cost.py [--batch_size=8].

The train step of `configs/gpt.py:small` in segments of 20 steps, in turns without a checkpoint and
with one, written in the background from the first step of the segment on. Prints the ratio of the
median times with its spread, and the last line as JSON. On two CPU cores a batch of 8 (the preset
has 64) makes a segment of some 20 s: checkpoints are eight times as frequent as in the preset.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from craft_jax.runtime import cpu_memory

cpu_memory.tune_malloc()

import jax
import numpy as np

from craft_jax import config as configs
from craft_jax import runs
from craft_jax.checkpoint.store import CheckpointStore
from craft_jax.config import Override
from craft_jax.models import base
from craft_jax.parallel import sharding
from craft_jax.training import optim
from craft_jax.training import state as states
from craft_jax.training import step as steps
from craft_jax.training.precision import Policy

VOCAB = 1024


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--rounds", type=int, default=6)
    return parser.parse_args()


def main() -> None:
    """Measures, and prints a line for each pair of segments."""
    args = _parse()
    overrides = [Override("data.batch_size", str(args.batch_size))]
    config = configs.load(str(ROOT / "configs" / "gpt.py:small"), overrides)
    model_def = base.define(
        config.model_class, runs.with_sizes(config.model, {"vocab_size": VOCAB})
    )
    optimizer = optim.make_optimizer(config.optim)
    mesh = sharding.make_mesh(config.parallel, jax.devices())
    train_step = jax.jit(
        steps.make_train_step(
            model_def,
            optimizer,
            optim.make_schedule(config.optim, config.training.num_steps),
            Policy.named(config.training.precision),
            seed=0,
        ),
        donate_argnums=0,
    )
    state = states.init_state(config.model_class, model_def.config, optimizer, seed=0, mesh=mesh)
    shape = (args.batch_size, config.data.seq_len)
    ids = np.random.default_rng(0).integers(VOCAB, size=shape).astype(np.int32)
    batch = sharding.put_batch({"tokens": ids, "targets": ids}, mesh)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint_cost_"))
    store = CheckpointStore(folder / "checkpoints")

    def segment(state: states.TrainState, *, saves: bool) -> tuple[states.TrainState, float]:
        start = time.monotonic()
        for step in range(args.steps):
            state, numbers = train_step(state, batch)
            float(numbers["loss"])
            if saves and step == 0:
                store.save(
                    int(state.step), state, meta={}, config={}, tokenizer=None, background=True
                )
            store.poll()
        return state, time.monotonic() - start

    try:
        state, _ = segment(state, saves=True)  # Compiles, and imports what Orbax needs.
        store.wait()
        times: dict[bool, list[float]] = {False: [], True: []}
        for number in range(args.rounds):
            for saves in (False, True) if number % 2 else (True, False):
                state, seconds = segment(state, saves=saves)
                store.wait()
                times[saves].append(seconds)
            print(f"without {times[False][-1]:.2f} s, with {times[True][-1]:.2f} s", flush=True)
        size = sum(p.stat().st_size for p in store.folder.rglob("*") if p.is_file())
        ratios = sorted(w / wo for w, wo in zip(times[True], times[False], strict=True))
        ratio = statistics.median(times[True]) / statistics.median(times[False])
        print(
            f"{model_def.num_params / 1e6:.1f}M parameters, {size / len(store.steps()) / 1e6:.0f} "
            f"MB each, every {args.steps} steps: time x {ratio:.3f} "
            f"[{ratios[0]:.3f} to {ratios[-1]:.3f}]"
        )
        print(json.dumps({"ratio": ratio, "pairs": ratios, "batch_size": args.batch_size}))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
