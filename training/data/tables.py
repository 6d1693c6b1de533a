"""Parquet files, read by rows: a column of a row group at a time, the most recent kept within a budget of memory."""

import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from onbeat.training.data.layout import DataError, Feature

CACHE_BYTES = 512 * 2**20


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole, small table. Raises DataError."""
    return open_parquet(path).read(columns=columns and list(columns))


def open_parquet(path: Path, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """Raises DataError where the file is missing or damaged."""
    try:
        return pq.ParquetFile(path, metadata=metadata, memory_map=True)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: copy the whole dataset") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is no whole parquet file ({error}): copy it again") from None


class Tables:
    """Random access to the rows of many files. Safe to use from several threads."""

    def __init__(self, cache_bytes: int = CACHE_BYTES) -> None:
        self._budget, self._used = cache_bytes, 0
        self._files: dict[Path, _File] = {}
        self._columns: OrderedDict[tuple[Path, int, str], Any] = OrderedDict()
        self._lock = threading.Lock()

    def rows(self, path: Path) -> int:
        """How many a file has. Raises DataError."""
        return self._describe(path).ends[-1]

    def numbers(self, path: Path, name: str, feature: Feature, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) of a numeric column: (n, width). Raises DataError where they are not there or damaged."""
        parts = []
        for group, first, last in self._spans(path, start, stop):
            values = self._column(path, group, name, feature)
            parts.append(values[max(start - first, 0) : min(stop, last) - first])
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        check_finite(values, name, path, start)
        return values

    def cell(self, path: Path, name: str, row: int) -> Any:
        """One cell of a column of another kind."""
        group, first, _ = next(iter(self._spans(path, row, row + 1)))
        return self._column(path, group, name, None)[row - first].as_py()

    def _spans(self, path: Path, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(row group, its first row, its end) of all that hold rows [start, stop)."""
        file = self._describe(path)
        if not 0 <= start < stop <= file.ends[-1]:
            raise DataError(f"{path} has {file.ends[-1]} rows, and row {stop - 1} is asked: copy it again, whole")
        first, last = bisect_right(file.ends, start), bisect_left(file.ends, stop)
        return [(group, file.ends[group - 1] if group else 0, file.ends[group]) for group in range(first, last + 1)]

    def _describe(self, path: Path) -> "_File":
        if path not in self._files:
            metadata = open_parquet(path).metadata
            counts = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
            self._files[path] = _File(metadata, list(accumulate(counts)) or [0])
        return self._files[path]

    def _column(self, path: Path, group: int, name: str, feature: Feature | None) -> Any:
        """A whole column of a row group: numbers where `feature` says which, or as Arrow has it."""
        key = (path, group, name)
        with self._lock:
            if key in self._columns:
                self._columns.move_to_end(key)
                return self._columns[key]
        file = self._describe(path)
        rows = read_group(path, group, name, file.metadata)
        first = file.ends[group - 1] if group else 0
        return self._keep(key, rows if feature is None else to_numbers(rows, name, feature, path, first))

    def _keep(self, key: tuple[Path, int, str], rows: Any) -> Any:
        with self._lock:
            if key not in self._columns:
                self._columns[key] = rows
                self._used += rows.nbytes
            while self._used > self._budget and len(self._columns) > 1:
                self._used -= self._columns.popitem(last=False)[1].nbytes
        return rows


@dataclass(frozen=True, slots=True)
class _File:
    """ends: for every row group, the row after its last."""

    metadata: pq.FileMetaData
    ends: list[int]


def read_group(path: Path, group: int, column: str, metadata: pq.FileMetaData | None = None) -> pa.ChunkedArray:
    """One column of one row group. Raises DataError."""
    file = open_parquet(path, metadata)
    if column not in file.schema_arrow.names:
        raise DataError(f"{path} has no column '{column}': meta/info.json names it, so copy the table again")
    try:
        return file.read_row_group(group, columns=[column]).column(column)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: column '{column}' of row group {group} is damaged ({error}): copy it again") from None


def stream_groups(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, pa.ChunkedArray]]]:
    """(first row, columns) of every row group of a file, in order; no more than one group is held."""
    file, first = open_parquet(path), 0
    for group in range(file.metadata.num_row_groups):
        yield first, {name: read_group(path, group, name, file.metadata) for name in columns}
        first += file.metadata.row_group(group).num_rows


def to_numbers(rows: pa.ChunkedArray, name: str, feature: Feature, path: Path, first_row: int) -> NDArray[Any]:
    """A numeric column as (n, width) in the feature's type. Raises DataError naming the first row of another width."""
    flat, expected = rows.combine_chunks(), feature.shape
    if pa.types.is_nested(rows.type) or expected != (1,):
        _check_width(rows, name, expected, path, first_row)
    while pa.types.is_nested(flat.type):
        flat = flat.flatten()
    if flat.null_count:
        row = int(np.flatnonzero(np.asarray(flat.is_null()))[0]) // feature.width
        raise DataError(f"{path} row {first_row + row}: '{name}' is empty: record that episode again or leave it out")
    values = np.asarray(flat.to_numpy(zero_copy_only=False), dtype=feature.dtype)
    if values.size != len(rows) * feature.width:
        raise DataError(f"{path} from row {first_row} on: '{name}' is not {expected}: meta/info.json says so")
    return values.reshape(len(rows), feature.width)


def check_finite(values: NDArray[Any], name: str, path: Path, first_row: int) -> None:
    """Raise DataError naming the first row with a NaN or an infinity."""
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return
    odd = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if odd.size:
        raise DataError(
            f"{path} row {first_row + odd[0]}: '{name}' is not finite ({values[odd[0]].tolist()}): "
            "record that episode again or leave it out"
        )


def _check_width(rows: pa.ChunkedArray, name: str, shape: tuple[int, ...], path: Path, first_row: int) -> None:
    if not pa.types.is_nested(rows.type):
        raise DataError(f"{path} row {first_row}: '{name}' has 1 number, not {shape}: meta/info.json says so")
    lengths = np.asarray(pc.call_function("list_value_length", [rows]).fill_null(0))
    odd = np.flatnonzero(lengths != shape[0])
    if odd.size:
        raise DataError(
            f"{path} row {first_row + odd[0]}: '{name}' has {lengths[odd[0]]} numbers, not {shape[0]}: "
            "meta/info.json says so; record that episode again or leave it out"
        )
