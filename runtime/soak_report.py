"""Judges a soak: by what came over the wire, beside what the runtimes and their guardians say."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.twin.judge import TickTimes, Violations, WireLimits, compare_times, count_violations
from onbeat.drivers.twin.records import TorqueLine, read_goals, read_torque
from onbeat.runtime.faults import Fault
from onbeat.runtime.flight.reader import read_log
from onbeat.runtime.robots import Robot
from onbeat.runtime.soak_runner import Told
from onbeat.runtime.soak_schedule import LETS_GO, OF_THE_MACHINE, TIMES, Kind

MEMORY_SLACK_MB = 24.0  # steps of 16 MB were seen in runs without faults, and not their cause: docs/decisions/0023


@dataclass(frozen=True, slots=True)
class Wire:
    """What the twin recorded."""

    goals: NDArray[np.void]
    torque: Sequence[TorqueLine]
    limits: WireLimits

    @classmethod
    def of(cls, folder: Path, robot: Robot) -> "Wire":
        """From a twin's folder; what the goals are allowed is the robot's."""
        config = robot.config
        box = config.tool_low_m, config.tool_high_m
        return cls(read_goals(folder), read_torque(folder), WireLimits(*robot.limits, 1.0 / config.loop_rate_hz, *box))

    def goals_of(self, told: Told) -> NDArray[np.void]:
        t_ns = self.goals["t_ns"]
        return self.goals[(t_ns >= told.from_ns) & (t_ns <= told.until_ns)]

    def has_let_go(self, told: Told) -> bool:
        """Whether every motor was without current at some moment of a leg."""
        return any(told.from_ns <= line.t_ns <= told.until_ns and not any(line.holds) for line in self.torque)


@dataclass(frozen=True, slots=True)
class Story:
    """What was run. endings: the kind of each short leg. again: legs with `hidden`, which had not fired often enough.
    repeated: legs that a busy machine ended, and that count for nothing but their violations."""

    main: Told
    control: Told
    short: Sequence[Told]
    endings: Sequence[Kind]
    again: Sequence[Told] = ()
    hidden: frozenset[str] = frozenset()
    repeated: Sequence[Told] = ()


def judge(story: Story, wire: Wire, wanted: frozenset[Fault]) -> dict[str, Any]:
    """The report: figures, and `problems`, which is empty when all is well."""
    fired = fired_of([story.main, *story.again, *story.short])
    groups: dict[str, Sequence[Told]] = {"faults": [story.main], "control": [story.control], "endings": story.short}
    groups |= {"again": story.again, "repeated": story.repeated}
    long = {told.leg.name: told for told in (story.main, story.control)}
    result: dict[str, Any] = {
        "seconds": {name: round(told.leg.seconds, 1) for name, told in long.items()},
        "fired": {fault.name: fired[fault.name] for fault in Fault if fault in wanted},
        "control_fired": dict(fired_of([story.control])),
        "violations": {name: asdict(violations_of(legs, wire)) for name, legs in groups.items() if legs},
        "runs": {name: run_figures(told, wire) for name, told in long.items()},
        "memory_mb": {name: memory_figures(told.memory_mb) for name, told in long.items()},
        "again": sorted(story.hidden),
        "repeated": [f"{told.leg.name}, ended by {told.ended_by}" for told in story.repeated],
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
    """A long run from both sides."""
    ended, times = told.ended, tick_times(told, wire)
    return {"ticks": ended["ticks"], "missed": ended["missed"], **asdict(times)}


def tick_times(told: Told, wire: Wire) -> TickTimes:
    """Goals as they came against ticks as they were; the first goal is that of torque going on, and no tick's."""
    ticks = read_log(Path(told.ended["log"])).records("/tick")
    sent_ns = ticks["start_ns"] + ticks["compute_ns"]
    return compare_times(wire.goals_of(told)[1:], sent_ns, ticks["goal_rad"], wire.limits.period_s)


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
        if figures["problem"]:
            yield f"{name}: {figures['problem']}"
    for name, memory in result["memory_mb"].items():
        if memory["late"] > memory["early"] + MEMORY_SLACK_MB:
            yield f"{name}: memory grew from {memory['early']} to {memory['late']} MB"


def ending_problems(story: Story, wire: Wire) -> Iterator[str]:
    """Short legs that did not end by their fault, or arms that were not let go where they had to be."""
    for told, kind in zip(story.short, story.endings, strict=True):
        name = kind.fault.name
        if told.ended_by != name:
            yield f"{name}: ended by {told.ended_by} ({told.ended.get('error')})"
        if kind.fault in LETS_GO and not wire.has_let_go(told):
            yield f"{name}: the arm was not let go"


def as_text(result: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    seconds = result["seconds"]
    lines = [f"seed {result['seed']}, {seconds['faults']:g} s with faults and {seconds['control']:g} s without", ""]
    lines.append(f"{'fault':<22}{'fired':>8}{'control':>10}")
    lines += [f"{name:<22}{n:>8}{result['control_fired'].get(name, 0):>10}" for name, n in result["fired"].items()]
    names = ("position", "velocity", "accel.", "jerk", "workspace")
    lines += ["", f"{'outside limits on the wire':<28}" + "".join(f"{name:>11}" for name in names)]
    lines += [f"{name:<28}" + "".join(f"{n:>11}" for n in v.values()) for name, v in result["violations"].items()]
    lines += ["", f"{'ms':<28}{'least':>9}{'p50':>9}{'p99':>9}{'most':>9}"]
    for name, run in result["runs"].items():
        for what, values in (
            ("sent to arrived", run["delay_ms"]),
            ("between sent", run["sent_ms"]),
            ("between arrived", run["arrived_ms"]),
        ):
            lines.append(f"{name + ', ' + what:<28}" + "".join(f"{value:>9.3f}" for value in values))
    lines.append("")
    for name, run in result["runs"].items():
        memory = result["memory_mb"][name]
        lines.append(
            f"{name}: {run['goals']} goals came, {run['ticks']} were sent; {run['missed']} deadlines missed; "
            f"memory {memory['early']} MB early, {memory['late']} MB late"
        )
    lines += [f"in a leg of its own, for it had not fired often enough: {fault}" for fault in result["again"]]
    lines += [f"repeated: {leg}" for leg in result["repeated"]]
    return "\n".join([*lines, "", *(f"PROBLEM  {problem}" for problem in result["problems"])]).rstrip()
