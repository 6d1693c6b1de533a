"""What was recorded of a run, as arrays: the loop's ticks, the chunks, and what the twin's world knew."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.twin import records
from onbeat.runtime.flight.messages import CHUNK_STAGES

# T ticks, J joints, N samples, G goals.


@dataclass(frozen=True, slots=True)
class Ticks:
    """The loop, tick by tick. due_ns, start_ns (T,) int64, monotonic clock; compute_ns, exchange_ns durations.

    goal_rad, position_rad (T, J) float64: sent and read. chunk_id, row (T,) int64: the chunk in force and its row, -1
    when none was. flags (T,) int64: see tick.FLAG_NAMES. faults (T,) int64: bit k when faults.Fault(k) was there.
    """

    due_ns: NDArray[np.int64]
    start_ns: NDArray[np.int64]
    compute_ns: NDArray[np.int64]
    exchange_ns: NDArray[np.int64]
    goal_rad: NDArray[np.float64]
    position_rad: NDArray[np.float64]
    chunk_id: NDArray[np.int64]
    row: NDArray[np.int64]
    flags: NDArray[np.int64]
    faults: NDArray[np.int64]

    @property
    def sent_ns(self) -> NDArray[np.int64]:
        """(T,): when the goals were handed to the servos."""
        return self.start_ns + self.compute_ns


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """One chunk: observed at observed_ns, inferred from started_ns to published_ns, row 0 due at t0_ns.

    chunk_id: -1 when it was refused. rows: its length. budget: the delay d it was planned with. delay: rows locked to
    what was committed. first_row: the first of its own, or why it was refused: timeline.REFUSALS. stages_ns: name of
    messages.CHUNK_STAGES -> duration.
    """

    chunk_id: int
    observed_ns: int
    t0_ns: int
    started_ns: int
    published_ns: int
    rows: int
    budget: int
    delay: int
    first_row: int
    stages_ns: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at the task that ended. success_ns: when it was judged a success, None when it was not."""

    start_ns: int
    end_ns: int
    success_ns: int | None


@dataclass(frozen=True, slots=True)
class Truth:
    """What the twin knows. t_ns (N,) int64 and height_m (N,) float64 of the cube over its rest.

    goals_ns: (G,) int64, when goals came over the wire.
    """

    t_ns: NDArray[np.int64]
    height_m: NDArray[np.float64]
    attempts: tuple[Attempt, ...]
    goals_ns: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MachineRecords:
    """The machine beside the loop. samples: (N,) with the fields of profile.machine.MachineSample, in order of time.

    about: as `MachineSampler.about` says: names of the threads and probes, bounds, and what does not change.
    """

    about: Mapping[str, Any]
    samples: NDArray[np.void]

    @property
    def probes(self) -> NDArray[np.float64]:
        """(N, P); the log of a machine without any sensor has no such field."""
        known = self.samples.dtype.names or ()
        return self.samples["probes"] if "probes" in known else np.empty((len(self.samples), 0))


@dataclass(frozen=True, slots=True)
class RunRecords:
    """All that was recorded. header: what ran, by names of summary.FIELDS. truth: None for a real arm.

    pictures: view name -> PNG or JPEG bytes. missed_ticks, faults: as the loop and the bus counted them. warm_up_ns:
    of the inferences before the run, the first of them cold. machine: None where it was not recorded.
    """

    header: Mapping[str, Any]
    joints: tuple[str, ...]
    policy_period_ns: int
    ticks: Ticks
    missed_ticks: int
    chunks: tuple[ChunkRecord, ...]
    faults: Mapping[str, int]
    truth: Truth | None
    pictures: Mapping[str, bytes]
    warm_up_ns: tuple[int, ...] = ()
    machine: MachineRecords | None = None


TICK_FIELDS = tuple(field.name for field in fields(Ticks))
CHUNK_FIELDS = tuple(field.name for field in fields(ChunkRecord) if field.name != "stages_ns")
STAGE_FIELDS = tuple(f"{stage}_ns" for stage in CHUNK_STAGES)


def read_ticks(records: NDArray[np.void]) -> Ticks:
    """From records of /tick (T,) with TICK_FIELDS."""
    return Ticks(**{name: records[name] for name in TICK_FIELDS})


def read_chunks(records: Iterable[Any]) -> tuple[ChunkRecord, ...]:
    """From records of /chunk, or what is told to make one: each a mapping with CHUNK_FIELDS and STAGE_FIELDS."""
    return tuple(_chunk(record) for record in records)


def _chunk(record: Mapping[str, Any]) -> ChunkRecord:
    stages_ns = {stage: int(record[name]) for stage, name in zip(CHUNK_STAGES, STAGE_FIELDS, strict=True)}
    return ChunkRecord(**{name: int(record[name]) for name in CHUNK_FIELDS}, stages_ns=stages_ns)


def read_truth(folder: Path) -> Truth:
    """From the folder that the twin wrote."""
    lines = list(records.read_truth(folder))
    return Truth(
        t_ns=np.array([line.t_ns for line in lines], np.int64),
        height_m=np.array([line.cube_height_m for line in lines], np.float64),
        attempts=tuple(_attempts(lines)),
        goals_ns=records.read_goals(folder)["t_ns"].astype(np.int64),
    )


def _attempts(lines: Iterable[records.TruthLine]) -> Iterator[Attempt]:
    """Those that ended; one that the end of the run cut short counts for nothing."""
    start_ns = 0
    for line in lines:
        if line.event == "attempt_started":
            start_ns = line.t_ns
        elif line.event is not None:
            yield Attempt(start_ns, line.t_ns, line.t_ns if line.event == "lifted" else None)
