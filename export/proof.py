"""Proof that exported graphs compute what the PyTorch network computes, stage by stage, on random inputs."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from onbeat.embodiment.errors import OnbeatError
from onbeat.embodiment.slots import UNIFIED_DIM
from onbeat.runtime.bundle import Proof
from onbeat.runtime.engine import Engine, Guidance, PolicyInputs, PolicySpec
from onbeat.runtime.onnx_engine import CacheHandle, OnnxEngine
from onbeat.runtime.policy import draw_directions, draw_noise
from onbeat.runtime.prompt import Prompt
from onbeat.training.model.experts import choose
from onbeat.training.model.policy import Cache
from onbeat.training.torch_engine import TorchEngine

TOLERANCE = 1e-5  # of max(1, largest value); the smallest real mistake known moves actions by 4.4e-5
SEED = 20
DRAWS = 3

# V views, S image side, C chunk rows, N prefix tokens.


class ProofFailed(OnbeatError):
    """The graphs do not compute what the network computes; no bundle is written."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One random question. The delay is 0 in the first draw, then random; prev_chunk's length is random.

    guidance: from the third draw on.
    """

    inputs: PolicyInputs
    noise: NDArray[np.float32]
    directions: NDArray[np.float32] | None
    prev_chunk: NDArray[np.float32]
    delay: int
    guidance: Guidance | None = None


def prove(
    exported: OnnxEngine, network: TorchEngine, prompt: Prompt, *, draws: int = DRAWS, tolerance: float = TOLERANCE
) -> Proof:
    """Compare keys, values and actions. `network` must keep prefixes. Raises ProofFailed with the figures."""
    assert network.lock_prefix, "every path of the graphs is compared, the prefix's too"
    generator = np.random.default_rng(SEED)
    pairs = [compare(exported, network, draw_inputs(generator, exported.spec, prompt, k)) for k in range(draws)]
    prefix, flow = (float(np.max(figures)) for figures in zip(*pairs, strict=True))
    if not (prefix <= tolerance and flow <= tolerance):
        raise ProofFailed(
            f"the graphs differ from the PyTorch network by {prefix:.2e} (keys and values) and {flow:.2e} (actions), "
            f"more than {tolerance:.0e}: report this checkpoint's config.json, or pass a wider --tolerance"
        )
    return Proof(draws, SEED, tolerance, prefix, flow)


def compare(exported: OnnxEngine, network: TorchEngine, draw: Draw) -> tuple[float, float]:
    """Scaled differences of one draw: of keys and values, and of actions, gate and cost."""
    cache, reference = exported.prefix(draw.inputs), network.prefix(draw.inputs)
    prefix = compare_caches(cache, reference, draw.inputs.state_index)
    found, expected = _flow(exported, cache, draw), _flow(network, reference, draw)
    return prefix, max(scaled_difference(*pair) for pair in zip(found, expected, strict=True))


def draw_inputs(generator: np.random.Generator, spec: PolicySpec, prompt: Prompt, index: int) -> Draw:
    """Random views, state, noise and previous chunk around a real prompt."""
    views = generator.integers(0, 256, (spec.views, spec.image_size, spec.image_size, 3), np.uint8)
    state = generator.uniform(-1, 1, UNIFIED_DIM).astype(np.float32)
    return Draw(
        inputs=PolicyInputs(views, prompt.token_ids, prompt.image_start, prompt.state_index, state),
        noise=draw_noise(generator, spec),
        directions=draw_directions(generator, spec),
        prev_chunk=generator.standard_normal((generator.integers(1, 2 * spec.chunk), UNIFIED_DIM), np.float32),
        delay=int(generator.integers(1, spec.chunk + 1)) if index else 0,
        guidance=draw_guidance(generator, spec) if index >= 2 else None,
    )


def draw_guidance(generator: np.random.Generator, spec: PolicySpec) -> Guidance:
    """Random weights, one of them 0, and a beta up to the largest."""
    weights = generator.uniform(0, 1, spec.chunk).astype(np.float32)
    weights[generator.integers(spec.chunk)] = 0.0
    return Guidance(weights, float(generator.uniform(0, spec.sampler.flow_steps)))


def compare_caches(exported: CacheHandle, reference: Cache, state_index: int) -> float:
    """Largest scaled difference over layers; the graphs keep the state's row last, the network in its place."""
    differences = [0.0]
    for index, layer in enumerate(reference):
        differences.append(compare_routes(exported, layer.router, index))
        for kind, expected in (("key", layer.keys), ("value", layer.values)):
            found = exported.arrays[f"{kind}_{index:02d}"]
            in_place = np.insert(found[:, :-1], state_index, found[:, -1], axis=1)
            differences.append(scaled_difference(in_place, expected[0].numpy()))
    return max(differences)


def compare_routes(exported: CacheHandle, scores: Tensor | None, index: int) -> float:
    """Scaled difference of what one layer's router got from the prefix, infinite where other experts were chosen."""
    if scores is None:
        return 0.0
    if f"router_{index:02d}" in exported.arrays:
        return scaled_difference(exported.arrays[f"router_{index:02d}"], scores[0].numpy())
    chosen = exported.arrays[f"experts_{index:02d}"]
    expected = choose(scores, len(chosen))
    if chosen.tolist() != expected.chosen[0].tolist():
        return float("inf")
    return scaled_difference(exported.arrays[f"expert_weights_{index:02d}"], expected.weights[0].numpy())


def scaled_difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest absolute difference over max(1, the largest expected value). Infinite for a nan or another shape."""
    if found.size == expected.size == 0:
        return 0.0
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))


def _flow(engine: Engine, cache: object, draw: Draw) -> tuple[NDArray[np.float32], ...]:
    result = engine.flow(
        cache,
        draw.noise,
        directions=draw.directions,
        prev_chunk=draw.prev_chunk,
        delay=draw.delay,
        guidance=draw.guidance,
    )
    return result.actions, result.gate, result.cost
