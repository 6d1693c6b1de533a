"""What a checkpoint's config.json says, as frozen dataclasses: read, checked, and written back."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.prompt import INSTRUCTION_TEMPLATES, SYSTEM_MESSAGES

CONFIG_FILE = "config.json"
MODEL_TYPE = "beingh"
LAYER_MODULE = "Qwen3MoTDecoderLayer"
TIME_BUCKETS = 1000

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
ROPE_PRECISIONS = ("bf16", "fp32")
FIRST_PASSES = ("published", "projected")


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
class DecoderConfig:
    """A Mixture of Transformers: und (text, image) and gen (state, action) share attention heads and positions.

    rope: "bf16" rounds the inverse frequencies to bfloat16, as the published code does in training and in inference.
    tied: lm_head is the embedding.
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
class DelayConfig:
    """Training with a clean action prefix. simulated: delays 0..simulated-1 are drawn, in policy steps."""

    trained: bool = False
    simulated: int = 0
    exponential: bool = True

    @property
    def longest(self) -> int:
        """Largest prefix the checkpoint was trained with, 0 if it was trained with none."""
        return max(self.simulated - 1, 0) if self.trained else 0


@dataclass(frozen=True, slots=True)
class TimeConfig:
    """Flow time in training: t = (scale - Beta(alpha, beta)) / scale."""

    alpha: float = 1.5
    beta: float = 1.0
    scale: float = 0.999


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """The whole network. source: config.json as read, kept so that writing back loses nothing."""

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


def load_config(folder: Path, *, rope: str | None = None) -> PolicyConfig:
    """Read `folder`/config.json. rope: overrides the file's own choice. Raises ConfigError."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"{folder} holds no {CONFIG_FILE}: give the folder of a checkpoint")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ConfigError(f"{path} is not valid JSON ({problem}): download the checkpoint again") from None
    return parse_config(document, rope=rope)


def save_config(config: PolicyConfig, folder: Path) -> None:
    """Write `folder`/config.json."""
    text = json.dumps(write_config(config), indent=2, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


_T = TypeVar("_T", int, float, bool, str)


@dataclass(frozen=True, slots=True)
class _Section:
    """A JSON object and where it stands, so that an error can name the key."""

    name: str
    values: Mapping[str, Any]

    def section(self, key: str) -> "_Section":
        value = self.values.get(key)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.name}.{key} is missing or no object: give a complete config.json")
        return _Section(f"{self.name}.{key}", value)

    def get(self, key: str, kind: type[_T], default: _T | None = None) -> _T:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"{self.name}.{key} is {value!r}, not {kind.__name__}: give a complete config.json")
        return value

    def require(self, key: str, expected: object) -> None:
        """Refuse any value but `expected` where the key is given at all."""
        value = self.values.get(key, expected)
        if value != expected:
            raise ConfigError(f"{self.name}.{key} is {value!r}: only {expected!r} is supported")


def parse_config(document: object, *, rope: str | None = None) -> PolicyConfig:
    """Build the configuration from the JSON of config.json. Raises ConfigError naming the key that is wrong."""
    if not isinstance(document, Mapping):
        raise ConfigError(f"config.json is no JSON object: its model_type must be '{MODEL_TYPE}'")
    root = _Section("config.json", document)
    if document.get("model_type") != MODEL_TYPE:
        raise ConfigError(
            f"config.json: unknown model_type {document.get('model_type')!r}: only '{MODEL_TYPE}' is known"
        )
    _refuse_other_networks(root)
    own = root.section("onbeat") if "onbeat" in document else _Section("onbeat", {})
    return PolicyConfig(
        vision=_parse_vision(root),
        decoder=_parse_decoder(root.section("llm_config"), rope or own.get("rope", str, "bf16")),
        chunk=root.get("action_chunk_length", int),
        flow_steps=root.get("num_inference_timesteps", int),
        gate=_parse_gate(root, own),
        delay=_parse_delay(root),
        time=_parse_time(root),
        template=root.get("template", str),
        own_system_message=None if document.get("system_message") is None else root.get("system_message", str),
        prompt_template=root.get("prompt_template", str, "long"),
        source=document,
    )


def _refuse_other_networks(root: _Section) -> None:
    root.require("connector_arch", "internvl_connector")
    root.require("attn_mode", "causal")
    root.require("use_expert", True)
    root.require("use_flow_matching", True)
    root.require("gen_action_type", "prop_hidden")
    root.require("learnable_action_query", False)
    root.require("num_timestep_buckets", TIME_BUCKETS)
    llm, vit = root.section("llm_config"), root.section("vit_config")
    llm.require("layer_module", LAYER_MODULE)
    llm.require("attention_bias", False)
    llm.require("qk_norm", True)
    llm.require("use_sliding_window", False)
    llm.require("rope_scaling", None)
    vit.require("hidden_act", "gelu")
    vit.require("norm_type", "layer_norm")
    vit.require("qk_normalization", False)


def _parse_vision(root: _Section) -> VisionConfig:
    vit = root.section("vit_config")
    image_size = root.get("force_image_size", int, vit.get("image_size", int))
    vit.require("image_size", image_size)
    ratio = root.get("downsample_ratio", float, 0.5)
    if ratio <= 0 or abs(round(1 / ratio) * ratio - 1) > 1e-6:
        raise ConfigError(f"config.json: downsample_ratio is {ratio}: only 1 / a whole number is supported")
    return VisionConfig(
        width=vit.get("hidden_size", int),
        ffn_width=vit.get("intermediate_size", int),
        layers=vit.get("num_hidden_layers", int),
        heads=vit.get("num_attention_heads", int),
        image_size=image_size,
        patch_size=vit.get("patch_size", int, 14),
        norm_epsilon=vit.get("layer_norm_eps", float, 1e-6),
        qkv_bias=vit.get("qkv_bias", bool, True),
        select_layer=root.get("select_layer", int, -1),
        shuffle=round(1 / ratio),
    )


def _parse_decoder(llm: _Section, rope: str) -> DecoderConfig:
    und, heads = _parse_stream(llm), llm.get("num_attention_heads", int)
    return DecoderConfig(
        und=und,
        gen=_parse_stream(llm.section("expert_config")),
        layers=llm.get("num_hidden_layers", int),
        heads=heads,
        kv_heads=llm.get("num_key_value_heads", int, heads),
        head_dim=llm.get("head_dim", int, und.width // max(heads, 1)),
        vocabulary=llm.get("vocab_size", int),
        rope_theta=llm.get("rope_theta", float),
        rope=rope,
        tied=llm.get("tie_word_embeddings", bool, False),
    )


def _parse_stream(section: _Section) -> StreamConfig:
    return StreamConfig(
        width=section.get("hidden_size", int),
        ffn_width=section.get("intermediate_size", int),
        activation=section.get("hidden_act", str, "silu"),
        norm_epsilon=section.get("rms_norm_eps", float, 1e-6),
    )


def _parse_gate(root: _Section, own: _Section) -> GateConfig:
    return GateConfig(
        present=root.get("use_mpg", bool, False),
        strength=root.get("mpg_lambda", float, 0.0),
        temperature=root.get("mpg_gate_temperature", float, 2.0),
        directions=root.get("mpg_num_projections", int, 32),
        refinements=root.get("mpg_refinement_iters", int, 1),
        stop_gradient=root.get("mpg_use_stop_gradient", bool, True),
        first_pass=own.get("mpg_first_pass", str, "published"),
        anchor_bucket=own.get("mpg_anchor_bucket", int, 0),
    )


def _parse_delay(root: _Section) -> DelayConfig:
    return DelayConfig(
        trained=root.get("use_training_time_rtc", bool, False),
        simulated=root.get("simulated_delay", int, 0),
        exponential=root.get("rtc_delay_exp_weight", bool, True),
    )


def _parse_time(root: _Section) -> TimeConfig:
    return TimeConfig(
        alpha=root.get("noise_beta_alpha", float, 1.5),
        beta=root.get("noise_beta_beta", float, 1.0),
        scale=root.get("noise_s", float, 0.999),
    )


def write_config(config: PolicyConfig) -> dict[str, Any]:
    """config.json in the published format: what was read, with this configuration's values on top."""
    document = copy.deepcopy(dict(config.source))
    _merge(document, _published_fields(config))
    return document


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _published_fields(config: PolicyConfig) -> dict[str, Any]:
    own_message = {} if config.own_system_message is None else {"system_message": config.own_system_message}
    return {
        "model_type": MODEL_TYPE,
        "llm_config": _decoder_fields(config.decoder),
        "vit_config": _vision_fields(config.vision),
        "connector_arch": "internvl_connector",
        "template": config.template,
        "select_layer": config.vision.select_layer,
        "force_image_size": config.vision.image_size,
        "downsample_ratio": 1 / config.vision.shuffle,
        "action_chunk_length": config.chunk,
        "action_token_num": config.chunk,
        "gen_action_type": "prop_hidden",
        "prompt_template": config.prompt_template,
        "use_expert": True,
        "use_flow_matching": True,
        "attn_mode": "causal",
        "noise_beta_alpha": config.time.alpha,
        "noise_beta_beta": config.time.beta,
        "noise_s": config.time.scale,
        "num_timestep_buckets": TIME_BUCKETS,
        "num_inference_timesteps": config.flow_steps,
        "use_mpg": config.gate.present,
        "mpg_lambda": config.gate.strength,
        "mpg_gate_temperature": config.gate.temperature,
        "mpg_num_projections": config.gate.directions,
        "mpg_refinement_iters": config.gate.refinements,
        "mpg_use_stop_gradient": config.gate.stop_gradient,
        "use_training_time_rtc": config.delay.trained,
        "simulated_delay": config.delay.simulated,
        "rtc_delay_exp_weight": config.delay.exponential,
        "onbeat": {
            "rope": config.decoder.rope,
            "mpg_first_pass": config.gate.first_pass,
            "mpg_anchor_bucket": config.gate.anchor_bucket,
        },
        **own_message,
    }


def _decoder_fields(decoder: DecoderConfig) -> dict[str, Any]:
    shared = {
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "rope_theta": decoder.rope_theta,
        "model_type": "qwen3",
    }
    expert = {**shared, **_stream_fields(decoder.gen)}
    return {
        **shared,
        **_stream_fields(decoder.und),
        "vocab_size": decoder.vocabulary,
        "tie_word_embeddings": decoder.tied,
        "attention_bias": False,
        "qk_norm": True,
        "use_mot": True,
        "layer_module": LAYER_MODULE,
        "expert_config": expert,
    }


def _stream_fields(stream: StreamConfig) -> dict[str, Any]:
    return {
        "hidden_size": stream.width,
        "intermediate_size": stream.ffn_width,
        "hidden_act": stream.activation,
        "rms_norm_eps": stream.norm_epsilon,
    }


def _vision_fields(vision: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": "intern_vit_6b",
        "hidden_size": vision.width,
        "intermediate_size": vision.ffn_width,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.norm_epsilon,
        "qkv_bias": vision.qkv_bias,
        "hidden_act": "gelu",
        "norm_type": "layer_norm",
        "qk_normalization": False,
    }


def _check_policy(config: PolicyConfig) -> None:
    _check_vision(config.vision)
    _check_decoder(config.decoder)
    _check_at_least(1, action_chunk_length=config.chunk, num_inference_timesteps=config.flow_steps)
    _check_choice("template", config.template, tuple(SYSTEM_MESSAGES))
    _check_choice("prompt_template", config.prompt_template, tuple(INSTRUCTION_TEMPLATES))
    _check_choice("onbeat.mpg_first_pass", config.gate.first_pass, FIRST_PASSES)
    if not 0 <= config.gate.anchor_bucket <= TIME_BUCKETS:
        raise ConfigError(f"onbeat.mpg_anchor_bucket is {config.gate.anchor_bucket}: give 0 to {TIME_BUCKETS}")


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


def _check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"{name} is {value}: give at least {least}")


def _check_divides(name: str, value: int, by: int) -> None:
    if value <= 0 or value % by:
        raise ConfigError(f"{name} is {value}: give a positive multiple of {by}")


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"unknown {name} {value!r}: give one of {', '.join(known)}")
