"""The figures of 0021: what faults, jerk and workspace cost a tick, what a jerk limit costs a motion, what gets out.

python docs/decisions/0021_fault_table.py
"""

import time

import numpy as np

from onbeat.kernels.compiled import compiled
from onbeat.kernels.kinematics import excess_m
from onbeat.runtime.robots import load_robot
from onbeat.runtime.tick import TickState, new_tick_state, tick
from onbeat.runtime.timeline import publish

HOME = np.array([0.0, -0.85, 0.6, 1.2, 0.0, 0.4])
ROBOT = load_robot("so101-twin")
REPEATS, TICKS = 15, 2000


@compiled
def run_ticks(state, count, start_ns):
    for k in range(count):
        tick(state, start_ns + k * 5_000_000)


def state(*, rate_hz: float = 200.0, has_box: bool = True, ramp_s: float = 0.02) -> TickState:
    """At HOME. ramp_s: a_max / j_max, 0 for no limit of the jerk."""
    j_max = ROBOT.limits.a_max / ramp_s if ramp_s else np.full(6, np.inf)
    box = ROBOT.workspace() if has_box else None
    made = new_tick_state(ROBOT.limits._replace(j_max=j_max), rate_hz=rate_hz, rows=16, workspace=box)
    made.measured_q[:] = HOME
    return made


def cost_us(made: TickState) -> float:
    """The median of repeated loops of ticks."""
    publish(made.timeline, np.tile(HOME + 0.2, (16, 1)), t0_ns=0, period_ns=10**12, now_ns=0)
    run_ticks(made, 10, 0)
    times = []
    for k in range(REPEATS):
        begin = time.perf_counter()
        run_ticks(made, TICKS, 10**10 * (k + 1))
        times.append((time.perf_counter() - begin) / TICKS * 1e6)
    return float(np.median(times))


def arrival(rate_hz: float, ramp_s: float) -> tuple[float, float]:
    """(s until a joint has turned by 1.5 rad, its largest jerk in rad/s^3)."""
    made, commands = state(rate_hz=rate_hz, has_box=False, ramp_s=ramp_s), []
    publish(made.timeline, np.tile(HOME + np.array([1.5, 0, 0, 0, 0, 0]), (16, 1)), t0_ns=0, period_ns=10**9, now_ns=0)
    for k in range(int(1.5 * rate_hz)):
        tick(made, k * round(1e9 / rate_hz))
        commands.append(made.command_q[0])
    jerk = np.abs(np.diff(commands, n=3)).max() * rate_hz**3
    return float(np.argmax(np.abs(np.array(commands) - 1.5) < 1e-9)) / rate_hz, float(jerk)


def worst_excess_mm(schedules: int) -> float:
    """How far the tool of random chunks got out of its box."""
    rng, worst = np.random.default_rng(0), -np.inf
    for _ in range(schedules):
        made, now_ns, box = state(rate_hz=100.0), 10**9, ROBOT.workspace()
        for _ in range(10):
            rows = rng.uniform(ROBOT.limits.q_min, ROBOT.limits.q_max, (16, 6))
            publish(made.timeline, rows, t0_ns=now_ns, period_ns=10**8, now_ns=now_ns)
            for _ in range(int(rng.integers(5, 80))):
                tick(made, now_ns)
                now_ns += 10**7
                worst = max(worst, excess_m(made.command_q, box))
    return worst * 1e3


def main() -> None:
    print("us per tick, six joints, inside compiled code, p50")
    print(f"  all                    {cost_us(state()):.2f}")
    print(f"  no workspace           {cost_us(state(has_box=False)):.2f}")
    print(f"  no workspace, no jerk  {cost_us(state(has_box=False, ramp_s=0.0)):.2f}")
    print("a_max / j_max, s: arrival after 1.5 rad in s, largest jerk in rad/s^3, at 100, 200, 1000 Hz")
    for ramp_s in (0.0, 0.01, 0.02, 0.05, 0.1):
        cells = "   ".join("{:.3f} {:6.0f}".format(*arrival(rate, ramp_s)) for rate in (100.0, 200.0, 1000.0))
        print(f"  {ramp_s:<6}{cells}")
    print(f"tool out of its box at most, 300 random schedules: {worst_excess_mm(300):.2f} mm")


if __name__ == "__main__":
    main()
