"""The machine that runs the fault table in every tick: what is there, since when, and what the robot does about it.

Compiled, on arrays allocated once, without a lock and without a clock of its own. Detectors outside the tick write
into `Inputs`; the tick asks `watch` for a level and obeys it:

    absent ──seen──▶ reaction ──seen for then_after_s──▶ then
      ▲                 │                                  │
      └── not seen for clears_after_s, unless it ends the run ──┘

What comes and goes gets worse only if it is there more often than not: the time for which it was seen counts down again
while it is not.

Each word of `Inputs` has one writer. What happened once is an event, a count that only grows; what lasts is a
condition, 1 while it is there.
"""

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.feetech.protocol import OK, PORT_LOST, SERVO_FAULT
from onbeat.drivers.feetech.tables import Status
from onbeat.kernels.arrays import copy_values
from onbeat.kernels.compiled import compiled
from onbeat.runtime.faults import TABLE, Fault, Level

# F faults, J joints.

SILENCE_NS: Final = 300_000_000  # without one good exchange, after which the bus counts as dead
LOAD_TIME_S = 0.5  # a servo that starts or meets the table pushes hard for a moment; and lets go of it for one
BEHIND_TIME_S = 0.2  # a seam or a load makes a servo lag for a moment
NO_FAULT = -1
SLOW: Final = int(Level.SLOW)
HOLD: Final = int(Level.HOLD)
LIMP: Final = int(Level.LIMP)
WORKSPACE: Final = int(Fault.WORKSPACE)
COMMAND_REFUSED: Final = int(Fault.COMMAND_REFUSED)
TICK_MISSED: Final = int(Fault.TICK_MISSED)
_CHUNK_MISSING: Final = int(Fault.CHUNK_MISSING)
_CAMERA_STALE: Final = int(Fault.CAMERA_STALE)
_BUS_RETRIES: Final = int(Fault.BUS_RETRIES)
_BUS_SILENT: Final = int(Fault.BUS_SILENT)
BUS_DEAD: Final = int(Fault.BUS_DEAD)
_PORT_LOST: Final = int(Fault.PORT_LOST)
_SERVO_LOAD: Final = int(Fault.SERVO_LOAD)
_SERVO_BEHIND: Final = int(Fault.SERVO_BEHIND)
_SERVO_HOT: Final = int(Fault.SERVO_HOT)
_STATUS_BITS: Final = np.array(  # which bits of a servo's status byte mean which fault
    [
        (Fault.SERVO_OVERLOAD, Status.OVERLOAD | Status.CURRENT),
        (Fault.SERVO_OVERHEAT, Status.TEMPERATURE),
        (Fault.SERVO_POWER, Status.VOLTAGE),
        (Fault.SERVO_SENSOR, Status.SENSOR | Status.ANGLE),
    ],
    np.int64,
)

RULE = np.dtype([(name, np.int64) for name in ("reaction", "then", "then_ticks", "clear_ticks", "ends_run")])
STATUS = np.dtype(
    [
        ("age", np.int64),  # ticks since it was first seen; 0 when it is not there
        ("quiet", np.int64),  # ticks since it was last seen
        ("lasts", np.int64),  # ticks in which it was seen, less those since then in which it was not
        ("level", np.int64),
        ("onsets", np.int64),  # how often it came
        ("seen", np.int64),  # of its events
    ]
)


@dataclass(frozen=True, slots=True)
class SafetySettings:
    """What a robot tolerates. max_frame_age_ms: of the newest frame of the slowest camera.

    max_load: of stall, 0..1. max_behind_rad: per joint, between command and measurement; 0 for any, as has a gripper
    that holds something; empty for no joint. max_temperature_c: of a servo's case, below the servo's own limit of 70.
    slow_factor: of the speed limit in SLOW. retry_burst, retry_rate_hz: exchanges that may need a retry, at once and
    for long.
    """

    max_frame_age_ms: float = 500.0
    max_load: float = 0.75
    max_behind_rad: tuple[float, ...] = ()
    max_temperature_c: float = 60.0
    slow_factor: float = 0.25
    retry_burst: float = 10.0
    retry_rate_hz: float = 5.0


class Thresholds(NamedTuple):
    """`SafetySettings` in the units of a tick. max_behind_rad: (J,), infinite for any."""

    max_frame_age_ns: int
    max_load: float
    load_ticks: int
    max_behind_rad: NDArray[np.float64]
    behind_ticks: int
    max_temperature_c: float
    slow_factor: float
    retry_burst: float
    retries_per_tick: float
    silent_ticks: int


class Inputs(NamedTuple):
    """What detectors tell. events, conditions: (F,) int64, each row written by its own detector.

    frame_ns: (1,) int64, stamp of the newest frame of the slowest camera, 0 while none is watched. bus_fault: (1,)
    int64, the newest exchange's code of feetech.protocol. retries: (1,) int64, attempts that failed so far.
    servo_status: (J,) uint8 as the servos sent it. temperature_c: (J,) float64.
    """

    events: NDArray[np.int64]
    conditions: NDArray[np.int64]
    frame_ns: NDArray[np.int64]
    bus_fault: NDArray[np.int64]
    retries: NDArray[np.int64]
    servo_status: NDArray[np.uint8]
    temperature_c: NDArray[np.float64]


class Safety(NamedTuple):
    """The machine. rules, status: (F,) of RULE and STATUS. level: (1,) int64, the worst of all faults.

    ended_by: (1,) int64, the first fault that ends the run, or NO_FAULT. loaded: (J,) int64, for how many ticks the
    load was too high, less those in which it was not, 0 to load_ticks; overloaded: (J,) int64, 1 from the one until the
    other. behind: (J,) int64, for how many ticks the joint was too far from its command. silent: (1,) int64, exchanges
    that failed in a row. bucket: (1,), retries over the budget. retries: (1,) int64, of Inputs.retries, what the last
    tick saw. seen: (1,) int64, bit k: an input of the last tick showed fault k, for inputs may change while it looks.
    frame_ns: (1,) int64, of Inputs.frame_ns, what it saw.
    """

    rules: NDArray[np.void]
    status: NDArray[np.void]
    inputs: Inputs
    thresholds: Thresholds
    level: NDArray[np.int64]
    ended_by: NDArray[np.int64]
    loaded: NDArray[np.int64]
    overloaded: NDArray[np.int64]
    behind: NDArray[np.int64]
    silent: NDArray[np.int64]
    bucket: NDArray[np.float64]
    retries: NDArray[np.int64]
    seen: NDArray[np.int64]
    frame_ns: NDArray[np.int64]


def new_safety(joints: int, period_s: float, settings: SafetySettings | None = None) -> Safety:
    """A machine in which nothing has happened, for a loop of that period."""
    counts = [np.zeros(1, np.int64) for _ in range(8)]
    return Safety(
        rules=_rules(period_s),
        status=np.zeros(len(TABLE), STATUS),
        inputs=Inputs(
            events=np.zeros(len(TABLE), np.int64),
            conditions=np.zeros(len(TABLE), np.int64),
            frame_ns=counts[0],
            bus_fault=counts[1],
            retries=counts[2],
            servo_status=np.zeros(joints, np.uint8),
            temperature_c=np.zeros(joints),
        ),
        thresholds=_thresholds(settings or SafetySettings(), joints, period_s),
        level=counts[3],
        ended_by=np.full(1, NO_FAULT, np.int64),
        loaded=np.zeros(joints, np.int64),
        overloaded=np.zeros(joints, np.int64),
        behind=np.zeros(joints, np.int64),
        silent=counts[4],
        bucket=np.zeros(1),
        retries=counts[5],
        seen=counts[6],
        frame_ns=counts[7],
    )


def _rules(period_s: float) -> NDArray[np.void]:
    rules = np.zeros(len(TABLE), RULE)
    for k, row in enumerate(TABLE):
        then = row.reaction if row.then is None else row.then
        times = (round(row.then_after_s / period_s), round(row.clears_after_s / period_s))
        rules[k] = (row.reaction, then, *times, row.ends_run)
    return rules


def _thresholds(settings: SafetySettings, joints: int, period_s: float) -> Thresholds:
    behind = settings.max_behind_rad or (0.0,) * joints
    return Thresholds(
        max_frame_age_ns=round(settings.max_frame_age_ms * 1e6),
        max_load=settings.max_load,
        load_ticks=max(1, round(LOAD_TIME_S / period_s)),
        max_behind_rad=np.array([bound or np.inf for bound in behind]),
        behind_ticks=round(BEHIND_TIME_S / period_s),
        max_temperature_c=settings.max_temperature_c,
        slow_factor=settings.slow_factor,
        retry_burst=settings.retry_burst,
        retries_per_tick=settings.retry_rate_hz * period_s,
        silent_ticks=math.ceil(SILENCE_NS / round(period_s * 1e9)),
    )


def report(safety: Safety, fault: Fault, times: int = 1) -> None:
    """A fault happened; the next tick sees it. For the one thread whose detector the row names."""
    safety.inputs.events[fault] += times


def set_condition(safety: Safety, fault: Fault, present: bool, /) -> None:
    """A fault lasts, or is over. For the one thread whose detector the row names."""
    safety.inputs.conditions[fault] = present


def onsets(safety: Safety) -> dict[str, int]:
    """How often each fault came."""
    return {fault.name: int(safety.status["onsets"][fault]) for fault in Fault}


@compiled
def note_exchange(safety, outcome, counts, status, temperature_c):
    """Tell what an exchange with the bus was. outcome, counts, status, temperature_c: as `exchange_joints` left them.

    For the loop, after every exchange. A servo's own fault comes with a good reply.
    """
    inputs, code = safety.inputs, outcome & 15
    inputs.bus_fault[0] = code
    failed = 0
    for k in range(counts.shape[0]):
        if OK < k < PORT_LOST:
            failed += counts[k]
    inputs.retries[0] = failed
    if code in (OK, SERVO_FAULT):
        copy_values(inputs.servo_status, status)
        copy_values(inputs.temperature_c, temperature_c)


@compiled
def note_joints(safety, command_q, measured_q):
    """Tell where the joints are, (J,) rad, after the command that was sent last. Once per tick, before `watch`."""
    longest = 0
    for j in range(safety.behind.shape[0]):
        is_behind = math.fabs(command_q[j] - measured_q[j]) > safety.thresholds.max_behind_rad[j]
        safety.behind[j] = safety.behind[j] + 1 if is_behind else 0
        longest = max(longest, safety.behind[j])
    safety.inputs.conditions[_SERVO_BEHIND] = longest >= max(1, safety.thresholds.behind_ticks)


@compiled
def watch(safety, now_ns, is_missing, load):
    """Look at everything once; returns the level that this tick must obey. Once per tick, before it moves.

    now_ns: monotonic. is_missing: a chunk was there before and no row is due now. load: (J,), of stall.
    """
    safety.seen[0] = 0
    _detect(safety, now_ns, is_missing, load)
    level = safety.status[COMMAND_REFUSED].level
    for fault in range(safety.status.shape[0]):
        if fault not in (WORKSPACE, COMMAND_REFUSED):
            level = max(level, observe(safety, fault))
    safety.level[0] = level
    return level


@compiled
def observe(safety, fault):
    """Advance one row by a tick; returns its level."""
    rule, status = safety.rules[fault], safety.status[fault]
    events = safety.inputs.events[fault]
    if events != status.seen or safety.inputs.conditions[fault] != 0:
        safety.seen[0] |= 1 << fault
        status.onsets += status.age == 0
        status.age += 1
        status.quiet = 0
        status.lasts += 1
    elif status.age > 0:
        status.age += 1
        status.quiet += 1
        status.lasts = status.age if rule.ends_run != 0 else max(0, status.lasts - 1)
        if status.quiet > rule.clear_ticks and rule.ends_run == 0:
            status.age = status.lasts = status.level = 0
    status.seen = events
    if status.age > 0:
        status.level = max(status.level, rule.then if status.lasts > rule.then_ticks else rule.reaction)
    if status.age > 0 and rule.ends_run != 0 and safety.ended_by[0] == NO_FAULT:
        safety.ended_by[0] = fault
    return status.level


@compiled
def note_late(safety, fault, present):
    """What the tick finds after `watch`: counted now, and part of the level of this tick."""
    safety.inputs.conditions[fault] = present
    safety.level[0] = max(safety.level[0], observe(safety, fault))


@compiled
def is_pushing(safety, joint, load):
    """Whether a joint pushes too hard now, load of stall, and has for too long, up to the last look."""
    return safety.overloaded[joint] != 0 and math.fabs(load) > safety.thresholds.max_load


@compiled
def pushes(safety, load):
    """Whether any joint's load (J,) is too high now."""
    for share in load:  # noqa: SIM110  compiled: any() of a generator is not
        if math.fabs(share) > safety.thresholds.max_load:
            return True
    return False


@compiled
def fault_bits(safety):
    """The faults that are there, one bit each."""
    bits = 0
    for fault in range(safety.status.shape[0]):
        if safety.status[fault].age > 0:
            bits |= 1 << fault
    return bits


@compiled
def _detect(safety, now_ns, is_missing, load):
    inputs, conditions, limits = safety.inputs, safety.inputs.conditions, safety.thresholds
    frame_ns = inputs.frame_ns[0]
    safety.frame_ns[0] = frame_ns
    conditions[_CHUNK_MISSING] = is_missing
    conditions[_CAMERA_STALE] = frame_ns != 0 and now_ns - frame_ns > limits.max_frame_age_ns
    _detect_bus(safety)
    conditions[_SERVO_LOAD] = _is_loaded(safety, load)
    conditions[_SERVO_HOT] = 0
    for celsius in inputs.temperature_c:
        if celsius > limits.max_temperature_c:
            conditions[_SERVO_HOT] = 1
    for k in range(_STATUS_BITS.shape[0]):
        conditions[_STATUS_BITS[k, 0]] = _shows(inputs.servo_status, _STATUS_BITS[k, 1])


@compiled
def _shows(servo_status, bits):
    """Whether any servo has one of these bits set."""
    for status in servo_status:  # noqa: SIM110  compiled: any() of a generator is not
        if status & bits != 0:
            return True
    return False


@compiled
def _detect_bus(safety):
    inputs, conditions, limits = safety.inputs, safety.inputs.conditions, safety.thresholds
    fault = inputs.bus_fault[0]
    is_silent = fault not in (OK, SERVO_FAULT, PORT_LOST)
    safety.silent[0] = safety.silent[0] + 1 if is_silent else 0
    failed = inputs.retries[0] - safety.retries[0]
    safety.retries[0] = inputs.retries[0]
    safety.bucket[0] = max(0.0, safety.bucket[0] + failed - limits.retries_per_tick)
    conditions[_BUS_RETRIES] = safety.bucket[0] > limits.retry_burst
    conditions[_BUS_SILENT] = is_silent
    conditions[BUS_DEAD] = safety.silent[0] >= limits.silent_ticks
    conditions[_PORT_LOST] = fault == PORT_LOST


@compiled
def _is_loaded(safety, load):
    """Whether a joint has pushed for too long, and not been free of it for as long since."""
    longest = 0
    for j in range(load.shape[0]):
        is_high = math.fabs(load[j]) > safety.thresholds.max_load
        safety.loaded[j] = min(max(safety.loaded[j] + (1 if is_high else -1), 0), safety.thresholds.load_ticks)
        if safety.loaded[j] in (0, safety.thresholds.load_ticks):
            safety.overloaded[j] = safety.loaded[j] != 0
        longest = max(longest, safety.overloaded[j])
    return longest != 0
