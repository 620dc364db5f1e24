"""Images by number, from arrays, such as the digits of scikit-learn, and from folders of files.

Folders pickle as file names, and read a file when its image is needed. `images.tfds` has the images
of TensorFlow Datasets.
"""

import abc
import bisect
import dataclasses
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from craft_jax.data.images.pixels import decode
from craft_jax.data.sources.documents import plain_name, shown
from craft_jax.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


class ImageSource(abc.ABC):
    """Images by number, some with the number of a class; it pickles.

    Attributes:
      name: for file names and tables.
      label_names: of the classes, by number; empty if the images have no labels.
    """

    name: str
    label_names: tuple[str, ...]

    @abc.abstractmethod
    def __len__(self) -> int:
        """Returns the number of images, at least one."""

    @abc.abstractmethod
    def image(self, i: int) -> np.ndarray:
        """Returns image `i`, uint8 (H, W, C) with C from 1 to 4; 2 and 4 end with alpha.

        Raises:
          DataError: it cannot be read.
        """

    @abc.abstractmethod
    def label(self, i: int) -> int | None:
        """Returns the class of image `i`, in [0, len(label_names)); None if there are no labels.

        Raises:
          DataError: it cannot be read.
        """

    @abc.abstractmethod
    def place(self, i: int) -> str:
        """Returns where image `i` is stored, for messages."""


# Arrays in memory.


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ArrayImages(ImageSource):
    """Images in memory.

    Attributes:
      name: for file names and tables.
      images_NHWC: uint8 (N, H, W, C).
      labels_N: int (N,), the class of each; None for no labels.
      label_names: of the classes.
    """

    name: str
    images_NHWC: np.ndarray
    labels_N: np.ndarray | None = None
    label_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images_NHWC)

    def image(self, i: int) -> np.ndarray:
        return self.images_NHWC[i]

    def label(self, i: int) -> int | None:
        return None if self.labels_N is None else int(self.labels_N[i])

    def place(self, i: int) -> str:
        return f"{self.name} image {i}"


def digits() -> ArrayImages:
    """Returns the 1797 digits of scikit-learn, 8 x 8 pixels of gray, in 10 classes.

    Their values 0, ..., 16 become 0, ..., 255.
    """
    found = importlib.import_module("sklearn.datasets").load_digits()  # A slow import.
    return ArrayImages(
        name="digits",
        images_NHWC=np.rint(found.images * 255 / 16).astype(np.uint8)[..., None],
        labels_N=found.target.astype(np.int32),
        label_names=tuple(str(name) for name in found.target_names),
    )


# Folders of files.


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FolderImages(ImageSource):
    """The image files below a folder, sorted by name.

    Attributes:
      name: for file names and tables.
      root: the folder.
      files: their paths below it.
      label_names: the folders that contain them, sorted; empty if they are in `root` itself.
      field: the config field or flag that names the folder, for messages.
    """

    name: str
    root: Path
    files: tuple[str, ...]
    label_names: tuple[str, ...]
    field: str

    def __len__(self) -> int:
        return len(self.files)

    def image(self, i: int) -> np.ndarray:
        return decode(self._read(i), self.place(i))

    def label(self, i: int) -> int | None:
        if not self.label_names:
            return None
        return bisect.bisect_left(self.label_names, self.files[i].split("/", 1)[0])

    def place(self, i: int) -> str:
        return f"{self.field}: {shown(self.root / self.files[i])}"

    def _read(self, i: int) -> bytes:
        path = self.root / self.files[i]
        try:
            if not path.is_file() and path.exists():  # Reading a pipe would block.
                raise DataError(f"{self.place(i)} is not a file; remove it")
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{self.field}: cannot read {shown(path)}: {error.strerror}") from error


def folder(
    path: str | Path, field: str = "data.path", classes: tuple[str, ...] | None = None
) -> FolderImages:
    """Finds the images of a folder.

    `path/<class>/...` gives labels, classes sorted by name; images in `path` itself have none.
    Skips hidden files and files without a suffix of an image.

    Args:
      path: the folder.
      field: the config field or flag that names it, for messages.
      classes: by number, to use those of another folder; None for the classes of this one.

    Raises:
      DataError: the folder does not exist, is empty, mixes images and folders of classes, or has
        other classes.
    """
    root = Path(os.path.expanduser(path))
    here = f"{field}={shown(path)}"
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"{here} {what}; name a folder of images")
    try:
        files = sorted(_image_files(root, ""))
    except OSError as error:
        raise DataError(f"{here}: cannot list {shown(error.filename)}: {error.strerror}") from error
    found = sorted({file.split("/", 1)[0] for file in files if "/" in file})
    beside = [file for file in files if "/" not in file]
    if not files:
        raise DataError(
            f"{here} contains no images ({' '.join(SUFFIXES)}); name a folder that does"
        )
    if found and beside:
        raise DataError(
            f"{here} has {shown(beside[0])} beside folders of classes such as {shown(found[0])}; "
            "move it into one of them, or all images into one folder"
        )
    if classes is not None and (bool(found) != bool(classes) or not {*found} <= {*classes}):
        raise DataError(
            f"{here} has the classes {shown(', '.join(found)) or '(none)'}, and the training "
            f"images {shown(', '.join(classes)) or '(none)'}; use folders of the same names"
        )
    return FolderImages(
        name=plain_name(root.resolve()),
        root=root,
        files=tuple(files),
        label_names=tuple(found) if classes is None else classes,
        field=field,
    )


def _image_files(root: Path, below: str) -> Iterator[str]:
    with os.scandir(root / below) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.is_dir():
                yield from _image_files(root, name)
            elif entry.name.lower().endswith(SUFFIXES):
                yield name
