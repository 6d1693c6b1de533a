"""The process that a soak drives: ordinary sessions on the twin, with a policy that can be told to fail.

    python -m onbeat.runtime.soak_session < legs.jsonl

Reads a `Leg` per line and runs it; what happens comes out as lines of JSON, like a daemon's. Everything but the policy
is what `onbeat run` uses. Faults that cannot come over the wire are made here, in the seams that `SEAMS` names.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.twin.frames import SharedFrameCamera
from onbeat.drivers.twin.lifeline import end_with_parent, stop_on_signal
from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.daemon import Session, outcome, say_on_stdout
from onbeat.runtime.engine import PolicySpec, SamplerSpec
from onbeat.runtime.faults import Fault
from onbeat.runtime.flight.header import make_header
from onbeat.runtime.flight.reader import LOG_FOLDER
from onbeat.runtime.flight.recorder import Recorder
from onbeat.runtime.guard import Guard
from onbeat.runtime.heartbeat import DONE
from onbeat.runtime.loop import compile_ahead
from onbeat.runtime.modes import ASYNC
from onbeat.runtime.observation import Observation
from onbeat.runtime.policy import PolicyOutput, StageTimes
from onbeat.runtime.robots import Robot, build_robot, from_json, load_robot, open_bus
from onbeat.runtime.safety import NO_FAULT, onsets
from onbeat.runtime.timeline import publish

ROWS = 8
PACE_S = 0.03  # of an inference that is well
SWAY_RAD = np.array([0.8, 0.25, 0.25, 0.3, 0.8, 0.3])
CENTRE_RAD = np.array([0.0, -1.1, 0.6, 1.2, 0.0, 0.4])
DIVE_RAD = np.array([0.0, 0.9, 0.6, 0.8, 0.0, 0.4])  # under the table
GATE = 0.9
INSTRUCTIONS = ("sway", "sway again")


@dataclass(frozen=True, slots=True)
class Act:
    """A fault of a seam: kind of SEAMS, at_s after the first tick, for seconds."""

    kind: str
    at_s: float
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Leg:
    """One session. robot: a RobotConfig as JSON, with port and cameras. acts: what its seams do, and when."""

    name: str
    robot: dict[str, Any]
    seconds: float
    seed: int
    run_dir: str
    acts: tuple[Act, ...] = ()

    @classmethod
    def from_json(cls, text: str) -> "Leg":
        values = json.loads(text)
        return cls(**{**values, "acts": tuple(Act(**act) for act in values["acts"])})


class PolicyCrash(OnbeatError):
    """Made by a soak."""


class SwayLanguage:
    """All of a policy's language that a session without a prefix asks for."""

    def prompt(self, instruction: str) -> str:
        return instruction


class SwayPolicy:
    """Chunks that sway every joint, and disagree with each other by a tenth of a radian; `present` names its faults."""

    def __init__(self, robot: Robot, seed: int) -> None:
        self.language: Any = SwayLanguage()
        sampler = SamplerSpec(1, 1, "off", gate_lambda=0.0, gate_temperature=1.0, gate_directions=0)
        self.spec = PolicySpec(len(robot.embodiment.views), 8, 1, ROWS, 1, trained_delay=0, sampler=sampler)
        self.present: Callable[[], set[str]] = set
        self.seams: dict[str, Callable[[], None]] = {}
        self._robot, self._rng = robot, np.random.default_rng(seed)

    def infer(self, observation: Observation, instruction: str, **_: Any) -> PolicyOutput:  # noqa: ARG002
        present = self.present()
        for kind in present & self.seams.keys():
            self.seams[kind]()
        time.sleep(PACE_S + 0.35 * ("late" in present) + 1.0 * ("expired" in present))
        if "crash" in present:
            raise PolicyCrash("the soak crashed the inference: nothing to do")
        rows = self._rows(observation.t_capture_ns)
        if "not_finite" in present:
            rows[3, 2] = np.nan
        if "outside" in present:
            rows[2, 0] = 9.0
        if "dive" in present:
            rows[:] = DIVE_RAD
        gate = np.full((1, 1), 0.01 if "low_gate" in present else GATE, np.float32)
        empty = np.zeros((0, 0), np.float32)
        keys = self._robot.embodiment.split(rows)
        return PolicyOutput(empty, keys, gate, empty, StageTimes(1, 1, 1), empty, None)

    def _rows(self, t_ns: int) -> NDArray[np.float64]:
        at_s = t_ns * 1e-9 + 0.1 * np.arange(ROWS)[:, None]
        rates = np.array([1.0, 1.3, 1.7, 2.1, 2.3, 2.9])
        return CENTRE_RAD + SWAY_RAD * np.sin(rates * at_s) + self._rng.uniform(-0.05, 0.05, len(SWAY_RAD))


@dataclass(slots=True)
class Stage:
    """A session, its policy, and the seams through which a leg's acts reach them."""

    session: Session
    policy: SwayPolicy
    acts: Sequence[Act]
    _done: set[Act] = field(default_factory=set)
    _instructions: int = 0

    def __post_init__(self) -> None:
        self.policy.present = self.present
        seams = {"stale": self._stale, "overtaken": self._overtake, "slow_policy": self._slow, "restart": self._restart}
        self.policy.seams = seams

    def elapsed_s(self) -> float:
        """Since the loop's first tick; negative before."""
        status = self.session.loop.status
        return (time.monotonic_ns() - status.started_ns) * 1e-9 if status.ticks else -1.0

    def present(self) -> set[str]:
        """The kinds of this moment; one without a length is there until somebody has seen it."""
        now_s, kinds = self.elapsed_s(), set[str]()
        for act in self.acts:
            if act.at_s <= now_s and act not in self._done:
                kinds.add(act.kind)
                if now_s >= act.at_s + act.seconds:
                    self._done.add(act)
        return kinds

    def play(self, stop: threading.Event) -> None:
        """What no call of the policy's can do, from a thread of its own."""
        pending = [act for act in self.acts if act.kind in OUTSIDE_THE_POLICY]
        while pending and not stop.wait(0.005):
            for act in [act for act in pending if act.at_s <= self.elapsed_s()]:
                pending.remove(act)
                getattr(self, f"_{act.kind}")()

    def _refuse(self) -> None:
        self.session.state.path_q[0] = np.nan

    def _instruct(self) -> None:
        self._instructions += 1
        self.session.scheduler.set_instruction(INSTRUCTIONS[self._instructions % 2])

    def _fill_disk(self) -> None:
        self.session.free_bytes = lambda _: 0

    def _finish(self) -> None:
        self.session.stop.set()

    def _stale(self) -> None:
        timeline = self.session.scheduler.timeline
        newest_ns = int(timeline.newest_t0_ns[0])
        timeline.newest_t0_ns[0] = time.monotonic_ns() + 10**9
        threading.Timer(0.2, timeline.newest_t0_ns.__setitem__, (0, newest_ns)).start()

    def _overtake(self) -> None:
        now_ns, timeline = time.monotonic_ns(), self.session.scheduler.timeline
        rows = self.policy._rows(now_ns)
        period_ns = self.session.robot.policy_period_ns
        publish(timeline, rows, t0_ns=now_ns - 1, period_ns=period_ns, now_ns=now_ns, locked_rows=4, blend_rows=2)

    def _slow(self) -> None:
        came = self.session.scheduler._chunker.budget.came
        came.extend([ROWS] * 8)
        threading.Timer(0.3, came.clear).start()

    def _restart(self) -> None:
        self.session.scheduler.warm_up()


OUTSIDE_THE_POLICY = ("refuse", "instruct", "fill_disk", "finish")
SEAMS: dict[str, Fault] = {
    "late": Fault.CHUNK_LATE,
    "expired": Fault.CHUNK_EXPIRED,
    "not_finite": Fault.CHUNK_NOT_FINITE,
    "outside": Fault.CHUNK_OUTSIDE,
    "stale": Fault.CHUNK_STALE,
    "overtaken": Fault.CHUNK_OVERTAKEN,
    "restart": Fault.POLICY_RESTARTED,
    "instruct": Fault.INSTRUCTION_CHANGED,
    "slow_policy": Fault.DELAY_OVER_BUDGET,
    "low_gate": Fault.PERCEPTION_SHIFT,
    "dive": Fault.WORKSPACE,
    "refuse": Fault.COMMAND_REFUSED,
    "crash": Fault.INFERENCE_DIED,
    "fill_disk": Fault.DISK_FULL,
    "finish": Fault.STOP_REQUESTED,
}


def run_leg(leg: Leg, stop: threading.Event) -> bool:
    """One session from opening to its end; tells how it went. Returns whether this process may run another.

    One that could not bring the arm to its end has left that to the guardian, which waits for this process to be gone.
    """
    robot = build_robot(from_json(leg.robot))
    policy = SwayPolicy(robot, leg.seed)
    with ExitStack() as devices:
        cameras = [devices.enter_context(SharedFrameCamera(r, n)) for n, r in robot.config.cameras.items()]
        bus = devices.enter_context(open_bus(robot))
        guard = devices.enter_context(Guard(robot, bus))
        header = make_header({"leg": leg.name}, robot, policy.spec, mode=ASYNC)
        folder = Path(leg.run_dir) / f"{LOG_FOLDER}-{leg.name}-{header['started_ns']}"
        recorder = devices.enter_context(Recorder(folder, header))
        session = Session(robot, policy, bus, cameras, INSTRUCTIONS[0], leg.seconds, tell, recorder, stop, guard=guard)
        stage = Stage(session, policy, leg.acts)
        player = threading.Thread(target=stage.play, args=(stop,), name="acts")
        announcer = threading.Thread(target=announce, args=(session, guard.pid, stop), name="announcer")
        player.start()
        announcer.start()
        error = None
        try:
            session.run()
        except OnbeatError as raised:
            error = str(raised)
        finally:
            stop.set()
            player.join()
            announcer.join()
            recorder.finish(session.loop.records, outcome(session))
        is_over = guard.phase == DONE
        tell({"event": "ended", "error": error, "is_left_to_guardian": not is_over, **ending(session)})
    return is_over


def announce(session: Session, guardian_pid: int, stop: threading.Event) -> None:
    """Say when the first tick was due, once there is one."""
    while not stop.wait(0.002):
        status = session.loop.status
        if status.ticks:
            tell({"event": "moving", "t_ns": status.started_ns, "guardian_pid": guardian_pid})
            return


def ending(session: Session) -> dict[str, Any]:
    """What the runtime says of a session, to be compared with what the twin saw."""
    ended_by = int(session.state.safety.ended_by[0])
    return {
        "ended_by": None if ended_by == NO_FAULT else Fault(ended_by).name,
        "faults": onsets(session.state.safety),
        "ticks": session.loop.status.ticks,
        "missed": session.loop.status.missed,
        "log": str(session.recorder.folder),
    }


def tell(event: Mapping[str, Any]) -> None:
    """To the soak, all but the live line."""
    if event["event"] != "status":
        say_on_stdout(event)


def main() -> int:
    """Run the legs of stdin, one after the other. Exit code 3 after one whose arm was left to the guardian."""
    end_with_parent()
    compile_ahead(load_robot("so101-twin").limits)  # a spare does this while another is at work
    for line in sys.stdin:
        leg = Leg.from_json(line)
        if not run_leg(leg, stop_on_signal()):
            return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
