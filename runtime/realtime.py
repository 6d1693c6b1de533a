"""What helps a thread meet its deadlines, asked of the operating system and of the interpreter, in one place.

Nothing here is needed for the loop to be right. Each measure is "got" or "not got: why", and the answers stand in the
run's record, for a figure of lateness means nothing without them. Linux only.
"""

import ctypes
import gc
import os
import resource
from collections.abc import Callable
from typing import Final

FIFO_PRIORITY: Final = 50  # below the kernel's interrupt threads
INFERENCE_PRIORITY: Final = 1  # below the loop and above every ordinary thread
TIMER_SLACK_NS: Final = 1
_PR_SET_TIMERSLACK: Final = 29
_MCL_CURRENT: Final = 1
_MCL_FUTURE: Final = 2

_libc = ctypes.CDLL(None, use_errno=True)


def prepare_process() -> dict[str, str]:
    """Prepare the process before its threads start; each measure's answer by its name.

    Its memory stays in memory, and what objects there are now are out of the collector's sight. While memory is locked
    every thread that touches a new page waits, tens of ms for some hundred MB: so not beside an inference that counts.
    """
    return {name: _ask(measure) for name, measure in OF_PROCESS.items()}


def prepare_loop() -> dict[str, str]:
    """Prepare the calling thread, which is to run the loop: SCHED_FIFO, one processor, exact timers; the answers."""
    return {name: _ask(measure) for name, measure in OF_LOOP.items()}


def prepare_inference() -> str:
    """Run the calling thread, which infers, before ordinary ones: "got" or "not got: why".

    The loop does not need it. The robot does: what the policy sees is as old as an inference takes.
    """
    return _ask(lambda: schedule(os.SCHED_RR, INFERENCE_PRIORITY))


def schedule(policy: int, priority: int) -> None:
    """Set how the calling thread is scheduled; threads and processes started from it do not inherit it."""
    os.sched_setscheduler(0, policy | os.SCHED_RESET_ON_FORK, os.sched_param(priority))


def _ask(measure: Callable[[], None]) -> str:
    try:
        measure()
    except OSError as refusal:
        return f"not got: {refusal.strerror}"
    return "got"


def _run_first() -> None:
    schedule(os.SCHED_FIFO, FIFO_PRIORITY)


def _stay_on_one_processor() -> None:
    """The last one: interrupts and what else is bound by default sit on the first."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _make_timers_exact() -> None:
    _call(_libc.prctl, _PR_SET_TIMERSLACK, TIMER_SLACK_NS, 0, 0, 0)


def _lock_memory() -> None:
    """Under a limit, memory that is locked for the future would make a later allocation fail: then it is not asked."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit != resource.RLIM_INFINITY and os.geteuid() != 0:
        raise OSError(0, f"the limit is {limit // 1024} KiB, it must be unlimited (`ulimit -l`)")
    _call(_libc.mlockall, _MCL_CURRENT | _MCL_FUTURE)


def _freeze_objects() -> None:
    gc.collect()
    gc.freeze()


def _call(function: Callable[..., int], *arguments: int) -> None:
    if function(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


OF_PROCESS: Final[dict[str, Callable[[], None]]] = {"memory lock": _lock_memory, "gc.freeze": _freeze_objects}
OF_LOOP: Final[dict[str, Callable[[], None]]] = {
    "timer slack": _make_timers_exact,
    "affinity": _stay_on_one_processor,
    "SCHED_FIFO": _run_first,
}
