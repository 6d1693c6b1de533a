"""What a recorded inference began from, behind the interfaces of what it once came from."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.interfaces import Frame
from onbeat.runtime.engine import Guidance, PolicySpec
from onbeat.runtime.observation import Observation
from onbeat.runtime.policy import Policy, PolicyOutput
from onbeat.runtime.replay.recording import Frames, NotReplayable

# J joints, V views; the letters of runtime/engine.py.


@dataclass(slots=True)
class RecordedClock:
    """Stands at a recorded time until it is set to the next."""

    now_ns: int = 0

    def __call__(self) -> int:
        return self.now_ns


class RecordedCamera:
    """A camera whose newest frame is the one that an inference had."""

    def __init__(self, frames: Frames) -> None:
        self.name = frames.name
        self._frames = frames
        self._newest: Frame | None = None

    def show(self, t_capture_ns: int) -> None:
        """Raises NotReplayable when the log has no such frame."""
        rgb = self._frames.at(t_capture_ns)
        if rgb is None:
            raise NotReplayable(f"the log has no frame of '{self.name}' of time {t_capture_ns}: it is damaged")
        self._newest = Frame(0, t_capture_ns, rgb)

    def latest(self) -> Frame | None:
        return self._newest

    def close(self) -> None:
        """Nothing is open."""


@dataclass(slots=True)
class RecordedJoints:
    """A state history that knows one time. position_rad: (J,)."""

    position_rad: NDArray[np.float64] | None = None

    def at(self, t_ns: int) -> NDArray[np.float64] | None:  # noqa: ARG002  whatever is asked, this was the answer
        return self.position_rad


class RecordedPolicy:
    """A policy that infers with the noise and directions of the record, in the recorded time.

    answer: what it inferred last. follows_record: hand on what was inferred then instead, so that every inference is
    judged by itself. noise: to be used in place of the recorded; then what is inferred is handed on.
    """

    def __init__(self, policy: Policy, clock: RecordedClock, *, follows_record: bool) -> None:
        self.language = policy.language
        self.answer: PolicyOutput | None = None
        self.noise: NDArray[np.float32] | None = None
        self._policy, self._clock, self._follows_record = policy, clock, follows_record
        self._recorded: np.void | None = None

    @property
    def spec(self) -> PolicySpec:
        return self._policy.spec

    def show(self, recorded: np.void) -> None:
        """The record, of /chunk, whose inference comes next."""
        self._recorded, self.noise = recorded, None

    def infer(
        self,
        observation: Observation,
        instruction: str,
        *,
        noise: NDArray[np.float32] | None = None,  # noqa: ARG002  the recorded takes its place
        prev_chunk: NDArray[np.float32] | None = None,
        delay: int = 0,
        guidance: Guidance | None = None,
    ) -> PolicyOutput:
        """As `Policy.infer`."""
        recorded = self._recorded
        assert recorded is not None, "no record is shown"
        fields = recorded.dtype.names or ()
        self.answer = self._policy.infer(
            observation,
            instruction,
            noise=recorded["noise"] if self.noise is None else self.noise,
            directions=recorded["directions"] if "directions" in fields else None,
            prev_chunk=prev_chunk,
            delay=delay,
            guidance=guidance,
        )
        self._clock.now_ns = int(recorded["inferred_ns"])
        if self.noise is not None or not self._follows_record:
            return self.answer
        actions = recorded["actions"]
        return replace(self.answer, actions=actions, keys=self.language.decode(actions))
