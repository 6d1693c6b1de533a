"""What a robot did about the faults of a leg: detectors saw them, the table says what follows, the wire shows what did.

Goal k on the wire is that of tick k (drivers.twin.judge.compare_times sees to that), so that reactions are counted in
ticks, as the table's machine does, and no busy machine blurs them. T ticks, J joints.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.feetech.packets import RAD_PER_STEP
from onbeat.drivers.twin.judge import WireLimits, exceeded, moved
from onbeat.runtime.faults import ROW, TABLE, Fault, Level, Row
from onbeat.runtime.flight.reader import read_log
from onbeat.runtime.safety import BEHIND_TIME_S, LOAD_TIME_S, SafetySettings
from onbeat.runtime.soak_runner import Told
from onbeat.runtime.soak_schedule import Kind

LATE_S = 0.5  # after its slot, within which a fault still counts as that of its injection
BUSY_S = 0.1  # that a busy machine may add to the time of a detector, in half of the cases
TICK_S, CAMERA_S = 0.03, 0.2  # until a tick, or the camera watch on its second frame, can know
FOUND_S = {  # from the begin of an injection until its detector has it
    Fault.PERCEPTION_SHIFT: 0.4,  # three chunks
    Fault.CAMERA_STALE: 0.5 + TICK_S,
    Fault.CAMERA_CLOCK: CAMERA_S,
    Fault.CAMERA_FROZEN: CAMERA_S,
    Fault.CAMERA_BLANK: CAMERA_S,
    Fault.BUS_RETRIES: 0.15,
    Fault.BUS_SILENT: TICK_S,
    Fault.SERVO_LOAD: LOAD_TIME_S + TICK_S,
    Fault.SERVO_BEHIND: 0.5 + BEHIND_TIME_S,  # until the command has swayed away from the joint
    Fault.SERVO_HOT: TICK_S,
    Fault.SERVO_POWER: TICK_S,
    Fault.COMMAND_REFUSED: TICK_S,
}
MAX_LOAD = SafetySettings().max_load
LEAST_TICKS = 4  # that a reaction is judged over
SPEED_TICKS = 4  # over which the speed at its begin is taken


class Span(NamedTuple):
    """Ticks of one fault: first and last in which a detector saw it; end: the first that does not heed it any more."""

    first: int
    last: int
    end: int


class Window(NamedTuple):
    """Ticks [begin, end) in which the arm has to obey a level."""

    fault: Fault
    level: Level
    begin: int
    end: int


@dataclass(slots=True)
class Reaction:
    """Windows of a row and level: judged, too short to be, and broken.

    alone: judged, and no other row asked for as much. without: how many the control leg would break, which nothing
    slowed; what it would not break says little.
    """

    judged: int = 0
    alone: int = 0
    too_short: int = 0
    broken: int = 0
    without: int = 0


@lru_cache(maxsize=4)
def read_ticks(log: str) -> NDArray[np.void]:
    """(T,) of /tick."""
    return read_log(Path(log)).records("/tick", "seen", "load")


def spans_of(ticks: NDArray[np.void], row: Row, period_s: float) -> list[Span]:
    """When a fault was there."""
    seen = np.flatnonzero(ticks["seen"] >> int(row.fault) & 1)
    if len(seen) == 0:
        return []
    quiet = len(ticks) if row.ends_run else round(row.clears_after_s / period_s)
    gaps = np.flatnonzero(np.diff(seen) > quiet + 1)
    firsts, lasts = seen[[0, *(gaps + 1)]], seen[[*gaps, -1]]
    return [Span(int(a), int(b), min(int(b) + quiet + 1, len(ticks))) for a, b in zip(firsts, lasts, strict=True)]


def found_s(told: Told, period_s: float) -> Iterator[tuple[Kind, float | None]]:
    """How long after its begin each fault that was made had its row come up; None: not within its own time."""
    ticks = read_ticks(told.ended["log"])
    for kind in dict.fromkeys(due.kind for due in told.dues):
        onsets_ns = ticks["due_ns"][[span.first for span in spans_of(ticks, ROW[kind.fault], period_s)]]
        for due in told.dues:
            if due.kind == kind:
                after_s = onsets_ns * 1e-9 - told.moving_ns * 1e-9 - due.at_s
                mine_s = after_s[(after_s >= 0) & (after_s < kind.slot_s + LATE_S)]
                yield kind, float(mine_s[0]) if len(mine_s) else None


def made_of(legs: Sequence[Told], period_s: float) -> dict[Kind, list[float | None]]:
    """`found_s` of all times that a kind was made."""
    made: dict[Kind, list[float | None]] = {}
    for kind, after_s in (found for told in legs for found in found_s(told, period_s)):
        made.setdefault(kind, []).append(after_s)
    return made


def windows_of(ticks: NDArray[np.void], period_s: float) -> Iterator[Window]:
    """Whatever the table wants to be slow or to stand still: from the tick on in which it gets that bad."""
    for row in TABLE:
        then_ticks = round(row.then_after_s / period_s)
        for span in spans_of(ticks, row, period_s):
            yield Window(row.fault, row.reaction, span.first, span.end)
            worse = span.first + then_ticks
            seen = ticks["seen"][span.first : worse + 1] >> int(row.fault) & 1
            if row.then is not None and len(seen) > then_ticks and seen.all():
                yield Window(row.fault, row.then, worse, span.end)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What SLOW and HOLD mean on the wire: the limits, and (J,) rad/s of SLOW."""

    limits: WireLimits
    slow_rad_s: NDArray[np.float64]

    def broken_by(self, level: Level, steps: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which joints (J,) did not obey over goals (T, J)."""
        return moved(steps) if level == Level.HOLD else exceeded(steps, self.slow_rad_s, self.limits)

    def braking_ticks(self, level: Level, before: NDArray[np.int64]) -> int:
        """From the speed of goals (T, J), the last ones before a reaction, until it is reached.

        v / a for the path; the command is its mean over 2 a / j, and is behind it, as is the speed that was measured.
        """
        limits = self.limits
        speed = np.abs(before[-1] - before[0]) * RAD_PER_STEP / (max(1, len(before) - 1) * limits.period_s)
        over = np.maximum(0.0, speed - self.slow_rad_s * (level == Level.SLOW))
        return math.ceil(float((over / limits.a_max + 4 * limits.a_max / limits.j_max).max()) / limits.period_s)


def reactions(
    legs: Sequence[tuple[NDArray[np.void], NDArray[np.int64]]], control: NDArray[np.int64], bounds: Bounds
) -> dict[tuple[Fault, Level], Reaction]:
    """Of each row that slows or holds. legs: ticks, and their goals (T, J) in steps. control: those of its leg."""
    found: dict[tuple[Fault, Level], Reaction] = {}
    for ticks, steps in legs:
        windows = [w for w in windows_of(ticks, bounds.limits.period_s) if w.level >= Level.SLOW]
        for window in windows:
            if window.level <= Level.HOLD:
                reaction = found.setdefault((window.fault, window.level), Reaction())
                judged = reaction.judged
                judge_window(reaction, window, ticks["load"], steps, control, bounds)
                reaction.alone += reaction.judged - judged if is_alone(window, windows) else 0
    return found


def is_alone(window: Window, windows: Sequence[Window]) -> bool:
    """Whether no other row asks for as much at some moment of a window."""
    others = (w for w in windows if w.fault != window.fault and w.level >= window.level)
    return not any(w.begin < window.end and window.begin < w.end for w in others)


def judge_window(
    reaction: Reaction,
    window: Window,
    load: NDArray[np.float64],
    steps: NDArray[np.int64],
    control: NDArray[np.int64],
    bounds: Bounds,
) -> None:
    """Count what a window shows, once the arm had time to brake. A joint that pushes gives way, and is left out."""
    before = steps[max(0, window.begin - SPEED_TICKS) : window.begin + 1]
    begin = window.begin + bounds.braking_ticks(window.level, before)
    if window.end - begin < LEAST_TICKS:
        reaction.too_short += 1
        return
    is_judged = ~(np.abs(load[window.begin : window.end]) > MAX_LOAD).any(axis=0)
    reaction.judged += 1
    reaction.broken += bool((bounds.broken_by(window.level, steps[begin : window.end]) & is_judged).any())
    if window.end <= len(control):
        reaction.without += bool((bounds.broken_by(window.level, control[begin : window.end]) & is_judged).any())
