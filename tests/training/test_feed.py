"""Which samples come at which step, read ahead or not; and what the journal keeps of a killed run."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from onbeat.runtime.prompt import Prompt
from onbeat.training.data.layout import DataError
from onbeat.training.data.sample import Kind, Sample
from onbeat.training.feed import EpochOrder, Feed
from onbeat.training.journal import cut_history

COUNT, BATCH = 20, 6


@dataclass
class Numbers:
    """A source whose sample k has k in its state, and a number that it draws."""

    broken: int = -1
    read: list[int] = field(default_factory=list)
    name: str = "numbers"
    kind: Kind = "robot"
    embodiment: str = "arm"

    def __len__(self) -> int:
        return COUNT

    @property
    def weights(self) -> NDArray[np.float64]:
        return np.ones(COUNT)

    def sample(self, index: int, generator: np.random.Generator) -> Sample:
        self.read.append(index)
        if index == self.broken:
            raise DataError(f"row {index} is damaged")
        state = np.zeros(200, np.float32)
        state[:2] = index, generator.random()
        rows, none = np.zeros((1, 200), np.float32), np.zeros((0, 3, 8, 8), np.uint8)
        return Sample(none, state, rows, rows > 0, Prompt(np.arange(4), 1, 2), "arm", "count", "robot")


def feed_of(source: Numbers, loaders: int) -> Feed:
    return Feed([source], EpochOrder(COUNT, BATCH, seed=5), seed=5, loaders=loaders)


@pytest.mark.parametrize("loaders", [1, 3])
def test_reading_ahead_changes_nothing(loaders: int) -> None:
    plain, ahead = feed_of(Numbers(), 0), feed_of(Numbers(), loaders)
    for step in (0, 1, 2, 3, 1):  # and going back, as a run that resumes another does
        ours, theirs = (feed.groups(step)[0].state[:, :2].tolist() for feed in (ahead, plain))
        assert ours == theirs
        assert plain.embodiments(step) == ["arm"] * BATCH


def test_without_loaders_nothing_is_read_that_is_not_needed() -> None:
    source = Numbers()
    feed_of(source, 0).groups(2)
    assert len(source.read) == BATCH


def read_two_epochs(feed: Feed) -> None:
    for step in range(COUNT // BATCH * 2):
        feed.groups(step)


@pytest.mark.parametrize("loaders", [0, 2])
def test_damaged_data_stops_the_step_that_needs_it(loaders: int) -> None:
    feed = feed_of(Numbers(broken=7), loaders)
    with pytest.raises(DataError, match="row 7 is damaged"):
        read_two_epochs(feed)


def test_a_batch_larger_than_the_data_is_all_of_it() -> None:
    assert sorted(draw.sample for draw in EpochOrder(4, 9, seed=0).draws(11)) == [0, 1, 2, 3]


def test_history_past_the_step_that_is_resumed_is_void(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (2, 4, 6)) + '{"step": 8, "flo')
    cut_history(path, 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]
    cut_history(tmp_path / "none.jsonl", 4)
    assert [item.name for item in tmp_path.iterdir()] == ["history.jsonl"]
