"""The recorded flight, tick by tick: the same bits come out, and nothing that shapes a command can change unseen."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from onbeat.drivers.feetech.protocol import NO_REPLY, PORT_LOST
from onbeat.drivers.feetech.tables import Status
from onbeat.runtime.faults import Fault
from onbeat.runtime.flight.messages import BY_TOPIC
from onbeat.runtime.replay import chunks, ticks
from onbeat.runtime.replay.compare import FieldReport
from onbeat.runtime.replay.layers import MAY_DIFFER, TOLD, Layer, replay_recorded_chunks
from onbeat.runtime.replay.recording import Recording
from onbeat.runtime.robots import build_robot
from onbeat.runtime.tick import SLOWED, STOPPED
from onbeat.runtime.timeline import publish


def with_robot(recording: Recording, **changed: Any) -> Recording:
    return replace(recording, robot=build_robot(replace(recording.robot.config, **changed)))


def with_tick(recording: Recording, k: int, **changed: Any) -> Recording:
    """Of one tick, something that it was told."""
    altered = recording.ticks.copy()
    for name, value in changed.items():
        altered[name][k] = value
    return replace(recording, ticks=altered)


def with_chunk(recording: Recording, k: int, **changed: Any) -> Recording:
    altered = recording.chunks.copy()
    for name, value in changed.items():
        altered[name][k] = value
    return replace(recording, chunks=altered)


def field(layer: Layer, name: str) -> FieldReport:
    return next(report for report in layer.fields if report.field == name)


def test_every_bit_of_every_tick_comes_again(recording: Recording):
    layer = replay_recorded_chunks(recording)
    assert layer.first is None
    assert layer.compared == {"/tick": len(recording.ticks)}
    assert not layer.stopped


def test_the_flight_is_worth_replaying(recording: Recording):
    """Chunks that were late, missing and overtaken, faults that slow and that stop, an arm that moves."""
    flags, seen = recording.ticks["flags"], recording.ticks["seen"]
    told = {fault.name for fault in Fault if (seen >> fault & 1).any()}
    assert {"CHUNK_LATE", "CHUNK_MISSING", "CHUNK_OVERTAKEN", "BUS_SILENT", "SERVO_LOAD", "STOP_REQUESTED"} <= told
    assert (flags & SLOWED).any()
    assert (flags & STOPPED).any()
    assert np.ptp(recording.ticks["goal_rad"], axis=0).max() > 0.3


def test_a_recording_without_ticks_has_none_that_differ(recording: Recording):
    layer = replay_recorded_chunks(replace(recording, ticks=recording.ticks[:0]))
    assert (layer.is_exact, layer.compared) == (True, {"/tick": 0})


def test_a_run_that_ended_before_its_first_chunk(recording: Recording):
    ticks = recording.ticks[:10].copy()
    ticks["in_sight"] = 0
    layer = replay_recorded_chunks(replace(recording, ticks=ticks, chunks=np.empty(0, [("number", np.int64)])))
    assert (layer.stopped, layer.compared) == ("", {"/tick": 10})


@pytest.mark.parametrize(
    ("changed", "first"),
    [
        ({"v_max": (2.999,) * 6}, "goal_rad"),
        ({"a_max": (20.0, 20.0, 20.0, 20.0, 19.999, 20.0)}, "goal_rad"),
        ({"j_max": (990.0,) * 6}, "goal_rad"),
        ({"slow_factor": 0.26}, "goal_rad"),
        ({"max_load": 0.6}, "seen"),
        ({"margin_steps": 0, "execute_steps": 3}, None),
        ({"tool_low_m": (-0.5, -0.5, 0.15)}, "flags"),
        ({"loop_rate_hz": 199.0}, "goal_rad"),
    ],
)
def test_a_limit_that_changes_is_seen(recording: Recording, changed: dict[str, Any], first: str | None):
    """Where margin and horizon are in what the chunks say already, ticks do not depend on them."""
    layer = replay_recorded_chunks(with_robot(recording, **changed))
    assert (layer.first is None) == (first is None)
    if first is not None:
        assert first in [report.field for report in layer.fields]


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"bus_fault": NO_REPLY}, Fault.BUS_SILENT),
        ({"bus_fault": PORT_LOST}, Fault.PORT_LOST),
        ({"retries": 1000}, Fault.BUS_RETRIES),
        ({"temperature_c": 61.0}, Fault.SERVO_HOT),
        ({"servo_status": Status.VOLTAGE}, Fault.SERVO_POWER),
        ({"frame_ns": 1}, Fault.CAMERA_STALE),
    ],
)
def test_a_tick_works_out_its_faults_from_what_it_was_told(recording: Recording, changed: dict, fault: Fault):
    k = 250
    assert not recording.ticks["seen"][k] >> fault & 1
    first = field(replay_recorded_chunks(with_tick(recording, k, **changed)), "seen").first
    assert first.number == k
    assert int(first.recorded) ^ int(first.replayed) == 1 << fault


def test_a_load_counts_over_time(recording: Recording):
    loads = recording.ticks.copy()
    loads["load"][200:320] = 0.9
    layer = replay_recorded_chunks(replace(recording, ticks=loads))
    assert int(field(layer, "seen").first.replayed) & 1 << Fault.SERVO_LOAD
    assert 200 < field(layer, "seen").first.number < 320


def test_an_event_that_a_tick_saw_is_an_input(recording: Recording):
    k = int(np.flatnonzero(recording.ticks["seen"] >> Fault.CHUNK_OVERTAKEN & 1)[3])
    unseen = recording.ticks["seen"][k] & ~(1 << Fault.CHUNK_OVERTAKEN)
    layer = replay_recorded_chunks(with_tick(recording, k, seen=unseen))
    assert field(layer, "faults").first.number == k


def test_the_joints_matter_at_the_first_tick_and_at_no_other(recording: Recording):
    moved = replay_recorded_chunks(with_tick(recording, 0, position_rad=recording.ticks["position_rad"][0] + 1e-9))
    assert field(moved, "goal_rad").first.number == 0
    assert replay_recorded_chunks(with_tick(recording, 1, position_rad=0.0)).is_exact


def test_time_is_an_input(recording: Recording):
    k = 300
    layer = replay_recorded_chunks(with_tick(recording, k, t_ns=recording.ticks["t_ns"][k] + 1))
    assert {"fraction", "age_ns"} <= {report.field for report in layer.fields}
    assert layer.first is not None
    assert layer.first.number == k


@pytest.mark.parametrize("changed", ["targets_rad", "met_ns", "delay", "inferred_ns", "observed_ns"])
def test_a_chunk_that_changes_is_seen_by_the_ticks_it_moves(recording: Recording, changed: str):
    k, by = 20, {"targets_rad": 1e-9, "met_ns": 10**9, "delay": 3, "inferred_ns": 4 * 10**8, "observed_ns": -(10**6)}
    value = recording.chunks[changed][k] + by[changed]
    layer = replay_recorded_chunks(with_chunk(recording, k, **{changed: value}))
    assert layer.first is not None
    assert recording.ticks["in_sight"][layer.first.number] >= recording.chunks["chunk_id"][k]


def test_another_interpolation_or_splice_is_seen(recording: Recording, monkeypatch: pytest.MonkeyPatch):
    """As if rows were due a microsecond later, or faded in over a row more."""
    changes = ({"period_ns": 100_001_000}, {"blend_rows": 3, "locked_rows": 0})
    for changed in changes:
        monkeypatch.setattr(ticks, "publish", lambda *a, _changed=changed, **k: publish(*a, **{**k, **_changed}))
        assert "goal_rad" in [report.field for report in replay_recorded_chunks(recording).fields]


def test_ticks_stop_before_a_chunk_that_is_not_there(recording: Recording):
    layer = replay_recorded_chunks(replace(recording, chunks=recording.chunks[:10]))
    assert layer.is_exact
    assert 0 < layer.compared["/tick"] < len(recording.ticks)
    assert "knew of chunk 10" in layer.stopped
    first = recording.ticks[layer.compared["/tick"]]
    assert first["in_sight"] == 11


@pytest.mark.parametrize(("topic", "compared"), [("/tick", ticks.COMPARED), ("/chunk", chunks.COMPARED)])
def test_every_field_is_compared_or_told_or_named_with_a_reason(topic: str, compared: tuple[str, ...]):
    names = [field.name for field in BY_TOPIC[topic].fields]
    accounted = [*compared, *TOLD[topic], *MAY_DIFFER[topic]]
    assert sorted(accounted) == sorted(names)
    assert all(MAY_DIFFER[topic].values())
