"""The files of a LeRobot dataset being written: tables, videos, and what the metadata says of each episode."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from onbeat.training.data.images import encode_png
from onbeat.training.data.layout import (
    DATA_PATH,
    EPISODE,
    EPISODE_STATS,
    EPISODE_TABLES,
    EPISODES,
    FILES_PER_CHUNK,
    IMAGE,
    TASK,
    TASKS,
    V21,
    V30,
    VIDEO,
    VIDEO_PATH,
    Feature,
)
from onbeat.training.data.video import VideoWriter

MB = 2**20
IMAGE_CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
EPISODES_AT_ONCE = 100  # rows of episode metadata held back

Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Target:
    """What is written where. encoding: of videos. data_file_mb, video_file_mb: a v3.0 file that is larger is closed."""

    folder: Path
    fps: float
    features: Mapping[str, Feature]
    encoding: str
    data_file_mb: float
    video_file_mb: float


@dataclass(slots=True)
class _Roll:
    """Files of one kind, numbered on: a fresh one when the last has grown enough. writer: the open one."""

    open: Callable[[Path], Any]
    pattern: str
    limit_mb: float
    number: int = -1
    writer: Any = None
    path: Path = field(default_factory=Path)

    @property
    def place(self) -> dict[str, int]:
        return {"chunk_index": self.number // FILES_PER_CHUNK, "file_index": self.number % FILES_PER_CHUNK}

    def advance(self, folder: Path) -> bool:
        """Make sure that a file is open; whether it is a fresh one."""
        if self.writer is not None and self.path.stat().st_size < self.limit_mb * MB:
            return False
        self.close()
        self.number += 1
        self.path = folder / self.pattern.format(**self.place)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.writer = self.open(self.path)
        return True

    def close(self) -> None:
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.close()


class Files:
    """What both versions share: how a table and a camera's frames are written."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.videos = [name for name, feature in target.features.items() if feature.dtype == VIDEO]
        self._schema = pa.schema([(n, _arrow_type(f)) for n, f in target.features.items() if f.dtype != VIDEO])

    def write(self, arrays: Columns, row: dict[str, Any], statistics: Mapping[str, Columns]) -> None:
        """One episode: its arrays, what is said of it, its statistics."""
        raise NotImplementedError

    def finish(self, tasks: Mapping[str, int]) -> None:
        """Close everything and write the metadata. tasks: their numbers by text."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Close everything, as it is."""
        raise NotImplementedError

    def _table(self, arrays: Columns) -> pa.Table:
        return pa.table([_arrow_column(arrays[f.name], f.type) for f in self._schema], schema=self._schema)

    def _open_table(self, path: Path) -> pq.ParquetWriter:
        return pq.ParquetWriter(path, self._schema, compression="snappy")

    def _open_video(self, path: Path, name: str) -> VideoWriter:
        height, width, _ = self.target.features[name].shape
        return VideoWriter(path, fps=self.target.fps, height=height, width=width, encoding=self.target.encoding)


class FilesV30(Files):
    """Many episodes a file."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._data = _Roll(self._open_table, DATA_PATH[V30], target.data_file_mb)
        self._cameras = {name: self._roll(name, target.video_file_mb) for name in self.videos}
        self._count = 0
        self._rows: list[dict[str, Any]] = []
        self._meta: pq.ParquetWriter | None = None

    def write(self, arrays: Columns, row: dict[str, Any], statistics: Mapping[str, Columns]) -> None:
        self._data.advance(self.target.folder)
        self._data.writer.write_table(self._table(arrays))
        place = {f"data/{key}": value for key, value in self._data.place.items()}
        place |= {"dataset_from_index": self._count, "dataset_to_index": self._count + row["length"]}
        self._count += row["length"]
        for name, roll in self._cameras.items():
            place |= self._write_video(name, roll, arrays[name])
        place |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        figures = {f"stats/{name}/{k}": v.tolist() for name, part in statistics.items() for k, v in part.items()}
        self._rows.append({**row, **place, **figures})
        if len(self._rows) == EPISODES_AT_ONCE:
            self._flush()

    def finish(self, tasks: Mapping[str, int]) -> None:
        self._flush()
        _write_tasks(self.target.folder / TASKS[V30], tasks)
        self.abandon()

    def abandon(self) -> None:
        for opened in (self._data, *self._cameras.values(), self._meta):
            if opened is not None:
                opened.close()

    def _roll(self, name: str, limit_mb: float) -> _Roll:
        pattern = VIDEO_PATH[V30].replace("{video_key}", name)
        return _Roll(lambda path: self._open_video(path, name), pattern, limit_mb)

    def _write_video(self, name: str, roll: _Roll, frames: NDArray[np.uint8]) -> dict[str, Any]:
        roll.advance(self.target.folder)
        first, fps = roll.writer.count, self.target.fps
        for frame in frames:
            roll.writer.append(frame)
        times = {"from_timestamp": first / fps, "to_timestamp": roll.writer.count / fps}
        return {f"videos/{name}/{key}": value for key, value in {**roll.place, **times}.items()}

    def _flush(self) -> None:
        if not self._rows:
            return
        table = pa.Table.from_pylist(self._rows, schema=None if self._meta is None else self._meta.schema)
        if self._meta is None:  # the first rows fix the types
            path = self.target.folder / EPISODE_TABLES.format(chunk_index=0, file_index=0)
            path.parent.mkdir(parents=True)
            self._meta = pq.ParquetWriter(path, table.schema, compression="snappy")
        self._meta.write_table(table)
        self._rows = []


class FilesV21(Files):
    """One episode a file."""

    def write(self, arrays: Columns, row: dict[str, Any], statistics: Mapping[str, Columns]) -> None:
        place = {"episode_chunk": row[EPISODE] // FILES_PER_CHUNK, "episode_index": row[EPISODE]}
        path = self.target.folder / DATA_PATH[V21].format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(self._table(arrays), path)
        for name in self.videos:
            with self._open_video(self.target.folder / VIDEO_PATH[V21].format(video_key=name, **place), name) as video:
                for frame in arrays[name]:
                    video.append(frame)
        _append_line(self.target.folder / EPISODES, row)
        _append_line(self.target.folder / EPISODE_STATS, {EPISODE: row[EPISODE], "stats": listed(statistics)})

    def finish(self, tasks: Mapping[str, int]) -> None:
        for text, number in tasks.items():
            _append_line(self.target.folder / TASKS[V21], {TASK: number, "task": text})

    def abandon(self) -> None:
        pass


def listed(statistics: Mapping[str, Columns]) -> dict[str, dict[str, Any]]:
    """Statistics as JSON has them."""
    return {name: {key: value.tolist() for key, value in part.items()} for name, part in statistics.items()}


def _arrow_type(feature: Feature) -> pa.DataType:
    if feature.dtype == IMAGE:
        return IMAGE_CELL
    kind = pa.from_numpy_dtype(np.dtype(feature.dtype))
    if len(feature.shape) == 1:
        return kind if feature.shape == (1,) else pa.list_(kind, feature.shape[0])
    for _ in feature.shape:
        kind = pa.list_(kind)
    return kind


def _arrow_column(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    if kind == IMAGE_CELL:
        return pa.array([{"bytes": encode_png(frame), "path": None} for frame in values], kind)
    if not pa.types.is_nested(kind):
        return pa.array(values[:, 0], kind)
    return pa.array(values.tolist(), kind)


def _write_tasks(path: Path, tasks: Mapping[str, int]) -> None:
    """The table as pandas would write it: the texts are its index."""
    index = "__index_level_0__"
    text = {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    number = {"name": TASK, "field_name": TASK, "pandas_type": "int64", "numpy_type": "int64", "metadata": None}
    told = {"index_columns": [index], "column_indexes": [], "columns": [number, text], "pandas_version": "2.0.0"}
    table = pa.table({TASK: pa.array(tasks.values(), pa.int64()), index: pa.array(tasks, pa.string())})
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(told)}), path)


def _append_line(path: Path, row: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
