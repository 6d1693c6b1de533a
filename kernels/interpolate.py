"""Where a chunk is at a moment: the row that is in force, the fraction towards the next one, and the target between.

H rows of a chunk, J joints. Row k is due at t0_ns + k * period_ns. Source of the linear rule: ACT and its successors
send rows as set-points; joining them by lines is the least that makes one policy rate run on any loop rate.
"""

import numpy as np
from numpy.typing import NDArray

from onbeat.kernels.arrays import copy_values, fill_values
from onbeat.kernels.compiled import compiled

BEFORE_FIRST_ROW = -1


def interpolate_reference(
    targets: NDArray[np.float64], length: int, t0_ns: int, period_ns: int, now_ns: int, out: NDArray[np.float64]
) -> tuple[int, float]:
    """Write the target of `now_ns` into `out` (J,) and return (row, fraction of the way to the next row).

    targets: (H, J), of which `length` rows are used; times on the monotonic clock. Before row 0 is due: row -1 and
    NaN. In the last row's own period: that row, held. Later: row `length` and NaN. NaN means that no action is due.
    """
    row, elapsed_ns = divmod(now_ns - t0_ns, period_ns)
    if row < 0 or row >= length:
        out[:] = np.nan
        return (BEFORE_FIRST_ROW if row < 0 else length), 0.0
    if row == length - 1:
        out[:] = targets[row]
        return row, 0.0
    fraction = elapsed_ns / period_ns
    out[:] = targets[row] + fraction * (targets[row + 1] - targets[row])
    return row, fraction


@compiled
def interpolate(targets, length, t0_ns, period_ns, now_ns, out):
    """The compiled variant of `interpolate_reference`; allocates nothing."""
    row = (now_ns - t0_ns) // period_ns
    if row < 0 or row >= length:
        fill_values(out, np.nan)
        return (BEFORE_FIRST_ROW if row < 0 else length), 0.0
    if row == length - 1:
        copy_values(out, targets[row])
        return row, 0.0
    fraction = (now_ns - t0_ns - row * period_ns) / period_ns
    for joint in range(out.shape[0]):
        start = targets[row, joint]
        out[joint] = start + fraction * (targets[row + 1, joint] - start)
    return row, fraction


VARIANTS = {"numpy": interpolate_reference, "numba": interpolate}
