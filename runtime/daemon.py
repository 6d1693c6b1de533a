"""The process that drives: it owns the bus, the cameras, the policy and the loop, and knows nothing of the world.

    python -m onbeat.runtime.daemon < config.json

Reads a `DaemonConfig` as JSON on stdin and tells what happens as lines of JSON on stdout; ends on SIGTERM or
SIGINT with the arm at rest. Three threads: the loop, the inference, and this one, which waits and reports.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from onbeat.calibration.joints import load_joints
from onbeat.drivers.feetech.device import BusSettings, FeetechBus
from onbeat.drivers.interfaces import Camera
from onbeat.drivers.twin.frames import SharedFrameCamera
from onbeat.drivers.twin.lifeline import end_with_parent, stop_on_signal
from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime import record
from onbeat.runtime.loop import (
    ControlLoop,
    ExchangingActuators,
    StateHistory,
    prepare_lock_holder,
    prepare_real_time,
)
from onbeat.runtime.policy import load_policy
from onbeat.runtime.record import ChunkLog, TickLog
from onbeat.runtime.robots import RELAX, Robot, as_json, build_robot, from_json
from onbeat.runtime.scheduler import Policy, Scheduler
from onbeat.runtime.tick import JointLimits, new_tick_state, tick
from onbeat.runtime.timeline import publish

STATUS_PERIOD_S = 0.2
JOIN_S = 10.0  # an inference that is under way when the run ends is waited for this long
SPARE_TICKS = 1000  # room for the ticks of coming to rest
MOST_CHUNKS_PER_S = 50
FRAMES_FOLDER = "frames"

Say = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """All that a daemon is told. robot: a RobotConfig as JSON, with port and cameras filled in. seconds: of motion.

    seed: of the policy's noise. run_dir: where the records go. threads: of the inference engine.
    """

    robot: Mapping[str, Any]
    bundle: str
    instruction: str
    seconds: float
    seed: int
    run_dir: str
    threads: int = 1

    @classmethod
    def from_json(cls, text: str) -> "DaemonConfig":
        return cls(**json.loads(text))


class BusWithFaults(ExchangingActuators, Protocol):
    """Actuators that also count what went wrong."""

    def faults(self) -> dict[str, int]: ...


@dataclass(slots=True)
class Failure:
    """The first error of any thread: it stops the run, and is told at the end."""

    error: BaseException | None = None

    def keep(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error


@dataclass(slots=True)
class Session:
    """A run on devices that are open: warm up, move for a while, come to rest. `run` is called once."""

    robot: Robot
    policy: Policy
    bus: BusWithFaults
    cameras: Sequence[Camera]
    instruction: str
    seconds: float
    say: Say
    stop: threading.Event = field(default_factory=threading.Event)
    failure: Failure = field(default_factory=Failure)
    real_time: dict[str, str] = field(default_factory=dict)
    warm_up_ns: list[int] = field(default_factory=list)
    loop: ControlLoop = field(init=False)
    scheduler: Scheduler = field(init=False)
    ticks: TickLog = field(init=False)
    chunks: ChunkLog = field(init=False)

    def __post_init__(self) -> None:
        robot, rows, joints = self.robot, self.policy.spec.chunk, len(self.robot.joints)
        state = new_tick_state(robot.limits, rate_hz=robot.config.loop_rate_hz, rows=rows)
        history = StateHistory(joints)
        self.ticks = TickLog(int(self.seconds * robot.config.loop_rate_hz) + SPARE_TICKS, joints)
        self.chunks = ChunkLog(int(self.seconds * MOST_CHUNKS_PER_S) + 1, rows, joints)
        self.loop = ControlLoop(state, self.bus, log=self.ticks, history=history)
        self.scheduler = Scheduler(
            self.policy,
            robot,
            state.timeline,
            cameras=self.cameras,
            history=history,
            log=self.chunks,
            instruction=self.instruction,
        )

    def run(self) -> None:
        """Everything from the first reading to rest. Raises what a thread raised, after the arm was brought to rest."""
        compile_ahead(self.robot.limits)
        self.loop.read_first()
        self.warm_up_ns = self.scheduler.warm_up()
        self.bus.enable(True)
        threads = [self._thread("loop", self._run_loop), self._thread("inference", self._run_inference)]
        self._report_until_end(threads)
        if self.robot.config.on_exit == RELAX:
            self.bus.enable(False)
        if self.failure.error is not None:
            raise self.failure.error

    def _run_loop(self) -> None:
        self.real_time |= prepare_real_time()
        self.loop.read_first()
        self.loop.run(self.stop)

    def _run_inference(self) -> None:
        self.real_time["inference SCHED_RR"] = prepare_lock_holder()
        self.scheduler.run(self.stop)

    def _thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=self._guard, args=(work,), name=name)
        thread.start()
        return thread

    def _guard(self, work: Callable[[], None]) -> None:
        """Run a thread's work; whatever it raises stops the run and is told at its end."""
        try:
            work()
        except BaseException as error:
            self.failure.keep(error)
        finally:
            self.stop.set()

    def _report_until_end(self, threads: Sequence[threading.Thread]) -> None:
        ends_s = time.monotonic() + self.seconds
        while not self.stop.wait(min(STATUS_PERIOD_S, max(0.0, ends_s - time.monotonic()))):
            self.say({"event": "status", **self.status()})
            if time.monotonic() >= ends_s:
                self.stop.set()
        for thread in threads:
            thread.join(JOIN_S)

    def status(self) -> dict[str, Any]:
        """The run so far, for a line on a terminal. Times in ms."""
        loop, scheduler = self.loop.status, self.scheduler.status
        start_ns = self.ticks.start_ns[: self.ticks.count]
        elapsed_s = (start_ns[-1] - start_ns[0]) / 1e9 if len(start_ns) > 1 else 0.0
        entries = self.chunks.entries[: self.chunks.count]
        latency = np.median(entries["published_ns"] - entries["started_ns"]) / 1e6 if len(entries) else None
        return {
            "t_s": round(elapsed_s, 3),
            "rate_hz": round((loop.ticks - 1) / elapsed_s, 2) if elapsed_s else None,
            "inference_p50_ms": None if latency is None else round(float(latency), 2),
            "ticks": loop.ticks,
            "missed": loop.missed,
            "refused": loop.refused,
            "faulty_ticks": loop.faulty_ticks,
            "chunks": scheduler.inferences,
            "late": scheduler.late,
            "stale": scheduler.stale,
            "delay_steps": scheduler.delay_steps,
        }


def compile_ahead(limits: JointLimits) -> None:
    """Compile (seconds at the very first run, then cached) on a state that drives nothing."""
    state = new_tick_state(limits, rate_hz=100.0, rows=2)
    state.measured_q[:] = limits.q_min
    publish(state.timeline, np.zeros((2, len(limits.q_min))), t0_ns=0, period_ns=1, now_ns=0)
    for now_ns in range(2):
        tick(state, now_ns)


def drive(config: DaemonConfig, stop: threading.Event, say: Say) -> None:
    """Open everything, refuse what does not fit, run, and write the records. Raises OnbeatError."""
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    robot = build_robot(from_json(config.robot))
    policy = load_policy(config.bundle, embodiment=robot.embodiment, threads=config.threads, seed=config.seed)
    policy.language.prompt(config.instruction)
    joints = load_joints(Path(robot.config.calibration), robot.joints)
    settings = BusSettings(baud_rate=robot.config.baud_rate, retries=robot.config.bus_retries)
    with ExitStack() as devices:
        cameras = [devices.enter_context(SharedFrameCamera(r, n)) for n, r in robot.config.cameras.items()]
        bus = devices.enter_context(FeetechBus(robot.config.port, joints, settings))
        session = Session(robot, policy, bus, cameras, config.instruction, config.seconds, say, stop)
        say({"event": "opened", "joints": robot.joints, "cameras": list(robot.config.cameras)})
        session.real_time["status SCHED_RR"] = prepare_lock_holder()
        try:
            session.run()
        finally:
            save_frames(Path(config.run_dir) / FRAMES_FOLDER, cameras)
            record.save(
                Path(config.run_dir),
                ticks=session.ticks,
                chunks=session.chunks,
                run={"started": started, "config": asdict(config), **outcome(session)},
            )


def outcome(session: Session) -> dict[str, Any]:
    """How a session went, as JSON takes it. modules: what this process has imported, by top-level name."""
    error = session.failure.error
    return {
        "joints": list(session.robot.joints),
        "policy_period_ns": session.robot.policy_period_ns,
        "robot": as_json(session.robot.config),
        "status": session.status(),
        "bus": session.bus.faults(),
        "real_time": session.real_time,
        "warm_up_ns": session.warm_up_ns,
        "dropped_records": session.ticks.dropped + session.chunks.dropped,
        "error": None if error is None else str(error) or type(error).__name__,
        "modules": loaded_modules(),
    }


def loaded_modules() -> list[str]:
    """The top-level names this process has imported, and every module of Onbeat."""
    names = list(sys.modules)
    return sorted({name.split(".")[0] for name in names} | {name for name in names if name.startswith("onbeat.")})


def save_frames(folder: Path, cameras: Sequence[Camera]) -> None:
    """The last frame of every camera, as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    for camera in cameras:
        frame = camera.latest()
        if frame is not None:
            Image.fromarray(frame.rgb).save(folder / f"{camera.name}.png")


def say_on_stdout(event: Mapping[str, Any]) -> None:
    """One line of JSON. A reader that has gone is no reason to stop: a signal ends this process."""
    try:
        print(json.dumps(event), flush=True)
    except BrokenPipeError:
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115  for the rest of the process


def main() -> int:
    """The process. Exit code 0, or 1 with an "error" event that says why."""
    end_with_parent()
    stop = stop_on_signal()
    try:
        drive(DaemonConfig.from_json(sys.stdin.read()), stop, say_on_stdout)
    except Exception as error:
        is_known = isinstance(error, OnbeatError)
        text = str(error) if is_known else f"{type(error).__name__}: {error}"
        say_on_stdout({"event": "error", "text": text, "is_known": is_known})
        if not is_known:
            raise
        return 1
    say_on_stdout({"event": "done"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
