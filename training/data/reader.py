"""A LeRobot dataset, v2.1 or v3.0, opened for reading: any row of any episode, any camera's frame, or all in a stream.

    dataset = open_dataset(folder)
    dataset.numbers(episode=3, name="action", start=10, stop=26)      (16, width)
    dataset.image(episode=3, frame=10, camera="observation.images.top")

n rows, H x W pixels.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.training.data.images import read_stored
from onbeat.training.data.layout import (
    ABOUT,
    EPISODE,
    EPISODES,
    FRAME,
    IMAGE,
    INDEX_FEATURES,
    INFO,
    TASK,
    TASKS,
    TIMESTAMP,
    V21,
    V30,
    VERSIONS,
    DataError,
    Episode,
    Feature,
    Info,
    Span,
)
from onbeat.training.data.tables import Tables, check_finite, open_parquet, read_table, stream_groups, to_numbers
from onbeat.training.data.video import TOLERANCE_S, VideoReaders


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of one file. columns: (n, width) by name."""

    path: Path
    first_row: int
    columns: dict[str, NDArray[Any]]


class Dataset:
    """An open dataset. Safe to read from several threads."""

    def __init__(self, folder: Path, info: Info, episodes: Sequence[Episode], tasks: dict[int, str]) -> None:
        self.folder, self.info, self.episodes, self.tasks = folder, info, tuple(episodes), tasks
        self._tables, self._videos = Tables(), VideoReaders()

    def __len__(self) -> int:
        """Rows of all episodes."""
        return sum(episode.length for episode in self.episodes)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """(E + 1,) the number of each episode's first row, counted over all, and the number of rows."""
        return np.cumsum([0, *(episode.length for episode in self.episodes)])

    def locate(self, row: int) -> tuple[int, int]:
        """(episode, frame) of a row counted over all."""
        episode = int(np.searchsorted(self.starts, row, "right")) - 1
        return episode, row - int(self.starts[episode])

    def numbers(self, episode: int, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows [start, stop) of an episode's column: (n, width). Raises DataError where they are damaged."""
        taken = self.episodes[episode]
        first, last = taken.first_row + start, taken.first_row + (taken.length if stop is None else stop)
        return self._tables.numbers(taken.data, name, self.feature(name), first, last)

    def image(self, episode: int, frame: int, camera: str) -> NDArray[Any]:
        """One frame: (H, W, 3) uint8 RGB, or (H, W) uint16 depth. Raises DataError."""
        taken = self.episodes[episode]
        if self.feature(camera).dtype == IMAGE:
            row = taken.first_row + frame
            cell = self._tables.cell(taken.data, camera, row)
            return read_stored(cell, self.folder, f"{taken.data} row {row}: '{camera}'")
        time_s = float(self.numbers(episode, TIMESTAMP, frame, frame + 1)[0, 0])
        span = taken.videos[camera]
        # A float32 timestamp is off by more than the tolerance after some minutes; the row's own place is exact.
        own_s = frame / self.info.fps
        near = abs(time_s - own_s) <= max(TOLERANCE_S, 1e-6 * own_s)
        return self._videos.reader(span.path).read(span.start_s + (own_s if near else time_s))

    def rows(self, path: Path) -> int:
        """Of one table of the dataset. Raises DataError where it cannot be read."""
        return self._tables.rows(path)

    def frames(self, episode: int, camera: str) -> NDArray[Any]:
        """All frames of an episode: (T, H, W, 3) uint8, or (T, H, W) uint16. Raises DataError."""
        return np.stack([self.image(episode, frame, camera) for frame in range(self.episodes[episode].length)])

    def told(self, episode: int, start: int = 0, stop: int | None = None) -> list[str]:
        """What the robot was told in rows [start, stop) of an episode. Raises DataError for a task that has no text."""
        taken, numbers = self.episodes[episode], self.numbers(episode, TASK, start, stop)[:, 0].tolist()
        unknown = [row for row, number in enumerate(numbers) if number not in self.tasks]
        if unknown:
            row, number = taken.first_row + start + unknown[0], numbers[unknown[0]]
            raise DataError(
                f"{taken.data} row {row}: task {number} has no text in {self.folder / TASKS[self.info.version]}"
            )
        return [self.tasks[number] for number in numbers]

    def stream(self, names: Sequence[str]) -> Iterator[Block]:
        """Numeric columns of all rows in the order of the files, no more than a row group in memory at a time."""
        for path in dict.fromkeys(episode.data for episode in self.episodes):
            for first_row, group in stream_groups(path, names):
                columns = {n: to_numbers(rows, n, self.feature(n), path, first_row) for n, rows in group.items()}
                yield Block(path, first_row, columns)

    def feature(self, name: str) -> Feature:
        """A column's description. Raises DataError for a name the dataset does not have."""
        if name not in self.info.features:
            raise DataError(f"{self.folder} has no column '{name}': it has {', '.join(self.info.features)}")
        return self.info.features[name]


def open_dataset(folder: Path) -> Dataset:
    """Read a dataset's metadata. Raises DataError for what is missing or damaged of it."""
    info = _read_info(folder)
    read_tasks, read_episodes = {V21: (_tasks_v21, _episodes_v21), V30: (_tasks_v30, _episodes_v30)}[info.version]
    episodes = read_episodes(folder, info)
    if not episodes:
        raise DataError(f"{folder} holds no episode: record some")
    return Dataset(folder, info, episodes, read_tasks(folder))


def check_files(dataset: Dataset) -> None:
    """Raise DataError, naming file and episode, where a table or a video is not there, or lacks an episode's rows."""
    for episode in dataset.episodes:
        for camera, span in episode.videos.items():
            if not span.path.is_file():
                raise DataError(f"{span.path} is missing ({camera} of episode {episode.index}): copy the videos too")
        rows, needed = dataset.rows(episode.data), episode.first_row + episode.length
        if rows < needed:
            raise DataError(
                f"{episode.data} has {rows} rows, and episode {episode.index} ends at {needed}: copy it again"
            )


def check_dataset(dataset: Dataset, *, decode: bool = False) -> None:
    """Read every number, and look at every file. Raises DataError naming file and row of the first thing wrong.

    decode: every frame of every camera too, which finds a video that is damaged in its middle.
    """
    info = dataset.info
    check_files(dataset)
    for block in dataset.stream([name for name, feature in info.features.items() if feature.is_number]):
        for name, values in block.columns.items():
            check_finite(values, name, block.path, block.first_row)
    for number, episode in enumerate(dataset.episodes):
        check_times(dataset, number)
        for camera in info.videos:
            _check_video(dataset, episode, camera)
    for number, episode in enumerate(dataset.episodes if decode else ()):
        for camera in info.cameras:
            for frame in range(episode.length):
                dataset.image(number, frame, camera)


def check_times(dataset: Dataset, number: int) -> None:
    """Raise DataError unless an episode's frames count up from 0 at the dataset's rate and are all its own."""
    episode, count = dataset.episodes[number], np.arange(dataset.episodes[number].length)
    expected = {FRAME: count, EPISODE: np.full(len(count), episode.index), TIMESTAMP: count / dataset.info.fps}
    for name, wanted in expected.items():
        found = dataset.numbers(number, name)[:, 0]
        odd = np.flatnonzero(np.abs(found - wanted) > TOLERANCE_S + 1e-6 * np.abs(wanted))
        if odd.size:
            row = episode.first_row + odd[0]
            raise DataError(
                f"{episode.data} row {row}: '{name}' is {found[odd[0]]}, not {wanted[odd[0]]}, which episode "
                f"{episode.index} has at {dataset.info.fps:g} frames/s: one dataset has one rate and whole episodes"
            )


def _check_video(dataset: Dataset, episode: Episode, camera: str) -> None:
    span, period_s = episode.videos[camera], 1 / dataset.info.fps
    reader = dataset._videos.reader(span.path)
    end_s = span.start_s + episode.length * period_s
    if reader.duration_s and reader.duration_s < end_s - period_s / 2:
        raise DataError(
            f"{span.path} ends at {reader.duration_s:.4f} s, and episode {episode.index} reaches to {end_s:.4f} s "
            f"(row {episode.first_row + episode.length - 1} of {episode.data}): it is truncated or of another rate"
        )


def _read_info(folder: Path) -> Info:
    document = _read_json(folder / INFO)
    version = document.get("codebase_version")
    if version not in VERSIONS:
        raise DataError(f"{folder / INFO} is of version {version!r}: convert the dataset to {' or '.join(VERSIONS)}")
    try:
        features = {
            name: Feature(f["dtype"], tuple(f["shape"]), f.get("names"), f.get("info") or {})
            for name, f in document["features"].items()
        }
        info = Info(
            version=version,
            robot_type=document.get("robot_type"),
            fps=document["fps"],
            features={**INDEX_FEATURES, **features},
            frames=document["total_frames"],
            chunks_size=document["chunks_size"],
            data_path=document["data_path"],
            video_path=document.get("video_path"),
            about=document.get(ABOUT, {}),
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / INFO} lacks {error}: copy it again") from None
    if not info.fps > 0:
        raise DataError(f"{folder / INFO}: fps is {info.fps}: give the frames per second")
    return info


def _tasks_v21(folder: Path) -> dict[int, str]:
    return {row["task_index"]: row["task"] for row in _read_lines(folder / TASKS[V21])}


def _tasks_v30(folder: Path) -> dict[int, str]:
    table = read_table(folder / TASKS[V30])
    # pandas puts the text, which is the table's index, in a column of its own name or of none.
    text = next((name for name in table.column_names if name != TASK), None)
    if text is None or TASK not in table.column_names:
        raise DataError(f"{folder / TASKS[V30]} has no texts by '{TASK}': copy it again")
    return dict(zip(table.column(TASK).to_pylist(), table.column(text).to_pylist(), strict=True))


def _episodes_v21(folder: Path, info: Info) -> list[Episode]:
    return [_episode_v21(folder, info, row) for row in _read_lines(folder / EPISODES)]


def _episode_v21(folder: Path, info: Info, row: dict[str, Any]) -> Episode:
    index = row["episode_index"]
    place = {"episode_chunk": index // info.chunks_size, "episode_index": index}
    videos = {c: Span(folder / str(info.video_path).format(video_key=c, **place), 0.0) for c in info.videos}
    extra = {k: v for k, v in row.items() if k not in ("episode_index", "length", "tasks")}
    data = folder / info.data_path.format(**place)
    return Episode(index, row["length"], tuple(row["tasks"]), data, 0, videos, extra)


def _episodes_v30(folder: Path, info: Info) -> list[Episode]:
    rows: list[dict[str, Any]] = []
    for path in sorted((folder / "meta/episodes").glob("*/*.parquet")):
        names = [name for name in open_parquet(path).schema_arrow.names if not name.startswith("stats/")]
        rows += read_table(path, names).to_pylist()
    rows.sort(key=lambda row: row["episode_index"])
    first: dict[Path, int] = {}
    for row in rows:
        first.setdefault(_data_v30(folder, info, row), row["dataset_from_index"])
    return [_episode_v30(folder, info, row, first) for row in rows]


def _data_v30(folder: Path, info: Info, row: dict[str, Any]) -> Path:
    return folder / info.data_path.format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])


def _episode_v30(folder: Path, info: Info, row: dict[str, Any], first: dict[Path, int]) -> Episode:
    data = _data_v30(folder, info, row)
    known = ("episode_index", "length", "tasks", "dataset_from_index", "dataset_to_index")
    return Episode(
        index=row["episode_index"],
        length=row["length"],
        tasks=tuple(row["tasks"]),
        data=data,
        first_row=row["dataset_from_index"] - first[data],
        videos={camera: _span_v30(folder, info, row, camera) for camera in info.videos},
        extra={name: value for name, value in row.items() if name not in known and "/" not in name},
    )


def _span_v30(folder: Path, info: Info, row: dict[str, Any], camera: str) -> Span:
    place = {f"{part}_index": row[f"videos/{camera}/{part}_index"] for part in ("chunk", "file")}
    path = folder / str(info.video_path).format(video_key=camera, **place)
    return Span(path, row[f"videos/{camera}/from_timestamp"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): give the folder of a LeRobot dataset") from None
    if not isinstance(document, dict):
        raise DataError(f"{path} is no table: copy it again")
    return document


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): copy it again") from None
