"""A policy that can be asked: an observation and an instruction in, a chunk of actions and its circumstances out."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.embodiment.errors import OnbeatError
from onbeat.embodiment.robot import Embodiment
from onbeat.embodiment.slots import UNIFIED_DIM
from onbeat.runtime.bundle import load_bundle
from onbeat.runtime.engine import Engine, Guidance, PolicySpec
from onbeat.runtime.language import PolicyLanguage
from onbeat.runtime.observation import Observation

# The letters of runtime/engine.py: C, I, T, M, H, and R rows of a previous chunk.

Floats = NDArray[np.float32]


class UntrainedPrefix(OnbeatError):
    """Rows to be kept that the checkpoint was never trained to continue."""


@dataclass(frozen=True, slots=True)
class StageTimes:
    """How long each stage of one inference took, in ns of the monotonic clock."""

    observe_ns: int
    prefix_ns: int
    flow_ns: int

    @property
    def total_ns(self) -> int:
        return self.observe_ns + self.prefix_ns + self.flow_ns


@dataclass(frozen=True, slots=True)
class PolicyOutput:
    """One chunk and its circumstances; noise, directions and the inputs of `infer` replay it bit for bit.

    actions: (C, 200) float32, normalised unified actions. keys: (C, d) per action key, in the robot's units.
    gate, cost: (I - 1, T), empty when the gate is off. noise: (I, C, 200). directions: (I - 1, T, M, H) or None.
    """

    actions: Floats
    keys: Mapping[str, NDArray[np.floating[Any]]]
    gate: Floats
    cost: Floats
    times: StageTimes
    noise: Floats
    directions: Floats | None


class Policy:
    """An engine and the language of its robot. Not thread-safe: one thread owns it."""

    def __init__(
        self, engine: Engine, language: PolicyLanguage, *, seed: int = 0, allow_untrained_prefix: bool = False
    ) -> None:
        """seed: of the noise that `infer` draws. allow_untrained_prefix: keep rows even where training never did."""
        self.engine = engine
        self.language = language
        self._generator = np.random.default_rng(seed)
        self._allow_untrained_prefix = allow_untrained_prefix

    @property
    def spec(self) -> PolicySpec:
        """The engine's shapes and abilities."""
        return self.engine.spec

    def infer(
        self,
        observation: Observation,
        instruction: str,
        *,
        noise: Floats | None = None,
        directions: Floats | None = None,
        prev_chunk: Floats | None = None,
        delay: int = 0,
        guidance: Guidance | None = None,
    ) -> PolicyOutput:
        """One chunk for one observation; row 0 is due at its capture time.

        noise (I, C, 200) and, for a "directions" gate, directions (I - 1, T, M, H): drawn here when None.
        prev_chunk (R, 200): normalised unified actions, row 0 due then too; its first `delay` rows are kept, and
        `guidance` pulls the others towards it.
        Raises ObservationError, InstructionError, UntrainedPrefix; then there is no chunk, and nothing moves on it.
        """
        check_prefix(self.spec, delay, allow_untrained=self._allow_untrained_prefix)
        noise = draw_noise(self._generator, self.spec) if noise is None else noise
        directions = draw_directions(self._generator, self.spec) if directions is None else directions
        start_ns = time.monotonic_ns()
        inputs = self.language.inputs(observation, instruction)
        observed_ns = time.monotonic_ns()
        cache = self.engine.prefix(inputs)
        cached_ns = time.monotonic_ns()
        result = self.engine.flow(
            cache, noise, directions=directions, prev_chunk=prev_chunk, delay=delay, guidance=guidance
        )
        times = StageTimes(observed_ns - start_ns, cached_ns - observed_ns, time.monotonic_ns() - cached_ns)
        keys = self.language.decode(result.actions)
        return PolicyOutput(result.actions, keys, result.gate, result.cost, times, noise, directions)


def load_policy(
    folder: str | Path,
    *,
    embodiment: str | Path | Embodiment | None = None,
    threads: int = 1,
    seed: int = 0,
    allow_untrained_prefix: bool = False,
) -> Policy:
    """A bundle, checked and opened. embodiment: the robot it is for, refused when the bundle is for another.

    threads: per session. Raises BundleError, WrongEmbodiment.
    """
    bundle = load_bundle(folder)
    language = bundle.open_language(embodiment)
    engine = bundle.open_engine(threads=threads)
    return Policy(engine, language, seed=seed, allow_untrained_prefix=allow_untrained_prefix)


def check_prefix(spec: PolicySpec, delay: int, *, allow_untrained: bool) -> None:
    """Refuse to keep more rows than the checkpoint was trained to continue, unless that is asked for."""
    if delay <= spec.trained_delay or allow_untrained:
        return
    trained = f"at most {spec.trained_delay}" if spec.trained_delay else "no"
    raise UntrainedPrefix(
        f"{delay} rows are to be kept but the checkpoint was trained to continue {trained} rows: "
        "train with a simulated delay, infer faster, or allow an untrained prefix explicitly"
    )


def draw_noise(generator: np.random.Generator, spec: PolicySpec) -> Floats:
    """Standard normal (I, C, 200)."""
    return generator.standard_normal((spec.sampler.iterations, spec.chunk, UNIFIED_DIM), np.float32)


def draw_directions(generator: np.random.Generator, spec: PolicySpec) -> Floats | None:
    """Raw directions (I - 1, T, M, H) where the gate takes them, else None."""
    sampler = spec.sampler
    if sampler.gate != "directions":
        return None
    shape = (sampler.iterations - 1, sampler.flow_steps, sampler.gate_directions, spec.understanding_width)
    return generator.standard_normal(shape, np.float32)
