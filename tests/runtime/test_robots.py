"""What a robot file may say of parking, and what its servo bus must carry and reach, before anything moves."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onbeat.calibration.joints import FACTORY, CalibrationError, load_joints, save_joints
from onbeat.drivers.feetech.device import BusSettings, JointCalibration
from onbeat.drivers.feetech.pace import RateTooHigh
from onbeat.drivers.feetech.packets import RAD_PER_STEP
from onbeat.drivers.feetech.tables import MAX_STEP
from onbeat.runtime import robots
from onbeat.runtime.guardian import PARK_PERIOD_S, parking_way
from onbeat.runtime.robots import PARK, Robot, RobotError, build_robot, check_reach, load_robot, open_bus

ROBOT = load_robot("so101")


def with_calibration(path: Path, **changes: dict[str, int]) -> Robot:
    """The robot with a calibration file of its own. changes: joint -> fields."""
    joints = load_joints(FACTORY, ROBOT.joints)
    save_joints(path, {name: replace(joint, **changes.get(name, {})) for name, joint in joints.items()})
    return build_robot(replace(ROBOT.config, calibration=str(path)))


class TestParking:
    @pytest.mark.parametrize(
        ("fields", "complaint"),
        [
            ({"park_q": (0.0,) * 5}, "for each of 6 joints"),
            ({"park_speed_rad_s": 0.0}, "park_speed_rad_s above 0"),
            ({"park_speed_rad_s": -0.5}, "park_speed_rad_s above 0"),
            ({"park_speed_rad_s": float("nan")}, "park_speed_rad_s above 0"),
            ({"on_exit": PARK, "park_q": ()}, "needs park_q"),
            ({"on_exit": PARK, "park_speed_rad_s": 50.0}, "park_speed_rad_s = 50 .*set it to 3 or less"),
            ({"on_exit": PARK, "v_max": (3.0, 3.0, 0.4, 3.0, 3.0, 3.0)}, "set it to 0.4 or less"),
            (
                {"on_exit": PARK, "park_q": (0.0, -1.8, 1.6, 0.9, 0.0, 0.0)},
                "shoulder_lift is -1.8 rad.*-1.745 to 1.745",
            ),
            ({"on_exit": PARK, "park_q": (float("nan"), 0.0, 0.0, 0.0, 0.0, 0.0)}, "shoulder_pan is nan rad"),
            ({"on_exit": PARK, "q_max": (1.0, 1.0, 1.0, 1.0, 1.0, 1.0)}, "elbow_flex is 1.6 rad"),
        ],
    )
    def test_what_cannot_be_is_refused(self, fields: dict, complaint: str):
        with pytest.raises(RobotError, match=complaint):
            build_robot(replace(ROBOT.config, **fields))

    def test_what_is_never_parked_may_lie_anywhere(self):
        build_robot(replace(ROBOT.config, v_max=(0.4,) * 6, park_q=(9.0,) * 6))
        build_robot(replace(ROBOT.config, park_q=()))

    @pytest.mark.parametrize("robot", ["so101", "so101-twin"])
    def test_the_named_robots_can_be_parked(self, robot: str):
        build_robot(replace(load_robot(robot).config, on_exit=PARK))

    def test_the_fastest_that_passes_is_inside_v_max_at_its_peak(self):
        robot = build_robot(replace(ROBOT.config, on_exit=PARK, park_speed_rad_s=3.0))
        start, end = (
            np.rint(np.array(pose) / RAD_PER_STEP).astype(int) for pose in (robot.limits.q_max, robot.config.park_q)
        )
        way = np.array([start, *parking_way(start.tolist(), end.tolist(), 3.0 / RAD_PER_STEP)])
        speed = np.abs(np.diff(way, axis=0)).max() * RAD_PER_STEP / PARK_PERIOD_S
        one_step = RAD_PER_STEP / PARK_PERIOD_S
        assert 2.8 < speed <= robot.limits.v_max.min() + one_step


class TestReach:
    @pytest.mark.parametrize(
        ("servo", "complaint"),
        [
            ({"zero_steps": 3000}, r"shoulder_pan .*-1.92 to 1.92 rad, .*zero_steps = 3000 .* only -4.602 to 1.680"),
            ({"zero_steps": 1000}, r"only -1.534 to 4.748 rad"),
            ({"zero_steps": 3000, "direction": -1}, r"only -1.680 to 4.602 rad"),
        ],
    )
    def test_limits_that_are_no_steps_of_a_servo_are_refused(self, servo: dict, complaint: str, tmp_path: Path):
        path = tmp_path / "arm.toml"
        robot = with_calibration(path, shoulder_pan=servo)
        with pytest.raises(RobotError, match=complaint) as caught:
            check_reach(robot, load_joints(path, robot.joints))
        assert str(path) in str(caught.value)

    def test_the_last_step_is_in_reach_and_the_next_is_not(self):
        servos = load_joints(FACTORY, ROBOT.joints)
        top = round(ROBOT.limits.q_max[0] / RAD_PER_STEP)
        check_reach(ROBOT, servos | {"shoulder_pan": JointCalibration(1, MAX_STEP - top)})
        with pytest.raises(RobotError):
            check_reach(ROBOT, servos | {"shoulder_pan": JointCalibration(1, MAX_STEP - top + 1)})

    def test_a_range_cut_to_what_the_text_says_passes(self, tmp_path: Path):
        robot = with_calibration(tmp_path / "arm.toml", shoulder_pan={"zero_steps": 3000})
        cut = build_robot(replace(robot.config, q_max=(1.680, *robot.limits.q_max[1:])))
        check_reach(cut, load_joints(tmp_path / "arm.toml", cut.joints))


class OpenBus:
    """A bus that opens. delay_ns: of each servo."""

    delay_ns = 0

    def __init__(self, port: str, joints: Mapping[str, JointCalibration], settings: BusSettings) -> None:
        self.port, self.joints, self.settings, self.is_open = port, tuple(joints), settings, True
        self.return_delay_ns = (self.delay_ns,) * len(joints)
        opened.append(self)

    def close(self) -> None:
        self.is_open = False


opened: list[OpenBus] = []


class TestOpenBus:
    @pytest.fixture(autouse=True)
    def _no_port(self, monkeypatch: pytest.MonkeyPatch):
        opened.clear()
        monkeypatch.setattr(robots, "FeetechBus", OpenBus)

    def test_it_is_the_robots(self):
        bus = open_bus(build_robot(replace(ROBOT.config, port="/dev/arm", bus_retries=1)))
        assert (bus.port, bus.joints) == ("/dev/arm", ROBOT.joints)
        assert (bus.settings.baud_rate, bus.settings.retries) == (1_000_000, 1)
        assert opened[0].is_open

    def test_servos_that_answer_too_late_for_the_rate_are_refused_and_the_port_given_back(
        self, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(OpenBus, "delay_ns", 500_000)
        with pytest.raises(RateTooHigh, match=r"return delays take 3000 us.*return_delay to 0, or loop_rate_hz to 174"):
            open_bus(ROBOT)
        assert not opened[0].is_open
        open_bus(build_robot(replace(ROBOT.config, loop_rate_hz=174.0)))

    def test_a_calibration_out_of_reach_opens_nothing(self, tmp_path: Path):
        robot = with_calibration(tmp_path / "arm.toml", gripper={"zero_steps": 100})
        with pytest.raises(RobotError, match="gripper"):
            open_bus(robot)
        with pytest.raises(CalibrationError):
            open_bus(build_robot(replace(ROBOT.config, calibration="/nowhere.toml")))
        assert opened == []
