"""config.json: what is read, what is refused and by which name, and that writing back loses nothing."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onbeat.runtime.delay import executed_steps
from onbeat.runtime.prompt import SYSTEM_MESSAGES
from onbeat.training.config import ConfigError, DelayConfig, ExpertsConfig, RobotDelay, VisionConfig
from onbeat.training.config_file import load_config, parse_config, save_config, write_config
from onbeat.training.random_checkpoint import random_config

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDER = GOLDEN / "ckpt_a1" / "checkpoint"
Document = dict[str, Any]


@pytest.fixture
def document() -> Document:
    return json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))


def test_a_released_config_is_read(document: Document) -> None:
    config = parse_config(document)
    assert (config.chunk, config.flow_steps, config.template, config.prompt_template) == (16, 4, "being_h0", "long")
    decoder, vision = config.decoder, config.vision
    assert (decoder.und.width, decoder.gen.width, decoder.heads, decoder.kv_heads, decoder.head_dim) == (
        64,
        32,
        4,
        2,
        16,
    )
    assert (decoder.rope, decoder.tied, decoder.rope_theta) == ("bf16", False, 1e6)
    assert (vision.width, vision.grid, vision.tokens_per_view, vision.depth) == (48, 16, 64, 2)
    assert (config.delay.trained, config.delay.longest, config.gate.present) == (True, 7, False)
    assert "{task_description}" in config.instruction_template


def test_the_expert_gives_width_activation_and_epsilon_and_the_llm_all_else(document: Document) -> None:
    expert = {"hidden_size": 40, "intermediate_size": 56, "hidden_act": "gelu", "rms_norm_eps": 1e-3}
    ignored = {"num_attention_heads": 99, "num_key_value_heads": 99, "head_dim": 99, "rope_theta": 99, "vocab_size": 99}
    document["llm_config"]["expert_config"].update(expert | ignored | {"num_hidden_layers": 99})
    decoder = parse_config(document).decoder
    gen = decoder.gen
    assert (gen.width, gen.ffn_width, gen.activation, gen.norm_epsilon) == (40, 56, "gelu", 1e-3)
    assert (decoder.heads, decoder.kv_heads, decoder.head_dim, decoder.rope_theta, decoder.layers) == (4, 2, 16, 1e6, 3)


def test_writing_back_changes_nothing_that_was_read(document: Document) -> None:
    before = copy.deepcopy(document)
    written = write_config(parse_config(document))
    assert document == before, "the document that was read is not touched"
    assert written.pop("onbeat") == {"rope": "bf16", "mpg_first_pass": "published", "mpg_anchor_bucket": 0}
    assert written == before


@pytest.mark.parametrize("seed", range(20))
def test_a_config_of_our_own_survives_the_file(tmp_path: Path, seed: int) -> None:
    config = random_config(seed, vocabulary=50)
    save_config(config, tmp_path)
    assert load_config(tmp_path) == config


def test_rope_is_the_callers_then_the_files_then_bf16(document: Document) -> None:
    assert parse_config(document).decoder.rope == "bf16"
    assert parse_config({**document, "onbeat": {"rope": "fp32"}}).decoder.rope == "fp32"
    assert parse_config({**document, "onbeat": {"rope": "fp32"}}, rope="bf16").decoder.rope == "bf16"
    with pytest.raises(ConfigError, match="rope"):
        parse_config(document, rope="fp16")


@pytest.mark.parametrize("template", SYSTEM_MESSAGES)
def test_every_template_has_its_message_unless_the_config_has_one(document: Document, template: str) -> None:
    assert parse_config({**document, "template": template}).system_message == SYSTEM_MESSAGES[template]
    assert parse_config({**document, "template": template, "system_message": ""}).system_message == ""
    own = parse_config({**document, "template": template, "system_message": "Be brief."})
    assert own.system_message == "Be brief."
    assert write_config(own)["system_message"] == "Be brief."


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("simulated", "longest"), [(None, 0), (0, 0), (1, 0), (8, 7)])
def test_longest_trained_prefix(document: Document, trained: bool, simulated: int | None, longest: int) -> None:
    changed = {**document, "use_training_time_rtc": trained, "simulated_delay": simulated}
    assert parse_config(changed).delay.longest == (longest if trained else 0)


def test_delays_are_those_of_the_embodiment_and_else_the_published_ones() -> None:
    robots = {"so101": RobotDelay(50.0, probabilities=(0, 1, 3)), "d1": RobotDelay(50.0, latencies=((0, 2), (90, 2)))}
    delay = DelayConfig(trained=True, simulated=4, robots=robots)
    assert delay.weights("so101") == (0, 0.25, 0.75, 0)
    assert delay.weights("d1") == (0, 0.5, 0, 0.5)
    assert delay.weights("g1") == pytest.approx([w / sum((20.1, 7.39, 2.718, 1)) for w in (20.1, 7.39, 2.718, 1)], 1e-3)
    assert replace(delay, exponential=False).weights("g1") == (0.25,) * 4
    assert replace(delay, trained=False).weights("so101") == (1.0,), "no prefix was asked for"


@pytest.mark.parametrize("latency", [0.0, 30.0, 49.9, 50.0, 99.0, 100.0, 149.9])
def test_a_latency_counts_as_many_rows_as_the_runtime_would(latency: float) -> None:
    rows = executed_steps(round(latency * 1e6), t0_ns=0, period_ns=50_000_000)
    weights = RobotDelay(50.0, latencies=((latency, 1.0),)).weights(8)
    assert weights.index(1.0) == rows


def test_what_comes_later_than_the_longest_delay_counts_as_the_longest() -> None:
    assert RobotDelay(50.0, latencies=((0, 1), (900, 1))).weights(3) == (0, 0.5, 0.5)


def test_what_only_our_networks_have_survives_the_file(document: Document) -> None:
    config = parse_config(document)
    routed = replace(config.decoder, experts=ExpertsConfig(1, 4, 2, "token", 0.02))
    robots = {"so101": RobotDelay(50.0, latencies=((49.5, 2.0),)), "d1": RobotDelay(20.0, probabilities=(0.5, 0.5))}
    ours = replace(config, decoder=routed, adapters=True, idle_slots="zero", delay=replace(config.delay, robots=robots))
    written = json.loads(json.dumps(write_config(ours)))
    assert parse_config(written) == ours
    assert [routed.is_routed(layer) for layer in range(3)] == [False, True, True]


def set_at(path: str, value: object) -> Callable[[Document], None]:
    *parents, last = path.split(".")

    def change(document: Document) -> None:
        for parent in parents:
            document = document[parent]
        document[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("model_type", "llama", "model_type"),
        ("model_type", None, "model_type"),
        ("template", "vicuna", "template 'vicuna'"),
        ("template", None, "template"),
        ("system_message", 7, "system_message"),
        ("prompt_template", "medium", "prompt_template"),
        ("llm_config", None, "llm_config"),
        ("vit_config", [], "vit_config"),
        ("llm_config.expert_config", "none", "expert_config"),
        ("llm_config.hidden_size", "64", "llm_config.hidden_size"),
        ("llm_config.hidden_size", True, "llm_config.hidden_size"),
        ("llm_config.layer_module", "Qwen3DecoderLayer", "layer_module"),
        ("llm_config.attention_bias", True, "attention_bias"),
        ("llm_config.rope_scaling", {"type": "yarn"}, "rope_scaling"),
        ("llm_config.rope_theta", None, "rope_theta"),
        ("llm_config.num_key_value_heads", 3, "num_attention_heads"),
        ("llm_config.num_hidden_layers", 0, "layers"),
        ("llm_config.head_dim", 15, "head_dim"),
        ("llm_config.hidden_act", "mish", "hidden_act"),
        ("llm_config.expert_config.hidden_act", "mish", "hidden_act"),
        ("llm_config.expert_config.hidden_size", 31, "expert_config.hidden_size"),
        ("vit_config.norm_type", "rms_norm", "norm_type"),
        ("vit_config.image_size", 448, "image_size"),
        ("vit_config.num_attention_heads", 5, "hidden_size"),
        ("select_layer", 3, "select_layer"),
        ("select_layer", -4, "select_layer"),
        ("downsample_ratio", 0.3, "downsample_ratio"),
        ("downsample_ratio", 0, "downsample_ratio"),
        ("num_timestep_buckets", 500, "num_timestep_buckets"),
        ("action_chunk_length", 0, "action_chunk_length"),
        ("num_inference_timesteps", -1, "num_inference_timesteps"),
        ("attn_mode", "noncausal", "attn_mode"),
        ("use_flow_matching", False, "use_flow_matching"),
        ("onbeat", "fast", "onbeat"),
        ("onbeat", {"mpg_first_pass": "twice"}, "mpg_first_pass"),
        ("onbeat", {"mpg_anchor_bucket": 1001}, "mpg_anchor_bucket"),
        ("onbeat", {"experts": {"foundation_layers": 1, "count": 4}}, "onbeat.experts.top_k"),
        ("onbeat", {"experts": {"foundation_layers": 0, "count": 4, "top_k": 2}}, "layers is 0: give 1 to 2"),
        ("onbeat", {"experts": {"foundation_layers": 3, "count": 4, "top_k": 2}}, "layers is 3: give 1 to 2"),
        ("onbeat", {"experts": {"foundation_layers": 1, "count": 4, "top_k": 5}}, "top_k is 5: give 1 to 4"),
        ("onbeat", {"experts": {"foundation_layers": 1, "count": 4, "top_k": 1, "routing": "x"}}, "experts.routing"),
        ("onbeat", {"adapters": {}}, "adapters.enabled"),
        ("onbeat", {"idle_slots": "none"}, "idle_slots"),
        ("onbeat", {"delays": {"so101": {"period_ms": 0, "probabilities": [1]}}}, r"delays\.so101\.period_ms"),
        ("onbeat", {"delays": {"so101": {"period_ms": 50}}}, "either latencies or probabilities"),
        ("onbeat", {"delays": {"so101": {"period_ms": 50, "probabilities": [0, 0]}}}, "one weight above 0"),
        ("onbeat", {"delays": {"so101": {"period_ms": 50, "probabilities": [1] * 9}}}, "raise simulated_delay"),
        ("onbeat", {"delays": {"so101": {"period_ms": 50, "latencies_ms": [70]}}}, "pairs of milliseconds and weight"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(document: Document, path: str, value: object, named: str) -> None:
    set_at(path, value)(document)
    with pytest.raises(ConfigError, match=named):
        parse_config(document)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError):
        load_config(tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        load_config(tmp_path)


@pytest.mark.parametrize(("image", "tokens"), [(28, 1), (56, 4), (112, 16), (224, 64)])
def test_tokens_per_view(image: int, tokens: int) -> None:
    assert VisionConfig(8, 8, 1, 1, image).tokens_per_view == tokens
