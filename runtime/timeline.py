"""The chunks a robot is committed to, as a ring of flat arrays: one producer publishes, any reader looks up by time.

S slots, H the most rows of a chunk, J joints. A chunk takes over at a policy-step boundary of its own, its *seam*.
What a slot stores is the executed sequence: the rows before the seam are what the robot was committed to when the
chunk came, the rows from the seam on are the chunk's own, the first of them blended with the old where that is asked.
So the lookup is one rule, the newest chunk whose seam has come, and a seam cannot jump:

    old chunk   o───o───o───o───o                    rows due one policy period apart
    new chunk           x───x───x───N───N───N        x: committed rows (the old ones at those times), N: its own
                        ▲           ▲
                   observation    `first_row`; the slot takes over one row earlier, where x is what the old says

Nobody holds a lock. A slot is guarded by a sequence counter, so a reader in another thread never uses one that is
half written. What is rewritten is the oldest chunk that will not run any more; in a burst of more chunks than slots,
the newest, which no other continues. A chunk that must not run is refused whole, here, before any slot is touched.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onbeat.kernels.arrays import fill_values
from onbeat.kernels.atomics import begin_read, begin_write, end_write, is_intact, load_acquire, store_release
from onbeat.kernels.compiled import compiled
from onbeat.kernels.interpolate import interpolate
from onbeat.kernels.splice import splice

SLOTS = 16  # half a second of a camera at 30 Hz whose every frame gives a chunk
EMPTY = -1
NEVER = -(2**62)  # before every time there is
LOOKS = 8  # of a reader, at a ring that is written meanwhile; a writer needs milliseconds between two chunks

# Why a chunk was refused; each is counted in `Timeline.refused`.
EXPIRED = -1  # every row of its own is past
STALE = -2  # its observation is older than that of a chunk taken before, or lies in the future
NOT_FINITE = -3  # a row has NaN or infinity in it
OUTSIDE = -4  # a row is far outside what the joints can do
CLOSED = -5  # none are taken any more
REFUSALS = {EXPIRED: "expired", STALE: "stale", NOT_FINITE: "not finite", OUTSIDE: "outside", CLOSED: "closed"}


class Timeline(NamedTuple):
    """The ring. Times are monotonic ns; ids count from 0, -1 marks an empty slot.

    sequence: (S, 1) int64, odd while a slot is being written. chunk_id, t0_ns, period_ns, length, first_row, seam_ns:
    (S,) int64. t0_ns is the due time of row 0, first_row the first row of the chunk's own, seam_ns when the slot takes
    over. targets: (S, H, J) float64 in rad, NaN where nothing was due. lowest, highest: (J,) rad, a chunk with a row
    outside is refused. newest_t0_ns, published, closed: (1,) int64, of the newest chunk taken, how many were, and not
    0 once none are taken any more. refused: (5,) int64, by -1 - reason. progress_ns: (1,) int64, the last tick's time;
    met_ns: (1,) int64, what it was when the newest chunk came.
    """

    sequence: NDArray[np.int64]
    chunk_id: NDArray[np.int64]
    t0_ns: NDArray[np.int64]
    period_ns: NDArray[np.int64]
    length: NDArray[np.int64]
    first_row: NDArray[np.int64]
    seam_ns: NDArray[np.int64]
    targets: NDArray[np.float64]
    lowest: NDArray[np.float64]
    highest: NDArray[np.float64]
    newest_t0_ns: NDArray[np.int64]
    published: NDArray[np.int64]
    closed: NDArray[np.int64]
    refused: NDArray[np.int64]
    progress_ns: NDArray[np.int64]
    met_ns: NDArray[np.int64]


def new_timeline(
    rows: int,
    joints: int,
    slots: int = SLOTS,
    *,
    lowest: NDArray[np.float64] | None = None,
    highest: NDArray[np.float64] | None = None,
) -> Timeline:
    """An empty ring for chunks of up to `rows` rows. lowest, highest: (J,) rad, None for any finite target."""
    assert slots >= 2, slots
    return Timeline(
        sequence=np.zeros((slots, 1), np.int64),
        chunk_id=np.full(slots, EMPTY, np.int64),
        t0_ns=np.zeros(slots, np.int64),
        period_ns=np.zeros(slots, np.int64),
        length=np.zeros(slots, np.int64),
        first_row=np.zeros(slots, np.int64),
        seam_ns=np.zeros(slots, np.int64),
        targets=np.full((slots, rows, joints), np.nan),
        lowest=np.full(joints, -np.inf) if lowest is None else lowest,
        highest=np.full(joints, np.inf) if highest is None else highest,
        newest_t0_ns=np.full(1, NEVER, np.int64),
        published=np.zeros(1, np.int64),
        closed=np.zeros(1, np.int64),
        refused=np.zeros(len(REFUSALS), np.int64),
        progress_ns=np.full(1, NEVER, np.int64),
        met_ns=np.full(1, NEVER, np.int64),
    )


def publish(
    timeline: Timeline,
    targets: NDArray[np.float64],
    *,
    t0_ns: int,
    period_ns: int,
    now_ns: int,
    locked_rows: int = 0,
    blend_rows: int = 0,
) -> int:
    """Commit a chunk and return its first row of its own, or why it was refused: one of REFUSALS.

    targets: (R, J) rad, R <= H; row k is due at t0_ns + k * period_ns. locked_rows: at the front, known to repeat what
    the robot is committed to. The first own row is the one after the next to come, so that the line to it starts on
    the old path; where nothing is committed it is the next to come. blend_rows: own rows at most over which the old
    path fades out; none of a chunk whose seam lies where its locked rows end, for it continues the old path by itself.
    """
    assert targets.shape[1:] == timeline.targets.shape[2:], targets.shape
    assert 0 < len(targets) <= timeline.targets.shape[1], targets.shape
    rows = np.ascontiguousarray(targets, np.float64)
    return int(commit_chunk(timeline, rows, t0_ns, period_ns, now_ns, locked_rows, blend_rows))


def close(timeline: Timeline) -> None:
    """Withdraw every chunk and take no more: from now on no action is due, so the robot comes to rest."""
    store_release(timeline.closed, 0, 1)


def refusals(timeline: Timeline) -> dict[str, int]:
    """How many chunks were refused, by the names of REFUSALS."""
    return {name: int(timeline.refused[-1 - reason]) for reason, name in REFUSALS.items()}


def is_pending(timeline: Timeline, now_ns: int) -> bool:
    """Whether a chunk was taken whose seam is still to come. For the thread that publishes."""
    newest = timeline.chunk_id == timeline.published[0] - 1
    return bool(timeline.published[0] > 0 and (timeline.seam_ns[newest] > now_ns).any())


@compiled
def commit_chunk(timeline, targets, t0_ns, period_ns, now_ns, locked_rows, blend_rows):
    """The compiled `publish`. One thread calls it."""
    length = targets.shape[0]
    timeline.met_ns[0] = load_acquire(timeline.progress_ns, 0)
    ran_until_ns = max(now_ns, timeline.met_ns[0])  # the publisher may be slower than the loop
    next_row = find_next_row(t0_ns, period_ns, ran_until_ns)
    reason = _why_not(timeline, targets, t0_ns, now_ns, _first_row(timeline, t0_ns, period_ns, next_row, locked_rows))
    if reason != 0:
        timeline.refused[-1 - reason] += 1
        return reason
    slot = _free_slot(timeline, ran_until_ns)
    begin_write(timeline.sequence[slot])
    stored = timeline.targets[slot]
    for row in range(length):
        remembered_target(timeline, t0_ns + row * period_ns, stored[row])
    first_row = _first_row(timeline, t0_ns, period_ns, next_row, locked_rows)
    splice(stored[:length], targets, first_row, blend_rows if first_row > locked_rows else 0)
    timeline.t0_ns[slot], timeline.period_ns[slot] = t0_ns, period_ns
    timeline.length[slot], timeline.first_row[slot] = length, first_row
    timeline.seam_ns[slot] = t0_ns + (first_row - 1 if first_row > next_row else first_row) * period_ns
    timeline.chunk_id[slot] = timeline.published[0]
    end_write(timeline.sequence[slot])
    timeline.newest_t0_ns[0] = t0_ns
    store_release(timeline.published, 0, timeline.published[0] + 1)
    return first_row


@compiled
def find_next_row(t0_ns, period_ns, ran_until_ns):
    """The first row of a chunk that is not past at `ran_until_ns`."""
    return max(0, -((t0_ns - ran_until_ns) // period_ns))


@compiled
def _first_row(timeline, t0_ns, period_ns, next_row, locked_rows):
    """The first own row: behind the next to come and the locked ones, as far as anything is committed."""
    row = next_row
    while row < max(next_row + 1, locked_rows) and _is_committed(timeline, t0_ns + row * period_ns):
        row += 1
    return row


@compiled
def _why_not(timeline, targets, t0_ns, now_ns, first_row):
    """The reason to refuse a chunk, 0 for none."""
    if timeline.closed[0] != 0:
        return CLOSED
    if t0_ns > now_ns or t0_ns < timeline.newest_t0_ns[0]:
        return STALE
    if first_row >= targets.shape[0]:
        return EXPIRED
    for row in range(targets.shape[0]):
        for joint in range(targets.shape[1]):
            if not np.isfinite(targets[row, joint]):
                return NOT_FINITE
            if not timeline.lowest[joint] <= targets[row, joint] <= timeline.highest[joint]:
                return OUTSIDE
    return 0


@compiled
def _free_slot(timeline, now_ns):
    """The slot of the oldest chunk that will not run any more; where every one still will, that of the newest."""
    in_force = find_slot(timeline, now_ns)
    running_id = EMPTY if in_force == EMPTY else timeline.chunk_id[in_force]
    oldest = newest = 0
    for slot in range(timeline.chunk_id.shape[0]):
        if timeline.chunk_id[slot] < timeline.chunk_id[oldest]:
            oldest = slot
        if timeline.chunk_id[slot] > timeline.chunk_id[newest]:
            newest = slot
    is_over = timeline.chunk_id[oldest] == EMPTY or timeline.chunk_id[oldest] < running_id
    return oldest if is_over else newest


@compiled
def _is_committed(timeline, at_ns):
    """Whether an action is due at `at_ns`, as of now."""
    slot = find_slot(timeline, at_ns)
    if slot == EMPTY:
        return False
    return at_ns - timeline.t0_ns[slot] < timeline.length[slot] * timeline.period_ns[slot]


@compiled
def chunks_in_sight(timeline):
    """How many chunks there are to look at: those published, 0 once they are withdrawn.

    Who looks at one number of them, and at one time, finds the same whenever that is done: so a run can be replayed.
    """
    return 0 if load_acquire(timeline.closed, 0) != 0 else load_acquire(timeline.published, 0)


@compiled
def find_slot(timeline, now_ns):
    """The slot of the newest chunk whose seam has come by `now_ns`, or EMPTY. A slot that is being written is none."""
    return _find_slot_of(timeline, chunks_in_sight(timeline), now_ns)


@compiled
def _find_slot_of(timeline, in_sight, now_ns):
    best, best_id = EMPTY, EMPTY
    for slot in range(timeline.chunk_id.shape[0]):
        if begin_read(timeline.sequence[slot]) & 1:
            continue
        if best_id < timeline.chunk_id[slot] < in_sight and timeline.seam_ns[slot] <= now_ns:
            best, best_id = slot, timeline.chunk_id[slot]
    return best


@compiled
def committed_target(timeline, at_ns, out):
    """Write what the robot is committed to at `at_ns` into `out` (J,) and return (chunk id, its t0_ns, row, fraction).

    NaN when no action is due; id and row are -1 where no chunk has begun. For a time to come this is the answer as of
    now: a chunk published later may replace it.
    """
    return committed_target_of(timeline, chunks_in_sight(timeline), at_ns, out)


@compiled
def committed_target_of(timeline, in_sight, at_ns, out):
    """`committed_target` with only the first `in_sight` chunks that were ever published."""
    for _ in range(LOOKS):
        slot = _find_slot_of(timeline, in_sight, at_ns)
        if slot == EMPTY:
            break
        begun = begin_read(timeline.sequence[slot])
        chunk_id, t0_ns, period_ns = timeline.chunk_id[slot], timeline.t0_ns[slot], timeline.period_ns[slot]
        if chunk_id == EMPTY or timeline.seam_ns[slot] > at_ns or not is_intact(timeline.sequence[slot], begun):
            continue
        row, fraction = interpolate(timeline.targets[slot], timeline.length[slot], t0_ns, period_ns, at_ns, out)
        if is_intact(timeline.sequence[slot], begun):
            return chunk_id, t0_ns, row, fraction
    fill_values(out, np.nan)
    return EMPTY, NEVER, EMPTY, 0.0


@compiled
def remembered_target(timeline, at_ns, out):
    """`committed_target` for the thread that publishes, also for times whose chunk is overwritten: (J,) into `out`.

    The oldest chunk that is left has in its front rows what the robot was committed to since its observation, and no
    observation to come is older. NaN where nothing was due, or where nothing that is left knows.
    """
    in_sight = chunks_in_sight(timeline)
    if committed_target_of(timeline, in_sight, at_ns, out)[0] != EMPTY or in_sight == 0:
        return
    oldest = _oldest_whole_slot(timeline)
    if oldest != EMPTY and timeline.chunk_id[oldest] != EMPTY:
        t0_ns, period_ns, length = timeline.t0_ns[oldest], timeline.period_ns[oldest], timeline.length[oldest]
        interpolate(timeline.targets[oldest], length, t0_ns, period_ns, at_ns, out)


@compiled
def _oldest_whole_slot(timeline):
    """The slot of the oldest chunk, an empty one before any; EMPTY while all are being written."""
    oldest = EMPTY
    for slot in range(timeline.chunk_id.shape[0]):
        if timeline.sequence[slot, 0] & 1:
            continue
        if oldest == EMPTY or timeline.chunk_id[slot] < timeline.chunk_id[oldest]:
            oldest = slot
    return oldest
