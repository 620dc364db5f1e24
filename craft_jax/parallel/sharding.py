"""Sharding rules from parameter paths to mesh axes, and the sharding of batches.

Mesh axes: `data` splits the batch, `fsdp` splits batch and parameters, `tensor` splits the hidden
dimensions of a layer. Models do not depend on it.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from craft_jax.errors import ConfigError
from craft_jax.schema import Contradiction, setting

AXES = ("data", "fsdp", "tensor")
AXIS_NAME = "data"
"""The axis of pmap."""
BATCH_SPEC = PartitionSpec(("data", "fsdp"))

# The first pattern that matches a path decides; other parameters are replicated.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embedding$", PartitionSpec("fsdp", None)),
    (
        r"(query|key|value|up|modulation|patch_embedding)\.kernel$",
        PartitionSpec("fsdp", "tensor"),
    ),
    (r"(out|down|head)\.kernel$", PartitionSpec("tensor", "fsdp")),
    (r"(query|key|value|up|modulation|patch_embedding)\.bias$", PartitionSpec("tensor")),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The mesh: the product of its axes is the number of devices."""

    mode: Literal["jit", "pmap"] = setting(
        "jit",
        "jit: one program over a mesh of devices; pmap: the same program on each device with its "
        "part of the batch, and all parameters",
        resumable=True,
    )
    data: int = setting(
        -1, "devices that split the batch; -1 for all that remain", minimum=-1, resumable=True
    )
    fsdp: int = setting(
        1, "devices that split batch and parameters; -1 for all", minimum=-1, resumable=True
    )
    tensor: int = setting(
        1, "devices that split each layer; -1 for all", minimum=-1, resumable=True
    )

    def contradictions(self) -> Iterator[Contradiction]:
        for axis in AXES:
            if getattr(self, axis) == 0:
                name = f"parallel.{axis}"
                yield Contradiction((name,), f"{name}=0 is no number of devices; use 1, or -1")
        for axis in ("fsdp", "tensor"):
            if self.mode == "pmap" and getattr(self, axis) != 1:
                yield Contradiction(
                    ("parallel.mode", f"parallel.{axis}"),
                    f"parallel.mode=pmap splits the batch alone, and parallel.{axis}="
                    f"{getattr(self, axis)} splits parameters; use parallel.mode=jit",
                )
        open_axes = [axis for axis in AXES if getattr(self, axis) == -1]
        if len(open_axes) > 1:
            names = tuple(f"parallel.{axis}" for axis in open_axes)
            yield Contradiction(
                names, f"{' and '.join(names)} are both -1; at most one axis can take the rest"
            )


def make_mesh(config: ParallelConfig, devices: Sequence[jax.Device]) -> Mesh:
    """Arranges devices on the axes `data`, `fsdp` and `tensor`.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or the mode does not take
        them.
    """
    if config.mode == "pmap" and jax.process_count() > 1:
        raise ConfigError(
            f"parallel.mode=pmap trains in one process, and there are {jax.process_count()}; use "
            "parallel.mode=jit"
        )
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        named = ", ".join(f"parallel.{axis}={getattr(config, axis)}" for axis in AXES)
        raise ConfigError(
            f"{named} do not multiply to the {len(devices)} devices here; set one of them to -1"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Checks that each device gets an equal part of each micro-batch.

    Raises:
      ConfigError: it does not; names the nearest batch sizes that do.
    """
    parts = accumulate * mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        down, up = batch_size // parts * parts, -(-batch_size // parts) * parts
        near = f"{down} or {up}" if down else f"{up}"
        raise ConfigError(
            f"data.batch_size={batch_size} is not divisible by {parts} (training.accumulate="
            f"{accumulate} times {parts // accumulate} devices that split the batch); try {near}"
        )


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Returns the spec of a parameter, without axes that do not divide their dimension."""
    for pattern, spec in RULES:
        if re.search(pattern, path) and len(spec) == len(shape):
            return PartitionSpec(
                *(
                    a if a and n % mesh.shape[a] == 0 else None
                    for a, n in zip(spec, shape, strict=True)
                )
            )
    return PartitionSpec()


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns shardings for a tree of parameters, or of moments like them, by path.

    A leaf below a dict key that is a parameter path is sharded as that parameter; others, such as
    counters, are replicated.
    """

    def leaf_sharding(path: tuple, leaf: Any) -> NamedSharding:
        keys = [p.key for p in path if isinstance(p, jax.tree_util.DictKey)]
        return NamedSharding(mesh, _spec(keys[-1], leaf.shape, mesh) if keys else PartitionSpec())

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def bytes_on_one_device(tree: Any) -> int:
    """Returns the bytes that one device holds of a tree of arrays or of their shapes."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def own_rows(batch_size: int, mesh: Mesh) -> slice:
    """Returns the rows of a batch on this process's devices; all rows if they are not adjacent."""
    places = NamedSharding(mesh, BATCH_SPEC).addressable_devices_indices_map((batch_size,))
    spans = sorted({index.indices(batch_size)[:2] for (index,) in places.values()})
    if any(stop != start for (_, stop), (start, _) in itertools.pairwise(spans)):
        return slice(0, batch_size)
    return slice(spans[0][0], spans[-1][1])


def put_batch(
    batch: Mapping[str, np.ndarray],
    mesh: Mesh,
    mode: str = "jit",
    *,
    rows: slice | None = None,
    batch_size: int | None = None,
) -> dict[str, jax.Array]:
    """Puts a batch on the devices, its first axis split over `data` and `fsdp`.

    For pmap an axis of devices is added before it.

    Args:
      batch: arrays with the batch as their first axis.
      mesh, mode: the devices, and `jit` or `pmap`.
      rows, batch_size: the rows in `batch`, and their total number, if not all; see `own_rows`.
    """
    sharding = NamedSharding(mesh, BATCH_SPEC)
    if mode == "pmap":
        batch = {k: a.reshape(mesh.shape["data"], -1, *a.shape[1:]) for k, a in batch.items()}
    if rows is None or rows == slice(0, batch_size):
        return {name: put(array, sharding) for name, array in batch.items()}
    assert batch_size is not None

    def part(array: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(batch_size)
        return array[start - rows.start : stop - rows.start][(slice(None), *index[1:])]

    return {
        name: jax.make_array_from_callback(
            (batch_size, *array.shape[1:]), sharding, functools.partial(part, array)
        )
        for name, array in batch.items()
    }


def put(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Puts an array on devices; if several processes own them, each passes the whole array."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def spread(arrays: Any | None, abstract: Any) -> Any:
    """Puts a tree of numpy arrays of process 0 on the devices of all processes.

    Args:
      arrays: None in the other processes, which call it too.
      abstract: shapes and dtypes with shardings.

    Returns:
      Arrays that share no memory with the host's, so that a train step may donate them.
    """

    def spread_leaf(struct: jax.ShapeDtypeStruct, array: np.ndarray | None = None) -> jax.Array:
        if jax.process_count() > 1 and not struct.sharding.is_fully_addressable:
            array = _from_first(array, struct)
        assert array is not None
        return jnp.copy(put(array, struct.sharding))

    trees = (abstract,) if arrays is None else (abstract, arrays)
    return jax.tree.map(spread_leaf, *trees)


def _from_first(array: np.ndarray | None, struct: jax.ShapeDtypeStruct) -> np.ndarray:
    """Returns an array of process 0 in all processes."""
    # As integers: a sum of floats would turn -0.0 into 0.0.
    words = np.dtype(f"uint{8 * min(struct.dtype.itemsize, 4)}")
    if array is None:
        array = np.zeros(struct.shape, struct.dtype)
    flat = np.ascontiguousarray(array).reshape(-1).view(words)
    sent = multihost_utils.broadcast_one_to_all(flat)
    return np.asarray(sent).view(struct.dtype).reshape(struct.shape)


def to_host(leaf: jax.Array) -> np.ndarray | None:
    """Returns a numpy copy of an array in process 0, else None; all processes call it."""
    if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = _replicating(leaf.sharding.mesh)(leaf)
    if jax.process_index() != 0:
        return None
    return np.array(leaf if leaf.is_fully_addressable else leaf.addressable_data(0))


def on_one_device(tree: Any) -> Any:
    """Returns arrays on the first device of this process; all processes call it."""
    device = jax.local_devices()[0]

    def move(leaf: jax.Array) -> jax.Array:
        if leaf.is_fully_addressable:
            return jax.device_put(leaf, device)
        if not leaf.is_fully_replicated:
            leaf = _replicating(leaf.sharding.mesh)(leaf)
        return jax.device_put(leaf.addressable_data(0), device)

    return jax.tree.map(move, tree)


@functools.cache
def _replicating(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Returns a compiled function that replicates an array on all devices."""
    return jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, PartitionSpec()))


def compile_step(train_step: Callable, mesh: Mesh, mode: str = "jit") -> Callable:
    """Compiles a train step for a mesh; it donates the state.

    Args:
      train_step: from (state, batch) to (state, metrics); pmap needs one made with `AXIS_NAME`.
      mesh, mode: as for `put_batch`.
    """
    if mode == "jit":
        return jax.jit(train_step, donate_argnums=0)
    return jax.pmap(
        train_step,
        axis_name=AXIS_NAME,
        in_axes=(None, 0),
        out_axes=None,
        devices=list(mesh.devices.flat),
        donate_argnums=0,
    )
