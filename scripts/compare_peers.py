"""Times ours beside what a user would take instead, in turns on the same machine.

    python scripts/compare_peers.py --nanogpt=PATH/TO/nanoGPT [--hf] [--require=1.0]

Train steps: forward, backward, clipping to norm 1 and AdamW, without dropout, beside nanoGPT's own
model code and beside a straightforward GPT in Flax NNX (`plain_gpt.py`). With `--hf` also greedy
decoding with GPT-2 of 124M parameters, beside the `generate` of transformers and beside one pass
over as many bytes as the weights have. It needs a checkout of nanoGPT and torch, and transformers
for `--hf`; it holds none of the peers' code.

Each program lives in a process of its own and they take turns, since machines are noisy: only the
ratios of one round mean anything. A ratio is the peer's time over ours: above 1, ours is faster.
`nanogpt+malloc` is the peer with the allocator setting that our trainer makes for itself.

The last line is JSON, also written below `outputs/benchmarks`. Exits 1 when the ratio of a train
step to nanoGPT's is below `--require`. On a GPU: `--device=gpu --dtype=bfloat16 --compile`.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# Layers, heads, width, context, batch, vocabulary; 50304 is GPT-2's, padded as nanoGPT pads it.
SHAPES = {
    "0.8m": (4, 4, 128, 64, 12, 65),
    "10.7m": (6, 6, 384, 256, 8, 65),
    "tiny": (4, 4, 128, 128, 16, 1024),
    "124m": (12, 12, 768, 1024, 8, 50304),
}
_BATCHES = 8
_PROMPT, _NEW = 32, 64

Step = Callable[[], float]


def our_step(args: argparse.Namespace, shape: tuple[int, ...]) -> Step:
    """Returns a function that makes one step of ours and returns its loss."""
    import jax

    from craft_jax.models import base
    from craft_jax.models.gpt import GPT, GPTConfig
    from craft_jax.parallel import sharding
    from craft_jax.parallel.sharding import ParallelConfig
    from craft_jax.training import optim
    from craft_jax.training import state as states
    from craft_jax.training.optim import OptimConfig
    from craft_jax.training.precision import Policy
    from craft_jax.training.step import make_train_step

    names = ("num_layers", "num_heads", "d_model", "max_seq_len")
    config = GPTConfig(vocab_size=shape[-1], **dict(zip(names, shape[:4], strict=True)))
    optim_config = OptimConfig(schedule="constant", warmup_steps=0, beta2=0.95)
    optimizer = optim.make_optimizer(optim_config)
    mesh = sharding.make_mesh(ParallelConfig(), jax.devices()[:1])
    policy = Policy.named(args.dtype)
    schedule, model_def = optim.make_schedule(optim_config, 1000), base.define(GPT, config)
    train_step = make_train_step(model_def, optimizer, schedule, policy, seed=0)
    train_step = sharding.compile_step(train_step, mesh)
    state = states.init_state(GPT, config, optimizer, seed=0, mesh=mesh, policy=policy)

    def step(tokens: np.ndarray, targets: np.ndarray) -> float:
        nonlocal state
        batch = {"tokens": tokens, "targets": targets}
        state, metrics = train_step(state, sharding.put_batch(batch, mesh))
        return float(metrics["loss"])

    return _on_batches(step, shape)


def plain_step(args: argparse.Namespace, shape: tuple[int, ...]) -> Step:
    """Returns the same for the straightforward GPT in Flax NNX, in float32."""
    import plain_gpt

    layers, heads, width, context, _, vocabulary = shape
    return _on_batches(plain_gpt.make_step(layers, heads, width, context, vocabulary), shape)


def nanogpt_step(args: argparse.Namespace, shape: tuple[int, ...]) -> Step:
    """Returns the same for nanoGPT's own model."""
    import torch

    sys.path.insert(0, args.nanogpt)
    from model import GPT, GPTConfig

    layers, heads, width, context, _, vocabulary = shape
    device = "cuda" if args.device == "gpu" else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
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
        ).to(device)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device)
    run = torch.compile(model) if args.compile else model
    narrow = torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16")

    def step(tokens: np.ndarray, targets: np.ndarray) -> float:
        ids = [torch.from_numpy(x.astype(np.int64)).to(device) for x in (tokens, targets)]
        with narrow:
            _, loss = run(*ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return _on_batches(step, shape)


def _on_batches(step: Callable[[np.ndarray, np.ndarray], float], shape: tuple[int, ...]) -> Step:
    *_, context, batch_size, vocabulary = shape
    rng = np.random.default_rng(1)
    ids = rng.integers(0, vocabulary, (2, _BATCHES, batch_size, context)).astype(np.int32)
    count = 0

    def next_step() -> float:
        nonlocal count
        count += 1
        return step(ids[0, count % _BATCHES], ids[1, count % _BATCHES])

    return next_step


# Decoding: each function makes a prompt longer and returns how many seconds one token took.


def our_decoding(rows: int, dtype: str) -> Callable[[int], None]:
    """Returns a function that adds so many tokens to each of the rows, greedily, with ours."""
    import jax

    from craft_jax.generation.generator import Generator
    from craft_jax.generation.sampling import SamplingConfig
    from craft_jax.models import base
    from craft_jax.models.gpt import GPT, GPTConfig

    config = GPTConfig(vocab_size=50257, num_layers=12, num_heads=12, d_model=768, max_seq_len=1024)
    params = jax.jit(lambda key: base.init_params(GPT, config, key))(jax.random.key(0))
    params = {path: value.astype(dtype) for path, value in params.items()}
    generator = Generator(base.define(GPT, config), max_len=1024, vocab_size=50257, end_id=None)
    prompts = np.random.default_rng(0).integers(50257, size=(rows, _PROMPT)).tolist()
    greedy = SamplingConfig(temperature=0.0)

    def add(new: int) -> None:
        made = generator.generate(params, prompts, max_new_tokens=new, config=greedy)
        assert all(len(row) == new for row in made)

    return add


def hf_decoding(rows: int) -> Callable[[int], None]:
    """Returns the same for transformers, which initialises GPT-2's weights at random."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(50257, size=(rows, _PROMPT)))
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 50256}

    def add(new: int) -> None:
        with torch.no_grad():
            made = model.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)
        assert made.shape == (rows, _PROMPT + new)

    return add


def reading() -> Callable[[int], None]:
    """Returns a function that reads the bytes of the weights so many times, in all threads."""
    import torch

    weights = torch.ones(124_439_808)

    def read(times: int) -> None:
        for _ in range(times):
            weights.sum()

    return read


def decoding(program: str, rows: int) -> Step:
    """Returns a function that decodes and returns the seconds of a call and of one more token."""
    if program == "memory":
        add = reading()
    elif program == "transformers":
        add = hf_decoding(rows)
    else:
        add = our_decoding(rows, "bfloat16" if program.endswith("bfloat16") else "float32")

    def timed(new: int) -> float:
        start = time.perf_counter()
        add(new)
        return time.perf_counter() - start

    for new in (1, _NEW):
        timed(new)

    def measure() -> tuple[float, float]:
        first, whole = timed(1), timed(_NEW)
        return whole, (whole - first) / (_NEW - 1)

    return measure


# One process for each program.


def work(args: argparse.Namespace) -> None:
    """Is one of the programs: measures as often as each line of standard input says."""
    kind, setting, program = args.worker.split("/")
    if program.startswith("craft_jax") or program.endswith("+malloc"):
        from craft_jax.runtime import cpu_memory

        cpu_memory.tune_malloc()
    if kind == "train":
        shape = _shape(setting, args)
        makers = {"craft_jax": our_step, "plain_nnx": plain_step}
        step = makers.get(program, nanogpt_step)(args, shape)
        print(json.dumps([step() for _ in range(3)]), flush=True)
    else:
        step = decoding(program, int(setting))
        print(json.dumps(None), flush=True)
    for line in sys.stdin:
        found = []
        for _ in range(int(line)):
            start = time.perf_counter()
            made = step()
            found.append(time.perf_counter() - start if kind == "train" else made)
        print(json.dumps(found), flush=True)


def _shape(setting: str, args: argparse.Namespace) -> tuple[int, ...]:
    name, _, batch = setting.partition("x")
    shape = SHAPES[name]
    return (*shape[:4], int(batch or shape[4]), shape[5])


class Programs:
    """The programs of one comparison, each in its own process, which take turns."""

    def __init__(self, kind: str, setting: str, names: list[str], args: argparse.Namespace):
        platform = {"JAX_PLATFORMS": "cpu"} if args.device == "cpu" else {}
        self.names = names
        self._children = {
            name: subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], f"--worker={kind}/{setting}/{name}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ
                | platform
                | {"PYTHONPATH": str(ROOT), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            )
            for name in names
        }
        for name in names:
            losses = self._answer(name)
            if losses:
                print(f"{setting} {name}: first losses {[round(x, 3) for x in losses]}")

    def measure(self, name: str, count: int) -> list:
        """Returns what a program found in so many measurements."""
        pipe = self._children[name].stdin
        pipe.write(f"{count}\n")
        pipe.flush()
        return self._answer(name)

    def _answer(self, name: str) -> list:
        line = self._children[name].stdout.readline()
        if not line:
            self.close()
            sys.exit(f"{name} ended without an answer: its error is above")
        return json.loads(line)

    def rounds(self, rounds: int, count: int) -> dict[str, list[list]]:
        """Returns, for each program and round, what it found."""
        found: dict[str, list[list]] = {name: [] for name in self.names}
        for number in range(rounds):
            for name in self.names if number % 2 else reversed(self.names):
                found[name].append(self.measure(name, count))
        return found

    def close(self) -> None:
        for child in self._children.values():
            child.stdin.close()
            child.wait()


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def _words(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} [{spread['min']:.2f} to {spread['max']:.2f}]"


def compare_training(setting: str, args: argparse.Namespace) -> dict:
    """Returns milliseconds of each program's step, and the ratios of the peers' to ours."""
    names = ["craft_jax"] if args.alone else ["nanogpt", "craft_jax"]
    if args.device == "cpu" and not args.alone:
        names.insert(1, "nanogpt+malloc")
        if args.dtype == "float32":
            names.insert(2, "plain_nnx")
    programs = Programs("train", setting, names, args)
    medians = {
        name: [statistics.median(seconds) for seconds in rounds]
        for name, rounds in programs.rounds(args.rounds, args.steps).items()
    }
    programs.close()
    found: dict = {"steps": args.rounds * args.steps}
    shape = _shape(setting, args)
    for name in names:
        pairs = zip(medians[name], medians["craft_jax"], strict=True)
        ms = 1e3 * statistics.median(medians[name])
        tokens = shape[3] * shape[4] / ms * 1e3
        ratio = _spread([peer / ours for peer, ours in pairs])
        found[name] = {
            "milliseconds": round(ms, 1),
            "tokens_per_second": round(tokens),
            "ratio": ratio,
        }
        if args.device == "gpu":
            found[name]["mfu"] = round(_mfu(shape, tokens, args), 4)
        end = "" if name == "craft_jax" else f"   its time over ours {_words(ratio)}"
        print(f"train {setting:8} {name:15} {ms:9.1f} ms {tokens:12,.0f} tokens/s{end}", flush=True)
    return found


def _mfu(shape: tuple[int, ...], tokens_per_second: float, args: argparse.Namespace) -> float:
    """Returns (6 N + 12 L H K T) FLOPs per token over the chip's rate; N without positions."""
    names = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
    )
    from craft_jax.runtime import hardware

    layers, heads, width, context, _, vocabulary = shape
    params = 12 * layers * width**2 + vocabulary * width
    flops = hardware.flops_per_token(
        params, num_layers=layers, num_heads=heads, head_width=width // heads, seq_len=context
    )
    return flops * tokens_per_second / hardware.stated_peak(names.stdout.splitlines()[0])[0]


def compare_decoding(rows: int, args: argparse.Namespace) -> dict:
    """Returns tokens per second of each program, and the ratios of the peers' times to ours."""
    names = ["transformers", "memory", "craft_jax", "craft_jax bfloat16"]
    programs = Programs("decode", str(rows), names, args)
    found = programs.rounds(args.rounds, 1)
    programs.close()
    calls = {name: [pair[0][0] for pair in rounds] for name, rounds in found.items()}
    tokens = {name: [pair[0][1] for pair in rounds] for name, rounds in found.items()}
    result: dict = {"new_tokens": args.rounds * _NEW, "prompt_tokens": _PROMPT}
    for name in names:
        rate = rows / statistics.median(tokens[name])
        pairs = zip(calls[name], calls["craft_jax"], strict=True)
        result[name] = {"tokens_per_second": round(rate, 1)}
        if name != "memory":
            result[name]["ratio"] = _spread([peer / ours for peer, ours in pairs])
            bound = zip(tokens["memory"], tokens[name], strict=True)
            result[name]["of_memory_bound"] = _spread([read / ours for read, ours in bound])
            end = f"of the memory bound {_words(result[name]['of_memory_bound'])}"
            if name != "craft_jax":
                end += f"   its time over ours {_words(result[name]['ratio'])}"
        else:
            end = "if reading the float32 weights were all"
        print(f"decode, {rows} rows   {name:18} {rate:8.1f} tokens/s   {end}", flush=True)
    return result


def main() -> int:
    """Runs the comparisons and prints the ratios."""
    from craft_jax import outputs

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", help="a checkout of nanoGPT")
    parser.add_argument("--alone", action="store_true", help="our train steps without nanoGPT's")
    parser.add_argument("--hf", action="store_true", help="decode beside transformers, too")
    parser.add_argument("--require", type=float, help="the least ratio of a step to nanoGPT's")
    parser.add_argument("--shape", choices=SHAPES, nargs="*", default=["0.8m", "10.7m"])
    parser.add_argument("--batches", type=int, nargs="*", help="in place of a shape's batch size")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8], help="rows that decode")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of each program in a round")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="nanoGPT with torch.compile")
    parser.add_argument("--workdir", default="outputs", help="where the figures are written")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return 0
    if args.nanogpt is None and not args.alone:
        parser.error("--nanogpt=PATH, a checkout of nanoGPT, is needed; or --alone")
    if not args.alone and not (Path(args.nanogpt) / "model.py").is_file():
        parser.error(f"--nanogpt={args.nanogpt}: there is no model.py; name a checkout of nanoGPT")
    for package in ["torch"] * (args.hf or not args.alone) + ["transformers"] * args.hf:
        if importlib.util.find_spec(package) is None:
            parser.error(f"{package} is not installed; the peer needs it")
    settings = [f"{s}x{b}" if b else s for s in args.shape for b in args.batches or [None]]
    result: dict = {"device": args.device, "dtype": args.dtype}
    result["train"] = {setting: compare_training(setting, args) for setting in settings}
    if args.hf:
        result["decode"] = {f"{rows} rows": compare_decoding(rows, args) for rows in args.rows}
    ratios = [f["nanogpt"]["ratio"]["median"] for f in result["train"].values() if "nanogpt" in f]
    least = min(ratios, default=None)
    file = outputs.benchmark_file(Path(args.workdir), "peers", args.device)
    outputs.write_json(file, result)
    print(f"written to {file}")
    print(json.dumps(result))
    if args.require is not None and least is not None and least < args.require:
        print(f"a train step took {1 / least:.2f} of nanoGPT's time", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
