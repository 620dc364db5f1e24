"""Output of the commands: header and ending of a training run, tables, names."""

import importlib
import importlib.metadata
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from craft_jax.checkpoint.listing import Checkpoints
from craft_jax.config import SECTIONS, ExperimentConfig
from craft_jax.data.base import Dataset
from craft_jax.data.pipeline import Datasets
from craft_jax.models.base import ModelDef
from craft_jax.outputs import RunPaths
from craft_jax.runtime import hardware
from craft_jax.training.callbacks import Sample

logger = logging.getLogger(__name__)


def model_word(config: ExperimentConfig) -> str:
    """Returns the model's name as a word for file names."""
    return config.model.name.rpartition(":")[2].lower()


def size_word(num_params: int) -> str:
    """Returns a number of parameters in millions: `0.8m`, `124m`."""
    millions = num_params / 1e6
    return f"{millions:.1f}m" if millions < 10 else f"{millions:.0f}m"


def header(
    config: ExperimentConfig,
    model_def: ModelDef,
    datasets: Datasets,
    mesh: jax.sharding.Mesh,
    paths: RunPaths,
    state_bytes: int,
) -> None:
    """Says what is about to be trained, on what, and where it goes."""
    say = logger.info
    parts = [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
    split = f", split as {' x '.join(parts)}" if parts else ""
    say("devices    %s%s", hardware.devices_in_words(), split)
    say("precision  %s products, float32 parameters", config.training.precision)
    if config.init_from:
        say("weights    %s", config.init_from)
    say("config")
    for section, values in config.to_json().items():
        if section not in SECTIONS:
            continue
        words = " ".join(f"{k}={_short(v)}" for k, v in values.items() if v not in (None, []))
        say("  %-9s %s", section, words)
    say("parameters")
    for row in parameter_table(model_def):
        say("  %s", row)
    say("memory     parameters and optimizer %.1f MB on each device", state_bytes / 1e6)
    batch = _batch(config, datasets.train)
    say("batch      %s; an epoch is %s steps", batch, f"{len(datasets.train):,}")
    say("run        %s", paths.folder)
    say("log        %s", paths.log)


def _batch(config: ExperimentConfig, data: Dataset) -> str:
    rows, length, images = config.data.batch_size, config.data.seq_len, data.image_format
    if images is not None:
        what = f"{images.height} x {images.width} pixels, {images.num_classes} classes"
        colors = f", in {images.num_colors} colours as tokens" if images.palette else ""
        return f"{rows:,} images of {what}{colors}"
    if data.vocab_size is None:
        return f"{rows:,} examples"
    if config.reads_pairs:
        return f"{rows:,} pairs, up to {length:,} tokens in a source and in a target"
    return f"{rows:,} sequences of {length:,} tokens: {rows * length:,} tokens per step"


def parameter_table(model_def: ModelDef) -> list[str]:
    """Returns rows of module, number of parameters, and bytes, and the totals."""
    groups: dict[str, list[int]] = {}
    for path, leaf in model_def.shapes.items():
        name = ".".join(re.sub(r"\.\d+(?=\.)", ".*", path).split(".")[:3])
        name = name if path.count(".") > 1 else path.split(".")[0]
        sums = groups.setdefault(name, [0, 0])
        sums[0] += leaf.size
        sums[1] += leaf.size * leaf.dtype.itemsize
    groups["total"] = [sum(column) for column in zip(*groups.values(), strict=True)]
    width = max(map(len, groups))
    return [
        f"{name:<{width}}  {count:>13,}  {num_bytes / 1e6:>9,.2f} MB"
        for name, (count, num_bytes) in groups.items()
    ]


def sample(step: int, made: Sample, file: Path) -> None:
    """Shows a sample and adds it to the run's file of samples; a picture goes beside that."""
    words = made.words
    if made.picture is not None:
        picture = file.with_name(f"{file.stem}_step{step:06}.png")
        # It takes a while to import, and only images need it.
        importlib.import_module("craft_jax.data.images.pixels").save_png(picture, made.picture)
        words = f"{picture.name}: {words}"
        logger.info("sample at step %d: %s", step, picture)
    else:
        logger.info("sample at step %d\n%s", step, _indented(words))
    with file.open("a", encoding="utf-8", newline="") as out:
        out.write(f"=== step {step} ===\n{words}\n\n")


def ending(
    metrics: Mapping[str, Any],
    num_steps: int,
    paths: RunPaths,
    picture: Path | None,
    command: Callable[..., str],
    source: str | None,
) -> None:
    """Says how it went, what was written, and what to do next; `source` is one to try, of pairs."""
    shown = [("training loss", metrics["loss"]), ("validation loss", metrics.get("val_loss"))]
    shown.append(("bits per byte", metrics.get("val_bits_per_byte")))
    shown.append(("bits per dimension", metrics.get("val_bits_per_dim")))
    shown.append(("exact match", metrics.get("val_exact_match")))
    words = ", ".join(f"{name} {value:.4f}" for name, value in shown if value is not None)
    logger.info("finished: %s", words)
    if best := Checkpoints(paths.checkpoints).best():
        words = f"step {best.step}, {best.metric} {best.value:.4f}"
        logger.info("best: %s; use it with --checkpoint=best", words)
    for name, path in (
        ("checkpoints", paths.checkpoints),
        ("log", paths.log),
        ("metrics", paths.metrics),
        ("tensorboard", paths.events),
        ("samples", paths.samples),
        ("picture", picture),
    ):
        if path:
            logger.info("  %-11s %s", name, path)
    prompt = [] if source is None else [f"--prompt={source}"]
    logger.info("next")
    logger.info("  evaluate    %s", command(paths, command="evaluate"))
    logger.info("  sample      %s", command(paths, *prompt, command="generate"))
    logger.info("  resume      %s", command(paths, f"--config.training.num_steps={2 * num_steps}"))


def _indented(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines())


def _short(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)
