"""Onbeat's half of `make lerobot-check`: write what LeRobot shall open, and open what LeRobot wrote.

python tests/lerobot_check/ours.py write FOLDER     FOLDER/v2.1 and FOLDER/v3.0
python tests/lerobot_check/ours.py read FOLDER
"""

import sys
from pathlib import Path

import numpy as np
from recordings import ACTION, DEPTH, EVENT, FPS, HEIGHT, IMAGE, LENGTHS, STATE, TASKS, VIDEO, WIDTH, record

from onbeat.training.data.layout import VERSIONS, Feature
from onbeat.training.data.reader import check_dataset, open_dataset
from onbeat.training.data.writer import DatasetWriter

PLACES = ["height", "width", "channels"]
FEATURES = {
    STATE: Feature("float32", (6,), [f"joint_{k}" for k in range(6)]),
    ACTION: Feature("float32", (4,), [f"joint_{k}" for k in range(4)]),
    EVENT: Feature("bool", (1,)),
    VIDEO: Feature("video", (HEIGHT, WIDTH, 3), PLACES),
    IMAGE: Feature("image", (HEIGHT, WIDTH, 3), PLACES),
    DEPTH: Feature("image", (HEIGHT, WIDTH, 1), PLACES, {"is_depth_map": True}),
}
LOSSY = 12  # the largest difference that LeRobot's default video encoding may make


def write(folder: Path) -> None:
    """Both versions of one dataset of all recordings."""
    for version in VERSIONS:
        write_version(folder / version, version)


def write_version(folder: Path, version: str) -> None:
    """One task an episode but the last, which changes half-way."""
    with DatasetWriter(folder, fps=FPS, features=FEATURES, robot_type="so101", version=version) as writer:
        for episode, length in enumerate(LENGTHS):
            last = episode == len(LENGTHS) - 1
            tasks = [TASKS[int(last and frame >= length // 2)] for frame in range(length)]
            writer.add_episode(record(episode, depth=True), tasks, {"seed": episode})


def read(folder: Path) -> None:
    """Every number and frame of LeRobot's dataset against the recordings."""
    dataset = open_dataset(folder)
    check_dataset(dataset, decode=True)
    assert [episode.length for episode in dataset.episodes] == list(LENGTHS)
    for episode, length in enumerate(LENGTHS):
        columns = record(episode, depth=False)
        for name in (STATE, ACTION, EVENT):
            assert np.array_equal(dataset.numbers(episode, name), columns[name]), (episode, name)
        assert set(dataset.told(episode)) == {TASKS[episode % 2]}
        for frame in range(length):
            assert np.array_equal(dataset.image(episode, frame, IMAGE), columns[IMAGE][frame]), (episode, frame)
            found = dataset.image(episode, frame, VIDEO).astype(int)
            assert np.abs(found - columns[VIDEO][frame]).mean() < 1 + LOSSY / 4, (episode, frame)
    print(f"onbeat read {len(dataset)} rows of {len(LENGTHS)} episodes that LeRobot wrote: all as recorded")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
