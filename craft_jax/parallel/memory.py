"""Compares a lower bound of a train step's memory with the memory of a device.

A model that is too large is refused at once, instead of failing in XLA's allocator or by the
out-of-memory killer after minutes. The bound leaves out everything that a compiler may avoid.
"""

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from craft_jax import schema
from craft_jax.errors import ConfigError
from craft_jax.parallel import sharding

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class Need(NamedTuple):
    """A lower bound of the bytes on one device.

    Attributes:
      state: parameters, their gradients, and what the optimizer keeps.
      activations: the logits of a micro-batch in float32, and the input of each block.
    """

    state: int
    activations: int


def least(
    state: Any, model: Any, *, batch_size: int, seq_len: int, accumulate: int, mesh: Mesh
) -> Need:
    """Returns a lower bound of the memory of a train step.

    Args:
      state: a tree of `jax.ShapeDtypeStruct` with shardings, which has a mapping `params`.
      model: its config; missing sizes (`vocab_size`, `num_layers`, `d_model`) count as 0.
      batch_size, seq_len, accumulate: rows and columns of a batch, and its micro-batches.
      mesh: the devices.
    """
    held = sharding.bytes_on_one_device((state, state.params))
    rows = batch_size // (accumulate * mesh.shape["data"] * mesh.shape["fsdp"])
    sizes = schema.values(model)
    logits = (sizes.get("vocab_size") or 0) * 4 // mesh.shape["tensor"]
    blocks = sizes.get("num_layers", 0) * sizes.get("d_model", 0) * 2
    return Need(held, rows * seq_len * (logits + blocks))


def available(mesh: Mesh) -> int:
    """Returns the bytes of memory for each device: its own, or a share of the machine's."""
    devices = mesh.local_devices
    limits = devices[0].memory_stats() or {}
    if "bytes_limit" in limits:
        return limits["bytes_limit"]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # No limit, or no such system.
        total = min(total, int(_CGROUP_LIMIT.read_text(encoding="utf-8")))
    return total // len(devices)


def check(need: Need, mesh: Mesh) -> None:
    """Checks that a train step can fit.

    Raises:
      ConfigError: it cannot; names the need, the memory of a device, and what to change.
    """
    there = available(mesh)
    if sum(need) <= there:
        return
    device = jax.local_devices()[0].platform
    raise ConfigError(
        f"this model needs at least {_size(sum(need))} on each device (parameters, gradients and "
        f"optimizer {_size(need.state)}, logits and activations {_size(need.activations)}), and a "
        f"{device} device has {_size(there)}; lower model.d_model, model.num_layers or "
        "data.batch_size, raise training.accumulate, or split it with parallel.fsdp"
    )


def _size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.0f} PB"
