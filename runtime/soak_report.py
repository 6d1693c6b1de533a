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
from onbeat.runtime.robots import Robot
from onbeat.runtime.soak_reactions import BUSY_S, FOUND_S, Bounds, made_of, reactions, read_ticks
from onbeat.runtime.soak_runner import Told
from onbeat.runtime.soak_schedule import GUARDIANS, LETS_GO, OF_THE_MACHINE, TIMES, Kind

MEMORY_SLACK_MB = 24.0  # steps of 16 MB were seen in runs without faults, and not their cause: docs/decisions/0023
MEMORY_CREEP_MB_H = 30.0  # beside the largest such step; runs without a leak show 0
CREEP_LEG_S = 300.0  # from this length on; 30 MB/h are 2 MB in its last four fifths
LEAST_SAMPLES = 10
MISSING_SHARE = 0.2  # of the control leg's deadlines; 0.003 was the most on a machine with seven times too little time
MISSED_APART = 20  # deadlines by which both ends may count differently, or one in a hundred: the ends of a leg
UNDECIDED_SHARE = 0.01  # of the windows that the judge of jerk looks at; none was ever seen
GUARDIAN_S = 2.0  # beside the missed beats: to kill what hangs, have its memory freed, take the port, on a busy machine


@dataclass(frozen=True, slots=True)
class Wire:
    """What the twin recorded."""

    goals: NDArray[np.void]
    torque: Sequence[TorqueLine]
    limits: WireLimits
    slow_factor: float
    silence_s: float  # after which the guardian acts

    @classmethod
    def of(cls, folder: Path, robot: Robot) -> "Wire":
        """From a twin's folder; what the goals are allowed is the robot's."""
        config = robot.config
        box = config.tool_low_m, config.tool_high_m
        period_s = 1.0 / config.loop_rate_hz
        limits = WireLimits(*robot.limits, period_s, *box)
        silence_s = config.missed_beats * period_s
        return cls(read_goals(folder), read_torque(folder), limits, config.slow_factor, silence_s)

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.limits, self.slow_factor * self.limits.v_max)

    def goals_of(self, told: Told) -> NDArray[np.void]:
        t_ns = self.goals["t_ns"]
        return self.goals[(t_ns >= told.from_ns) & (t_ns <= told.until_ns)]

    def steps_of(self, told: Told) -> NDArray[np.int64]:
        """(T, J) of the ticks of a leg: its first goal is that of torque going on, and no tick's."""
        return self.goals_of(told)["goal_steps"][1:].astype(np.int64)

    def let_go_s(self, told: Told) -> float | None:
        """When every motor was without current, after the last goal before; None when that did not happen in a leg."""
        free_ns = [t.t_ns for t in self.torque if told.from_ns <= t.t_ns <= told.until_ns and not any(t.holds)]
        t_ns = self.goals_of(told)["t_ns"]
        return (free_ns[0] - int(t_ns[t_ns <= free_ns[0]].max(initial=told.from_ns))) * 1e-9 if free_ns else None


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
        "memory_mb": {name: memory_figures(told.memory_mb, told.leg.seconds) for name, told in long.items()},
        "made": made_figures([story.main, *story.again], wire),
        "reactions": reaction_figures(story, wire),
        "guardian_s": guardian_figures(story, wire),
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
    """Goals as they came against ticks as they were."""
    ticks = read_ticks(told.ended["log"])
    sent_ns = ticks["start_ns"] + ticks["compute_ns"]
    return compare_times(wire.goals_of(told)[1:], sent_ns, ticks["goal_rad"], wire.limits.period_s)


def made_figures(legs: Sequence[Told], wire: Wire) -> dict[str, Any]:
    """Per kind: how often it was made, how often its row came up in its own time, the median of how soon, and by when
    its detector must have it; None where that is up to the policy."""
    return {
        f"{kind.fault.name} ({kind.kind})": {
            "made": len(times),
            "found": len(found := [after_s for after_s in times if after_s is not None]),
            "after_s": round(float(np.median(found)), 3) if found else None,
            "within_s": FOUND_S.get(kind.fault),
        }
        for kind, times in made_of(legs, wire.limits.period_s).items()
    }


def reaction_figures(story: Story, wire: Wire) -> dict[str, dict[str, int]]:
    """Per row and level, of the legs whose goals are those of their ticks; what is not is a problem of its own."""
    legs = [(read_ticks(told.ended["log"]), wire.steps_of(told)) for told in (story.main, *story.again)]
    legs = [(ticks, steps) for ticks, steps in legs if len(ticks) == len(steps)]
    found = reactions(legs, wire.steps_of(story.control), wire.bounds)
    return {f"{fault.name} {level.name}": asdict(reaction) for (fault, level), reaction in sorted(found.items())}


def guardian_figures(story: Story, wire: Wire) -> dict[str, dict[str, Any]]:
    """From the last goal to the arm let go, in the legs whose guardian has to see to it."""
    took_s: dict[str, list[float]] = {}
    for told, kind in zip(story.short, story.endings, strict=True):
        let_go_s = wire.let_go_s(told)
        if kind.fault in GUARDIANS and let_go_s is not None:
            took_s.setdefault(kind.fault.name, []).append(round(let_go_s, 3))
    return {name: {"most": max(values), "within": wire.silence_s + GUARDIAN_S} for name, values in took_s.items()}


def memory_figures(samples_mb: Sequence[float], seconds: float) -> dict[str, Any]:
    """The medians of the second and the last fifth of a run, and how it creeps after the first fifth; None of too few.

    creep_mb_h: MB per hour of a line through the samples, without the largest step between two of them.
    """
    count, fifth = len(samples_mb), len(samples_mb) // 5
    if count < LEAST_SAMPLES:
        return {"samples": count, "early": None, "late": None, "creep_mb_h": None}
    settled = np.asarray(samples_mb[fifth:])
    step = int(np.argmax(np.abs(np.diff(settled))))
    settled[step + 1 :] -= settled[step + 1] - settled[step]
    creep = np.polyfit(np.arange(len(settled)) * seconds / count / 3600, settled, 1)[0]
    early, late = np.median(samples_mb[fifth : 2 * fifth]), np.median(samples_mb[-fifth:])
    return {"samples": count, "early": round(early, 1), "late": round(late, 1), "creep_mb_h": round(float(creep), 1)}


def problems(result: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the figures."""
    for name, count in result["fired"].items():
        if count < TIMES:
            yield f"{name} fired {count} times of {TIMES}"
    for name in result["control_fired"].keys() - {fault.name for fault in OF_THE_MACHINE}:
        yield f"{name} fired in the run without faults"
    for name, counts in result["violations"].items():
        yield from violation_problems(name, counts)
    for name, figures in result["runs"].items():
        yield from pace_problems(name, figures)
    for name, memory in result["memory_mb"].items():
        yield from memory_problems(name, memory, result["seconds"][name])
    yield from reaction_problems(result)
    for name, took in result["guardian_s"].items():
        if took["most"] > took["within"]:
            yield f"{name}: the arm was let go {took['most']} s after the last goal, {took['within']:g} s at most"


def violation_problems(name: str, counts: Mapping[str, int]) -> Iterator[str]:
    if Violations(**counts).total:
        yield f"{name}: limits violated on the wire: {counts}"
    if counts["undecided"] > UNDECIDED_SHARE * counts["windows"]:
        yield f"{name}: the jerk of {counts['undecided']} windows of {counts['windows']} could not be judged"


def pace_problems(name: str, run: Mapping[str, Any]) -> Iterator[str]:
    """Of a long leg's goals. With faults, what pauses the process makes it miss deadlines; without, nothing does."""
    due = run["goals"] + run["missing"]
    if run["problem"]:
        yield f"{name}: {run['problem']}"
    if name == "control" and run["missing"] > MISSING_SHARE * due:
        yield f"{name}: no goal came for {run['missing']} deadlines of {due}"
    if abs(run["missing"] - run["missed"]) > max(MISSED_APART, due // 100):
        yield f"{name}: {run['missing']} deadlines without a goal on the wire, {run['missed']} missed in the loop"


def memory_problems(name: str, memory: Mapping[str, Any], seconds: float) -> Iterator[str]:
    if memory["early"] is None:
        yield f"{name}: memory was looked at {memory['samples']} times only"
    elif memory["late"] > memory["early"] + MEMORY_SLACK_MB:
        yield f"{name}: memory grew from {memory['early']} to {memory['late']} MB"
    elif seconds >= CREEP_LEG_S and memory["creep_mb_h"] > MEMORY_CREEP_MB_H:
        yield f"{name}: memory creeps by {memory['creep_mb_h']} MB an hour"


def reaction_problems(result: Mapping[str, Any]) -> Iterator[str]:
    """Faults that were made and not found, or too late; and what the table says and the arm did not do."""
    for name, made in result["made"].items():
        if made["found"] < TIMES:
            yield f"{name}: made {made['made']} times, and found {made['found']} times in its own time"
        elif made["within_s"] is not None and made["after_s"] > made["within_s"] + BUSY_S:
            yield f"{name}: found after {made['after_s']} s in half of the cases, {made['within_s']:g} s is its time"
    for name, reaction in result["reactions"].items():
        if reaction["broken"]:
            yield f"{name}: not obeyed on the wire in {reaction['broken']} of {reaction['judged']} cases"


def ending_problems(story: Story, wire: Wire) -> Iterator[str]:
    """Short legs that did not end by their fault, or arms that were not let go where they had to be."""
    for told, kind in zip(story.short, story.endings, strict=True):
        name = kind.fault.name
        if told.ended_by != name:
            yield f"{name}: ended by {told.ended_by} ({told.ended.get('error')})"
        if kind.fault in LETS_GO and wire.let_go_s(told) is None:
            yield f"{name}: the arm was not let go"


def as_text(result: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    seconds = result["seconds"]
    lines = [f"seed {result['seed']}, {seconds['faults']:g} s with faults and {seconds['control']:g} s without", ""]
    lines.append(f"{'fault':<32}{'fired':>8}{'control':>10}")
    lines += [f"{name:<32}{n:>8}{result['control_fired'].get(name, 0):>10}" for name, n in result["fired"].items()]
    lines += ["", *_reaction_lines(result)]
    names = ("position", "velocity", "accel.", "jerk", "workspace", "undecided", "windows")
    lines += ["", f"{'outside limits on the wire':<28}" + "".join(f"{name:>11}" for name in names)]
    lines += [f"{name:<28}" + "".join(f"{n:>11}" for n in v.values()) for name, v in result["violations"].items()]
    lines += ["", *_run_lines(result), ""]
    lines += [f"{name}: let go {t['most']} s after the last goal at most" for name, t in result["guardian_s"].items()]
    lines += [f"in a leg of its own, for it had not fired often enough: {fault}" for fault in result["again"]]
    lines += [f"repeated: {leg}" for leg in result["repeated"]]
    return "\n".join([*lines, "", *(f"PROBLEM  {problem}" for problem in result["problems"])]).rstrip()


def _reaction_lines(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"{'made':<32}{'times':>8}{'found':>10}{'after s':>10}{'within s':>10}"
    for name, made in result["made"].items():
        after_s, within_s = ("-" if value is None else f"{value:g}" for value in (made["after_s"], made["within_s"]))
        yield f"{name:<32}{made['made']:>8}{made['found']:>10}{after_s:>10}{within_s:>10}"
    yield ""
    yield f"{'obeyed on the wire':<32}{'judged':>8}{'alone':>10}{'too short':>10}{'broken':>10}{'without':>10}"
    for name, reaction in result["reactions"].items():
        counts = {**reaction, "judged": reaction["judged"] or "none"}
        yield f"{name:<32}{counts['judged']:>8}" + "".join(
            f"{counts[what]:>10}" for what in ("alone", "too_short", "broken", "without")
        )


def _run_lines(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"{'ms':<28}{'least':>9}{'p50':>9}{'p99':>9}{'most':>9}"
    for name, run in result["runs"].items():
        for what, values in (
            ("sent to arrived", run["delay_ms"]),
            ("between sent", run["sent_ms"]),
            ("between arrived", run["arrived_ms"]),
        ):
            yield f"{name + ', ' + what:<28}" + "".join(f"{value:>9.3f}" for value in values)
    yield ""
    for name, run in result["runs"].items():
        memory = result["memory_mb"][name]
        yield (
            f"{name}: {run['goals']} goals came, {run['ticks']} were sent; {run['missing']} deadlines without one, "
            f"{run['missed']} missed; memory {memory['early']} MB early, {memory['late']} MB late, "
            f"{memory['creep_mb_h']} MB/h"
        )
