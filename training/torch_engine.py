"""The PyTorch network as an engine: what exported bundles are checked against, and `evaluate` before any export."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.engine import (
    ExpertsSpec,
    FlowResult,
    Guidance,
    PolicyInputs,
    PolicySpec,
    SamplerSpec,
    check_guidance,
)
from onbeat.training.checkpoint import load_checkpoint
from onbeat.training.config import DecoderConfig, PolicyConfig
from onbeat.training.model.heads import UNIFIED
from onbeat.training.model.policy import Cache, Policy
from onbeat.training.model.sampler import Lock, Pull, choose_sampler, fit_chunk, sample_chunk
from onbeat.training.model.vision import normalise_views

# Letters as in onbeat.runtime.engine.


class EngineInputError(OnbeatError):
    """An input of the engine has the wrong shape, or is not finite."""


@dataclass(frozen=True, slots=True)
class TorchEngine:
    """Implements `Engine`. lock_prefix: whether prev_chunk is kept; checkpoints not trained for it ignore prev_chunk,
    as the published code does. slots: (200,) bool, the robot's action slots; None leaves noise in the others even where
    the network was trained without."""

    policy: Policy
    spec: PolicySpec
    lock_prefix: bool
    slots: Tensor | None = None

    @torch.inference_mode()
    def prefix(self, inputs: PolicyInputs) -> Cache:
        """The K/V cache of one observation. Raises EngineInputError."""
        side = self.spec.image_size
        _check_shape("views", inputs.views, (self.spec.views, side, side, 3))
        _check_values("state", inputs.state, (UNIFIED,))
        self._check_tokens(inputs)
        return self.policy.encode_prefix(
            normalise_views(torch.from_numpy(inputs.views)).unsqueeze(0),
            torch.from_numpy(inputs.token_ids).unsqueeze(0),
            inputs.image_start,
            inputs.state_index,
            _tensor(inputs.state).unsqueeze(0),
        )

    @torch.inference_mode()
    def flow(
        self,
        prefix: Cache,
        noise: NDArray[np.float32],
        *,
        directions: NDArray[np.float32] | None = None,
        prev_chunk: NDArray[np.float32] | None = None,
        delay: int = 0,
        guidance: Guidance | None = None,
    ) -> FlowResult:
        """Sample one chunk, as `Engine.flow`. Raises EngineInputError."""
        _check_values("noise", noise, (self.spec.sampler.iterations, self.spec.chunk, UNIFIED))
        sampled = sample_chunk(
            self.policy,
            prefix,
            self.spec.sampler,
            _tensor(noise).unsqueeze(1),
            directions=self._directions(directions),
            lock=self._lock(prev_chunk, delay),
            pull=self._pull(prev_chunk, guidance),
            slots=self.slots,
        )
        return FlowResult(sampled.actions[0].numpy(), sampled.gate[..., 0].numpy(), sampled.cost[..., 0].numpy())

    def _check_tokens(self, inputs: PolicyInputs) -> None:
        ids, vocabulary = inputs.token_ids, self.policy.config.decoder.vocabulary
        if ids.ndim != 1 or not ((ids >= 0) & (ids < vocabulary)).all():
            raise EngineInputError(
                f"token_ids must be (N,), each 0 to {vocabulary - 1}: use the checkpoint's tokenizer"
            )
        least = inputs.state_index + (2 if self.spec.experts else 1)  # routers read what follows the state
        image_end = inputs.image_start + self.spec.views * self.spec.tokens_per_view
        if not 0 <= inputs.image_start < image_end <= inputs.state_index or len(ids) < least:
            raise EngineInputError(
                f"image_start {inputs.image_start} and state_index {inputs.state_index} leave no room for the image "
                f"tokens in {len(ids)} tokens: give where they begin in token_ids"
            )

    def _directions(self, directions: NDArray[np.float32] | None) -> Tensor | None:
        sampler = self.spec.sampler
        if sampler.gate != "directions":
            return None
        if directions is None:
            raise EngineInputError("the gate wants directions and none were given: give them, or choose expectation")
        shape = (sampler.iterations - 1, sampler.flow_steps, sampler.gate_directions, self.spec.understanding_width)
        _check_values("directions", directions, shape)
        return _tensor(directions)

    def _lock(self, prev_chunk: NDArray[np.float32] | None, delay: int) -> Lock | None:
        if delay < 0:
            raise EngineInputError(f"the delay is {delay} policy steps: give 0 or more")
        if not self.lock_prefix or prev_chunk is None or delay == 0:
            return None
        _check_values("prev_chunk", prev_chunk, (max(len(prev_chunk), 1), UNIFIED))
        return Lock(fit_chunk(_tensor(prev_chunk), self.spec.chunk), delay)

    def _pull(self, prev_chunk: NDArray[np.float32] | None, guidance: Guidance | None) -> Pull | None:
        if guidance is None:
            return None
        check_guidance(guidance, prev_chunk, self.spec)
        assert prev_chunk is not None
        _check_values("prev_chunk", prev_chunk, (max(len(prev_chunk), 1), UNIFIED))
        return Pull(fit_chunk(_tensor(prev_chunk), self.spec.chunk), _tensor(guidance.weights), guidance.beta)


def build_engine(
    policy: Policy,
    *,
    views: int,
    overrides: Mapping[str, bool | int | float] | None = None,
    directions: bool = False,
    enable_rtc: bool = True,
    slots: NDArray[np.bool_] | None = None,
) -> TorchEngine:
    """An engine for a policy with `views` cameras. overrides: of the sampler settings in config.json.

    directions: the caller gives the gate's directions at every flow (recorded cases); else their expectation is taken.
    enable_rtc: False ignores prev_chunk even where the checkpoint was trained with a prefix. slots: as in TorchEngine.
    """
    sampler = choose_sampler(policy.config, overrides, directions=directions)
    return TorchEngine(
        policy.eval(),
        describe_policy(policy.config, sampler, views),
        enable_rtc and policy.config.delay.trained,
        None if slots is None else torch.from_numpy(slots),
    )


def open_engine(
    folder: Path | str,
    *,
    views: int,
    rope: str | None = None,
    overrides: Mapping[str, bool | int | float] | None = None,
    directions: bool = False,
    enable_rtc: bool = True,
) -> TorchEngine:
    """`build_engine` of a checkpoint folder. Raises CheckpointError, ConfigError or OverrideError."""
    policy = load_checkpoint(folder, rope=rope)
    return build_engine(policy, views=views, overrides=overrides, directions=directions, enable_rtc=enable_rtc)


def describe_policy(config: PolicyConfig, sampler: SamplerSpec, views: int) -> PolicySpec:
    """Shapes and abilities of a policy with this sampler and number of cameras."""
    return PolicySpec(
        views=views,
        image_size=config.vision.image_size,
        tokens_per_view=config.vision.tokens_per_view,
        chunk=config.chunk,
        understanding_width=config.decoder.und.width,
        trained_delay=config.delay.longest,
        sampler=sampler,
        guidance=True,
        experts=_describe_experts(config.decoder),
    )


def _describe_experts(decoder: DecoderConfig) -> ExpertsSpec | None:
    experts = decoder.experts
    if experts is None:
        return None
    layers = decoder.layers - experts.foundation_layers
    return ExpertsSpec(layers, experts.count, experts.top_k, experts.routing)


def _tensor(array: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _check_shape(name: str, array: NDArray[np.generic], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise EngineInputError(f"{name} has shape {array.shape}, not {shape}: give what PolicySpec says")


def _check_values(name: str, array: NDArray[np.float32], shape: tuple[int, ...]) -> None:
    _check_shape(name, array, shape)
    if not np.isfinite(array).all():
        raise EngineInputError(f"{name} holds values that are not finite: give finite ones")
