"""The one clock, and sleeping to a moment on it, from compiled code that holds no lock. Linux only.

`monotonic_ns` reads what `time.monotonic_ns` reads. `sleep_until` takes an absolute time, so that neither lateness nor
a signal adds up: what is late once is not late again.
"""

from typing import Any, Final

import numpy as np
from numba import types
from numpy.typing import NDArray

from onbeat.kernels.compiled import compiled

_clock_gettime: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.voidptr))
_clock_nanosleep: Any = types.ExternalFunction(
    "clock_nanosleep", types.int32(types.int32, types.int32, types.voidptr, types.voidptr)
)

_CLOCK_MONOTONIC: Final = 1
_TIMER_ABSTIME: Final = 1
_NS_PER_S: Final = 1_000_000_000


def new_timespec() -> NDArray[np.int64]:
    """Scratch (2,) for the functions here: seconds and nanoseconds, one per thread."""
    return np.zeros(2, np.int64)


@compiled
def monotonic_ns(timespec: NDArray[np.int64]) -> int:
    """`time.monotonic_ns()`."""
    _clock_gettime(_CLOCK_MONOTONIC, timespec.ctypes)
    return timespec[0] * _NS_PER_S + timespec[1]


@compiled
def sleep_until(due_ns: int, timespec: NDArray[np.int64]) -> int:
    """Return at `due_ns` or later, at once when that is past, with the time it is; signals do not cut it short."""
    while True:
        timespec[0], timespec[1] = due_ns // _NS_PER_S, due_ns % _NS_PER_S
        _clock_nanosleep(_CLOCK_MONOTONIC, _TIMER_ABSTIME, timespec.ctypes, 0)
        now_ns = monotonic_ns(timespec)
        if now_ns >= due_ns:
            return now_ns
