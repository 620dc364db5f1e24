"""runs: what there is to continue, evaluate and sample."""

import argparse
import time
from pathlib import Path

from craft_jax import outputs, runs
from craft_jax.checkpointing import CheckpointStore
from craft_jax.errors import OK, CraftError

_COLUMNS = ("run", "state", "step", "val loss", "age")


def run(args: argparse.Namespace) -> int:
    """Prints a table of all runs below the working folder, oldest first."""
    workdir = Path(args.workdir).expanduser().absolute()
    rows = [_row(folder) for folder in outputs.all_runs(workdir)]
    if not rows:
        print(f"no runs below {workdir / 'models'}; train one: "
              "python -m craft_jax.main --config=configs/gpt.py")  # fmt: skip
        return OK
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    for row in (_COLUMNS, *rows):
        print(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    return OK


def _row(folder: Path) -> tuple[str, ...]:
    try:
        paths = outputs.open_run(folder)
        store = CheckpointStore(paths.checkpoints)
        step = store.latest()
        if step is None:
            return folder.name, _state(paths, 0, 1), "0", "-", _age(folder / "run.json")
        total = store.config(step)["training"]["num_steps"]
        loss = store.meta(step)["metrics"].get("val_loss")
        shown = "-" if loss is None else f"{loss:.4f}"
        age = _age(store.folder / str(step))
        if not store.has_optimizer(step):
            return folder.name, "imported", "-", shown, age
        return folder.name, _state(paths, step, total), f"{step}/{total}", shown, age
    except CraftError as error:
        return folder.name, "damaged", "-", "-", str(error)


def _state(paths: outputs.RunPaths, step: int, total: int) -> str:
    if runs.is_locked(paths):
        return "training"
    return "finished" if step >= total else "stopped"


def _age(path: Path) -> str:
    seconds = max(0, time.time() - path.stat().st_mtime)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
