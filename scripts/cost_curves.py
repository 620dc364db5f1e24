"""Measures how a train step grows: python scripts/cost_curves.py [--out=PICTURE.png].

One size at a time is changed around 4 layers of width 256, context 256 and batch 4: layers, width,
context, batch. Time is the median of steps that take turns with those of the unchanged model, as a
ratio to them; memory is what XLA's plan of the compiled step says, the state and its scratch space.
Prints a table in Markdown, and JSON as the last line.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from craft_jax.models import base
from craft_jax.models.gpt import GPT, GPTConfig
from craft_jax.parallel import sharding
from craft_jax.parallel.sharding import ParallelConfig
from craft_jax.runtime import cpu_memory
from craft_jax.training import optim
from craft_jax.training import state as states
from craft_jax.training.optim import OptimConfig
from craft_jax.training.precision import FLOAT32
from craft_jax.training.step import make_train_step

_HERE = {"layers": 4, "width": 256, "context": 256, "batch": 4}
_TRIED = {
    "layers": (1, 2, 4, 8, 16),
    "width": (64, 128, 256, 512, 1024),
    "context": (64, 128, 256, 512, 1024),
    "batch": (1, 2, 4, 8, 16),
}
_VOCABULARY = 1024
_HEAD_WIDTH = 64


def make(sizes: dict[str, int]) -> tuple[Callable[[], Any], dict[str, int]]:
    """Returns a function that makes one step, and bytes and parameters of a model."""
    config = GPTConfig(
        vocab_size=_VOCABULARY,
        num_layers=sizes["layers"],
        num_heads=sizes["width"] // _HEAD_WIDTH,
        d_model=sizes["width"],
        max_seq_len=sizes["context"],
    )
    model_def, optimizer = base.define(GPT, config), optim.make_optimizer(OptimConfig())
    schedule = optim.make_schedule(OptimConfig(), 1000)
    mesh = sharding.make_mesh(ParallelConfig(), jax.devices()[:1])
    state = states.init_state(GPT, config, optimizer, seed=0, mesh=mesh)
    rng = np.random.default_rng(0)
    shape = (2, sizes["batch"], sizes["context"])
    tokens, targets = rng.integers(_VOCABULARY, size=shape).astype(np.int32)
    batch = sharding.put_batch({"tokens": tokens, "targets": targets}, mesh)
    step = (
        sharding.compile_step(
            make_train_step(model_def, optimizer, schedule, FLOAT32, seed=0), mesh
        )
        .lower(state, batch)
        .compile()
    )
    plan = step.memory_analysis()

    def once() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    return once, {
        "parameters": model_def.num_params,
        "state_bytes": plan.argument_size_in_bytes,
        "scratch_bytes": plan.temp_size_in_bytes,
    }


def seconds(work: Callable[[], Any]) -> float:
    """Returns how long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(rounds: int) -> list[dict[str, Any]]:
    """Returns a line for each size that was tried."""
    unchanged, _ = make(_HERE)
    lines = []
    for name, values in _TRIED.items():
        for value in values:
            step, found = make(_HERE | {name: value})
            seconds(step), seconds(unchanged)
            pairs = [(seconds(step), seconds(unchanged)) for _ in range(rounds)]
            ratios = sorted(a / b for a, b in pairs)
            lines.append(
                {
                    "changed": name,
                    "value": value,
                    "milliseconds": round(1e3 * statistics.median(a for a, _ in pairs), 1),
                    "ratio": round(statistics.median(ratios), 3),
                    "quarters": [round(ratios[i], 3) for i in (rounds // 4, -1 - rounds // 4)],
                    **found,
                }
            )
            print(lines[-1], file=sys.stderr)
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Returns the lines in Markdown."""
    rows = ["| | | parameters | step | to the middle [quarters] | state | scratch |"]
    rows.append("|---|--:|--:|--:|--:|--:|--:|")
    for line in lines:
        low, high = line["quarters"]
        rows.append(
            f"| {line['changed']} | {line['value']} | {line['parameters'] / 1e6:.2f}M "
            f"| {line['milliseconds']:.0f} ms | {line['ratio']:.2f} [{low:.2f} to {high:.2f}] "
            f"| {line['state_bytes'] / 1e6:.0f} MB | {line['scratch_bytes'] / 1e6:.0f} MB |"
        )
    return "\n".join(rows)


def draw(lines: list[dict[str, Any]], file: Path) -> None:
    """Draws time and memory against each size, on logarithmic axes."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(_TRIED), sharey="row")
    for column, name in enumerate(_TRIED):
        own = [line for line in lines if line["changed"] == name]
        values = [line["value"] for line in own]
        top, bottom = axes[0, column], axes[1, column]
        top.loglog(values, [line["ratio"] for line in own], "o-")
        for field, label in (("state_bytes", "state"), ("scratch_bytes", "scratch")):
            bottom.loglog(values, [line[field] / 1e6 for line in own], "o-", label=label)
        middle = _HERE[name]
        top.loglog(values, [v / middle for v in values], "k:", lw=1, label="in proportion")
        top.set_title(name)
        bottom.set_xlabel(name)
        for axis in (top, bottom):
            axis.set_xticks(values, [str(v) for v in values])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("time of a step, to the middle")
    axes[1, 0].set_ylabel("MB")
    axes[0, 0].legend(fontsize="small")
    axes[1, 0].legend(fontsize="small")
    figure.savefig(file, dpi=110)


def main() -> int:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", default=str(ROOT / "docs/images/cost_curves.png"), help="the picture"
    )
    parser.add_argument("--rounds", type=int, default=9, help="steps of each size")
    args = parser.parse_args()
    cpu_memory.tune_malloc()
    lines = measure(args.rounds)
    draw(lines, Path(args.out))
    print(table(lines))
    print(json.dumps(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
