"""`onbeat bench seam`: what happens where one chunk follows another, per mode, and what its smoothness costs.

A policy that is a model and not a network follows a path of sines, and no two of its chunks agree: each has an offset
and a drift of its own. Its delays are random. Chunker, timeline, tick and limits are those of a run, in simulated time;
each mode is given the same disagreements and delays. Its answers to a prefix are assumptions, and are said here:

- locked: it goes on from the locked rows and comes back to its own plan over `RETURN_ROWS`, as training would have it
- guided: the flow that leads straight to its own plan, pulled as the flow graph pulls (docs/decisions/0019)

LeRobot's ActionQueue, where `lerobot` is installed, gets the chunks of `async` at the same times and is asked for one
action per policy period, as its own examples do; its actions go through the same limits.
"""

import argparse
import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.kernels.limit import limit
from onbeat.runtime.chunker import Chunker, Plan
from onbeat.runtime.command_line import HelpWithDefaults
from onbeat.runtime.engine import Guidance
from onbeat.runtime.measures import figure, text_table
from onbeat.runtime.modes import MODES
from onbeat.runtime.observation import Observation
from onbeat.runtime.policy import PolicyOutput, StageTimes
from onbeat.runtime.robots import Robot, build_robot, load_robot, state_values
from onbeat.runtime.tick import new_tick_state, tick

# K ticks, J joints, H rows of a chunk.

Array = NDArray[np.float64]
ROWS = 16
FLOW_STEPS = 4
RETURN_ROWS = 4.0
SLOWEST_LAG_S = 1.5
JERK_FREE_RAD_S3 = 1e6  # so that the path is not averaged: the queue beside it has no such step


@dataclass(frozen=True, slots=True)
class Setting:
    """What every mode is given. delays: of an inference in policy periods, uniform. disagreement_rad: deviation."""

    seconds: float = 60.0
    seed: int = 0
    disagreement_rad: float = 0.1
    shortest_delay: float = 0.3
    longest_delay: float = 4.5


@dataclass(frozen=True, slots=True)
class Traced:
    """A run, tick by tick. target: (K, J) before limits, the command where nothing was due. seams: (K,) bool."""

    target: Array
    command: Array
    seams: NDArray[np.bool_]
    held: int


@dataclass(frozen=True, slots=True)
class Seam:
    """One row of the table. Steps are the largest from tick to tick within a policy period of a seam, of any joint.

    target_*: before the limits. command_*: after. lag_ms: the shift at which the command fits the path best, and
    error_rad the root mean square of what is left. held_percent: of the ticks, without an action due.
    """

    mode: str
    seams: int
    target_rad: float
    target_rad_s: float
    command_rad_s: float
    command_rad_s2: float
    lag_ms: float
    error_rad: float
    held_percent: float


@dataclass(slots=True)
class ModelPolicy:
    """Its n-th chunk is path(t) + offset_n + drift_n, with n counted from 0; see the module."""

    robot: Robot
    setting: Setting
    trained_delay: int
    count: int = 0
    language: Any = field(init=False)
    spec: Any = field(init=False)

    def __post_init__(self) -> None:
        flatten = self.robot.embodiment.flatten
        self.language = SimpleNamespace(encode=lambda keys: flatten(keys).astype(np.float32))
        sampler = SimpleNamespace(flow_steps=FLOW_STEPS)
        self.spec = SimpleNamespace(chunk=ROWS, trained_delay=self.trained_delay, guidance=True, sampler=sampler)

    def own_rows(self, observed_ns: int) -> Array:
        """What it would do by itself, (H, J)."""
        rng = np.random.default_rng([self.setting.seed, self.count])
        joints, rows = len(self.robot.joints), np.arange(ROWS)[:, None]
        offset, drift = rng.normal(scale=self.setting.disagreement_rad, size=(2, joints))
        return (
            path(self.robot, observed_ns / 1e9 + rows * self.robot.policy_period_ns / 1e9)
            + offset
            + drift * rows / ROWS
        )

    def infer(
        self,
        observation: Observation,
        instruction: str,  # noqa: ARG002
        *,
        noise: Any = None,  # noqa: ARG002
        prev_chunk: NDArray[np.float32] | None = None,
        delay: int = 0,
        guidance: Guidance | None = None,
    ) -> PolicyOutput:
        own = self.own_rows(observation.t_capture_ns)
        if prev_chunk is not None and delay:
            own = go_on_from(own, prev_chunk[:delay].astype(np.float64))
        if prev_chunk is not None and guidance is not None:
            own = flow_to(own, prev_chunk.astype(np.float64), guidance)
        self.count += 1
        none = np.zeros((0, 0), np.float32)
        return PolicyOutput(none, self.robot.embodiment.split(own), none, none, StageTimes(0, 0, 0), none, None)


def path(robot: Robot, t_s: Array) -> Array:
    """Where the policy wants to go: (..., J) for t_s (..., 1). Half of each joint's range, at up to 0.5 rad/s."""
    limits, joints = robot.limits, len(robot.joints)
    middle, amplitude = (limits.q_min + limits.q_max) / 2, (limits.q_max - limits.q_min) / 4
    speed = 0.5 * (0.6 + 0.4 * np.arange(joints) / joints)
    return middle + amplitude * np.sin(speed / amplitude * t_s + np.arange(joints))


def go_on_from(own: Array, locked: Array) -> Array:
    """`own` (H, J) with the locked rows (d, J) kept, and the disagreement at the last of them fading behind it."""
    rows = np.arange(len(own) - len(locked))[:, None] + 1
    away = (locked[-1] - own[len(locked) - 1]) * np.exp(-rows / RETURN_ROWS)
    return np.concatenate([locked, own[len(locked) :] + away])


def flow_to(own: Array, prev: Array, guidance: Guidance) -> Array:
    """Euler steps along v = (own - x) / (1 - t), with the guidance of the flow graph. prev: (R, J)."""
    x = np.zeros_like(own)
    rows = prev[np.minimum(np.arange(len(own)), len(prev) - 1)]
    for step in range(FLOW_STEPS):
        t = step / FLOW_STEPS
        velocity = (own - x) / (1 - t)
        most = math.inf if t == 0 else (t * t + (1 - t) ** 2) / (t * (1 - t))
        gain = min(guidance.beta, most) * guidance.weights[:, None]
        x = x + (velocity + gain * (rows - (x + (1 - t) * velocity))) / FLOW_STEPS
    return x


def latencies_ns(setting: Setting, period_ns: int, count: int) -> NDArray[np.int64]:
    """Of the n-th inference, the same for every mode."""
    rng = np.random.default_rng([setting.seed, 1 << 32])
    return (rng.uniform(setting.shortest_delay, setting.longest_delay, count) * period_ns).astype(np.int64)


def run_mode(robot: Robot, setting: Setting, mode: str) -> Traced:
    """The robot in simulated time, with a frame at the first tick of every policy period."""
    policy = ModelPolicy(robot, setting, trained_delay=ROWS // 2 if mode == "locked" else 0)
    state = new_tick_state(robot.limits, rate_hz=robot.config.loop_rate_hz, rows=ROWS)
    chunker = Chunker(policy, robot, state.timeline, mode)
    state.measured_q[:] = path(robot, np.zeros(1))
    coming: Plan | None = None
    ready_ns, seen = 0, -1
    tick_ns = round(1e9 / robot.config.loop_rate_hz)
    trace = _new_trace(robot, setting)
    takes_ns = latencies_ns(setting, robot.policy_period_ns, len(trace.target))
    for k in range(len(trace.target)):
        now_ns = k * tick_ns
        if coming is not None and now_ns >= ready_ns:
            chunker.publish(coming, now_ns)
            coming = None
        if coming is None and now_ns % robot.policy_period_ns < tick_ns and chunker.is_due(now_ns):
            ready_ns = now_ns + int(takes_ns[policy.count])
            coming = chunker.plan(Observation({}, state_values(robot, state.measured_q), now_ns), "")
        tick(state, now_ns)
        state.measured_q[:] = state.command_q
        chunk_id = int(state.record["chunk_id"][0])
        trace.seams[k], seen = chunk_id != seen and chunk_id > 0, chunk_id
        trace.target[k] = np.where(np.isnan(state.target), state.command_q, state.target)
        trace.command[k] = state.command_q
    return replace(trace, held=int(state.counters.held[0]))


def run_queue(robot: Robot, setting: Setting, queue: Any, to_tensor: Callable[[Array], Any]) -> Traced:
    """LeRobot's queue: asked for an action per policy period, given each chunk with its delay rounded up.

    Where it replaces, inference never pauses; where it appends, one starts when it is empty: as LeRobot's examples do.
    """
    policy = ModelPolicy(robot, setting, trained_delay=0)
    limits, tick_ns = robot.limits, round(1e9 / robot.config.loop_rate_hz)
    q, v, target = path(robot, np.zeros(1)), np.zeros(len(robot.joints)), np.full(len(robot.joints), np.nan)
    trace, coming, ready_ns, index, begun_ns, held = _new_trace(robot, setting), None, 0, 0, 0, 0
    takes_ns = latencies_ns(setting, robot.policy_period_ns, len(trace.target))
    is_new = False
    for k in range(len(trace.target)):
        now_ns = k * tick_ns
        if coming is not None and now_ns >= ready_ns:
            delay = math.ceil((now_ns - begun_ns) / robot.policy_period_ns)
            queue.merge(to_tensor(coming), to_tensor(coming), delay, index)
            coming, is_new = None, policy.count > 1
        if now_ns % robot.policy_period_ns < tick_ns:
            if coming is None and (queue.cfg.enabled or queue.empty()):
                ready_ns, begun_ns, index = now_ns + int(takes_ns[policy.count]), now_ns, queue.get_action_index()
                coming = policy.own_rows(now_ns)
                policy.count += 1
            action = queue.get()
            target = np.full(len(q), np.nan) if action is None else action.numpy().astype(np.float64)
            trace.seams[k], is_new = is_new, False
        held += bool(np.isnan(target[0]))
        dt = 1 / robot.config.loop_rate_hz
        limit(q, v, target, limits.q_min, limits.q_max, limits.v_max, limits.a_max, dt, q, v)
        trace.target[k], trace.command[k] = np.where(np.isnan(target), q, target), q
    return replace(trace, held=held)


def _new_trace(robot: Robot, setting: Setting) -> Traced:
    ticks = round(setting.seconds * robot.config.loop_rate_hz)
    shape = (ticks, len(robot.joints))
    return Traced(np.empty(shape), np.empty(shape), np.zeros(ticks, bool), 0)


def measure(robot: Robot, name: str, trace: Traced) -> Seam:
    """The row of a run."""
    rate_hz = robot.config.loop_rate_hz
    width = round(robot.policy_period_ns * rate_hz / 1e9)
    near = np.convolve(trace.seams, np.ones(width + 2), "full")[: len(trace.seams)] > 0
    lag, error = best_lag(robot, trace.command)
    return Seam(
        mode=name,
        seams=int(trace.seams.sum()),
        target_rad=_largest(trace.target, 1, near),
        target_rad_s=_largest(trace.target, 2, near) * rate_hz,
        command_rad_s=_largest(trace.command, 1, near) * rate_hz,
        command_rad_s2=_largest(trace.command, 2, near) * rate_hz**2,
        lag_ms=1e3 * lag / rate_hz,
        error_rad=error,
        held_percent=100 * trace.held / len(trace.target),
    )


def _largest(rows: Array, order: int, near: NDArray[np.bool_]) -> float:
    steps = np.abs(np.diff(rows, order, axis=0)).max(axis=1)
    return float(steps[near[order:]].max(initial=0.0))


def best_lag(robot: Robot, command: Array) -> tuple[int, float]:
    """By how many ticks the command (K, J) is behind the path, and the error that is left, rad."""
    rate_hz = robot.config.loop_rate_hz
    wanted = path(robot, np.arange(len(command))[:, None] / rate_hz)
    skip = round(SLOWEST_LAG_S * rate_hz)
    errors = [
        float(np.sqrt(np.mean((command[skip:] - wanted[skip - lag : len(wanted) - lag]) ** 2))) for lag in range(skip)
    ]
    return int(np.argmin(errors)), min(errors)


def bench(setting: Setting) -> tuple[list[Seam], str]:
    """A row per mode, and a word on LeRobot's queue where it could not be asked."""
    twin = load_robot("so101-twin").config
    robot = build_robot(replace(twin, j_max=(JERK_FREE_RAD_S3,) * 6, tool_low_m=(), tool_high_m=()))
    rows = [measure(robot, mode, run_mode(robot, setting, mode)) for mode in MODES]
    try:
        queues = lerobot_queues()
    except ImportError as missing:
        return rows, f"LeRobot's ActionQueue was not asked: {missing}"
    return [*rows, *(measure(robot, name, run_queue(robot, setting, *how)) for name, how in queues.items())], ""


def lerobot_queues() -> Mapping[str, tuple[Any, Callable[[Array], Any]]]:
    """LeRobot's own queue in both of its ways, by name. Raises ImportError."""
    module = importlib.import_module("lerobot.policies.rtc.action_queue")
    config = importlib.import_module("lerobot.policies.rtc.configuration_rtc").RTCConfig
    to_tensor = importlib.import_module("torch").from_numpy
    return {
        f"lerobot {name}": (module.ActionQueue(config(enabled=enabled)), to_tensor)
        for name, enabled in (("replace", True), ("append", False))
    }


def as_table(rows: Sequence[Seam]) -> str:
    """For a terminal."""
    header = (
        "mode",
        "seams",
        "target: step, rad",
        "speed step, rad/s",
        "command: rad/s",
        "rad/s^2",
        "lag, ms",
        "error, rad",
        "held, %",
    )
    digits = (4, 2, 2, 1, 0, 3, 1)
    cells = (
        (row.mode, str(row.seams), *(figure(v, d) for v, d in zip(list(asdict(row).values())[2:], digits, strict=True)))
        for row in rows
    )
    return text_table(header, cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table. Exit code 0."""
    given = Setting()
    parser = argparse.ArgumentParser(
        prog="onbeat bench seam",
        description="Largest steps where chunks meet, per mode, in simulated time, with a model of a policy.",
        formatter_class=HelpWithDefaults,
    )
    parser.add_argument("--seconds", type=float, default=given.seconds, help="simulated, per mode")
    parser.add_argument("--seed", type=int, default=given.seed, help="of disagreements and delays")
    parser.add_argument("--disagreement-rad", type=float, default=given.disagreement_rad, help="between chunks")
    parser.add_argument("--shortest-delay", type=float, default=given.shortest_delay, help="in policy periods")
    parser.add_argument("--longest-delay", type=float, default=given.longest_delay, help="in policy periods")
    parser.add_argument("--json", action="store_true", dest="is_json", help="print JSON for scripts")
    options = vars(parser.parse_args(argv))
    is_json = options.pop("is_json")
    setting = Setting(**options)
    rows, word = bench(setting)
    if is_json:
        print(json.dumps({"setting": asdict(setting), "rows": [asdict(row) for row in rows], "note": word}, indent=1))
    else:
        print("\n".join([as_table(rows), *([word] if word else [])]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
