"""The fault table: what can go wrong, what notices it, how soon, what the robot does, and how that ends.

The one place where this is said. `safety.py` is the machine that runs the table in every tick, tests take their rows
from here, and the page for people is made from it:

    python -m onbeat.runtime.faults --write      docs/faults.md

A *tick* is a period of the control loop. `within_ticks` counts from the tick in which the detector can first know (a
reply that fails, a threshold that is passed) to the tick whose command already shows the reaction.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from pathlib import Path

DOCUMENT = Path("docs/faults.md")


class Level(IntEnum):
    """What the robot does, mildest first; the worst of all present faults counts."""

    OK = 0
    WARN = 1  # counted and told; the motion is as it would be
    SLOW = 2  # the speed limit is scaled by robots.RobotConfig.slow_factor
    HOLD = 3  # braked within the limits, then kept where it is
    LIMP = 4  # torque off at once: for a servo that cannot be trusted to hold


class Fault(IntEnum):
    """The rows of the table, in its order; the number is the bit in tick records."""

    CHUNK_LATE = 0
    CHUNK_EXPIRED = auto()
    CHUNK_MISSING = auto()
    CHUNK_NOT_FINITE = auto()
    CHUNK_OUTSIDE = auto()
    CHUNK_STALE = auto()
    CHUNK_OVERTAKEN = auto()
    POLICY_RESTARTED = auto()
    INSTRUCTION_CHANGED = auto()
    DELAY_OVER_BUDGET = auto()
    PERCEPTION_SHIFT = auto()
    CAMERA_STALE = auto()
    CAMERA_CLOCK = auto()
    CAMERA_FROZEN = auto()
    CAMERA_BLANK = auto()
    BUS_RETRIES = auto()
    BUS_SILENT = auto()
    BUS_DEAD = auto()
    PORT_LOST = auto()
    SERVO_LOAD = auto()
    SERVO_BEHIND = auto()
    SERVO_HOT = auto()
    SERVO_OVERLOAD = auto()
    SERVO_OVERHEAT = auto()
    SERVO_POWER = auto()
    SERVO_SENSOR = auto()
    COMMAND_REFUSED = auto()
    WORKSPACE = auto()
    TICK_MISSED = auto()
    INFERENCE_DIED = auto()
    DISK_FULL = auto()
    STOP_REQUESTED = auto()
    GUARDIAN_LOST = auto()
    RUNTIME_HUNG = auto()
    RUNTIME_DEAD = auto()


@dataclass(frozen=True, slots=True)
class Row:
    """One fault. reaction holds while the fault is there and for `clears_after_s` after it was last seen.

    then: the reaction once it was seen for `then_after_s` longer than not; None: it stays as it is. ends_run: the arm
    comes to rest, then the run ends as the robot's `on_exit` says. detector: what notices. policy: what else happens.
    """

    fault: Fault
    cause: str
    detector: str
    within_ticks: int
    reaction: Level
    policy: str
    then: Level | None = None
    then_after_s: float = 0.0
    clears_after_s: float = 0.0
    ends_run: bool = False


_RETRIES = "servo bus"
_CAMERA = "camera watch, 20 Hz"
_PUBLISH = "publish"

TABLE: tuple[Row, ...] = (
    Row(
        Fault.CHUNK_LATE,
        "a chunk comes later than the delay that it was planned with",
        _PUBLISH,
        1,
        Level.WARN,
        "rows that are past are dropped, the rest is spliced in",
    ),
    Row(
        Fault.CHUNK_EXPIRED,
        "a chunk comes after all of its rows were due",
        _PUBLISH,
        1,
        Level.WARN,
        "dropped; the chunk in force runs on",
    ),
    Row(
        Fault.CHUNK_MISSING,
        "the chunk in force has ended and no other has come",
        "tick: no row is due",
        1,
        Level.HOLD,
        "moves on with the next chunk",
    ),
    Row(
        Fault.CHUNK_NOT_FINITE,
        "a chunk has NaN or infinity in it",
        _PUBLISH,
        1,
        Level.WARN,
        "dropped; the chunk in force runs on",
    ),
    Row(
        Fault.CHUNK_OUTSIDE,
        "a chunk has a target far outside what a joint can do",
        _PUBLISH,
        1,
        Level.WARN,
        "dropped; the chunk in force runs on; one that overreaches a little is cut to the range",
    ),
    Row(
        Fault.CHUNK_STALE,
        "a chunk's observation is older than that of one taken before, or from the future",
        _PUBLISH,
        1,
        Level.WARN,
        "dropped; the chunk in force runs on",
    ),
    Row(
        Fault.CHUNK_OVERTAKEN,
        "a chunk comes before the last one's seam",
        _PUBLISH,
        1,
        Level.WARN,
        "the newer observation wins, from its own seam on",
    ),
    Row(
        Fault.POLICY_RESTARTED,
        "the policy starts anew while the arm moves",
        "inference thread",
        1,
        Level.WARN,
        "the chunk in force runs to its end, then CHUNK_MISSING",
    ),
    Row(
        Fault.INSTRUCTION_CHANGED,
        "another instruction in the middle of a chunk",
        "inference thread",
        1,
        Level.WARN,
        "chunks of the old one that come later are dropped; the one in force runs until the new one's seam",
    ),
    Row(
        Fault.DELAY_OVER_BUDGET,
        "d <= s <= H - d does not hold",
        "inference thread, per chunk",
        1,
        Level.WARN,
        "told with the three figures; at start it refuses the run",
        clears_after_s=1.0,
    ),
    Row(
        Fault.PERCEPTION_SHIFT,
        "the gate is below `min_gate` in 3 chunks in a row",
        "inference thread, per chunk",
        1,
        Level.SLOW,
        "what the cameras show is not what the policy knows",
        then=Level.HOLD,
        then_after_s=1.0,
    ),
    Row(
        Fault.CAMERA_STALE,
        "the newest frame of a camera is older than `max_frame_age_ms`",
        "tick: the oldest stamp",
        1,
        Level.SLOW,
        "no inference starts",
        then=Level.HOLD,
        then_after_s=0.5,
        clears_after_s=0.2,
    ),
    Row(
        Fault.CAMERA_CLOCK,
        "a camera's stamps stall while frames come, go back, or lie in the future",
        _CAMERA,
        1,
        Level.SLOW,
        "no inference starts",
        then=Level.HOLD,
        then_after_s=0.5,
        clears_after_s=0.5,
    ),
    Row(
        Fault.CAMERA_FROZEN,
        "a camera shows the same picture although the arm moved by more than 0.05 rad",
        _CAMERA,
        1,
        Level.HOLD,
        "chunks go on being made, and are not run",
        clears_after_s=0.2,
    ),
    Row(
        Fault.CAMERA_BLANK,
        "a camera's picture has no contrast",
        _CAMERA,
        1,
        Level.HOLD,
        "chunks go on being made, and are not run",
        clears_after_s=0.2,
    ),
    Row(
        Fault.BUS_RETRIES,
        "retries fill a bucket of 10 faster than it loses 5 a second",
        _RETRIES,
        1,
        Level.SLOW,
        "a loose cable announces itself",
        clears_after_s=1.0,
    ),
    Row(
        Fault.BUS_SILENT,
        "an exchange failed in every attempt",
        _RETRIES,
        1,
        Level.SLOW,
        "the next tick tries again",
        then=Level.HOLD,
        then_after_s=0.02,
        clears_after_s=0.1,
    ),
    Row(
        Fault.BUS_DEAD,
        "no good exchange for 0.3 s",
        _RETRIES,
        1,
        Level.HOLD,
        "goals go on being sent until the command rests",
        ends_run=True,
    ),
    Row(
        Fault.PORT_LOST,
        "the port is gone: the cable was pulled",
        _RETRIES,
        1,
        Level.HOLD,
        "servos hold their last goal; the guardian asks for the port for 10 s, then does as `on_exit` says",
        ends_run=True,
    ),
    Row(
        Fault.SERVO_LOAD,
        "the load of a servo stays above `max_load` for 0.5 s",
        "tick: load",
        1,
        Level.SLOW,
        "the joint gives way: its command is drawn back to where it is, until the load is gone",
        then=Level.HOLD,
        then_after_s=1.0,
        clears_after_s=0.2,
    ),
    Row(
        Fault.SERVO_BEHIND,
        "a joint stays further from its command than `max_behind_rad` for 0.2 s",
        "tick: command and measured joints",
        1,
        Level.SLOW,
        "it is held, pushed, or its servo does not obey",
        then=Level.HOLD,
        then_after_s=0.3,
        clears_after_s=0.5,
    ),
    Row(
        Fault.SERVO_HOT,
        "a servo is warmer than `max_temperature_c`",
        "tick: temperature",
        1,
        Level.SLOW,
        "before its own protection lets the joint fall",
        then=Level.HOLD,
        then_after_s=2.0,
        clears_after_s=1.0,
    ),
    Row(
        Fault.SERVO_OVERLOAD,
        "a servo reports overload or overcurrent",
        "tick: status byte",
        1,
        Level.HOLD,
        "the joint may have sagged: a person has to look",
        ends_run=True,
    ),
    Row(
        Fault.SERVO_OVERHEAT,
        "a servo reports that it is too hot",
        "tick: status byte",
        1,
        Level.HOLD,
        "torque goes once the arm rests",
        then=Level.LIMP,
        then_after_s=0.5,
        ends_run=True,
    ),
    Row(
        Fault.SERVO_POWER,
        "a servo reports a wrong supply voltage",
        "tick: status byte",
        1,
        Level.HOLD,
        "moves on when the supply is back",
        clears_after_s=0.5,
    ),
    Row(
        Fault.SERVO_SENSOR,
        "a servo reports that its encoder fails",
        "tick: status byte",
        1,
        Level.LIMP,
        "it cannot hold where it does not know it is",
        ends_run=True,
    ),
    Row(
        Fault.COMMAND_REFUSED,
        "a command is not finite or outside the limits, in the last check before the wire",
        "tick: last check",
        0,
        Level.HOLD,
        "not sent; the last command is kept",
        clears_after_s=0.1,
    ),
    Row(
        Fault.WORKSPACE,
        "the way to the next targets leads the tool out of the workspace",
        "tick: where the arm would come to rest",
        0,
        Level.HOLD,
        "rests inside, until a target leads back",
    ),
    Row(
        Fault.TICK_MISSED,
        "deadlines of the loop passed unused",
        "loop",
        1,
        Level.WARN,
        "never made up for",
        then=Level.SLOW,
        then_after_s=1.0,
        clears_after_s=0.2,
    ),
    Row(
        Fault.INFERENCE_DIED,
        "the inference thread raises",
        "its thread's guard",
        1,
        Level.HOLD,
        "the reason is told at the end",
        ends_run=True,
    ),
    Row(
        Fault.DISK_FULL,
        "less than 50 MB are left on the disk of the flight log, or it takes nothing any more",
        "status thread, 5 Hz",
        1,
        Level.HOLD,
        "what fits is written",
        ends_run=True,
    ),
    Row(
        Fault.STOP_REQUESTED,
        "Ctrl-C, SIGTERM, the supervisor's death, or the end of the run's time",
        "signal handler",
        1,
        Level.HOLD,
        "the ordinary end",
        ends_run=True,
    ),
    Row(
        Fault.GUARDIAN_LOST,
        "the guardian's process is gone, or stopped for 2 s",
        "status thread, 5 Hz",
        1,
        Level.HOLD,
        "nothing moves unguarded",
        ends_run=True,
    ),
    Row(
        Fault.RUNTIME_HUNG,
        "the loop makes no progress and its process keeps the port",
        "guardian: heartbeat, `missed_beats`; 10 s where no tick is due",
        40,
        Level.HOLD,
        "the guardian kills the process, takes the port, and does as `on_exit` says",
        ends_run=True,
    ),
    Row(
        Fault.RUNTIME_DEAD,
        "the runtime's process is gone: kill -9, out of memory, segmentation fault",
        "guardian: heartbeat, `missed_beats`, and the port's lock",
        40,
        Level.HOLD,
        "servos hold their last goal; the guardian takes the port and does as `on_exit` says",
        ends_run=True,
    ),
)

ROW: dict[Fault, Row] = {row.fault: row for row in TABLE}
assert [row.fault for row in TABLE] == list(Fault), "the table is in the order of the numbers"


def as_markdown() -> str:
    """The table for people."""
    head = "| fault | cause | detector | ticks | the robot | and | clears |"
    lines = [_line(row) for row in TABLE]
    return "\n".join([head, "|---|---|---|---|---|---|---|", *lines])


def _line(row: Row) -> str:
    cells = (f"`{row.fault.name}`", row.cause, row.detector, str(row.within_ticks), reaction_text(row), row.policy)
    return f"| {' | '.join((*cells, clearing_text(row)))} |"


def reaction_text(row: Row) -> str:
    """Such as "slow, hold after 0.5 s"."""
    text = row.reaction.name.lower()
    return text if row.then is None else f"{text}, {row.then.name.lower()} after {row.then_after_s:g} s"


def clearing_text(row: Row) -> str:
    """How the reaction ends."""
    if row.ends_run:
        return "ends the run"
    return f"by itself after {row.clears_after_s:g} s" if row.clears_after_s else "by itself"


def fault_names(bits: int) -> list[str]:
    """The names of the faults whose bits are set."""
    return [fault.name for fault in Fault if bits >> fault & 1]


def as_document() -> str:
    """docs/faults.md."""
    return f"""# What can go wrong, and what the robot does

Made by `python -m onbeat.runtime.faults --write` from the table that the loop runs; a test compares.

A *tick* is a period of the control loop. *ticks*: from the one in which the detector can first know to the one whose
command shows the reaction. The worst of all present faults counts: *warn* (counted and told), *slow* (the speed limit
is scaled by `slow_factor`), *hold* (braked within the limits, then kept), *limp* (torque off at once). It gets worse
"after" a time in which the fault was there, less the time in which it was not. What ends a run brings the arm to rest
first; then the robot file's `on_exit` says *hold*, *relax* or *park*.

{as_markdown()}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or write the document."""
    parser = argparse.ArgumentParser(prog="python -m onbeat.runtime.faults", description="The fault table in Markdown.")
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT} of the working directory")
    if parser.parse_args(argv).write:
        DOCUMENT.write_text(as_document(), encoding="utf-8")
    else:
        print(as_markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
