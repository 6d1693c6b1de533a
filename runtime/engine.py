"""What the runtime asks of an inference engine: one prefix pass for an observation, then flow passes from noise."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from onbeat.embodiment.errors import OnbeatError

# V views, S image side in pixels, N prefix tokens, C chunk rows, A = 200 unified action slots,
# I sampler iterations (1 + refinements), T flow steps, M gate directions, H width of the understanding stream.


@dataclass(frozen=True, slots=True)
class PolicyInputs:
    """One observation in the network's terms.

    views: (V, S, S, 3) uint8 RGB after the exact resize and crop. token_ids: (N,) int64, the prefix in order, with 0
    where the V x tokens_per_view image tokens and the state token stand. image_start, state_index: where those begin.
    state: (200,) float32, normalised unified state.
    """

    views: NDArray[np.uint8]
    token_ids: NDArray[np.int64]
    image_start: int
    state_index: int
    state: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SamplerSpec:
    """What is fixed when an engine is built. Steps and iterations are unrolled in the flow graph.

    gate: "off" (plain flow, iterations = 1), "directions" (parity: the caller gives them) or "expectation"
    (deterministic).
    """

    flow_steps: int
    iterations: int
    gate: str
    gate_lambda: float
    gate_temperature: float
    gate_directions: int


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """A Mixture of Flow: in each of `layers` layers, a chunk's actions take top_k of `count` experts.

    routing: "observation", chosen by the prefix, so that one chunk reads top_k experts' weights; "token", by every row.
    """

    layers: int
    count: int
    top_k: int
    routing: str


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """Shapes and abilities of a policy. trained_delay: largest prefix the checkpoint was trained with, 0 if none.

    guidance: whether the sampler can be pulled towards a previous chunk; bundles of older versions cannot.
    experts: None where every layer has one feed-forward.
    """

    views: int
    image_size: int
    tokens_per_view: int
    chunk: int
    understanding_width: int
    trained_delay: int
    sampler: SamplerSpec
    guidance: bool = False
    experts: ExpertsSpec | None = None


@dataclass(frozen=True, slots=True)
class Guidance:
    """How strongly the sampler is pulled towards the previous chunk: v += min(beta, p(t)) w (prev - a1).

    v is the velocity at (x, t), a1 = x + (1 - t) v the actions it leads to, p(t) = (t^2 + (1-t)^2) / (t (1-t)).
    weights: w, (C,) float32 in 0..1, a number per row. beta: at most T, for an Euler step of 1/T overshoots above it.
    Source: arXiv 2506.07339 without its Jacobian, which leaves an element-wise correction.
    """

    weights: NDArray[np.float32]
    beta: float


class GuidanceError(OnbeatError):
    """A guidance that the policy cannot follow."""


def check_guidance(guidance: Guidance, prev_chunk: NDArray[np.float32] | None, spec: PolicySpec) -> None:
    """Raise GuidanceError for what this policy cannot be guided by."""
    weights, most = guidance.weights, spec.sampler.flow_steps
    if not spec.guidance:
        raise GuidanceError("this bundle's flow graph takes no guidance: export the checkpoint again")
    if prev_chunk is None:
        raise GuidanceError("guidance without a previous chunk: give prev_chunk")
    if weights.shape != (spec.chunk,) or not ((weights >= 0) & (weights <= 1)).all():
        raise GuidanceError(f"guidance weights must be {spec.chunk} numbers from 0 to 1: give one per row")
    if not 0 <= guidance.beta <= most:
        raise GuidanceError(f"a guidance of beta {guidance.beta} overshoots in {most} flow steps: give 0 to {most}")


@dataclass(frozen=True, slots=True)
class FlowResult:
    """actions: (C, 200) float32, normalised unified actions. gate, cost: (I-1, T) float32; empty for gate "off"."""

    actions: NDArray[np.float32]
    gate: NDArray[np.float32]
    cost: NDArray[np.float32]


class Engine(Protocol):
    """A policy that can be run. Not thread-safe: one thread owns it."""

    @property
    def spec(self) -> PolicySpec: ...

    def prefix(self, inputs: PolicyInputs) -> Any:
        """Run vision and prefix; returns the engine's own handle on the K/V cache, valid until the next call."""
        ...

    def flow(
        self,
        prefix: Any,
        noise: NDArray[np.float32],
        *,
        directions: NDArray[np.float32] | None = None,
        prev_chunk: NDArray[np.float32] | None = None,
        delay: int = 0,
        guidance: Guidance | None = None,
    ) -> FlowResult:
        """Sample one chunk.

        noise: (I, C, 200). directions: raw, (I-1, T, M, H), required when the gate is "directions". prev_chunk:
        (R, 200), row 0 due at the observation's time, padded by its last row or cut to C; its first `delay` rows stay,
        and `guidance` pulls the others towards its rows.
        """
        ...
