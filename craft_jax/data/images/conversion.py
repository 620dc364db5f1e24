"""Images as arrays: uint8 to floats and back, and grids for display.

Needs only numpy; `pixels` reads and writes files. Shapes: B images, H height, W width, C
channels.
"""

import numpy as np

_WHITE = 255
_LEAST_SHOWN = 32


def normalize(pixels: np.ndarray) -> np.ndarray:
    """Returns uint8 values 0, ..., 255 as float32 in [-1, 1]; `to_uint8` is the exact inverse."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Returns values in [-1, 1], of any float dtype, as the nearest of 0, ..., 255, uint8.

    Values outside are clipped, NaN becomes 0.
    """
    scaled = (np.asarray(values).astype(np.float32) + np.float32(1)) * np.float32(127.5)
    return np.rint(np.nan_to_num(scaled, nan=0).clip(0, 255)).astype(np.uint8)


def shown(images_BHWC: np.ndarray, columns: int) -> np.ndarray:
    """Returns a `grid` for display, with small images enlarged."""
    picture = grid(images_BHWC, columns)
    scale = max(1, _LEAST_SHOWN // min(images_BHWC.shape[1:3]))
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)


def grid(images_BHWC: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    """Returns images in rows and columns, on white.

    Args:
      images_BHWC: uint8, or any float dtype in [-1, 1].
      columns: images in a row.
      gap: pixels between two of them.

    Returns:
      uint8 (H', W', C).
    """
    if images_BHWC.dtype != np.uint8:
        images_BHWC = to_uint8(images_BHWC)
    count, height, width, channels = images_BHWC.shape
    rows, columns = -(-count // columns), min(columns, count)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, channels)
    picture = np.full(shape, _WHITE, np.uint8)
    for n, image in enumerate(images_BHWC):
        top, left = n // columns * (height + gap), n % columns * (width + gap)
        picture[top : top + height, left : left + width] = image
    return picture
