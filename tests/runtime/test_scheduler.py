"""The inference thread with a scripted policy: what it observes, when it infers, what it publishes, how it fails."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from onbeat.drivers.interfaces import Frame
from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.loop import StateHistory
from onbeat.runtime.policy import PolicyOutput, StageTimes
from onbeat.runtime.record import ChunkLog
from onbeat.runtime.robots import Robot, action_values, build_robot, joint_targets, load_robot
from onbeat.runtime.scheduler import DelayEstimate, NoFrames, Scheduler, observe, plan
from onbeat.runtime.tick import new_tick_state
from onbeat.runtime.timeline import Timeline, committed_target, publish

MS = 1_000_000
PERIOD_NS = 100 * MS
ROWS = 16
JOINTS = 6


class ScriptedCamera:
    """A camera whose newest frame the test sets."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.frame: Frame | None = None

    def take(self, t_ns: int) -> None:
        sequence = 1 if self.frame is None else self.frame.sequence + 1
        self.frame = Frame(sequence, t_ns, np.zeros((8, 8, 3), np.uint8))

    def latest(self) -> Frame | None:
        return self.frame

    def close(self) -> None: ...


class ScriptedPolicy:
    """Every chunk holds one value in every row and joint; what it was asked is kept. `takes_ns` moves the clock."""

    def __init__(self, robot: Robot, trained_delay: int = 0) -> None:
        self.robot = robot
        self.spec = SimpleNamespace(chunk=ROWS, trained_delay=trained_delay)
        self.language = SimpleNamespace(encode=lambda keys: robot.embodiment.flatten(keys).astype(np.float32))
        self.asked: list[dict] = []
        self.value = 0.1
        self.on_infer = lambda: None

    def infer(self, observation, instruction, *, noise=None, prev_chunk=None, delay=0) -> PolicyOutput:  # noqa: ARG002
        self.asked.append(
            {"observation": observation, "instruction": instruction, "prev_chunk": prev_chunk, "delay": delay}
        )
        self.on_infer()
        keys = self.robot.embodiment.split(np.full((ROWS, JOINTS), self.value))
        empty = np.zeros((0, 0), np.float32)
        return PolicyOutput(empty, keys, empty, empty, StageTimes(1, 2, 3), empty, None)


class Rig:
    """A scheduler whose clock is `now_ns`; an inference takes `takes_ns`."""

    def __init__(self, *, trained_delay: int = 0, takes_ns: int = 60 * MS, **config: object) -> None:
        twin = load_robot("so101-twin")
        self.robot = build_robot(replace(twin.config, **config)) if config else twin
        self.now_ns, self.takes_ns = 10**12, takes_ns
        self.policy = ScriptedPolicy(self.robot, trained_delay)
        self.policy.on_infer = self.pass_time
        self.cameras = [ScriptedCamera("top"), ScriptedCamera("wrist")]
        self.history = StateHistory(JOINTS)
        self.log = ChunkLog(10, ROWS, JOINTS)
        self.timeline: Timeline = new_tick_state(self.robot.limits, rate_hz=100, rows=ROWS).timeline
        self.stop = threading.Event()
        self.scheduler = Scheduler(
            self.policy,  # pyright: ignore[reportArgumentType]
            self.robot,
            self.timeline,
            cameras=self.cameras,
            history=self.history,
            log=self.log,
            instruction="lift",
            clock=lambda: self.now_ns,
        )

    def pass_time(self) -> None:
        self.now_ns += self.takes_ns

    def see(self, t_ns: int | None = None) -> None:
        """New frames of both cameras and a state, now or at a time."""
        t_ns = self.now_ns if t_ns is None else t_ns
        self.history.append(t_ns, np.zeros(JOINTS))
        for camera in self.cameras:
            camera.take(t_ns)

    def infer_once(self) -> bool:
        """What one turn of the thread does; whether it inferred."""
        before = len(self.policy.asked)
        observation = self.scheduler._next_observation(self.now_ns)
        if observation is not None:
            self.scheduler._infer(observation, self.now_ns, self.stop)
        return len(self.policy.asked) > before

    def target_at(self, t_ns: int) -> float:
        out = np.zeros(JOINTS)
        committed_target(self.timeline, t_ns, out)
        return out[0]


class TestObserve:
    def test_a_missing_frame_is_no_observation(self):
        rig = Rig()
        rig.see()
        rig.cameras[1].frame = None
        assert observe(rig.cameras, rig.history, rig.robot, rig.now_ns) is None

    def test_a_stale_frame_of_one_camera_is_no_observation(self):
        rig = Rig()
        rig.see()
        rig.cameras[1].take(rig.now_ns - 501 * MS)
        assert observe(rig.cameras, rig.history, rig.robot, rig.now_ns) is None
        assert not rig.infer_once()
        assert rig.scheduler.status.stale == 1

    def test_no_camera_is_no_observation(self):
        rig = Rig()
        rig.see()
        assert observe([], rig.history, rig.robot, rig.now_ns) is None

    def test_the_joints_are_those_of_the_oldest_frame(self):
        rig = Rig()
        start = rig.now_ns
        for k in range(20):
            rig.history.append(start + k * 10 * MS, np.full(JOINTS, k / 100))
        rig.cameras[0].take(start + 150 * MS)
        rig.cameras[1].take(start + 105 * MS)
        seen = observe(rig.cameras, rig.history, rig.robot, start + 200 * MS)
        assert seen is not None
        assert seen.t_capture_ns == start + 105 * MS
        assert seen.state["arm_joints"] == pytest.approx(np.full(5, 0.105))
        assert seen.state["gripper"] == pytest.approx([0.105])


class TestWhen:
    def test_the_same_frames_are_not_used_twice(self):
        rig = Rig()
        rig.see()
        assert rig.infer_once()
        assert not rig.infer_once()
        rig.see()
        assert rig.infer_once()

    def test_with_an_execution_horizon_it_waits_until_so_many_steps_are_used(self):
        rig = Rig(execute_steps=4)
        rig.see()
        assert rig.infer_once()
        first_row = int(rig.log.arrays()["first_row"][0])
        t0_ns = int(rig.log.arrays()["t0_ns"][0])
        due_ns = t0_ns + (first_row + 4) * PERIOD_NS
        rig.now_ns = due_ns - 1
        rig.see()
        assert not rig.infer_once()
        rig.now_ns = due_ns
        assert rig.infer_once()


class TestPublish:
    def test_row_zero_is_due_at_the_observations_time(self):
        rig = Rig()
        rig.see(rig.now_ns - 30 * MS)
        t0_ns = rig.now_ns - 30 * MS
        assert rig.infer_once()
        assert np.isnan(rig.target_at(t0_ns + PERIOD_NS - 1))
        assert rig.target_at(t0_ns + PERIOD_NS) == 0.1

    def test_a_chunk_that_took_longer_than_it_lasts_is_counted(self):
        rig = Rig(takes_ns=ROWS * PERIOD_NS)
        rig.see()
        assert rig.infer_once()
        assert rig.scheduler.status.late == 1
        assert rig.log.arrays()["chunk_id"].tolist() == [-1]
        assert np.isnan(rig.target_at(rig.now_ns))

    def test_nothing_is_published_once_the_run_was_stopped(self):
        rig = Rig()
        rig.see()
        rig.policy.on_infer = rig.stop.set
        rig.infer_once()
        assert rig.timeline.published[0] == 0

    def test_records_when_each_stage_happened(self):
        rig = Rig()
        rig.see(rig.now_ns - 30 * MS)
        started_ns = rig.now_ns
        rig.infer_once()
        chunk = {name: values[0] for name, values in rig.log.arrays().items()}
        assert chunk["camera_age_ns"] == 30 * MS
        assert (chunk["started_ns"], chunk["published_ns"]) == (started_ns, started_ns + 60 * MS)
        stages = sum(chunk[f"{name}_ns"] for name in ("observe", "prefix", "flow", "publish"))
        assert stages == 60 * MS


class TestPrefix:
    def test_a_policy_without_one_is_never_given_one(self):
        rig = Rig(trained_delay=0)
        for _ in range(3):
            rig.see()
            rig.infer_once()
        assert all(asked["prev_chunk"] is None and asked["delay"] == 0 for asked in rig.policy.asked)

    def test_the_first_chunk_has_nothing_to_repeat(self):
        rig = Rig(trained_delay=5)
        rig.see()
        rig.infer_once()
        assert rig.policy.asked[0]["delay"] == 0

    def test_a_trained_one_gets_what_the_robot_is_committed_to(self):
        rig = Rig(trained_delay=5)
        ramp = np.linspace(0.0, 1.5, 16)[:, None] * np.ones(JOINTS)
        publish(rig.timeline, ramp, t0_ns=rig.now_ns, period_ns=PERIOD_NS, now_ns=rig.now_ns)
        rig.scheduler._delay.add(90 * MS)
        rig.now_ns += 250 * MS
        rig.see()
        rig.infer_once()
        asked = rig.policy.asked[0]
        assert asked["delay"] == 2
        np.testing.assert_allclose(asked["prev_chunk"][:, 0], [0.25, 0.35], rtol=1e-6)

    def test_it_is_as_long_as_training_allows_and_no_longer(self):
        rig = Rig(trained_delay=2, takes_ns=350 * MS)
        for _ in range(3):
            rig.see()
            rig.infer_once()
            rig.now_ns += PERIOD_NS
        assert [asked["delay"] for asked in rig.policy.asked] == [0, 2, 2]
        assert rig.scheduler.status.delay_steps == 5

    def test_the_seam_lies_behind_it(self):
        rig = Rig(trained_delay=5, margin_steps=2)
        rig.see()
        rig.infer_once()
        rig.now_ns += 300 * MS
        rig.see()
        t0_ns = rig.now_ns
        rig.policy.value = 0.5
        rig.infer_once()
        assert rig.policy.asked[1]["delay"] == 3
        assert [rig.target_at(t0_ns + k * PERIOD_NS) for k in range(5)] == [0.1, 0.1, 0.1, 0.5, 0.5]


class TestDelay:
    def test_is_the_margin_before_any_measurement(self):
        assert DelayEstimate(PERIOD_NS, margin_steps=1).steps() == 1

    @pytest.mark.parametrize(("latency_ms", "steps"), [(1, 2), (100, 2), (101, 3), (290, 4)])
    def test_rounds_up_to_whole_steps(self, latency_ms: int, steps: int):
        estimate = DelayEstimate(PERIOD_NS, margin_steps=1)
        estimate.add(latency_ms * MS)
        assert estimate.steps() == steps

    def test_follows_the_slow_ones_and_forgets_them(self):
        estimate = DelayEstimate(PERIOD_NS, margin_steps=0)
        for k in range(40):
            estimate.add(250 * MS if k % 10 == 0 else 50 * MS)
        assert estimate.steps() == 3
        for _ in range(64):
            estimate.add(50 * MS)
        assert estimate.steps() == 1

    def test_warm_up_publishes_nothing_and_does_not_count_the_cold_inference(self):
        rig = Rig()
        rig.see()
        durations = iter([400 * MS, 40 * MS])
        rig.policy.on_infer = lambda: setattr(rig, "now_ns", rig.now_ns + next(durations)) or rig.see()
        assert rig.scheduler.warm_up() == [400 * MS, 40 * MS]
        assert rig.timeline.published[0] == 0
        assert list(rig.scheduler._delay.latencies_ns) == [40 * MS]


class TestFailures:
    def test_what_the_policy_raises_ends_the_thread(self):
        rig = Rig()
        rig.see()

        def fail() -> None:
            raise OnbeatError("the state is not finite: check the sensor")

        rig.policy.on_infer = fail
        with pytest.raises(OnbeatError, match="not finite"):
            rig.scheduler.run(rig.stop)

    def test_a_camera_that_never_speaks_is_named_before_anything_moves(self):
        rig = Rig()
        rig.see()
        rig.cameras[1].frame = None
        ticking = iter(range(10**12, 10**14, 1000 * MS))
        rig.scheduler._clock = lambda: next(ticking)
        with pytest.raises(NoFrames, match=r"top: \d+ ms old, wrist: none.*check them"):
            rig.scheduler.warm_up(timeout_s=2.0)

    def test_stop_ends_the_thread(self):
        rig = Rig()
        rig.stop.set()
        rig.scheduler.run(rig.stop)
        assert rig.policy.asked == []


def with_kind(robot: Robot, kind: str) -> Robot:
    action = tuple(replace(key, kind=kind) for key in robot.embodiment.action)
    return replace(robot, embodiment=replace(robot.embodiment, action=action))


class TestKinds:
    """What the rows of each kind of action key mean, and the way back for a prefix."""

    @pytest.mark.parametrize("kind", ["absolute", "delta_per_step", "relative_to_observation"])
    def test_back_and_forth(self, kind: str):
        robot = with_kind(load_robot("so101-twin"), kind)
        targets = np.random.default_rng(1).uniform(-1, 1, (7, JOINTS))
        around = {"committed_q": np.full(JOINTS, 0.3), "observed_q": np.full(JOINTS, -0.2)}
        values = action_values(targets, robot, **around)
        np.testing.assert_allclose(joint_targets(values, robot, **around), targets, atol=1e-12)

    def test_deltas_start_from_what_is_committed_and_not_from_what_was_seen(self):
        robot = with_kind(load_robot("so101-twin"), "delta_per_step")
        keys = robot.embodiment.split(np.full((3, JOINTS), 0.1))
        targets = joint_targets(keys, robot, committed_q=np.full(JOINTS, 0.5), observed_q=np.zeros(JOINTS))
        np.testing.assert_allclose(targets[:, 0], [0.6, 0.7, 0.8])

    def test_relative_rows_start_from_what_was_seen(self):
        robot = with_kind(load_robot("so101-twin"), "relative_to_observation")
        keys = robot.embodiment.split(np.full((3, JOINTS), 0.1))
        targets = joint_targets(keys, robot, committed_q=np.full(JOINTS, 0.5), observed_q=np.full(JOINTS, 0.2))
        np.testing.assert_allclose(targets[:, 0], [0.3, 0.3, 0.3])


def test_a_plan_publishes_nothing():
    rig = Rig()
    rig.see()
    observation = observe(rig.cameras, rig.history, rig.robot, rig.now_ns)
    assert observation is not None
    made = plan(rig.policy, rig.robot, rig.timeline, observation, "lift")  # pyright: ignore[reportArgumentType]
    assert made.targets.shape == (ROWS, JOINTS)
    assert made.t0_ns == observation.t_capture_ns
    assert rig.timeline.published[0] == 0
