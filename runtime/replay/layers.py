"""What is replayed on what: each layer by itself says where a difference begins, the whole says what it leads to.

    ticks    recorded chunks        ──▶ timeline ─▶ tick                needs no policy
    chunks   recorded observations  ──▶ scheduler ─▶ policy ─▶ chunker  every chunk judged by itself
    whole    recorded observations  ──▶ scheduler ─▶ policy ─▶ chunker ─▶ timeline ─▶ tick
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from onbeat.runtime.policy import Policy
from onbeat.runtime.replay import chunks as chunk_replay
from onbeat.runtime.replay import ticks as tick_replay
from onbeat.runtime.replay.chunks import ChunkReplay
from onbeat.runtime.replay.compare import Difference, FieldReport, compare
from onbeat.runtime.replay.recording import Recording
from onbeat.runtime.replay.ticks import new_state, publish_again, replay_ticks

TICKS, CHUNKS, WHOLE = LAYERS = ("ticks", "chunks", "whole")

# Fields of a record that no replay gives again, and why.
MAY_DIFFER: Final[Mapping[str, Mapping[str, str]]] = {
    "/tick": {
        "start_ns": "when the operating system woke the loop",
        "compute_ns": "how fast this machine is",
        "exchange_ns": "how fast servos and machine are",
        "tell_ns": "how fast this machine is",
        "outcome": "what the servos answered: an input of the next tick, as `bus_fault`",
    },
    "/chunk": {
        "published_ns": "how fast this machine is",
        "camera_age_ns": "follows from two recorded times",
        "observe_ns": "how fast this machine is",
        "prefix_ns": "how fast this machine is",
        "flow_ns": "how fast this machine is",
        "publish_ns": "how fast this machine is",
    },
}

# What a tick is told, and so has no answer to.
TOLD: Final[Mapping[str, tuple[str, ...]]] = {
    "/tick": (
        *("t_ns", "due_ns", "bus_fault", "retries", "position_rad", "velocity_rad_s", "load", "temperature_c"),
        "servo_status",
    ),
    "/chunk": ("inferred_ns", "met_ns", "noise", "directions"),
}

# Whole numbers that jump where a real one crosses an edge: rounding may move them, one way or the other.
AT_AN_EDGE: Final = ("flags", "level", "faults", "seen")
MOST_NOISE: Final = 50.0  # noise floors that another build may move a number by: measured 14, decision 0026


@dataclass(frozen=True, slots=True)
class Layer:
    """What came of one. compared: topic -> records. fields: those that differ, in the order of their first difference.

    stopped: why not everything was compared, or "". ticks, chunks: as replayed, None where the layer has none.
    """

    name: str
    compared: Mapping[str, int]
    fields: tuple[FieldReport, ...]
    stopped: str = ""
    ticks: NDArray[np.void] | None = None
    chunks: NDArray[np.void] | None = None

    @property
    def is_exact(self) -> bool:
        return not self.fields

    @property
    def first(self) -> Difference | None:
        """The first place of all."""
        return self.fields[0].first if self.fields else None

    @property
    def is_within_noise(self) -> bool:
        """Whether rounding explains every difference."""
        return all(_is_rounding(field) for field in self.fields)


def _is_rounding(field: FieldReport) -> bool:
    if field.noise is None:
        return field.field in AT_AN_EDGE
    return field.noise <= MOST_NOISE


def replay_recorded_chunks(recording: Recording) -> Layer:
    """Layer "ticks"."""
    state = new_state(recording.robot, recording.rows)
    ticks, stopped = replay_ticks(recording, state, lambda k: publish_again(state.timeline, recording, k))
    return Layer(TICKS, {"/tick": len(ticks)}, tuple(_compare_ticks(recording, ticks, {})), stopped, ticks)


def replay_recorded_observations(recording: Recording, policy: Policy) -> tuple[Layer, Mapping[str, float]]:
    """Layer "chunks", and the noise floor of every field in which rounding shows."""
    state = new_state(recording.robot, recording.rows)
    replay = ChunkReplay(recording, policy, state.timeline, follows_record=True)
    for k in range(len(recording.chunks)):
        replay.play(k)
    fields = _compare_chunks(recording, replay.records, replay.floors)
    layer = Layer(CHUNKS, {"/chunk": len(replay.records)}, tuple(fields), chunks=replay.records)
    return layer, replay.floors


def replay_whole(recording: Recording, policy: Policy, floors: Mapping[str, float]) -> Layer:
    """Layer "whole". floors: as `replay_recorded_observations` found."""
    state = new_state(recording.robot, recording.rows)
    replay = ChunkReplay(recording, policy, state.timeline, follows_record=False)
    ticks, stopped = replay_ticks(recording, state, replay.play)
    goals = {"goal_rad": floors["targets_rad"]} if "targets_rad" in floors else {}
    fields = [*_compare_chunks(recording, replay.records, floors), *_compare_ticks(recording, ticks, goals)]
    compared = {"/chunk": len(replay.records), "/tick": len(ticks)}
    in_order = tuple(sorted(fields, key=lambda field: field.first.t_ns))
    return Layer(WHOLE, compared, in_order, stopped, ticks, replay.records)


def _compare_ticks(recording: Recording, ticks: NDArray[np.void], floors: Mapping[str, float]) -> Sequence[FieldReport]:
    recorded = recording.ticks[: len(ticks)]
    names = _there(recorded, tick_replay.COMPARED)
    return compare("/tick", recorded, ticks, names, t_field="t_ns", floors=floors)


def _compare_chunks(
    recording: Recording, chunks: NDArray[np.void], floors: Mapping[str, float]
) -> Sequence[FieldReport]:
    names = _there(chunks, chunk_replay.COMPARED)
    return compare("/chunk", recording.chunks, chunks, names, t_field="inferred_ns", floors=floors)


def _there(records: NDArray[np.void], names: Sequence[str]) -> Sequence[str]:
    return [name for name in names if name in (records.dtype.names or ())]
