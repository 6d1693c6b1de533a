"""The parts of a tick, timed one call at a time by compiled code.

A file of its own, as compiled code is compiled again when anything changes that its file imports (kernels/compiled.py).
"""

from onbeat.kernels.clock import monotonic_ns
from onbeat.kernels.compiled import compiled
from onbeat.runtime.safety import watch
from onbeat.runtime.tick import tick
from onbeat.runtime.timeline import committed_target


@compiled
def time_look_up(state, now_ns, out_ns, timespec):
    """How long each of the calls takes; out_ns: (N,)."""
    for k in range(out_ns.shape[0]):
        begin_ns = monotonic_ns(timespec)
        committed_target(state.timeline, now_ns + k, state.target)
        out_ns[k] = monotonic_ns(timespec) - begin_ns


@compiled
def time_faults(state, now_ns, out_ns, timespec):
    """As `time_look_up`."""
    for k in range(out_ns.shape[0]):
        begin_ns = monotonic_ns(timespec)
        watch(state.safety, now_ns + k, False, state.measured_load)
        out_ns[k] = monotonic_ns(timespec) - begin_ns


@compiled
def time_ticks(state, now_ns, out_ns, timespec):
    """As `time_look_up`, a millisecond of the robot's time per call."""
    for k in range(out_ns.shape[0]):
        begin_ns = monotonic_ns(timespec)
        tick(state, now_ns + k * 1_000_000)
        out_ns[k] = monotonic_ns(timespec) - begin_ns
