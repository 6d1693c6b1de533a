"""Who judges the twin's task: an attempt succeeds when the cube stays lifted, fails when it takes too long. Pure."""

from dataclasses import dataclass
from typing import Literal

LIFT_M = 0.05
HOLD_NS = 500_000_000

Event = Literal["attempt_started", "lifted", "timed_out"]


@dataclass(slots=True)
class Referee:
    """Attempts one after the other; the first starts when the arm is first commanded.

    After "lifted" or "timed_out" an unseen hand puts the cube elsewhere and the next attempt starts.
    """

    timeout_ns: int
    attempt: int = 0
    successes: int = 0
    failures: int = 0
    start_ns: int = 0
    lifted_since_ns: int | None = None

    def start_attempt(self, now_ns: int) -> Event:
        """The cube lies at a new place."""
        self.attempt += 1
        self.start_ns, self.lifted_since_ns = now_ns, None
        return "attempt_started"

    def judge(self, now_ns: int, cube_height_m: float) -> Event | None:
        """What the cube's height above the table means now; None while the attempt goes on or none has started."""
        if self.attempt == 0:
            return None
        if cube_height_m < LIFT_M:
            self.lifted_since_ns = None
        elif self.lifted_since_ns is None:
            self.lifted_since_ns = now_ns
        if self.lifted_since_ns is not None and now_ns - self.lifted_since_ns >= HOLD_NS:
            self.successes += 1
            return "lifted"
        if now_ns - self.start_ns >= self.timeout_ns:
            self.failures += 1
            return "timed_out"
        return None
