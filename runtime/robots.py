"""Robots as this runtime drives them: rates, limits, cameras, port, and what each does when a run ends.

`ROBOTS` has the named ones; a TOML file of the same field names overrides any of them. What the policy's numbers mean
is the embodiment's (`onbeat.embodiment`); here is what this machine and this arm add to it.
"""

import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.calibration.joints import FACTORY, load_joints
from onbeat.drivers.feetech.device import BusSettings, FeetechBus, JointCalibration
from onbeat.drivers.feetech.pace import BusPace
from onbeat.drivers.feetech.packets import rad_of_steps, steps_of_rad
from onbeat.drivers.feetech.tables import MAX_STEP
from onbeat.embodiment.chains import CHAINS
from onbeat.embodiment.errors import OnbeatError
from onbeat.embodiment.schema import Embodiment, load_embodiment
from onbeat.embodiment.slots import suggest
from onbeat.kernels.kinematics import Workspace, new_workspace, no_workspace
from onbeat.runtime.safety import SafetySettings
from onbeat.runtime.tick import JointLimits

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# J joints, C rows of a chunk.

HOLD = "hold"
RELAX = "relax"
PARK = "park"
ENDINGS = (HOLD, RELAX, PARK)
LIMIT_FIELDS = {"q_min": "lower", "q_max": "upper", "v_max": "velocity", "a_max": "acceleration"}
JERK_RAMP_S = 0.02  # nobody publishes a jerk: a_max is reached in this time, docs/decisions/0021


class RobotError(OnbeatError):
    """An unknown robot, a robot file that is wrong, or a robot that the policy's actions do not fit."""


@dataclass(frozen=True, slots=True)
class RobotConfig:
    """One robot. Limits per joint: q_min, q_max in rad, v_max in rad/s, a_max in rad/s^2; empty means the embodiment's.

    j_max: rad/s^3 per joint, empty means a_max / JERK_RAMP_S. tool_low_m, tool_high_m: corners of the box that the tool
    must not leave, x forward, y left, z up from the table; empty means none. max_frame_age_ms: an older newest frame is
    stale, and no inference starts from it. max_load, max_temperature_c: of a servo, load 1 is stall. max_behind_rad:
    per joint, between command and measurement, 0 for any, empty for none to be watched. slow_factor: of v_max while a
    fault says "slow". min_gate: of a chunk's mean gate, 0 for any; exp(-2 / tau) is what features have that have
    nothing to do with each other.

    cameras: view name -> name of its shared-memory ring; the twin names its own. port: the servo bus, empty when it
    must be given. margin_steps: policy steps added to when chunks come. execute_steps: from one observation to
    the next, 0 for as often as inference can. blend_steps: over which a new chunk fades in at most.

    on_exit: "hold" (torque stays on), "relax" (torque off, an arm falls) or "park" (to park_q, rad per joint, at
    park_speed_rad_s, the fastest joint's at its fastest, then torque off): at the end of a run, and when the guardian
    finds the runtime dead. missed_beats: ticks without a sign of life after which it does.
    """

    name: str
    embodiment: str
    is_simulated: bool
    loop_rate_hz: float = 200.0
    q_min: tuple[float, ...] = ()
    q_max: tuple[float, ...] = ()
    v_max: tuple[float, ...] = ()
    a_max: tuple[float, ...] = ()
    j_max: tuple[float, ...] = ()
    tool_low_m: tuple[float, ...] = ()
    tool_high_m: tuple[float, ...] = ()
    cameras: Mapping[str, str] = field(default_factory=dict)
    max_frame_age_ms: float = 500.0
    max_behind_rad: tuple[float, ...] = ()
    max_load: float = 0.75  # a servo gives up by itself after 2 s at 0.8
    max_temperature_c: float = 60.0
    slow_factor: float = 0.25
    min_gate: float = 0.0
    port: str = ""
    baud_rate: int = 1_000_000
    bus_retries: int = 2
    calibration: str = str(FACTORY)
    on_exit: str = HOLD
    park_q: tuple[float, ...] = ()
    park_speed_rad_s: float = 0.5
    missed_beats: int = 40
    margin_steps: float = 0.5
    execute_steps: int = 0
    blend_steps: int = 2


# z: a policy that grasps on the table may command a point a little under its top, and the servos give way.
_SO101: dict[str, Any] = {
    "embodiment": "so101",
    "tool_low_m": (-0.5, -0.5, -0.01),
    "tool_high_m": (0.5, 0.5, 0.6),
    "max_behind_rad": (*(0.25,) * 5, 0.0),  # pressing on the table takes 0.08; a gripper that holds a cube lags by 0.44
    "park_q": (0.0, -1.7, 1.6, 0.9, 0.0, 0.0),
}
ROBOTS = {
    robot.name: robot
    for robot in (
        RobotConfig("so101-twin", is_simulated=True, **_SO101),
        RobotConfig("so101", is_simulated=False, **_SO101),
    )
}


@dataclass(frozen=True, slots=True)
class Robot:
    """A config with what its embodiment says, checked to fit. joints: (J,) names in the order of every array."""

    config: RobotConfig
    embodiment: Embodiment
    joints: tuple[str, ...]
    limits: JointLimits

    @property
    def safety(self) -> SafetySettings:
        """What the robot tolerates, as the tick is told."""
        config = self.config
        return SafetySettings(
            max_frame_age_ms=config.max_frame_age_ms,
            max_load=config.max_load,
            max_behind_rad=config.max_behind_rad,
            max_temperature_c=config.max_temperature_c,
            slow_factor=config.slow_factor,
        )

    def workspace(self) -> Workspace:
        """Its chain in its box, with scratch of its own; no box where the config or the chain's table has none."""
        chain = CHAINS.get(self.embodiment.name)
        if chain is None or not self.config.tool_low_m:
            return no_workspace(len(self.joints))
        offsets, axes = ([getattr(link, name) for link in chain.links] for name in ("offset_m", "axis"))
        corners = (self.config.tool_low_m, self.config.tool_high_m)
        return new_workspace(*map(np.array, (offsets, axes, chain.tool_m, *corners)), joints=len(self.joints))

    @property
    def policy_period_ns(self) -> int:
        return self.embodiment.policy_period_ns


def load_robot(name: str, override: Path | None = None) -> Robot:
    """A named robot, with the fields of a TOML file in place of its own. Raises RobotError, EmbodimentError."""
    if name not in ROBOTS:
        raise RobotError(f"unknown robot '{name}': {suggest(name, ROBOTS)}")
    return build_robot(apply_toml(ROBOTS[name], override) if override else ROBOTS[name])


def apply_toml(robot: RobotConfig, path: Path) -> RobotConfig:
    """`robot` with the fields that a file names. An unknown field is an error with the closest name."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RobotError(f"{path} cannot be read ({error.strerror}): give the path of a robot file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RobotError(f"{path} is no TOML file ({error}): mend that place") from None
    return replace(robot, **{name: _field(robot, name, value, path) for name, value in document.items()})


def _field(robot: RobotConfig, name: str, value: Any, path: Path) -> Any:
    known = [f.name for f in fields(RobotConfig) if f.name not in ("name", "is_simulated")]
    if name not in known:
        closest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        remedy = f"did you mean '{closest[0]}'?" if closest else f"choose from {', '.join(known)}"
        raise RobotError(f"{path}: unknown field '{name}': {remedy}")
    present = getattr(robot, name)
    if isinstance(present, float) and type(value) is int:
        return float(value)
    if isinstance(present, tuple) and isinstance(value, list):
        return tuple(float(v) for v in value if isinstance(v, (int, float)))
    if name == "cameras" and isinstance(value, dict) and not all(type(ring) is str for ring in value.values()):
        view = next(view for view, ring in value.items() if type(ring) is not str)
        raise RobotError(f"{path}: cameras.{view} = {value[view]!r}: give the name of its ring of frames, in quotes")
    if type(value) is not type(present):
        raise RobotError(f"{path}: {name} = {value!r}: it must be a {type(present).__name__}, such as {present!r}")
    return value


def build_robot(config: RobotConfig) -> Robot:
    """Join a config with its embodiment. Raises RobotError where they do not fit, EmbodimentError for no limits.

    RateTooHigh: the servo bus cannot carry loop_rate_hz.
    """
    embodiment = load_embodiment(config.embodiment)
    keys_without_joints = [key.name for key in embodiment.action if len(key.joints) != key.size]
    if keys_without_joints:
        raise RobotError(
            f"{config.name}: action '{keys_without_joints[0]}' of '{embodiment.name}' is not joints, "
            "and this runtime commands joints: choose an embodiment whose actions are"
        )
    if sum(key.size for key in embodiment.state) != len(embodiment.joints):
        raise RobotError(f"{config.name}: the state of '{embodiment.name}' is not its joints: choose another")
    _check_config(config, len(embodiment.joints))
    BusPace(len(embodiment.joints), config.baud_rate).check(config.loop_rate_hz)
    robot = Robot(config, embodiment, embodiment.joints, _limits(config, embodiment))
    if config.on_exit == PARK:
        _check_parking(robot)
    return robot


def open_bus(robot: Robot) -> FeetechBus:
    """The robot's servo bus, checked to reach its limits and to carry its rate: nothing has torque of it.

    Raises CalibrationError, RobotError, BusError, RateTooHigh.
    """
    config = robot.config
    servos = load_joints(Path(config.calibration), robot.joints)
    check_reach(robot, servos)
    bus = FeetechBus(config.port, servos, BusSettings(baud_rate=config.baud_rate, retries=config.bus_retries))
    try:
        BusPace.of(bus).check(config.loop_rate_hz)
    except BaseException:
        bus.close()
        raise
    return bus


def check_reach(robot: Robot, servos: Mapping[str, JointCalibration]) -> None:
    """Raises RobotError where a limit is no step of its joint's servo: such a goal is sent to no joint at all.

    servos: name -> where it is, in the order of the joints.
    """
    for name, low, high in zip(robot.joints, *(bound.tolist() for bound in robot.limits[:2]), strict=True):
        zero, direction = servos[name].zero_steps, servos[name].direction
        if all(0 <= steps_of_rad(limit, zero, direction) <= MAX_STEP for limit in (low, high)):
            continue
        least, most = sorted(rad_of_steps(step, zero, direction) for step in (0, MAX_STEP))
        raise RobotError(
            f"{robot.config.name}: {name} may move from {low:.3g} to {high:.3g} rad, and with zero_steps = {zero} in "
            f"{robot.config.calibration} its servo turns only {least:.3f} to {most:.3f} rad: set the servo's middle "
            "anew and correct that file, or cut q_min and q_max in the robot file"
        )


def _check_config(config: RobotConfig, joints: int) -> None:
    if not 10 <= config.loop_rate_hz <= 1000:
        raise RobotError(f"{config.name}: loop_rate_hz = {config.loop_rate_hz}: choose 10 to 1000")
    if config.on_exit not in ENDINGS:
        raise RobotError(f"{config.name}: on_exit = '{config.on_exit}': choose {', '.join(ENDINGS)}")
    if not 0 < config.slow_factor <= 1 or not 0 < config.max_load <= 1 or config.missed_beats < 2:
        raise RobotError(f"{config.name}: slow_factor and max_load lie in 0..1, missed_beats is 2 or more")
    if (len(config.tool_low_m), len(config.tool_high_m)) not in ((0, 0), (3, 3)):
        raise RobotError(f"{config.name}: tool_low_m and tool_high_m are x, y, z in m: give three numbers each")
    if len(config.max_behind_rad) not in (0, joints) or min(config.max_behind_rad, default=0.0) < 0:
        raise RobotError(f"{config.name}: max_behind_rad is 0 or more for each of {joints} joints, or empty")
    steps = (config.margin_steps, config.execute_steps, config.blend_steps)
    if config.max_frame_age_ms <= 0 or not all(0 <= count < math.inf for count in steps):
        raise RobotError(f"{config.name}: max_frame_age_ms must be above 0, *_steps 0 or more")
    if len(config.park_q) not in (0, joints) or not 0 < config.park_speed_rad_s < math.inf:
        raise RobotError(f"{config.name}: park_q is rad for each of {joints} joints, park_speed_rad_s above 0")


def _check_parking(robot: Robot) -> None:
    config, limits = robot.config, robot.limits
    if not config.park_q:
        raise RobotError(f"{config.name}: on_exit = '{PARK}' needs park_q, rad per joint: give it, or another on_exit")
    for name, q, low, high in zip(robot.joints, config.park_q, limits.q_min, limits.q_max, strict=True):
        if not low <= q <= high:
            raise RobotError(
                f"{config.name}: park_q of {name} is {q:g} rad, outside its range: give {low:.3f} to {high:.3f}"
            )
    if config.park_speed_rad_s > limits.v_max.min():
        raise RobotError(
            f"{config.name}: park_speed_rad_s = {config.park_speed_rad_s:g} is faster than every joint may move, and "
            f"any may be the one that has the farthest to go: set it to {limits.v_max.min():g} or less"
        )


def _limits(config: RobotConfig, embodiment: Embodiment) -> JointLimits:
    published = embodiment.limits()
    values = {name: _limit(config, name, getattr(published, other)) for name, other in LIMIT_FIELDS.items()}
    values["j_max"] = np.array(config.j_max) if config.j_max else values["a_max"] / JERK_RAMP_S
    limits = JointLimits(**values)
    if not (np.isfinite(limits).all() and (limits.q_min < limits.q_max).all()):
        raise RobotError(f"{config.name}: every joint needs finite limits, q_min below q_max: correct the robot file")
    if not all((bound > 0).all() for bound in limits[2:]):
        raise RobotError(f"{config.name}: v_max, a_max, j_max must be above 0 for every joint: correct the robot file")
    return limits


def _limit(config: RobotConfig, name: str, published: tuple[float, ...]) -> NDArray[np.float64]:
    """The stricter of the robot file's and the embodiment's; a file cannot widen what the embodiment allows."""
    own = getattr(config, name)
    if own and len(own) != len(published):
        raise RobotError(f"{config.name}: {name} has {len(own)} numbers: give {len(published)}, one per joint")
    if not own:
        return np.array(published, np.float64)
    return (np.maximum if name == "q_min" else np.minimum)(np.array(own), np.array(published))


def state_values(robot: Robot, joints_rad: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Joint angles (J,) as the values of the state keys, which cover the joints in their order."""
    stops = np.cumsum([key.size for key in robot.embodiment.state])
    keys = zip(robot.embodiment.state, stops, strict=True)
    return {key.name: joints_rad[stop - key.size : stop] for key, stop in keys}


def joint_values(robot: Robot, state: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """The inverse of `state_values`: (J,)."""
    return np.concatenate([np.asarray(state[key.name], np.float64) for key in robot.embodiment.state])


def limits_table(robot: Robot) -> str:
    """What the arm may do, a line per joint, in degrees for a person."""
    degrees = [np.degrees(limit) for limit in robot.limits]
    lines = [f"{'joint':<16}{'range / deg':>20}{'deg/s':>8}{'deg/s^2':>10}{'deg/s^3':>10}"]
    for name, low, high, speed, acceleration, jerk in zip(robot.joints, *degrees, strict=True):
        lines.append(f"{name:<16}{low:>9.1f} to {high:>7.1f}{speed:>8.0f}{acceleration:>10.0f}{jerk:>10.0f}")
    box = zip("xyz", robot.config.tool_low_m, robot.config.tool_high_m, strict=False)
    lines += [f"tool, {axis} / m{low:>22.2f} to {high:>7.2f}" for axis, low, high in box]
    return "\n".join(lines)


def as_json(config: RobotConfig) -> dict[str, Any]:
    """A config as JSON carries it to the daemon; `from_json` reads it back."""
    return asdict(config)


def from_json(values: Mapping[str, Any]) -> RobotConfig:
    """The inverse of `as_json`."""
    arguments: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return RobotConfig(**arguments)
