"""generate, for runs of images: a grid of new ones, or given ones completed, as a PNG file."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from craft_jax import outputs, runs
from craft_jax.data import pipeline
from craft_jax.data.images import sources
from craft_jax.data.images.conversion import shown
from craft_jax.data.images.datasets import PixelTokens
from craft_jax.data.images.format import ImageFormat
from craft_jax.data.images.pixels import ImageProcessor, decode, save_png
from craft_jax.errors import OK, DataError, UsageError

OPTIONS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "num_steps",
    "solver",
    "guidance",
)
"""Flags that a model may or may not know."""

_SPLITS = ("train", "val", "test")
_OF_A_SPLIT = 8
_SAMPLES, _SAMPLES_OF_SEVERAL, _COMPLETIONS = 16, 8, 4
_MAX_IMAGES = 10_000
_GRAY = 128


class _Given(NamedTuple):
    """An image to complete.

    Attributes:
      pixels: uint8 (H, W, C).
      label: its class, where that is known.
    """

    pixels: np.ndarray
    label: int | None


def run(args: argparse.Namespace, opened: runs.Run, workdir: Path) -> int:
    """Writes a row of images for each label, or for each image that is given.

    The path of the picture goes to standard output, everything else to standard error.
    """
    images = opened.image_generator.images
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    labels = [images.label(name) for name in args.label or ()]
    if args.image:
        picture, words = _completed(args, opened, labels, given)
    else:
        picture, words = _new(args, opened, labels, given)
    file = outputs.sample_file(workdir, "png")
    save_png(file, picture)
    print(f"run {opened.paths.name}, step {opened.step}: {words}", file=sys.stderr)
    print(file, flush=True)
    return OK


def _new(
    args: argparse.Namespace, opened: runs.Run, labels: list[int], options: dict[str, Any]
) -> tuple[np.ndarray, str]:
    """Returns a picture of new images, and words for it."""
    images = opened.image_generator.images
    rows = labels or list(range(max(1, images.num_classes)))
    count = args.num_samples or (_SAMPLES if len(rows) == 1 else _SAMPLES_OF_SEVERAL)
    _check_count(args, count, len(rows))
    wanted = [label for label in rows for _ in range(count)]
    made = opened.generate_images(wanted, seed=args.seed, **options)
    names = ", ".join(images.label_names[label] for label in rows if images.label_names)
    words = f"{len(made)} images" + (f", of {names}" if names else "")
    return shown(made, math.ceil(math.sqrt(count)) if len(rows) == 1 else count), words


def _completed(
    args: argparse.Namespace, opened: runs.Run, labels: list[int], options: dict[str, Any]
) -> tuple[np.ndarray, str]:
    """Returns a picture of given images, their upper half, completions of it, and words for it."""
    images = opened.image_generator.images
    if images.height < 2:
        raise UsageError("`image`: the images of this run are one pixel high, and have no half")
    if len(labels) > 1:
        raise UsageError("`image` takes one `label` for all images, or none")
    given = [one for place in args.image for one in _read(place, opened)]
    if labels:
        given = [one._replace(label=labels[0]) for one in given]
    count = args.num_samples or _COMPLETIONS
    _check_count(args, count, len(given))
    num_rows = images.height // 2
    made = opened.image_generator.complete(
        opened.compute_params,
        np.stack([one.pixels for one in given for _ in range(count)]),
        [one.label for one in given for _ in range(count)],
        num_rows=num_rows,
        seed=args.seed,
        **options,
    )
    cells = []
    for n, one in enumerate(given):
        half = one.pixels.copy()
        half[num_rows:] = _GRAY
        cells += [one.pixels, half, *made[n * count : (n + 1) * count]]
    words = f"{len(given)} images, their upper halves, and {count} completions of each"
    return shown(np.stack(cells), count + 2), words


def _check_count(args: argparse.Namespace, count: int, num_rows: int) -> None:
    if count < 1 or count * num_rows > _MAX_IMAGES:
        raise UsageError(
            f"`num_samples={args.num_samples}` must be at least 1, and with {num_rows} rows at "
            f"most {_MAX_IMAGES // num_rows}"
        )


def _read(place: str, opened: runs.Run) -> list[_Given]:
    """Returns the images of a split of the run's data, of a folder, or of a file.

    Raises:
      DataError: there is none, it cannot be read, or it has another size.
    """
    images = opened.image_generator.images
    field = f"`image={place}`"
    if place in _SPLITS:
        return _of_split(place, opened)
    path = Path(place).expanduser()
    if path.is_dir():
        source = sources.folder(path, "--image")
        found = [
            (source.image(i), source.place(i), _label(source, i, images))
            for i in range(len(source))
        ]
    else:
        try:
            found = [(decode(path.read_bytes(), field), field, None)]
        except OSError as error:
            names = f"; it is no file, folder, or split ({', '.join(_SPLITS)})"
            raise DataError(f"{field}: {error.strerror}{names}") from None
    size = images.height if images.height == images.width else None
    process = ImageProcessor(size=size, channels=images.channels)
    given = [_Given(process.pixels(pixels), label) for pixels, _, label in found]
    for one, (_, where, _) in zip(given, found, strict=True):
        if one.pixels.shape[:2] != (images.height, images.width):
            height, width = one.pixels.shape[:2]
            raise DataError(
                f"{where} has {height} x {width} pixels (height x width), and the images of this "
                f"run {images.height} x {images.width}; make it as large"
            )
    return given


def _label(source: sources.FolderImages, i: int, images: ImageFormat) -> int | None:
    """Returns the label that the folder of an image names, if the run knows it."""
    number = source.label(i)
    name = None if number is None else source.label_names[number]
    return images.label_names.index(name) if name in images.label_names else None


def _of_split(name: str, opened: runs.Run) -> list[_Given]:
    """Returns the first images of a split of the run's data."""
    config = opened.config
    datasets = pipeline.open_datasets(
        config.data, workdir=opened.paths.workdir, seed=config.training.seed
    )
    data = getattr(datasets, name)
    if data is None:
        raise DataError(f"`image={name}`: the run has no such split (data.{name}_fraction=0)")
    source = data.images if isinstance(data, PixelTokens) else data
    source = source.one_pass()
    found: Sequence[int] = source.indices[:_OF_A_SPLIT].tolist()
    return [
        _Given(source.processor.pixels(source.source.image(i)), source.source.label(i))
        for i in found
    ]
