"""Times our train step beside a peer's, step against step on the same machine.

    python scripts/compare_peers.py --nanogpt=PATH/TO/nanoGPT [--shape=small] [--require=1.8]

It needs a checkout of nanoGPT and torch; it holds none of the peer's code. Each program lives in a
process of its own and they take turns, since machines are noisy: only the ratios of one round mean
anything. Both do forward, backward, clipping to norm 1 and AdamW in float32, without dropout.
`nanogpt+malloc` is the peer with the allocator setting that our trainer makes for itself.

The last line is JSON, also written below `outputs/benchmarks`. Exits 1 when our step takes more
than `--require` times the peer's.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from craft_jax import outputs

# Layers, heads, width, context, batch, vocabulary.
SHAPES = {
    "small": (6, 6, 384, 256, 8, 65),
    "cpu": (4, 4, 128, 64, 12, 65),
    "tiny": (4, 4, 128, 128, 16, 1024),
}
PROGRAMS = ("nanogpt", "nanogpt+malloc", "craft_jax")
_BATCHES = 8


def our_step(shape: tuple[int, ...]) -> Callable[[], float]:
    """Returns a function that makes one step of ours and returns its loss."""
    import jax
    import numpy as np

    from craft_jax import optim, sharding
    from craft_jax.models import base
    from craft_jax.models.gpt import GPT, GPTConfig
    from craft_jax.optim import OptimConfig
    from craft_jax.precision import Policy
    from craft_jax.sharding import ParallelConfig
    from craft_jax.training import state as states
    from craft_jax.training.step import make_train_step

    layers, heads, width, context, batch_size, vocabulary = shape
    config = GPTConfig(
        vocab_size=vocabulary,
        num_layers=layers,
        num_heads=heads,
        d_model=width,
        max_seq_len=context,
    )
    optim_config = OptimConfig(schedule="constant", warmup_steps=0, beta2=0.95)
    optimizer = optim.make_optimizer(optim_config)
    mesh = sharding.make_mesh(ParallelConfig(), jax.devices()[:1])
    train_step = jax.jit(
        make_train_step(
            base.define(GPT, config),
            optimizer,
            optim.make_schedule(optim_config, 1000),
            Policy.named("float32"),
            seed=0,
        ),
        donate_argnums=0,
    )
    state = states.init_state(GPT, config, optimizer, seed=0, mesh=mesh)
    rng = np.random.default_rng(1)
    ids = rng.integers(0, vocabulary, (2, _BATCHES, batch_size, context)).astype(np.int32)
    count = 0

    def step() -> float:
        nonlocal state, count
        batch = {"tokens": ids[0, count % _BATCHES], "targets": ids[1, count % _BATCHES]}
        count += 1
        state, metrics = train_step(state, sharding.put_batch(batch, mesh))
        return float(metrics["loss"])

    return step


def nanogpt_step(path: str, shape: tuple[int, ...]) -> Callable[[], float]:
    """Returns a function that makes one step of nanoGPT's own model and returns its loss."""
    import torch

    sys.path.insert(0, path)
    from model import GPT, GPTConfig

    layers, heads, width, context, batch_size, vocabulary = shape
    with contextlib.redirect_stdout(io.StringIO()):
        model = GPT(
            GPTConfig(
                n_layer=layers,
                n_head=heads,
                n_embd=width,
                block_size=context,
                vocab_size=vocabulary,
                dropout=0.0,
                bias=True,
            )
        )
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    ids = torch.randint(0, vocabulary, (2, _BATCHES, batch_size, context))
    count = 0

    def step() -> float:
        nonlocal count
        _, loss = model(ids[0, count % _BATCHES], ids[1, count % _BATCHES])
        count += 1
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def work(program: str, args: argparse.Namespace) -> None:
    """Is one of the two programs: makes so many steps as each line of standard input says."""
    if program != "nanogpt":
        from craft_jax import runtime

        runtime.keep_freed_memory()
    shape = SHAPES[args.shape]
    step = our_step(shape) if program == "craft_jax" else nanogpt_step(args.nanogpt, shape)
    losses = [step() for _ in range(3)]
    print(json.dumps(losses), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


def main() -> int:
    """Runs the programs in turn and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", required=True, help="a checkout of nanoGPT")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of each program in a round")
    parser.add_argument("--require", type=float, help="the largest ratio that is good enough")
    parser.add_argument("--workdir", default="outputs", help="where the figures are written")
    parser.add_argument("--worker", choices=PROGRAMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args)
        return 0
    if not (Path(args.nanogpt) / "model.py").is_file():
        parser.error(f"--nanogpt={args.nanogpt}: there is no model.py; name a checkout of nanoGPT")
    children = {
        name: subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], f"--worker={name}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        )
        for name in PROGRAMS
    }
    for name, child in children.items():
        print(f"{name}: first losses {[round(x, 3) for x in json.loads(child.stdout.readline())]}")
    medians: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for number in range(args.rounds):
        for name in PROGRAMS if number % 2 else reversed(PROGRAMS):
            children[name].stdin.write(f"{args.steps}\n")
            children[name].stdin.flush()
            medians[name].append(statistics.median(json.loads(children[name].stdout.readline())))
    for child in children.values():
        child.stdin.close()
        child.wait()
    result = {"shape": args.shape}
    for name in PROGRAMS:
        ratios = [ours / peer for ours, peer in zip(medians[name], medians["nanogpt"], strict=True)]
        result[name] = {
            "milliseconds": round(1e3 * statistics.median(medians[name]), 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_min": round(min(ratios), 3),
            "ratio_max": round(max(ratios), 3),
        }
        print(
            f"{name:15} {result[name]['milliseconds']:8.1f} ms   ratio {result[name]['ratio']:.2f} "
            f"[{min(ratios):.2f} to {max(ratios):.2f}]"
        )
    file = outputs.benchmark_file(Path(args.workdir), f"peers_{args.shape}", "cpu")
    outputs.write_json(file, result)
    print(f"written to {file}")
    print(json.dumps(result))
    return int(args.require is not None and result["craft_jax"]["ratio"] > args.require)


if __name__ == "__main__":
    sys.exit(main())
