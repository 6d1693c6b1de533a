"""LeRobot's half of `make lerobot-check`, in an environment of its own: open what Onbeat wrote, and write for it.

python tests/lerobot_check/theirs.py OURS THEIRS     OURS/v2.1 is converted in place
"""

import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.v30.convert_dataset_v21_to_v30 import convert_dataset
from recordings import ACTION, DEPTH, EVENT, FPS, HEIGHT, IMAGE, LENGTHS, STATE, TASKS, VIDEO, WIDTH, record

PLACES = ["height", "width", "channels"]


def backends() -> list[str]:
    """LeRobot's video decoders that work here; torchcodec wants FFmpeg's libraries on the system."""
    try:
        from torchcodec.decoders import VideoDecoder  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return ["pyav"]
    return ["torchcodec", "pyav"]


def read(folder: Path, backend: str) -> None:
    """Every number and frame of Onbeat's dataset against the recordings, through LeRobotDataset."""
    dataset = LeRobotDataset("onbeat/check", root=folder, video_backend=backend)
    assert (dataset.num_episodes, dataset.num_frames, dataset.fps) == (len(LENGTHS), sum(LENGTHS), FPS)
    assert dataset.meta.stats[ACTION]["mean"].shape == (4,)
    assert dataset.meta.stats[VIDEO]["mean"].shape == (3, 1, 1)
    row = 0
    for episode, length in enumerate(LENGTHS):
        columns = record(episode, depth=True)
        for frame in range(length):
            check_item(dataset[row], columns, episode, frame)
            row += 1
    check_windows(LeRobotDataset("onbeat/check", root=folder, delta_timestamps=WINDOW, video_backend=backend))
    print(f"lerobot {version('lerobot')} ({backend}) read {row} rows that Onbeat wrote, {folder.name}: as recorded")


WINDOW = {ACTION: [k / FPS for k in range(8)]}


def check_item(item: dict, columns: dict[str, np.ndarray], episode: int, frame: int) -> None:
    """One row as LeRobot gives it: images are (channels, H, W) in 0..1, depth keeps its unit."""
    for name in (STATE, ACTION):
        assert np.array_equal(item[name].numpy(), columns[name][frame]), (episode, frame, name)
    assert bool(item[EVENT]) == bool(columns[EVENT][frame, 0])
    for name in (VIDEO, IMAGE):
        found = np.rint(item[name].numpy().transpose(1, 2, 0) * 255)
        assert np.array_equal(found, columns[name][frame]), (episode, frame, name)
    assert np.array_equal(item[DEPTH].numpy()[0], columns[DEPTH][frame]), (episode, frame)
    last = episode == len(LENGTHS) - 1
    assert item["task"] == TASKS[int(last and frame >= LENGTHS[episode] // 2)]


def check_windows(dataset: LeRobotDataset) -> None:
    """A chunk that reaches beyond its episode is padded with its last row."""
    item = dataset[LENGTHS[0] - 3]
    assert item[f"{ACTION}_is_pad"].tolist() == [False] * 3 + [True] * 5
    assert np.array_equal(item[ACTION][:3].numpy(), record(0, depth=True)[ACTION][-3:])


def write(folder: Path) -> None:
    """The same recordings by LeRobot's own writer (which takes no depth)."""
    features = {
        STATE: {"dtype": "float32", "shape": (6,), "names": [f"joint_{k}" for k in range(6)]},
        ACTION: {"dtype": "float32", "shape": (4,), "names": [f"joint_{k}" for k in range(4)]},
        EVENT: {"dtype": "bool", "shape": (1,), "names": None},
        VIDEO: {"dtype": "video", "shape": (HEIGHT, WIDTH, 3), "names": PLACES},
        IMAGE: {"dtype": "image", "shape": (HEIGHT, WIDTH, 3), "names": PLACES},
    }
    dataset = LeRobotDataset.create("onbeat/theirs", fps=FPS, features=features, root=folder, use_videos=True)
    for episode, length in enumerate(LENGTHS):
        columns = record(episode, depth=False)
        for frame in range(length):
            dataset.add_frame({**{name: rows[frame] for name, rows in columns.items()}, "task": TASKS[episode % 2]})
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()


if __name__ == "__main__":
    ours, theirs = Path(sys.argv[1]), Path(sys.argv[2])
    convert_dataset("v2.1", root=ours, push_to_hub=False)  # LeRobot reads v2.1 by its own converter
    for backend in backends():
        read(ours / "v3.0", backend)
        read(ours / "v2.1", backend)
    shutil.rmtree(theirs, ignore_errors=True)
    write(theirs)
