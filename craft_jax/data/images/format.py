"""The format of a dataset's images: size, classes and, for images as tokens, palette.

An image as tokens is a class token, then its pixels, row after row, each as the number of its
nearest colour in the palette (Chen et al. 2020, "Generative Pretraining from Pixels"). Shapes:
B images, H height, W width, C channels, T = H * W pixels, P colours.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from craft_jax.errors import UsageError

MAX_COLORS = 256
_AT_ONCE = 1 << 14


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFormat:
    """The images of a dataset; a checkpoint carries it as JSON.

    Attributes:
      height, width, channels: H, W and C of every image.
      label_names: of the classes, by number; empty if the images have no labels.
      palette: P colours of C numbers from 0 to 255; None if images are not tokens.
    """

    height: int
    width: int
    channels: int
    label_names: tuple[str, ...] = ()
    palette: tuple[tuple[int, ...], ...] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for images without labels."""
        return len(self.label_names)

    @property
    def num_pixels(self) -> int:
        """Pixels of an image, T."""
        return self.height * self.width

    @property
    def num_colors(self) -> int:
        """Colours of the palette, P; 0 without one."""
        return len(self.palette or ())

    @property
    def vocab_size(self) -> int:
        """The number of colours and of first tokens."""
        return self.num_colors + max(1, self.num_classes)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of a model by their config fields, for those that are None."""
        if self.palette is not None:
            return {"vocab_size": self.vocab_size, "max_seq_len": self.num_pixels}
        names = ("height", "width", "channels", "num_classes")
        return {name: getattr(self, name) for name in names}

    def first_tokens(self, labels_B: np.ndarray) -> np.ndarray:
        """Returns the first token of images of some classes, int32 (B,)."""
        return (self.num_colors + np.asarray(labels_B)).astype(np.int32)

    def tokens(self, images_BHWC: np.ndarray) -> np.ndarray:
        """Returns the nearest colour of each pixel of uint8 images, int32 (B, T)."""
        assert self.palette is not None
        palette_PC = np.array(self.palette, np.int32)
        pixels_NC = images_BHWC.reshape(-1, self.channels)
        if self.channels == 1:
            values_VC = np.arange(256, dtype=np.int32)[:, None]
            found_N = _nearest(values_VC, palette_PC)[pixels_NC[:, 0]]
        else:
            found_N = _nearest(pixels_NC.astype(np.int32), palette_PC)
        return found_N.reshape(len(images_BHWC), self.num_pixels)

    def pixels(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Returns the images of rows of colours, uint8 (B, H, W, C)."""
        palette_PC = np.array(self.palette, np.uint8)
        shape_BHWC = (len(tokens_BT), self.height, self.width, self.channels)
        return palette_PC[np.asarray(tokens_BT)].reshape(shape_BHWC)

    def label(self, name: str) -> int:
        """Returns the number of a class, given its name or number.

        Raises:
          UsageError: there is no such class.
        """
        if name in self.label_names:
            return self.label_names.index(name)
        if name.isdecimal() and int(name) < self.num_classes:
            return int(name)
        if not self.label_names:
            raise UsageError(f"`label={name}`: the images of this run have no labels; leave it out")
        shown = ", ".join(self.label_names[:20]) + (", ..." if self.num_classes > 20 else "")
        raise UsageError(f"`label={name}` is no class of this run; there are {shown}")

    def to_json(self) -> dict[str, Any]:
        """Returns this as plain JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ImageFormat":
        """Returns the format that `to_json` wrote.

        Raises:
          ValueError, TypeError, KeyError: `value` is invalid.
        """
        palette = value["palette"]
        found = cls(
            height=int(value["height"]),
            width=int(value["width"]),
            channels=int(value["channels"]),
            label_names=tuple(map(str, value["label_names"])),
            palette=None if palette is None else tuple(tuple(map(int, c)) for c in palette),
        )
        colors = [number for color in found.palette or () for number in color]
        if min(found.height, found.width, found.channels) < 1 or not all(
            0 <= number <= 255 for number in colors
        ):
            raise ValueError(f"invalid image format: {value}")
        return found


def _nearest(colors_NC: np.ndarray, palette_PC: np.ndarray) -> np.ndarray:
    """Returns the number of the nearest colour of a palette, int32 (N,)."""
    found = []
    for first in range(0, len(colors_NC), _AT_ONCE):
        part_NC = colors_NC[first : first + _AT_ONCE]
        squares_NP = ((part_NC[:, None] - palette_PC[None]) ** 2).sum(axis=-1)
        found.append(squares_NP.argmin(axis=1).astype(np.int32))
    return np.concatenate(found) if found else np.zeros(0, np.int32)
