"""A tiny task that any network can learn: synthetic demonstrations of an SO-101 whose arm goes to a coloured dot."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onbeat.training.demonstrations import Demonstration, write_demonstrations
from onbeat.training.recipe import Fitting, Network, Recipe

IMAGE_SIZE, STEPS, JOINTS = 28, 20, 6


@pytest.fixture(scope="session")
def demonstrate() -> Callable[[int], Demonstration]:
    """Makes the demonstration of a seed: 20 steps, frames of 28 x 28 pixels."""
    return synthetic_demonstration


@pytest.fixture(scope="session")
def demonstrate_at() -> Callable[[int, int], Demonstration]:
    """Makes the demonstration of a seed with frames of another size."""
    return synthetic_demonstration


@pytest.fixture(scope="session")
def write_folder() -> Callable[[Path, list[Demonstration]], None]:
    """Writes demonstrations into a folder, as the collector leaves them."""
    return write_synthetic


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory) -> Path:
    """A folder of six demonstrations."""
    folder = tmp_path_factory.mktemp("demonstrations")
    write_synthetic(folder, [synthetic_demonstration(seed) for seed in range(6)])
    return folder


@pytest.fixture
def tiny_recipe() -> Recipe:
    """A network of a few thousand weights."""
    network = Network(
        image_size=IMAGE_SIZE,
        vision_width=16,
        vision_ffn=32,
        vision_layers=1,
        vision_heads=2,
        und_width=16,
        und_ffn=32,
        gen_width=24,
        gen_ffn=32,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=8,
        chunk=4,
        delays=3,
    )
    fitting = Fitting(steps=20, batch=16, draws=2, warm_up_steps=5, peak_rate=5e-3, report_steps=10, threads=1)
    return Recipe("tiny", seed=3, embodiment="so101", network=network, fitting=fitting)


def synthetic_demonstration(seed: int, size: int = IMAGE_SIZE) -> Demonstration:
    """The dot stands somewhere; the arm goes there in a straight line."""
    rng = np.random.default_rng(seed)
    place = rng.uniform(-1, 1, 3).astype(np.float32)
    frames = np.full((STEPS, 2, size, size, 3), 90, np.uint8)
    row, column = ((place[:2] + 1) / 2 * (size - 6)).astype(int)
    frames[:, :, row : row + 6, column : column + 6] = (220, 30, 20)
    share = np.linspace(0, 1, STEPS, dtype=np.float32)[:, None]
    action = share * np.tile(place, 2) * 0.5
    state = action + rng.normal(0, 0.01, action.shape).astype(np.float32)
    contact = np.arange(STEPS) == STEPS // 2
    return Demonstration(frames, state, action, np.tile(place, (STEPS, 1)), contact, seed=seed, start="home")


def write_synthetic(folder: Path, demonstrations: list[Demonstration]) -> None:
    """As the collector leaves them."""
    write_demonstrations(folder, demonstrations, "touch the dot")
