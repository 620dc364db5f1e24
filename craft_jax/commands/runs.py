"""runs: what there is to continue, evaluate and sample, and how it is doing."""

import argparse
import time
from pathlib import Path

from craft_jax import outputs
from craft_jax.checkpoint import lock
from craft_jax.checkpoint.listing import Checkpoints
from craft_jax.errors import OK, CraftError

_COLUMNS = ("run", "state", "step", "loss", "val loss", "best", "age")


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
        store = Checkpoints(paths.checkpoints)
        status = outputs.read_status(folder) or {}
        step = store.latest()
        if step is None and store.damaged():
            return folder.name, "damaged", "-", "-", "-", "-", _age(folder / "run.json")
        meta = store.meta(step) if step is not None else {}
        total = status.get("num_steps")
        if total is None and step is not None:
            total = store.config(step)["training"]["num_steps"]
        reached = step or 0
        if status.get("step") is not None:
            # What the last process reached, and what is safe of it.
            reached = max(reached, status["step"])
        metrics = meta.get("metrics", {})
        loss = status.get("loss") or metrics.get("loss")
        age = _age(next(p for p in _newest_first(paths, step) if p.exists()))
        best = store.best()
        at_best = f"{best.value:.4f} at {best.step}" if best else "-"
        losses = _number(loss), _number(metrics.get("val_loss")), at_best
        if step is not None and not store.has_optimizer(step):
            return folder.name, "imported", "-", *losses, age
        state = _state(folder, status, reached, total)
        return folder.name, state, f"{reached}/{total or '?'}", *losses, age
    except CraftError as error:
        return folder.name, "damaged", "-", "-", "-", "-", str(error)


def _state(folder: Path, status: dict, step: int, total: int | None) -> str:
    if lock.is_held(folder):
        return "training"
    if total is not None and step >= total and status.get("state", "done") == "done":
        return "finished"
    state = status.get("state", "stopped")
    # A process that wrote how it ended is gone; one that did not was killed.
    return {"running": "killed", "done": "stopped"}.get(state, state)


def _newest_first(paths: outputs.RunPaths, step: int | None) -> list[Path]:
    return [
        paths.folder / "status.json",
        *([paths.checkpoints / str(step)] if step is not None else []),
        paths.folder / "run.json",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _age(path: Path) -> str:
    seconds = max(0, time.time() - path.stat().st_mtime)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
