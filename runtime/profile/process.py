"""What this process has used so far: processor time, waiting, page faults and switches, thread by thread, from /proc.

Only differences of two samples mean anything; every count is since the process began. Threads that have ended keep
what they had used, so no count ever falls. Source: proc(5), Documentation/scheduler/sched-stats.rst.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

OTHER: Final = "other"  # what no named thread did
TICK_NS: Final = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
MINOR_FAULTS, MAJOR_FAULTS, USER_TICKS, SYSTEM_TICKS, RESIDENT_PAGES = 7, 9, 11, 12, 21  # of `stat`, behind the name
CPU_NS, WAIT_NS, MINOR, MAJOR, ASLEEP, PREEMPTED = range(6)

# T threads by name.


@dataclass(frozen=True, slots=True)
class Usage:
    """(T,) int64 each, since the process began. cpu_ns: on a processor. wait_ns: ready to run, and waiting for one.

    minor_faults, major_faults: pages that had to be mapped, or read from a disk. sleeps, preemptions: times the thread
    gave its processor up, or was made to. resident_bytes: of the process, -1 when not known.
    """

    cpu_ns: NDArray[np.int64]
    wait_ns: NDArray[np.int64]
    minor_faults: NDArray[np.int64]
    major_faults: NDArray[np.int64]
    sleeps: NDArray[np.int64]
    preemptions: NDArray[np.int64]
    resident_bytes: int


@dataclass(slots=True)
class ProcessUsage:
    """Reads it. names: of Python's threads that are looked at by themselves; all others are one more, OTHER.

    folder: /proc/self, or one that looks like it.
    """

    names: Sequence[str]
    folder: Path = Path("/proc/self")
    _seen: dict[int, tuple[str, tuple[int, ...]]] = field(default_factory=dict)

    def read(self, thread_names: Mapping[int, str] | None = None) -> Usage:
        """Now. thread_names: kernel thread id -> name; None for Python's own threads. Absent files count nothing."""
        known = python_threads() if thread_names is None else thread_names
        for task in _numbered(self.folder / "task"):
            counters = read_task(task)
            if counters is not None:
                self._seen[int(task.name)] = (known.get(int(task.name), OTHER), counters)
        rows = {name: np.zeros(6, np.int64) for name in (*self.names, OTHER)}
        for name, counters in self._seen.values():
            rows[name if name in rows else OTHER] += counters
        columns = np.array(list(rows.values())).T
        return Usage(*columns, resident_bytes=resident_bytes(self.folder))


def python_threads() -> dict[int, str]:
    """Kernel thread id -> the name that Python has for it."""
    return {t.native_id: t.name for t in threading.enumerate() if t.native_id is not None}


def read_task(folder: Path) -> tuple[int, ...] | None:
    """The counters of one thread, CPU_NS to PREEMPTED; None when it has just ended."""
    stat = stat_fields(folder)
    if not stat:
        return None
    cpu_ns, wait_ns = _schedule(folder) or ((int(stat[USER_TICKS]) + int(stat[SYSTEM_TICKS])) * TICK_NS, 0)
    switches = _switches(folder)
    return cpu_ns, wait_ns, int(stat[MINOR_FAULTS]), int(stat[MAJOR_FAULTS]), *switches


def stat_fields(folder: Path) -> list[str]:
    """The fields of `stat` behind the name, which may itself hold blanks and brackets; empty when there are none."""
    text = read_text(folder / "stat")
    return [] if text is None else text.rpartition(")")[2].split()


def resident_bytes(folder: Path) -> int:
    """Memory of the process that is in memory, -1 when not known."""
    stat = stat_fields(folder)
    return int(stat[RESIDENT_PAGES]) * PAGE_BYTES if stat else -1


def _schedule(folder: Path) -> tuple[int, int] | None:
    """(on a processor, waiting for one), ns; None in a kernel built without these figures."""
    text = read_text(folder / "schedstat")
    if text is None:
        return None
    cpu_ns, wait_ns, _ = text.split()
    return int(cpu_ns), int(wait_ns)


def _switches(folder: Path) -> tuple[int, int]:
    lines = dict(line.split(":", 1) for line in (read_text(folder / "status") or "").splitlines() if ":" in line)
    return int(lines.get("voluntary_ctxt_switches", 0)), int(lines.get("nonvoluntary_ctxt_switches", 0))


def _numbered(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.name.isdigit()]
    except OSError:
        return []


def read_text(path: Path) -> str | None:
    """The text of a small file; None when it is not there, may not be read, or its driver has nothing to say."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").replace("\0", " ").strip()
    except OSError:
        return None
