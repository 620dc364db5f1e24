"""Image datasets of TensorFlow Datasets, read from array_record without TensorFlow.

In go the name of a prepared dataset and a split; out comes an `ImageSource`. Records are parsed
here, and only their image is decoded: the data source of TFDS would decode all features, images
with OpenCV where it is installed, and palettes as their indices.
"""

import bisect
import dataclasses
import importlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from craft_jax.data.images.pixels import decode
from craft_jax.data.images.sources import ImageSource
from craft_jax.data.sources import tfds
from craft_jax.data.sources.documents import one_line, plain_name, shown
from craft_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class _Shard:
    """Records `first` to `first + count - 1` of a file of array_record."""

    path: str
    first: int
    count: int


class TfdsImages(ImageSource):
    """The images of a split of a TFDS dataset.

    Args:
      name: of the dataset.
      shards: where its records are.
      image_key, label_key: their features; `label_key` None for no labels.
      label_names: of the classes.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[_Shard],
        image_key: str,
        label_key: str | None,
        label_names: Sequence[str],
    ):
        self.name = plain_name(Path(name.split(":", 1)[0].replace("/", "_")))
        self.label_names = tuple(label_names)
        self._full_name, self._shards = name, tuple(shards)
        self._image_key, self._label_key = image_key, label_key
        self._ends = list(itertools.accumulate(shard.count for shard in shards))
        self._open()

    def _open(self) -> None:
        self._readers: dict[str, Any] = {}
        self._last: tuple[int, Any] = (-1, None)  # An image and its label are one record.

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_readers", "_last")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return self._ends[-1]

    def image(self, i: int) -> np.ndarray:
        feature = self._feature(i, self._image_key)
        if len(feature.bytes_list.value) != 1:
            raise DataError(
                f"{self.place(i)} has {len(feature.bytes_list.value)} images in the feature "
                f"{self._image_key!r}; choose another, or prepare the dataset anew"
            )
        return decode(feature.bytes_list.value[0], self.place(i))

    def label(self, i: int) -> int | None:
        if self._label_key is None:
            return None
        values = self._feature(i, self._label_key).int64_list.value
        # TFDS writes -1 where the class is not known, as in the test splits of competitions.
        if len(values) != 1 or not 0 <= values[0] < len(self.label_names):
            raise DataError(
                f"{self.place(i)} has the label {', '.join(map(str, values)) or 'none'} in the "
                f"feature {self._label_key!r}, not one of 0, ..., {len(self.label_names) - 1}; use "
                "another split, or no labels"
            )
        return int(values[0])

    def place(self, i: int) -> str:
        shard, record = self._find(i)
        return f"data.name={self._full_name}: record {record} of {shown(shard.path)}"

    def _find(self, i: int) -> tuple[_Shard, int]:
        number = bisect.bisect_right(self._ends, i)
        shard = self._shards[number]
        return shard, i - (self._ends[number] - shard.count) + shard.first

    def _feature(self, i: int, key: str) -> Any:
        number, features = self._last
        if number != i:
            features = self._parse(i)
            self._last = (i, features)
        if key not in features:
            raise DataError(
                f"{self.place(i)} has no feature {key!r} (it has: "
                f"{shown(', '.join(sorted(features)))}); prepare the dataset anew"
            )
        return features[key]

    def _parse(self, i: int) -> Any:
        shard, record = self._find(i)
        files = importlib.import_module("array_record.python.array_record_module")
        kind = importlib.import_module("tensorflow_datasets.proto").tf_example_pb2.Example
        try:
            if shard.path not in self._readers:
                # Reading ahead serves those who read in order; an epoch is shuffled.
                self._readers[shard.path] = files.ArrayRecordReader(
                    shard.path, options="readahead_buffer_size:0", file_reader_buffer_size=32768
                )
            return kind.FromString(self._readers[shard.path].read([record])[0]).features.feature
        except Exception as error:  # RuntimeErrors of the one, a class of its own of the other.
            raise self._damaged(shard, one_line(error)) from error

    def _damaged(self, shard: _Shard, words: str) -> DataError:
        return DataError(
            f"data.name={self._full_name}: cannot read the shard {shown(shard.path)}: {words}; "
            "delete the dataset's folder and prepare it anew"
        )


def from_tfds(
    name: str,
    data_dir: str | Path | None,
    split: str,
    image_key: str | None = None,
    label_key: str | None = None,
) -> TfdsImages:
    """Opens the images of a TFDS dataset that was prepared as array_record.

    Args:
      name: such as `mnist`, `cifar10:3.0.2` or `name/config`.
      data_dir: the folder of all TFDS datasets; None for that of TFDS.
      split: such as `train`, `train[:80%]` or `train+test`.
      image_key: the feature with the image; None for the only one, or that called `image`.
      label_key: the feature with the class; None for the only one, or that called `label`, and for
        no labels if there is none; empty for no labels.

    Raises:
      DataError: no such dataset or split, one in another format, or features that do not serve.
    """
    here = f"data.name={shown(name)}"
    builder = tfds.open_builder(name, None if data_dir is None else os.fspath(data_dir))
    info, kinds = builder.info, importlib.import_module("tensorflow_datasets.core.features")
    try:
        instructions = info.splits[split].file_instructions
    except (ValueError, KeyError) as error:
        raise DataError(
            f"{here} has no split {split!r} ({one_line(error)}); it has: {', '.join(info.splits)}"
        ) from error
    shards = [_Shard(os.fspath(f.filename), f.skip, f.take) for f in instructions if f.take]
    if not shards:
        raise DataError(f"{here}: the split {split!r} has no record; name a larger one")
    image_key = _choose(here, "image", info.features, kinds.Image, image_key)
    assert image_key is not None
    if np.dtype(info.features[image_key].np_dtype) not in (np.uint8, np.uint16):
        raise DataError(
            f"{here}: the images in {image_key!r} are {info.features[image_key].np_dtype}, not of "
            "8 or 16 bits; choose another feature"
        )
    label_key = _choose(here, "label", info.features, kinds.ClassLabel, label_key)
    names: Sequence[str] = []
    if label_key:
        names = info.features[label_key].names
    return TfdsImages(name, shards, image_key, label_key, names)


def _choose(here: str, word: str, features: Any, kind: type, key: str | None) -> str | None:
    """Returns the feature of a kind that is asked for, or else the one that is meant."""
    found = sorted(name for name, feature in features.items() if isinstance(feature, kind))
    if key == "" and word == "label":
        return None
    if key is not None and key not in found:
        raise DataError(
            f"{here} has no {kind.__name__} feature {key!r}; it has: {', '.join(found) or 'none'}"
        )
    if key is not None or word in found:
        return key or word
    if len(found) > 1:
        raise DataError(
            f"{here} has {len(found)} features of the kind {kind.__name__}: {', '.join(found)}; "
            f"name one as {word}_key"
        )
    if not found and word == "image":
        raise DataError(
            f"{here} has no image; its features are: {', '.join(sorted(features))}; use another"
        )
    return found[0] if found else None
