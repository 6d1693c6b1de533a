"""`onbeat soak`: every row of the fault table, again and again, on the twin; judged by what came over the wire.

    a long run with faults   what clears by itself, in two lanes (policy and seams; wire, servos and cameras)
    the same without         the control: nothing may fire but what the machine itself does
    short runs               what ends a run, each to its end

The limits are judged from the twin's record of goals, and the number of goals must be the one that the runtime says it
sent. Faults come from a schedule that the seed makes, at the far end of the wire where they can.
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.twin.client import RunningTwin, start_twin
from onbeat.drivers.twin.inject import Injection, inject
from onbeat.drivers.twin.judge import Violations, WireLimits, count_violations, merge_retries
from onbeat.drivers.twin.records import TorqueLine, read_goals, read_torque
from onbeat.embodiment.errors import OnbeatError
from onbeat.embodiment.slots import suggest
from onbeat.runtime.faults import Fault
from onbeat.runtime.robots import HOLD, RELAX, Robot, as_json, load_robot
from onbeat.runtime.soak_session import Act, Leg

TIMES = 5  # that every row has to fire
SETTLE_S = 1.5  # of a long run before its first fault
LEG_END_S = 30.0
COMPILE_S = 300.0  # before the first tick, where nothing was compiled yet
CLEAR_OF_THE_TABLE_M = 0.03  # or a dive would press on it until the servos give up, which is another fault
OVER_S = 0.2  # for the twin to take note
LONG = ("faults", "control")
MEMORY_SLACK_MB = 4.0
SAMPLE_S = 0.5
PAUSE_S = 0.035  # of the whole process: three periods of 10 ms


class Kind(NamedTuple):
    """How a fault is made. where: "seam", "wire" or "process". lasts_s; then quiet until slot_s after its begin."""

    fault: Fault
    where: str
    kind: str
    lasts_s: float
    slot_s: float


SEAM_LANE = (
    Kind(Fault.CHUNK_LATE, "seam", "late", 0.0, 0.8),
    Kind(Fault.CHUNK_EXPIRED, "seam", "expired", 0.0, 1.6),
    Kind(Fault.CHUNK_NOT_FINITE, "seam", "not_finite", 0.0, 0.4),
    Kind(Fault.CHUNK_OUTSIDE, "seam", "outside", 0.0, 0.4),
    Kind(Fault.CHUNK_STALE, "seam", "stale", 0.0, 0.6),
    Kind(Fault.CHUNK_OVERTAKEN, "seam", "overtaken", 0.0, 0.6),
    Kind(Fault.POLICY_RESTARTED, "seam", "restart", 0.0, 0.6),
    Kind(Fault.INSTRUCTION_CHANGED, "seam", "instruct", 0.0, 0.4),
    Kind(Fault.DELAY_OVER_BUDGET, "seam", "slow_policy", 0.0, 2.0),
    Kind(Fault.PERCEPTION_SHIFT, "seam", "low_gate", 0.7, 1.2),
    Kind(Fault.WORKSPACE, "seam", "dive", 3.0, 3.4),
    Kind(Fault.COMMAND_REFUSED, "seam", "refuse", 0.0, 0.4),
)
WIRE_LANE = (
    Kind(Fault.CAMERA_FROZEN, "wire", "camera_frozen", 1.4, 1.9),
    Kind(Fault.CAMERA_STALE, "wire", "camera_stopped", 0.8, 1.3),
    Kind(Fault.CAMERA_CLOCK, "wire", "clock_stalled", 0.35, 1.1),
    Kind(Fault.CAMERA_CLOCK, "wire", "clock_jumped", 0.35, 1.1),
    Kind(Fault.CAMERA_BLANK, "wire", "camera_blank", 0.3, 0.8),
    Kind(Fault.BUS_RETRIES, "wire", "flaky", 0.6, 2.0),
    Kind(Fault.BUS_SILENT, "wire", "silence", 0.08, 0.5),
    Kind(Fault.BUS_SILENT, "wire", "bad_checksum", 0.05, 0.4),
    Kind(Fault.BUS_SILENT, "wire", "short_reply", 0.05, 0.4),
    Kind(Fault.SERVO_LOAD, "wire", "loaded", 0.8, 1.5),
    Kind(Fault.SERVO_HOT, "wire", "hot", 0.2, 1.4),
    Kind(Fault.SERVO_POWER, "wire", "voltage", 0.2, 0.9),
    Kind(Fault.TICK_MISSED, "process", "pause", PAUSE_S, 0.5),
)
ENDINGS = (
    Kind(Fault.INFERENCE_DIED, "seam", "crash", 9.0, 0.5),
    Kind(Fault.DISK_FULL, "seam", "fill_disk", 9.0, 0.5),
    Kind(Fault.STOP_REQUESTED, "process", "terminate", 0.0, 0.5),
    Kind(Fault.GUARDIAN_LOST, "process", "kill_guardian", 0.0, 0.5),
    Kind(Fault.SERVO_OVERLOAD, "wire", "overload", 0.3, 0.5),
    Kind(Fault.SERVO_OVERHEAT, "wire", "overheat", 0.3, 0.5),
    Kind(Fault.SERVO_SENSOR, "wire", "sensor", 0.3, 0.5),
    Kind(Fault.BUS_DEAD, "wire", "silence", 1.2, 0.5),
    Kind(Fault.PORT_LOST, "wire", "unplugged", 1.2, 0.5),
    Kind(Fault.RUNTIME_DEAD, "process", "kill", 0.0, 0.5),
    Kind(Fault.RUNTIME_HUNG, "process", "hang", 0.0, 0.5),
)
OF_THE_MACHINE = (  # what a busy machine does without being asked, and the end
    Fault.TICK_MISSED,
    Fault.CHUNK_LATE,
    Fault.CHUNK_OVERTAKEN,
    Fault.CHUNK_MISSING,
    Fault.BUS_RETRIES,
    Fault.BUS_SILENT,
    Fault.STOP_REQUESTED,
)
LETS_GO = (
    *(Fault.SERVO_OVERHEAT, Fault.SERVO_SENSOR, Fault.BUS_DEAD, Fault.PORT_LOST),
    *(Fault.RUNTIME_DEAD, Fault.RUNTIME_HUNG),
)
GUARDIANS = (Fault.RUNTIME_DEAD, Fault.RUNTIME_HUNG)


class Due(NamedTuple):
    """A fault of a schedule: at_s after the first tick of its leg, at a joint."""

    kind: Kind
    at_s: float
    joint: int


def schedule(lane: Sequence[Kind], rng: np.random.Generator, seconds: float) -> list[Due]:
    """Every kind TIMES times, in random order, spread over `seconds` but no closer than their slots."""
    kinds = [lane[k] for k in rng.permutation(np.repeat(np.arange(len(lane)), TIMES))]
    spread = max(1.0, (seconds - SETTLE_S) / sum(kind.slot_s for kind in kinds))
    starts_s = SETTLE_S + spread * np.cumsum([0.0, *(kind.slot_s for kind in kinds[:-1])])
    return [Due(kind, float(at_s), int(rng.integers(6))) for kind, at_s in zip(kinds, starts_s, strict=True)]


def end_of(dues: Sequence[Due]) -> float:
    """When the last has had its slot, s."""
    return max((due.at_s + due.kind.slot_s for due in dues), default=0.0)


@dataclass(slots=True)
class Told:
    """What a leg told: the events of the runtime and of its guardian, and the memory of its process, MB."""

    leg: Leg
    ended: dict[str, Any] = field(default_factory=dict)
    guardian: dict[str, Any] = field(default_factory=dict)
    memory_mb: list[float] = field(default_factory=list)
    from_ns: int = 0
    until_ns: int = 0
    moving_ns: int = 0


class Runner:
    """The process that runs legs; a new one whenever the last is gone."""

    def __init__(self, twin: RunningTwin, log: Path) -> None:
        self._twin, self._log = twin, log
        self._process: subprocess.Popen[str] | None = None
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def run(self, leg: Leg, dues: Sequence[Due]) -> Told:
        """One leg, with what its schedule wants of the wire and of the process, to its very end."""
        process = self._start()
        assert process.stdin is not None
        told = Told(leg, from_ns=time.monotonic_ns())
        process.stdin.write(json.dumps(asdict(leg)) + "\n")
        process.stdin.flush()
        while self._take(told, process, dues):
            since_s = (time.monotonic_ns() - (told.moving_ns or told.from_ns)) * 1e-9
            if since_s > leg.seconds + (LEG_END_S if told.moving_ns else COMPILE_S):
                process.kill()
                raise SoakFailed(f"leg {leg.name} did not end: read {self._log}")
        told.until_ns = time.monotonic_ns()
        wait_until_over(dues, told.moving_ns)
        if leg.name in LONG:
            check_long(told, self._log)
        return told

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
            self._process.wait(LEG_END_S)

    def _take(self, told: Told, process: "subprocess.Popen[str]", dues: Sequence[Due]) -> bool:
        """Wait for the next thing that a leg tells; False when it was the last."""
        try:
            event = self._events.get(timeout=SAMPLE_S)
        except queue.Empty:
            told.memory_mb.append(memory_mb(process.pid))
            return True
        if event is None:
            self._process = None
            return False
        if event["event"] == "moving":
            told.memory_mb.clear()
            told.moving_ns = event["t_ns"]
            self._make_faults(dues, event["t_ns"], process.pid, event["guardian_pid"])
        elif event["event"] == "guardian":
            told.guardian = event
        elif event["event"] == "ended":
            told.ended = event
            return event["is_left_to_guardian"]
        return True

    def _make_faults(self, dues: Sequence[Due], start_ns: int, pid: int, guardian_pid: int) -> None:
        for due in dues:
            at_ns = start_ns + round(due.at_s * 1e9)
            if due.kind.where == "wire":
                until_ns = at_ns + round(due.kind.lasts_s * 1e9)
                inject(self._twin.run_dir, Injection(due.kind.kind, at_ns, until_ns, due.joint))
            elif due.kind.where == "process":
                wait_s = max(0.0, (at_ns - time.monotonic_ns()) * 1e-9)
                act = threading.Timer(wait_s, PROCESS_ACTS[due.kind.kind], (pid, guardian_pid))
                act.daemon = True
                act.start()

    def _start(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            with self._log.open("a") as log:
                command = [sys.executable, "-m", "onbeat.runtime.soak_session"]
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                )
            self._events = queue.Queue()
            threading.Thread(target=follow, args=(self._process, self._events), daemon=True).start()
        return self._process


class SoakFailed(OnbeatError):
    """A soak could not be carried out."""


def check_long(told: Told, log: Path) -> None:
    """Raises SoakFailed for a long run that did not last: its figures would mean nothing."""
    ended = told.ended
    if not ended:
        raise SoakFailed(f"the process of leg {told.leg.name} is gone ({told.guardian}): read {log}")
    if ended["ended_by"] != Fault.STOP_REQUESTED.name:
        why = f"{ended['ended_by']} after {ended['ticks']} ticks: {ended['error']}"
        raise SoakFailed(f"leg {told.leg.name} ended early, by {why}: give the machine to the soak alone")


def wait_until_over(dues: Sequence[Due], moving_ns: int) -> None:
    """Until no fault of a leg is shown any more: a session does not start on servos that report one."""
    over_s = max((due.at_s + due.kind.lasts_s for due in dues if due.kind.where == "wire"), default=0.0) + OVER_S
    time.sleep(max(0.0, moving_ns * 1e-9 + over_s - time.monotonic()))


def follow(process: "subprocess.Popen[str]", events: "queue.Queue[dict[str, Any] | None]") -> None:
    """Put what a process and its guardian say into `events`, and None once neither is there any more."""
    assert process.stdout is not None
    for line in process.stdout:
        events.put(json.loads(line))
    process.wait()
    events.put(None)


def pause(pid: int, _: int) -> None:
    """Stop a process for a moment; at real-time priority where allowed, or the moment gets long on a busy machine."""
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    os.kill(pid, signal.SIGSTOP)
    time.sleep(PAUSE_S)
    os.kill(pid, signal.SIGCONT)


PROCESS_ACTS = {
    "pause": pause,
    "terminate": lambda pid, _: os.kill(pid, signal.SIGTERM),
    "kill": lambda pid, _: os.kill(pid, signal.SIGKILL),
    "hang": lambda pid, _: os.kill(pid, signal.SIGSTOP),
    "kill_guardian": lambda _, guardian_pid: os.kill(guardian_pid, signal.SIGKILL),
}


def memory_mb(pid: int) -> float:
    """Of a process, resident; 0 when it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def soak(options: "Options", folder: Path) -> dict[str, Any]:
    """All of it; returns the report."""
    rng, robot = np.random.default_rng(options.seed), load_robot("so101-twin")
    lanes = [schedule(lane, rng, options.minutes * 60) for lane in (SEAM_LANE, WIRE_LANE)]
    dues = [due for lane in lanes for due in lane if options.wants(due.kind.fault)]
    endings = [kind for kind in ENDINGS if options.wants(kind.fault) for _ in range(TIMES)]
    seconds = max(options.minutes * 60, end_of(dues))
    with twin_runner(folder, options.seed) as (twin, runner):
        make = LegMaker(robot, twin, options.seed, folder)
        main = runner.run(make.leg("faults", seconds, dues), dues)
        control = runner.run(make.leg("control", seconds, []), [])
        short = [runner.run(*make.short(kinds, rng)) for kinds in endings]
        runner.close()
    wire = Wire(read_goals(twin.run_dir), read_torque(twin.run_dir), wire_limits(robot))
    return judge(Story(main, control, short, endings), wire, options)


@contextmanager
def twin_runner(folder: Path, seed: int) -> Iterator[tuple[RunningTwin, Runner]]:
    with start_twin(folder / "twin", seed=seed, attempt_timeout_s=1e6) as twin:
        yield twin, Runner(twin, folder / "soak.log")


@dataclass(frozen=True, slots=True)
class LegMaker:
    """Legs for one twin."""

    robot: Robot
    twin: RunningTwin
    seed: int
    folder: Path

    def leg(self, name: str, seconds: float, dues: Sequence[Due], on_exit: str = HOLD) -> Leg:
        config = replace(
            self.robot.config,
            port=self.twin.port,
            cameras=self.twin.frames,
            on_exit=on_exit,
            min_gate=0.2,
            tool_low_m=(*self.robot.config.tool_low_m[:2], CLEAR_OF_THE_TABLE_M),
        )
        acts = tuple(Act(d.kind.kind, d.at_s, d.kind.lasts_s) for d in dues if d.kind.where == "seam")
        return Leg(name, as_json(config), seconds, self.seed, str(self.folder), acts)

    def short(self, kind: Kind, rng: np.random.Generator) -> tuple[Leg, list[Due]]:
        """A leg that ends by a fault. The arm relaxes where it is the guardian that has to see to it."""
        due = Due(kind, kind.slot_s + float(rng.uniform(0, 0.2)), int(rng.integers(6)))
        is_guardians = kind.fault in (*GUARDIANS, Fault.PORT_LOST, Fault.BUS_DEAD)
        return self.leg(kind.fault.name, 20.0, [due], RELAX if is_guardians else HOLD), [due]


def wire_limits(robot: Robot) -> WireLimits:
    """Of a robot's goals, for the judge."""
    return WireLimits(*robot.limits, period_s=1.0 / robot.config.loop_rate_hz)


@dataclass(frozen=True, slots=True)
class Wire:
    """What the twin recorded."""

    goals: NDArray[np.void]
    torque: Sequence[TorqueLine]
    limits: WireLimits

    def goals_of(self, told: Told) -> NDArray[np.void]:
        t_ns = self.goals["t_ns"]
        return self.goals[(t_ns >= told.from_ns) & (t_ns <= told.until_ns)]

    def has_let_go(self, told: Told) -> bool:
        """Whether every motor was without current at some moment of a leg."""
        return any(told.from_ns <= line.t_ns <= told.until_ns and not any(line.holds) for line in self.torque)


@dataclass(frozen=True, slots=True)
class Story:
    """What was run. endings: the kind of each short leg."""

    main: Told
    control: Told
    short: Sequence[Told]
    endings: Sequence[Kind]

    @property
    def legs(self) -> Sequence[Told]:
        return (self.main, self.control, *self.short)


def judge(story: Story, wire: Wire, options: "Options") -> dict[str, Any]:
    """The report: figures, and `problems`, which is empty when all is well."""
    fired = fired_of([story.main, *story.short])
    result: dict[str, Any] = {
        "seed": options.seed,
        "seconds": round(story.main.leg.seconds, 1),
        "fired": {fault.name: fired[fault.name] for fault in Fault if options.wants(fault)},
        "control_fired": dict(fired_of([story.control])),
        "violations": {
            name: asdict(violations_of(told, wire))
            for name, told in (("faults", [story.main]), ("control", [story.control]), ("endings", story.short))
        },
        "runs": {told.leg.name: run_figures(told, wire) for told in (story.main, story.control)},
        "memory_mb": {told.leg.name: memory_figures(told.memory_mb) for told in (story.main, story.control)},
    }
    result["problems"] = [*problems(result), *ending_problems(story, wire)]
    return result


def fired_of(legs: Sequence[Told]) -> Counter[str]:
    """How often each fault came, as the runtimes and their guardians say."""
    counts: Counter[str] = Counter()
    for told in legs:
        counts.update({name: n for name, n in told.ended.get("faults", {}).items() if n})
        if "fault" in told.guardian and not told.ended:
            counts[told.guardian["fault"]] += 1
    return counts


def violations_of(legs: Sequence[Told], wire: Wire) -> Violations:
    return sum((count_violations(wire.goals_of(told), wire.limits) for told in legs), Violations())


def run_figures(told: Told, wire: Wire) -> dict[str, Any]:
    """A long run from both sides: goals on the wire against ticks, and the times between them, ms."""
    goals, ended = wire.goals_of(told), told.ended
    merged = merge_retries(goals, wire.limits.period_s)
    return {
        "goals_on_the_wire": len(goals),
        "goals_sent": 1 + ended["ticks"] - ended["faulty_ticks"] + ended["failed_attempts"],  # 1: torque goes on
        "ticks": ended["ticks"],
        "missed": ended["missed"],
        "wire_interval_ms": (np.percentile(np.diff(merged["t_ns"]), (50, 99)) / 1e6).round(3).tolist(),
        "loop_interval_ms": (np.array(ended["interval_ns"]) / 1e6).round(3).tolist(),
    }


def memory_figures(samples_mb: Sequence[float]) -> dict[str, float]:
    """The medians of the second and the last fifth of a run."""
    fifth = max(1, len(samples_mb) // 5)
    early, late = samples_mb[fifth : 2 * fifth], samples_mb[-fifth:]
    return {"early": round(float(np.median(early)), 1), "late": round(float(np.median(late)), 1)}


def problems(result: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the figures."""
    for name, count in result["fired"].items():
        if count < TIMES:
            yield f"{name} fired {count} times of {TIMES}"
    for name in result["control_fired"].keys() - {fault.name for fault in OF_THE_MACHINE}:
        yield f"{name} fired in the run without faults"
    for name, counts in result["violations"].items():
        if any(counts.values()):
            yield f"{name}: limits violated on the wire: {counts}"
    for name, figures in result["runs"].items():
        if figures["goals_on_the_wire"] != figures["goals_sent"]:
            yield f"{name}: {figures['goals_on_the_wire']} goals on the wire, {figures['goals_sent']} sent"
    for name, memory in result["memory_mb"].items():
        if memory["late"] > memory["early"] + MEMORY_SLACK_MB:
            yield f"{name}: memory grew from {memory['early']} to {memory['late']} MB"


def ending_problems(story: Story, wire: Wire) -> Iterator[str]:
    """Short legs that did not end by their fault, or arms that were not let go where they had to be."""
    for told, kind in zip(story.short, story.endings, strict=True):
        name = kind.fault.name
        ended_by = told.guardian.get("fault") if kind.fault in GUARDIANS else told.ended.get("ended_by")
        if ended_by != name:
            yield f"{name}: ended by {ended_by} ({told.ended.get('error')})"
        if kind.fault in LETS_GO and not wire.has_let_go(told):
            yield f"{name}: the arm was not let go"


def as_text(result: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    lines = [f"seed {result['seed']}, {result['seconds']:g} s with faults and as long without", ""]
    lines.append(f"{'fault':<22}{'fired':>8}{'control':>10}")
    lines += [f"{name:<22}{n:>8}{result['control_fired'].get(name, 0):>10}" for name, n in result["fired"].items()]
    lines += ["", f"{'outside limits on the wire':<28}{'position':>10}{'velocity':>10}{'accel.':>10}{'jerk':>10}"]
    lines += [f"{name:<28}" + "".join(f"{n:>10}" for n in v.values()) for name, v in result["violations"].items()]
    for name, run in result["runs"].items():
        p50, p99 = run["wire_interval_ms"]
        memory = result["memory_mb"][name]
        lines.append(
            f"\n{name}: {run['goals_on_the_wire']} goals on the wire, {run['goals_sent']} sent; "
            f"{run['missed']} deadlines missed; between goals p50 {p50} ms, p99 {p99} ms; "
            f"memory {memory['early']} MB early, {memory['late']} MB late"
        )
    return "\n".join([*lines, "", *(f"PROBLEM  {problem}" for problem in result["problems"] or ())]).rstrip()


@dataclass(frozen=True, slots=True)
class Options:
    """The command line. faults: the wanted ones."""

    minutes: float
    faults: frozenset[Fault]
    seed: int
    out: Path | None
    is_json: bool

    def wants(self, fault: Fault) -> bool:
        return fault in self.faults


def parse(argv: Sequence[str] | None) -> Options:
    """The command line, with its defaults and units."""
    parser = argparse.ArgumentParser(
        prog="onbeat soak",
        description="Make every fault of the table on the twin, and judge the arm by what came over its wire.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="of motion with faults, and as long without")
    parser.add_argument("--faults", default="all", help="'all', or names of the table with commas between")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule and of the motion")
    parser.add_argument("--out", type=Path, help="folder for soak.json and the twin's records")
    parser.add_argument("--json", action="store_true", dest="is_json", help="print the report as JSON")
    options = parser.parse_args(argv)
    return Options(options.minutes, wanted(options.faults), options.seed, options.out, options.is_json)


def wanted(text: str) -> frozenset[Fault]:
    """The faults that --faults names. Raises SoakFailed."""
    if text == "all":
        return frozenset(Fault)
    names = [name.strip().upper() for name in text.split(",")]
    unknown = [name for name in names if name not in Fault.__members__]
    if unknown:
        raise SoakFailed(f"there is no fault '{unknown[0]}': {suggest(unknown[0], Fault.__members__)}")
    return frozenset(Fault[name] for name in names)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit code 0 when every row fired, nothing violated a limit and all counts agree."""
    options = parse(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        result = soak(options, folder)
        if options.out is not None:
            (folder / "soak.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result) if options.is_json else as_text(result))
    return 0 if not result["problems"] else 1
