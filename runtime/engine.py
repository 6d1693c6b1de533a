"""What the runtime asks of an inference engine: one prefix pass for an observation, then flow passes from noise."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

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
class PolicySpec:
    """Shapes and abilities of a policy. trained_delay: largest prefix the checkpoint was trained with, 0 if none."""

    views: int
    image_size: int
    tokens_per_view: int
    chunk: int
    understanding_width: int
    trained_delay: int
    sampler: SamplerSpec


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
    ) -> FlowResult:
        """Sample one chunk.

        noise: (I, C, 200). directions: raw, (I-1, T, M, H), required when the gate is "directions". prev_chunk:
        (R, 200), row 0 due at the observation's time, padded by its last row or cut to C; its first `delay` rows stay.
        """
        ...
