"""Demonstrations: the dataset they become, what a chain records, and what pushes and poor starts add."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mujoco")

from onbeat.drivers.twin.world import World
from onbeat.training import demonstrations
from onbeat.training.data.layout import DataError, Feature
from onbeat.training.data.reader import open_dataset
from onbeat.training.data.writer import DatasetWriter
from onbeat.training.demonstrations import (
    LIFTS_PER_CHAIN,
    REST_STEPS,
    Demonstration,
    Disturbance,
    collect_chain,
    read_demonstrations,
    write_demonstrations,
)
from onbeat.training.expert import MAX_SPEED_CHANGE_RAD_S, polar


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def chain(world: World) -> list[Demonstration]:
    return list(collect_chain(world, 2))


def small(steps: int = 4) -> Demonstration:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (steps, 2, 8, 8, 3), dtype=np.uint8)
    joints = [rng.standard_normal((steps, 6)).astype(np.float32) for _ in range(2)]
    cube = rng.standard_normal((steps, 3)).astype(np.float32)
    contact = np.arange(steps) == 1
    return Demonstration(frames, *joints, cube_m=cube, contact=contact, seed=7, start="home")


def test_a_dataset_gives_back_what_went_in(tmp_path: Path) -> None:
    before = [small(), small(7)]
    assert write_demonstrations(tmp_path / "lifts", before, "lift it", {"seed": 7}) == 11
    dataset = open_dataset(tmp_path / "lifts")
    assert (dataset.info.about, dataset.tasks, dataset.info.fps) == ({"seed": 7}, {0: "lift it"}, 10)
    for left, right in zip(before, read_demonstrations(tmp_path / "lifts"), strict=True):
        assert (left.seed, left.start) == (right.seed, right.start) == (7, "home")
        for name in ("frames", "state_rad", "action_rad", "cube_m", "contact"):
            assert getattr(left, name).dtype == getattr(right, name).dtype
            assert np.array_equal(getattr(left, name), getattr(right, name)), name


def test_unequal_lengths_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    whole = small()
    short = replace(whole, action_rad=whole.action_rad[:-1])
    with pytest.raises(DataError, match=r"columns of episode 1 have \[3, 4\] rows"):
        write_demonstrations(tmp_path / "lifts", [whole, short], "lift it")
    assert list(tmp_path.iterdir()) == []


def test_another_robots_dataset_names_the_command(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "other", fps=10, features={"action": Feature("float32", (2,))}) as writer:
        writer.add_episode({"action": np.zeros((3, 2))}, "wave")
    with pytest.raises(DataError, match=r"no column 'observation.state': run `python -m onbeat\.training"):
        read_demonstrations(tmp_path / "other")


def test_nothing_is_collected_over_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(DataError, match="exists already"):
        demonstrations.main(["--episodes", "3", "--out", str(tmp_path)])


def test_a_chain_is_several_lifts_each_ending_at_rest(chain: list[Demonstration]) -> None:
    assert len(chain) == LIFTS_PER_CHAIN
    assert [d.start for d in chain[1:]] == ["chained"] * (LIFTS_PER_CHAIN - 1)
    for demonstration in chain:
        height = demonstration.cube_m[:, 2]
        assert height[0] < 0.02
        assert (height[-REST_STEPS:] > 0.05).all(), "it is up at the end"
        # What a chunk that reaches beyond the end repeats is where the expert stays.
        assert np.abs(np.diff(demonstration.action_rad[-REST_STEPS:], axis=0)).max() < 0.04


def test_the_jaws_take_the_cube_before_it_rises(chain: list[Demonstration]) -> None:
    for demonstration in chain:
        taken = np.flatnonzero(demonstration.contact)
        risen = np.flatnonzero(demonstration.cube_m[:, 2] > 0.03)
        assert 1 <= len(taken) <= 5, "an event, not a state"
        assert taken[0] <= risen[0]


def test_a_row_is_what_was_seen_and_due_at_one_time(chain: list[Demonstration]) -> None:
    for demonstration in chain:
        assert demonstration.frames.shape == (len(demonstration), 2, 112, 112, 3)
        assert demonstration.frames.dtype == np.uint8
        assert demonstration.state_rad.shape == demonstration.action_rad.shape == (len(demonstration), 6)
        error = np.abs(demonstration.state_rad - demonstration.action_rad)[:, :5]
        later = np.abs(demonstration.state_rad[1:] - demonstration.action_rad[:-1])[:, :5]
        assert np.median(error) < np.median(later), "the row is not one step off"


def test_labels_are_smooth_though_the_arm_was_pushed(chain: list[Demonstration]) -> None:
    for demonstration in chain:
        change = np.diff(demonstration.action_rad.astype(np.float64), n=2, axis=0) / 0.1
        assert np.abs(change).max() <= MAX_SPEED_CHANGE_RAD_S + 1e-4
    pushed = max(np.abs(d.state_rad - d.action_rad)[:, :5].max() for d in chain)
    assert pushed > 0.03


def test_a_chain_is_a_function_of_its_seed(world: World, chain: list[Demonstration]) -> None:
    again = next(collect_chain(world, 2))
    assert np.array_equal(again.frames, chain[0].frames)
    assert np.array_equal(again.action_rad, chain[0].action_rad)
    other = next(collect_chain(world, 3))
    assert not np.array_equal(other.cube_m[0], chain[0].cube_m[0])


def test_a_failed_lift_is_left_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstrations, "MAX_STEPS", 5)
    assert list(collect_chain(world, 2)) == []


def test_near_starts_do_not_touch_the_cube(world: World) -> None:
    rng = np.random.default_rng(5)
    for seed in range(60):
        world.reset(seed)
        before = world.truth().cube_position_m
        world.set_arm_rad(demonstrations._near_pose(polar(before), rng))
        world.step(100_000_000)
        assert np.linalg.norm(world.truth().cube_position_m - before) < 2e-3, seed


def test_disturbances_come_and_go() -> None:
    disturbance = Disturbance(np.random.default_rng(1))
    offsets = np.stack([disturbance.advance() for _ in range(1000)])
    size = np.abs(offsets[:, :4]).max(axis=1)
    assert (size < 0.03).mean() > 0.5, "most of the time it is quiet"
    assert size.max() > 0.06, "and then it pushes"
    assert np.abs(np.diff(offsets[:, 0])).max() < 0.09, "smoothly"
    assert np.abs(offsets).max() < Disturbance.PUSH_RAD.max() + 6 * Disturbance.TREMOR_RAD


@pytest.mark.slow
def test_the_command_writes_a_folder_that_two_workers_fill(tmp_path: Path) -> None:
    out = tmp_path / "demos"
    assert demonstrations.main(["--episodes", "6", "--seed", "30", "--out", str(out), "--workers", "2"]) == 0
    dataset, recorded = open_dataset(out), read_demonstrations(out)
    assert dataset.info.about["seed"] == 30
    assert dataset.info.about["command"].startswith("python -m onbeat.training.demonstrations --episodes 6")
    assert dataset.tasks == {0: "lift the red cube"}
    assert len(dataset) == sum(map(len, recorded))
    assert {d.seed for d in recorded} == {30, 31}
    again = next(collect_chain(World(frame_size=demonstrations.FRAME_SIZE), 30))
    assert np.array_equal(recorded[0].frames, again.frames), "no bit of a frame is lost"
    assert np.array_equal(recorded[0].action_rad, again.action_rad)
