"""What is asked of the operating system: a refusal is told and stops nothing, and what was got really holds."""

import gc
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from onbeat.runtime import realtime
from onbeat.runtime.realtime import (
    FIFO_PRIORITY,
    INFERENCE_PRIORITY,
    OF_LOOP,
    OF_PROCESS,
    prepare_inference,
    prepare_loop,
    prepare_process,
)

pytestmark = pytest.mark.alone

IS_ROOT = os.geteuid() == 0


@pytest.fixture(autouse=True)
def _ordinary_process() -> Iterator[None]:
    """Measures of the whole process are given back."""
    yield
    gc.unfreeze()
    realtime._libc.munlockall()


def in_thread(work: Callable[[], object]) -> object:
    """What `work` returns, from a thread of its own: this one keeps its scheduling."""
    result: list[object] = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()
    thread.join()
    return result[0]


def test_a_refusal_is_told_with_its_reason_and_the_others_are_asked(monkeypatch: pytest.MonkeyPatch):
    def refuse() -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setitem(OF_PROCESS, "memory lock", refuse)
    answers = prepare_process()
    assert answers == {"memory lock": "not got: Operation not permitted", "gc.freeze": "got"}
    monkeypatch.setitem(OF_LOOP, "SCHED_FIFO", refuse)
    answers = in_thread(prepare_loop)
    assert isinstance(answers, dict)
    assert answers["SCHED_FIFO"] == "not got: Operation not permitted"
    assert list(answers) == list(OF_LOOP)
    assert answers["timer slack"] == "got"


def test_a_limit_on_locked_memory_is_told_and_nothing_is_locked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(realtime.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(realtime.resource, "getrlimit", lambda _: (65536, 65536))
    answers = prepare_process()
    assert answers["memory lock"] == "not got: the limit is 64 KiB, it must be unlimited (`ulimit -l`)"


def test_a_call_that_fails_is_an_error():
    with pytest.raises(OSError, match="Invalid argument"):
        realtime._call(realtime._libc.mlockall, 1 << 20)


@pytest.mark.skipif(not IS_ROOT, reason="needs permission")
def test_what_was_got_holds():
    def look() -> tuple[dict[str, str], int, int, int]:
        answers = prepare_process() | prepare_loop()
        return answers, os.sched_getscheduler(0), os.sched_getparam(0).sched_priority, len(os.sched_getaffinity(0))

    answers, policy, priority, processors = in_thread(look)  # pyright: ignore[reportGeneralTypeIssues]
    if answers["SCHED_FIFO"] == "got":
        assert (policy & ~os.SCHED_RESET_ON_FORK, priority) == (os.SCHED_FIFO, FIFO_PRIORITY)
    if answers["affinity"] == "got":
        assert processors == 1
    assert gc.get_freeze_count() > 0


@pytest.mark.skipif(not IS_ROOT, reason="needs permission")
def test_inference_runs_below_the_loop():
    def look() -> tuple[str, int]:
        return prepare_inference(), os.sched_getparam(0).sched_priority

    answer, priority = in_thread(look)  # pyright: ignore[reportGeneralTypeIssues]
    assert answer != "got" or priority == INFERENCE_PRIORITY < FIFO_PRIORITY


def test_the_thread_that_asks_for_nothing_stays_ordinary():
    in_thread(prepare_loop)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
