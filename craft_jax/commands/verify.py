"""verify: whether the checkpoints of a run are, to the byte, as they were written."""

import argparse
from pathlib import Path

from craft_jax import outputs, runs
from craft_jax.checkpoint import manifest as manifests
from craft_jax.checkpoint.listing import Checkpoints
from craft_jax.errors import FAILED_CHECK, OK, StorageError


def run(args: argparse.Namespace) -> int:
    """Reads every byte of a run's checkpoints, or of one.

    Prints one line for each, and exits with 0 if all are whole, else with 70.
    """
    workdir = Path(args.workdir).expanduser().absolute()
    folder, step = runs.locate(args.run or "latest", workdir)
    paths = outputs.open_run(folder)
    store = Checkpoints(paths.checkpoints)
    if args.checkpoint is not None:
        step = runs.named_step(store, step, args.checkpoint) or store.latest()
    steps = [step] if step is not None else sorted({*store.steps(), *store.damaged()})
    if not steps:
        raise StorageError(f"run {paths.name} has no checkpoint to verify below {store.folder}")
    is_whole = True
    for number in steps:
        try:
            manifest = manifests.check(store.folder / str(number))
        except manifests.DamagedError as error:
            is_whole = False
            print(f"step {number}: damaged: {error}")
        else:
            print(
                f"step {number}: whole: {len(manifest.files)} files, "
                f"{len(manifest.leaves)} arrays, {manifest.num_bytes / 1e6:,.1f} MB"
            )
    for name in store.corrupt():
        print(f"{name}: set aside as damaged earlier")
    return OK if is_whole else FAILED_CHECK
