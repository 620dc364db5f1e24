"""FLOPs of a model, the peak rate of a device, memory in use, and timing of work."""

import contextlib
import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

# Dense products of bfloat16 on one chip, FLOP/s, as its maker states them, by what JAX calls it.
_PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "TPU v6": 918e12,
    "TPU v5p": 459e12,
    "TPU v5": 197e12,
    "TPU v4": 275e12,
    "TPU v3": 123e12,
}
_MEASURED_SIZE = 2048
_ROUNDS = 7


def flops_per_token(
    num_params: int, *, num_layers: int, num_heads: int, head_width: int, seq_len: int
) -> int:
    """Returns the FLOPs of training on one token: 6 N + 12 L H K T.

    The formula is that of Chowdhery et al. 2022 (PaLM), appendix B: every parameter takes part in a
    product, forward and twice backward, and attention is counted whole, not halved for its mask.
    Others halve it, or leave embeddings out: compare like with like.
    """
    return 6 * num_params + 12 * num_layers * num_heads * head_width * seq_len


def peak_flops(device: jax.Device) -> tuple[float, str]:
    """Returns the FLOP/s that a device could do at best, and where that number is from.

    Of an unknown device, such as a CPU, it is what a product of two matrices of 2048 by 2048 in
    float32 does, measured here.
    """
    if stated := stated_peak(device.device_kind):
        return stated
    size = _MEASURED_SIZE
    matrix = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.matmul)
    seconds = median_seconds(lambda: product(matrix, matrix))
    return 2 * size**3 / seconds, f"a float32 product of {size} x {size}, measured"


def stated_peak(kind: str) -> tuple[float, str] | None:
    """Returns the FLOP/s that a chip's maker states, and its name; None of an unknown chip."""
    for name, peak in _PEAKS.items():
        if name.lower() in kind.lower():
            return peak, f"{name}, dense bfloat16, stated by its maker"
    return None


def median_seconds(work: Callable[[], object], rounds: int = _ROUNDS) -> float:
    """Returns the median time of some work on the devices, after a round that is not counted."""
    jax.block_until_ready(work())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_host_bytes() -> int:
    """Returns the most memory that this process has had, in bytes."""
    # The kernel begins `ru_maxrss` with the peak of the process that started this one.
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if peak := re.search(r"VmHWM:\s+(\d+) kB", status):
            return int(peak[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_device_bytes(device: jax.Device) -> int | None:
    """Returns the most memory that was used on a device, in bytes; None where it does not say."""
    stats = device.memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def seconds_since_start() -> float | None:
    """Returns how long this process has lived; None where the system does not say."""
    try:
        words = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        began = int(words[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, AttributeError, ValueError, IndexError):
        return None


def devices_in_words() -> str:
    """Returns, for example, `1 cpu device` or `8 gpu devices (NVIDIA H200)`."""
    devices = jax.devices()
    kind = devices[0].device_kind
    words = f"{len(devices)} {devices[0].platform} device{'s' * (len(devices) > 1)}"
    if jax.process_count() > 1:
        words += f" of {jax.process_count()} processes"
    return words if kind.lower() == devices[0].platform else f"{words} ({kind})"
