"""visualize: loss, learning-rate and throughput curves of one or several runs, as a PNG."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from craft_jax import outputs, runs
from craft_jax.checkpoint.listing import Checkpoints
from craft_jax.errors import OK, DataError
from craft_jax.outputs import RunPaths
from craft_jax.training.loggers import read_json_lines


def run(args: argparse.Namespace) -> int:
    """Draws the runs that `--run` names, or the newest."""
    workdir = Path(args.workdir).expanduser().absolute()
    folders = [runs.locate(name, workdir)[0] for name in args.run or ["latest"]]
    print(draw_runs([outputs.open_run(folder) for folder in folders]))
    return OK


def draw_runs(paths: Sequence[RunPaths]) -> Path:
    """Draws the curves of runs into one picture and returns its path.

    Raises:
      DataError: a run has logged nothing yet.
    """
    logged, run_paths_of = {}, {run_paths.name: run_paths for run_paths in paths}
    for run_paths in paths:
        logged[run_paths.name] = read_json_lines(run_paths.metrics)
        if not logged[run_paths.name]:
            raise DataError(f"run {run_paths.name} has logged no step yet: {run_paths.metrics}")
    # Not with the imports: training draws at its end, and should not begin later for it.
    figure = importlib.import_module("matplotlib.figure").Figure((11, 6.5), layout="constrained")
    importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic([["loss", "rate"], ["loss", "speed"]], width_ratios=[2, 1])
    for number, (name, lines) in enumerate(logged.items()):
        color = f"C{number % 10}"
        _curve(
            axes["loss"], lines, "loss", color=color, alpha=0.45, lw=1, label=f"{name}: training"
        )
        _curve(
            axes["loss"],
            lines,
            "val_loss",
            color=color,
            lw=2,
            marker="o",
            ms=4,
            label=f"{name}: validation",
        )
        best = Checkpoints(run_paths_of[name].checkpoints).best()
        if best and best.metric == "val_loss":
            label = f"{name}: best, {best.value:.4f} at step {best.step}"
            axes["loss"].plot(best.step, best.value, "*", color=color, ms=13, label=label)
        _curve(axes["rate"], lines, "learning_rate", color=color)
        speed = next((k for k in lines[-1] if k.endswith("_per_second")), "tokens_per_second")
        _curve(axes["speed"], lines, speed, color=color)
        axes["speed"].set_title(speed.replace("_", " "))
    axes["loss"].set_title("loss (nats per token)")
    axes["loss"].legend(fontsize="small")
    axes["rate"].set_title("learning rate")
    for axis in axes.values():
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes["speed"].set_ylim(bottom=0)
    picture = outputs.picture_file(paths[0].workdir, "curves", _word(paths))
    figure.savefig(picture, dpi=110)
    return picture


def _curve(axis: object, lines: list[dict], name: str, **style: object) -> None:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), **style)


def _word(paths: Sequence[RunPaths]) -> str:
    """The model's name of one run, or how many runs there are."""
    if len(paths) > 1:
        return f"{len(paths)}runs"
    return paths[0].log.stem.split("_")[1]
