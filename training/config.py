"""What a checkpoint's config.json says, as frozen dataclasses, checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.prompt import INSTRUCTION_TEMPLATES, SYSTEM_MESSAGES

MODEL_TYPE = "beingh"
LAYER_MODULE = "Qwen3MoTDecoderLayer"
TIME_BUCKETS = 1000

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
ROPE_PRECISIONS = ("bf16", "fp32")
FIRST_PASSES = ("published", "projected")
ROUTINGS = ("observation", "token")
IDLE_SLOTS = ("noise", "zero")


class ConfigError(OnbeatError):
    """config.json is absent, unreadable, or describes a network this code does not build."""


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """An InternViT. select_layer: -1 the last layer, k the k-th of its layers + 1 hidden states. shuffle: side of the
    square of patches that becomes one token."""

    width: int
    ffn_width: int
    layers: int
    heads: int
    image_size: int
    patch_size: int = 14
    norm_epsilon: float = 1e-6
    qkv_bias: bool = True
    select_layer: int = -1
    shuffle: int = 2

    @property
    def grid(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_view(self) -> int:
        """Tokens of the decoder that one image becomes."""
        return (self.grid // self.shuffle) ** 2

    @property
    def depth(self) -> int:
        """How many layers are run to reach the selected hidden state."""
        return self.select_layer if self.select_layer >= 0 else self.layers + 1 + self.select_layer


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """What the two token streams of a decoder layer have each for themselves."""

    width: int
    ffn_width: int
    activation: str = "silu"
    norm_epsilon: float = 1e-6


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """A Mixture of Flow: from layer `foundation_layers` on, the actions take top_k of `count` experts of each layer.

    routing: "observation" chooses once, by the prefix alone; "token" anew for every action token, by that token too.
    balance_weight: of the load-balancing loss in training. docs/decisions/0029-mixture-of-flow.md.
    """

    foundation_layers: int
    count: int
    top_k: int = 1
    routing: str = "observation"
    balance_weight: float = 0.01


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A Mixture of Transformers: und (text, image) and gen (state, action) share attention heads and positions.

    rope: "bf16" rounds the inverse frequencies to bfloat16, as the published code does in training and in inference.
    tied: lm_head is the embedding. experts: None where every layer has one feed-forward per stream, as published.
    """

    und: StreamConfig
    gen: StreamConfig
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    rope_theta: float = 1e6
    rope: str = "bf16"
    tied: bool = False
    experts: ExpertsConfig | None = None

    def is_routed(self, layer: int) -> bool:
        """Whether the actions choose among experts in this layer."""
        return self.experts is not None and layer >= self.experts.foundation_layers


@dataclass(frozen=True, slots=True)
class GateConfig:
    """Manifold-Preserving Gating. present: the checkpoint has its modules.

    first_pass: "published" skips the two projections in iteration 0, "projected" applies them as training does.
    anchor_bucket: time bucket at which the clean actions are encoded; the published code uses 0.
    """

    present: bool = False
    strength: float = 0.1
    temperature: float = 2.0
    directions: int = 32
    refinements: int = 1
    stop_gradient: bool = True
    first_pass: str = "published"
    anchor_bucket: int = 0


@dataclass(frozen=True, slots=True)
class RobotDelay:
    """How late one embodiment's chunks come; one of the two descriptions is given.

    period_ms: between the rows of a chunk. latencies: (milliseconds from observation to chunk, weight), as measured.
    probabilities: weights of the delays 0, 1, ... in rows.
    """

    period_ms: float
    latencies: tuple[tuple[float, float], ...] = ()
    probabilities: tuple[float, ...] = ()

    def weights(self, count: int) -> tuple[float, ...]:
        """Probability of each delay 0..count-1; what comes later counts as the longest.

        As the runtime counts (runtime/delay.py): the rows up to the next to come when the chunk came, row 0 included.
        """
        weights = [0.0] * count
        counted = enumerate(self.probabilities) if self.probabilities else self.counted()
        for delay, weight in counted:
            weights[min(delay, count - 1)] += weight
        return tuple(weight / sum(weights) for weight in weights)

    def counted(self) -> list[tuple[int, float]]:
        """(delay in rows, weight) of each of the latencies."""
        return [(math.ceil(latency / self.period_ms) + 1, weight) for latency, weight in self.latencies]


@dataclass(frozen=True, slots=True)
class DelayConfig:
    """Training with a clean action prefix. simulated: d_max, delays 0..d_max-1 are drawn, in policy steps.

    robots: by embodiment, where its delays are known; the others share one distribution, exponential or uniform.
    """

    trained: bool = False
    simulated: int = 0
    exponential: bool = True
    robots: Mapping[str, RobotDelay] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Largest prefix the checkpoint was trained with, 0 if it was trained with none."""
        return max(self.simulated - 1, 0) if self.trained else 0

    def weights(self, embodiment: str) -> tuple[float, ...]:
        """Probability of each delay 0..longest for one embodiment, summing to 1."""
        robot = self.robots.get(embodiment)
        if robot is not None:
            return robot.weights(self.longest + 1)
        raw = [math.exp(-delay) if self.exponential else 1.0 for delay in range(self.longest + 1)]
        return tuple(weight / sum(raw) for weight in raw)


@dataclass(frozen=True, slots=True)
class TimeConfig:
    """Flow time in training: t = (scale - Beta(alpha, beta)) / scale."""

    alpha: float = 1.5
    beta: float = 1.0
    scale: float = 0.999


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """The whole network. source: config.json as read, kept so that writing back loses nothing.

    adapters: whether the heads have an adapter per unified slot, docs/decisions/0030-embodiment-adapters.md.
    idle_slots: what the network is given in the action slots that are not the robot's: "noise" as published, or "zero",
    so that what it learned of other robots' slots never meets it.
    """

    vision: VisionConfig
    decoder: DecoderConfig
    chunk: int = 16
    flow_steps: int = 4
    gate: GateConfig = GateConfig()
    delay: DelayConfig = DelayConfig()
    time: TimeConfig = TimeConfig()
    template: str = "being_h0"
    own_system_message: str | None = None
    prompt_template: str = "long"
    adapters: bool = False
    idle_slots: str = "noise"
    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_policy(self)

    @property
    def system_message(self) -> str:
        """The text after "system\\n" in the prompt."""
        own = self.own_system_message
        return SYSTEM_MESSAGES[self.template] if own is None else own

    @property
    def instruction_template(self) -> str:
        """The user's sentence, with the fields {task_description} and {k} = chunk length."""
        return INSTRUCTION_TEMPLATES[self.prompt_template]


def _check_policy(config: PolicyConfig) -> None:
    _check_vision(config.vision)
    _check_decoder(config.decoder)
    _check_delay(config.delay)
    _check_at_least(1, action_chunk_length=config.chunk, num_inference_timesteps=config.flow_steps)
    _check_choice("template", config.template, tuple(SYSTEM_MESSAGES))
    _check_choice("prompt_template", config.prompt_template, tuple(INSTRUCTION_TEMPLATES))
    _check_choice("onbeat.mpg_first_pass", config.gate.first_pass, FIRST_PASSES)
    _check_choice("onbeat.idle_slots", config.idle_slots, IDLE_SLOTS)
    _check_between("onbeat.mpg_anchor_bucket", config.gate.anchor_bucket, 0, TIME_BUCKETS)


def _check_vision(vision: VisionConfig) -> None:
    _check_at_least(1, vit_layers=vision.layers, vit_heads=vision.heads, patch_size=vision.patch_size)
    _check_divides("vit_config.hidden_size", vision.width, vision.heads)
    _check_divides("force_image_size", vision.image_size, vision.patch_size * vision.shuffle)
    if not 0 <= vision.depth <= vision.layers:
        raise ConfigError(
            f"select_layer is {vision.select_layer} but the vision tower has {vision.layers} layers: "
            f"give {-vision.layers - 1} to {vision.layers}"
        )


def _check_decoder(decoder: DecoderConfig) -> None:
    _check_at_least(1, layers=decoder.layers, heads=decoder.heads, kv_heads=decoder.kv_heads)
    _check_divides("llm_config.num_attention_heads", decoder.heads, decoder.kv_heads)
    _check_divides("llm_config.head_dim", decoder.head_dim, 2)
    _check_divides("expert_config.hidden_size", decoder.gen.width, 2)
    _check_choice("rope", decoder.rope, ROPE_PRECISIONS)
    for stream in (decoder.und, decoder.gen):
        _check_choice("hidden_act", stream.activation, ACTIVATIONS)
    if decoder.experts is not None:
        _check_experts(decoder.experts, decoder.layers)


def _check_experts(experts: ExpertsConfig, layers: int) -> None:
    """In layer 0 the router would read the embedding of one and the same token: at least one layer is shared."""
    name = "onbeat.experts"
    _check_choice(f"{name}.routing", experts.routing, ROUTINGS)
    _check_between(f"{name}.foundation_layers", experts.foundation_layers, 1, layers - 1)
    _check_between(f"{name}.top_k", experts.top_k, 1, experts.count)
    if not 0 <= experts.balance_weight < math.inf:
        raise ConfigError(f"{name}.balance_weight is {experts.balance_weight}: give 0 or more")


def _check_delay(delay: DelayConfig) -> None:
    for name, robot in delay.robots.items():
        _check_robot_delay(f"onbeat.delays.{name}", robot, delay.longest)


def _check_robot_delay(name: str, robot: RobotDelay, longest: int) -> None:
    if not 0 < robot.period_ms < math.inf:
        raise ConfigError(f"{name}.period_ms is {robot.period_ms}: give the milliseconds between the rows of a chunk")
    if bool(robot.latencies) == bool(robot.probabilities):
        raise ConfigError(f"{name}: give either latencies or probabilities")
    weights = robot.probabilities or [weight for _, weight in robot.latencies]
    latencies = [latency for latency, _ in robot.latencies]
    if not all(0 <= value < math.inf for value in (*weights, *latencies)) or sum(weights) <= 0:
        raise ConfigError(f"{name}: latencies and weights must be 0 or more, and one weight above 0")
    if len(robot.probabilities) > longest + 1:
        raise ConfigError(
            f"{name}.probabilities goes to a delay of {len(robot.probabilities) - 1} rows but only {longest} are "
            "trained: raise simulated_delay"
        )


def _check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"{name} is {value}: give at least {least}")


def _check_between(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{name} is {value}: give {least} to {most}")


def _check_divides(name: str, value: int, by: int) -> None:
    if value <= 0 or value % by:
        raise ConfigError(f"{name} is {value}: give a positive multiple of {by}")


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"unknown {name} {value!r}: give one of {', '.join(known)}")
