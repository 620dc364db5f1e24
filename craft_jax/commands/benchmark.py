"""benchmark: how fast a config trains and samples here, and how near that is to what could be."""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from craft_jax import outputs, runs, schema
from craft_jax.commands import data_config, report
from craft_jax.config import ExperimentConfig
from craft_jax.data import loading, pipeline
from craft_jax.data.base import Batch, Dataset, sizes_of
from craft_jax.errors import OK, UsageError
from craft_jax.generation.sampling import SamplingConfig
from craft_jax.models import base
from craft_jax.models.base import EncoderDecoderModel, ModelDef, TokenModel
from craft_jax.parallel import sharding
from craft_jax.runtime import cpu_memory, environment
from craft_jax.runtime import hardware as profiling
from craft_jax.training import optim
from craft_jax.training import state as states
from craft_jax.training import step as steps
from craft_jax.training.precision import Policy
from craft_jax.training.state import TrainState

_ALONE_SECONDS = 1.0
_DECODE_ROUNDS = 3


def run(args: argparse.Namespace) -> int:
    """Measures the train step, loading, sampling, memory and start-up of a config."""
    if args.steps < 1 or min(args.decode_batches) < 1:
        raise UsageError(
            f"`steps={args.steps}` and `decode_batches={args.decode_batches}` must be at least 1"
        )
    config, tokenizer, workdir = data_config.choose(args)
    outputs.check_writable(workdir)
    cpu_memory.tune_malloc()
    mesh = sharding.make_mesh(config.parallel, jax.devices())
    sharding.check_batch(config.data.batch_size, config.training.accumulate, mesh)
    start = {"imports": profiling.seconds_since_start()}
    data = pipeline.open_datasets(
        config.data, workdir=workdir, seed=config.training.seed, tokenizer=tokenizer
    ).train
    start["data"] = profiling.seconds_since_start()
    model_config = runs.with_sizes(config.model, sizes_of(data))
    model_def = base.define(config.model_class, model_config)
    measured = _training(config, model_def, data, mesh, args.steps, start)
    measured["loader"] = _loader(config, data)
    measured["start_up_seconds"] = start
    is_text = issubclass(config.model_class, TokenModel)
    if is_text and not issubclass(config.model_class, EncoderDecoderModel):
        measured["sampling"] = _sampling(config, model_def, args.decode_batches)
    device = jax.devices()[0]
    measured["memory"] |= {
        "device_peak_bytes": profiling.peak_device_bytes(device),
        "host_peak_bytes": profiling.peak_host_bytes(),
    }
    measured |= {"config": config.to_json(), "environment": environment.environment()}
    word, hardware = report.model_word(config), device.device_kind.replace(" ", "-").lower()
    size = report.size_word(model_def.num_params)
    file = outputs.benchmark_file(workdir, f"{word}_{size}", hardware)
    outputs.write_json(file, measured)
    picture = file.with_suffix(".png")
    _draw(measured, picture, f"{word} {size} on {device.device_kind}")
    print("\n".join(_table(measured)))
    print(f"written to        {file}\npicture           {picture}")
    print(json.dumps({name: measured[name] for name in ("tokens_per_second", "mfu")}))
    return OK


def _training(
    config: ExperimentConfig,
    model_def: ModelDef,
    data: Dataset,
    mesh: jax.sharding.Mesh,
    rounds: int,
    start: dict[str, float | None],
) -> dict[str, Any]:
    """Measures the step, and its parts in turns with it."""
    optimizer, training = optim.make_optimizer(config.optim, model_def.constants), config.training
    policy = Policy.named(training.precision)
    host_batch = loading.read_batch(data, 0)
    batch = sharding.put_batch(host_batch, mesh)
    state = states.init_state(
        config.model_class, model_def.config, optimizer, seed=training.seed, mesh=mesh
    )
    train_step = steps.make_train_step(
        model_def,
        optimizer,
        optim.make_schedule(config.optim, training.num_steps),
        policy,
        seed=training.seed,
        accumulate=training.accumulate,
        remat=training.remat,
        loss_config=config.loss,
    )
    before = time.perf_counter()
    step = sharding.compile_step(train_step, mesh).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - before
    memory = step.memory_analysis()
    # The parts see one micro-batch, as the step does several times.
    part = {k: v[: len(v) // training.accumulate] for k, v in host_batch.items()}
    forward, backward = _parts(model_def, policy, sharding.put_batch(part, mesh), training.remat)
    times: dict[str, list[float]] = {"step": [], "forward": [], "backward": []}
    for number in range(rounds + 1):
        for name, timed in times.items():
            began = time.perf_counter()
            if name == "step":
                state, metrics = step(state, batch)
                jax.block_until_ready((state, metrics))
            else:
                work = forward if name == "forward" else backward
                jax.block_until_ready(work(state))
            if number:  # The first round compiles.
                timed.append(time.perf_counter() - began)
            elif name == "step":
                start["first_step"] = profiling.seconds_since_start()
    return _summary(config, model_def, host_batch, times, mesh) | {
        "compile_seconds": compile_seconds,
        "memory": {
            "step_temporary_bytes": memory.temp_size_in_bytes if memory else None,
            "step_argument_bytes": memory.argument_size_in_bytes if memory else None,
        },
    }


def _parts(
    model_def: ModelDef, policy: Policy, batch: Batch, remat: bool
) -> tuple[Callable[[TrainState], Any], Callable[[TrainState], Any]]:
    """Returns the forward pass alone, and with the backward pass, as functions of a state."""

    def objective(params: base.Params, batch: Batch) -> jax.Array:
        model = model_def.merge(policy.cast(params))
        return model.loss(batch, key=jax.random.key(0), remat=remat).loss

    forward, backward = jax.jit(objective), jax.jit(jax.grad(objective))
    return (lambda state: forward(state.params, batch)), (lambda s: backward(s.params, batch))


def _summary(
    config: ExperimentConfig,
    model_def: ModelDef,
    batch: Batch,
    times: dict[str, list[float]],
    mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
    parts, seconds = config.training.accumulate, {k: statistics.median(v) for k, v in times.items()}
    tokens = batch["tokens"] if "tokens" in batch else next(iter(batch.values()))
    items = tokens.size if "tokens" in batch else len(tokens)
    forward, backward = parts * seconds["forward"], parts * seconds["backward"]
    found: dict[str, Any] = {
        "parameters": model_def.num_params,
        "step_seconds": seconds["step"],
        "step_seconds_all": times["step"],
        "forward_seconds": forward,
        "backward_seconds": max(0.0, backward - forward),
        "optimizer_seconds": max(0.0, seconds["step"] - backward),
        "tokens_per_second": items / seconds["step"],
        "mfu": None,
    }
    model, sizes = model_def.config, schema.values(model_def.config)
    if "tokens" in batch and {"num_layers", "num_heads", "d_model"} <= sizes.keys():
        flops = profiling.flops_per_token(
            model_def.num_params,
            num_layers=model.num_layers,
            num_heads=model.num_heads,
            head_width=model.d_model // model.num_heads,
            seq_len=tokens.shape[1],
        )
        peak, origin = profiling.peak_flops(jax.devices()[0])
        # Several devices of a host's CPU are one machine.
        count = 1 if mesh.devices.flat[0].platform == "cpu" else mesh.size
        found["flops_per_token"] = flops
        found["peak_flops"] = {"per_device": peak, "devices": count, "origin": origin}
        found["mfu"] = flops * found["tokens_per_second"] / (peak * count)
    return found


def _loader(config: ExperimentConfig, data: Dataset) -> dict[str, float]:
    """Measures batches that are made and thrown away."""
    start, count, items = time.perf_counter(), 0, 0
    while (seconds := time.perf_counter() - start) < _ALONE_SECONDS:
        batch = loading.read_batch(data, count)
        items += batch["tokens"].size if "tokens" in batch else config.data.batch_size
        count += 1
    return {"batches_per_second": count / seconds, "tokens_per_second": items / seconds}


def _sampling(
    config: ExperimentConfig, model_def: ModelDef, batches: list[int]
) -> list[dict[str, float]]:
    """Measures reading prompts of half the context, and adding the other half token by token."""
    policy = Policy.named(config.training.precision)
    params = jax.jit(functools.partial(base.init_params, config.model_class, model_def.config))(
        jax.random.key(0)
    )
    params = jax.device_put(policy.cast(params), jax.local_devices()[0])
    generator = runs.make_generator(config, model_def, None, stop_at_end=False)
    half = max(1, model_def.config.max_seq_len // 2)
    rng, found = np.random.default_rng(0), []
    for rows in batches:
        prompts = rng.integers(model_def.config.vocab_size, size=(rows, half)).tolist()

        def seconds(new: int, prompts: list[list[int]] = prompts) -> float:
            options = {"max_new_tokens": new, "config": SamplingConfig(temperature=0.0)}
            work = functools.partial(generator.generate, params, prompts, **options)
            return profiling.median_seconds(work, _DECODE_ROUNDS)

        prefill, whole = seconds(1), seconds(half)
        found.append(
            {
                "rows": rows,
                "prompt_tokens": half,
                "prefill_tokens_per_second": rows * half / prefill,
                "decode_tokens_per_second": rows * (half - 1) / max(whole - prefill, 1e-9),
            }
        )
    return found


# What is shown.


def _table(measured: dict[str, Any]) -> list[str]:
    times = sorted(measured["step_seconds_all"])
    low, high = times[len(times) // 4], times[-(len(times) // 4) - 1]
    step = measured["step_seconds"]
    rows = [
        ("train step", f"{step * 1e3:.1f} ms, quarters {low * 1e3:.1f} to {high * 1e3:.1f}"),
        *(
            (f"  {name}", f"{measured[f'{name}_seconds'] * 1e3:.1f} ms")
            for name in ("forward", "backward", "optimizer")
        ),
        ("throughput", f"{measured['tokens_per_second']:,.0f} tokens/s"),
    ]
    if measured["mfu"] is not None:
        peak = measured["peak_flops"]
        rows.append(("FLOPs per token", f"{measured['flops_per_token']:.4g} = 6 N + 12 L H K T"))
        rows.append(
            (
                "MFU",
                f"{measured['mfu']:.1%} of {peak['devices']} x {peak['per_device']:.4g} FLOP/s "
                f"({peak['origin']})",
            )
        )
    loader, memory = measured["loader"], measured["memory"]
    rows.append(("compile", f"{measured['compile_seconds']:.1f} s"))
    rows.append(("loader alone", f"{loader['tokens_per_second']:,.0f} tokens/s"))
    for found in measured.get("sampling", []):
        rows.append(
            (
                f"sampling, {found['rows']} rows",
                f"prefill {found['prefill_tokens_per_second']:,.0f}, decode "
                f"{found['decode_tokens_per_second']:,.0f} tokens/s",
            )
        )
    named = [
        f"{label} {memory[name] / 1e6:,.0f} MB"
        for label, name in (
            ("host peak", "host_peak_bytes"),
            ("device peak", "device_peak_bytes"),
            ("temporary of the step", "step_temporary_bytes"),
        )
        if memory[name] is not None
    ]
    rows.append(("memory", ", ".join(named)))
    start = measured["start_up_seconds"]
    words = [f"{name.replace('_', ' ')} {s:.1f} s" for name, s in start.items() if s is not None]
    rows.append(("since the start", ", ".join(words) or "unknown on this system"))
    return [f"{name:<17} {value}" for name, value in rows]


def _draw(measured: dict[str, Any], file: Path, title: str) -> None:
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)
    bottom = 0.0
    for name in ("forward", "backward", "optimizer"):
        height = measured[f"{name}_seconds"] * 1e3
        left.bar(["step"], [height], bottom=bottom, label=f"{name} {height:.1f} ms", width=0.5)
        bottom += height
    left.set_ylabel("ms")
    left.set_title(f"train step: {measured['tokens_per_second']:,.0f} tokens/s")
    left.set_xlim(-0.4, 1.4)  # Room for the legend.
    left.legend(fontsize="small", loc="center right")
    found = measured.get("sampling", [])
    rows = [str(f["rows"]) for f in found]
    decode = [f["decode_tokens_per_second"] for f in found]
    right.bar(rows, decode, color="C3")
    right.set_xlabel("rows")
    right.set_title("decode, tokens/s")
    figure.savefig(file, dpi=120)
