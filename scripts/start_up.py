"""Times the way from the command to the first step, and its memory, beside a bare script.

    python scripts/start_up.py [--config=configs/gpt.py] [--rounds=5]

The bare script imports jax, flax and optax, compiles the same step and makes it, with batches of
zeros; it has no data, no logs, no callbacks. The train command runs with its data prepared, first
with an empty compilation cache and then with what that run left in it. They take turns, and only
ratios within a round mean anything. Then both make some steps, evaluations, samples and a
checkpoint included in ours, and the peaks of their memory are compared. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

_STEPS = 60


def bare(config_file: str, num_steps: int) -> None:
    """Is the bare script: makes so many steps of a config, and says when the first was done."""
    import flax
    import jax
    import numpy as np
    import optax

    assert flax and optax
    from craft_jax import config as configs
    from craft_jax.models import base
    from craft_jax.training import optim
    from craft_jax.training import state as states
    from craft_jax.training.precision import Policy
    from craft_jax.training.step import make_train_step

    config = configs.load(config_file, [])
    vocab_size = config.model.vocab_size or config.data.vocab_size
    model_config = type(config.model)(**vars(config.model) | {"vocab_size": vocab_size})
    optimizer = optim.make_optimizer(config.optim)
    step = jax.jit(
        make_train_step(
            base.define(config.model_class, model_config),
            optimizer,
            optim.make_schedule(config.optim, config.training.num_steps),
            Policy.named(config.training.precision),
            seed=0,
        ),
        donate_argnums=0,
    )

    @jax.jit
    def init(key: jax.Array) -> states.TrainState:
        params = base.init_params(config.model_class, model_config, key)
        return states.from_params(params, optimizer)

    state = init(jax.random.key(0))
    zeros = np.zeros((config.data.batch_size, config.data.seq_len), np.int32)
    for number in range(num_steps):
        state, metrics = step(state, {"tokens": zeros, "targets": zeros})
        float(metrics["loss"])
        if not number:
            print("first step", flush=True)


def first_step_of_bare(args: argparse.Namespace) -> float:
    """Returns the seconds from the start of the bare script to its first step."""
    start = time.monotonic()
    command = [sys.executable, __file__, f"--config={args.config}", "--bare=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=_environment(args, None)) as child:
        assert child.stdout is not None and child.stdout.readline(), "the bare script failed"
        return time.monotonic() - start


def first_step_of_ours(args: argparse.Namespace, workdir: Path, cache: Path) -> float:
    """Returns the seconds from the train command to the line of its first step."""
    start = time.monotonic()
    with subprocess.Popen(
        _train(args, workdir, num_steps=1000),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_environment(args, cache),
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(b"step 1/"):
                seconds = time.monotonic() - start
                child.kill()
                return seconds
    sys.exit("the train command failed; run `python -m craft_jax.main` to see why")


def peak_bytes(command: list[str], env: dict[str, str]) -> int:
    """Runs a command and returns the peak of its memory."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, command
    return usage.ru_maxrss * 1024


def _train(args: argparse.Namespace, workdir: Path, num_steps: int) -> list[str]:
    return [
        *(sys.executable, "-m", "craft_jax.main", f"--config={args.config}"),
        *(f"--workdir={workdir}", f"--config.training.num_steps={num_steps}"),
        *("--config.training.log_every=1", f"--config.training.eval_every={_STEPS // 2}"),
    ]


def _environment(args: argparse.Namespace, cache: Path | None) -> dict[str, str]:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    # As users have it, who did not ask Python to compile our source code at every start.
    for name in ("JAX_COMPILATION_CACHE_DIR", "PYTHONDONTWRITEBYTECODE"):
        env.pop(name, None)
    return env | ({"XDG_CACHE_HOME": str(cache)} if cache else {})


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def main() -> int:
    """Runs both in turns and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "configs/gpt.py"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        bare(args.config, args.bare)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "outputs"
        prepare = [sys.executable, "-m", "craft_jax.main", "prepare", f"--config={args.config}"]
        env = _environment(args, Path(folder) / "cache")
        subprocess.run(
            [*prepare, f"--workdir={workdir}"], check=True, stdout=subprocess.DEVNULL, env=env
        )
        seconds: dict[str, list[float]] = {"bare": [], "first": [], "second": []}
        for number in range(args.rounds):
            cache = Path(folder) / f"cache{number}"
            seconds["bare"].append(first_step_of_bare(args))
            for name in ("first", "second"):
                seconds[name].append(first_step_of_ours(args, workdir, cache))
        ours = peak_bytes(_train(args, workdir, _STEPS), env)
        command = [sys.executable, __file__, f"--config={args.config}", f"--bare={_STEPS}"]
        beside = peak_bytes(command, _environment(args, None))
    result = {
        "seconds": {name: _spread(values) for name, values in seconds.items()},
        "first_over_bare": _spread(
            [a / b for a, b in zip(seconds["first"], seconds["bare"], strict=True)]
        ),
        "second_over_first": _spread(
            [a / b for a, b in zip(seconds["second"], seconds["first"], strict=True)]
        ),
        "peak_bytes": {"bare": beside, "ours": ours},
        "peak_over_bare": round(ours / beside, 3),
    }
    for name in ("first_over_bare", "second_over_first", "peak_over_bare"):
        print(f"{name:18} {result[name]}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
