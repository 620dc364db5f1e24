"""Datasets of TensorFlow Datasets (TFDS) that were prepared as ArrayRecord, as documents.

In goes a name such as `gsm8k`, `wiki40b/en` or `my_texts:1.0.0`; out come the records of one split,
as Python values: text as `str`, a sequence of records as a list of dicts. What was prepared is read
from its files alone, so neither the code that built it nor TensorFlow is needed, and nothing is
fetched unless `download` is called. Each record is a chunk of its own, with hashes of its
head and its data: damage raises `DataError` with the file, and so does a file with other records
than were prepared. tensorflow_datasets and array_record are loaded when they are first needed.
"""

import contextlib
import dataclasses
import difflib
import errno
import functools
import hashlib
import importlib
import io
import logging
import os
import pkgutil
import re
import socket
import types
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from craft_jax.data.sources.documents import (
    PART_BYTES,
    Document,
    Part,
    Source,
    file_digest,
    one_line,
    plain_name,
    shown,
)
from craft_jax.errors import DataError

FORMAT = "array_record"

_NAME = re.compile(r"(?P<name>[A-Za-z_]\w*)(/(?P<config>[\w.+-]+))?(:(?P<version>[\d*.]+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_NO_DATASETS = {"core", "dataset_collections", "proto", "scripts", "testing"}
_READ_RECORDS = 256
_CONNECT_SECONDS = 5
_RETRIES = 3
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS}
_ELSEWHERE = (
    "without a network here, prepare it on a machine that has one, copy the folder and name the "
    "folder above it with data.data_dir"
)
_REMEDY = "copy it again, or prepare the dataset again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsPart(Part):
    """Records of one file that follow each other.

    Attributes:
      folder: of the prepared dataset, which has `features.json`.
      path: the file.
      start: the number of the first record in the file.
      count: how many.
      records_in_file: how many were prepared, all in all.
      num_bytes: about how many bytes they are.
      field: the config field that named the dataset, for messages.
    """

    folder: Path
    path: Path
    start: int
    count: int
    records_in_file: int
    num_bytes: int
    field: str = "data.name"

    def documents(self) -> Iterator[Document]:
        here = f"{self.field}: {shown(self.path)}"
        features, decoders = _features(self.folder, self.field)
        stop = self.start + self.count
        step = max(1, min(_READ_RECORDS, PART_BYTES * self.count // max(1, 16 * self.num_bytes)))
        with open_records(self.path, self.records_in_file, self.field) as read:
            for first in range(self.start, stop, step):
                numbers = range(first, min(first + step, stop))
                for number, record in zip(numbers, read(numbers), strict=True):
                    place = f"{here} record {number}"
                    yield Document(place=place, fields=_fields(features, decoders, record, place))


class TfdsSource(Source):
    """One split of a prepared dataset.

    Args:
      name: `dataset`, `dataset/config` or `dataset:1.0.0`.
      data_dir: the folder that datasets are prepared in; None for that of TFDS.
      split: such as `train`, or a slice such as `train[:90%]`.
      origin: the config value that it comes from, such as `data.name=gsm8k`.

    Raises:
      DataError: there is no such dataset or split, or it cannot be read.
    """

    def __init__(
        self, name: str, data_dir: str | None, split: str = "train", origin: str | None = None
    ):
        self.origin = origin or f"data.name={shown(name)}"
        self.split = split
        self._field = self.origin.partition("=")[0]
        builder = open_builder(name, data_dir, self._field)
        self.builder = builder
        self.folder = Path(builder.data_path)
        self.name = plain_name(Path(builder.info.full_name.replace("/", "_").split(":")[0]))
        self.version = str(builder.info.version)
        try:
            info = builder.info.splits[split]
            instructions = info.file_instructions
        # What is raised depends on what is wrong with the words of the slice.
        except Exception as error:
            raise DataError(
                f"{self.origin}: no split {split!r}; it has: {', '.join(builder.info.splits)} "
                "(a slice is train[:90%] or train[100:200])"
            ) from error
        self._files = [
            (Path(i.filename), i.skip, i.take, i.examples_in_shard) for i in instructions
        ]
        self.num_records = sum(take for _, _, take, _ in self._files)
        for path, *_ in self._files:
            if not path.is_file():
                raise DataError(f"{self.origin}: the file {shown(path)} is missing; {_REMEDY}")

    def parts(self) -> list[Part]:
        found: list[Part] = []
        splits = self.builder.info.splits.values()
        # Files are packed; what TFDS counted is not.
        unpacked = sum(s.num_bytes for s in splits) // max(1, sum(s.num_examples for s in splits))
        for path, skip, take, records in self._files:
            size = max(1, unpacked, path.stat().st_size // max(1, records))
            step = max(1, PART_BYTES // size)
            for start in range(skip, skip + take, step):
                count = min(step, skip + take - start)
                found.append(
                    TfdsPart(
                        folder=self.folder,
                        path=path,
                        start=start,
                        count=count,
                        records_in_file=records,
                        num_bytes=count * size,
                        field=self._field,
                    )
                )
        return found

    def digest(self) -> str:
        words = ["tfds", self.builder.info.full_name, self.version, self.split]
        digest = hashlib.sha256("\0".join(words).encode("utf-8", "replace"))
        for path in [self.folder / "features.json", *(path for path, *_ in self._files)]:
            digest.update(f"\0{path.name}\0".encode("utf-8", "replace"))
            digest.update(file_digest(path, self._field))
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "split": self.split,
            "records": self.num_records,
            "files": len(self._files),
        }


def feature_kinds(builder: Any) -> dict[str, str]:
    """Returns for each field of a dataset `text`, `image`, `label` (of a class) or `other`."""
    return {name: _kind(feature) for name, feature in _named(builder.info.features).items()}


def open_builder(name: str, data_dir: str | None = None, field: str = "data.name") -> Any:
    """Opens a dataset that was prepared; never touches the network.

    Args:
      name: `dataset`, `dataset/config` or `dataset:1.0.0`.
      data_dir: the folder that datasets are prepared in; None for that of TFDS.
      field: the config field that names it, for messages.

    Returns:
      A `tfds.core.DatasetBuilder` that only reads.

    Raises:
      DataError: it is unknown, not prepared, not prepared as ArrayRecord, or cannot be read.
    """
    here = f"{field}={shown(name)}"
    tfds = _load("tensorflow_datasets", here)
    root = _root(tfds, data_dir)
    name, config, version = _parse(name, here)
    folder = _find(tfds, root, name, config, version, here)
    if folder is None:
        known = _known(tfds)
        if name not in known and not (root / name).is_dir():
            raise _unknown(name, root, known, here)
        what = f" as version {version}" if version else ""
        raise DataError(
            f"{here}: not prepared{what} in {shown(root)}; run python -m craft_jax.main prepare "
            f"--config=... with the same values, which downloads it; {_ELSEWHERE}"
        )
    try:
        with _quiet():
            builder = tfds.builder_from_directory(folder)
            if builder.info.file_format.value == FORMAT:
                return builder
            others = [f.value for f in builder.info.alternative_file_formats]
            if FORMAT in others:
                return tfds.builder_from_directory(folder, file_format=FORMAT)
    # JSON, protocol buffers and classes of features each have errors of their own.
    except Exception as error:
        raise DataError(
            f"{here}: cannot read the description of the dataset in {shown(folder)} "
            f"(dataset_info.json, features.json): {one_line(error)}; {_REMEDY}"
        ) from error
    raise DataError(
        f"{here}: {shown(folder)} was prepared as {builder.info.file_format.value}, which needs "
        f"TensorFlow to be read; prepare it with file_format={FORMAT!r} in another data.data_dir"
    )


def download(name: str, data_dir: str | None = None, field: str = "data.name") -> Path:
    """Downloads a dataset that TFDS knows, and prepares it as ArrayRecord.

    Args:
      name: `dataset`, `dataset/config` or `dataset:1.0.0`.
      data_dir: the folder to prepare it in; None for that of TFDS.
      field: the config field that names it, for messages.

    Returns:
      The folder that it was prepared in. What is there already is left as it is.

    Raises:
      DataError: it is unknown, there is no network, or it needs a package that is not installed.
      OSError: the disk is full, or may not be written to.
    """
    here = f"{field}={shown(name)}"
    tfds = _load("tensorflow_datasets", here)
    root = _root(tfds, data_dir)
    plain, config, version = _parse(name, here)
    if folder := _find(tfds, root, plain, config, version, here):
        return folder
    known = _known(tfds)
    if plain not in known:
        raise _unknown(plain, root, known, here)
    downloader = importlib.import_module("tensorflow_datasets.core.download.downloader")
    retries = downloader.MAX_RETRIES
    full_name = f"{plain}{f'/{config}' if config else ''}{f':{version}' if version else ''}"
    try:
        # TFDS would try ten times, for minutes.
        downloader.MAX_RETRIES = _RETRIES
        with _quiet():
            builder = tfds.builder(full_name, data_dir=root, file_format=FORMAT)
            _check_network(builder.url_infos or {}, here)
            builder.download_and_prepare(
                file_format=FORMAT,
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    except DataError:
        raise
    # Each builder is a program of its own, and raises what it likes.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise
        if package := _missing_package(error):
            what = "TensorFlow" if package == "tensorflow" else f"the package {package}"
            raise DataError(
                f"{here}: preparing this dataset needs {what}, which is not installed; prepare it "
                f"with file_format={FORMAT!r} on a machine that has it, copy the folder and name "
                "the folder above it with data.data_dir"
            ) from error
        request = getattr(error, "request", None)
        if isinstance(error, OSError) and request is not None:
            raise DataError(
                f"{here}: cannot download it: tried {shown(request.url)} and could not reach it; "
                f"{_ELSEWHERE}"
            ) from error
        raise DataError(
            f"{here}: cannot download and prepare it in {shown(root)}: {one_line(error)}; "
            f"{_ELSEWHERE}"
        ) from error
    finally:
        downloader.MAX_RETRIES = retries
    return Path(builder.data_path)


@contextlib.contextmanager
def open_records(path: Path, num_records: int, field: str = "data.name") -> Iterator[Any]:
    """Opens a file of ArrayRecord.

    Args:
      path: the file.
      num_records: how many records it must have.
      field: the config field that named the dataset, for messages.

    Yields:
      A function from a range of numbers of records to their bytes.

    Raises:
      DataError: it is damaged, or has another number of records; the function raises it too.
    """
    here = f"{field}: {shown(path)}"
    records = _load("array_record.python.array_record_module", here)
    try:
        # Opened by Python for its error: array_record says nothing of what the system said.
        with path.open("rb"):
            pass
        reader = records.ArrayRecordReader(
            os.fspath(path), options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15
        )
        found = reader.num_records()
    except OSError as error:
        raise DataError(f"{here}: cannot read it: {error.strerror}") from error
    except (RuntimeError, ValueError, IndexError) as error:
        raise DataError(f"{here} is damaged: {one_line(error)}; {_REMEDY}") from error

    def read(numbers: range) -> list[bytes]:
        try:
            got = reader.read(list(numbers))
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            raise DataError(
                f"{here} is damaged (records {numbers.start} to {numbers.stop - 1}): "
                f"{one_line(error)}; {_REMEDY}"
            ) from error
        if len(got) != len(numbers):
            raise DataError(f"{here} is damaged: records are missing; {_REMEDY}")
        return got

    try:
        if found != num_records:
            raise DataError(
                f"{here} has {found} records where dataset_info.json says {num_records}; {_REMEDY}"
            )
        yield read
    finally:
        # Closing a reader that met damage raises that damage again.
        with contextlib.suppress(RuntimeError, ValueError):
            reader.close()


def _load(module: str, here: str) -> types.ModuleType:
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{here} needs TensorFlow Datasets: pip install tensorflow-datasets array_record "
            f"({error})"
        ) from error
    if module == "tensorflow_datasets":
        loaded.disable_progress_bar()
    return loaded


def _root(tfds: types.ModuleType, data_dir: str | None) -> Path:
    return Path(os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR))


def _parse(name: str, here: str) -> tuple[str, str | None, str | None]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise DataError(
            f"{here}: not a name of TFDS; one is dataset, dataset/config or dataset:1.0.0 (a "
            "dataset of Hugging Face is read with data.source=huggingface)"
        )
    config, version = match["config"], match["version"]
    if config and not version and _VERSION.fullmatch(config):
        config, version = None, config
    return match["name"], config, version


def _find(
    tfds: types.ModuleType,
    root: Path,
    name: str,
    config: str | None,
    version: str | None,
    here: str,
) -> Path | None:
    """Finds the folder of the newest version that fits; None if there is none."""
    folder = root / name
    if not folder.is_dir():
        return None
    if config is None and not _versions(folder):
        configs = sorted(p.name for p in folder.iterdir() if p.is_dir() and _versions(p))
        with contextlib.suppress(OSError, ValueError):
            config = tfds.core.dataset_builder.load_default_config_name(
                importlib.import_module("etils.epath").Path(folder)
            )
        if config not in configs and len(configs) > 1:
            raise DataError(
                f"{here}: {shown(folder)} has several configs; name one: "
                f"{shown(', '.join(f'{name}/{c}' for c in configs))}"
            )
        config = config if config in configs else next(iter(configs), None)
    folder = folder / config if config else folder
    fitting = [v for v in _versions(folder) if version is None or _fits(v, version)]
    return folder / fitting[-1] if fitting else None


def _versions(folder: Path) -> list[str]:
    """Returns the prepared versions in a folder, the newest last."""
    if not folder.is_dir():
        return []
    names = [p.name for p in folder.iterdir() if _VERSION.fullmatch(p.name)]
    names = [n for n in names if (folder / n / "dataset_info.json").is_file()]
    return sorted(names, key=lambda n: [*map(int, n.split("."))])


def _fits(version: str, pattern: str) -> bool:
    words, wanted = version.split("."), pattern.split(".")
    return len(wanted) <= len(words) and all(
        w in ("*", v) for v, w in zip(words, wanted, strict=False)
    )


@functools.cache
def _known(tfds: types.ModuleType) -> list[str]:
    """Returns the names that TFDS knows: those of the packages below it, once imported."""
    for package in pkgutil.iter_modules(tfds.__path__, f"{tfds.__name__}."):
        if package.ispkg and package.name.rpartition(".")[2] not in _NO_DATASETS:
            # Some need packages that are not installed.
            with contextlib.suppress(Exception), _quiet():
                importlib.import_module(package.name)
    return tfds.list_builders(with_community_datasets=False)


def _unknown(name: str, root: Path, known: list[str], here: str) -> DataError:
    local = [p.name for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
    near = difflib.get_close_matches(name, dict.fromkeys([*local, *known]), n=3)
    if root.name == name or (root / "dataset_info.json").is_file():
        hint = "; data.data_dir is the folder above the one that has the dataset's name"
    else:
        hint = f"; near: {shown(', '.join(near))}" if near else ""
    where = "" if root.is_dir() else ", which is no folder"
    return DataError(
        f"{here}: no dataset of that name in {shown(root)}{where}, nor does TFDS know one{hint}"
    )


def _missing_package(error: BaseException | None) -> str | None:
    """Returns which package could not be imported; TFDS raises such errors anew without it."""
    while error is not None:
        if isinstance(error, ImportError) and error.name:
            return error.name.partition(".")[0]
        error = error.__cause__ or error.__context__
    return None


def _check_network(urls: Mapping[str, Any], here: str) -> None:
    """Tries the first server of a download: where packets are dropped, TFDS waits for minutes."""
    for url in urls:
        address = urllib.parse.urlsplit(url)
        if address.scheme not in ("http", "https") or not address.hostname:
            continue
        proxied = address.scheme in urllib.request.getproxies()
        if proxied and not urllib.request.proxy_bypass(address.hostname):
            return
        port = address.port or (443 if address.scheme == "https" else 80)
        try:
            socket.create_connection((address.hostname, port), _CONNECT_SECONDS).close()
        except OSError as error:
            raise DataError(
                f"{here}: cannot download it: tried {shown(url)} and could not reach "
                f"{address.hostname}: {error.strerror or error}; {_ELSEWHERE}"
            ) from error
        return


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS and what it downloads with from printing and logging."""
    loggers = [logging.getLogger(name) for name in ("absl", "urllib3")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@functools.lru_cache(maxsize=8)
def _features(folder: Path, field: str) -> tuple[Any, dict[str, Any]]:
    """Returns the features of a prepared dataset, and what keeps images from being decoded."""
    here = f"{field}: {shown(folder)}"
    tfds = _load("tensorflow_datasets", here)
    try:
        with _quiet():
            features = tfds.builder_from_directory(folder).info.features
    except Exception as error:
        raise DataError(f"{here} has a damaged features.json: {one_line(error)}") from error
    if not isinstance(features, tfds.features.FeaturesDict):
        return features, {}
    skip = tfds.decode.SkipDecoding()
    return features, {n: skip for n, f in features.items() if _kind(f) == "image"}


def _fields(
    features: Any, decoders: dict[str, Any], record: bytes, place: str
) -> Mapping[str, Any]:
    try:
        values = features.deserialize_example_np(record, decoders=decoders or None)
    # Protocol buffers, NumPy and decoders each have errors of their own.
    except Exception as error:
        if package := _missing_package(error):
            raise DataError(
                f"{place} needs the package {package} to be read, as lists in lists do; prepare "
                "the dataset without such fields, as scripts/make_tfds.py does"
            ) from error
        raise DataError(
            f"{place} does not have the fields of features.json: {one_line(error)}; {_REMEDY}"
        ) from error
    named = _named(features)
    if not isinstance(values, Mapping):
        values = {"value": values}
    return {n: _value(named[n], values[n], f"{place}, field {n!r},") for n in named}


def _named(features: Any) -> dict[str, Any]:
    tfds = importlib.import_module("tensorflow_datasets")
    is_dict = isinstance(features, tfds.features.FeaturesDict)
    return dict(features.items()) if is_dict else {"value": features}


def _kind(feature: Any) -> str:
    features = importlib.import_module("tensorflow_datasets").features
    if isinstance(feature, features.Text):
        return "text"
    if isinstance(feature, features.Image):
        return "image"
    if isinstance(feature, features.ClassLabel):
        return "label"
    is_scalar = isinstance(feature, features.Tensor) and feature.shape == ()
    return "text" if is_scalar and _is_string(feature) else "other"


def _is_string(feature: Any) -> bool:
    dtypes = importlib.import_module("tensorflow_datasets.core.utils.dtype_utils")
    return dtypes.is_string(feature.np_dtype)


def _value(feature: Any, value: Any, place: str) -> Any:
    """Returns a value of Python: text as str, a sequence of records as a list of dicts."""
    features = importlib.import_module("tensorflow_datasets").features
    if isinstance(feature, features.FeaturesDict):
        return {n: _value(f, value[n], f"{place[:-1]}, {n!r},") for n, f in feature.items()}
    if isinstance(feature, features.Sequence):
        inner = feature.feature
        if isinstance(value, Mapping):
            rows = zip(*value.values(), strict=True)
            value = [dict(zip(value, row, strict=True)) for row in rows]
        return [_value(inner, v, place) for v in value]
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(feature, features.Tensor) and _is_string(feature):
        return _decoded(value, place)
    return value


def _decoded(value: Any, place: str) -> Any:
    if isinstance(value, list):
        return [_decoded(v, place) for v in value]
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place} has text that is not UTF-8: byte 0x{value[error.start]:02x} at offset "
            f"{error.start}; prepare the dataset with UTF-8 text"
        ) from None
