"""Images as training, validation and test batches.

Batches are images in [-1, 1], or their pixels as tokens. Shapes: B images of a batch,
H height, W width, C channels, T pixels.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from craft_jax.data import sampling, splits
from craft_jax.data.base import Batch, Dataset
from craft_jax.data.images.conversion import to_uint8
from craft_jax.data.images.format import ImageFormat
from craft_jax.data.images.pixels import ImageProcessor, fit_palette
from craft_jax.data.images.sources import ImageSource
from craft_jax.data.splits import Fractions
from craft_jax.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_SCANNED_AT_ONCE = 256


# Batches.


class _Images(Dataset):
    """Batches of some images of a source.

    Attributes:
      source: all images.
      indices: which of them are in this split, int (N,).
      processor: crops and resizes them.
      batch_size: B.
    """

    def __init__(
        self,
        source: ImageSource,
        indices: np.ndarray,
        *,
        processor: ImageProcessor,
        batch_size: int,
        fingerprint: str = "",
    ):
        if not len(indices):
            raise DataError(
                f"{source.name}: a split has no images; use more images, or another fraction"
            )
        self.source, self.indices = source, np.asarray(indices)
        self.processor, self.batch_size = processor, batch_size
        self.name, self.fingerprint = source.name, fingerprint

    @property
    def label_names(self) -> tuple[str, ...]:
        """The classes, by number; empty if the images have no labels."""
        return self.source.label_names

    @functools.cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image of a batch."""
        return self.processor.shape(self.source.image(int(self.indices[0])))

    @functools.cached_property
    def image_format(self) -> ImageFormat:
        """Size and classes of the images."""
        height, width, channels = self.image_shape
        return ImageFormat(
            height=height, width=width, channels=channels, label_names=tuple(self.label_names)
        )

    def _batch(
        self,
        indices: Sequence[int],
        generators: Sequence[np.random.Generator | None],
        seeds: np.ndarray,
    ) -> Batch:
        """Returns a batch of images of the source, filled up with rows of weight 0.

        Returns:
          `images` float32 (B, H, W, C) in [-1, 1]; `labels` int32 (B,), if there are any; `weights`
          float32 (B,): 1, and 0 on the rows that fill it up, whose images and labels are 0; `seeds`
          uint32 (B,), for the random choices of a model with each image.
        """
        images_BHWC = np.zeros((self.batch_size, *self.image_shape), np.float32)
        weights_B = np.zeros(self.batch_size, np.float32)
        seeds_B = np.zeros(self.batch_size, np.uint32)
        seeds_B[: len(indices)] = seeds >> np.uint64(32)
        for row, (i, rng) in enumerate(zip(indices, generators, strict=True)):
            image = self.source.image(i)
            _check_shape(self.source, i, self.processor.shape(image), self.image_shape)
            images_BHWC[row] = self.processor(image, rng)
            weights_B[row] = 1
        batch = {"images": images_BHWC, "weights": weights_B, "seeds": seeds_B}
        if self.label_names:
            labels_B = np.zeros(self.batch_size, np.int32)
            labels_B[: len(indices)] = [self.source.label(i) for i in indices]
            batch["labels"] = labels_B
        return batch


class TrainingImages(_Images):
    """Shuffled images, epoch after epoch, without end; batch s is a pure function of (seed, s).

    Every epoch visits each image once, in an order of its own; a batch may hold the end of one and
    the beginning of the next. Crop, flip and `seeds` of an example are functions of (seed, its
    number).

    Args:
      source: all images.
      indices: the training images among them, int (N,).
      processor: crops and resizes them.
      batch_size: B.
      seed: of the order, of crops and of flips.
      fingerprint: see `Dataset`.

    Raises:
      DataError: no image.
    """

    def __init__(
        self,
        source: ImageSource,
        indices: np.ndarray,
        *,
        processor: ImageProcessor,
        batch_size: int,
        seed: int,
        fingerprint: str = "",
    ):
        super().__init__(
            source,
            indices,
            processor=processor,
            batch_size=batch_size,
            fingerprint=fingerprint,
        )
        self._seed = seed

    def __len__(self) -> int:
        return max(1, len(self.indices) // self.batch_size)

    def batch(self, step: int) -> Batch:
        count, first = len(self.indices), step * self.batch_size
        numbers = range(first, first + self.batch_size)
        chosen = sampling.example_indices(self._seed, np.array(numbers), count)
        is_random = self.processor.flip or self.processor.crop == "random"
        generators = [
            np.random.default_rng([self._seed, n]) if is_random else None for n in numbers
        ]
        seeds = sampling.mix(self._seed, np.array(numbers))
        return self._batch(self.indices[chosen].tolist(), generators, seeds)

    def one_pass(self) -> "ValidationImages":
        return ValidationImages(
            self.source,
            self.indices,
            processor=self.processor,
            batch_size=self.batch_size,
            fingerprint=self.fingerprint,
        )


class ValidationImages(_Images):
    """All images once, in order, cropped centrally; rows of weight 0 fill up the last batch.

    The `seeds` of an image are those of its number, the same in every run.

    Args:
      source: all images.
      indices: the validation images among them, int (N,).
      processor: crops them at the center, and resizes them.
      batch_size: B.
      fingerprint: see `Dataset`.

    Raises:
      DataError: no image.
    """

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def batch(self, step: int) -> Batch:
        first = step * self.batch_size
        indices = self.indices[first : first + self.batch_size].tolist()
        return self._batch(indices, [None] * len(indices), sampling.mix(np.array(indices)))


class PixelTokens(Dataset):
    """Images as tokens, for language models: the class, then the pixels.

    Args:
      images: the batches of images.
      palette: the colours of the tokens.
    """

    def __init__(
        self, images: TrainingImages | ValidationImages, palette: tuple[tuple[int, ...], ...]
    ):
        self.images = images
        self.image_format = dataclasses.replace(images.image_format, palette=palette)
        self.vocab_size, self.batch_size = self.image_format.vocab_size, images.batch_size
        self.name = images.name
        content = f"{images.fingerprint} {palette}"
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def one_pass(self) -> "PixelTokens":
        return PixelTokens(self.images.one_pass(), self.image_format.palette)

    def batch(self, step: int) -> Batch:
        """Returns `tokens` and `targets`, int32 (B, T), and `weights`, float32 (B, T)."""
        batch = self.images.batch(step)
        targets_BT = self.image_format.tokens(to_uint8(batch["images"]))
        first_B = self.image_format.first_tokens(batch.get("labels", np.zeros(len(targets_BT))))
        return {
            "tokens": np.concatenate([first_B[:, None], targets_BT[:, :-1]], axis=1),
            "targets": targets_BT,
            "weights": np.repeat(batch["weights"][:, None], targets_BT.shape[1], axis=1),
        }


# From a source to datasets.


def split(source: ImageSource, val_fraction: float, test_fraction: float) -> dict[str, np.ndarray]:
    """Divides images by a hash of their pixels, so that equal ones are in the same split.

    Images keep their split when others are added or removed, unless a split would be empty: then
    the lowest hash of the largest split moves there. Decodes every image once, in threads.

    Args:
      source: the images.
      val_fraction, test_fraction: approximate fractions held out for validation and testing.

    Returns:
      The image numbers of `train`, `val` and `test`, int64 (N,), ascending; empty only if the
      fraction is 0.

    Raises:
      ConfigError: fractions that leave no training images.
      DataError: an image that cannot be read, or fewer distinct images than splits.
    """
    _check_fractions(val_fraction, test_fraction)
    return _divide(source, _scan(source).hashes_N, val_fraction, test_fraction)


def open_images(
    source: ImageSource,
    named: Mapping[str, ImageSource] = MappingProxyType({}),
    *,
    val_fraction: float,
    test_fraction: float,
    batch_size: int,
    seed: int,
    processor: ImageProcessor,
    num_colors: int | None = None,
) -> dict[str, Dataset]:
    """Returns the batches of `train`, and of `val` and `test` if they are held out or named.

    Decodes every image once: see `split`.

    Args:
      source: the images.
      named: images of `val` and `test` that replace a fraction, with the classes of `source`. Equal
        images are removed from the training split.
      val_fraction, test_fraction: approximate fractions to hold out.
      batch_size: B.
      seed: of the order, of crops and of flips.
      processor: crops and resizes the images.
      num_colors: the most colours of a palette fitted to the training images, for images as tokens;
        None for images as floats.

    Raises:
      ConfigError, DataError: see `split`; also images of several sizes that are not resized.
    """
    _check_fractions(val_fraction, test_fraction)
    scanned = {name: _scan(images) for name, images in {"train": source, **named}.items()}
    if processor.size is None:
        for name, scan in scanned.items():
            _check_shapes(named.get(name, source), scan.shapes, scanned["train"].shapes[0])
    indices = _divide(source, scanned["train"].hashes_N, val_fraction, test_fraction)
    _remove_held_out(source, indices, scanned)
    settings = [val_fraction, test_fraction, dataclasses.asdict(processor)]
    content = [[scan.hashes_N.tolist(), scan.labels] for scan in scanned.values()]
    # Hashes pixels, not files: another decoder would divide them differently.
    text = json.dumps([content, source.label_names, settings])
    options: Any = {
        "processor": processor,
        "batch_size": batch_size,
        "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
    }
    train = TrainingImages(source, indices["train"], seed=seed, **options)
    data: dict[str, TrainingImages | ValidationImages] = {"train": train}
    for name in ("val", "test"):
        images = named.get(name, source)
        chosen = np.arange(len(images)) if name in named else indices[name]
        if len(chosen):
            data[name] = ValidationImages(images, chosen, **options)
    if num_colors is None:
        return dict(data)
    palette = fit_palette(
        lambda n: processor.pixels(source.image(int(train.indices[n]))),
        len(train.indices),
        num_colors,
    )
    return {name: PixelTokens(images, palette) for name, images in data.items()}


def _remove_held_out(
    source: ImageSource, indices: dict[str, np.ndarray], scanned: Mapping[str, "_Scanned"]
) -> None:
    """Removes images that equal one of a named split; see `open_images`."""
    hashes_N = scanned["train"].hashes_N
    for name, others in (("val", ("test",)), ("train", ("val", "test"))):
        held = [scanned[other].hashes_N for other in others if other in scanned]
        if held and len(indices[name]):
            is_held = np.isin(hashes_N[indices[name]], np.concatenate(held))
            if is_held.any():
                logger.warning(
                    "%s: %d images that are also held out are left out of those that %s",
                    source.name,
                    np.count_nonzero(is_held),
                    {"train": "train", "val": "validate"}[name],
                )
            indices[name] = indices[name][~is_held]


def _check_fractions(val_fraction: float, test_fraction: float) -> None:
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise ConfigError(
            f"data.val_fraction={val_fraction} and data.test_fraction={test_fraction} must not be "
            "negative, and their sum must be below 1; try 0.1 and 0"
        )


def _check_shapes(
    source: ImageSource, shapes: Sequence[tuple[int, ...]], expected: tuple[int, ...]
) -> None:
    for i, shape in enumerate(shapes):
        _check_shape(source, i, shape, expected)


def _check_shape(
    source: ImageSource, i: int, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    if shape[:2] != expected[:2]:
        raise DataError(
            f"{source.place(i)} has {shape[0]} x {shape[1]} pixels (height x width), but those "
            f"before it {expected[0]} x {expected[1]}; resize all with "
            f"data.image_size={min(expected[:2])}"
        )


class _Scanned(NamedTuple):
    """Facts about all images of a source.

    Attributes:
      hashes_N: of their shapes and pixels, uint64 (N,).
      shapes: (H, W, C) of each.
      labels: the class of each, or None.
    """

    hashes_N: np.ndarray
    shapes: list[tuple[int, ...]]
    labels: list[int | None]


def _scan(source: ImageSource) -> _Scanned:
    def look(i: int) -> tuple[bytes, tuple[int, ...], int | None]:
        image = source.image(i)
        digest = hashlib.blake2b(np.array(image.shape, "<i8").tobytes(), digest_size=8)
        digest.update(np.ascontiguousarray(image).data)
        return digest.digest(), image.shape, source.label(i)

    found = []
    # Pillow releases the GIL while it decodes.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(source), _SCANNED_AT_ONCE):
            last = min(first + _SCANNED_AT_ONCE, len(source))
            found += pool.map(look, range(first, last))
    hashes, shapes, labels = zip(*found, strict=True)
    hashes_N = np.frombuffer(b"".join(hashes), ">u8").astype(np.uint64)
    return _Scanned(hashes_N, list(shapes), list(labels))


def _divide(
    source: ImageSource, hashes_N: np.ndarray, val_fraction: float, test_fraction: float
) -> dict[str, np.ndarray]:
    fractions = Fractions(val_fraction, test_fraction)
    found = splits.by_key(hashes_N, fractions)
    wanted = ["train", *splits.held_out(fractions)]
    if not all(len(found[name]) for name in wanted):
        raise DataError(
            f"{source.name} has {len(source)} images, {len(np.unique(hashes_N))} of them "
            f"different: too few for {len(wanted)} splits (data.val_fraction={val_fraction}, "
            f"data.test_fraction={test_fraction}); use more images, or fewer splits"
        )
    return found
