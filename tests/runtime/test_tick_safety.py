"""What a tick does about faults, judged from outside by the commands; jerk and workspace are limits as the others."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onbeat.kernels.kinematics import excess_m
from onbeat.kernels.limit import smooth, smooth_reference, smoothing_ticks
from onbeat.runtime.faults import ROW, Fault, Level
from onbeat.runtime.robots import Robot, load_robot
from onbeat.runtime.safety import BEHIND_TIME_S, LOAD_TIME_S, SafetySettings, report, set_condition
from onbeat.runtime.tick import GAVE_WAY, OUTSIDE, REFUSED, SLOWED, STOPPED, TickState, new_tick_state, tick
from onbeat.runtime.timeline import publish

TICK_NS, PERIOD_NS = 10_000_000, 100_000_000
DT = 0.01
REACH = np.array([1.5, 0.0, -0.6, 0.4, 1.5, 1.0])  # far, inside every range and over the table
HOME = np.array([0.0, -0.85, 0.6, 1.2, 0.0, 0.4])
ROLL = np.array([0.0, 0.0, 0.0, 0.0, 1.0, 0.0])  # of the wrist, joint 4
ROBOT: Robot = load_robot("so101-twin")
TOLERANCE_M = 0.002  # between the poses that a tick looks at, and by the mean over the path


def new_state(settings: SafetySettings = ROBOT.safety) -> TickState:
    state = new_tick_state(ROBOT.limits, rate_hz=100, rows=16, workspace=ROBOT.workspace(), settings=settings)
    state.measured_q[:] = HOME
    return state


class Drive:
    """A state and its clock; `chunk` commits targets from now on."""

    def __init__(self, settings: SafetySettings = ROBOT.safety) -> None:
        self.state, self.now_ns = new_state(settings), 10**9
        self.commands = [HOME.copy()]
        self.flags: list[int] = []
        self.follows = np.ones(6, bool)

    def chunk(self, targets) -> int:
        rows = np.broadcast_to(targets, (16, 6)).copy()
        return publish(self.state.timeline, rows, t0_ns=self.now_ns, period_ns=PERIOD_NS, now_ns=self.now_ns)

    def run(self, ticks: int) -> np.ndarray:
        for _ in range(ticks):
            self.flags.append(tick(self.state, self.now_ns))
            self.state.measured_q[self.follows] = self.state.command_q[self.follows]
            self.commands.append(self.state.command_q.copy())
            self.now_ns += TICK_NS
        return np.array(self.commands)

    def speed(self) -> np.ndarray:
        return np.diff(self.commands, axis=0) / DT


def assert_inside(commands: np.ndarray) -> None:
    """Every limit, by differences; 1e-9 is rounding over a period, 1e-6 the same over three."""
    limits = ROBOT.limits
    speed = np.diff(commands, axis=0, prepend=commands[:1]) / DT
    acceleration = np.diff(speed, axis=0, prepend=0 * speed[:1]) / DT
    jerk = np.diff(acceleration, axis=0, prepend=0 * speed[:1]) / DT
    assert (commands >= limits.q_min).all()
    assert (commands <= limits.q_max).all()
    assert (np.abs(speed) <= limits.v_max * (1 + 1e-9)).all()
    assert (np.abs(acceleration) <= limits.a_max * (1 + 1e-9) + 1e-7).all()
    assert (np.abs(jerk) <= limits.j_max * (1 + 1e-9) + 1e-5).all()
    workspace = ROBOT.workspace()
    assert max(excess_m(q, workspace) for q in commands) <= TOLERANCE_M


class TestLevels:
    def test_slow_scales_the_speed_and_nothing_jumps(self):
        drive = Drive()
        drive.chunk(HOME + REACH)
        drive.run(40)
        assert np.abs(drive.speed()[-1]).max() > 2.0
        set_condition(drive.state.safety, Fault.PERCEPTION_SHIFT, True)
        drive.run(40)
        assert drive.flags[-1] & SLOWED
        assert np.abs(drive.speed()[-10:]).max() <= 0.25 * 3.0 * (1 + 1e-9)
        assert_inside(np.array(drive.commands))

    def test_hold_brings_it_to_rest_and_keeps_it_and_lets_it_go_on(self):
        drive = Drive()
        drive.chunk(HOME + REACH)
        drive.run(30)
        set_condition(drive.state.safety, Fault.CAMERA_BLANK, True)
        drive.run(60)
        assert drive.flags[-1] & STOPPED
        assert (np.diff(drive.commands[-20:], axis=0) == 0).all()
        set_condition(drive.state.safety, Fault.CAMERA_BLANK, False)
        drive.run(50)
        assert np.abs(drive.speed()[-20:]).max() > 0.5
        assert_inside(np.array(drive.commands))

    def test_a_warning_changes_nothing(self):
        quiet, warned = Drive(), Drive()
        for drive in (quiet, warned):
            drive.chunk(HOME + 0.5)
            drive.run(10)
        report(warned.state.safety, Fault.CHUNK_LATE)
        assert (quiet.run(30) == warned.run(30)).all()
        assert warned.state.safety.status["onsets"][Fault.CHUNK_LATE] == 1

    def test_the_record_names_level_and_faults(self):
        drive = Drive()
        report(drive.state.safety, Fault.CHUNK_LATE)
        set_condition(drive.state.safety, Fault.CAMERA_CLOCK, True)
        drive.run(2)
        record = drive.state.record[0]
        assert record["level"] == Level.SLOW
        assert record["faults"] == 1 << Fault.CAMERA_CLOCK

    def test_the_record_tells_what_the_tick_saw(self):
        drive = Drive()
        drive.chunk(HOME)
        drive.run(1)
        safety = drive.state.safety
        report(safety, Fault.INSTRUCTION_CHANGED)
        set_condition(safety, Fault.CAMERA_BLANK, True)
        safety.inputs.frame_ns[0] = 5
        drive.run(1)
        seen = drive.state.record[0].copy()
        set_condition(safety, Fault.CAMERA_BLANK, False)
        drive.run(1)
        bits = [Fault.INSTRUCTION_CHANGED, Fault.CAMERA_BLANK, Fault.CAMERA_STALE]
        assert (seen["number"], seen["in_sight"], seen["frame_ns"]) == (1, 1, 5)
        assert seen["seen"] == sum(1 << fault for fault in bits)
        assert drive.state.record[0]["seen"] == 1 << Fault.CAMERA_STALE

    def test_no_row_due_is_no_fault_before_the_first_chunk(self):
        drive = Drive()
        drive.run(5)
        assert drive.state.safety.status["onsets"][Fault.CHUNK_MISSING] == 0
        drive.chunk(HOME)
        drive.run(200)
        assert drive.state.safety.status["onsets"][Fault.CHUNK_MISSING] == 1


class TestFollowing:
    """A joint that stands still while its command moves away at 3 rad/s is 0.25 rad behind after 18 ticks."""

    def stuck(self, joint: int) -> Drive:
        drive = Drive()
        drive.follows[joint] = False
        drive.chunk(HOME + REACH)
        return drive

    def test_slows_after_its_time_then_holds(self):
        drive = self.stuck(0)
        commands = drive.run(120)
        over = int(np.argmax(np.abs(commands[1:, 0] - HOME[0]) > 0.25))
        slow = next(k for k, flags in enumerate(drive.flags) if flags & SLOWED)
        assert slow - over == round(BEHIND_TIME_S / DT)
        hold = next(k for k, flags in enumerate(drive.flags) if flags & STOPPED)
        assert hold - slow == pytest.approx(ROW[Fault.SERVO_BEHIND].then_after_s / DT, abs=1)
        assert drive.flags[-1] & STOPPED
        assert_inside(commands)

    def test_goes_on_when_the_joint_follows_again(self):
        drive = self.stuck(4)
        drive.run(120)
        drive.follows[4] = True
        drive.chunk(HOME + REACH)
        commands = drive.run(120)
        assert not drive.flags[-1] & (SLOWED | STOPPED)
        assert commands[-1, 4] != commands[120, 4]
        assert drive.state.safety.status["onsets"][Fault.SERVO_BEHIND] == 1
        assert_inside(commands)

    def test_a_gripper_that_holds_something_is_not_behind(self):
        drive = self.stuck(5)
        drive.run(120)
        assert np.abs(drive.commands[-1][5] - HOME[5]) > 0.4
        assert drive.state.safety.status["onsets"][Fault.SERVO_BEHIND] == 0

    def test_a_short_lag_is_none(self):
        drive = self.stuck(0)
        while abs(drive.commands[-1][0] - HOME[0]) <= 0.25:
            drive.run(1)
        drive.run(round(BEHIND_TIME_S / DT) - 2)
        drive.follows[0] = True
        drive.run(40)
        assert drive.state.safety.status["onsets"][Fault.SERVO_BEHIND] == 0


class Wall(Drive):
    """A drive whose joint 4 cannot leave HOME; its servo's load is full at a lead of `full_rad`."""

    def __init__(self, full_rad: float, max_load: float = 0.75) -> None:
        super().__init__(SafetySettings(max_load=max_load))
        self.full_rad, self.loads = full_rad, [0.0]
        self.follows[4] = False

    def push(self, ticks: int) -> None:
        for _ in range(ticks):
            self.run(1)
            lead_rad = self.commands[-1][4] - HOME[4]
            self.loads.append(float(np.clip(lead_rad / self.full_rad, -1.0, 1.0)))
            self.state.measured_load[4] = self.loads[-1]

    def longest_overload_s(self) -> float:
        """How long without a pause the load was what an STS3215 gives up at after 2 s."""
        return max(len(part) for part in "".join("x" if load > 0.8 else " " for load in self.loads).split(" ")) * DT


class TestPushing:
    """What the arm cannot move it does not push until its servos let go of everything."""

    @pytest.mark.parametrize("full_rad", [0.003, 0.03, 0.3], ids=["stiff", "ordinary", "soft"])
    def test_a_joint_that_pushes_gives_way_before_its_servo_does(self, full_rad: float):
        drive, control = Wall(full_rad), Wall(full_rad, max_load=1.0)
        for pushing in (drive, control):
            pushing.chunk(HOME + ROLL)
            pushing.push(500)
        assert control.longest_overload_s() > 2.0, "it would have"
        assert drive.longest_overload_s() < 1.75, "well before 2"
        assert drive.flags[-1] & STOPPED, "the chunk is over"
        assert 0.0 < drive.loads[-1] <= 0.75
        assert_inside(np.array(drive.commands))

    @pytest.mark.parametrize("full_rad", [0.003, 0.03, 0.3], ids=["stiff", "ordinary", "soft"])
    def test_a_policy_that_goes_on_pushing_is_held(self, full_rad: float):
        drive = Wall(full_rad)
        for _ in range(16):
            drive.chunk(HOME + ROLL)
            drive.push(50)
        assert drive.longest_overload_s() < 1.75
        slow = next(k for k, flags in enumerate(drive.flags) if flags & SLOWED)
        hold = next(k for k, flags in enumerate(drive.flags) if flags & STOPPED)
        assert hold - slow == pytest.approx(ROW[Fault.SERVO_LOAD].then_after_s / DT, abs=1)
        assert_inside(np.array(drive.commands))

    def test_it_gives_way_at_the_edge_of_the_workspace_too(self):
        """The other joints' targets lead under the table, and that brakes them all."""
        drive = Wall(0.3)
        drive.chunk(np.array([0.0, 0.9, 0.6, 0.8, 1.0, 0.4]))
        drive.push(500)
        both = [flags for flags in drive.flags if flags & OUTSIDE and flags & GAVE_WAY]
        assert both
        assert drive.loads[-1] <= 0.75
        assert_inside(np.array(drive.commands))

    def test_a_grip_is_eased_and_not_opened(self):
        drive = Wall(0.3)
        drive.chunk(HOME + ROLL)
        drive.push(500)
        assert 0.4 < drive.loads[-1] <= 0.75

    def test_a_short_push_changes_nothing(self):
        drive, free = Wall(0.3), Drive()
        for moving in (drive, free):
            moving.chunk(HOME + ROLL)
        short = round(LOAD_TIME_S / DT) - 1
        while drive.loads[-1] <= 0.75:
            drive.push(1)
        drive.push(short)
        assert not any(flags & (GAVE_WAY | SLOWED) for flags in drive.flags)
        assert (free.run(len(drive.flags)) == drive.commands).all()

    def test_the_other_joints_stay_where_they_are_held(self):
        drive = Wall(0.3)
        drive.chunk(HOME + ROLL)
        drive.push(500)
        others = np.delete(np.array(drive.commands), 4, axis=1)
        assert (others == np.delete(HOME, 4)).all()


class TestLastCheck:
    @pytest.mark.parametrize(
        ("field", "bad"),
        [
            *(("path_q", bad) for bad in (np.nan, np.inf, 50.0)),
            *(("path_v", bad) for bad in (np.inf, -50.0)),
            *(("path", bad) for bad in (np.nan, -np.inf, 50.0)),
        ],
    )
    @pytest.mark.parametrize("after", [3, 6, 13, 20, 40, 62, 70])
    def test_a_spoilt_path_brakes_from_the_last_command(self, after: int, field: str, bad: float):
        """While it speeds up, at full speed, and while it slows down at the end of its way."""
        drive = Drive()
        drive.chunk(HOME + REACH)
        drive.run(after)
        getattr(drive.state, field)[..., 0] = bad
        drive.run(60)
        assert drive.flags[after] & REFUSED
        assert not any(flags & REFUSED for flags in drive.flags[after + 1 :])
        assert drive.state.safety.status["onsets"][Fault.COMMAND_REFUSED] == 1
        assert np.isfinite(drive.commands).all()
        assert_inside(np.array(drive.commands))

    def test_more_jerk_than_the_limit_is_refused(self):
        """A path that was averaged over too few steps is inside speed and acceleration."""
        drive = Drive()
        drive.chunk(HOME + REACH)
        drive.state.smoothing[0] = 1
        drive.run(60)
        assert drive.flags[1] & REFUSED
        assert_inside(np.array(drive.commands))

    def test_nothing_moves_when_the_last_command_is_spoilt_too(self):
        drive = Drive()
        drive.run(3)
        drive.state.command_v[0] = np.inf
        drive.state.path_v[0] = np.nan
        commands = drive.run(20)
        assert (commands == HOME).all()


class TestWorkspace:
    def test_the_tool_stays_over_the_floor_and_comes_back(self):
        drive = Drive()
        for _ in range(3):
            drive.chunk([0.0, 0.9, 0.6, 0.8, 0.0, 0.4])  # 10 cm under the table
            drive.run(150)
            assert any(flags & OUTSIDE for flags in drive.flags)
            assert drive.state.safety.status["age"][Fault.WORKSPACE] > 0
            drive.chunk(HOME)
            drive.run(160)
            assert drive.commands[-1] == pytest.approx(HOME, abs=0.02)
        assert_inside(np.array(drive.commands))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_schedule_of_chunks_and_faults_breaks_a_limit(seed: int):
    rng, drive = np.random.default_rng(seed), Drive()
    for _ in range(12):
        if rng.random() < 0.7:
            drive.chunk(rng.uniform(ROBOT.limits.q_min - 0.2, ROBOT.limits.q_max + 0.2, (16, 6)))
        fault = Fault(int(rng.integers(len(Fault))))
        set_condition(drive.state.safety, fault, bool(rng.random() < 0.4))
        drive.follows[:] = rng.random(6) < 0.7
        drive.state.measured_load[:] = rng.choice([0.0, -1.0, 1.0], 6, p=[0.8, 0.1, 0.1])
        drive.run(int(rng.integers(1, 60)))
    drive.run(80)
    assert_inside(np.array(drive.commands))
    assert drive.state.counters.refused[0] == 0


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), joints=st.integers(1, 4))
def test_compiled_smoothing_equals_the_reference(seed: int, joints: int):
    rng = np.random.default_rng(seed)
    ticks = rng.integers(1, 9, joints)
    path, newest = rng.uniform(-3, 3, (8, joints)), int(rng.integers(8))
    out = np.empty(joints)
    smooth(path, newest, ticks, out)
    ordered = np.roll(path, -newest - 1, axis=0)
    assert out == pytest.approx(smooth_reference(ordered, ticks), abs=1e-13)


def test_smoothing_covers_the_jerk():
    assert smoothing_ticks(np.array([20.0]), np.array([1000.0]), 0.01).tolist() == [4]
    assert smoothing_ticks(np.array([20.0]), np.array([np.inf]), 0.01).tolist() == [1]
    assert smoothing_ticks(np.array([20.0]), np.array([999.0]), 0.01).tolist() == [5]
