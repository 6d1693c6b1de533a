"""One try at the task in simulated time: world, tick and policy of a real run, with the clock as a variable.

What differs from `onbeat run`: no wire (goals and positions are rounded to servo steps instead), no scheduling jitter,
and inference takes exactly the latency it is given. The chunk that was inferred becomes visible that much later.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.feetech.protocol import RAD_PER_STEP
from onbeat.drivers.interfaces import Frame
from onbeat.drivers.twin.referee import Referee
from onbeat.runtime.chunker import Chunker, Plan, Policy
from onbeat.runtime.modes import choose_mode
from onbeat.runtime.observation import Observation
from onbeat.runtime.policy import draw_noise
from onbeat.runtime.robots import Robot, state_values
from onbeat.runtime.tick import new_tick_state, tick

if TYPE_CHECKING:
    from onbeat.drivers.twin.world import World

# J joints.

NOISE = 1  # the stream of an episode's seed that the policy's noise is drawn from
AS_SEEN, BLANK, OTHER = "as seen", "blank", "other"  # what the policy is shown: OTHER is another seed's cube
OTHER_SEED_OFFSET = 500_000  # away from every seed that is evaluated or trained on


@dataclass(frozen=True, slots=True)
class Conditions:
    """How an episode is run. shown: AS_SEEN, BLANK or OTHER. latency_ns: observation to published chunk.

    mode: one of modes.MODES, "" for the checkpoint's own.
    """

    instruction: str
    latency_ns: int = 60_000_000  # p50 of a run with a small bundle, docs/decisions/0014
    timeout_ns: int = 12_000_000_000
    shown: str = AS_SEEN
    mode: str = ""
    allow_untrained_prefix: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one seed. success_s: when the cube had been up long enough, None when it never was.

    highest_m: of the cube. delays: rows of the old chunk that ran after an observation (or LATE) -> chunks.
    """

    seed: int
    success_s: float | None
    highest_m: float
    chunks: int
    held_ticks: int
    limited_ticks: int
    delays: Mapping[int, int]


class Scene:
    """The world, and a second one for what the policy is shown when it is not this. Owns both; a context manager."""

    def __init__(self, frame_size: tuple[int, int] = (112, 112)) -> None:
        from onbeat.drivers.twin.world import VIEWS, World

        self.views = VIEWS
        self.world, self._other = World(frame_size=frame_size), World(frame_size=frame_size)

    def reset(self, seed: int) -> None:
        """The same seed gives the same episode."""
        self.world.reset(seed)
        self._other.reset(seed + OTHER_SEED_OFFSET)

    def look(self, shown: str) -> dict[str, NDArray[np.uint8]]:
        """A frame per view of what the policy is shown."""
        return {view: self._draw(shown, view) for view in self.views}

    def _draw(self, shown: str, view: str) -> NDArray[np.uint8]:
        if shown == BLANK:
            return np.zeros((*self.world.frame_size, 3), np.uint8)
        return (with_cube_of(self._other, self.world) if shown == OTHER else self.world).render(view)

    def close(self) -> None:
        """Give the drawing contexts back."""
        self.world.close()
        self._other.close()

    def __enter__(self) -> "Scene":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def with_cube_of(other: "World", world: "World") -> "World":
    """`other` with the arm of `world`: the robot sees itself as it is, and a cube that is not there."""
    pose = other.qpos_snapshot()
    pose[: len(world.position_rad)] = world.position_rad
    other.set_qpos_snapshot(pose)
    return other


def run_episode(scene: Scene, robot: Robot, policy: Policy, seed: int, conditions: Conditions) -> Outcome:
    """One episode from reset to success or time-out. The same arguments give the same outcome."""
    episode = Episode(scene, robot, policy, seed, conditions)
    while not episode.is_over:
        episode.step()
    return episode.outcome()


class Episode:
    """The state of one episode; `step` is one tick, in the order of the real loop."""

    def __init__(self, scene: Scene, robot: Robot, policy: Policy, seed: int, conditions: Conditions) -> None:
        scene.reset(seed)
        self.is_over = False
        self.state = new_tick_state(
            robot.limits,
            rate_hz=robot.config.loop_rate_hz,
            rows=policy.spec.chunk,
            workspace=robot.workspace(),
            settings=robot.safety,
        )
        self._scene, self._robot, self._policy, self._conditions = scene, robot, policy, conditions
        self._seed, self._noise = seed, np.random.default_rng([seed, NOISE])
        self._tick_ns = round(1e9 / robot.config.loop_rate_hz)
        self._now_ns, self._highest_m = 0, 0.0
        self._world_start_ns = scene.world.time_ns
        self._referee = Referee(conditions.timeout_ns)
        self._referee.start_attempt(0)
        mode = choose_mode(policy.spec, conditions.mode, allow_untrained_prefix=conditions.allow_untrained_prefix)
        self._chunker = Chunker(policy, robot, self.state.timeline, mode, conditions.allow_untrained_prefix)
        self._chunker.count_delay(0, conditions.latency_ns)
        self._coming: Plan | None = None
        self._delays: Counter[int] = Counter()

    def step(self) -> None:
        """Take over a chunk that is ready, start the next, tick, command the servos, let the world move on."""
        self._take_over()
        self._infer()
        world, state = self._scene.world, self.state
        state.measured_q[:] = in_servo_steps(world.position_rad)
        tick(state, self._now_ns)
        world.set_goal_rad(in_servo_steps(state.command_q))
        self._now_ns += self._tick_ns
        world.step(self._world_start_ns + self._now_ns - world.time_ns)  # whole physics steps, which a tick may not be
        height_m = world.truth().cube_height_m
        self._highest_m = max(self._highest_m, height_m)
        self.is_over = self._referee.judge(self._now_ns, height_m) is not None

    def outcome(self) -> Outcome:
        """What has come of it so far."""
        counters = self.state.counters
        return Outcome(
            seed=self._seed,
            success_s=self._now_ns / 1e9 if self._referee.successes else None,
            highest_m=self._highest_m,
            chunks=int(self.state.timeline.published[0]),
            held_ticks=int(counters.held[0]),
            limited_ticks=int(counters.limited[0]),
            delays=dict(sorted(self._delays.items())),
        )

    def _take_over(self) -> None:
        plan = self._coming
        if plan is None or self._now_ns < plan.observed_ns + self._conditions.latency_ns:
            return
        self._coming = None
        self._delays[self._chunker.publish(plan, self._now_ns)] += 1

    def _infer(self) -> None:
        """A frame comes at the first tick of every policy period."""
        is_frame = self._now_ns % self._robot.policy_period_ns < self._tick_ns
        if self._coming is not None or not is_frame or not self._chunker.is_due(self._now_ns):
            return
        noise = draw_noise(self._noise, self._policy.spec)
        self._coming = self._chunker.plan(self._observe(), self._conditions.instruction, noise=noise)

    def _observe(self) -> Observation:
        frames = self._scene.look(self._conditions.shown)
        views = {name: Frame(0, self._now_ns, rgb) for name, rgb in frames.items()}
        joints = in_servo_steps(self._scene.world.position_rad)
        return Observation(views, state_values(self._robot, joints), self._now_ns)


def in_servo_steps(angle_rad: NDArray[np.float64]) -> NDArray[np.float64]:
    """Angles as the servos know them: whole steps of 0.088 degrees."""
    return np.rint(angle_rad / RAD_PER_STEP) * RAD_PER_STEP
