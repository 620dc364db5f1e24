"""Decodes, crops, resizes and quantizes images, and writes PNG files.

Pixels are uint8 (H, W, C) with C 1 (gray), 2 (gray and alpha), 3 (RGB) or 4 (RGBA); models read
float32 in [-1, 1]. Shapes: B images, H height, W width, C channels.
"""

import contextlib
import dataclasses
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from craft_jax.checkpoint import atomic
from craft_jax.data.images.conversion import normalize
from craft_jax.data.sources.documents import one_line
from craft_jax.errors import ConfigError, DataError

MAX_PIXELS = 1 << 26
"""The most pixels to decode, 8192 x 8192: a small file can contain billions."""

# Pillow would also open formats that run other programs, such as EPS.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
_NO_IMAGE = "is not a PNG, JPEG, WebP, BMP or GIF image"
_WHITE = 255
_FITTED_PIXELS = 1 << 18
_FEWEST_FITTED = 64
_ROUNDS = 10
"""Iterations of k-means, after the median cut."""


# A file to pixels.


def decode(data: bytes, place: str) -> np.ndarray:
    """Returns the pixels of an image file, rotated by its EXIF orientation.

    Decodes the first frame of an animation, 16 bits to 8, and palettes to RGB.

    Args:
      data: a whole PNG, JPEG, WebP, BMP or GIF file.
      place: its location, for messages.

    Returns:
      uint8 (H, W, C), C 1 (gray), 2 (gray and alpha), 3 (RGB) or 4 (RGBA).

    Raises:
      DataError: it is empty, damaged, not an image, or has more than `MAX_PIXELS`.
    """
    if not data:
        raise DataError(f"{place} is empty; replace or remove it")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(_too_large(place, f" ({image.width} x {image.height})"))
            image.load()
            return _pixels(_upright(image))
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{place} {_NO_IMAGE}; replace or remove it") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(_too_large(place, "")) from None
    except Exception as error:  # Each format raises its own types.
        what = one_line(error)
        raise DataError(f"{place} is damaged: {what}; replace or remove it") from error


def _too_large(place: str, size: str) -> str:
    return f"{place} has more than {MAX_PIXELS} pixels{size}; shrink or remove it"


def _upright(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # Damaged EXIF data; the pixels are intact.
        return ImageOps.exif_transpose(image)
    return image


def _pixels(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # Pillow would clip 16 bits to 8, not scale them.
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return ((values * 255 + 32767) // 65535).astype(np.uint8)[..., None]
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    # A palette, or one colour, may be transparent without an alpha channel.
    pixels = np.asarray(image.convert(mode + "A" if image.has_transparency_data else mode))
    return pixels if pixels.ndim == 3 else pixels[..., None]


# Pixels to the input of a model.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """Converts images to one size and number of channels.

    Cuts out a square as large as the shorter side, then resizes it.

    Attributes:
      size: H and W, or None for those of the image.
      channels: 1 (gray) or 3 (RGB).
      crop: the position of the square, `center` or `random`.
      flip: whether a random half of the images is mirrored from left to right.

    Raises:
      ConfigError: an invalid value.
    """

    size: int | None = None
    channels: int = 3
    crop: Literal["center", "random"] = "center"
    flip: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.size is not None and self.size < 1:
            problems.append(f"data.image_size={self.size} must be at least 1")
        if self.channels not in (1, 3):
            problems.append(f"data.image_channels={self.channels} must be 1 (gray) or 3 (RGB)")
        if self.crop not in ("center", "random"):
            problems.append(f"data.image_crop={self.crop} must be center or random")
        if problems:
            raise ConfigError(problems)

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Returns an image as the input of a model.

        Args:
          image: uint8 (H, W, C), C 1 (gray), 2 (gray and alpha), 3 (RGB) or 4 (RGBA).
          rng: for the crop and the flip; None for a central crop and no flip.

        Returns:
          float32 (size, size, channels) in [-1, 1].
        """
        return normalize(self.pixels(image, rng))

    def pixels(self, image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Returns an image before it is normalized, uint8 (size, size, channels)."""
        image = self._with_channels(_on_white(image) if image.shape[2] in (2, 4) else image)
        if self.size is not None:
            image = self._resized(self._square(image, rng))
        if self.flip and rng is not None and rng.random() < 0.5:
            image = image[:, ::-1]
        return image

    def shape(self, image: np.ndarray) -> tuple[int, int, int]:
        """Returns the shape (H, W, C) that an image would have."""
        height, width = image.shape[:2] if self.size is None else (self.size, self.size)
        return height, width, self.channels

    def _with_channels(self, image: np.ndarray) -> np.ndarray:
        if image.shape[2] == self.channels:
            return image
        if self.channels == 3:
            return np.repeat(image, 3, axis=2)
        return np.asarray(Image.fromarray(image).convert("L"))[..., None]

    def _square(self, image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        height, width = image.shape[:2]
        side = min(height, width)
        spare = max(height, width) - side
        start = spare // 2
        if self.crop == "random" and rng is not None:
            start = int(rng.integers(spare + 1))
        return image[start : start + side] if height > width else image[:, start : start + side]

    def _resized(self, image: np.ndarray) -> np.ndarray:
        assert self.size is not None
        if image.shape[0] == self.size:
            return image
        pixels = Image.fromarray(
            np.ascontiguousarray(image[..., 0] if self.channels == 1 else image)
        )
        # Pillow scales its filters, so that shrinking does not alias.
        pixels = np.asarray(pixels.resize((self.size, self.size), Image.Resampling.BICUBIC))
        return pixels.reshape(self.size, self.size, self.channels)


def _on_white(image: np.ndarray) -> np.ndarray:
    color, alpha = image[..., :-1].astype(np.int32), image[..., -1:].astype(np.int32)
    return ((color * alpha + _WHITE * (255 - alpha) + 127) // 255).astype(np.uint8)


# Pixels to colours of a palette.


def fit_palette(
    image: Callable[[int], np.ndarray], num_images: int, num_colors: int
) -> tuple[tuple[int, ...], ...]:
    """Returns a palette fitted to the pixels of images.

    Contains all colours if there are at most `num_colors`; else the result of Pillow's median cut,
    refined by k-means.

    Args:
      image: returns image i of `num_images`, uint8 (H, W, C), C 1 or 3; if there are many, evenly
        spaced ones are sampled.
      num_images: at least one.
      num_colors: the most colours, 2 to 256.

    Returns:
      Colours of C numbers, sorted.
    """
    height, width = image(0).shape[:2]
    most = max(_FEWEST_FITTED, _FITTED_PIXELS // (height * width))
    some = (image(i) for i in range(0, num_images, -(-num_images // most)))
    pixels_NC = np.concatenate([one.reshape(-1, one.shape[-1]) for one in some])
    colors_PC = np.unique(pixels_NC, axis=0)
    if len(colors_PC) > num_colors:
        rgb_NC = np.broadcast_to(pixels_NC, (len(pixels_NC), 3))
        picture = Image.fromarray(np.ascontiguousarray(rgb_NC)[None])
        quantized = picture.quantize(num_colors, Image.Quantize.MEDIANCUT, kmeans=_ROUNDS)
        used = int(np.asarray(quantized).max()) + 1
        flat = np.array(quantized.getpalette()).reshape(-1, 3)[:used]
        colors_PC = np.unique(flat[:, : pixels_NC.shape[1]], axis=0)
    return tuple(tuple(map(int, color)) for color in colors_PC)


# Pixels to a file.


def save_png(path: Path, image: np.ndarray) -> None:
    """Writes a PNG file atomically.

    Args:
      path: the file; its folder exists.
      image: uint8 (H, W), or (H, W, C) with C from 1 to 4.
    """
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    partial = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        Image.fromarray(np.ascontiguousarray(image)).save(partial, "PNG")
        atomic.sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
