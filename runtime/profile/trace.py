"""A run as a Perfetto trace: one track per thread, an arrow from each frame to its inference to its first command.

    onbeat profile LOG --trace run.pftrace        open it at ui.perfetto.dev, or with any tool that reads such traces

    camera        ◆ frame ──────┐
    inference           [observe│prefix│flow│publish] ──────┐
    control loop  [tick][tick][tick][tick][tick][tick][tick]▼[tick]
    servo bus      [exchange]    ...
    recorder           ◆ sample        counters: lateness, delay, age, memory, clocks, temperatures
    faults                      [bus silent]

Perfetto's own TrackEvent format, written here: it takes four kinds of protobuf field. Field numbers are those of
protos/perfetto/trace/perfetto_trace.proto; the tests decode what is written with the schema of the `perfetto` package.
Times are the run's monotonic clock, ns.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from onbeat.runtime.faults import Fault
from onbeat.runtime.profile.figures import action_ages, fault_stretches
from onbeat.runtime.run_records import ChunkRecord, RunRecords
from onbeat.runtime.summary import executed_delays

BEGIN, END, INSTANT, COUNTER = 1, 2, 3, 4  # TrackEvent.Type
NO_UNIT, NANOSECONDS, COUNT, BYTES = 0, 1, 2, 3  # CounterDescriptor.Unit
PROCESS: Final = 1  # uuid and pid: what these are on the robot is of no use elsewhere
SEQUENCE: Final = 1
THREADS: Final = ("camera", "inference", "control loop", "servo bus", "recorder")
CAMERA, INFERENCE, LOOP, BUS, RECORDER = range(2, 2 + len(THREADS))  # uuids of their tracks
FIRST_UUID: Final = 100  # of tracks that a run may or may not have
PARTS: Final = ("observe", "prefix", "flow", "publish")  # of an inference, in the order they come


def varint(value: int) -> bytes:
    """A whole number, 7 bits a byte, least first; a negative one as 64 bits."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field: int, value: int) -> bytes:
    """A field of wire type 0."""
    return varint(field << 3) + varint(value)


def fixed(field: int, value: float | int) -> bytes:
    """A field of wire type 1: a double, or an unsigned integer of 64 bits."""
    return varint(field << 3 | 1) + struct.pack("<Q" if isinstance(value, int) else "<d", value)


def message(field: int, *parts: bytes) -> bytes:
    """A field of wire type 2: a message of its fields, or text."""
    content = b"".join(parts)
    return varint(field << 3 | 2) + varint(len(content)) + content


def text(field: int, words: str) -> bytes:
    """A string field."""
    return message(field, words.encode())


def packet(*parts: bytes) -> bytes:
    """A TracePacket of the one sequence there is."""
    return message(1, *parts, number(10, SEQUENCE))


def event(t_ns: int, kind: int, track: int, *parts: bytes) -> bytes:
    """A TrackEvent."""
    return packet(number(8, t_ns), message(11, number(9, kind), number(11, track), *parts))


def slice_of(track: int, name: str, begin_ns: int, end_ns: int, *parts: bytes, inside: Iterable[bytes] = ()) -> bytes:
    """A stretch of time on a track. parts: more fields of its begin; inside: slices within it."""
    begin = event(begin_ns, BEGIN, track, text(23, name), *parts)
    return begin + b"".join(inside) + event(end_ns, END, track)


def note(name: str, value: float | int) -> bytes:
    """A DebugAnnotation: shown when the slice is clicked."""
    return message(4, text(10, name), number(4, value) if isinstance(value, int) else fixed(5, value))


def flow(number_of: int, *, ends: bool = False) -> bytes:
    """Part of an arrow; those of one number are joined in order of time, until one that ends it."""
    return fixed(48 if ends else 47, number_of + 1)


def descriptor(uuid: int, *parts: bytes) -> bytes:
    """A TrackDescriptor under the process."""
    return packet(message(60, number(1, uuid), number(5, PROCESS), *parts))


def tracks() -> Iterator[bytes]:
    """The process and its threads."""
    yield packet(message(60, number(1, PROCESS), message(3, number(1, PROCESS), text(6, "onbeat"))))
    for uuid, name in enumerate(THREADS, CAMERA):
        yield descriptor(uuid, message(4, number(1, PROCESS), number(2, uuid), text(5, name)))


@dataclass(frozen=True, slots=True)
class Counter:
    """A value over time. unit: one of CounterDescriptor's, or in words. t_ns, values: (N,)."""

    name: str
    unit: int | str
    t_ns: NDArray[np.int64]
    values: NDArray[np.float64]

    def packets(self, uuid: int) -> Iterator[bytes]:
        """Its track, and where it changes."""
        unit = number(3, self.unit) if isinstance(self.unit, int) else text(6, self.unit)
        yield descriptor(uuid, text(2, self.name), message(8, unit))
        changes = np.flatnonzero(np.isfinite(self.values) & (np.diff(self.values, prepend=np.nan) != 0))
        for t_ns, value in zip(self.t_ns[changes].tolist(), self.values[changes].tolist(), strict=True):
            yield event(t_ns, COUNTER, uuid, fixed(44, float(value)))


def packets(run: RunRecords) -> Iterator[bytes]:
    """The whole trace, piece by piece."""
    yield from tracks()
    for chunk, inference in enumerate(run.chunks):
        yield event(inference.observed_ns, INSTANT, CAMERA, text(23, "frame"), flow(chunk))
        yield _inference(chunk, inference)
    yield from _ticks(run)
    yield from _samples(run)
    extra = FIRST_UUID
    for fault in Fault:
        yield from _fault(run, fault, extra)
        extra += 1
    for counter in counters(run):
        yield from counter.packets(extra)
        extra += 1


def _inference(number_of: int, chunk: ChunkRecord) -> bytes:
    """The inference of a chunk, in its parts, which follow on each other and together are all of it."""
    starts = np.cumsum([chunk.started_ns, *(chunk.stages_ns[part] for part in PARTS)]).tolist()
    inside = (slice_of(INFERENCE, name, a, b) for name, a, b in zip(PARTS, starts[:-1], starts[1:], strict=True))
    notes = (note("budget", chunk.budget), note("locked rows", chunk.delay), note("first row", chunk.first_row))
    name = f"chunk {chunk.chunk_id}" if chunk.chunk_id >= 0 else "chunk refused"
    end_ns = max(chunk.published_ns, starts[-1])
    return slice_of(INFERENCE, name, chunk.started_ns, end_ns, *notes, flow(number_of), inside=inside)


def _ticks(run: RunRecords) -> Iterator[bytes]:
    """A slice per tick; an arrow ends in the first under each chunk."""
    ticks, index_of = run.ticks, {c.chunk_id: k for k, c in enumerate(run.chunks) if c.chunk_id >= 0}
    ids, first = np.unique(ticks.chunk_id, return_index=True)
    arrows = {k: index_of[i] for i, k in zip(ids.tolist(), first.tolist(), strict=True) if i in index_of}
    columns = (ticks.start_ns, ticks.sent_ns, ticks.exchange_ns, ticks.chunk_id, ticks.row)
    for k, (start, sent, took, chunk, row) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        arrow = (flow(arrows[k], ends=True),) if k in arrows else ()
        inside = (slice_of(LOOP, "compute", start, sent), slice_of(LOOP, "exchange", sent, sent + took))
        notes = (note("chunk", chunk), note("row", row))
        yield slice_of(LOOP, "tick", start, sent + took, *notes, *arrow, inside=inside)
        yield slice_of(BUS, "goals out, joints in", sent, sent + took)


def _samples(run: RunRecords) -> Iterator[bytes]:
    if run.machine is not None:
        for t_ns in run.machine.samples["t_ns"].tolist():
            yield event(t_ns, INSTANT, RECORDER, text(23, "machine sampled"))


def _fault(run: RunRecords, fault: Fault, uuid: int) -> Iterator[bytes]:
    """A track for a fault, if it was ever there."""
    stretches = fault_stretches(run, fault)
    if not stretches:
        return
    words = fault.name.lower().replace("_", " ")
    yield descriptor(uuid, text(2, f"fault: {words}"))
    for a, b in stretches:
        yield slice_of(uuid, words, int(run.ticks.start_ns[a]), int(run.ticks.start_ns[b] + 1))


def counters(run: RunRecords) -> Iterator[Counter]:
    """What is drawn as a line."""
    ticks = run.ticks
    yield Counter("tick lateness", NANOSECONDS, ticks.start_ns, (ticks.start_ns - ticks.due_ns).astype(np.float64))
    sent_ns, age_ns = action_ages(run)
    yield Counter("age of the observation behind a command", NANOSECONDS, sent_ns, age_ns.astype(np.float64))
    executed = executed_delays(run)
    ran = [chunk for chunk in run.chunks if chunk.chunk_id in executed]
    came_ns = np.array([chunk.published_ns for chunk in ran], np.int64)
    yield Counter("delay d, planned", "policy steps", came_ns, np.array([c.budget for c in ran], np.float64))
    yield Counter("delay d, executed", "policy steps", came_ns, np.array([executed[c.chunk_id] for c in ran], float))
    if run.machine is None:
        return
    samples, about = run.machine.samples, run.machine.about
    yield Counter("resident memory", BYTES, samples["t_ns"], samples["resident_bytes"].astype(np.float64))
    for k, name in enumerate(about["threads"]):
        yield Counter(f"cpu: {name}", "% of a processor", *_busy(samples, k))
    for k, (name, unit) in enumerate(zip(about["probes"], about["units"], strict=True)):
        yield Counter(name, unit, samples["t_ns"], run.machine.probes[:, k])


def _busy(samples: NDArray[np.void], k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    t_ns, used_ns = samples["t_ns"], samples["cpu_ns"][:, k]
    return t_ns[1:], 100 * np.diff(used_ns) / np.maximum(np.diff(t_ns), 1)


def write_trace(run: RunRecords, path: Path) -> None:
    """Write the trace of a run. Raises OSError."""
    with path.open("wb") as file:
        for piece in packets(run):
            file.write(piece)
