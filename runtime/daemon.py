"""The process that drives: it owns the bus, the cameras, the policy and the loop, and knows nothing of the world.

    python -m onbeat.runtime.daemon < config.json

Reads a `DaemonConfig` as JSON on stdin and tells what happens as lines of JSON on stdout; ends on SIGTERM or
SIGINT with the arm at rest. Four threads: the one that has the arm, from torque on, through the loop, which is compiled
and needs no interpreter, to what `on_exit` says; the inference; one that writes the flight log; and this one, which
waits and reports. Whatever becomes of the others, the first brings the arm to its end by itself.
"""

import json
import select
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from onbeat.drivers.interfaces import Actuators, Camera
from onbeat.drivers.twin.frames import SharedFrameCamera
from onbeat.drivers.twin.lifeline import end_with_parent, stop_on_signal
from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.camera_watch import WATCH_PERIOD_S, CameraWatch
from onbeat.runtime.chunker import Chunker, Policy
from onbeat.runtime.faults import ROW, TABLE, Fault, Level
from onbeat.runtime.flight.encoding import PNG
from onbeat.runtime.flight.header import make_header
from onbeat.runtime.flight.reader import LOG_FOLDER
from onbeat.runtime.flight.recorder import Recorder
from onbeat.runtime.flight.view_pipe import ViewPipe
from onbeat.runtime.flight.writer import DEFAULT_BUDGET_BYTES
from onbeat.runtime.guard import Guard, end_arm
from onbeat.runtime.loop import ControlLoop, compile_ahead
from onbeat.runtime.mailbox import PROGRESS_WORDS, StateHistory
from onbeat.runtime.modes import ASYNC, choose_mode
from onbeat.runtime.policy import load_policy
from onbeat.runtime.profile.machine import MachineSampler
from onbeat.runtime.realtime import prepare_inference, prepare_loop, prepare_process
from onbeat.runtime.robots import RELAX, Robot, build_robot, from_json, open_bus
from onbeat.runtime.safety import NO_FAULT, onsets, report, set_condition
from onbeat.runtime.scheduler import Scheduler
from onbeat.runtime.tick import TickState, new_tick_state
from onbeat.runtime.timeline import refusals

STATUS_PERIOD_S = 0.2
JOIN_S = 10.0  # an inference that is under way when the run ends is waited for this long
LOOP, INFERENCE, RECORDS = "loop", "inference", "records"  # names of threads
SPARE_BYTES = 50_000_000  # on the log's disk: what coming to rest and the report take, many times over

Say = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """All that a daemon is told. robot: a RobotConfig as JSON, with port and cameras filled in. seconds: of motion.

    seed: of the policy's noise. run_dir: where the log goes. threads: of the inference engine. mode: one of
    modes.MODES, "" for the checkpoint's own. log_frames: encoding.PNG or JPEG. view: where it can be watched, as
    flight.view.open_stream takes it, "" for nowhere.
    """

    robot: Mapping[str, Any]
    bundle: str
    instruction: str
    seconds: float
    seed: int
    run_dir: str
    threads: int = 1
    mode: str = ""
    allow_untrained_prefix: bool = False
    log_budget_bytes: int = DEFAULT_BUDGET_BYTES
    log_frames: str = PNG
    view: str = ""

    @classmethod
    def from_json(cls, text: str) -> "DaemonConfig":
        return cls(**json.loads(text))


class RunEnded(OnbeatError):
    """A fault of the table ended the run; the arm came to rest, or was let go where the table says so."""


class RecordsLost(OnbeatError):
    """The log could not be written to its end. The arm was at its own before."""


class BusWithFaults(Actuators, Protocol):
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
    """A run on devices that are open: warm up, move for a while, come to rest. `run` is called once.

    guard: who acts when this process can not. free_bytes: of a folder.
    """

    robot: Robot
    policy: Policy
    bus: BusWithFaults
    cameras: Sequence[Camera]
    instruction: str
    seconds: float
    say: Say
    recorder: Recorder
    stop: threading.Event = field(default_factory=threading.Event)
    mode: str = ASYNC
    allow_untrained_prefix: bool = False
    guard: Guard | None = None
    free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free
    failure: Failure = field(default_factory=Failure)
    real_time: dict[str, str] = field(default_factory=dict)
    warm_up_ns: list[int] = field(default_factory=list)
    state: TickState = field(init=False)
    loop: ControlLoop = field(init=False)
    watch: CameraWatch = field(init=False)
    scheduler: Scheduler = field(init=False)

    def __post_init__(self) -> None:
        robot, rows, joints = self.robot, self.policy.spec.chunk, len(self.robot.joints)
        state = self.state = new_tick_state(
            robot.limits,
            rate_hz=robot.config.loop_rate_hz,
            rows=rows,
            workspace=robot.workspace(),
            settings=robot.safety,
        )
        history = StateHistory(joints)
        progress = None if self.guard is None else self.guard.words[:PROGRESS_WORDS]
        self.loop = ControlLoop(state, self.bus, history=history, progress=progress)
        self.watch = CameraWatch(self.cameras, history, state.safety)
        chunker = Chunker(self.policy, robot, state.timeline, self.mode, self.allow_untrained_prefix)
        self.scheduler = Scheduler(
            chunker,
            cameras=self.cameras,
            history=history,
            log=self.recorder.tell,
            instruction=self.instruction,
            safety=state.safety,
        )

    def run(self) -> None:
        """Everything from the first reading to rest and to what `on_exit` says.

        Raises what was raised first, here or in a thread, or RunEnded for a fault that ended the run, after the arm was
        brought to its end. Told to stop before that, it leaves torque as it is.
        """
        compile_ahead(self.robot.limits)
        self.real_time |= prepare_process()
        self.loop.read_first()
        self.warm_up_ns = self.scheduler.warm_up()
        if not self.stop.is_set():
            self._move()
        if self.failure.error is not None:
            raise self.failure.error

    def _move(self) -> None:
        """Start the threads, report, and wait for them; the arm's for as long as it takes, as the bus is its own."""
        work = {LOOP: self._drive_arm, INFERENCE: self._run_inference, RECORDS: self._keep_records}
        threads = [threading.Thread(target=self._guard, args=(run,), name=name) for name, run in work.items()]
        self._guard(lambda: self._start_and_report(threads))
        self.loop.stop()
        for thread in threads:
            if thread.ident is not None:
                thread.join(None if thread.name == LOOP else JOIN_S)

    def _start_and_report(self, threads: Sequence[threading.Thread]) -> None:
        for thread in threads:
            thread.start()
        self._report_until_end()

    def _drive_arm(self) -> None:
        """Torque on, the loop, and the end, in one thread: nothing else that the run waits for delays it."""
        self.real_time |= prepare_loop()
        if self.guard is not None:
            self.guard.arm()
        self._guard(self._run_loop)
        self._name_fault()
        self._end_arm()

    def _run_loop(self) -> None:
        self.loop.hold()
        self.loop.run()

    def _end_arm(self) -> None:
        """What the robot file says; a bus that does not obey is left to the guardian, which goes on asking."""
        is_limp, guard = self._is_limp(), self.guard
        if is_limp and guard is not None:
            guard.set_limp()
        end_arm(
            self.bus,
            self.robot,
            RELAX if is_limp else self.robot.config.on_exit,
            start_q=self.state.measured_q if np.isnan(self.state.command_q).any() else self.state.command_q,
            on_way=(lambda: None) if guard is None else guard.count_way,
        )
        if guard is not None:
            guard.release()

    def _is_limp(self) -> bool:
        """Whether a servo must not go on holding, whatever the robot file says and whatever ended the run first."""
        is_there = self.state.safety.status["age"] > 0
        return any(is_there[row.fault] and Level.LIMP in (row.reaction, row.then) for row in TABLE)

    def _name_fault(self) -> None:
        fault = int(self.state.safety.ended_by[0])
        if fault not in (NO_FAULT, Fault.STOP_REQUESTED):
            self.failure.keep(RunEnded(f"{Fault(fault).name}, {ROW[Fault(fault)].cause}: read docs/faults.md"))

    def _run_inference(self) -> None:
        self.real_time["inference SCHED_RR"] = prepare_inference()
        self.scheduler.run(self.stop)

    def _keep_records(self) -> None:
        self.recorder.run(self.loop.records, self.stop)

    def _guard(self, work: Callable[[], None]) -> None:
        """Do a part of a thread's work; its end stops the run, and whatever it raises is told then."""
        try:
            work()
        except BaseException as error:
            self.failure.keep(error)
            if threading.current_thread().name == INFERENCE:
                report(self.state.safety, Fault.INFERENCE_DIED)
        finally:
            self.stop.set()

    def _report_until_end(self) -> None:
        while self.loop.status.ticks == 0 and not self.stop.wait(WATCH_PERIOD_S):
            pass
        ends_s, next_status_s = time.monotonic() + self.seconds, 0.0
        while not self.stop.wait(min(WATCH_PERIOD_S, max(0.0, ends_s - time.monotonic()))):
            self.watch.look()
            if time.monotonic() >= next_status_s:
                next_status_s = time.monotonic() + STATUS_PERIOD_S
                self._look_around()
                self.say({"event": "status", **self.status()})
            if time.monotonic() >= ends_s:
                self.stop.set()

    def _look_around(self) -> None:
        """At what is no tick's and no camera's affair."""
        safety = self.state.safety
        set_condition(safety, Fault.GUARDIAN_LOST, self.guard is not None and not self.guard.is_watching())
        is_full = bool(self.recorder.error) or self.free_bytes(self.recorder.folder) < SPARE_BYTES
        set_condition(safety, Fault.DISK_FULL, is_full)

    def status(self) -> dict[str, Any]:
        """The run so far, for a line on a terminal. Times in ms."""
        loop, scheduler = self.loop.status, self.scheduler.status
        elapsed_s = max(0, loop.latest_ns - loop.started_ns) / 1e9 if loop.ticks > 1 else 0.0
        latest_ns = list(scheduler.latest_ns)
        latency = np.median(latest_ns) / 1e6 if latest_ns else None
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
            "wrong_clock": scheduler.wrong_clock,
            "withdrawn": scheduler.withdrawn,
            "delay_steps": scheduler.delay_steps,
            "bound_broken": scheduler.bound_broken,
            "warning": scheduler.warning,
            "level": Level(int(self.state.safety.level[0])).name,
            "faults": {name: count for name, count in onsets(self.state.safety).items() if count},
        }


def drive(config: DaemonConfig, stop: threading.Event, say: Say) -> None:
    """Open everything, refuse what does not fit, run, and write the log. Raises OnbeatError."""
    robot = build_robot(from_json(config.robot))
    policy = load_policy(
        config.bundle,
        embodiment=robot.embodiment,
        threads=config.threads,
        seed=config.seed,
        allow_untrained_prefix=config.allow_untrained_prefix,
    )
    mode = choose_mode(policy.spec, config.mode, allow_untrained_prefix=config.allow_untrained_prefix)
    policy.language.prompt(config.instruction)
    told = {name: value for name, value in asdict(config).items() if name != "robot"}
    sampler = MachineSampler((LOOP, INFERENCE, RECORDS))
    header = make_header(told, robot, policy.spec, mode=mode, sampler=sampler)
    with ExitStack() as devices:
        cameras = [devices.enter_context(SharedFrameCamera(r, n)) for n, r in robot.config.cameras.items()]
        bus = devices.enter_context(open_bus(robot))
        guard = devices.enter_context(Guard(robot, bus))
        view = devices.enter_context(ViewPipe(config.view, header)) if config.view else None
        recorder = devices.enter_context(open_recorder(config, header, sampler, view))
        session = Session(
            robot,
            policy,
            bus,
            cameras,
            config.instruction,
            config.seconds,
            say,
            recorder,
            stop,
            mode,
            config.allow_untrained_prefix,
            guard,
        )
        say({"event": "opened", "joints": robot.joints, "cameras": list(robot.config.cameras), "mode": mode})
        try:
            session.run()
        finally:
            recorder.finish(session.loop.records, outcome(session))
    if recorder.error:
        raise RecordsLost(f"the log in {recorder.folder} is incomplete ({recorder.error}): make room")


def open_recorder(
    config: DaemonConfig, header: Mapping[str, Any], sampler: MachineSampler, view: ViewPipe | None
) -> Recorder:
    """Begin the log. Raises RecordsLost."""
    folder = Path(config.run_dir) / LOG_FOLDER
    try:
        return Recorder(
            folder,
            header,
            budget_bytes=config.log_budget_bytes,
            form=config.log_frames,
            sampler=sampler,
            watch=None if view is None else view.show,
        )
    except OSError as error:
        raise RecordsLost(f"no log can be written in {folder} ({error.strerror}): name another with --out") from error


def outcome(session: Session) -> dict[str, Any]:
    """How a session went: /outcome of the log. modules: what this process has imported, by top-level name."""
    error = session.failure.error
    return {
        "error": None if error is None else str(error) or type(error).__name__,
        "status": session.status(),
        "faults": onsets(session.state.safety),
        "bus": session.bus.faults(),
        "refused_chunks": refusals(session.scheduler.timeline),
        "real_time": session.real_time,
        "warm_up_ns": session.warm_up_ns,
        "modules": loaded_modules(),
    }


def loaded_modules() -> list[str]:
    """The top-level names this process has imported, and every module of Onbeat."""
    names = list(sys.modules)
    return sorted({name.split(".")[0] for name in names} | {name for name in names if name.startswith("onbeat.")})


def say_on_stdout(event: Mapping[str, Any]) -> None:
    """One line of JSON. A reader that has gone is no reason to stop: a signal ends this process.

    Nor is one that does not read: what it would be told of the run so far is left out.
    """
    if event["event"] == "status" and not select.select([], [1], [], 0.0)[1]:
        return
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
