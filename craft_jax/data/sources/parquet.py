"""Documents from Parquet files: parts are row groups, documents are rows.

Errors name the file and the row, counted from 0 over the whole file. pyarrow is imported when it is
first needed.
"""

import dataclasses
import importlib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from craft_jax.data.sources.documents import PART_BYTES, Document, Part, one_line, shown
from craft_jax.errors import DataError

_BATCH_ROWS = 1024
_LFS_HEAD = b"version https://git-lfs"
_REMEDY = "copy it again, or leave it out"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParquetPart(Part):
    """Consecutive row groups of a file.

    Attributes:
      path: the file.
      row_groups: their numbers.
      first_row: the number of their first row in the file.
      num_rows: number of rows.
      batch_rows: rows in memory at a time.
      num_bytes: approximate uncompressed bytes.
      field: the config field that named the file, for messages.
      columns: the columns to read; None for all.
    """

    path: Path
    row_groups: tuple[int, ...]
    first_row: int
    num_rows: int
    batch_rows: int
    num_bytes: int
    field: str = "data.path"
    columns: tuple[str, ...] | None = None

    def documents(self) -> Iterator[Document]:
        here = f"{self.field}: {shown(self.path)}"
        file = _open(self.path, here)
        row = self.first_row
        try:
            batches = file.iter_batches(
                batch_size=self.batch_rows,
                row_groups=list(self.row_groups),
                columns=wanted_columns(file.schema_arrow, self.columns),
                use_threads=False,
            )
            while (batch := _next(batches, f"{here} near row {row}")) is not None:
                yield from batch_documents(batch, here, row)
                row += batch.num_rows
        finally:
            file.close()
        if row != self.first_row + self.num_rows:
            raise DataError(
                f"{here} is damaged: it has {row - self.first_row} rows from row {self.first_row} "
                f"on, where its footer says {self.num_rows}; {_REMEDY}"
            )


def parquet_parts(
    path: Path, origin: str = "data.path", columns: tuple[str, ...] | None = None
) -> list[Part]:
    """Lists the parts of a Parquet file; reads its footer only.

    Args:
      path: the file.
      origin: the config value that names it, such as `data.path=texts`.
      columns: the columns to read; None for all.

    Raises:
      DataError: it is not a Parquet file, or damaged.
    """
    field = origin.partition("=")[0]
    file = _open(path, f"{field}: {shown(path)}")
    metadata = file.metadata
    found: list[Part] = []
    groups: list[int] = []
    first_row = rows = num_bytes = 0

    def flush() -> None:
        nonlocal first_row, rows, num_bytes
        if rows:
            found.append(
                ParquetPart(
                    path=path,
                    row_groups=tuple(groups),
                    first_row=first_row,
                    num_rows=rows,
                    batch_rows=min(_BATCH_ROWS, max(1, PART_BYTES * rows // max(num_bytes, 1))),
                    num_bytes=num_bytes,
                    field=field,
                    columns=columns,
                )
            )
        groups.clear()
        first_row, rows, num_bytes = first_row + rows, 0, 0

    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if num_bytes + group.total_byte_size > PART_BYTES:
            flush()
        groups.append(number)
        rows += group.num_rows
        num_bytes += group.total_byte_size
    flush()
    file.close()
    if first_row != metadata.num_rows:
        raise DataError(
            f"{field}: {shown(path)} is damaged: its row groups have {first_row} rows, where its "
            f"footer says {metadata.num_rows}; {_REMEDY}"
        )
    return found


def batch_documents(batch: Any, here: str, first_row: int) -> Iterator[Document]:
    """Yields the rows of a record batch.

    A struct of lists, the Hugging Face encoding of a sequence of records, becomes a list of dicts.

    Args:
      batch: a `pyarrow.RecordBatch`.
      here: its file, for messages.
      first_row: the number of its first row in the file.

    Raises:
      DataError: it has text that is not UTF-8, or invalid offsets.
    """
    arrow = load("pyarrow", here)
    try:
        # An invalid offset in a damaged file would read outside the batch's memory.
        batch.validate(full=True)
    except arrow.ArrowInvalid as error:
        row = first_row + _first_invalid(batch, arrow.ArrowInvalid)
        what = "text that is not UTF-8" if "UTF8" in str(error) else f"damaged data ({error})"
        raise DataError(f"{here} row {row} has {' '.join(what.split())}; {_REMEDY}") from error
    names = batch.schema.names
    columns = [_values(batch.column(i), arrow) for i in range(len(names))]
    for i in range(batch.num_rows):
        fields = {name: column[i] for name, column in zip(names, columns, strict=True)}
        yield Document(place=f"{here} row {first_row + i}", fields=fields)


def wanted_columns(schema: Any, columns: tuple[str, ...] | None) -> list[str]:
    """Returns the columns of a schema to read.

    Leaves out times, which hold no text and may have no Python value. If a requested column is
    missing, returns all others, so that a message can list them.

    Args:
      schema: a `pyarrow.Schema`.
      columns: the requested columns; None for all.
    """
    is_temporal = importlib.import_module("pyarrow").types.is_temporal
    names = [field.name for field in schema if not is_temporal(field.type)]
    if columns is None or not set(columns) <= set(names):
        return names
    return [name for name in names if name in columns]


def load(name: str, here: str) -> types.ModuleType:
    """Imports an optional package.

    Raises:
      DataError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DataError(f"{here} needs the package {package}: pip install {package}") from error


def _open(path: Path, here: str) -> Any:
    if path.exists() and not path.is_file():
        raise DataError(f"{here} is not a file; name a Parquet file")
    arrow, parquet = load("pyarrow", here), load("pyarrow.parquet", here)
    try:
        with path.open("rb") as file:
            head = file.read(len(_LFS_HEAD))
        if head == _LFS_HEAD:
            raise DataError(f"{here} is a Git LFS pointer, not the file; run git lfs pull")
        return parquet.ParquetFile(path, page_checksum_verification=True)
    except (arrow.ArrowException, MemoryError, ValueError) as error:
        raise DataError(
            f"{here} is not a whole Parquet file: {one_line(error)}; {_REMEDY}"
        ) from None
    except OSError as error:
        if error.errno:
            raise DataError(f"{here}: cannot read it: {error.strerror}") from error
        raise DataError(
            f"{here} is not a whole Parquet file: {one_line(error)}; {_REMEDY}"
        ) from None


def _next(batches: Iterator[Any], here: str) -> Any:
    arrow = importlib.import_module("pyarrow")
    try:
        return next(batches, None)
    except (arrow.ArrowException, MemoryError, ValueError, OSError) as error:
        raise DataError(f"{here} is damaged: {one_line(error)}; {_REMEDY}") from error


def _first_invalid(batch: Any, invalid: type[Exception]) -> int:
    for i in range(batch.num_rows):
        try:
            batch.slice(i, 1).validate(full=True)
        except invalid:
            return i
    return 0


def _values(column: Any, arrow: types.ModuleType) -> list[Any]:
    kinds = arrow.types
    without_times = _without_times(column.type, arrow)
    if without_times != column.type:
        column = column.cast(without_times)
    values = column.to_pylist()
    if kinds.is_struct(column.type):
        inner = [column.type.field(i).type for i in range(column.type.num_fields)]
        if inner and all(kinds.is_list(t) or kinds.is_large_list(t) for t in inner):
            return [_transposed(value) for value in values]
    return values


def _without_times(kind: Any, arrow: types.ModuleType) -> Any:
    """Returns a type with text in place of times, and integers in place of durations.

    Python has no values for times and durations of nanoseconds.
    """
    kinds = arrow.types
    if kinds.is_duration(kind):
        return arrow.int64()
    if kinds.is_temporal(kind) and not kinds.is_interval(kind):
        return arrow.string()
    if kinds.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return arrow.struct([f.with_type(_without_times(f.type, arrow)) for f in fields])
    for is_kind, make in (
        (kinds.is_list, arrow.list_),
        (kinds.is_large_list, arrow.large_list),
        (kinds.is_fixed_size_list, lambda field: arrow.list_(field, kind.list_size)),
    ):
        if is_kind(kind):
            item = kind.value_field
            return make(item.with_type(_without_times(item.type, arrow)))
    if kinds.is_map(kind):
        item = _without_times(kind.item_type, arrow)
        return arrow.map_(_without_times(kind.key_type, arrow), item)
    return kind


def _transposed(value: dict[str, list[Any]] | None) -> Any:
    if value is None or None in value.values() or len({*map(len, value.values())}) != 1:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
