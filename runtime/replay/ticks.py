"""The ticks of a recording again: the same compiled tick, told what it was told."""

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from onbeat.runtime.faults import Fault
from onbeat.runtime.modes import SYNC
from onbeat.runtime.replay.recording import Recording
from onbeat.runtime.robots import Robot
from onbeat.runtime.tick import RECORD, TickState, new_tick_state, tick
from onbeat.runtime.timeline import CLOSED, EMPTY, Timeline, publish

# T ticks, J joints.

COMPARED: Final = (*(name for name in RECORD.names or () if name != "t_ns"), "goal_rad")
_FAULTS: Final = np.arange(len(Fault))


def new_state(robot: Robot, rows: int) -> TickState:
    """As a run makes it before its first tick. rows: the most that a chunk has."""
    return new_tick_state(
        robot.limits,
        rate_hz=robot.config.loop_rate_hz,
        rows=rows,
        workspace=robot.workspace(),
        settings=robot.safety,
    )


def tick_again(state: TickState, recorded: np.void) -> None:
    """One tick with what the recorded one saw: time, joints, faults, and whether the chunks were withdrawn.

    What the tick works out by itself it works out again: `watch` writes over the conditions that are its own.
    """
    inputs = state.safety.inputs
    state.measured_q[:], state.measured_dq[:] = recorded["position_rad"], recorded["velocity_rad_s"]
    state.measured_load[:] = recorded["load"]
    inputs.bus_fault[0], inputs.retries[0] = recorded["bus_fault"], recorded["retries"]
    inputs.temperature_c[:], inputs.servo_status[:] = recorded["temperature_c"], recorded["servo_status"]
    inputs.frame_ns[0] = recorded["frame_ns"]
    inputs.conditions[:] = recorded["seen"] >> _FAULTS & 1
    state.timeline.closed[0] = recorded["in_sight"] == 0 and state.timeline.published[0] > 0
    tick(state, int(recorded["t_ns"]))


def replay_ticks(
    recording: Recording, state: TickState, play_chunk: Callable[[int], None]
) -> tuple[NDArray[np.void], str]:
    """Every tick again, each after the chunks that it knew of; returns records (T',) and why there are fewer, or "".

    play_chunk: publishes chunk k of the recording into `state.timeline`; is called in their order, for each once.
    """
    replayable, stopped = _ticks_of_known_chunks(recording)
    replayed, played = recording.ticks[:replayable].copy(), 0
    index = _index_of_id(recording)
    for k in range(replayable):
        recorded = recording.ticks[k]
        until = index.get(int(recorded["in_sight"]) - 1, -1)
        for chunk in range(played, until + 1):
            play_chunk(chunk)
        played = max(played, until + 1)
        tick_again(state, recorded)
        _keep(state, replayed[k : k + 1])
    for chunk in range(played, len(recording.chunks)):
        play_chunk(chunk)
    return replayed, stopped


def _index_of_id(recording: Recording) -> dict[int, int]:
    """Chunk id -> index, of those that were taken."""
    ids = recording.chunks["chunk_id"].tolist() if len(recording.chunks) else []
    return {chunk_id: k for k, chunk_id in enumerate(ids) if chunk_id != EMPTY}


def _ticks_of_known_chunks(recording: Recording) -> tuple[int, str]:
    """How many ticks come before one that knew of a chunk which can not be replayed, and a text of that."""
    known = max(_index_of_id(recording), default=EMPTY) + 1
    beyond = np.flatnonzero(recording.ticks["in_sight"] > known) if len(recording.ticks) else np.empty(0, np.int64)
    if len(beyond) == 0:
        return len(recording.ticks), ""
    first = int(beyond[0])
    number = recording.ticks["number"][first]
    return first, f"tick {number} knew of chunk {known}, which can not be replayed: not replayed from there on"


def _keep(state: TickState, into: NDArray[np.void]) -> None:
    for name in RECORD.names or ():
        into[name] = state.record[name]
    into["goal_rad"] = state.command_q


def publish_again(timeline: Timeline, recording: Recording, k: int) -> None:
    """Publish chunk k as it was recorded."""
    recorded, config = recording.chunks[k], recording.robot.config
    meet(timeline, recorded)
    rows = recorded["targets_rad"][: recorded["rows"]]
    is_sync = recording.mode == SYNC
    publish(
        timeline,
        rows[: config.execute_steps or None] if is_sync else rows,
        t0_ns=int(recorded["inferred_ns"] if is_sync else recorded["observed_ns"]),
        period_ns=recording.robot.policy_period_ns,
        now_ns=int(recorded["inferred_ns"]),
        locked_rows=int(recorded["delay"]),
        blend_rows=config.blend_steps,
    )


def meet(timeline: Timeline, recorded: np.void) -> None:
    """Put the timeline where the recorded chunk met it: how far the ticks were, and whether chunks were taken.

    When chunks are withdrawn is the loop's decision and lies between two ticks, so it is told, not found.
    """
    timeline.progress_ns[0] = recorded["met_ns"]
    timeline.closed[0] = recorded["first_row"] == CLOSED
