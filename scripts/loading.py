"""Measures what loading data costs: python scripts/loading.py [--config=...].

First the loader alone, for each layout: tokens per second of batches made and thrown away. Then the
train step, on batches that are loaded as training loads them, and on one that stays on the device,
turn about. Prints the ratio of the medians with its spread, and the last line as JSON.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax

from craft_jax import config as configs
from craft_jax import runs
from craft_jax.data import loading, pipeline
from craft_jax.data.base import Dataset
from craft_jax.models import base
from craft_jax.parallel import sharding
from craft_jax.runtime import cpu_memory
from craft_jax.training import optim
from craft_jax.training import state as states
from craft_jax.training import step as steps
from craft_jax.training.precision import Policy

_ALONE_SECONDS = 2.0


def main() -> None:
    """Measures both and prints what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default=str(ROOT / "configs/gpt.py:small"))
    parser.add_argument("--batch_size", type=int, default=8, help="of the step; small has 64")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--workdir", help="where the token cache is kept; else it is thrown away")
    args = parser.parse_args()
    cpu_memory.tune_malloc()
    config = configs.load(args.config)
    result: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(args.workdir or folder).absolute()
        for layout in ("concatenated", "packed", "rows"):
            data = dataclasses.replace(config.data, layout=layout)
            train = pipeline.open_datasets(data, workdir=workdir, seed=0).train
            speed = alone(train, data.batch_size * data.seq_len)
            result[f"{layout} tokens/s"] = round(speed)
            print(f"loader alone, {layout}: {speed / 1e6:.1f} million tokens/s", flush=True)
        data = dataclasses.replace(config.data, batch_size=args.batch_size)
        train = pipeline.open_datasets(data, workdir=workdir, seed=0).train
        loaded, constant = beside(config, train, args)
    ratio = statistics.median(loaded) / statistics.median(constant)
    pairs = sorted(a / b for a, b in zip(loaded, constant, strict=True))
    result |= {
        "step with loading / without": round(ratio, 4),
        "median of pairs": round(statistics.median(pairs), 4),
        "quarters": [round(pairs[len(pairs) // 4], 4), round(pairs[-len(pairs) // 4], 4)],
        "rounds": len(pairs),
    }
    print(json.dumps(result))


def alone(data: Dataset, num_tokens: int) -> float:
    """Returns the tokens per second of batches that are made and thrown away."""
    data.batch(0)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < _ALONE_SECONDS:
        loading.read_batch(data, count)
        count += 1
    return count * num_tokens / (time.perf_counter() - start)


def beside(
    config: configs.ExperimentConfig, data: Dataset, args: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Returns the seconds of steps on loaded batches, and on one that stays, turn about."""
    model_config = runs.with_sizes(config.model, {"vocab_size": data.vocab_size})
    model_def = base.define(config.model_class, model_config)
    optimizer = optim.make_optimizer(config.optim)
    mesh = sharding.make_mesh(config.parallel, jax.devices())
    train_step = steps.make_train_step(
        model_def,
        optimizer,
        optim.make_schedule(config.optim, config.training.num_steps),
        Policy.named(config.training.precision),
        seed=0,
    )
    step = sharding.compile_step(train_step, mesh)
    state = states.init_state(config.model_class, model_config, optimizer, seed=0, mesh=mesh)
    kept = sharding.put_batch(data.batch(0), mesh)
    batches = loading.load_batches(
        data,
        0,
        args.rounds + 2,
        workers=args.workers,
        ahead=config.data.prefetch,
        then=lambda batch: sharding.put_batch(batch, mesh),
    )
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(args.rounds + 2):
        for which in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            batch = next(batches) if which == 0 else kept
            state, _ = step(state, batch)
            jax.block_until_ready(state)
            if number > 1:  # The first compile.
                times[which].append(time.perf_counter() - start)
    batches.close()
    return times


if __name__ == "__main__":
    main()
