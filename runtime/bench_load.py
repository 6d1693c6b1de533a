"""The load under which loops are compared: a thread that never lets go of the interpreter by itself, and a policy.

Both are what a robot's process really has: Python that computes, and an inference engine that is never idle. The
policy's chunks go to the timeline of the loop that is being measured.
"""

import threading
import time
from pathlib import Path

import numpy as np

from onbeat.drivers.interfaces import Frame
from onbeat.runtime.observation import Observation
from onbeat.runtime.policy import Policy, load_policy
from onbeat.runtime.robots import Robot, state_values
from onbeat.runtime.run import DEFAULT_INSTRUCTION
from onbeat.runtime.tick import TickState
from onbeat.runtime.timeline import publish

FRAME_PIXELS = 112
SWAY_RAD = 0.1


class Load:
    """Both threads, for the length of a `with` block. inferences: how many the policy has made. spec: the policy's.

    Set `fed` to the state of the loop that is to get the chunks.
    """

    def __init__(self, bundle: Path, robot: Robot) -> None:
        self.inferences = 0
        self.fed: TickState | None = None
        self._robot = robot
        self._policy: Policy = load_policy(bundle, embodiment=robot.embodiment)
        self.spec = self._policy.spec
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._burn, self._infer)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        while self.inferences == 0:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _burn(self) -> None:
        count = 0
        while not self._stop.is_set():
            for _ in range(10_000):
                count += 1

    def _infer(self) -> None:
        robot = self._robot
        frames = {view: np.zeros((FRAME_PIXELS, FRAME_PIXELS, 3), np.uint8) for view in robot.embodiment.views}
        while not self._stop.is_set():
            now_ns = time.monotonic_ns()
            views = {name: Frame(self.inferences, now_ns, rgb) for name, rgb in frames.items()}
            state = state_values(robot, np.zeros(len(robot.joints)))
            self._policy.infer(Observation(views, state, now_ns), DEFAULT_INSTRUCTION)
            self.inferences += 1
            self._feed(now_ns)

    def _feed(self, t0_ns: int) -> None:
        """A gentle sway in place of the policy's own targets, which mean nothing for black pictures."""
        state, period_ns = self.fed, self._robot.policy_period_ns
        if state is None:
            return
        rows, joints = state.timeline.targets.shape[1:]
        phase = (t0_ns / 1e9 + np.arange(rows) * period_ns / 1e9)[:, None]
        middle = (self._robot.limits.q_min + self._robot.limits.q_max) / 2
        targets = middle + SWAY_RAD * np.sin(phase * np.ones(joints))
        publish(state.timeline, targets, t0_ns=t0_ns, period_ns=period_ns, now_ns=time.monotonic_ns())
