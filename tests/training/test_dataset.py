"""Demonstrations in the network's terms: what is refused, and which rows a chunk holds."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onbeat.embodiment.errors import OnbeatError
from onbeat.embodiment.schema import load_embodiment
from onbeat.training.data.sources import action_slots
from onbeat.training.dataset import (
    DatasetError,
    Steps,
    check_demonstration,
    measure_statistics,
    read_recordings,
    split_recordings,
)
from onbeat.training.prepare import Prepared, prepare

ROBOT = load_embodiment("so101")
IMAGE_SIZE, STEPS, JOINTS = 28, 20, 6  # of the synthetic demonstrations


@pytest.fixture
def prepared(tiny_recipe, demonstrations, tmp_path) -> Prepared:
    return prepare(tiny_recipe, demonstrations, tmp_path)


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_a_folder_without_demonstrations_is_refused(folder: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(OnbeatError, match=folder):
        read_recordings(tmp_path / folder, ROBOT, IMAGE_SIZE)


@pytest.mark.parametrize("name", ["state_rad", "action_rad", "cube_m"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_named_by_place_and_step(name: str, value: float, demonstrate) -> None:
    demonstration = demonstrate(0)
    getattr(demonstration, name)[7, 1] = value
    with pytest.raises(DatasetError, match=f"here: {name} is not finite at step 7"):
        check_demonstration(demonstration, "here", ROBOT, IMAGE_SIZE)


def test_demonstrations_of_two_tasks_belong_into_a_recipe_with_data(demonstrations: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    shutil.copytree(demonstrations, folder)
    tasks = folder / "meta/tasks.parquet"
    table = pq.read_table(tasks)
    pq.write_table(pa.concat_tables([table, table.set_column(0, "task_index", pa.array([1]))]), tasks)
    with pytest.raises(DatasetError, match=r"has 2 tasks: name it under \[data\]"):
        read_recordings(folder, ROBOT, IMAGE_SIZE)


@pytest.mark.parametrize("name", ["state_rad", "action_rad"])
def test_a_robot_of_another_width_is_refused(name: str, demonstrate) -> None:
    demonstration = demonstrate(0)
    narrow = replace(demonstration, **{name: getattr(demonstration, name)[:, :5]})
    with pytest.raises(DatasetError, match=f"here: {name} is .* not 6 wide"):
        check_demonstration(narrow, "here", ROBOT, IMAGE_SIZE)


@pytest.mark.parametrize("frames", [np.zeros((STEPS, 1, 28, 28, 3), np.uint8), np.zeros((STEPS, 2, 28, 28, 3))])
def test_frames_of_another_kind_are_refused(frames, demonstrate) -> None:
    with pytest.raises(DatasetError, match="here: frames are"):
        check_demonstration(replace(demonstrate(0), frames=frames), "here", ROBOT, IMAGE_SIZE)


def test_frames_of_another_size_are_refused(demonstrate) -> None:
    with pytest.raises(DatasetError, match="collect them at image_size"):
        check_demonstration(demonstrate(0), "here", ROBOT, IMAGE_SIZE * 2)


def test_the_split_keeps_demonstrations_whole_and_apart(demonstrate) -> None:
    demonstrations = [demonstrate(seed) for seed in range(10)]
    fitted, held_out = split_recordings(demonstrations, 0.2, seed=5)
    assert len(held_out) == 2
    assert sorted(d.seed for d in fitted + held_out) == list(range(10))
    assert [d.seed for d in split_recordings(demonstrations, 0.2, seed=5)[1]] == [d.seed for d in held_out]


def test_something_is_always_held_out_and_something_left(demonstrate) -> None:
    two = [demonstrate(seed) for seed in range(2)]
    assert [len(part) for part in split_recordings(two, 0.0, seed=0)] == [1, 1]
    assert [len(part) for part in split_recordings(two, 0.99, seed=0)] == [1, 1]
    with pytest.raises(DatasetError, match="at least two"):
        split_recordings(two[:1], 0.5, seed=0)


def test_statistics_are_those_of_the_numbers(demonstrate) -> None:
    demonstrations = [demonstrate(seed) for seed in range(3)]
    statistics = measure_statistics(demonstrations, ROBOT, "tiny")
    actions = np.concatenate([d.action_rad for d in demonstrations])
    assert statistics.action["arm_joints"]["max"] == pytest.approx(actions[:, :5].max(axis=0))
    assert statistics.action["gripper"]["std"] == pytest.approx(actions[:, 5:].std(axis=0), rel=1e-5)
    states = np.concatenate([d.state_rad for d in demonstrations])
    assert statistics.state["gripper"]["q01"] == pytest.approx(np.quantile(states[:, 5:], 0.01, axis=0), rel=1e-5)


def test_a_chunk_starts_at_its_observation_and_repeats_the_last_row(prepared: Prepared) -> None:
    """Observation 18 of 20 has rows 18, 19, 19, 19: never a row of the next demonstration."""
    steps, generator = prepared.sources[0], np.random.default_rng(0)
    assert isinstance(steps, Steps)
    last, first = (steps.sample(index, generator) for index in (STEPS - 2, STEPS))
    assert (last.actions == steps.action[[STEPS - 2, STEPS - 1, STEPS - 1, STEPS - 1]]).all()
    assert (first.actions == steps.action[STEPS : STEPS + 4]).all()
    assert last.valid.sum() == 4 * JOINTS, "a repeated row counts: the robot stays where it is"
    assert (last.state == steps.state[STEPS - 2]).all()
    assert (np.moveaxis(last.frames, -3, -1) == steps.frames[STEPS - 2]).all()
    assert last.frames.dtype == np.uint8


def test_numbers_stand_in_the_slots_of_the_robot_within_the_range(prepared: Prepared) -> None:
    steps, slots = prepared.sources[0], action_slots(ROBOT)
    assert isinstance(steps, Steps)
    assert slots.nonzero()[0].tolist() == [18, 50, 51, 52, 53, 54]
    assert (steps.action[:, ~slots] == 0).all()
    assert (steps.state[:, ~slots] == 0).all()
    assert steps.action[:, slots].min(0).tolist() == pytest.approx([-1.0] * 6, abs=1e-5)
    assert steps.action[:, slots].max(0).tolist() == pytest.approx([1.0] * 6, abs=1e-5)


def test_what_is_learnt_decodes_to_what_was_done(prepared: Prepared, demonstrations: Path, tiny_recipe) -> None:
    fitted, _ = split_recordings(
        read_recordings(demonstrations, ROBOT, IMAGE_SIZE).demonstrations,
        tiny_recipe.fitting.held_out,
        tiny_recipe.seed,
    )
    steps, language = prepared.sources[0], prepared.languages["so101"]
    assert isinstance(steps, Steps)
    decoded = language.decode(steps.action)
    assert language.embodiment.flatten(decoded) == pytest.approx(
        np.concatenate([d.action_rad for d in fitted]), abs=1e-6
    )
