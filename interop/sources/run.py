"""Opens a run of craft_jax, or one of its checkpoints."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from craft_jax import outputs
from craft_jax.checkpoint import manifest as manifests
from craft_jax.checkpoint.listing import Checkpoints
from craft_jax.data.base import sizes_from
from craft_jax.data.tokenizers import Tokenizer
from interop.errors import (
    CorruptFileError,
    ShapeMismatchError,
    UncommittedCheckpointError,
    listed,
)
from interop.files import orbax
from interop.mapping.shapes import leaves
from interop.mapping.spec import read_spec
from interop.mapping.tensors import LazyTensor
from interop.sources.source import CRAFT, Source, check_layers, images_of


def run_folder(place: Path) -> tuple[Path, int | None] | None:
    """Returns the folder of a run, and the step if a checkpoint is named."""
    path = place.absolute()
    if (path / "run.json").is_file():
        return path, None
    if path.name.isdecimal() and (path.parent.parent / "run.json").is_file():
        return path.parent.parent, int(path.name)
    return None


def looks_like_checkpoint(place: Path) -> bool:
    """Returns whether a folder has parts of a checkpoint, but belongs to no run."""
    inside = ("_METADATA", "_CHECKPOINT_METADATA", "params", "optimizer", "checkpoints")
    if any(next(place.glob(f"*.{ending}"), None) for ending in ("safetensors", "bin")):
        return False  # A folder of another library, which may have such folders too.
    return place.is_dir() and bool(
        any((place / name).exists() for name in inside) or re.match(r"\.\d+\.tmp-", place.name)
    )


def open_run(folder: Path, step: int | None, *, last: bool, checkpoint: str = "last") -> Source:
    """Opens a checkpoint of a run.

    Args:
      folder: of the run.
      step: of the checkpoint; None for the newest.
      last: whether to read the last weights, where the optimizer keeps an average too.
      checkpoint: `last`, `best` or a step; for no `step`.

    Raises:
      InteropError: there is no such checkpoint, or it is damaged.
    """
    store = Checkpoints(outputs.open_run(folder).checkpoints)
    if step is None:
        step = store.named(checkpoint)
    step = _chosen_step(store, folder, step)
    meta, config = store.meta(step), store.config(step)
    try:
        images = images_of(meta)
        spec = read_spec(config["model"], sizes_from(meta["vocab_size"], images))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CorruptFileError(
            f"checkpoint {step} of {folder}: its config cannot be understood: {error!r}"
        ) from error
    tokenizer_file = store.tokenizer_file(step)
    found = _stored_leaves(store, step, last=last)
    check_layers(spec, len(found), folder)
    expected = leaves(spec)
    if wrong := [
        f"{name} is {list(found[name].shape)}, not {list(want.shape)}"
        for name, want in expected.items()
        if name in found and found[name].shape != want.shape
    ]:
        raise ShapeMismatchError(f"checkpoint {step} of {folder}: {listed(wrong, '; ')}")
    # Imported weights that were not trained since keep their origin.
    origin = meta.get("imported") or {"run": folder.name, "step": step}
    return Source(
        path=folder,
        run=origin["run"],
        kind=CRAFT,
        spec=spec,
        # In the order of the model; the table refuses unknown leaves.
        leaves={name: found[name] for name in sorted(found, key=_position(expected))},
        tokenizer=Tokenizer.load(tokenizer_file) if tokenizer_file else None,
        images=images,
        step=origin["step"],
        metrics=meta.get("metrics", {}),
    )


def _chosen_step(store: Checkpoints, folder: Path, step: int | None) -> int:
    """Returns the step to read: `step`, or the newest.

    Raises:
      CorruptFileError: that checkpoint, or one newer than it, is damaged.
      UncommittedCheckpointError: there is none.
    """
    steps = store.steps()
    bad = store.damaged()
    if step is None:
        step, newer = store.newest_good("fast")
        bad |= newer
    elif step in steps and (wrong := store.wrong(step, "fast")):
        bad[step] = wrong
    if bad and (step is None or max(bad) >= step):
        worst = max(bad)
        others = [str(other) for other in steps if other not in bad]
        have = f"name another: {store.folder}/{others[-1]}" if others else "there is no other"
        raise CorruptFileError(
            f"checkpoint {store.folder / str(worst)} is damaged: {bad[worst]}; {have}"
        )
    if step is None or step not in steps:
        which = f"step {step}" if step is not None else "any step"
        have = f"; it has {', '.join(map(str, steps))}" if steps else ""
        raise UncommittedCheckpointError(
            f"run {folder} has no finished checkpoint of {which}{have}"
        )
    return step


def _stored_leaves(store: Checkpoints, step: int, *, last: bool) -> dict[str, LazyTensor]:
    """Returns the parameters of a checkpoint, each checked against its checksum when it is read."""
    checkpoint, part = store.folder / str(step), store.params_part(step, last=last)
    crcs = {name: leaf.crc32 for name, leaf in manifests.read(checkpoint).leaves.items()}
    return {
        name: _checked(leaf, checkpoint, name, crcs[f"{part}/{name}"])
        for name, leaf in orbax.read_params(checkpoint / part).items()
    }


def _checked(leaf: LazyTensor, checkpoint: Path, name: str, crc: int) -> LazyTensor:
    """Compares an array, when it is read, with the checksum taken before it was written."""

    def read() -> np.ndarray:
        array = leaf.read()
        if manifests.array_crc(array) != crc:
            raise CorruptFileError(
                f"checkpoint {checkpoint} is damaged: {name}: crc32 mismatch; name another"
            )
        return array

    return LazyTensor(leaf.shape, leaf.dtype, read)


def _position(expected: Mapping[str, Any]) -> Any:
    order = {name: i for i, name in enumerate(expected)}
    return lambda name: order.get(name, len(order))
