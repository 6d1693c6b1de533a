"""The recordings that both sides write and read, made of a seed. NumPy only: it runs in both environments."""

import numpy as np

FPS, HEIGHT, WIDTH = 10, 64, 96
LENGTHS = (12, 7, 30)
STATE, ACTION, EVENT = "observation.state", "action", "event.contact"
VIDEO, IMAGE, DEPTH = "observation.images.top", "observation.images.wrist", "observation.images.depth"
TASKS = ("lift the red cube", "put it down")


def record(episode: int, *, depth: bool) -> dict[str, np.ndarray]:
    """One episode's columns; the video is smooth, so that a lossy codec stays close to it."""
    rng = np.random.default_rng(episode)
    length = LENGTHS[episode]
    columns = {
        STATE: rng.normal(size=(length, 6)).astype(np.float32),
        ACTION: rng.normal(size=(length, 4)).astype(np.float32),
        EVENT: rng.random((length, 1)) < 0.3,
        VIDEO: np.stack([smooth(episode, frame) for frame in range(length)]),
        IMAGE: rng.integers(0, 256, (length, HEIGHT, WIDTH, 3), dtype=np.uint8),
    }
    if depth:
        columns[DEPTH] = rng.integers(0, 30_000, (length, HEIGHT, WIDTH), dtype=np.uint16)
    return columns


def smooth(episode: int, frame: int) -> np.ndarray:
    """A picture (H, W, 3) uint8 whose brightness tells episode and frame."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    level = 20 + 60 * episode + 2 * frame
    return np.stack([level + rows // 4, level + columns // 4, np.full_like(rows, level)], axis=-1).astype(np.uint8)
