"""Returns whether a model can fit: a lower bound of what a train step needs, beside what there is.

Without it a model that is too large ends in XLA's allocator, or with the out-of-memory killer,
after minutes. The bound leaves out all that a compiler may avoid: nothing is refused that works.
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
    """Bytes that one device holds at least.

    Attributes:
      state: parameters, their gradients, and what the optimizer keeps.
      activations: the logits of a micro-batch in float32, and the input of each block.
    """

    state: int
    activations: int


def least(
    state: Any, model: Any, *, batch_size: int, seq_len: int, accumulate: int, mesh: Mesh
) -> Need:
    """Returns the least that a train step needs.

    Args:
      state: a tree of `jax.ShapeDtypeStruct` with shardings, which has a mapping `params`.
      model: its config; what it does not have (`vocab_size`, `num_layers`, `d_model`) counts
        nothing.
      batch_size, seq_len, accumulate: rows and columns of a batch, and its parts.
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
      ConfigError: it cannot; names what is needed, what there is, and what to change.
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
