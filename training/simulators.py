"""LIBERO and RoboCasa: what their published clients do between simulator and policy, and a policy acts wrongly without.

    observation = observe(LIBERO, env_observation, t_ns)    images turned as the policy learnt them, poses as its state
    for command in command_rows(LIBERO, actions): env.step(command)

Which image is turned how, and how a gripper's or a mode's number is sent, is the embodiment's (`client_image`,
`client_scale`, `client_offset`); here are the simulators' names and the order of their command. Neither simulator is
needed to import this. C rows of a chunk, N numbers of a command.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.interfaces import Frame
from onbeat.embodiment.errors import OnbeatError
from onbeat.embodiment.robot import Embodiment
from onbeat.embodiment.schema import load_embodiment
from onbeat.runtime.language import PolicyLanguage
from onbeat.runtime.observation import Observation

Array = NDArray[Any]

TURNS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "as_is": lambda rgb: rgb,
        "rotate_180": lambda rgb: rgb[::-1, ::-1],
        "flip_vertical": lambda rgb: rgb[::-1],
    }
)


class SimulatorError(OnbeatError):
    """An observation that lacks something, actions that are not the robot's, or a policy for another simulator."""


@dataclass(frozen=True, slots=True)
class Part:
    """One key of the simulator's observation. as_axis_angle: a quaternion (x, y, z, w) that the client converts."""

    key: str
    as_axis_angle: bool = False


@dataclass(frozen=True, slots=True)
class Simulator:
    """One simulator as data. views: image key by view. state: a part by state key. command: action keys in the order of
    its step(). chunk: rows that its released policies give."""

    name: str
    embodiment: str
    views: Mapping[str, str]
    state: Mapping[str, Part]
    command: tuple[str, ...]
    chunk: int

    @property
    def robot(self) -> Embodiment:
        return load_embodiment(self.embodiment)


# Names of robosuite's observations, which both simulators stand on.
LIBERO = Simulator(
    name="LIBERO",
    embodiment="libero",
    views={"top_view": "agentview_image", "wrist_view": "robot0_eye_in_hand_image"},
    state={
        "eef_position": Part("robot0_eef_pos"),
        "eef_rotation": Part("robot0_eef_quat", as_axis_angle=True),
        "libero_gripper_position": Part("robot0_gripper_qpos"),
    },
    command=("eef_position", "eef_rotation", "gripper_position"),
    chunk=16,
)
ROBOCASA = Simulator(
    name="RoboCasa",
    embodiment="robocasa",
    views={
        "left_view": "robot0_agentview_left_image",
        "right_view": "robot0_agentview_right_image",
        "wrist_view": "robot0_eye_in_hand_image",
    },
    state={
        "eef_position": Part("robot0_eef_pos"),
        "eef_rotation": Part("robot0_eef_quat", as_axis_angle=True),
        "gripper_qpos": Part("robot0_gripper_qpos"),
        "base_position": Part("robot0_base_pos"),
        # Sent as it comes, x, y, z, w, though the policy reads w, x, y, z: so it was trained (embodiment/README.md).
        "base_rotation": Part("robot0_base_quat"),
    },
    command=("eef_position", "eef_rotation", "gripper_position", "base_motion", "control_mode"),
    chunk=15,
)


def check_policy(simulator: Simulator, language: PolicyLanguage) -> None:
    """Raise SimulatorError unless a policy is for the simulator's robot and gives as many rows as its released ones."""
    if language.embodiment.layout != simulator.robot.layout:
        raise SimulatorError(
            f"the policy moves '{language.embodiment.name}', not {simulator.name}: take one made for it"
        )
    if language.settings.chunk != simulator.chunk:
        raise SimulatorError(
            f"the policy gives {language.settings.chunk} rows, and those of {simulator.name} give {simulator.chunk}: "
            "its config.json must say so (action_chunk_length)"
        )


def observe(simulator: Simulator, raw: Mapping[str, Any], t_ns: int) -> Observation:
    """A simulator's observation as the policy's. t_ns: when it was made, monotonic clock. Raises SimulatorError."""
    robot, turn = simulator.robot, TURNS[simulator.robot.client_image]
    views = {view: Frame(t_ns, t_ns, _image(raw, key, turn, simulator)) for view, key in simulator.views.items()}
    state = {name: _numbers(raw, part, simulator) for name, part in simulator.state.items()}
    assert set(views) == set(robot.views), (simulator.name, robot.views)
    return Observation(views, state, t_ns)


def command_rows(simulator: Simulator, actions: Mapping[str, Array]) -> NDArray[np.float64]:
    """Decoded actions {key: (C, d)} as rows (C, N) for the simulator's step(). Raises SimulatorError."""
    keys = {key.name: key for key in simulator.robot.action}
    odd = sorted(set(actions) ^ set(keys))
    if odd:
        raise SimulatorError(f"action '{odd[0]}' is unknown to {simulator.name} or missing: give {', '.join(keys)}")
    columns = [
        np.asarray(actions[name], np.float64) * keys[name].client_scale + keys[name].client_offset
        for name in simulator.command
    ]
    return np.concatenate(columns, axis=-1)


def axis_angle_from_xyzw(quaternion: Array) -> NDArray[np.float64]:
    """(3,) of a unit quaternion (x, y, z, w), as robosuite's clients convert it: turns beyond half a turn stay so."""
    xyz, w = np.asarray(quaternion[:3], np.float64), float(np.clip(quaternion[3], -1, 1))
    length = np.sqrt(1 - w * w)
    return np.zeros(3) if np.isclose(length, 0) else xyz * 2 * np.arccos(w) / length


def _image(raw: Mapping[str, Any], key: str, turn: Callable[[Array], Array], simulator: Simulator) -> Array:
    rgb = np.asarray(_taken(raw, key, simulator))
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise SimulatorError(f"'{key}' of {simulator.name} is {rgb.dtype} {rgb.shape}, not (H, W, 3) uint8: enable it")
    return np.ascontiguousarray(turn(rgb))


def _numbers(raw: Mapping[str, Any], part: Part, simulator: Simulator) -> NDArray[np.float64]:
    values = np.asarray(_taken(raw, part.key, simulator), np.float64)
    return axis_angle_from_xyzw(values) if part.as_axis_angle else values


def _taken(raw: Mapping[str, Any], key: str, simulator: Simulator) -> Any:
    if key not in raw:
        raise SimulatorError(f"the observation of {simulator.name} has no '{key}': enable that camera or sensor in it")
    return raw[key]
