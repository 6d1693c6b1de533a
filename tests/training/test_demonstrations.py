"""Demonstrations: the file format, what a chain records, and what pushes and poor starts add."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mujoco")

from onbeat.drivers.twin.world import World
from onbeat.training import demonstrations
from onbeat.training.demonstrations import (
    LIFTS_PER_CHAIN,
    REST_STEPS,
    Demonstration,
    DemonstrationsError,
    Disturbance,
    collect_chain,
    load,
    load_all,
    read_index,
    save,
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
    return Demonstration(frames, *joints, cube_m=cube, seed=7, start="home")


def write_index(directory: Path, **changes: object) -> None:
    index = {"format": "onbeat-demonstrations", "version": 1, "files": ["a.npz"], "steps": 4, **changes}
    (directory / "index.json").write_text(json.dumps(index))


def test_a_file_gives_back_what_went_in(tmp_path: Path) -> None:
    before = small()
    save(before, tmp_path / "a.npz")
    write_index(tmp_path)
    (after,) = load_all(tmp_path)
    assert len(after) == 4
    assert (after.seed, after.start) == (7, "home")
    for name in ("frames", "state_rad", "action_rad", "cube_m"):
        left, right = getattr(before, name), getattr(after, name)
        assert left.dtype == right.dtype
        assert np.array_equal(left, right), name


@pytest.mark.parametrize("keep", [0, 20, 500])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.npz"
    save(small(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DemonstrationsError, match=r"a\.npz is no demonstration .* collect the folder again"):
        load(path)


def test_a_flipped_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    save(small(), path)
    content = bytearray(path.read_bytes())
    content[300] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DemonstrationsError):
        load(path)


def test_a_file_without_an_array_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", frames=np.zeros((1, 2, 8, 8, 3), np.uint8))
    with pytest.raises(DemonstrationsError, match="state_rad"):
        load(tmp_path / "a.npz")


def test_unequal_lengths_are_refused(tmp_path: Path) -> None:
    whole = small()
    short = Demonstration(whole.frames, whole.state_rad, whole.action_rad[:-1], whole.cube_m, seed=0, start="home")
    save(short, tmp_path / "a.npz")
    with pytest.raises(DemonstrationsError, match=r"lengths \[3, 4\]"):
        load(tmp_path / "a.npz")


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", frames=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DemonstrationsError):
        load(tmp_path / "a.npz")


def test_a_folder_without_an_index_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DemonstrationsError, match=r"python -m onbeat\.training\.demonstrations"):
        load_all(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(DemonstrationsError, match=r"index\.json"):
        load_all(tmp_path)


@pytest.mark.parametrize("changes", [{"version": 2}, {"format": "other"}])
def test_another_format_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    write_index(tmp_path, **changes)
    with pytest.raises(DemonstrationsError, match="version 1"):
        read_index(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_index(tmp_path)
    with pytest.raises(DemonstrationsError, match=r"lacks a\.npz \(1 in all\)"):
        read_index(tmp_path)


def test_a_chain_is_several_lifts_each_ending_at_rest(chain: list[Demonstration]) -> None:
    assert len(chain) == LIFTS_PER_CHAIN
    assert [d.start for d in chain[1:]] == ["chained"] * (LIFTS_PER_CHAIN - 1)
    for demonstration in chain:
        height = demonstration.cube_m[:, 2]
        assert height[0] < 0.02
        assert (height[-REST_STEPS:] > 0.05).all(), "it is up at the end"
        # What a chunk that reaches beyond the end repeats is where the expert stays.
        assert np.abs(np.diff(demonstration.action_rad[-REST_STEPS:], axis=0)).max() < 0.04


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
    index = read_index(out)
    recorded = load_all(out)
    assert index["seed"] == 30
    assert index["instruction"] == "lift the red cube"
    assert index["command"].startswith("python -m onbeat.training.demonstrations --episodes 6")
    assert index["steps"] == sum(map(len, recorded))
    assert {d.seed for d in recorded} == {30, 31}
