"""A trace is what Perfetto's own schema says, and its slices, arrows and counters are those of the run."""

import struct
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import CounterDescriptor, Trace, TrackEvent

from onbeat.runtime.profile import trace
from onbeat.runtime.run_records import RunRecords

NAMES = dict(enumerate(trace.THREADS, trace.CAMERA))


def decode(run: RunRecords) -> Trace:
    decoded = Trace()
    decoded.ParseFromString(b"".join(trace.packets(run)))
    return decoded


def events(decoded: Trace) -> Iterator[tuple[int, Any]]:
    return ((p.timestamp, p.track_event) for p in decoded.packet if p.HasField("track_event"))


def slices(decoded: Trace) -> dict[int, list[tuple[str, int, int, int]]]:
    """Track -> (name, begin, end, depth), checked: each end has a begin, and none ends before what is inside it."""
    open_slices, closed = defaultdict(list), defaultdict(list)
    ordered = sorted(enumerate(events(decoded)), key=lambda item: (item[1][0], item[0]))
    for _, (t_ns, event) in ordered:
        stack = open_slices[event.track_uuid]
        if event.type == TrackEvent.TYPE_SLICE_BEGIN:
            stack.append((event.name, t_ns))
        elif event.type == TrackEvent.TYPE_SLICE_END:
            name, begin = stack.pop()
            closed[event.track_uuid].append((name, begin, t_ns, len(stack)))
    assert not any(open_slices.values())
    return closed


@pytest.fixture
def run(run_of: Callable[..., RunRecords], machine_of: Callable[..., Any]) -> RunRecords:
    return run_of(0, 5.0, machine=machine_of(5.0, throttled=True))


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**62, -1])
def test_numbers_are_written_as_protobuf_has_them(value: int):
    event = TrackEvent()
    event.ParseFromString(trace.number(30, value))
    assert event.counter_value == value


def test_a_run_without_anything_has_its_tracks(run: RunRecords):
    ticks = type(run.ticks)(**{name: getattr(run.ticks, name)[:0] for name in run.ticks.__slots__})
    decoded = decode(replace(run, ticks=ticks, chunks=(), machine=None))
    assert {
        p.track_descriptor.thread.thread_name for p in decoded.packet if p.track_descriptor.HasField("thread")
    } == set(trace.THREADS)
    assert not list(events(decoded))


def test_nothing_is_written_that_the_schema_does_not_know(run: RunRecords):
    raw = b"".join(trace.packets(run))
    decoded = decode(run)
    before = decoded.ByteSize()
    decoded.DiscardUnknownFields()
    assert decoded.ByteSize() == before
    assert len(raw) == before
    assert all(packet.trusted_packet_sequence_id for packet in decoded.packet)


def test_every_event_is_on_a_track_that_was_told_before(run: RunRecords):
    told: set[int] = set()
    for packet in decode(run).packet:
        if packet.HasField("track_descriptor"):
            assert packet.track_descriptor.uuid not in told
            assert packet.track_descriptor.parent_uuid in {0, *told}
            told.add(packet.track_descriptor.uuid)
        else:
            assert packet.track_event.track_uuid in told


def test_slices_nest_and_are_those_of_the_run(run: RunRecords):
    found = slices(decode(run))
    ticks = [(begin, end) for name, begin, end, depth in found[trace.LOOP] if name == "tick" and depth == 0]
    ends = run.ticks.sent_ns + run.ticks.exchange_ns
    assert ticks == list(zip(run.ticks.start_ns.tolist(), ends.tolist(), strict=True))
    inferences = [item for item in found[trace.INFERENCE] if item[3] == 0]
    assert [item[0] for item in inferences] == [f"chunk {chunk.chunk_id}" for chunk in run.chunks]
    assert [item[1:3] for item in inferences] == [(c.started_ns, c.published_ns) for c in run.chunks]
    flows = [end - begin for name, begin, end, depth in found[trace.INFERENCE] if (name, depth) == ("flow", 1)]
    assert flows == [chunk.stages_ns["flow"] for chunk in run.chunks]


def test_arrows_go_from_frame_to_inference_to_the_first_tick(run: RunRecords):
    ways: dict[int, list[tuple[int, str]]] = defaultdict(list)
    ended: list[int] = []
    for t_ns, event in events(decode(run)):
        for number in (*event.flow_ids, *event.terminating_flow_ids):
            ways[number].append((t_ns, NAMES[event.track_uuid]))
        ended += event.terminating_flow_ids
    first = {
        int(k): int(run.ticks.start_ns[run.ticks.chunk_id == k][0]) for k in np.unique(run.ticks.chunk_id) if k >= 0
    }
    for number, chunk in enumerate(run.chunks, 1):
        expected = [(chunk.observed_ns, "camera"), (chunk.started_ns, "inference")]
        if chunk.chunk_id in first:
            expected.append((first[chunk.chunk_id], "control loop"))
        assert ways[number] == expected
        assert sorted(expected) == expected
    assert sorted(ended) == sorted(k + 1 for k in first)


def test_counters_have_units_and_the_values_of_the_run(run: RunRecords):
    decoded = decode(run)
    tracks = {
        p.track_descriptor.uuid: p.track_descriptor for p in decoded.packet if p.track_descriptor.HasField("counter")
    }
    values: dict[str, list[float]] = defaultdict(list)
    for _, event in events(decoded):
        if event.type == TrackEvent.TYPE_COUNTER:
            values[tracks[event.track_uuid].name].append(event.double_counter_value)
    by_name = {track.name: track.counter for track in tracks.values()}
    assert by_name["tick lateness"].unit == CounterDescriptor.UNIT_TIME_NS
    assert by_name["temperature tj-thermal"].unit_name == "°C"
    assert max(values["tick lateness"]) == (run.ticks.start_ns - run.ticks.due_ns).max()
    assert values["temperature tj-thermal"] == [55.0, 61.0]  # where it changes, and only there
    assert not values["temperature cv0-thermal"]


def test_a_fault_is_a_slice_of_its_own_track(run: RunRecords):
    decoded = decode(run)
    names = {p.track_descriptor.name: p.track_descriptor.uuid for p in decoded.packet if p.track_descriptor.name}
    lanes = [name for name in names if name.startswith("fault: ")]
    assert len(lanes) == 1
    there = np.flatnonzero(run.ticks.faults)
    ((_, begin, end, _),) = slices(decoded)[names[lanes[0]]]
    assert (begin, end) == (run.ticks.start_ns[there[0]], run.ticks.start_ns[there[-1]] + 1)


def test_a_trace_is_written_and_a_wrong_byte_is_seen(run: RunRecords, tmp_path: Path):
    trace.write_trace(run, tmp_path / "run.pftrace")
    raw = (tmp_path / "run.pftrace").read_bytes()
    assert Trace.FromString(raw) == decode(run)
    assert struct.unpack_from("<B", raw)[0] == 0x0A  # field 1, a message: how Perfetto knows its own files
