"""The life of the twin's processes: they end with their parent, or when asked, and the servos are never late."""

import ctypes
import gc
import os
import signal
import threading

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have the kernel send SIGTERM when the parent (the thread that started this process) ends. Linux only."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGTERM)


def claim_realtime(priority: int) -> bool:
    """Run before all ordinary processes, children not included; False when this user may not. Linux only.

    The last processor is left to the loop that drives the arm, which stays there: real servos take nobody's processor.
    Garbage is not collected from here on: a step makes no cycles.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors - {max(processors)} or processors)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
    except PermissionError:
        return False
    return True


def stop_on_signal() -> threading.Event:
    """A flag that SIGTERM and SIGINT set; for the main thread."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop
