"""One sample of the machine beside the control loop: what the process used, and what the board says of itself.

The flight recorder takes one about twice a second; a few milliseconds of an ordinary thread, none of the loop's.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onbeat.runtime.profile.board import Probe, as_bounds, describe, find_probes, power_mode
from onbeat.runtime.profile.process import OTHER, TICK_NS, ProcessUsage, read_text

ROOT: Final = Path("/")
UNKNOWN: Final = -1  # of a whole number; of a figure it is NaN

# T threads by name, P probes of the board.


class MachineSample(NamedTuple):
    """One instant. Counts are since the process, or the machine, began: only differences mean anything.

    t_ns: monotonic. cpu_ns ... preemptions: (T,) int64, see process.Usage. busy_ns, stolen_ns: of all processors
    together, running anything, or lent by a hypervisor to another machine. load: processes that want a processor, the
    mean of a minute. power_mode: id. probes: (P,) float64, in the units of `MachineSampler.probes`, NaN where unknown.
    """

    t_ns: int
    resident_bytes: int
    cpu_ns: NDArray[np.int64]
    wait_ns: NDArray[np.int64]
    minor_faults: NDArray[np.int64]
    major_faults: NDArray[np.int64]
    sleeps: NDArray[np.int64]
    preemptions: NDArray[np.int64]
    busy_ns: int
    stolen_ns: int
    load: float
    power_mode: int
    probes: NDArray[np.float64]


@dataclass(slots=True)
class MachineSampler:
    """Samples this process and its machine. threads: Python's names of those looked at by themselves, OTHER is added.

    root: "/", or a folder that looks like it.
    """

    threads: Sequence[str]
    root: Path = ROOT
    probes: tuple[Probe, ...] = field(init=False)
    _usage: ProcessUsage = field(init=False)

    def __post_init__(self) -> None:
        self.probes = find_probes(self.root)
        self._usage = ProcessUsage(self.threads, self.root / "proc/self")

    @property
    def names(self) -> dict[str, list[str]]:
        """What the entries of the arrays are: "threads" (T,), "probes" (P,) and the probes' "units" (P,)."""
        return {
            "threads": [*self.threads, OTHER],
            "probes": [probe.title for probe in self.probes],
            "units": [probe.unit for probe in self.probes],
        }

    def sample(self) -> MachineSample:
        """Now. Never raises for what a machine lacks."""
        usage, mode = self._usage.read(), power_mode(self.root)
        busy_ns, stolen_ns = processor_times(self.root)
        return MachineSample(
            t_ns=time.monotonic_ns(),
            resident_bytes=usage.resident_bytes,
            cpu_ns=usage.cpu_ns,
            wait_ns=usage.wait_ns,
            minor_faults=usage.minor_faults,
            major_faults=usage.major_faults,
            sleeps=usage.sleeps,
            preemptions=usage.preemptions,
            busy_ns=busy_ns,
            stolen_ns=stolen_ns,
            load=load_average(self.root),
            power_mode=UNKNOWN if mode is None else mode,
            probes=np.array([probe.read() for probe in self.probes], np.float64),
        )

    def about(self) -> dict[str, Any]:
        """For the header of a log, as JSON takes it: names, bounds of the clocks, and what does not change."""
        return {**self.names, "bounds": as_bounds(self.probes), **describe(self.root)}


def processor_times(root: Path = ROOT) -> tuple[int, int]:
    """(busy, stolen) of all processors together since the machine began, ns; UNKNOWN where /proc/stat is none."""
    fields = (read_text(root / "proc/stat") or "").split("\n")[0].split()
    if len(fields) < 9:
        return UNKNOWN, UNKNOWN
    user, nice, system, _, _, irq, soft_irq, stolen = map(int, fields[1:9])
    return (user + nice + system + irq + soft_irq) * TICK_NS, stolen * TICK_NS


def load_average(root: Path = ROOT) -> float:
    """Of the last minute; NaN where there is none."""
    text = read_text(root / "proc/loadavg")
    return float("nan") if text is None else float(text.split()[0])
