"""The figures of 0023 on the judge: how much jerk over the limit it catches, from goals in whole steps.

python docs/decisions/0023_soak.py
"""

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.feetech.packets import RAD_PER_STEP
from onbeat.drivers.twin.judge import WINDOW, WINDOW_STEP, is_explained
from onbeat.kernels.limit import limit, smooth

PATHS, MOVES, MOVE_S = 30, 10, 0.45
V_MAX, A_MAX, J_MAX = 3.0, 20.0, 1000.0


def drawn_path(seed: int, reach_rad: float, ramp_ticks: int, dt: float) -> NDArray[np.float64]:
    """Random targets within reach, as fast as speed and acceleration permit, averaged over ramp_ticks."""
    rng = np.random.default_rng(seed)
    bounds = [np.array([bound]) for bound in (-4.0, 4.0, V_MAX, A_MAX)]
    q, v, out, ring, path = np.zeros(1), np.zeros(1), np.zeros(1), np.zeros((ramp_ticks, 1)), []
    target = np.zeros(1)
    for k in range(round(MOVES * MOVE_S / dt)):
        if k % round(MOVE_S / dt) == 0:
            target = rng.uniform(-reach_rad, reach_rad, 1)
        limit(q, v, target, *bounds, dt, q, v)
        ring[k % ramp_ticks] = q
        smooth(ring, k % ramp_ticks, np.array([ramp_ticks]), out)
        path.append(out[0])
    return np.array(path)


def is_caught(path: NDArray[np.float64], dt: float) -> bool:
    """By the judge, which sees the path in steps."""
    goals, bounds = np.rint(path / RAD_PER_STEP).astype(np.int64), np.array([V_MAX, A_MAX, J_MAX])
    starts = range(0, max(1, len(goals) - (WINDOW - WINDOW_STEP)), WINDOW_STEP)
    return any(is_explained(goals[start : start + WINDOW], bounds, dt) is False for start in starts)


def is_caught_by_differences(path: NDArray[np.float64], dt: float) -> bool:
    """By third differences over strides, each with what rounding may add: the simpler way, for comparison."""
    for stride in (1, 2, 4, 8, 16):
        difference = np.rint(path / RAD_PER_STEP) * RAD_PER_STEP
        for _ in range(3):
            difference = difference[stride:] - difference[:-stride]
        if np.abs(difference).max(initial=0) > J_MAX * (stride * dt) ** 3 + 4 * RAD_PER_STEP * (1 + 1e-9):
            return True
    return False


def main() -> None:
    print(f"{PATHS} paths of {MOVES} moves; a_max {A_MAX:g} rad/s^2, j_max {J_MAX:g} rad/s^3")
    print("   Hz   moves, rad   jerk / limit   over it   caught   by differences")
    for rate_hz, ramps in ((200, (8, 7, 6, 5, 4)), (100, (4, 3, 2))):
        for reach_rad in (0.2, 1.6):
            for ramp in ramps:
                paths = [drawn_path(seed, reach_rad, ramp, 1 / rate_hz) for seed in range(PATHS)]
                worst = [np.abs(np.diff(path, n=3)).max() * rate_hz**3 / J_MAX for path in paths]
                counts = [sum(value > 1.001 for value in worst)]
                counts += [
                    sum(judge(path, 1 / rate_hz) for path in paths) for judge in (is_caught, is_caught_by_differences)
                ]
                print(f"{rate_hz:>5}{2 * reach_rad:>13}{max(worst):>15.2f}{counts[0]:>10}{counts[1]:>9}{counts[2]:>17}")


if __name__ == "__main__":
    main()
