"""The inference thread with a scripted policy: what it observes, when it infers, what it publishes, how it fails."""

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from onbeat.drivers.interfaces import Frame
from onbeat.embodiment.errors import OnbeatError
from onbeat.embodiment.kinds import to_absolute
from onbeat.runtime.chunker import Chunker
from onbeat.runtime.delay import DelayTooLong
from onbeat.runtime.faults import Fault
from onbeat.runtime.flight.inference import Inference
from onbeat.runtime.mailbox import StateHistory
from onbeat.runtime.policy import PolicyOutput, StageTimes
from onbeat.runtime.robots import Robot, build_robot, load_robot
from onbeat.runtime.run_records import RunRecords, Ticks, read_chunks
from onbeat.runtime.scheduler import Blind, NoFrames, Scheduler, observe
from onbeat.runtime.summary import _inference, executed_delays
from onbeat.runtime.tick import new_tick_state, tick
from onbeat.runtime.timeline import STALE, committed_target, find_slot, publish, refusals

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
        self.spec = SimpleNamespace(
            chunk=ROWS, trained_delay=trained_delay, guidance=True, sampler=SimpleNamespace(flow_steps=4)
        )
        self.language = SimpleNamespace(
            encode=lambda keys: robot.embodiment.flatten(keys).astype(np.float32), prompt=self.check_instruction
        )
        self.asked: list[dict] = []
        self.value = 0.1
        self.on_infer = lambda: None

    def check_instruction(self, instruction: str) -> None:
        if "<|" in instruction:
            raise OnbeatError("special tokens: leave them out")

    def infer(self, observation, instruction, **told) -> PolicyOutput:
        self.asked.append({"observation": observation, "instruction": instruction, **told})
        self.on_infer()
        keys = self.robot.embodiment.split(np.full((ROWS, JOINTS), self.value))
        empty = np.zeros((0, 0), np.float32)
        return PolicyOutput(empty, keys, empty, empty, StageTimes(1, 2, 3), empty, None)


class Rig:
    """A scheduler whose clock is `now_ns`; an inference takes `takes_ns`."""

    def __init__(
        self, *, mode: str = "async", trained_delay: int = 0, takes_ns: int = 60 * MS, **config: object
    ) -> None:
        config = {"margin_steps": 1.0, **config}
        self.robot = build_robot(replace(load_robot("so101-twin").config, **config))
        self.now_ns, self.takes_ns = 10**12, takes_ns
        self.policy = ScriptedPolicy(self.robot, trained_delay)
        self.policy.on_infer = self.pass_time
        self.cameras = [ScriptedCamera("top"), ScriptedCamera("wrist")]
        self.history = StateHistory(JOINTS)
        self.told: list[Inference] = []
        state = new_tick_state(self.robot.limits, rate_hz=100, rows=ROWS)
        self.state, self.timeline, self.safety = state, state.timeline, state.safety
        self.stop = threading.Event()
        self.mode = mode
        self.start()

    def start(self) -> None:
        """A scheduler on the same timeline: the first, or one after the policy was started anew."""
        self.chunker = Chunker(self.policy, self.robot, self.timeline, self.mode)  # pyright: ignore
        self.scheduler = Scheduler(
            self.chunker,
            cameras=self.cameras,
            history=self.history,
            log=self.told.append,
            instruction="lift",
            safety=self.safety,
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

    def chunks(self, field: str) -> list[int]:
        return [inference.chunk[field] for inference in self.told]

    def reported(self) -> dict[str, int]:
        """Events of the fault table that the thread has reported."""
        events = self.safety.inputs.events
        return {fault.name: int(events[fault]) for fault in Fault if events[fault]}

    def target_at(self, t_ns: int) -> float:
        out = np.zeros(JOINTS)
        committed_target(self.timeline, t_ns, out)
        return out[0]


class TestObserve:
    def test_a_missing_frame_is_no_observation(self):
        rig = Rig()
        rig.see()
        rig.cameras[1].frame = None
        assert observe(rig.cameras, rig.history, rig.robot, rig.now_ns) is Blind.MISSING

    def test_a_stale_frame_of_one_camera_is_no_observation(self):
        rig = Rig()
        rig.see()
        rig.cameras[1].take(rig.now_ns - 501 * MS)
        assert observe(rig.cameras, rig.history, rig.robot, rig.now_ns) is Blind.STALE
        assert not rig.infer_once()
        assert rig.scheduler.status.stale == 1

    def test_no_camera_is_no_observation(self):
        rig = Rig()
        rig.see()
        assert observe([], rig.history, rig.robot, rig.now_ns) is Blind.MISSING

    def test_the_joints_are_those_of_the_oldest_frame(self):
        rig = Rig()
        start = rig.now_ns
        for k in range(20):
            rig.history.append(start + k * 10 * MS, np.full(JOINTS, k / 100))
        rig.cameras[0].take(start + 150 * MS)
        rig.cameras[1].take(start + 105 * MS)
        seen = observe(rig.cameras, rig.history, rig.robot, start + 200 * MS)
        assert not isinstance(seen, Blind)
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

    def test_with_an_execution_horizon_observations_are_so_many_steps_apart(self):
        rig = Rig(execute_steps=4)
        rig.see()
        assert rig.infer_once()
        due_ns = rig.chunks("t0_ns")[0] + 4 * PERIOD_NS - PERIOD_NS // 2
        rig.now_ns = due_ns - 1
        rig.see()
        assert not rig.infer_once()
        rig.now_ns = due_ns
        rig.see()
        assert rig.infer_once()

    def test_after_a_chunk_that_was_refused_the_next_observation_is_due_at_once(self):
        rig = Rig(execute_steps=4)
        rig.policy.value = np.nan
        rig.see()
        assert rig.infer_once()
        rig.now_ns += 1
        rig.see()
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
        assert rig.chunks("chunk_id") == [-1]
        assert refusals(rig.timeline)["expired"] == 1
        assert rig.reported() == {"CHUNK_EXPIRED": 1}
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
        chunk = rig.told[0].chunk
        assert chunk["camera_age_ns"] == 30 * MS
        assert (chunk["started_ns"], chunk["published_ns"]) == (started_ns, started_ns + 60 * MS)
        stages = sum(chunk[f"{name}_ns"] for name in ("observe", "prefix", "flow", "publish"))
        assert stages == 60 * MS


class TestLocked:
    def test_the_first_chunk_has_nothing_to_repeat(self):
        rig = Rig(mode="locked", trained_delay=5)
        rig.see()
        rig.infer_once()
        assert rig.policy.asked[0]["delay"] == 0

    def test_it_gets_what_the_robot_is_committed_to(self):
        rig = Rig(mode="locked", trained_delay=5)
        ramp = np.linspace(0.0, 1.5, 16)[:, None] * np.ones(JOINTS)
        publish(rig.timeline, ramp, t0_ns=rig.now_ns, period_ns=PERIOD_NS, now_ns=rig.now_ns)
        rig.chunker.budget.add(0.0)
        rig.now_ns += 250 * MS
        rig.see()
        rig.infer_once()
        asked = rig.policy.asked[0]
        assert (asked["delay"], asked["guidance"]) == (2, None)
        np.testing.assert_allclose(asked["prev_chunk"][:, 0], [0.25, 0.35], rtol=1e-6)

    def test_it_is_as_long_as_training_allows_and_says_so(self):
        rig = Rig(mode="locked", trained_delay=2, takes_ns=350 * MS)
        for _ in range(3):
            rig.see()
            rig.infer_once()
            rig.now_ns += PERIOD_NS
        assert [asked["delay"] for asked in rig.policy.asked] == [0, 2, 2]
        assert rig.chunks("budget") == [2, 6, 6]
        assert "d = 6 policy steps is more than the 2 rows" in rig.scheduler.status.warning

    def test_the_seam_lies_behind_it(self):
        rig = Rig(mode="locked", trained_delay=5, margin_steps=1)
        rig.see()
        rig.infer_once()
        rig.now_ns += 300 * MS
        rig.see()
        t0_ns = rig.now_ns
        rig.policy.value = 0.5
        rig.infer_once()
        assert rig.policy.asked[1]["delay"] == 3
        assert [rig.target_at(t0_ns + k * PERIOD_NS) for k in range(5)] == [0.1, 0.1, 0.1, 0.5, 0.5]

    @pytest.mark.parametrize("kind", ["absolute", "delta_per_step", "relative_to_observation"])
    def test_the_rows_lead_to_the_committed_targets_from_the_newest_observation(self, kind: str):
        """What the policy is told, read back as it reads its own rows, is the path the robot is on."""
        rig = Rig(mode="locked", trained_delay=5, margin_steps=3)
        rig.robot = rig.policy.robot = with_kind(rig.robot, kind)
        rig.start()
        path = np.cumsum(np.random.default_rng(2).uniform(-0.1, 0.1, (ROWS, JOINTS)), axis=0)
        publish(rig.timeline, path, t0_ns=rig.now_ns, period_ns=PERIOD_NS, now_ns=rig.now_ns)
        rig.now_ns += 3 * PERIOD_NS
        rig.history.append(rig.now_ns, np.full(JOINTS, 0.7))
        for camera in rig.cameras:
            camera.take(rig.now_ns)
        rig.infer_once()
        told = rig.policy.asked[0]["prev_chunk"].astype(float)
        around = {"committed": path[2], "observed": np.full(JOINTS, 0.7)}
        np.testing.assert_allclose(to_absolute(rig.robot.embodiment, told, **around), path[3:7], atol=1e-6)


class TestOtherModes:
    def test_async_is_told_nothing(self):
        rig = Rig(trained_delay=5)
        for _ in range(3):
            rig.see()
            rig.infer_once()
        assert all(asked["prev_chunk"] is None and asked["delay"] == 0 for asked in rig.policy.asked)
        assert all(asked["guidance"] is None for asked in rig.policy.asked)

    def test_async_fades_over_as_many_rows_as_the_robot_file_says(self):
        rig = Rig(blend_steps=3)
        rig.see()
        rig.infer_once()
        rig.see()
        rig.policy.value, t0_ns = 0.5, rig.now_ns
        rig.infer_once()
        np.testing.assert_allclose(
            [rig.target_at(t0_ns + k * PERIOD_NS) for k in range(1, 6)], [0.1, 0.2, 0.3, 0.4, 0.5]
        )

    def test_guided_is_pulled_to_what_is_committed_as_far_as_it_is(self):
        rig = Rig(mode="guided", margin_steps=2)
        rig.see()
        rig.infer_once()
        assert rig.policy.asked[0]["guidance"] is None
        rig.now_ns += 7 * PERIOD_NS
        rig.see()
        rig.infer_once()
        asked = rig.policy.asked[1]
        weights = asked["guidance"].weights
        assert asked["delay"] == 0
        assert asked["guidance"].beta == 4
        assert len(asked["prev_chunk"]) == np.count_nonzero(weights) == 9
        assert weights[:4].tolist() == [1.0] * 4
        assert (np.diff(weights[3:10]) < 0).all()

    def test_sync_moves_looks_and_infers_in_turn(self):
        rig = Rig(mode="sync", execute_steps=4)
        rig.see()
        assert rig.infer_once()
        begun_ns = rig.now_ns
        assert rig.target_at(begun_ns) == 0.1, "row 0 is due when the chunk comes, for the robot stood still"
        assert rig.target_at(begun_ns + 4 * PERIOD_NS - 1) == 0.1
        assert np.isnan(rig.target_at(begun_ns + 4 * PERIOD_NS))
        rig.now_ns = begun_ns + 4 * PERIOD_NS - 1
        rig.see()
        assert not rig.infer_once(), "the robot still moves"
        rig.now_ns += 1
        assert not rig.infer_once(), "the newest frame shows it moving"
        rig.see()
        assert rig.infer_once()
        assert rig.chunks("first_row") == [0, 0]
        assert rig.scheduler.status.warning == ""


class TestDelay:
    def test_warm_up_publishes_nothing_and_does_not_count_the_cold_inference(self):
        rig = Rig()
        rig.see()
        durations = iter([1400 * MS, 40 * MS])
        rig.policy.on_infer = lambda: setattr(rig, "now_ns", rig.now_ns + next(durations)) or rig.see()
        assert rig.scheduler.warm_up() == [1400 * MS, 40 * MS]
        assert rig.timeline.published[0] == 0
        assert list(rig.chunker.budget.came) == [0.4]

    def test_one_that_can_never_keep_up_is_refused_before_anything_moves(self):
        rig = Rig(takes_ns=710 * MS)
        rig.policy.on_infer = lambda: rig.pass_time() or rig.see()
        rig.see()
        with pytest.raises(DelayTooLong, match=r"d = 9 .* s = 9, .* H = 16 rows.*infer faster"):
            rig.scheduler.warm_up()

    def test_one_that_only_the_margin_is_too_much_for_is_warned_of(self):
        rig = Rig(takes_ns=690 * MS)
        rig.policy.on_infer = lambda: rig.pass_time() or rig.see()
        rig.see()
        rig.scheduler.warm_up()
        assert "d = 9 policy steps" in rig.scheduler.status.warning

    def test_sync_has_no_bound(self):
        rig = Rig(mode="sync", takes_ns=3000 * MS)
        rig.policy.on_infer = lambda: rig.pass_time() or rig.see()
        rig.see()
        rig.scheduler.warm_up()
        assert rig.scheduler.status.warning == ""

    def test_a_bound_that_breaks_on_the_way_is_counted_and_told_until_it_holds_again(self):
        rig = Rig(margin_steps=0, execute_steps=3)
        for takes_ms in (90, 390, 390):
            rig.takes_ns = takes_ms * MS
            rig.now_ns += 300 * MS
            rig.see()
            assert rig.infer_once()
        assert rig.scheduler.status.bound_broken == 2
        assert rig.safety.inputs.conditions[Fault.DELAY_OVER_BUDGET] == 1
        assert "execute_steps is s = 3, but a chunk takes over after d = 5" in rig.scheduler.status.warning
        assert rig.told[-1].warning == rig.scheduler.status.warning
        rig.chunker.budget.came.clear()
        rig.takes_ns = 90 * MS
        rig.now_ns += 300 * MS
        rig.see()
        rig.infer_once()
        assert rig.scheduler.status.warning == ""

    def test_it_is_counted_in_what_the_loop_has_run(self):
        """The clock says 60 ms, so rows 0 and 1; but the loop was at row 3 already, for the publisher was held up."""
        rig = Rig()
        rig.timeline.progress_ns[0] = rig.now_ns
        rig.policy.on_infer = lambda: rig.pass_time() or rig.timeline.progress_ns.fill(rig.now_ns + 250 * MS)
        publish(rig.timeline, np.zeros((ROWS, JOINTS)), t0_ns=rig.now_ns, period_ns=PERIOD_NS, now_ns=rig.now_ns)
        rig.see()
        rig.infer_once()
        assert list(rig.chunker.budget.came) == [3.1]
        assert rig.chunks("first_row") == [5], "and the chunk joins where the loop is"

    @pytest.mark.parametrize("mode", ["async", "locked"])
    def test_what_is_planned_with_told_and_reported_is_one_number(self, mode: str):
        """Of chunks that come anywhere between two steps, also at one: rows that ran as the chunk before had them."""
        rig, ticks = Rig(mode=mode, trained_delay=0, margin_steps=0), TickHistory()
        rig.chunker.allow_untrained = True
        rig.chunker.budget.add(0.6)
        rig.policy.on_infer = lambda: ticks.run(rig)
        for takes_ms in (60, 60, 150, 100, 200, 10, 240, 300, 90):
            rig.takes_ns = takes_ms * MS
            rig.see()
            assert rig.infer_once()
        rig.takes_ns = 4 * PERIOD_NS
        ticks.run(rig)
        executed, late = rig.chunks("executed"), rig.reported()["CHUNK_LATE"]
        reported = summary_of(rig, ticks)
        assert executed == [2, 2, 3, 2, 3, 2, 4, 4, 2]
        assert late == reported["delay_exceeded"] == sum(np.array(executed) > rig.chunks("budget")) == 2
        if mode == "async":
            ran = executed_delays(run_of(rig, ticks))
            assert [ran[k] for k in range(1, 9)] == executed[1:], "the first has no chunk before it"

    def test_a_prefix_is_all_that_runs_of_the_old_chunk_and_nothing_behind_it_fades(self):
        """Without any margin: chunks that come within their budget begin where their locked rows end."""
        rig = Rig(mode="locked", trained_delay=5, margin_steps=0, takes_ns=150 * MS)
        for value in (0.1, 0.1, 0.5):
            rig.policy.value = value
            rig.see()
            rig.infer_once()
        t0_ns = rig.chunks("t0_ns")[-1]
        assert rig.policy.asked[-1]["delay"] == rig.chunks("first_row")[-1] == rig.chunks("budget")[-1] == 3
        assert [rig.target_at(t0_ns + k * PERIOD_NS) for k in range(5)] == [0.1, 0.1, 0.1, 0.5, 0.5]
        assert rig.reported() == {"CHUNK_LATE": 1}, "the first, which was planned without having measured anything"

    def test_a_camera_slower_than_inference_is_told_before_rows_run_out(self):
        """d = 7 and s = 7 would fit into 16 rows; but frames are 10 steps apart."""
        rig = Rig(mode="guided", takes_ns=450 * MS)
        start_ns = rig.now_ns
        for k in range(3):
            rig.now_ns = start_ns + 10 * k * PERIOD_NS
            rig.see()
            assert rig.infer_once()
        warnings = [inference.warning for inference in rig.told]
        assert warnings[0] == ""
        assert "d = 7 policy steps" in warnings[1]
        assert "s = 10, and a chunk has H = 16 rows" in warnings[1]
        assert "take frames more often" in warnings[1]
        assert rig.safety.inputs.conditions[Fault.DELAY_OVER_BUDGET] == 1
        assert rig.chunker.horizon == 10
        weights = rig.policy.asked[2]["guidance"].weights
        assert weights[:6].tolist() == [1.0] * 6
        assert weights[7:].max() == 0, "from H - s on, and d, nothing is pulled"

    def test_what_follows_a_cold_inference_is_no_spacing(self):
        rig = Rig(takes_ns=60 * MS)
        for _ in range(3):
            rig.see()
            rig.infer_once()
            rig.now_ns += 40 * MS
        rig.scheduler.set_instruction("drop")
        for takes_ms in (960, 60, 60):
            rig.takes_ns = takes_ms * MS
            rig.see()
            rig.infer_once()
            rig.now_ns += 40 * MS
        assert list(rig.chunker.spaced) == [1, 1, 1, 1]

    def test_an_outage_of_the_camera_is_no_spacing_to_plan_with(self):
        rig = Rig(takes_ns=60 * MS)
        for k in range(12):
            rig.see()
            rig.infer_once()
            rig.now_ns += (1940 if k in (6, 9) else 40) * MS
        assert sorted(rig.chunker.spaced) == [1] * 9 + [20] * 2
        assert rig.told[-1].warning == ""

    def test_observations_whose_chunk_was_refused_make_the_next_one_further_apart(self):
        rig = Rig(takes_ns=60 * MS)
        for value in (0.1, np.nan, np.nan, 0.1):
            rig.policy.value = value
            rig.see()
            rig.infer_once()
            rig.now_ns += 40 * MS
        assert list(rig.chunker.spaced) == [3]


class TestFaults:
    """Rows of the fault table about chunks: what the thread does in each."""

    @pytest.mark.parametrize(
        ("value", "fault"), [(np.nan, "CHUNK_NOT_FINITE"), (np.inf, "CHUNK_NOT_FINITE"), (99.0, "CHUNK_OUTSIDE")]
    )
    def test_a_chunk_that_must_not_run_is_refused_whole_and_the_last_one_runs_on(self, value: float, fault: str):
        rig = Rig()
        rig.see()
        rig.infer_once()
        rig.policy.value = value
        rig.see()
        rig.infer_once()
        assert rig.scheduler.status.late == 1
        assert sum(refusals(rig.timeline).values()) == 1
        assert rig.reported()[fault] == 1
        assert rig.target_at(rig.now_ns + 3 * PERIOD_NS) == 0.1

    def test_one_that_comes_later_than_planned_is_told(self):
        rig = Rig()
        for takes_ms in (60, 60, 350):
            rig.takes_ns = takes_ms * MS
            rig.now_ns += PERIOD_NS
            rig.see()
            rig.infer_once()
        assert rig.chunks("budget") == [2, 3, 3]
        assert rig.reported()["CHUNK_LATE"] == 1

    def test_of_two_at_once_the_second_has_the_last_word_and_it_is_told(self):
        rig = Rig(blend_steps=0)
        for value in (0.1, 0.2, 0.3):
            rig.policy.value, rig.takes_ns = value, MS
            rig.see()
            rig.infer_once()
        assert rig.reported()["CHUNK_OVERTAKEN"] == 2
        assert rig.target_at(rig.now_ns + 4 * PERIOD_NS) == 0.3

    def test_a_camera_whose_clock_stalls_starts_nothing_and_then_is_stale(self):
        rig = Rig()
        rig.see()
        assert rig.infer_once()
        for _ in range(10):
            rig.now_ns += 60 * MS
            rig.cameras[1].take(rig.cameras[1].frame.t_capture_ns)
            assert not rig.infer_once()
        assert rig.scheduler.status.stale > 0
        assert len(rig.policy.asked) == 1

    def test_a_camera_whose_clock_jumps_ahead_starts_nothing_until_it_is_right(self):
        rig = Rig()
        rig.see()
        rig.cameras[1].take(rig.now_ns + 1)
        assert not rig.infer_once()
        assert rig.scheduler.status.wrong_clock == 1
        rig.see()
        assert rig.infer_once()

    def test_a_camera_whose_clock_jumps_back_starts_nothing_until_it_has_caught_up(self):
        rig = Rig()
        rig.see()
        assert rig.infer_once()
        rig.now_ns += PERIOD_NS
        rig.see(rig.now_ns - 300 * MS)
        assert not rig.infer_once()
        rig.see()
        assert rig.infer_once()

    def test_an_observation_older_than_one_used_before_is_stale_at_the_door(self):
        rig = Rig()
        rig.see()
        observation = rig.scheduler._next_observation(rig.now_ns)
        old = rig.chunker.plan(observation, "lift")
        rig.see()
        rig.infer_once()
        assert rig.chunker.publish(old, rig.now_ns) == STALE

    def test_a_policy_that_starts_anew_goes_on_where_the_arm_is(self):
        rig = Rig(mode="locked", trained_delay=5)
        rig.see()
        rig.infer_once()
        rig.start()
        rig.now_ns += PERIOD_NS
        rig.see()
        rig.takes_ns = 1
        rig.scheduler.warm_up()
        assert rig.reported()["POLICY_RESTARTED"] == 1
        rig.policy.value = 0.3
        rig.infer_once()
        assert rig.policy.asked[-1]["delay"] == 3, "its budget is new, what is committed is not"
        assert find_slot(rig.timeline, rig.now_ns + 2 * PERIOD_NS) == 1
        assert rig.timeline.published[0] == 2

    def test_another_instruction_is_inferred_next_whatever_the_horizon(self):
        rig = Rig(execute_steps=8)
        rig.see()
        rig.infer_once()
        rig.see()
        assert not rig.infer_once()
        rig.scheduler.set_instruction("drop")
        assert rig.infer_once()
        assert [asked["instruction"] for asked in rig.policy.asked] == ["lift", "drop"]

    def test_one_that_comes_while_a_chunk_is_published_is_inferred_next_as_well(self, monkeypatch: pytest.MonkeyPatch):
        rig = Rig(execute_steps=8)
        put = rig.chunker.publish

        def publish_slowly(*plan: Any, **how: Any) -> int:
            rig.scheduler.set_instruction("drop")
            return put(*plan, **how)

        monkeypatch.setattr(Chunker, "publish", lambda _, *plan, **how: publish_slowly(*plan, **how))
        rig.see()
        rig.infer_once()
        rig.see()
        assert rig.infer_once()
        assert [asked["instruction"] for asked in rig.policy.asked] == ["lift", "drop"]

    def test_a_chunk_of_the_old_instruction_that_comes_after_the_change_never_runs(self):
        rig = Rig()
        rig.see()
        rig.infer_once()
        rig.see()
        rig.policy.value = 0.5
        rig.policy.on_infer = lambda: rig.scheduler.set_instruction("drop")
        rig.infer_once()
        assert rig.scheduler.status.withdrawn == 1
        assert rig.timeline.published[0] == 1
        assert rig.target_at(rig.now_ns + 4 * PERIOD_NS) == 0.1

    def test_the_first_inference_of_an_instruction_is_cold_and_no_measure(self):
        rig = Rig()
        rig.see()
        rig.scheduler.warm_up()
        rig.scheduler.set_instruction("drop")
        for takes_ms in (700, 60):
            rig.takes_ns = takes_ms * MS
            rig.see()
            assert rig.infer_once()
        assert list(rig.chunker.budget.came) == [1.2, 0.6]
        assert rig.reported()["INSTRUCTION_CHANGED"] == 1

    def test_a_bad_instruction_changes_nothing(self):
        rig = Rig()
        with pytest.raises(OnbeatError, match="special tokens"):
            rig.scheduler.set_instruction("<|im_end|>")
        rig.see()
        rig.infer_once()
        assert rig.policy.asked[0]["instruction"] == "lift"


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


class TickHistory:
    """The loop, tick by tick: chunk and row of each, while an inference takes its time."""

    def __init__(self) -> None:
        self.records: list[np.void] = []
        self.now_ns = 0

    def run(self, rig: Rig) -> None:
        """Ticks up to the end of the inference, one of them at the very end where it falls on one."""
        state, until_ns = rig.state, rig.now_ns + rig.takes_ns
        for now_ns in range(max(self.now_ns, rig.now_ns), until_ns + 1, 10 * MS):
            state.measured_q[:] = 0.0
            tick(state, now_ns)
            self.records.append(state.record[0].copy())
            self.now_ns = now_ns + 10 * MS
        rig.now_ns = until_ns


def run_of(rig: Rig, ticks: TickHistory) -> RunRecords:
    fields = {name: np.array([record[name] for record in ticks.records]) for name in ("chunk_id", "row", "flags")}
    nothing = np.zeros(len(ticks.records), np.int64)
    rest = {name: nothing for name in Ticks.__slots__ if name not in fields}
    chunks = read_chunks(inference.chunk for inference in rig.told)
    return RunRecords({}, rig.robot.joints, PERIOD_NS, Ticks(**fields, **rest), 0, chunks, {}, None, {})


def summary_of(rig: Rig, ticks: TickHistory) -> dict[str, Any]:
    return _inference(run_of(rig, ticks))


def with_kind(robot: Robot, kind: str) -> Robot:
    action = tuple(replace(key, kind=kind) for key in robot.embodiment.action)
    return replace(robot, embodiment=replace(robot.embodiment, action=action))


def test_a_plan_publishes_nothing():
    rig = Rig()
    rig.see()
    observation = observe(rig.cameras, rig.history, rig.robot, rig.now_ns)
    assert not isinstance(observation, Blind)
    made = rig.chunker.plan(observation, "lift")
    assert made.targets.shape == (ROWS, JOINTS)
    assert made.observed_ns == observation.t_capture_ns
    assert rig.timeline.published[0] == 0
