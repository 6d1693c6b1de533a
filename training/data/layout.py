"""LeRobot datasets v2.1 and v3.0 on disk: which file holds what, under which name. Facts of the format, nothing else.

v3.0  data/chunk-CCC/file-FFF.parquet         many episodes a file, one after the other
      videos/KEY/chunk-CCC/file-FFF.mp4       many episodes a file; meta says where each begins
      meta/info.json  meta/stats.json  meta/tasks.parquet  meta/episodes/chunk-CCC/file-FFF.parquet
v2.1  data/chunk-CCC/episode_EEEEEE.parquet   one episode a file
      videos/chunk-CCC/KEY/episode_EEEEEE.mp4
      meta/info.json  meta/tasks.jsonl  meta/episodes.jsonl  meta/episodes_stats.jsonl
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from onbeat.embodiment.errors import OnbeatError

V21, V30 = "v2.1", "v3.0"
VERSIONS = (V21, V30)
FILES_PER_CHUNK = 1000
DATA_FILE_MB, VIDEO_FILE_MB = 100, 200  # a v3.0 file is closed when it has grown to this

INFO = "meta/info.json"
STATS = "meta/stats.json"
TASKS = {V21: "meta/tasks.jsonl", V30: "meta/tasks.parquet"}
EPISODES = "meta/episodes.jsonl"  # v2.1
EPISODE_STATS = "meta/episodes_stats.jsonl"  # v2.1
EPISODE_TABLES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"  # v3.0
DATA_PATH = {
    V21: "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    V30: "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
}
VIDEO_PATH = {
    V21: "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    V30: "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}

ABOUT = "onbeat"  # of info.json: what the writer adds of its own
IMAGE, VIDEO, TEXT = "image", "video", "string"
TIMESTAMP, FRAME, EPISODE, ROW, TASK = "timestamp", "frame_index", "episode_index", "index", "task_index"


class DataError(OnbeatError):
    """A dataset that cannot be used as it is, or is damaged. The text names the file and the row."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One column. dtype: NumPy's name of it, "string", "image" (PNG within the table) or "video" (a file beside it).

    shape: of one row; (height, width, channels) for a camera. names: one per number, as far as the dataset gives them.
    """

    dtype: str
    shape: tuple[int, ...]
    names: Any = None
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_camera(self) -> bool:
        return self.dtype in (IMAGE, VIDEO)

    @property
    def is_number(self) -> bool:
        return not self.is_camera and self.dtype != TEXT

    @property
    def is_depth(self) -> bool:
        """Whether a camera's pixels are distances: one channel of uint16."""
        return self.is_camera and self.shape[-1] == 1

    @property
    def width(self) -> int:
        """Numbers in one row."""
        return prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        document = {"dtype": self.dtype, "shape": list(self.shape), "names": self.names}
        return {**document, "info": dict(self.info)} if self.info else document


# Columns that every dataset has.
INDEX_FEATURES = {
    TIMESTAMP: Feature("float32", (1,)),
    FRAME: Feature("int64", (1,)),
    EPISODE: Feature("int64", (1,)),
    ROW: Feature("int64", (1,)),
    TASK: Feature("int64", (1,)),
}


@dataclass(frozen=True, slots=True)
class Info:
    """What meta/info.json says. fps: frames per second, of all cameras and all rows. about: what its writer added."""

    version: str
    robot_type: str | None
    fps: float
    features: Mapping[str, Feature]
    frames: int
    chunks_size: int
    data_path: str
    video_path: str | None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(name for name, feature in self.features.items() if feature.is_camera)

    @property
    def videos(self) -> tuple[str, ...]:
        return tuple(name for name, feature in self.features.items() if feature.dtype == VIDEO)


@dataclass(frozen=True, slots=True)
class Span:
    """Where an episode lies in a video: from `start_s` on."""

    path: Path
    start_s: float


@dataclass(frozen=True, slots=True)
class Episode:
    """One recording. data, first_row: its table and its first row there. videos: by camera. extra: other columns of the
    episode's own metadata."""

    index: int
    length: int
    tasks: tuple[str, ...]
    data: Path
    first_row: int
    videos: Mapping[str, Span]
    extra: Mapping[str, Any] = field(default_factory=dict)
