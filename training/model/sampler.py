"""The gated flow sampler: from noise to a chunk of actions, as pure functions over a velocity.

Noise and directions are inputs, so any run can be replayed bit for bit.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.engine import SamplerSpec
from onbeat.training.config import TIME_BUCKETS, GateConfig, PolicyConfig
from onbeat.training.model.gating import Gated
from onbeat.training.model.policy import Cache, Policy

# B batch, I iterations, T flow steps, C chunk rows, A = 200 slots, M directions, E and H widths of the action and
# understanding streams. Sampling has one draw per prefix: its axis D is 1.

StepVelocity = Callable[[Tensor, int], Tensor]

CLEAN_BUCKET = TIME_BUCKETS
OVERRIDES = (
    "num_inference_timesteps",
    "use_mpg",
    "mpg_lambda",
    "mpg_num_projections",
    "mpg_refinement_iters",
    "mpg_gate_temperature",
)
TIME_DTYPES = {"scalar": torch.float64, "rtc_float32": torch.float32, "rtc_bfloat16": torch.bfloat16}


class OverrideError(OnbeatError):
    """A sampler setting that does not exist or makes no sense."""


class Sampled(NamedTuple):
    """actions (B, C, A); gate and cost (I - 1, T, B), empty when the gate is off."""

    actions: Tensor
    gate: Tensor
    cost: Tensor


class Lock(NamedTuple):
    """The first `delay` of `rows` (C, A) or (B, C, A) are committed: kept through every step, at the clean time."""

    rows: Tensor
    delay: int | Tensor

    def apply(self, actions: Tensor) -> Tensor:
        """Actions (B, C, A) with the committed rows in place."""
        return torch.where(self._held().unsqueeze(-1), self.rows, actions)

    def hold_time(self, buckets: Tensor) -> Tensor:
        """Time buckets (C,) with the clean time on the committed rows."""
        return torch.where(self._held(), CLEAN_BUCKET, buckets)

    def _held(self) -> Tensor:
        return torch.arange(self.rows.shape[-2], device=self.rows.device) < self.delay


class Pull(NamedTuple):
    """A soft prefix: velocities lead towards `rows` (C, A) or (B, C, A). See runtime.engine.Guidance.

    weights: (C,). beta: the largest gain.
    """

    rows: Tensor
    weights: Tensor
    beta: float

    def apply(self, velocity: Tensor, actions: Tensor, time: float) -> Tensor:
        """The velocity (B, C, A) at (actions, time) with the pull; where its gain is 0, the same bits as without."""
        gain = (self.weights * min(self.beta, pull_limit(time))).unsqueeze(-1)
        reached = actions + (1 - time) * velocity
        return torch.where(gain > 0, velocity + gain * (self.rows - reached), velocity)


def pull_limit(time: float) -> float:
    """(t^2 + (1-t)^2) / (t (1-t)), the gain that guidance has at time t in [0, 1) where beta does not cut it."""
    return float("inf") if time == 0 else (time * time + (1 - time) ** 2) / (time * (1 - time))


def time_buckets(steps: int, precision: str = "scalar") -> tuple[int, ...]:
    """The integer time bucket of each flow step, truncated.

    precision: "scalar" in Python; with a locked prefix the published code computes per row in the network's own
    type, "rtc_float32" (the same for every step count up to 50) or "rtc_bfloat16" (0.75 becomes bucket 752).
    """
    times = torch.tensor([step / steps for step in range(steps)], dtype=torch.float64).to(TIME_DTYPES[precision])
    return tuple((times * TIME_BUCKETS).long().tolist())


def choose_sampler(
    config: PolicyConfig, overrides: Mapping[str, bool | int | float] | None = None, *, directions: bool = False
) -> SamplerSpec:
    """The sampler of a checkpoint with `overrides` of its config.json; directions: the caller gives them (parity).

    The gate is on iff use_mpg, the checkpoint has its modules, lambda > 0 and refinements > 0. Raises OverrideError.
    """
    values = dict(overrides or {})
    _check_overrides(values)
    gate = _override_gate(config.gate, values)
    steps = int(values.get("num_inference_timesteps", config.flow_steps))
    if steps < 1:
        raise OverrideError(f"num_inference_timesteps is {steps}: give at least 1")
    if not (gate.present and gate.strength > 0 and gate.refinements > 0):
        return SamplerSpec(steps, 1, "off", 0.0, 1.0, 0)
    mode, count = ("directions", gate.directions) if directions else ("expectation", 0)
    return SamplerSpec(steps, 1 + gate.refinements, mode, gate.strength, gate.temperature, count)


def _check_overrides(values: Mapping[str, object]) -> None:
    unknown = sorted(values.keys() - set(OVERRIDES))
    if unknown:
        raise OverrideError(f"unknown sampler override {unknown[0]!r}: give one of {', '.join(OVERRIDES)}")
    for name, value in values.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise OverrideError(f"{name} is {value!r}: give a number")


def _override_gate(gate: GateConfig, values: Mapping[str, bool | int | float]) -> GateConfig:
    changed = replace(
        gate,
        present=gate.present and bool(values.get("use_mpg", True)),
        strength=float(values.get("mpg_lambda", gate.strength)),
        temperature=float(values.get("mpg_gate_temperature", gate.temperature)),
        directions=int(values.get("mpg_num_projections", gate.directions)),
        refinements=int(values.get("mpg_refinement_iters", gate.refinements)),
    )
    if changed.temperature <= 0 or changed.directions < 1:
        raise OverrideError("mpg_gate_temperature and mpg_num_projections must be positive: correct the override")
    if values.get("mpg_refinement_iters", 0) < 0:
        raise OverrideError(f"mpg_refinement_iters is {changed.refinements}: give at least 0, which is no gate")
    return changed


def fit_chunk(previous: Tensor, chunk: int) -> Tensor:
    """(R, A) to (C, A): cut, or padded by repeating the last row."""
    rows = torch.arange(chunk, device=previous.device).clamp(max=previous.shape[0] - 1)
    return previous[rows]


def integrate(
    velocity: StepVelocity, noise: Tensor, steps: int, lock: Lock | None = None, pull: Pull | None = None
) -> Tensor:
    """Euler steps from noise (B, C, A) at time 0 to actions at time 1; no clipping."""
    actions = noise if lock is None else lock.apply(noise)
    for step in range(steps):
        forward = velocity(actions, step)
        forward = forward if pull is None else pull.apply(forward, actions, step / steps)
        actions = actions + forward / steps
        actions = actions if lock is None else lock.apply(actions)
    return actions


def sample_chunk(
    policy: Policy,
    cache: Cache,
    spec: SamplerSpec,
    noise: Tensor,
    *,
    directions: Tensor | None = None,
    lock: Lock | None = None,
    pull: Pull | None = None,
    slots: Tensor | None = None,
) -> Sampled:
    """Plain sample first, then refinements, each from its own noise and anchored on the result before it.

    noise: (I, B, C, A). directions: raw, (I - 1, T, M, H), None for the expectation. slots: (A,) or (B, 1, A) bool, the
    robot's; the others stay 0 where the network was trained so.
    """
    noise = rest_idle(policy.config, noise, slots)
    buckets = _row_buckets(spec.flow_steps, noise, lock)

    def sample(velocity: StepVelocity, start: Tensor) -> Tensor:
        def moving(x: Tensor, step: int) -> Tensor:
            return rest_idle(policy.config, velocity(x, step), slots)

        return integrate(moving, start, spec.flow_steps, lock, pull)

    actions = sample(_first_velocity(policy, cache, buckets), noise[0])
    trace: list[Gated] = []
    for iteration in range(1, spec.iterations):
        drawn = None if directions is None else directions[iteration - 1]
        velocity = _gated_velocity(policy, cache, buckets, encode_anchor(policy, actions), spec, drawn, trace)
        actions = sample(velocity, noise[iteration])
    return Sampled(actions, *_stack_trace(trace, spec, noise))


def rest_idle(config: PolicyConfig, x: Tensor, slots: Tensor | None) -> Tensor:
    """x (..., A) with 0 in the slots that are not the robot's, where the network was trained so; else x."""
    return x if slots is None or config.idle_slots == "noise" else torch.where(slots, x, 0.0)


def encode_anchor(policy: Policy, clean: Tensor) -> Tensor:
    """Clean actions (..., C, A) to the gate's anchor (..., H), at the configured time (0 as published)."""
    assert policy.mpg is not None, "the checkpoint has no gate"
    bucket = torch.full(clean.shape[:-1], policy.config.gate.anchor_bucket, device=clean.device)
    return policy.mpg.anchor(policy.action_encoder(clean, bucket))


def _row_buckets(steps: int, noise: Tensor, lock: Lock | None) -> list[Tensor]:
    batch, chunk = noise.shape[1:3]
    rows = [torch.full((chunk,), bucket, device=noise.device) for bucket in time_buckets(steps)]
    rows = rows if lock is None else [lock.hold_time(row) for row in rows]
    return [row.expand(batch, chunk) for row in rows]


def _first_velocity(policy: Policy, cache: Cache, buckets: list[Tensor]) -> StepVelocity:
    gate = policy.mpg if policy.config.gate.first_pass == "projected" else None

    def velocity(actions: Tensor, step: int) -> Tensor:
        features = policy.action_encoder(actions, buckets[step])
        return _decode(policy, cache, features if gate is None else gate.project(features))

    return velocity


def _gated_velocity(
    policy: Policy,
    cache: Cache,
    buckets: list[Tensor],
    anchor: Tensor,
    spec: SamplerSpec,
    directions: Tensor | None,
    trace: list[Gated],
) -> StepVelocity:
    gate = policy.mpg
    assert gate is not None, "the checkpoint has no gate"

    def velocity(actions: Tensor, step: int) -> Tensor:
        features = policy.action_encoder(actions, buckets[step])
        drawn = None if directions is None else directions[step]
        gated = gate(features, anchor, drawn, strength=spec.gate_lambda, temperature=spec.gate_temperature)
        trace.append(gated)
        return _decode(policy, cache, gated.features)

    return velocity


def _decode(policy: Policy, cache: Cache, features: Tensor) -> Tensor:
    return policy.decode_velocity(cache, features.unsqueeze(1)).squeeze(1)


def _stack_trace(trace: list[Gated], spec: SamplerSpec, noise: Tensor) -> tuple[Tensor, Tensor]:
    shape = (spec.iterations - 1, spec.flow_steps, noise.shape[1])
    if not trace:
        return noise.new_zeros(shape), noise.new_zeros(shape)
    gates, costs = [gated.gate for gated in trace], [gated.cost for gated in trace]
    return torch.stack(gates).reshape(shape), torch.stack(costs).reshape(shape)
