"""What a training run is made of, read from one TOML file. Unknown keys are errors."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from onbeat.training.config import (
    TIME_BUCKETS,
    DecoderConfig,
    DelayConfig,
    ExpertsConfig,
    GateConfig,
    PolicyConfig,
    RobotDelay,
    StreamConfig,
    VisionConfig,
)
from onbeat.training.data.catalogue import DataSettings
from onbeat.training.freezing import Frozen, check_frozen
from onbeat.training.sections import SectionError, read_section

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class RecipeError(SectionError):
    """A recipe that cannot be read, or whose values make no run."""


@dataclass(frozen=True, slots=True)
class Gate:
    """[network.gate]: Manifold-Preserving Gating, trained and sampled alike. See GateConfig for the fields.

    plain_share of the draws meet the gate as the sampler's first iteration does: projected, without a correction.
    """

    strength: float = 0.1
    temperature: float = 1.0
    directions: int = 32
    refinements: int = 1
    stop_gradient: bool = True
    first_pass: Literal["published", "projected"] = "projected"
    anchor_bucket: int = TIME_BUCKETS

    def configure(self) -> GateConfig:
        """As the checkpoint has it."""
        return GateConfig(True, *(getattr(self, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True, slots=True)
class Adapters:
    """[network.adapters]: one adapter per unified slot, on the heads."""

    enabled: bool = True


@dataclass(frozen=True, slots=True)
class Network:
    """The sizes of a small Being-H0.5. heads, kv_heads, head_dim and layers are shared by both streams.

    delays: d_max; delays 0..delays-1 are trained as a clean action prefix; 0 trains none, or as many as [delays] of the
    robots need. experts, gate, adapters: None is a dense network, ungated, with no adapters.
    """

    image_size: int = 112
    patch_size: int = 14
    vision_width: int = 128
    vision_ffn: int = 512
    vision_layers: int = 3
    vision_heads: int = 4
    und_width: int = 128
    und_ffn: int = 384
    gen_width: int = 128
    gen_ffn: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10_000.0
    chunk: int = 16
    flow_steps: int = 4
    delays: int = 0
    delay_exponential: bool = True
    system_message: str = "You move a robot arm."
    experts: ExpertsConfig | None = None
    gate: Gate | None = None
    adapters: Adapters | None = None

    def configure(self, vocabulary: int, robots: Mapping[str, RobotDelay] | None = None) -> PolicyConfig:
        """The configuration of the checkpoint. vocabulary: rows of the embedding. robots: delays by embodiment."""
        return PolicyConfig(
            vision=self._vision(),
            decoder=self._decoder(vocabulary),
            chunk=self.chunk,
            flow_steps=self.flow_steps,
            gate=GateConfig() if self.gate is None else self.gate.configure(),
            delay=delay_config(self.delays, self.delay_exponential, self.chunk, robots or {}),
            own_system_message=self.system_message,
            prompt_template="short",
            adapters=self.adapters is not None and self.adapters.enabled,
            idle_slots="zero",
        )

    def _vision(self) -> VisionConfig:
        return VisionConfig(
            width=self.vision_width,
            ffn_width=self.vision_ffn,
            layers=self.vision_layers,
            heads=self.vision_heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
        )

    def _decoder(self, vocabulary: int) -> DecoderConfig:
        return DecoderConfig(
            und=StreamConfig(self.und_width, self.und_ffn),
            gen=StreamConfig(self.gen_width, self.gen_ffn),
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocabulary=vocabulary,
            rope_theta=self.rope_theta,
            rope="fp32",
            tied=True,
            experts=self.experts,
        )


@dataclass(frozen=True, slots=True)
class Fitting:
    """How the network is fitted. batch: observations per step, over all processes; draws: (noise, time, delay) of each.

    accumulate: parts in which a batch passes, their gradients added. recompute: gradient checkpointing.
    precision: of the matrix products; weights, moments and losses are float32 always.
    ema_decay: of the weights that are written. text_weight, auxiliary_weight: of the loss on answers in words, and of
    that on the object's place, which only demonstrations in memory tell. jitter: largest change of a channel's gain and
    offset, in deviations. held_out: share of the episodes. plain_share: see [network.gate]; first_share: of the draws
    that have delay 0 as at a run's start, for robots with delays of their own.
    report_steps: steps between validations, each of which also writes a checkpoint. loaders: threads that read ahead.
    """

    steps: int = 6000
    batch: int = 64
    draws: int = 8
    accumulate: int = 1
    recompute: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"
    peak_rate: float = 1e-3
    warm_up_steps: int = 200
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    text_weight: float = 0.1
    auxiliary_weight: float = 0.5
    plain_share: float = 0.25
    first_share: float = 0.05
    jitter: float = 0.1
    held_out: float = 0.05
    report_steps: int = 500
    loaders: int = 1
    threads: int = 2


WATCHING = ("threads", "report_steps", "loaders")  # what may change when a run goes on


@dataclass(frozen=True, slots=True)
class Recipe:
    """One training run. dataset: the name under which the checkpoint carries its statistics.

    embodiment: the robot of demonstrations in memory; without it, [data] names datasets and their robots.
    start_from: a checkpoint folder whose weights, tokenizer and sizes are taken; of [network], experts, gate and
    adapters are then added to it.
    """

    dataset: str
    seed: int
    embodiment: str = ""
    start_from: str = ""
    data: DataSettings | None = None
    network: Network = Network()
    fitting: Fitting = Fitting()
    frozen: Frozen = field(default_factory=Frozen)
    delays: Mapping[str, RobotDelay] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """The effective recipe, for logs."""
        return asdict(self)

    def fingerprint(self) -> str:
        """What must be the same for a stopped run to go on: all but how it is watched and on how many threads."""
        told = self.describe()
        told["fitting"] = {k: v for k, v in told["fitting"].items() if k not in WATCHING}
        return json.dumps(told, sort_keys=True)


def delay_config(count: int, exponential: bool, chunk: int, robots: Mapping[str, RobotDelay]) -> DelayConfig:
    """Delays of the checkpoint; count 0 with robots: as many as the latest of them needs, within half a chunk."""
    longest = max((latest_delay(robot) for robot in robots.values()), default=0)
    count = count or min(longest, chunk // 2) + (1 if robots else 0)
    return DelayConfig(count > 1, count, exponential, robots)


def latest_delay(robot: RobotDelay) -> int:
    """The longest delay of a robot that has any weight, in policy steps."""
    drawn = [delay for delay, weight in enumerate(robot.probabilities) if weight > 0]
    if robot.period_ms > 0:
        drawn += [delay for delay, weight in robot.counted() if weight > 0]
    return max(drawn, default=0)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe. Raises RecipeError naming the key that is wrong."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}): give the path of a recipe") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is no TOML file ({error}): mend that place") from None
    return parse_recipe(document, str(path))


def parse_recipe(document: Mapping[str, Any], where: str) -> Recipe:
    """The recipe of a TOML document. Raises RecipeError."""
    recipe = read_section(Recipe, document, where)
    if bool(recipe.embodiment) == (recipe.data is not None):
        raise RecipeError(f"{where}: give either embodiment, for demonstrations in memory, or [data]")
    _check_fitting(recipe.fitting, f"{where}: [fitting]")
    check_frozen(recipe.frozen, f"{where}: [frozen]")
    return recipe


def _check_fitting(fitting: Fitting, where: str) -> None:
    for name in ("steps", "batch", "draws", "accumulate", "report_steps", "threads"):
        if getattr(fitting, name) < 1:
            raise RecipeError(f"{where}: {name} is {getattr(fitting, name)}: give at least 1")
    if fitting.accumulate > fitting.batch:
        raise RecipeError(f"{where}: accumulate is {fitting.accumulate}: give at most batch, which is {fitting.batch}")
    for name in ("ema_decay", "held_out", "plain_share", "first_share"):
        if not 0 <= getattr(fitting, name) < 1:
            raise RecipeError(f"{where}: {name} is {getattr(fitting, name)}: give 0 or more, below 1")
