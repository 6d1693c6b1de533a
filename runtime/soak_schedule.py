"""What a soak does to an arm and when: every row of the fault table, made where it would arise, from a seed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from onbeat.runtime.faults import Fault

TIMES = 5  # that every row has to fire
SETTLE_S = 1.5  # of a long run before its first fault
PAUSE_S = 0.035  # of the whole process: seven periods of 5 ms
ALL_JOINTS = tuple(range(6))


class Kind(NamedTuple):
    """How a fault is made. where: "seam", "wire" or "process". lasts_s; then quiet until slot_s after its begin.

    joints: of which one is chosen for each time.
    """

    fault: Fault
    where: str
    kind: str
    lasts_s: float
    slot_s: float
    joints: tuple[int, ...] = ALL_JOINTS


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
    Kind(Fault.PERCEPTION_SHIFT, "seam", "low_gate", 0.9, 1.4),
    Kind(Fault.WORKSPACE, "seam", "dive", 3.0, 3.4),
    Kind(Fault.COMMAND_REFUSED, "seam", "refuse", 0.0, 0.4),
)
WIRE_LANE = (
    Kind(Fault.CAMERA_FROZEN, "wire", "camera_frozen", 1.4, 1.9),
    Kind(Fault.CAMERA_STALE, "wire", "camera_stopped", 0.8, 1.3),
    Kind(Fault.CAMERA_CLOCK, "wire", "clock_stalled", 0.35, 1.1),
    Kind(Fault.CAMERA_CLOCK, "wire", "clock_jumped", 0.35, 1.1),
    Kind(Fault.CAMERA_BLANK, "wire", "camera_blank", 0.3, 0.8),
    Kind(Fault.SERVO_LOAD, "wire", "loaded", 0.8, 1.5),
    Kind(Fault.SERVO_HOT, "wire", "hot", 0.2, 1.4),
    Kind(Fault.SERVO_POWER, "wire", "voltage", 0.2, 0.9),
    Kind(Fault.TICK_MISSED, "process", "pause", PAUSE_S, 0.5),
)
RETRIES = (Kind(Fault.BUS_RETRIES, "wire", "flaky", 0.2, 3.4),)  # the bucket that it fills is empty after 3 s
SILENCES = (  # that fill the same bucket, so that all that comes later finds the arm slow: the last of the wire's lane
    Kind(Fault.BUS_SILENT, "wire", "silence", 0.12, 0.5),
    Kind(Fault.BUS_SILENT, "wire", "bad_checksum", 0.05, 0.4),
    Kind(Fault.BUS_SILENT, "wire", "short_reply", 0.05, 0.4),
)
ALONE = (  # nothing else may keep the arm from moving meanwhile; the joint that sways furthest in that time
    Kind(Fault.SERVO_BEHIND, "wire", "stuck", 1.2, 1.8, joints=(4,)),
)
IN_TURN = (ALONE, SEAM_LANE, WIRE_LANE, RETRIES, SILENCES)
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
    Fault.CHUNK_EXPIRED,
    Fault.DELAY_OVER_BUDGET,
    Fault.CAMERA_STALE,
    Fault.SERVO_BEHIND,  # of a twin that gets no processor
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


def schedule(
    groups: Sequence[Sequence[Kind]], rng: np.random.Generator, seconds: float, begin_s: float = SETTLE_S
) -> list[Due]:
    """Every kind TIMES times, in random order within its group, spread from begin_s to `seconds` but no closer than
    their slots. groups: one after the other."""
    kinds = [group[k] for group in groups for k in rng.permutation(np.repeat(np.arange(len(group)), TIMES))]
    spread = max(1.0, (seconds - begin_s) / sum(kind.slot_s for kind in kinds))
    starts_s = begin_s + spread * np.cumsum([0.0, *(kind.slot_s for kind in kinds[:-1])])
    return [Due(kind, float(at_s), int(rng.choice(kind.joints))) for kind, at_s in zip(kinds, starts_s, strict=True)]


def all_lanes(rng: np.random.Generator, seconds: float) -> list[Due]:
    """What wants the arm for itself, then both lanes side by side; in about `seconds`."""
    alone = schedule([ALONE], rng, 0.0)
    lanes = ([SEAM_LANE], [WIRE_LANE, RETRIES, SILENCES])
    return [*alone, *(due for lane in lanes for due in schedule(lane, rng, seconds, begin_s=end_of(alone)))]


def end_of(dues: Sequence[Due]) -> float:
    """When the last has had its slot, s."""
    return max((due.at_s + due.kind.slot_s for due in dues), default=0.0)
