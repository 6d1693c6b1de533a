"""From an observation to a committed chunk, in every mode: when, around which prefix, with which seam.

No clock, no thread and no camera: the inference thread and `evaluate` in simulated time take the same steps.

    is_due ──▶ plan: what is committed ─▶ prefix ─▶ policy ─▶ absolute targets ──▶ publish ──▶ the delay is counted
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from onbeat.embodiment.kinds import from_absolute, to_absolute
from onbeat.kernels.splice import guidance_weights
from onbeat.runtime.delay import (
    SPACING_QUANTILE,
    WINDOW,
    DelayBudget,
    DelayTooLong,
    bound_problem,
    elapsed_steps,
    executed_steps,
    leaves_gap,
    quantile_steps,
    spaced_steps,
)
from onbeat.runtime.engine import Guidance, PolicySpec
from onbeat.runtime.language import PolicyLanguage
from onbeat.runtime.modes import ASYNC, GUIDED, LOCKED, SYNC
from onbeat.runtime.observation import Observation
from onbeat.runtime.policy import PolicyOutput
from onbeat.runtime.robots import Robot, joint_values
from onbeat.runtime.timeline import NEVER, Timeline, publish, remembered_target

# C rows of a chunk, R rows of a prefix, J joints.


class Policy(Protocol):
    """What a chunker asks of a policy; `onbeat.runtime.policy.Policy` is one."""

    language: PolicyLanguage

    @property
    def spec(self) -> PolicySpec: ...

    def infer(
        self,
        observation: Observation,
        instruction: str,
        *,
        noise: NDArray[np.float32] | None = None,
        prev_chunk: NDArray[np.float32] | None = None,
        delay: int = 0,
        guidance: Guidance | None = None,
    ) -> PolicyOutput: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """One inference. targets: (C, J) rad. budget: the delay d it was made for. locked: rows kept as committed."""

    observed_ns: int
    targets: NDArray[np.float64]
    budget: int
    locked: int
    output: PolicyOutput


@dataclass(frozen=True, slots=True)
class Prefix:
    """What the policy is told of the chunk before: rows (R, 200), how many to keep, how to be guided by the others."""

    rows: NDArray[np.float32] | None = None
    locked: int = 0
    guidance: Guidance | None = None


@dataclass(slots=True)
class Chunker:
    """The steps, for one policy on one robot. mode: one of modes.MODES, already chosen. One thread calls it.

    allow_untrained: in LOCKED, keep more rows than the checkpoint was trained to continue. executed: d of the last
    chunk that came. spaced: s from each observation of the last chunks to the next.
    """

    policy: Policy
    robot: Robot
    timeline: Timeline
    mode: str = ASYNC
    allow_untrained: bool = False
    budget: DelayBudget = field(init=False)
    executed: int = field(default=0, init=False)
    spaced: deque[int] = field(default_factory=lambda: deque(maxlen=WINDOW), init=False)
    _observed_ns: int = field(default=NEVER, init=False)
    _spaced_from_ns: int = field(default=NEVER, init=False)
    _not_before_ns: int = field(default=NEVER, init=False)

    def __post_init__(self) -> None:
        self.budget = DelayBudget(self.robot.config.margin_steps)

    @property
    def horizon(self) -> int:
        """s, the policy steps from one observation to the next: as asked for, or more where they are further apart."""
        asked = self.robot.config.execute_steps
        if self.mode == SYNC:
            return min(asked or self.policy.spec.chunk, self.policy.spec.chunk)
        return max(asked, self.budget.steps(), quantile_steps(self.spaced, SPACING_QUANTILE))

    def is_due(self, observed_ns: int) -> bool:
        """Whether to infer from an observation of that time: newer than the last, and s steps after it.

        With SYNC: made after the robot has come to the end of its chunk.
        """
        return observed_ns > self._observed_ns and observed_ns >= self._not_before_ns

    def hurry(self) -> None:
        """The next observation is due as soon as it comes; with SYNC the robot comes to the end of its chunk first."""
        if self.mode != SYNC:
            self._not_before_ns = NEVER

    def plan(self, observation: Observation, instruction: str, *, noise: NDArray[np.float32] | None = None) -> Plan:
        """Ask the policy for a chunk. Publishes nothing. noise: drawn when None."""
        observed = joint_values(self.robot, observation.state)
        t0_ns, budget = observation.t_capture_ns, self.budget.steps()
        before = self._committed_rows(t0_ns - self.robot.policy_period_ns, 1)
        around = {"committed": before[0] if len(before) else observed, "observed": observed}
        prefix = self._prefix(t0_ns, budget, around)
        output = self.policy.infer(
            observation,
            instruction,
            noise=noise,
            prev_chunk=prefix.rows,
            delay=prefix.locked,
            guidance=prefix.guidance,
        )
        embodiment = self.robot.embodiment
        targets = to_absolute(embodiment, embodiment.flatten(output.keys), **around)
        return Plan(t0_ns, targets, budget, prefix.locked, output)

    def publish(self, plan: Plan, now_ns: int, *, is_cold: bool = False) -> int:
        """Commit a plan; returns its first own row, or one of timeline.REFUSALS. A cold inference counts as no delay.

        With SYNC the robot stands, so row 0 is due now, and the chunk ends with the horizon.
        """
        period_ns, config = self.robot.policy_period_ns, self.robot.config
        is_sync = self.mode == SYNC
        first_row = publish(
            self.timeline,
            plan.targets[: self.horizon] if is_sync else plan.targets,
            t0_ns=now_ns if is_sync else plan.observed_ns,
            period_ns=period_ns,
            now_ns=now_ns,
            locked_rows=plan.locked,
            blend_rows=config.blend_steps,
        )
        came = (max(now_ns, int(self.timeline.met_ns[0])), plan.observed_ns, period_ns)
        self.executed = executed_steps(*came)
        if not is_cold:
            self.budget.add(elapsed_steps(*came))
        if first_row >= 0:
            self._count_spacing(plan.observed_ns, is_cold)
        self._observed_ns = max(self._observed_ns, plan.observed_ns)
        self._not_before_ns = self._next_ns(plan, now_ns) if first_row >= 0 else NEVER
        return first_row

    def count_delay(self, observed_ns: int, now_ns: int) -> None:
        """An inference that was warm had its chunk ready at now_ns."""
        ran_until_ns = max(now_ns, int(self.timeline.progress_ns[0]))
        self.budget.add(elapsed_steps(ran_until_ns, observed_ns, self.robot.policy_period_ns))

    def check_start(self) -> str:
        """What is wrong with d, s and H before anything moves. Raises DelayTooLong when no margin is to blame."""
        rows, measured = self.policy.spec.chunk, self.budget.measured()
        if self.mode != SYNC and leaves_gap(measured, self.robot.config.execute_steps, rows):
            raise DelayTooLong(bound_problem(measured, self.robot.config.execute_steps, rows))
        return self.problem()

    def problem(self) -> str:
        """What is wrong with d, s and H as of now, with the figures; empty when nothing is."""
        if self.mode == SYNC:
            return ""
        delay, trained = self.budget.steps(), self.policy.spec.trained_delay
        if self.mode == LOCKED and not self.allow_untrained and delay > trained:
            return (
                f"d = {delay} policy steps is more than the {trained} rows that the checkpoint was trained to "
                "continue: infer faster, lower margin_steps, or train with a longer simulated delay"
            )
        spaced = quantile_steps(self.spaced, SPACING_QUANTILE)
        return bound_problem(delay, self.robot.config.execute_steps, self.policy.spec.chunk, spaced)

    def _count_spacing(self, observed_ns: int, is_cold: bool) -> None:
        """Of a chunk that was taken. What follows a cold inference is late for it and says nothing of the others."""
        if self._spaced_from_ns != NEVER:
            self.spaced.append(spaced_steps(self._spaced_from_ns, observed_ns, self.robot.policy_period_ns))
        self._spaced_from_ns = NEVER if is_cold else observed_ns

    def _next_ns(self, plan: Plan, now_ns: int) -> int:
        """When the next observation is due, half a period early: a camera's frames need not fall on policy steps."""
        period_ns = self.robot.policy_period_ns
        if self.mode == SYNC:
            return now_ns + self.horizon * period_ns
        return plan.observed_ns + self.robot.config.execute_steps * period_ns - period_ns // 2

    def _prefix(self, t0_ns: int, budget: int, around: dict[str, NDArray[np.float64]]) -> Prefix:
        spec = self.policy.spec
        if self.mode not in (LOCKED, GUIDED):
            return Prefix()
        most = spec.chunk if self.allow_untrained else spec.trained_delay
        wanted = spec.chunk if self.mode == GUIDED else min(budget, most)
        committed = self._committed_rows(t0_ns, wanted)
        if len(committed) == 0:
            return Prefix()
        embodiment = self.robot.embodiment
        values = embodiment.split(from_absolute(embodiment, committed, **around))
        rows = self.policy.language.encode(values)
        if self.mode == LOCKED:
            return Prefix(rows, locked=len(rows))
        weights = guidance_weights(spec.chunk, min(budget, spec.chunk), self.horizon)
        weights[len(rows) :] = 0.0
        return Prefix(rows, guidance=Guidance(weights, float(spec.sampler.flow_steps)))

    def _committed_rows(self, t0_ns: int, rows: int) -> NDArray[np.float64]:
        """What the robot is committed to at t0_ns, a period later, ...: (R, J), R <= rows, as far as it is."""
        targets = np.empty((rows, self.timeline.targets.shape[2]))
        for k in range(rows):
            remembered_target(self.timeline, t0_ns + k * self.robot.policy_period_ns, targets[k])
            if np.isnan(targets[k]).any():
                return targets[:k]
        return targets
