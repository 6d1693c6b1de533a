"""A LeRobot dataset, v2.1 or v3.0, written episode by episode into a folder that appears when it is whole.

    with DatasetWriter(folder, fps=10, features=features) as writer:
        writer.add_episode({"action": (T, 6), "observation.images.top": (T, H, W, 3), ...}, task="lift the red cube")

T frames of an episode, H x W pixels. Layout: layout.py. What LeRobot's own loader takes: `make lerobot-check`.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.training.data.episode_statistics import combine_statistics, image_statistics, number_statistics
from onbeat.training.data.files import Columns, Files, FilesV21, FilesV30, Target, listed
from onbeat.training.data.layout import (
    ABOUT,
    DATA_FILE_MB,
    DATA_PATH,
    EPISODE,
    FILES_PER_CHUNK,
    FRAME,
    IMAGE,
    INDEX_FEATURES,
    INFO,
    ROW,
    STATS,
    TASK,
    TIMESTAMP,
    V30,
    VIDEO,
    VIDEO_FILE_MB,
    VIDEO_PATH,
    DataError,
    Feature,
)
from onbeat.training.data.video import ENCODINGS


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
        _check_features(features, encoding)
        self.folder, self.fps, self.robot_type, self.version = folder, fps, robot_type, version
        self.features = {**features, **INDEX_FEATURES}
        self.about = dict(about or {})
        self.tasks: dict[str, int] = {}
        self.episodes = self.rows = 0
        self._is_open = True
        self._statistics: dict[str, dict[str, NDArray[Any]]] = {}
        self._partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        target = Target(self._partial, fps, self.features, encoding, data_file_mb, video_file_mb)
        self._files: Files = (FilesV30 if version == V30 else FilesV21)(target)

    def add_episode(self, columns: Columns, task: str | Sequence[str], extra: Mapping[str, Any] | None = None) -> None:
        """Append one episode. columns: (T, ...) of every feature; task: for all frames, or one for each. extra: more
        numbers or texts to keep with the episode. Raises DataError, naming column and row, before anything is written.
        """
        self._check_open()
        arrays = self._check(columns)
        length = len(next(iter(arrays.values())))
        told = [task] * length if isinstance(task, str) else list(task)
        if len(told) != length or not length:
            raise DataError(f"episode {self.episodes} has {length} rows and {len(told)} tasks: give one for each row")
        numbers = [self.tasks.setdefault(text, len(self.tasks)) for text in told]
        arrays |= self._index(length, numbers)
        statistics = {name: self._measure(name, values) for name, values in arrays.items()}
        row = {EPISODE: self.episodes, "tasks": list(dict.fromkeys(told)), "length": length, **(extra or {})}
        try:
            self._files.write(arrays, row, statistics)
        except BaseException:
            self.discard()  # half an episode is in the files
            raise
        self._statistics = combine_statistics([self._statistics, statistics]) if self._statistics else statistics
        self.episodes += 1
        self.rows += length

    def close(self) -> None:
        """Write the metadata and let the folder appear. Raises DataError when there is no episode."""
        self._check_open()
        if not self.episodes:
            self.discard()
            raise DataError(f"{self.folder} would hold no episode: nothing was written")
        self._files.finish(self.tasks)
        _write_json(self._partial / INFO, self._info())
        if self.version == V30:
            _write_json(self._partial / STATS, listed(self._statistics))
        self._partial.rename(self.folder)
        self._is_open = False

    def discard(self) -> None:
        """Remove what was written; no more can be."""
        self._is_open = False
        try:
            self._files.abandon()
        finally:
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

    def _check_open(self) -> None:
        if not self._is_open:
            raise DataError(f"{self.folder} was closed, or given up when an episode failed: write it anew")

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
        target = self._files.target
        v30 = {"data_files_size_in_mb": target.data_file_mb, "video_files_size_in_mb": target.video_file_mb}
        chunks = -(-self.episodes // FILES_PER_CHUNK)
        v21 = {"total_videos": self.episodes * len(self._files.videos), "total_chunks": chunks}
        return {
            "codebase_version": self.version,
            "robot_type": self.robot_type,
            "total_episodes": self.episodes,
            "total_frames": self.rows,
            "total_tasks": len(self.tasks),
            **(v30 if self.version == V30 else v21),
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


def check_vacant(folder: Path) -> None:
    """Raise DataError where there is something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists already: give another folder, or remove it")


def _check_features(features: Mapping[str, Feature], encoding: str) -> None:
    for name, feature in features.items():
        if "/" in name or name in INDEX_FEATURES:
            raise DataError(f"a column cannot be called '{name}': LeRobot keeps such names for itself; rename it")
        odd = any(side % 2 for side in feature.shape[:2])
        if feature.dtype == VIDEO and odd and ENCODINGS[encoding].halves_colour:
            raise DataError(f"'{name}' is {feature.shape}: {encoding} takes even heights and widths; use 'lossless'")
        if not feature.is_number and not feature.is_camera:
            raise DataError(f"'{name}' is text: give it as the episode's task or in its extra")
        if feature.is_depth and feature.dtype != IMAGE:
            raise DataError(f"'{name}' is a depth camera: give it dtype 'image', since no video keeps 16 bits")


def _write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
