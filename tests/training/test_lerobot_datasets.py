"""LeRobot datasets, both versions: what is written is read back, to the bit; what is damaged is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from onbeat.training.data.check import main
from onbeat.training.data.layout import V21, V30, VERSIONS, DataError, Feature
from onbeat.training.data.reader import Dataset, check_dataset, open_dataset
from onbeat.training.data.video import VideoReader
from onbeat.training.data.writer import DatasetWriter

HEIGHT, WIDTH, FPS = 16, 24, 10
TOP, WRIST, DEPTH = "observation.images.top", "observation.images.wrist", "observation.images.depth"
FEATURES = {
    "observation.state": Feature("float32", (3,), ["a", "b", "c"]),
    "action": Feature("float32", (2,), ["a", "b"]),
    "event.contact": Feature("bool", (1,)),
    "reach": Feature("float64", (2, 2)),
    TOP: Feature("video", (HEIGHT, WIDTH, 3), ["height", "width", "channels"]),
    WRIST: Feature("image", (HEIGHT, WIDTH, 3), ["height", "width", "channels"]),
    DEPTH: Feature("image", (HEIGHT, WIDTH, 1), ["height", "width", "channels"], {"is_depth_map": True}),
}
LENGTHS = (5, 7, 3)


def make_episode(seed: int, length: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {
        "observation.state": rng.normal(size=(length, 3)).astype(np.float32),
        "action": rng.normal(size=(length, 2)).astype(np.float32),
        "event.contact": rng.random(length) < 0.3,
        "reach": rng.normal(size=(length, 2, 2)),
        TOP: rng.integers(0, 256, (length, HEIGHT, WIDTH, 3), dtype=np.uint8),
        WRIST: rng.integers(0, 256, (length, HEIGHT, WIDTH, 3), dtype=np.uint8),
        DEPTH: rng.integers(0, 65536, (length, HEIGHT, WIDTH), dtype=np.uint16),
    }


EPISODES = [make_episode(seed, length) for seed, length in enumerate(LENGTHS)]


def write(folder: Path, **options: Any) -> Path:
    with DatasetWriter(folder, fps=FPS, features=FEATURES, robot_type="so101", **options) as writer:
        for number, episode in enumerate(EPISODES):
            task = ["reach"] * (len(episode["action"]) - 1) + ["grasp"] if number else "reach"
            writer.add_episode(episode, task, {"seed": 40 + number, "start": "home"})
    return folder


@pytest.fixture(params=VERSIONS)
def folder(request, tmp_path: Path) -> Path:
    return write(tmp_path / "dataset", version=request.param)


@pytest.fixture
def dataset(folder: Path) -> Dataset:
    return open_dataset(folder)


def same(dataset: Dataset, episode: int, frame: int, camera: str) -> bool:
    return np.array_equal(dataset.image(episode, frame, camera), EPISODES[episode][camera][frame])


def test_numbers_come_back_to_the_bit(dataset: Dataset) -> None:
    assert [e.length for e in dataset.episodes] == list(LENGTHS)
    assert len(dataset) == sum(LENGTHS)
    for number, episode in enumerate(EPISODES):
        for name in ("observation.state", "action", "event.contact", "reach"):
            found = dataset.numbers(number, name)
            assert np.array_equal(found, episode[name].reshape(len(found), -1)), name
            assert found.dtype == episode[name].dtype
        assert np.array_equal(dataset.numbers(number, "action", 1, 3), episode["action"][1:3])


@pytest.mark.parametrize("camera", [TOP, WRIST, DEPTH])
def test_every_frame_comes_back_to_the_bit_in_any_order(dataset: Dataset, camera: str) -> None:
    places = [(e, f) for e, length in enumerate(LENGTHS) for f in range(length)]
    np.random.default_rng(0).shuffle(places)
    assert all(same(dataset, episode, frame, camera) for episode, frame in places)


def test_what_is_said_of_episodes_comes_back(dataset: Dataset) -> None:
    assert [e.extra for e in dataset.episodes] == [{"seed": 40 + n, "start": "home"} for n in range(3)]
    assert dataset.episodes[0].tasks == ("reach",)
    assert dataset.episodes[1].tasks == ("reach", "grasp")
    assert dataset.told(1, 4) == ["reach", "reach", "grasp"]
    assert dataset.info.robot_type == "so101"
    assert dataset.feature(DEPTH).is_depth
    assert dataset.feature("action").names == ["a", "b"]


def test_rows_are_counted_over_all_episodes(dataset: Dataset) -> None:
    places = [(e, f) for e, length in enumerate(LENGTHS) for f in range(length)]
    assert [dataset.locate(row) for row in range(len(dataset))] == places


def test_a_stream_gives_every_row_once_in_order(dataset: Dataset) -> None:
    blocks = list(dataset.stream(["action", "index"]))
    assert np.array_equal(np.concatenate([b.columns["index"] for b in blocks])[:, 0], np.arange(len(dataset)))
    assert np.array_equal(
        np.concatenate([b.columns["action"] for b in blocks]), np.concatenate([e["action"] for e in EPISODES])
    )


def test_a_whole_dataset_passes_its_check(dataset: Dataset) -> None:
    check_dataset(dataset, decode=True)


def test_full_files_are_followed_by_further_ones(tmp_path: Path) -> None:
    folder = write(tmp_path / "many", data_file_mb=1e-9, video_file_mb=1e-9)
    dataset = open_dataset(folder)
    assert len({e.data for e in dataset.episodes}) == len(LENGTHS)
    assert len({e.videos[TOP].path for e in dataset.episodes}) == len(LENGTHS)
    check_dataset(dataset)
    assert all(same(dataset, e, LENGTHS[e] - 1, camera) for e in range(3) for camera in (TOP, WRIST, DEPTH))


def test_a_lossy_video_stays_close(tmp_path: Path) -> None:
    ramp = np.linspace(0, 250, HEIGHT * WIDTH).reshape(1, HEIGHT, WIDTH, 1).astype(np.uint8)
    smooth = {**EPISODES[0], TOP: np.broadcast_to(ramp, (5, HEIGHT, WIDTH, 3))}
    with DatasetWriter(tmp_path / "x", fps=FPS, features=FEATURES, encoding="h264") as writer:
        writer.add_episode(smooth, "reach")
    found = open_dataset(tmp_path / "x").frames(0, TOP).astype(int)
    assert 0 < np.abs(found - smooth[TOP]).max() < 12


def test_statistics_of_the_dataset_are_those_of_all_rows(tmp_path: Path) -> None:
    stats = json.loads((write(tmp_path / "dataset") / "meta/stats.json").read_text())
    actions = np.concatenate([e["action"] for e in EPISODES]).astype(np.float64)
    assert stats["action"]["mean"] == pytest.approx(actions.mean(axis=0))
    assert stats["action"]["std"] == pytest.approx(actions.std(axis=0))
    assert stats["action"]["max"] == pytest.approx(actions.max(axis=0))
    assert stats["action"]["count"] == [sum(LENGTHS)]
    assert np.shape(stats[TOP]["mean"]) == (3, 1, 1)
    assert np.shape(stats[DEPTH]["mean"]) == (3, 1, 1)


def test_episodes_say_where_they_lie_as_lerobot_counts(tmp_path: Path) -> None:
    """LeRobot reads these columns, and we do not: their ends, in rows and in seconds."""
    rows = pq.read_table(write(tmp_path / "dataset") / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in rows] == [(0, 5), (5, 12), (12, 15)]
    times = [(row[f"videos/{TOP}/from_timestamp"], row[f"videos/{TOP}/to_timestamp"]) for row in rows]
    assert times == [(0.0, 0.5), (0.5, 1.2), (1.2, 1.5)]


@pytest.mark.parametrize("time_s", [0.05, 0.1002, 0.6])
def test_a_time_at_which_there_is_no_frame_is_refused(time_s: float, tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path / "dataset", version=V21))
    reader = VideoReader(dataset.episodes[0].videos[TOP].path)
    assert np.array_equal(reader.read(0.10005), EPISODES[0][TOP][1])  # within the tolerance
    with pytest.raises(DataError, match=f"no frame within 0.0001 s of {time_s:.4f} s"):
        reader.read(time_s)
    assert np.array_equal(reader.read(0.2), EPISODES[0][TOP][2])  # and goes on


# What is refused on the way in.


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("action", np.zeros((5, 3), np.float32), r"episode 0: 'action' is \(3,\) a row, not \(2,\)"),
        ("action", np.zeros((4, 2), np.float32), r"have \[4, 5\] rows"),
        ("action", None, "'action' is unknown or missing in episode 0"),
        (TOP, np.zeros((5, HEIGHT, WIDTH, 3), np.float32), "is float32"),
        (DEPTH, np.zeros((5, HEIGHT, WIDTH), np.uint8), "not uint16"),
    ],
)
def test_an_episode_that_does_not_fit_is_refused(name: str, value: Any, text: str, tmp_path: Path) -> None:
    episode = {**EPISODES[0], name: value}
    with pytest.raises(DataError, match=text), DatasetWriter(tmp_path / "x", fps=FPS, features=FEATURES) as writer:
        writer.add_episode({k: v for k, v in episode.items() if v is not None}, "reach")
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_is_not_finite_is_named_by_its_row(tmp_path: Path) -> None:
    action = EPISODES[0]["action"].copy()
    action[3, 1] = np.nan
    with pytest.raises(DataError, match="'action' is not finite at row 3"):
        with DatasetWriter(tmp_path / "x", fps=FPS, features=FEATURES) as writer:
            writer.add_episode({**EPISODES[0], "action": action}, "reach")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_writer_that_is_interrupted_leaves_nothing(version: str, tmp_path: Path) -> None:
    def be_interrupted() -> None:
        with DatasetWriter(tmp_path / "x", fps=FPS, features=FEATURES, version=version) as writer:
            writer.add_episode(EPISODES[0], "reach")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        be_interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_an_episode_that_fails_half_way_ends_the_dataset(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its table is written and its video is not: nothing may be built upon that, though the caller goes on."""
    writer = DatasetWriter(tmp_path / "x", fps=FPS, features=FEATURES, version=version)
    writer.add_episode(EPISODES[0], "reach")
    monkeypatch.setattr("onbeat.training.data.video.VideoWriter.append", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.add_episode(EPISODES[1], "reach")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="given up"):
        writer.add_episode(EPISODES[1], "reach")
    with pytest.raises(DataError, match="given up"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_not_written_over(folder: Path) -> None:
    with pytest.raises(DataError, match="exists already"):
        DatasetWriter(folder, fps=FPS, features=FEATURES)


def test_a_dataset_of_no_episode_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no episode"):
        DatasetWriter(tmp_path / "x", fps=FPS, features=FEATURES).close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "feature", "text"),
    [
        ("d", Feature("video", (4, 4, 1)), "'d' is a depth camera"),
        ("top", Feature("video", (5, 4, 3)), "even heights"),
        ("words", Feature("string", (1,)), "'words' is text"),
        ("a/b", Feature("float32", (1,)), "cannot be called 'a/b'"),
        ("timestamp", Feature("float32", (1,)), "cannot be called 'timestamp'"),
    ],
)
def test_columns_that_the_format_cannot_hold_are_refused(
    name: str, feature: Feature, text: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=text):
        DatasetWriter(tmp_path / "x", fps=FPS, features={name: feature}, encoding="h264")
    assert list(tmp_path.iterdir()) == []


# What is damaged on the disk.


def test_a_missing_video_is_named(dataset: Dataset) -> None:
    path = dataset.episodes[1].videos[TOP].path
    path.unlink()
    with pytest.raises(DataError, match=rf"{path} is missing"):
        dataset.image(1, 0, TOP)
    with pytest.raises(DataError, match=rf"{path} is missing \({TOP} of episode"):
        check_dataset(dataset)


def test_a_truncated_video_is_named(dataset: Dataset) -> None:
    path = dataset.episodes[0].videos[TOP].path
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=f"{path} cannot be read as a video"):
        check_dataset(dataset)


def test_a_truncated_table_is_named(dataset: Dataset) -> None:
    path = dataset.episodes[0].data
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=f"{path} is no whole parquet file"):
        check_dataset(dataset)


def edit(dataset: Dataset, episode: int, name: str, column: pa.Array | None) -> Path:
    """Rewrite one column of an episode's file."""
    path = dataset.episodes[episode].data
    table = pq.read_table(path)
    place = table.column_names.index(name)
    table = table.remove_column(place) if column is None else table.set_column(place, name, column)
    pq.write_table(table, path)
    return path


def test_a_nan_is_named_by_file_and_row(dataset: Dataset) -> None:
    values = dataset.numbers(0, "action").tolist()
    values[4][1] = float("nan")
    rows = pq.read_table(dataset.episodes[0].data).column("action").to_pylist()
    path = edit(dataset, 0, "action", pa.array(values + rows[5:], pa.list_(pa.float32(), 2)))
    with pytest.raises(DataError, match=f"{path} row 4: 'action' is not finite"):
        check_dataset(open_dataset(dataset.folder))
    with pytest.raises(DataError, match=f"{path} row 4: 'action' is not finite"):
        open_dataset(dataset.folder).numbers(0, "action", 3, 5)


def test_a_row_of_another_width_is_named(dataset: Dataset) -> None:
    rows = pq.read_table(dataset.episodes[0].data).column("action").to_pylist()
    rows[2] = [1.0, 2.0, 3.0]
    path = edit(dataset, 0, "action", pa.array(rows, pa.list_(pa.float32())))
    with pytest.raises(DataError, match=f"{path} row 2: 'action' has 3 numbers, not 2"):
        check_dataset(open_dataset(dataset.folder))


def test_an_episode_of_another_rate_is_named(dataset: Dataset) -> None:
    times = pq.read_table(dataset.episodes[0].data).column("timestamp").to_pylist()
    times[1:5] = [0.05 * k for k in range(1, 5)]
    path = edit(dataset, 0, "timestamp", pa.array(times, pa.float32()))
    with pytest.raises(DataError, match=f"{path} row 1: 'timestamp' is 0.05.*, not 0.1"):
        check_dataset(open_dataset(dataset.folder))


def test_a_missing_column_is_named(dataset: Dataset) -> None:
    path = edit(dataset, 0, "action", None)
    with pytest.raises(DataError, match=f"{path} has no column 'action'"):
        check_dataset(open_dataset(dataset.folder))


def test_a_video_that_is_too_short_is_named(tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path / "dataset", version=V21))
    short, long = (dataset.episodes[e].videos[TOP].path for e in (2, 1))
    long.write_bytes(short.read_bytes())
    with pytest.raises(DataError, match=rf"{long} ends at 0.3\d* s, and episode 1 reaches to 0.7"):
        check_dataset(dataset)
    with pytest.raises(DataError, match=f"{long} has no frame"):
        dataset.image(1, 5, TOP)


def test_a_file_in_which_rows_are_missing_is_named(tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path / "dataset", version=V30))
    path = dataset.episodes[0].data
    pq.write_table(pq.read_table(path).slice(0, 9), path)
    with pytest.raises(DataError, match=f"{path} has 9 rows, and episode 1 ends at 12"):
        check_dataset(open_dataset(dataset.folder))
    with pytest.raises(DataError, match=f"{path} has 9 rows, and row 11 is asked"):
        open_dataset(dataset.folder).numbers(1, "action")


@pytest.mark.parametrize(("version", "other"), [(V21, V30), (V30, V21)])
def test_a_copy_in_the_other_version_holds_the_same(version: str, other: str, tmp_path: Path, capsys: Any) -> None:
    folder, copy = write(tmp_path / "dataset", version=version), tmp_path / "copy"
    assert main([str(folder), "--decode", "--copy", str(copy), "--version", other]) == 0
    told = capsys.readouterr().out
    assert "15 at 10/s" in told
    assert f"{DEPTH:40}image     16 x 24 x 1" in told
    assert "every row can be read and every frame decoded" in told
    copied = open_dataset(copy)
    assert copied.info.version == other
    assert [e.extra for e in copied.episodes] == [{"seed": 40 + n, "start": "home"} for n in range(3)]
    assert copied.told(1) == open_dataset(folder).told(1)
    for number, episode in enumerate(EPISODES):
        assert np.array_equal(copied.numbers(number, "reach").reshape(-1, 2, 2), episode["reach"])
        assert all(np.array_equal(copied.frames(number, camera), episode[camera]) for camera in (TOP, WRIST, DEPTH))


def test_the_command_names_what_is_wrong(dataset: Dataset, capsys: Any) -> None:
    path = dataset.episodes[0].videos[TOP].path
    path.unlink()
    assert main([str(dataset.folder)]) == 1
    assert f"{path} is missing" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "{", "[]", '{"codebase_version": "v1.6"}', '{"codebase_version": "v3.0"}'])
def test_a_folder_that_is_no_dataset_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "meta").mkdir()
        (tmp_path / "meta/info.json").write_text(text)
    with pytest.raises(DataError, match=r"info\.json"):
        open_dataset(tmp_path)
