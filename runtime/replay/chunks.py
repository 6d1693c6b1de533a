"""The chunks of a recording again: its observations through the same scheduler, chunker and policy."""

import threading
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onbeat.runtime.chunker import Chunker
from onbeat.runtime.flight.encoding import Layout, decode, encode
from onbeat.runtime.flight.inference import Inference
from onbeat.runtime.observation import Observation
from onbeat.runtime.policy import Policy
from onbeat.runtime.replay.compare import largest_difference
from onbeat.runtime.replay.playback import RecordedCamera, RecordedClock, RecordedJoints, RecordedPolicy
from onbeat.runtime.replay.recording import Frames, Recording
from onbeat.runtime.replay.ticks import meet
from onbeat.runtime.scheduler import Scheduler, observe
from onbeat.runtime.timeline import Timeline

# N chunks.

COMPARED: Final = (
    *("started_ns", "number", "observed_ns", "chunk_id", "t0_ns", "rows", "budget", "delay", "executed", "first_row"),
    *("actions", "gate", "cost", "targets_rad"),
)
FLOATS: Final = ("actions", "gate", "cost", "targets_rad")
FLOOR_CHUNKS, FLOOR_DRAWS = 4, 4  # the floor is the largest of so many chunks, each with so many draws


class ChunkReplay:
    """Plays the inferences of a recording into a timeline, one by one, in their order.

    follows_record: publish what was inferred then instead of what is now, so that every chunk is judged by itself.
    floors: field of FLOATS -> how far it moves when only rounding changes, of the chunks played so far.
    """

    def __init__(self, recording: Recording, policy: Policy, timeline: Timeline, *, follows_record: bool) -> None:
        self._recording, self._timeline = recording, timeline
        self._clock, self._joints = RecordedClock(), RecordedJoints()
        self._cameras = [RecordedCamera(Frames(recording.log, name)) for name in recording.log.cameras]
        self._policy = RecordedPolicy(policy, self._clock, follows_record=follows_record)
        self._chunker = self._new_chunker()
        self._scheduler = Scheduler(
            self._chunker,
            cameras=self._cameras,
            history=self._joints,
            log=self._take,
            instruction=recording.instruction,
            clock=self._clock,
        )
        self._instruction = recording.instruction
        self._taken: Inference | None = None
        self._sampled = set(np.linspace(0, len(recording.chunks) - 1, FLOOR_CHUNKS).astype(int).tolist())
        self.records = recording.chunks.copy()
        self.floors: dict[str, float] = {}

    def play(self, k: int) -> None:
        """Infer and publish chunk k, and keep in `records` what came of it."""
        recorded, observation = self._recording.chunks[k], self._recording.observations[k]
        self._show(recorded, observation)
        if k in self._sampled:
            self._measure_floor(recorded)
        self._policy.show(recorded)
        self._clock.now_ns, self._taken = int(recorded["started_ns"]), None
        self._scheduler.step(threading.Event())
        self._keep(self.records[k : k + 1])

    def _new_chunker(self) -> Chunker:
        """With the delay that the warm-up counted: what the first chunk was planned with, less the margin."""
        recording = self._recording
        allow_untrained = bool(recording.config.get("allow_untrained_prefix"))
        chunker = Chunker(self._policy, recording.robot, self._timeline, recording.mode, allow_untrained)
        if len(recording.chunks):
            chunker.budget.add(int(recording.chunks["budget"][0]) - 1 - chunker.budget.margin_steps)
        return chunker

    def _show(self, recorded: np.void, observation: np.void) -> None:
        if observation["instruction"] != self._instruction:
            self._instruction = observation["instruction"]
            self._scheduler.set_instruction(self._instruction)
        for camera, t_capture_ns in zip(self._cameras, np.atleast_1d(observation["captured_ns"]), strict=True):
            camera.show(int(t_capture_ns))
        self._joints.position_rad = observation["position_rad"]
        self._policy.show(recorded)
        meet(self._timeline, recorded)

    def _take(self, inference: Inference) -> None:
        self._taken = inference

    def _keep(self, into: NDArray[np.void]) -> None:
        """What was inferred, and what was made of what was published; 0 in `started_ns` when it was not time yet."""
        if self._taken is None or self._policy.answer is None:
            into["started_ns"] = 0
            return
        answer = self._policy.answer
        taken = {**self._taken.chunk, "actions": answer.actions, "gate": answer.gate, "cost": answer.cost}
        recorded = {name: into[name][0] for name in into.dtype.names or ()}
        layout = Layout(into.dtype)
        into[:] = decode(layout, [encode(layout, {**recorded, **{name: taken[name] for name in COMPARED}})])

    def _measure_floor(self, recorded: np.void) -> None:
        """Plan the same chunk with every number of the noise moved to one beside it, up or down."""
        exact = self._plan(recorded, recorded["noise"])
        generator = np.random.default_rng(int(recorded["number"]))
        for _ in range(FLOOR_DRAWS):
            moved = self._plan(recorded, beside(recorded["noise"], generator))
            for name in FLOATS:
                apart = largest_difference(exact[name], moved[name])
                self.floors[name] = max(self.floors.get(name, 0.0), apart)

    def _plan(self, recorded: np.void, noise: NDArray[np.float32]) -> Mapping[str, NDArray[Any]]:
        self._policy.show(recorded)
        self._policy.noise = noise
        observation = observe(self._cameras, self._joints, self._recording.robot, int(recorded["started_ns"]))
        assert isinstance(observation, Observation), observation
        plan = self._chunker.plan(observation, self._instruction)
        answer = plan.output
        return {"actions": answer.actions, "gate": answer.gate, "cost": answer.cost, "targets_rad": plan.targets}


def beside(values: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.float32]:
    """Every number moved to the next that there is, up or down."""
    towards = np.where(generator.random(values.shape) < 0.5, -np.inf, np.inf).astype(np.float32)
    return np.nextafter(values, towards)
