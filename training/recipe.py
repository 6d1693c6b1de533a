"""What a training run is made of, read from one TOML file: robot, network, fit. Unknown keys are errors."""

import difflib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from onbeat.embodiment.errors import OnbeatError
from onbeat.training.config import (
    DecoderConfig,
    DelayConfig,
    PolicyConfig,
    StreamConfig,
    VisionConfig,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class RecipeError(OnbeatError):
    """A recipe that cannot be read, or whose values make no run."""


@dataclass(frozen=True, slots=True)
class Network:
    """The sizes of a small Being-H0.5. heads, kv_heads, head_dim and layers are shared by both streams.

    delays: delays 0..delays-1 are trained as a clean action prefix; 0 trains without. The gate (MPG) is off.
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

    def configure(self, vocabulary: int) -> PolicyConfig:
        """The configuration of the checkpoint. vocabulary: rows of the embedding."""
        vision = VisionConfig(
            width=self.vision_width,
            ffn_width=self.vision_ffn,
            layers=self.vision_layers,
            heads=self.vision_heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
        )
        decoder = DecoderConfig(
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
        )
        return PolicyConfig(
            vision=vision,
            decoder=decoder,
            chunk=self.chunk,
            flow_steps=self.flow_steps,
            delay=DelayConfig(self.delays > 1, self.delays, self.delay_exponential),
            own_system_message=self.system_message,
            prompt_template="short",
        )


@dataclass(frozen=True, slots=True)
class Fitting:
    """How the network is fitted. batch: observations per step; draws: (noise, time, delay) per observation.

    ema_decay: of the weights that are written. auxiliary_weight: of the loss on the object's place, in training only.
    jitter: largest change of a channel's gain and offset, in deviations. held_out: share of the demonstrations.
    report_steps: steps between validations, each of which also writes a checkpoint. All arithmetic is float32.
    """

    steps: int = 6000
    batch: int = 64
    draws: int = 8
    peak_rate: float = 1e-3
    warm_up_steps: int = 200
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    auxiliary_weight: float = 0.5
    jitter: float = 0.1
    held_out: float = 0.05
    report_steps: int = 500
    threads: int = 2


@dataclass(frozen=True, slots=True)
class Recipe:
    """One training run. dataset: the name under which the checkpoint carries its statistics."""

    embodiment: str
    dataset: str
    seed: int
    network: Network
    fitting: Fitting

    def describe(self) -> dict[str, Any]:
        """The effective recipe, for logs."""
        return asdict(self)

    def fingerprint(self) -> str:
        """What must be the same for a stopped run to go on: all but how it is watched and on how many threads."""
        told = self.describe()
        told["fitting"] = {k: v for k, v in told["fitting"].items() if k not in ("threads", "report_steps")}
        return json.dumps(told, sort_keys=True)


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
    _check_names(document, [field.name for field in fields(Recipe)], where)
    recipe = Recipe(
        embodiment=_value(document, "embodiment", str, where),
        dataset=_value(document, "dataset", str, where),
        seed=_value(document, "seed", int, where),
        network=_section(Network, document.get("network", {}), f"{where}: [network]"),
        fitting=_section(Fitting, document.get("fitting", {}), f"{where}: [fitting]"),
    )
    _check_fitting(recipe.fitting, f"{where}: [fitting]")
    return recipe


Section = TypeVar("Section", Network, Fitting)


def _section(kind: type[Section], values: Mapping[str, Any], where: str) -> Section:
    defaults = asdict(kind())
    _check_names(values, list(defaults), where)
    return kind(**{name: _value(values, name, type(defaults[name]), where) for name in values})


def _check_names(values: Mapping[str, Any], known: list[str], where: str) -> None:
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            remedy = f"did you mean '{close[0]}'?" if close else f"choose from {', '.join(known)}"
            raise RecipeError(f"{where}: unknown key '{name}': {remedy}")


def _value(values: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    value = values.get(name)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise RecipeError(f"{where}: {name} is {value!r}: give a {kind.__name__}")
    return value


def _check_fitting(fitting: Fitting, where: str) -> None:
    for name in ("steps", "batch", "draws", "report_steps", "threads"):
        if getattr(fitting, name) < 1:
            raise RecipeError(f"{where}: {name} is {getattr(fitting, name)}: give at least 1")
    for name in ("ema_decay", "held_out"):
        if not 0 <= getattr(fitting, name) < 1:
            raise RecipeError(f"{where}: {name} is {getattr(fitting, name)}: give 0 or more, below 1")
