"""Turns local text and images into a dataset of TensorFlow Datasets (TFDS).

In go texts, records or PNG images of each split, in order; out comes a folder
`data_dir/name/1.0.0` of ArrayRecord files that TFDS, and `data.source=tfds`, read by name. The same
input gives the same bytes. TensorFlow is not needed; tensorflow_datasets is loaded when it is first
needed.
"""

import contextlib
import functools
import importlib
import io
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from craft_jax.data.sources.documents import shown
from craft_jax.data.sources.tfds import FORMAT
from craft_jax.errors import DataError, OutputError

VERSION = "1.0.0"

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_SPLIT = re.compile(r"[a-zA-Z]\w*")
_PNG = b"\x89PNG\r\n\x1a\n"
# By the type of color in the head of a PNG file; a palette (3) is of colors.
_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
_COLOR_TYPE = 25
_MAX_WORDS = 300


def build_records(
    name: str, data_dir: str | os.PathLike[str], splits: Mapping[str, Iterable[Mapping[str, Any]]]
) -> Path:
    """Writes records, such as chat messages; all have the fields of the first one.

    Args:
      name: what to call the dataset: lowercase letters, digits and underscores.
      data_dir: the folder that datasets are in.
      splits: the records of each split. Values are texts, numbers, and lists and dicts of them.

    Returns:
      The folder that was written.

    Raises:
      DataError: a name is not allowed, a split is empty, or a record is unlike the first.
      OutputError: the dataset exists.
    """
    here = f"dataset {shown(name)}"
    streams = {split: iter(records) for split, records in _checked(splits).items()}
    heads = {}
    for split, stream in streams.items():
        head = next(stream, None)
        if head is None:
            raise DataError(f"{here}: the split {split!r} is empty; leave it out, or add to it")
        heads[split] = head
    first = next(iter(heads.values()))
    tfds = _tfds()
    features = {n: _feature(tfds, value, f"{here}: field {n!r}") for n, value in first.items()}
    rows = {
        split: _alike(heads[split], stream, set(first), f"{here} split {split}")
        for split, stream in streams.items()
    }
    return _build(name, data_dir, tfds.features.FeaturesDict(features), rows)


def build_images(
    name: str,
    data_dir: str | os.PathLike[str],
    splits: Mapping[str, Iterable[tuple[bytes, int | str]]],
    label_names: Sequence[str],
) -> Path:
    """Writes images with classes, as the fields `image` and `label`; their bytes are kept.

    Args:
      name: what to call the dataset: lowercase letters, digits and underscores.
      data_dir: the folder that datasets are in.
      splits: the images of each split: the bytes of a PNG file, and its class by number or name.
      label_names: the names of the classes.

    Returns:
      The folder that was written.

    Raises:
      DataError: a name is not allowed, a split is empty, an image is no PNG or has other channels
        than the first, or a class is unknown.
      OutputError: the dataset exists.
    """
    here = f"dataset {shown(name)}"
    streams = {split: iter(images) for split, images in _checked(splits).items()}
    heads = {split: next(stream, None) for split, stream in streams.items()}
    empty = [split for split, head in heads.items() if head is None]
    if empty:
        raise DataError(f"{here}: the split {empty[0]!r} has no image; leave it out, or add to it")
    tfds = _tfds()
    first = next(iter(heads.values()))
    assert first is not None
    channels = _channels(first[0], f"{here} image 0")
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, channels), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=list(label_names)),
        }
    )

    def rows(split: str) -> Iterator[dict[str, Any]]:
        for number, (image, label) in enumerate((heads[split], *streams[split])):
            place = f"{here} split {split} image {number}"
            found = _channels(image, place)
            if found != channels:
                raise DataError(
                    f"{place} has {found} channels where the first image has {channels}; convert "
                    "all to one mode"
                )
            known = (
                label in label_names if isinstance(label, str) else label in range(len(label_names))
            )
            if not known:
                raise DataError(
                    f"{place} has the class {label!r}, which is none of {', '.join(label_names)}"
                )
            yield {"image": io.BytesIO(image), "label": label}

    return _build(name, data_dir, features, {split: rows(split) for split in streams})


def _checked(splits: Mapping[str, Iterable[Any]]) -> Mapping[str, Iterable[Any]]:
    if not splits:
        raise DataError("a dataset needs a split, such as train")
    for split in splits:
        if not _SPLIT.fullmatch(split):
            raise DataError(f"{split!r} is no name of a split; use letters, such as train")
    return splits


def _alike(
    head: Mapping[str, Any], rest: Iterator[Mapping[str, Any]], names: set[str], here: str
) -> Iterator[Mapping[str, Any]]:
    number, record = 0, head
    while record is not None:
        if set(record) != names:
            raise DataError(
                f"{here} record {number} has the fields {shown(', '.join(record))} where the first "
                f"record has {shown(', '.join(sorted(names)))}; fix or remove it"
            )
        yield record
        number, record = number + 1, next(rest, None)


def _feature(tfds: Any, value: Any, place: str) -> Any:
    features, np = tfds.features, importlib.import_module("numpy")
    if isinstance(value, str):
        return features.Text()
    for kind, dtype in ((bool, np.bool_), (int, np.int64), (float, np.float64)):
        if isinstance(value, kind):
            return features.Scalar(dtype)
    if isinstance(value, Mapping) and value:
        return features.FeaturesDict({n: _feature(tfds, v, place) for n, v in value.items()})
    if isinstance(value, list) and value:
        inside = value[0].values() if isinstance(value[0], Mapping) else value[:1]
        if any(isinstance(v, list) for v in inside):
            raise DataError(f"{place} has lists in a list, which need TensorFlow; leave it out")
        return features.Sequence(_feature(tfds, value[0], place))
    raise DataError(
        f"{place} is {shown(str(value))[:40]!r} in the first record, which does not tell its type; "
        "give text, a number, or a list or dict that is not empty"
    )


def _channels(image: bytes, place: str) -> int:
    kind = image[_COLOR_TYPE] if len(image) > _COLOR_TYPE else None
    if not image.startswith(_PNG) or kind not in _CHANNELS:
        raise DataError(f"{place} is no PNG file; convert it")
    return _CHANNELS[kind]


def _build(
    name: str,
    data_dir: str | os.PathLike[str],
    features: Any,
    rows: Mapping[str, Iterator[Mapping[str, Any]]],
) -> Path:
    if not _NAME.fullmatch(name):
        raise DataError(
            f"{name!r} is no name of a dataset; use lowercase letters, digits and underscores, "
            "such as my_texts"
        )
    root = Path(os.path.expanduser(data_dir))
    folder = root / name / VERSION
    if folder.exists():
        raise OutputError(f"{shown(folder)} exists; remove it, or give the dataset another name")
    builder = _builder_class()(name=name, data_dir=root, features=features, rows=rows)
    # It prints; and it wants a folder for downloads, of which there are none.
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as downloads:
        try:
            builder.download_and_prepare(file_format=FORMAT, download_dir=downloads)
        except (DataError, OSError):
            raise
        # TFDS prefixes errors of records, of whatever class, with words of its own.
        except Exception as error:
            words = " ".join(str(error).split())[-_MAX_WORDS:]
            raise DataError(f"dataset {name}: cannot be written: ... {words}") from error
    return folder


def _tfds() -> Any:
    try:
        tfds = importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise DataError(
            "writing a dataset of TFDS needs TensorFlow Datasets: pip install tensorflow-datasets "
            f"array_record ({error})"
        ) from error
    tfds.disable_progress_bar()
    return tfds


@functools.cache
def _builder_class() -> type:
    tfds = _tfds()

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Writes rows that it is given. TFDS has such a class, but that one needs TensorFlow."""

        VERSION = tfds.core.Version(VERSION)

        def __init__(self, *, name: str, data_dir: Path, features: Any, rows: Mapping[str, Any]):
            self.name, self._features, self._rows = name, features, rows
            super().__init__(data_dir=data_dir, version=VERSION, file_format=FORMAT)

        def _info(self) -> Any:
            # Without shuffling, records stand in the order in which they were given.
            return tfds.core.DatasetInfo(
                builder=self,
                description="Written by craft_jax.",
                features=self._features,
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: enumerate(rows) for split, rows in self._rows.items()}

        def _generate_examples(self) -> Any:
            raise NotImplementedError

    return Builder
