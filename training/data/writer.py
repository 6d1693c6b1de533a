"""A LeRobot dataset, v2.1 or v3.0, written episode by episode into a folder that appears when it is whole.

    with DatasetWriter(folder, fps=10, features=features) as writer:
        writer.add_episode({"action": (T, 6), "observation.images.top": (T, H, W, 3), ...}, task="lift the red cube")

T frames of an episode, H x W pixels. Layout: layout.py. What LeRobot's own loader takes: `make lerobot-check`.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from onbeat.training.data.episode_statistics import combine_statistics, image_statistics, number_statistics
from onbeat.training.data.images import encode_png
from onbeat.training.data.layout import (
    ABOUT,
    DATA_FILE_MB,
    DATA_PATH,
    EPISODE,
    EPISODE_STATS,
    EPISODE_TABLES,
    EPISODES,
    FILES_PER_CHUNK,
    FRAME,
    IMAGE,
    INDEX_FEATURES,
    INFO,
    ROW,
    STATS,
    TASK,
    TASKS,
    TIMESTAMP,
    V21,
    V30,
    VIDEO,
    VIDEO_FILE_MB,
    VIDEO_PATH,
    DataError,
    Feature,
)
from onbeat.training.data.video import VideoWriter

MB = 2**20
IMAGE_CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
EPISODES_AT_ONCE = 100  # rows of episode metadata held back

Columns = Mapping[str, NDArray[Any]]


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
        if self.writer is not None:
            self.writer.close()
            self.writer = None


class DatasetWriter:
    """One dataset being written. Leaving the `with` block by an exception leaves nothing behind.

    fps: rows and frames per second. features: every column and camera but the index columns. encoding: of videos, one
    of video.ENCODINGS. version: "v3.0" or "v2.1". about: more to keep in meta/info.json, under the key "onbeat".
    Raises DataError where the folder holds something already.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fps: float,
        features: Mapping[str, Feature],
        robot_type: str | None = None,
        version: str = V30,
        encoding: str = "lossless",
        about: Mapping[str, Any] | None = None,
        data_file_mb: float = DATA_FILE_MB,
        video_file_mb: float = VIDEO_FILE_MB,
    ) -> None:
        check_vacant(folder)
        _check_features(features)
        self.folder, self.fps, self.robot_type, self.version = folder, fps, robot_type, version
        self.features = {**features, **INDEX_FEATURES}
        self.about = dict(about or {})
        self.tasks: dict[str, int] = {}
        self.episodes = self.rows = 0
        self._statistics: dict[str, dict[str, NDArray[Any]]] = {}
        self._sizes_mb = {"data_files_size_in_mb": data_file_mb, "video_files_size_in_mb": video_file_mb}
        self._partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._files: _Files = (_FilesV30 if version == V30 else _FilesV21)(self, encoding)

    def add_episode(self, columns: Columns, task: str | Sequence[str], extra: Mapping[str, Any] | None = None) -> None:
        """Append one episode. columns: (T, ...) of every feature; task: for all frames, or one for each. extra: more
        numbers or texts to keep with the episode. Raises DataError, naming column and row, before anything is written.
        """
        arrays = self._check(columns)
        length = len(next(iter(arrays.values())))
        told = [task] * length if isinstance(task, str) else list(task)
        if len(told) != length or not length:
            raise DataError(f"episode {self.episodes} has {length} rows and {len(told)} tasks: give one for each row")
        numbers = [self.tasks.setdefault(text, len(self.tasks)) for text in told]
        arrays |= self._index(length, numbers)
        statistics = {name: self._measure(name, values) for name, values in arrays.items()}
        row = {EPISODE: self.episodes, "tasks": list(dict.fromkeys(told)), "length": length, **(extra or {})}
        self._files.write(arrays, row, statistics)
        self._statistics = combine_statistics([self._statistics, statistics]) if self._statistics else statistics
        self.episodes += 1
        self.rows += length

    def close(self) -> None:
        """Write the metadata and let the folder appear. Raises DataError when there is no episode."""
        if not self.episodes:
            self.discard()
            raise DataError(f"{self.folder} would hold no episode: nothing was written")
        self._files.finish()
        _write_json(self._partial / INFO, self._info())
        if self.version == V30:
            _write_json(self._partial / STATS, listed(self._statistics))
        self._partial.rename(self.folder)

    def discard(self) -> None:
        """Remove what was written."""
        self._files.abandon()
        shutil.rmtree(self._partial, ignore_errors=True)

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _check(self, columns: Columns) -> dict[str, NDArray[Any]]:
        wanted = {name: feature for name, feature in self.features.items() if name not in INDEX_FEATURES}
        odd = sorted(set(columns) ^ set(wanted))
        if odd:
            raise DataError(f"'{odd[0]}' is unknown or missing in episode {self.episodes}: give {', '.join(wanted)}")
        arrays = {name: self._check_column(name, feature, columns[name]) for name, feature in wanted.items()}
        lengths = {len(values) for values in arrays.values()}
        if len(lengths) != 1:
            raise DataError(
                f"columns of episode {self.episodes} have {sorted(lengths)} rows: give each the same number"
            )
        return arrays

    def _check_column(self, name: str, feature: Feature, values: NDArray[Any]) -> NDArray[Any]:
        where = f"episode {self.episodes}: '{name}'"
        if feature.is_camera:
            shape, kind = (feature.shape[:2], "uint16") if feature.is_depth else (feature.shape, "uint8")
            if values.shape[1:] != shape or values.dtype != kind:
                raise DataError(f"{where} is {values.dtype} {values.shape[1:]}, not {kind} {shape}: give such frames")
            return values
        if values.shape[1:] != feature.shape and not (values.ndim == 1 and feature.shape == (1,)):
            raise DataError(f"{where} is {values.shape[1:]} a row, not {feature.shape}: it is for another robot")
        odd = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        if odd.size:
            raise DataError(f"{where} is not finite at row {odd[0]}: leave the episode out, or record it again")
        return values.astype(feature.dtype).reshape(len(values), *feature.shape)

    def _index(self, length: int, tasks: list[int]) -> dict[str, NDArray[Any]]:
        count = np.arange(length)
        columns = {
            TIMESTAMP: (count / self.fps).astype(np.float32),
            FRAME: count,
            EPISODE: np.full(length, self.episodes),
            ROW: self.rows + count,
            TASK: np.array(tasks),
        }
        return {name: values[:, None] for name, values in columns.items()}

    def _measure(self, name: str, values: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return image_statistics(values) if self.features[name].is_camera else number_statistics(values)

    def _info(self) -> dict[str, Any]:
        v21 = {
            "total_videos": self.episodes * len(self._files.videos),
            "total_chunks": -(-self.episodes // FILES_PER_CHUNK),
        }
        return {
            "codebase_version": self.version,
            "robot_type": self.robot_type,
            "total_episodes": self.episodes,
            "total_frames": self.rows,
            "total_tasks": len(self.tasks),
            **(self._sizes_mb if self.version == V30 else v21),
            "chunks_size": FILES_PER_CHUNK,
            "fps": int(self.fps) if self.fps == int(self.fps) else self.fps,
            "splits": {"train": f"0:{self.episodes}"},
            "data_path": DATA_PATH[self.version],
            "video_path": VIDEO_PATH[self.version] if self._files.videos else None,
            "features": {name: self._described(feature) for name, feature in self.features.items()},
            **({ABOUT: self.about} if self.about else {}),
        }

    def _described(self, feature: Feature) -> dict[str, Any]:
        document = feature.to_json()
        if feature.dtype == VIDEO:
            height, width, channels = feature.shape
            stream = {"height": height, "width": width, "channels": channels, "fps": self.fps, "is_depth_map": False}
            told = {f"video.{key}": value for key, value in stream.items()}
            document["info"] = {**told, "video.codec": "h264", "has_audio": False, **document.get("info", {})}
        return document


class _Files:
    """What both versions share: how a table and a camera's frames are written."""

    def __init__(self, owner: DatasetWriter, encoding: str) -> None:
        self._owner, self._encoding, self.folder = owner, encoding, owner._partial
        self.videos = [name for name, feature in owner.features.items() if feature.dtype == VIDEO]
        self._schema = pa.schema([(n, _arrow_type(f)) for n, f in owner.features.items() if f.dtype != VIDEO])

    def write(self, arrays: Columns, row: dict[str, Any], statistics: Mapping[str, Columns]) -> None:
        """One episode: its arrays, what is said of it, its statistics."""
        raise NotImplementedError

    def finish(self) -> None:
        """Close everything and write the metadata."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Close everything, as it is."""
        raise NotImplementedError

    def _table(self, arrays: Columns) -> pa.Table:
        return pa.table([_arrow_column(arrays[f.name], f.type) for f in self._schema], schema=self._schema)

    def _open_table(self, path: Path) -> pq.ParquetWriter:
        return pq.ParquetWriter(path, self._schema, compression="snappy")

    def _open_video(self, path: Path, name: str) -> VideoWriter:
        height, width, _ = self._owner.features[name].shape
        return VideoWriter(path, fps=self._owner.fps, height=height, width=width, encoding=self._encoding)


class _FilesV30(_Files):
    def __init__(self, owner: DatasetWriter, encoding: str) -> None:
        super().__init__(owner, encoding)
        data_mb, video_mb = owner._sizes_mb.values()
        self._data = _Roll(self._open_table, DATA_PATH[V30], data_mb)
        self._cameras = {name: self._roll(name, video_mb) for name in self.videos}
        self._rows: list[dict[str, Any]] = []
        self._meta: pq.ParquetWriter | None = None

    def write(self, arrays: Columns, row: dict[str, Any], statistics: Mapping[str, Columns]) -> None:
        self._data.advance(self.folder)
        self._data.writer.write_table(self._table(arrays))
        place = {f"data/{key}": value for key, value in self._data.place.items()}
        place |= {"dataset_from_index": self._owner.rows, "dataset_to_index": self._owner.rows + row["length"]}
        for name, roll in self._cameras.items():
            place |= self._write_video(name, roll, arrays[name])
        place |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        figures = {f"stats/{name}/{k}": v.tolist() for name, part in statistics.items() for k, v in part.items()}
        self._rows.append({**row, **place, **figures})
        if len(self._rows) == EPISODES_AT_ONCE:
            self._flush()

    def finish(self) -> None:
        self._flush()
        _write_tasks(self.folder / TASKS[V30], self._owner.tasks)
        self.abandon()

    def abandon(self) -> None:
        for opened in (self._data, *self._cameras.values(), self._meta):
            if opened is not None:
                opened.close()

    def _roll(self, name: str, limit_mb: float) -> _Roll:
        pattern = VIDEO_PATH[V30].replace("{video_key}", name)
        return _Roll(lambda path: self._open_video(path, name), pattern, limit_mb)

    def _write_video(self, name: str, roll: _Roll, frames: NDArray[np.uint8]) -> dict[str, Any]:
        roll.advance(self.folder)
        first, fps = roll.writer.count, self._owner.fps
        for frame in frames:
            roll.writer.append(frame)
        times = {"from_timestamp": first / fps, "to_timestamp": roll.writer.count / fps}
        return {f"videos/{name}/{key}": value for key, value in {**roll.place, **times}.items()}

    def _flush(self) -> None:
        if not self._rows:
            return
        table = pa.Table.from_pylist(self._rows, schema=None if self._meta is None else self._meta.schema)
        if self._meta is None:  # the first rows fix the types
            path = self.folder / EPISODE_TABLES.format(chunk_index=0, file_index=0)
            path.parent.mkdir(parents=True)
            self._meta = pq.ParquetWriter(path, table.schema, compression="snappy")
        self._meta.write_table(table)
        self._rows = []


class _FilesV21(_Files):
    def write(self, arrays: Columns, row: dict[str, Any], statistics: Mapping[str, Columns]) -> None:
        place = {"episode_chunk": row[EPISODE] // FILES_PER_CHUNK, "episode_index": row[EPISODE]}
        path = self.folder / DATA_PATH[V21].format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(self._table(arrays), path)
        for name in self.videos:
            with self._open_video(self.folder / VIDEO_PATH[V21].format(video_key=name, **place), name) as video:
                for frame in arrays[name]:
                    video.append(frame)
        _append_line(self.folder / EPISODES, row)
        _append_line(self.folder / EPISODE_STATS, {EPISODE: row[EPISODE], "stats": listed(statistics)})

    def finish(self) -> None:
        for text, number in self._owner.tasks.items():
            _append_line(self.folder / TASKS[V21], {TASK: number, "task": text})

    def abandon(self) -> None:
        pass


def check_vacant(folder: Path) -> None:
    """Raise DataError where there is something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists already: give another folder, or remove it")


def listed(statistics: Mapping[str, Columns]) -> dict[str, dict[str, Any]]:
    """Statistics as JSON has them."""
    return {name: {key: value.tolist() for key, value in part.items()} for name, part in statistics.items()}


def _check_features(features: Mapping[str, Feature]) -> None:
    for name, feature in features.items():
        if "/" in name or name in INDEX_FEATURES:
            raise DataError(f"a column cannot be called '{name}': LeRobot keeps such names for itself; rename it")
        if not feature.is_number and not feature.is_camera:
            raise DataError(f"'{name}' is text: give it as the episode's task or in its extra")
        if feature.is_depth and feature.dtype != IMAGE:
            raise DataError(f"'{name}' is a depth camera: give it dtype 'image', since no video keeps 16 bits")


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


def _write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def _append_line(path: Path, row: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
