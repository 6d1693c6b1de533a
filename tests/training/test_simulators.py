"""LIBERO and RoboCasa on made-up observations: images turned, poses converted, commands mapped, chunks checked."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onbeat.embodiment.rotation import convert_rotation
from onbeat.runtime.language import LanguageSettings, PolicyLanguage
from onbeat.runtime.observation import select_observation
from onbeat.runtime.prompt import load_tokenizer
from onbeat.training.simulators import (
    LIBERO,
    ROBOCASA,
    TURNS,
    Simulator,
    SimulatorError,
    axis_angle_from_xyzw,
    check_policy,
    command_rows,
    observe,
)

RNG = np.random.default_rng(0)
BOTH = pytest.mark.parametrize("simulator", [LIBERO, ROBOCASA], ids=lambda simulator: simulator.name)


def quaternion() -> np.ndarray:
    values = RNG.normal(size=4)
    return values / np.linalg.norm(values)


def raw_observation(simulator: Simulator) -> dict[str, Any]:
    raw: dict[str, Any] = {key: RNG.integers(0, 256, (10, 12, 3), dtype=np.uint8) for key in simulator.views.values()}
    sizes = {key.name: key.size for key in simulator.robot.state}
    for name, part in simulator.state.items():
        raw[part.key] = quaternion() if part.key.endswith("quat") else RNG.normal(size=sizes[name])
    return raw


@BOTH
def test_an_observation_has_all_that_the_embodiment_asks(simulator: Simulator) -> None:
    robot = simulator.robot
    seen = select_observation(observe(simulator, raw_observation(simulator), 5), robot.views, robot.state)
    assert seen.t_capture_ns == 5
    assert list(seen.state) == [key.name for key in robot.state]


def test_liberos_images_are_turned_by_half_a_turn() -> None:
    raw = raw_observation(LIBERO)
    seen = observe(LIBERO, raw, 0)
    for view, key in {"top_view": "agentview_image", "wrist_view": "robot0_eye_in_hand_image"}.items():
        rgb, turned = raw[key], seen.views[view].rgb
        assert np.array_equal(turned[0, 0], rgb[-1, -1])
        assert np.array_equal(turned[1, 2], rgb[-2, -3])
        assert turned.flags.c_contiguous


def test_robocasas_images_are_turned_upside_down() -> None:
    raw = raw_observation(ROBOCASA)
    seen = observe(ROBOCASA, raw, 0)
    sides = {"left_view": "agentview_left", "right_view": "agentview_right", "wrist_view": "eye_in_hand"}
    for view, camera in sides.items():
        rgb = raw[f"robot0_{camera}_image"]
        assert np.array_equal(seen.views[view].rgb[0], rgb[-1])
        assert np.array_equal(seen.views[view].rgb[1, 2], rgb[-2, 2])


def test_every_turn_of_an_embodiment_is_known() -> None:
    rgb = np.arange(12).reshape(2, 2, 3)
    assert np.array_equal(TURNS["as_is"](rgb), rgb)
    assert {LIBERO.robot.client_image, ROBOCASA.robot.client_image} == {"rotate_180", "flip_vertical"}


def test_a_pose_becomes_axis_angle_and_the_base_stays_as_it_is() -> None:
    raw = raw_observation(ROBOCASA)
    seen = observe(ROBOCASA, raw, 0)
    x, y, z, w = raw["robot0_eef_quat"]
    expected = convert_rotation(np.array([w, x, y, z]), "quaternion_wxyz", "axis_angle")
    turned = convert_rotation(seen.state["eef_rotation"], "axis_angle", "quaternion_wxyz")
    assert np.abs(turned @ convert_rotation(expected, "axis_angle", "quaternion_wxyz")) == pytest.approx(1)
    assert np.array_equal(seen.state["base_rotation"], raw["robot0_base_quat"])


@pytest.mark.parametrize(
    ("xyzw", "expected"),
    [
        ((0, 0, 0, 1), (0, 0, 0)),
        ((1, 0, 0, 0), (np.pi, 0, 0)),
        ((0, np.sin(0.3), 0, np.cos(0.3)), (0, 0.6, 0)),
        ((0, 0, np.sin(2.5), np.cos(2.5)), (0, 0, 5.0)),  # beyond half a turn, and kept
        ((0, 0, 0, 1.0000001), (0, 0, 0)),
    ],
)
def test_quaternions_are_converted_as_the_clients_do(xyzw: Any, expected: Any) -> None:
    assert axis_angle_from_xyzw(np.array(xyzw)) == pytest.approx(np.array(expected))


def test_liberos_gripper_is_one_minus_two_a() -> None:
    actions = {"eef_position": np.full((3, 3), 0.1), "eef_rotation": np.full((3, 3), 0.2)}
    rows = command_rows(LIBERO, {**actions, "gripper_position": np.array([[0.0], [1.0], [0.25]])})
    assert rows.shape == (3, 7)
    assert rows[:, :6] == pytest.approx(np.array([[0.1] * 3 + [0.2] * 3] * 3))
    assert rows[:, 6].tolist() == [1, -1, 0.5]


def test_robocasas_gripper_and_mode_are_mapped_and_in_order() -> None:
    actions = {
        "control_mode": np.array([[0.0], [1.0]]),
        "base_motion": np.full((2, 4), 0.4),
        "gripper_position": np.array([[0.0], [1.0]]),
        "eef_rotation": np.full((2, 3), 0.2),
        "eef_position": np.full((2, 3), 0.1),
    }
    rows = command_rows(ROBOCASA, actions)
    assert rows[0] == pytest.approx(np.array([0.1] * 3 + [0.2] * 3 + [1] + [0.4] * 4 + [-1]))
    assert rows[1] == pytest.approx(np.array([0.1] * 3 + [0.2] * 3 + [-1] + [0.4] * 4 + [1]))


@BOTH
def test_what_is_missing_or_odd_is_named(simulator: Simulator) -> None:
    raw = raw_observation(simulator)
    for key in list(raw):
        with pytest.raises(SimulatorError, match=f"has no '{key}'"):
            observe(simulator, {k: v for k, v in raw.items() if k != key}, 0)
    with pytest.raises(SimulatorError, match=r"not \(H, W, 3\) uint8"):
        observe(simulator, {**raw, "robot0_eye_in_hand_image": np.zeros((10, 12, 3))}, 0)
    with pytest.raises(SimulatorError, match=r"'eef_position' is unknown to .* or missing"):
        command_rows(simulator, {key.name: np.zeros((1, key.size)) for key in simulator.robot.action[1:]})


@BOTH
def test_a_policy_of_another_robot_or_chunk_is_refused(simulator: Simulator, golden: Path) -> None:
    robot = simulator.robot
    settings = LanguageSettings(robot.name, robot.views, 8, 1, simulator.chunk, "", "{task_description}")
    language = PolicyLanguage(settings, robot, load_tokenizer(golden / "ckpt_a1" / "checkpoint"), None)
    check_policy(simulator, language)
    other = ROBOCASA if simulator is LIBERO else LIBERO
    with pytest.raises(SimulatorError, match=f"not {other.name}"):
        check_policy(other, language)
    with pytest.raises(SimulatorError, match=f"gives 8 rows, and those of {simulator.name} give {simulator.chunk}"):
        check_policy(simulator, replace(language, settings=replace(settings, chunk=8)))


def test_the_chunks_are_those_of_the_released_policies() -> None:
    assert (LIBERO.chunk, ROBOCASA.chunk) == (16, 15)
