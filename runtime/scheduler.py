"""The inference thread: from the newest observation to the next chunk, while the loop runs on the last one.

An inference starts from the newest frames and the joints at their time, takes as long as it takes, and its chunk is
published; `chunker.py` knows how, for each mode. This is the shell around it: cameras, clock, instruction, records.

    camera   ▲       ▲       ▲       ▲
    infer    └──── chunk n ────┐     └──── chunk n+1 ────┐
    loop     ...... n-1 ........▼...... n ................▼...... n+1 ......
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.interfaces import Camera, Frame
from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.chunker import Chunker, Plan
from onbeat.runtime.faults import Fault
from onbeat.runtime.flight.inference import Inference
from onbeat.runtime.observation import Observation
from onbeat.runtime.robots import Robot, state_values
from onbeat.runtime.safety import Safety, report, set_condition
from onbeat.runtime.timeline import EMPTY, EXPIRED, NOT_FINITE, OUTSIDE, STALE, Timeline, is_pending

POLL_S = 0.002
LATEST = 64  # inferences that a live line speaks of
LOW_GATES = 3  # chunks in a row whose gate is low: the cameras show what the policy does not know
FAULT_OF_REFUSAL = {
    EXPIRED: Fault.CHUNK_EXPIRED,
    STALE: Fault.CHUNK_STALE,
    NOT_FINITE: Fault.CHUNK_NOT_FINITE,
    OUTSIDE: Fault.CHUNK_OUTSIDE,
}


class NoFrames(OnbeatError):
    """A camera gave no frame, or none young enough, for so long that nothing can start."""


class History(Protocol):
    """What knows the joints of a time; `mailbox.StateHistory` is one."""

    def at(self, t_ns: int) -> NDArray[np.float64] | None: ...


class Blind(Enum):
    """Why there is no observation."""

    MISSING = "missing"  # a camera has given no frame, or the loop no joints
    STALE = "stale"  # the oldest of the newest frames is too old
    FUTURE = "future"  # a frame is stamped later than now: its clock is wrong


def observe(cameras: Sequence[Camera], history: History, robot: Robot, now_ns: int) -> Observation | Blind:
    """The newest frame of every camera, and the joints at the time of the oldest."""
    frames = {camera.name: camera.latest() for camera in cameras}
    known = {name: frame for name, frame in frames.items() if frame is not None}
    if len(known) < len(frames) or not known:
        return Blind.MISSING
    times_ns = [frame.t_capture_ns for frame in known.values()]
    if max(times_ns) > now_ns:
        return Blind.FUTURE
    joints = history.at(min(times_ns))
    if joints is None:
        return Blind.MISSING
    if now_ns - min(times_ns) > robot.config.max_frame_age_ms * 1e6:
        return Blind.STALE
    return Observation(known, state_values(robot, joints), min(times_ns))


@dataclass(slots=True)
class SchedulerStatus:
    """What the thread says of itself.

    late: chunks that were refused. stale, wrong_clock: how often no inference could start because a frame was missing
    or old, or from the future. withdrawn: chunks of an instruction that had changed meanwhile. bound_broken: chunks at
    which d <= s <= H - d did not hold; warning: what was wrong at the last that came, with the figures, or "".
    latest_ns: how long the last inferences took.
    """

    inferences: int = 0
    late: int = 0
    stale: int = 0
    wrong_clock: int = 0
    withdrawn: int = 0
    bound_broken: int = 0
    delay_steps: int = 0
    warning: str = ""
    latest_ns: deque[int] = field(default_factory=lambda: deque(maxlen=LATEST))


class Scheduler:
    """Observes, infers and publishes until told to stop. One thread calls `run`; `warm_up` comes before it."""

    def __init__(
        self,
        chunker: Chunker,
        *,
        cameras: Sequence[Camera],
        history: History,
        log: Callable[[Inference], None],
        instruction: str,
        safety: Safety | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """log: is told every inference, and must not block. safety: is told of the faults of chunks, see its table."""
        self.status = SchedulerStatus()
        self._safety = safety
        self._chunker = chunker
        self._cameras, self._history, self._log, self._clock = cameras, history, log, clock
        self._instruction = self._warm_instruction = instruction
        self._low_gates = 0

    @property
    def timeline(self) -> Timeline:
        """Where the chunks go."""
        return self._chunker.timeline

    def set_instruction(self, instruction: str) -> None:
        """From any thread: what is inferred from now on. A chunk that is being inferred for the old one never runs.

        The robot goes on with the chunk in force until the first one of the new instruction. Raises InstructionError;
        then nothing changes.
        """
        self._chunker.policy.language.prompt(instruction)
        self._instruction = instruction
        self._chunker.hurry()

    def warm_up(self, timeout_s: float = 10.0) -> list[int]:
        """Infer twice and publish nothing; returns how long each took, ns. Raises NoFrames, DelayTooLong.

        The first allocates and is no measure of anything; the second is the first measure of the delay.
        """
        took_ns = [self._time_inference(timeout_s, is_cold) for is_cold in (True, False)]
        self.status.warning = self._chunker.check_start()
        if self.timeline.published[0] > 0:
            self._report(Fault.POLICY_RESTARTED)
        return took_ns

    def _time_inference(self, timeout_s: float, is_cold: bool) -> int:
        observation = self._first_observation(timeout_s)
        started_ns = self._clock()
        self._chunker.plan(observation, self._instruction)
        ended_ns = self._clock()
        if not is_cold:
            self._chunker.count_delay(observation.t_capture_ns, ended_ns)
        return ended_ns - started_ns

    def run(self, stop: threading.Event) -> None:
        """Infer until `stop`. What the policy or a camera raises goes to the caller, which stops the robot."""
        while not stop.is_set():
            if not self.step(stop):
                stop.wait(POLL_S)

    def step(self, stop: threading.Event) -> bool:
        """Infer from what is there to be seen, when it is time to; returns whether it was. Published unless `stop`."""
        now_ns = self._clock()
        observation = self._next_observation(now_ns)
        if observation is not None:
            self._infer(observation, now_ns, stop)
        return observation is not None

    def _next_observation(self, now_ns: int) -> Observation | None:
        """An observation, once it is time for it."""
        seen = observe(self._cameras, self._history, self._chunker.robot, now_ns)
        if isinstance(seen, Blind):
            self.status.wrong_clock += seen is Blind.FUTURE
            self.status.stale += seen is not Blind.FUTURE
            return None
        return seen if self._chunker.is_due(seen.t_capture_ns) else None

    def _infer(self, observation: Observation, started_ns: int, stop: threading.Event) -> None:
        instruction, observed_ns = self._instruction, self._clock()
        plan = self._chunker.plan(observation, instruction)
        inferred_ns = self._clock()
        if stop.is_set():
            return
        if instruction is not self._instruction:
            self.status.withdrawn += 1
            return
        is_new, is_early = instruction != self._warm_instruction, is_pending(self.timeline, inferred_ns)
        first_row = self._chunker.publish(plan, inferred_ns, is_cold=is_new)
        self._warm_instruction = instruction
        if instruction is not self._instruction:
            self._chunker.hurry()  # it changed meanwhile, and publishing has set when the next observation is due
        published_ns = self._clock()
        self._tell(plan, first_row, published_ns - started_ns)
        self._judge(plan, first_row, is_new=is_new, is_early=is_early)
        times = {"started_ns": started_ns, "inferred_ns": inferred_ns, "published_ns": published_ns}
        fields = self._chunk_fields(plan, first_row, observed_ns, times)
        self._log(Inference(observation, instruction, fields, self.status.warning))

    def _tell(self, plan: Plan, first_row: int, took_ns: int) -> None:
        status = self.status
        status.inferences += 1
        status.late += first_row < 0
        status.delay_steps = plan.budget
        status.latest_ns.append(took_ns)
        status.warning = self._chunker.problem()
        status.bound_broken += bool(status.warning)

    def _judge(self, plan: Plan, first_row: int, *, is_new: bool, is_early: bool) -> None:
        """Report what the fault table has of a chunk that came. is_early: before the last one's seam."""
        if first_row in FAULT_OF_REFUSAL:
            self._report(FAULT_OF_REFUSAL[first_row])
        elif self._chunker.executed > plan.budget:
            self._report(Fault.CHUNK_LATE)
        if first_row >= 0 and is_early:
            self._report(Fault.CHUNK_OVERTAKEN)
        if is_new:
            self._report(Fault.INSTRUCTION_CHANGED)
        gate, low = plan.output.gate, self._chunker.robot.config.min_gate
        self._low_gates = self._low_gates + 1 if gate.size and gate.mean() < low else 0
        if self._safety is not None:
            set_condition(self._safety, Fault.DELAY_OVER_BUDGET, bool(self.status.warning))
            set_condition(self._safety, Fault.PERCEPTION_SHIFT, self._low_gates >= LOW_GATES)

    def _report(self, fault: Fault) -> None:
        if self._safety is not None:
            report(self._safety, fault)

    def _chunk_fields(
        self, plan: Plan, first_row: int, observed_ns: int, times: Mapping[str, int]
    ) -> Mapping[str, Any]:
        """Of /chunk in the flight log. observed_ns: when the observation was there. times: its times."""
        timeline, output, took = self.timeline, plan.output, plan.output.times
        return {
            **times,
            "number": self.status.inferences - 1,
            "chunk_id": EMPTY if first_row < 0 else int(timeline.published[0]) - 1,
            "observed_ns": plan.observed_ns,
            "t0_ns": plan.observed_ns if first_row < 0 else int(timeline.newest_t0_ns[0]),
            "met_ns": int(timeline.met_ns[0]),
            "rows": len(plan.targets),
            "budget": plan.budget,
            "delay": plan.locked,
            "executed": self._chunker.executed,
            "first_row": first_row,
            "camera_age_ns": times["started_ns"] - plan.observed_ns,
            "observe_ns": observed_ns - times["started_ns"] + took.observe_ns,
            "prefix_ns": took.prefix_ns,
            "flow_ns": took.flow_ns,
            "publish_ns": times["published_ns"] - observed_ns - took.total_ns,
            "targets_rad": plan.targets,
            "actions": output.actions,
            "noise": output.noise,
            "directions": output.directions,
            "gate": output.gate,
            "cost": output.cost,
        }

    def _first_observation(self, timeout_s: float) -> Observation:
        deadline_ns = self._clock() + int(timeout_s * 1e9)
        while self._clock() < deadline_ns:
            observation = observe(self._cameras, self._history, self._chunker.robot, self._clock())
            if not isinstance(observation, Blind):
                return observation
            time.sleep(POLL_S)
        raise NoFrames(_frames_text(self._cameras, self._clock(), timeout_s))


def _frames_text(cameras: Sequence[Camera], now_ns: int, timeout_s: float) -> str:
    seen = ", ".join(f"{camera.name}: {_age_text(camera.latest(), now_ns)}" for camera in cameras) or "no camera"
    return f"no fresh frame of every camera within {timeout_s:.0f} s ({seen}): check them, or raise max_frame_age_ms"


def _age_text(frame: Frame | None, now_ns: int) -> str:
    return "none" if frame is None else f"{(now_ns - frame.t_capture_ns) / 1e6:.0f} ms old"
