"""The inference thread: from the newest observation to the next chunk, while the loop runs on the last one.

An inference starts from the newest frames and the joints at their time, takes as long as it takes, and publishes a
chunk that begins at its observation's time; the timeline finds the seam. How long that took, in policy steps, is the
delay d of the next: a policy that was trained with a prefix is told to repeat the d rows that will have run by then.

    camera   ▲       ▲       ▲       ▲
    infer    └──── chunk n ────┐     └──── chunk n+1 ────┐
    loop     ...... n-1 ........▼...... n ................▼...... n+1 ......
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.interfaces import Camera, Frame
from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.engine import PolicySpec
from onbeat.runtime.language import PolicyLanguage
from onbeat.runtime.mailbox import StateHistory
from onbeat.runtime.observation import Observation
from onbeat.runtime.policy import PolicyOutput
from onbeat.runtime.record import ChunkLog
from onbeat.runtime.robots import Robot, action_values, joint_targets, joint_values, state_values
from onbeat.runtime.timeline import EMPTY, EXPIRED, Timeline, committed_target, publish

# C rows of a chunk, J joints, d rows of a prefix.

POLL_S = 0.002
QUANTILE = 0.95  # of the measured latency; the margin comes on top
WINDOW = 64  # latencies remembered: some ten seconds of a policy at 5 to 10 Hz


class NoFrames(OnbeatError):
    """A camera gave no frame, or none young enough, for so long that nothing can start."""


class Policy(Protocol):
    """What the scheduler asks of a policy; `onbeat.runtime.policy.Policy` is one."""

    language: PolicyLanguage

    @property
    def spec(self) -> PolicySpec: ...

    def infer(
        self,
        observation: Observation,
        instruction: str,
        *,
        noise: NDArray[np.float32] | None = None,
        prev_chunk: NDArray[np.float32] | None = None,
        delay: int = 0,
    ) -> PolicyOutput: ...


@dataclass(slots=True)
class DelayEstimate:
    """The delay d, in policy steps, of the next chunk: ceil(high quantile of latency / period) + margin.

    Latency is from an observation's capture to its chunk published. Before any measurement d is the margin alone.
    """

    period_ns: int
    margin_steps: int
    latencies_ns: deque[int] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, latency_ns: int) -> None:
        """A warm inference took this long."""
        self.latencies_ns.append(latency_ns)

    def steps(self) -> int:
        """The delay d."""
        latency_ns = float(np.quantile(self.latencies_ns, QUANTILE)) if self.latencies_ns else 0.0
        return math.ceil(latency_ns / self.period_ns) + self.margin_steps


@dataclass(frozen=True, slots=True)
class Plan:
    """One inference. targets: (C, J) rad, row 0 due at t0_ns. delay: the rows that repeat what was committed."""

    t0_ns: int
    targets: NDArray[np.float64]
    delay: int
    output: PolicyOutput


def observe(cameras: Sequence[Camera], history: StateHistory, robot: Robot, now_ns: int) -> Observation | None:
    """The newest frame of every camera, and the joints at the time of the oldest; None when one is missing or stale."""
    frames = {camera.name: camera.latest() for camera in cameras}
    known = {name: frame for name, frame in frames.items() if frame is not None}
    if len(known) < len(frames) or not known:
        return None
    t_ns = min(frame.t_capture_ns for frame in known.values())
    joints = history.at(t_ns)
    if joints is None or now_ns - t_ns > robot.config.max_frame_age_ms * 1e6:
        return None
    return Observation(known, state_values(robot, joints), t_ns)


def plan(
    policy: Policy,
    robot: Robot,
    timeline: Timeline,
    observation: Observation,
    instruction: str,
    *,
    delay: int = 0,
    noise: NDArray[np.float32] | None = None,
) -> Plan:
    """Ask the policy for a chunk from an observation. Publishes nothing.

    delay: rows to lock to what `timeline` is committed to; a policy trained with shorter prefixes gets the longest it
    knows, one trained with none gets none, and so does one where nothing is committed that far. noise: drawn when
    None.
    """
    t0_ns = observation.t_capture_ns
    observed = joint_values(robot, observation.state)
    before = committed_rows(timeline, t0_ns - robot.policy_period_ns, robot.policy_period_ns, 1)
    committed_q = observed if before is None else before[0]
    locked = committed_rows(timeline, t0_ns, robot.policy_period_ns, min(delay, policy.spec.trained_delay))
    prev_chunk = None
    if locked is not None:
        values = action_values(locked, robot, committed_q=committed_q, observed_q=observed)
        prev_chunk = policy.language.encode(values)
    rows = 0 if locked is None else len(locked)
    output = policy.infer(observation, instruction, noise=noise, prev_chunk=prev_chunk, delay=rows)
    targets = joint_targets(output.keys, robot, committed_q=committed_q, observed_q=observed)
    return Plan(t0_ns, targets, rows, output)


def committed_rows(timeline: Timeline, t0_ns: int, period_ns: int, rows: int) -> NDArray[np.float64] | None:
    """What the robot is committed to at t0_ns, a period later, ... (rows, J); None when not that far, or rows is 0."""
    targets = np.empty((rows, timeline.targets.shape[2]))
    for k in range(rows):
        committed_target(timeline, t0_ns + k * period_ns, targets[k])
    return None if rows == 0 or np.isnan(targets).any() else targets


@dataclass(slots=True)
class SchedulerStatus:
    """What the thread says of itself. stale: how often no inference could start because a frame was missing or old."""

    inferences: int = 0
    late: int = 0
    stale: int = 0
    delay_steps: int = 0
    last_inference_ns: int = 0


class Scheduler:
    """Observes, infers and publishes until told to stop. One thread calls `run`; `warm_up` comes before it."""

    def __init__(
        self,
        policy: Policy,
        robot: Robot,
        timeline: Timeline,
        *,
        cameras: Sequence[Camera],
        history: StateHistory,
        log: ChunkLog,
        instruction: str,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.status = SchedulerStatus()
        self._policy, self._robot, self._timeline = policy, robot, timeline
        self._cameras, self._history, self._log, self._clock = cameras, history, log, clock
        self._instruction = instruction
        self._delay = DelayEstimate(robot.policy_period_ns, robot.config.margin_steps)
        self._last_t0_ns = self._last_seam_ns = -1

    def warm_up(self, timeout_s: float = 10.0) -> list[int]:
        """Infer twice and publish nothing; returns how long each took, ns. Raises NoFrames.

        The first allocates and is no measure of anything; the second is the first measure of the delay.
        """
        cold, warm = (self._time_inference(timeout_s) for _ in range(2))
        self._delay.add(warm[1])
        return [cold[0], warm[0]]

    def _time_inference(self, timeout_s: float) -> tuple[int, int]:
        """(How long an inference takes, how old its observation is by its end), ns."""
        observation = self._first_observation(timeout_s)
        started_ns = self._clock()
        plan(self._policy, self._robot, self._timeline, observation, self._instruction)
        ended_ns = self._clock()
        return ended_ns - started_ns, ended_ns - observation.t_capture_ns

    def run(self, stop: threading.Event) -> None:
        """Infer until `stop`. What the policy or a camera raises goes to the caller, which stops the robot."""
        while not stop.is_set():
            now_ns = self._clock()
            observation = self._next_observation(now_ns)
            if observation is None:
                stop.wait(POLL_S)
            else:
                self._infer(observation, now_ns, stop)

    def _next_observation(self, now_ns: int) -> Observation | None:
        """An observation newer than the last one used, once it is time for it."""
        steps = self._robot.config.execute_steps
        if steps and now_ns < self._last_seam_ns + steps * self._robot.policy_period_ns:
            return None
        observation = observe(self._cameras, self._history, self._robot, now_ns)
        self.status.stale += observation is None
        if observation is None or observation.t_capture_ns <= self._last_t0_ns:
            return None
        return observation

    def _infer(self, observation: Observation, started_ns: int, stop: threading.Event) -> None:
        observed_ns = self._clock()
        delay = self.status.delay_steps = self._delay.steps()
        made = plan(self._policy, self._robot, self._timeline, observation, self._instruction, delay=delay)
        inferred_ns = self._clock()
        if stop.is_set():
            return
        first_row = self._publish(made, inferred_ns)
        published_ns = self._clock()
        self._delay.add(published_ns - made.t0_ns)
        self.status.inferences += 1
        self.status.last_inference_ns = published_ns - started_ns
        self._last_t0_ns = made.t0_ns
        chunk_id = EMPTY if first_row == EXPIRED else int(self._timeline.published[0]) - 1
        times = made.output.times
        self._log.append(
            made.targets,
            {
                "chunk_id": chunk_id,
                "t0_ns": made.t0_ns,
                "started_ns": started_ns,
                "published_ns": published_ns,
                "delay": made.delay,
                "first_row": first_row,
                "camera_age_ns": started_ns - made.t0_ns,
                "observe_ns": observed_ns - started_ns + times.observe_ns,
                "prefix_ns": times.prefix_ns,
                "flow_ns": times.flow_ns,
                "publish_ns": published_ns - observed_ns - times.total_ns,
            },
        )

    def _publish(self, made: Plan, now_ns: int) -> int:
        period_ns = self._robot.policy_period_ns
        first_row = publish(
            self._timeline,
            made.targets,
            t0_ns=made.t0_ns,
            period_ns=period_ns,
            now_ns=now_ns,
            locked_rows=made.delay,
        )
        self.status.late += first_row < 0
        self._last_seam_ns = made.t0_ns + max(first_row, 0) * period_ns
        return first_row

    def _first_observation(self, timeout_s: float) -> Observation:
        deadline_ns = self._clock() + int(timeout_s * 1e9)
        while self._clock() < deadline_ns:
            observation = observe(self._cameras, self._history, self._robot, self._clock())
            if observation is not None:
                return observation
            time.sleep(POLL_S)
        raise NoFrames(_frames_text(self._cameras, self._clock(), timeout_s))


def _frames_text(cameras: Sequence[Camera], now_ns: int, timeout_s: float) -> str:
    seen = ", ".join(f"{camera.name}: {_age_text(camera.latest(), now_ns)}" for camera in cameras) or "no camera"
    return f"no fresh frame of every camera within {timeout_s:.0f} s ({seen}): check them, or raise max_frame_age_ms"


def _age_text(frame: Frame | None, now_ns: int) -> str:
    return "none" if frame is None else f"{(now_ns - frame.t_capture_ns) / 1e6:.0f} ms old"
