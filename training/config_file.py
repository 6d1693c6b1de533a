"""config.json on disk: read into a PolicyConfig, refused by the key that is wrong, and written back.

What the published format cannot say stands under the key "onbeat", which the published loader ignores.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from onbeat.training.config import (
    LAYER_MODULE,
    MODEL_TYPE,
    TIME_BUCKETS,
    ConfigError,
    DecoderConfig,
    DelayConfig,
    ExpertsConfig,
    GateConfig,
    PolicyConfig,
    RobotDelay,
    StreamConfig,
    TimeConfig,
    VisionConfig,
)

CONFIG_FILE = "config.json"


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
        decoder=_parse_decoder(root.section("llm_config"), own, rope or own.get("rope", str, "bf16")),
        chunk=root.get("action_chunk_length", int),
        flow_steps=root.get("num_inference_timesteps", int),
        gate=_parse_gate(root, own),
        delay=_parse_delay(root, own),
        time=_parse_time(root),
        template=root.get("template", str),
        own_system_message=None if document.get("system_message") is None else root.get("system_message", str),
        prompt_template=root.get("prompt_template", str, "long"),
        adapters=own.section("adapters").get("enabled", bool) if "adapters" in own.values else False,
        idle_slots=own.get("idle_slots", str, "noise"),
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


def _parse_decoder(llm: _Section, own: _Section, rope: str) -> DecoderConfig:
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
        experts=_parse_experts(own.section("experts")) if "experts" in own.values else None,
    )


def _parse_experts(section: _Section) -> ExpertsConfig:
    return ExpertsConfig(
        foundation_layers=section.get("foundation_layers", int),
        count=section.get("count", int),
        top_k=section.get("top_k", int),
        routing=section.get("routing", str, "observation"),
        balance_weight=section.get("balance_weight", float, 0.0),
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


def _parse_delay(root: _Section, own: _Section) -> DelayConfig:
    return DelayConfig(
        trained=root.get("use_training_time_rtc", bool, False),
        simulated=root.get("simulated_delay", int, 0),
        exponential=root.get("rtc_delay_exp_weight", bool, True),
        robots=_parse_robot_delays(own.section("delays")) if "delays" in own.values else {},
    )


def _parse_robot_delays(delays: _Section) -> dict[str, RobotDelay]:
    return {name: _parse_robot_delay(delays.section(name)) for name in delays.values}


def _parse_robot_delay(section: _Section) -> RobotDelay:
    try:
        pairs = tuple((float(latency), float(weight)) for latency, weight in section.values.get("latencies_ms", ()))
        probabilities = tuple(float(weight) for weight in section.values.get("probabilities", ()))
    except (TypeError, ValueError):
        raise ConfigError(
            f"{section.name}: give latencies_ms as pairs of milliseconds and weight, probabilities as numbers"
        ) from None
    return RobotDelay(section.get("period_ms", float), pairs, probabilities)


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
        "onbeat": _own_fields(config),
        **own_message,
    }


def _own_fields(config: PolicyConfig) -> dict[str, Any]:
    """What the published format cannot say; of what is not used, nothing."""
    experts, robots = config.decoder.experts, config.delay.robots
    return {
        "rope": config.decoder.rope,
        "mpg_first_pass": config.gate.first_pass,
        "mpg_anchor_bucket": config.gate.anchor_bucket,
        **({} if experts is None else {"experts": asdict(experts)}),
        **({"adapters": {"enabled": True}} if config.adapters else {}),
        **({} if config.idle_slots == "noise" else {"idle_slots": config.idle_slots}),
        **({"delays": {name: _robot_delay_fields(robot) for name, robot in robots.items()}} if robots else {}),
    }


def _robot_delay_fields(robot: RobotDelay) -> dict[str, Any]:
    told = {"latencies_ms": [list(pair) for pair in robot.latencies], "probabilities": list(robot.probabilities)}
    return {"period_ms": robot.period_ms, **{name: values for name, values in told.items() if values}}


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
