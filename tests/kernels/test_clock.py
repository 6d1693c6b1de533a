"""The compiled clock against Python's, and a sleep that never ends early, whatever interrupts it."""

import signal
import threading
import time

import pytest

from onbeat.kernels.clock import monotonic_ns, new_timespec, sleep_until

MS = 1_000_000


def test_reads_pythons_clock():
    timespec = new_timespec()
    monotonic_ns(timespec)
    before_ns, compiled_ns, after_ns = time.monotonic_ns(), monotonic_ns(timespec), time.monotonic_ns()
    assert before_ns <= compiled_ns <= after_ns


@pytest.mark.parametrize("ago_ns", [0, 1, 10**9])
def test_a_past_moment_is_not_waited_for(ago_ns: int):
    timespec = new_timespec()
    sleep_until(0, timespec)
    started_ns = time.monotonic_ns()
    assert sleep_until(started_ns - ago_ns, timespec) >= started_ns
    assert time.monotonic_ns() - started_ns < 500 * MS


def test_never_returns_early():
    timespec = new_timespec()
    for _ in range(20):
        due_ns = time.monotonic_ns() + 700_000
        returned_ns = sleep_until(due_ns, timespec)
        assert due_ns <= returned_ns <= time.monotonic_ns()


def test_a_signal_does_not_cut_it_short():
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    timer = threading.Timer(0.05, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
    try:
        due_ns = time.monotonic_ns() + 150 * MS
        timer.start()
        assert sleep_until(due_ns, new_timespec()) >= due_ns
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]


def test_other_threads_run_meanwhile():
    counted = 0
    sleeper = threading.Thread(target=sleep_until, args=(time.monotonic_ns() + 200 * MS, new_timespec()))
    sleeper.start()
    while sleeper.is_alive():
        counted += 1
    assert counted > 100
