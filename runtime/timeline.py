"""The chunks a robot is committed to, as a ring of flat arrays: one producer publishes, one consumer looks up by time.

S slots, H the most rows of a chunk, J joints. A chunk takes over at a policy-step boundary of its own, its *seam*.
What a slot stores is the executed sequence: the rows before the seam are what the robot was committed to when the
chunk came, the rows from the seam on are the chunk's own. So the lookup is one rule, the newest chunk whose seam has
come, and a seam cannot jump:

    old chunk   o───o───o───o───o                    rows due one policy period apart
    new chunk           x───x───x───N───N───N        x: committed rows (the old ones at those times), N: its own
                        ▲           ▲
                   observation    `first_row`; the slot takes over one row earlier, where x is what the old says

`publish` and `committed_target` are compiled and, like `tick`, run with the interpreter lock held: each is one
indivisible step to every other thread. A slot is rewritten only when it holds the oldest chunk that is not in force.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from onbeat.kernels.interpolate import interpolate

SLOTS = 4
EMPTY = -1

LATE = -1  # every own row of the chunk was past, or the timeline is closed: it was counted and dropped


class Timeline(NamedTuple):
    """The ring. Times are monotonic ns; ids count from 0, -1 marks an empty slot.

    chunk_id, t0_ns, period_ns, length, first_row, seam_ns: (S,) int64. t0_ns is the due time of row 0, first_row the
    first row of the chunk's own, seam_ns when the slot takes over. targets: (S, H, J) float64 in rad, NaN where
    nothing was due. published, late: (1,) int64, how many chunks were accepted and how many dropped because every row
    was past. closed: (1,), not 0 once none are taken any more.
    """

    chunk_id: NDArray[np.int64]
    t0_ns: NDArray[np.int64]
    period_ns: NDArray[np.int64]
    length: NDArray[np.int64]
    first_row: NDArray[np.int64]
    seam_ns: NDArray[np.int64]
    targets: NDArray[np.float64]
    published: NDArray[np.int64]
    late: NDArray[np.int64]
    closed: NDArray[np.int64]


def new_timeline(rows: int, joints: int, slots: int = SLOTS) -> Timeline:
    """An empty ring for chunks of up to `rows` rows."""
    assert slots >= 2, slots
    return Timeline(
        chunk_id=np.full(slots, EMPTY, np.int64),
        t0_ns=np.zeros(slots, np.int64),
        period_ns=np.zeros(slots, np.int64),
        length=np.zeros(slots, np.int64),
        first_row=np.zeros(slots, np.int64),
        seam_ns=np.zeros(slots, np.int64),
        targets=np.full((slots, rows, joints), np.nan),
        published=np.zeros(1, np.int64),
        late=np.zeros(1, np.int64),
        closed=np.zeros(1, np.int64),
    )


def publish(
    timeline: Timeline, targets: NDArray[np.float64], *, t0_ns: int, period_ns: int, now_ns: int, locked_rows: int = 0
) -> int:
    """Commit a chunk and return its first row of its own, or LATE when none of its rows is still to come.

    targets: (R, J) rad, R <= H; row k is due at t0_ns + k * period_ns. `locked_rows` rows at the front are known to
    repeat what the robot is committed to. The first own row is the one after the next to come, so that the line to it
    starts on the old path; where nothing is committed it is the next to come.
    """
    assert targets.shape[1:] == timeline.targets.shape[2:], targets.shape
    assert 0 < len(targets) <= timeline.targets.shape[1], targets.shape
    return int(_publish(timeline, np.ascontiguousarray(targets, np.float64), t0_ns, period_ns, now_ns, locked_rows))


def close(timeline: Timeline) -> None:
    """Withdraw every chunk and take no more: from now on no action is due, so the robot comes to rest."""
    timeline.closed[0] = 1
    timeline.chunk_id.fill(EMPTY)


@njit(cache=True)
def _publish(timeline, targets, t0_ns, period_ns, now_ns, locked_rows):
    length = targets.shape[0]
    slot = _free_slot(timeline, now_ns)
    stored = timeline.targets[slot]
    next_row = max(0, -((t0_ns - now_ns) // period_ns))
    timeline.chunk_id[slot] = EMPTY
    first_row = next_row
    if next_row < length and _is_committed(timeline, t0_ns + next_row * period_ns, stored[next_row]):
        first_row = max(next_row + 1, locked_rows)
    if first_row >= length or timeline.closed[0] != 0:
        timeline.late[0] += 1
        return LATE
    for row in range(first_row):
        committed_target(timeline, t0_ns + row * period_ns, stored[row])
    stored[first_row:length] = targets[first_row:]
    starts_on_old_path = first_row > next_row
    timeline.t0_ns[slot], timeline.period_ns[slot] = t0_ns, period_ns
    timeline.length[slot], timeline.first_row[slot] = length, first_row
    timeline.seam_ns[slot] = t0_ns + (first_row - 1 if starts_on_old_path else first_row) * period_ns
    timeline.chunk_id[slot] = timeline.published[0]
    timeline.published[0] += 1
    return first_row


@njit(cache=True)
def _free_slot(timeline, now_ns):
    """The slot of the oldest chunk that is not the one in force."""
    in_force = find_slot(timeline, now_ns)
    free = 0 if in_force != 0 else 1
    for slot in range(timeline.chunk_id.shape[0]):
        if slot != in_force and timeline.chunk_id[slot] < timeline.chunk_id[free]:
            free = slot
    return free


@njit(cache=True)
def _is_committed(timeline, at_ns, scratch):
    committed_target(timeline, at_ns, scratch)
    return not np.isnan(scratch).any()


@njit(cache=True)
def find_slot(timeline, now_ns):
    """The slot of the newest chunk whose seam has come by `now_ns`, or EMPTY."""
    best, best_id = EMPTY, EMPTY
    for slot in range(timeline.chunk_id.shape[0]):
        if timeline.chunk_id[slot] > best_id and timeline.seam_ns[slot] <= now_ns:
            best, best_id = slot, timeline.chunk_id[slot]
    return best


@njit(cache=True)
def committed_target(timeline, at_ns, out):
    """Write what the robot is committed to at `at_ns` into `out` (J,) and return (slot, row, fraction).

    NaN when no action is due. For a time to come this is the answer as of now: a chunk published later may replace it.
    """
    slot = find_slot(timeline, at_ns)
    if slot == EMPTY:
        out[:] = np.nan
        return slot, EMPTY, 0.0
    row, fraction = interpolate(
        timeline.targets[slot], timeline.length[slot], timeline.t0_ns[slot], timeline.period_ns[slot], at_ns, out
    )
    return slot, row, fraction
