"""Documents from Hugging Face datasets on disk: the rows of one split.

Reads folders of `datasets.save_to_disk` (Arrow streams with a `state.json` for each split) and the
layout of the hub (Parquet files named by split). Downloads nothing, and runs no code of a dataset.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
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
from craft_jax.data.sources.parquet import batch_documents, load, parquet_parts, wanted_columns
from craft_jax.errors import DataError

_BLOCK_BYTES = 1 << 20
_REMEDY = "save or copy it again"
_SHARD = re.compile(r"(?P<split>.+?)-(?P<shard>\d{5})-of-(?P<count>\d{5})(-\w+)?")
# The names of files and folders that the hub knows.
_SPLITS = {"train": "train", "training": "train"}
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_SPLITS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
_WORD = re.compile(r"[a-z]+")
# The end of an Arrow stream: a marker and an empty message.
_END = b"\xff\xff\xff\xff\0\0\0\0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrowPart(Part):
    """Consecutive record batches of an Arrow stream.

    Attributes:
      path: the file.
      first_batch: the number of the first one.
      num_batches: number of batches.
      first_row: the number of their first row in the file.
      num_bytes: approximate bytes.
      field: the config field that named the folder, for messages.
      columns: the columns to yield; None for all.
    """

    path: Path
    first_batch: int
    num_batches: int
    first_row: int
    num_bytes: int
    field: str = "data.name"
    columns: tuple[str, ...] | None = None

    def documents(self) -> Iterator[Document]:
        here = f"{self.field}: {shown(self.path)}"
        row = self.first_row
        stop = self.first_batch + self.num_batches
        for number, batch in enumerate(_batches(self.path, here)):
            if self.first_batch <= number < stop:
                wanted = batch.select(wanted_columns(batch.schema, self.columns))
                yield from batch_documents(wanted, here, row)
                row += batch.num_rows
            elif number >= stop:
                break


class HuggingFaceSource(Source):
    """One split of a dataset in a folder.

    Args:
      name: the folder.
      split: the split.
      origin: the config value that names it, such as `data.name=texts`.
      columns: the fields of the documents; None for all.

    Raises:
      DataError: the folder or split does not exist, or cannot be read.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        origin: str | None = None,
        columns: tuple[str, ...] | None = None,
    ):
        self.origin = origin or f"data.name={shown(name)}"
        self.root = Path(os.path.expanduser(name))
        self.name, self.split, self.columns = plain_name(self.root.resolve()), split, columns
        self._field = self.origin.partition("=")[0]
        files = _splits(self.root, name, self.origin)
        canonical = split if split in files else _SPLITS.get(split, split)
        if canonical not in files:
            raise DataError(f"{self.origin}: no split {split!r}; it has: {shown(', '.join(files))}")
        self.paths = tuple(files[canonical])
        for path in self.paths:
            if not path.is_file():
                raise DataError(
                    f"{self.origin}: the file {shown(path)} is missing; copy the whole folder again"
                )

    def parts(self) -> list[Part]:
        return [part for path in self.paths for part in self._file_parts(path)]

    def digest(self) -> str:
        digest = hashlib.sha256(f"huggingface\0{self.split}\0".encode("utf-8", "replace"))
        for path in self.paths:
            name = path.relative_to(self.root).as_posix()
            digest.update(f"{name}\0".encode("utf-8", "replace"))
            digest.update(file_digest(path, self._field))
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        return {"split": self.split, "files": len(self.paths)}

    def _file_parts(self, path: Path) -> list[Part]:
        if path.suffix == ".parquet":
            return parquet_parts(path, self.origin, self.columns)
        found: list[Part] = []
        first = count = first_row = rows = num_bytes = 0

        def flush() -> None:
            nonlocal first, count, first_row, rows, num_bytes
            if rows:
                found.append(
                    ArrowPart(
                        path=path,
                        first_batch=first,
                        num_batches=count,
                        first_row=first_row,
                        num_bytes=num_bytes,
                        field=self._field,
                        columns=self.columns,
                    )
                )
            first, first_row, count, rows, num_bytes = first + count, first_row + rows, 0, 0, 0

        for batch in _batches(path, f"{self._field}: {shown(path)}"):
            if num_bytes + batch.get_total_buffer_size() > PART_BYTES:
                flush()
            count, rows = count + 1, rows + batch.num_rows
            num_bytes += batch.get_total_buffer_size()
        flush()
        return found


def _splits(root: Path, name: str, origin: str) -> dict[str, list[Path]]:
    """Finds the files of each split."""
    if not root.is_dir():
        what = "not a folder" if root.exists() else "there is no such folder"
        raise DataError(
            f"{origin}: {what}, and nothing is downloaded; where there is a network, run "
            f"datasets.load_dataset({name!r}).save_to_disk('FOLDER'), copy FOLDER here and name it"
        )
    index = root / "dataset_dict.json"
    if index.exists():
        names = _json(index, origin).get("splits")
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise DataError(f"{origin}: {shown(index)} lists no splits; {_REMEDY}")
        missing = [n for n in names if not (root / n / "state.json").is_file()]
        if missing:
            raise DataError(
                f"{origin}: the split {shown(missing[0])} has no state.json in "
                f"{shown(root / missing[0])}; copy the whole folder again"
            )
        return {n: _saved_files(root / n, origin)[1] for n in names}
    if (root / "state.json").exists():
        split, paths = _saved_files(root, origin)
        return {split: paths}
    return _parquet_splits(root, origin)


def _saved_files(folder: Path, origin: str) -> tuple[str, list[Path]]:
    """Returns the name and the ordered files of a split from `Dataset.save_to_disk`."""
    place = folder / "state.json"
    state = _json(place, origin)
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(
            f"{origin}: {shown(place)} names a selection of rows (_indices_files), which is not "
            "applied here; save the dataset again with flatten_indices().save_to_disk('FOLDER')"
        )
    files = state.get("_data_files")
    is_list = isinstance(files, list) and all(isinstance(f, dict) for f in files)
    names = [f.get("filename") for f in files] if is_list else [None]
    if not all(isinstance(n, str) and n for n in names):
        raise DataError(f"{origin}: {shown(place)} lists no _data_files; {_REMEDY}")
    for name in names:
        if Path(name).name != name:
            raise DataError(f"{origin}: {shown(place)} names {shown(name)}, outside its folder")
    split = state.get("_split")
    return (split if isinstance(split, str) and split else "train"), [folder / n for n in names]


def _parquet_splits(root: Path, origin: str) -> dict[str, list[Path]]:
    """Finds splits by the names of shards, files and folders, as the hub does."""
    paths = [p for p in sorted(root.rglob("*.parquet")) if p.is_file() and not _is_hidden(p, root)]
    if not paths:
        raise DataError(
            f"{origin}: the folder has no dataset_dict.json or state.json, as save_to_disk writes "
            "them, and no .parquet file; name a folder with one of these"
        )
    found: dict[str, list[Path]] = {}
    configs: dict[str, None] = {}
    counts: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        folders = list(path.relative_to(root).parts[:-1])
        shard = _SHARD.fullmatch(path.stem)
        word = _WORD.match(path.stem.lower())
        if shard:
            split = shard["split"]
            counts.setdefault((str(path.parent / split), int(shard["count"])), set()).add(
                int(shard["shard"])
            )
        elif word and word[0] in _SPLITS:
            split = word[0]
        else:
            split = next((f for f in reversed(folders) if f.lower() in _SPLITS), "train")
            folders = [f for f in folders if f != split]
        split = _SPLITS.get(split.lower(), split)
        configs["/".join(f for f in folders if f != "data")] = None
        found.setdefault(split, []).append(path)
    if len(configs) > 1:
        raise DataError(
            f"{origin}: the folder has several datasets: {shown(', '.join(configs))}; name the "
            "folder of one"
        )
    for (stem, count), shards in counts.items():
        if lacking := sorted({*range(count)} - shards):
            raise DataError(
                f"{origin}: {shown(stem)}-{lacking[0]:05}-of-{count:05}.parquet is missing; copy "
                "the whole folder again"
            )
    return found


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _json(path: Path, origin: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"{origin}: cannot read {shown(path)}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: {shown(path)} is not JSON: {error}; {_REMEDY}") from None
    if not isinstance(value, dict):
        raise DataError(f"{origin}: {shown(path)} is not a JSON object; {_REMEDY}")
    return value


def _batches(path: Path, here: str) -> Iterator[Any]:
    """Yields the record batches of an Arrow stream."""
    arrow, ipc = load("pyarrow", here), load("pyarrow.ipc", here)
    number = 0
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - len(_END)))
            is_whole = file.read() == _END
        with arrow.memory_map(str(path)) as memory, ipc.open_stream(memory) as batches:
            for batch in batches:
                yield batch
                number += 1
    except (arrow.ArrowException, MemoryError, ValueError, OSError) as error:
        # pyarrow raises an OSError without errno for a truncated file.
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"{here}: cannot read it: {error.strerror}") from error
        raise DataError(
            f"{here} is damaged, or not an Arrow stream: {one_line(error)} "
            f"(record batch {number}); {_REMEDY}"
        ) from error
    # pyarrow does not notice a stream that is truncated between two batches.
    if not is_whole:
        raise DataError(
            f"{here} is truncated: the end marker of an Arrow stream is missing; {_REMEDY}"
        )
