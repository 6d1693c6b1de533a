"""The figures of decision 0014: what the harness of `onbeat evaluate` lets through, and what it costs.

Run from the repository root: python docs/decisions/0014_evaluate.py
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.twin.world import HOME_RAD, World
from onbeat.runtime.engine import PolicySpec, SamplerSpec
from onbeat.runtime.episode import AS_SEEN, Conditions, Scene, run_episode
from onbeat.runtime.evaluate import FIRST_SEED
from onbeat.runtime.measures import wilson_interval
from onbeat.runtime.observation import Observation
from onbeat.runtime.policy import PolicyOutput, StageTimes
from onbeat.runtime.robots import load_robot
from onbeat.training.expert import Expert, execute

ROBOT = load_robot("so101-twin")
CHUNK = 12
CONDITIONS = Conditions("lift the red cube")
NONE = np.zeros((0, 0), np.float32)
SPEC = PolicySpec(2, 56, 4, CHUNK, 8, 0, SamplerSpec(1, 1, "off", 0.0, 1.0, 1))


@dataclass(slots=True)
class Replay:
    """A policy that knows the goals (T, J) in advance, one per policy period, and gives them out in chunks."""

    goals: NDArray[np.float64]
    language: Any = None
    spec: PolicySpec = SPEC

    def infer(self, observation: Observation, *_: Any, **__: Any) -> PolicyOutput:
        step = observation.t_capture_ns // ROBOT.policy_period_ns
        rows = self.goals[np.minimum(np.arange(step, step + CHUNK), len(self.goals) - 1)]
        return PolicyOutput(NONE, ROBOT.embodiment.split(rows), NONE, NONE, StageTimes(0, 0, 0), NONE, None)


def expert(seed: int) -> Replay:
    """What the scripted expert does in a world of its own with the same seed."""
    world = World()
    world.reset(seed)
    teacher = Expert(world.position_rad)
    goals = [teacher.goal_rad]
    for _ in range(110):
        goals.append(teacher.advance(world.truth(), world.position_rad).copy())
        execute(world, goals[-2], goals[-1])
    return Replay(np.stack(goals))


def home(_: int) -> Replay:
    return Replay(HOME_RAD[None])


def lifted(scene: Scene, policy: Callable[[int], Replay], seeds: Sequence[int]) -> str:
    outcomes = [run_episode(scene, ROBOT, policy(seed), seed, CONDITIONS) for seed in seeds]
    successes = sum(outcome.success_s is not None for outcome in outcomes)
    low, high = wilson_interval(successes, len(outcomes))
    return f"{successes} of {len(outcomes)}, Wilson 95 % {100 * low:.0f}-{100 * high:.0f} %"


def main() -> None:
    with Scene() as scene:
        print("expert, replayed:", lifted(scene, expert, range(FIRST_SEED, FIRST_SEED + 20)))
        began_s = time.process_time()
        print("home, held:", lifted(scene, home, range(FIRST_SEED, FIRST_SEED + 10)))
        print(f"processor time per simulated second: {(time.process_time() - began_s) / 120:.3f} s")
        began_s = time.perf_counter()
        for _ in range(100):
            scene.look(AS_SEEN)
        print(f"frames of an observation: {(time.perf_counter() - began_s) * 10:.1f} ms")


if __name__ == "__main__":
    main()
