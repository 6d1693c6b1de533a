"""The network against the recorded cases, and the mistakes each of them must catch."""

import copy
import functools
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from onbeat.runtime.engine import FlowResult, PolicyInputs
from onbeat.training.checkpoint import load_checkpoint
from onbeat.training.config import DecoderConfig, PolicyConfig, StreamConfig, VisionConfig
from onbeat.training.model import gating
from onbeat.training.model.decoder import KeysValues, Rotary
from onbeat.training.model.policy import Cache, Policy, count_parameters, create_policy
from onbeat.training.model.sampler import OverrideError, choose_sampler, fit_chunk, time_buckets
from onbeat.training.model.vision import normalise_views, shuffle_pixels
from onbeat.training.random_checkpoint import random_config, random_policy
from onbeat.training.torch_engine import EngineInputError, TorchEngine, build_engine

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-5  # fp32, max over a chunk; the smallest real mistake moves 4.4e-5
PARITY_ROPE = "fp32"


@dataclass(frozen=True, slots=True)
class Case:
    """A recorded case: its arrays, its description, its checkpoint folder."""

    arrays: Mapping[str, NDArray[Any]]
    about: Mapping[str, Any]
    checkpoint: Path

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name])


@functools.cache
def named_case(stem: str) -> Case:
    """The case whose file name contains `stem`; read once."""
    entry = next(entry for entry in CASES if stem in entry["file"])
    path = GOLDEN / entry["file"]
    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return Case(dict(np.load(path)), about, GOLDEN / entry["checkpoint"])


@pytest.fixture(params=[Path(entry["file"]).stem for entry in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    return named_case(request.param)


@functools.cache
def load_once(folder: Path) -> Policy:
    return load_checkpoint(folder, rope=PARITY_ROPE)


def load_policy(case: Case) -> Policy:
    """A copy, so that a test may hang hooks on it."""
    return copy.deepcopy(load_once(case.checkpoint))


def with_config(policy: Policy, change: Callable[[PolicyConfig], PolicyConfig]) -> Policy:
    """The same weights under another configuration."""
    changed = Policy(change(policy.config))
    changed.load_state_dict(policy.state_dict())
    return changed


def case_engine(case: Case, policy: Policy) -> TorchEngine:
    about = case.about
    return build_engine(
        policy,
        views=len(about["video_keys"]),
        overrides=about["overrides"],
        directions=True,
        enable_rtc=about["enable_rtc"],
    )


def case_prefix(case: Case, policy: Policy) -> Cache:
    """The prefix from the recorded pixels, tokens and state."""
    length = int(case.arrays["mid/packed_action_indexes"][0])
    where, ids = case.tensor("mid/packed_text_indexes"), torch.zeros(length, dtype=torch.long)
    ids[where[where < length]] = case.tensor("mid/packed_text_ids")[where < length]
    image_start = int(case.arrays["mid/packed_vit_token_indexes"][0])
    state_index = int(case.arrays["mid/packed_state_indexes"][0])
    pixels, state = case.tensor("mid/pixel_values")[None], case.tensor("mid/padded_state")
    with torch.inference_mode():
        return policy.encode_prefix(pixels, ids[None], image_start, state_index, state)


def replay(case: Case, policy: Policy, **changes: NDArray[np.float32] | None) -> FlowResult:
    """The case through the engine; changes replace noise, directions or prev_chunk."""
    arrays = {
        "noise": case.arrays["rng/noise"],
        "directions": case.arrays.get("rng/mpg_directions"),
        "prev_chunk": case.arrays.get("in/prev_chunk"),
        **changes,
    }
    engine = case_engine(case, policy)
    noise = arrays.pop("noise")
    assert noise is not None
    delay = case.about["inference_delay"]
    return engine.flow(case_prefix(case, policy), noise, **arrays, delay=delay)


def worst(a: NDArray[Any] | torch.Tensor, b: NDArray[Any] | torch.Tensor) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def error(case: Case, policy: Policy, **changes: NDArray[np.float32] | None) -> float:
    return worst(replay(case, policy, **changes).actions, case.arrays["out/action_pred"])


def test_actions_match_the_recorded_ones(case: Case) -> None:
    assert error(case, load_policy(case)) <= TOLERANCE


def test_gate_and_cost_match_the_recorded_ones(case: Case) -> None:
    result = replay(case, load_policy(case))
    if not case.about["use_mpg_active"]:
        assert result.gate.size == result.cost.size == 0
        return
    assert worst(result.cost, case.arrays["mid/mpg_cost"]) <= 1e-6
    assert worst(result.gate, case.arrays["mid/mpg_gate"]) <= 1e-6


def test_vision_matches_layer_by_layer(case: Case) -> None:
    policy, seen = load_policy(case), []
    tower = policy.vit_model
    for layer in (tower.embeddings, *tower.encoder.layers):
        layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.inference_mode():
        shuffled = tower(case.tensor("mid/pixel_values"))
        embeds = policy.connector(shuffled)
    for name, output in zip(("mid/vit_embeddings", "mid/vit_layer0", "mid/vit_layer1"), seen, strict=True):
        assert worst(output, case.arrays[name]) <= TOLERANCE
    assert worst(shuffled, case.arrays["mid/connector_in"]) <= TOLERANCE
    assert worst(embeds, case.arrays["mid/vit_embeds"]) <= TOLERANCE


def test_prefix_matches_layer_by_layer(case: Case) -> None:
    policy, seen = load_policy(case), []
    for layer in policy.language_model.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    case_prefix(case, policy)
    assert len(seen) == 2, "the last layer of three is asked for keys and values only"
    places = np.concatenate([case.arrays["mid/packed_text_indexes"], case.arrays["mid/packed_vit_token_indexes"]])
    recorded_order = np.argsort(places)  # recorded with all text before all images
    for index, (und, state, _) in enumerate(seen):
        recorded = case.arrays[f"mid/llm_layer{index}_und"][recorded_order]
        assert worst(und[0], recorded[: und.shape[1]]) <= TOLERANCE
        assert worst(state[0, 0], case.arrays[f"mid/llm_layer{index}_gen"][0]) <= TOLERANCE


def test_velocity_matches_at_every_recorded_step(case: Case) -> None:
    """Iteration 0 is the plain flow. All its steps at once: they are draws of (actions, time) over one prefix."""
    policy = load_policy(case)
    with torch.inference_mode():
        velocity = policy.velocity(
            case_prefix(case, policy),
            case.tensor("mid/step_actions_in")[:1],
            case.tensor("mid/step_timesteps")[:1],
        )
    assert worst(velocity, case.arrays["mid/step_velocity"][:1]) <= TOLERANCE


def test_rotary_phases_match(case: Case) -> None:
    decoder = load_policy(case).config.decoder
    rotation = Rotary(decoder)(torch.arange(int(case.arrays["mid/sequence_length"])))
    assert worst(rotation.cos, case.arrays["mid/rope_cos"]) <= 1e-6
    assert worst(rotation.sin, case.arrays["mid/rope_sin"]) <= 1e-6


def test_time_buckets_match_the_published_quirks() -> None:
    recorded = json.loads((GOLDEN / "unit_timesteps.json").read_text(encoding="utf-8"))
    for steps, by_precision in recorded.items():
        for precision, buckets in by_precision.items():
            assert list(time_buckets(int(steps), precision)) == buckets, (steps, precision)


# Mistakes: each must move a recorded case beyond the tolerance, or the case would not catch it.


def test_mistake_zero_state_row_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    case, cost = named_case("case_02"), gating.transport_cost
    monkeypatch.setattr(gating, "transport_cost", lambda rows, *rest: cost(rows[..., 1:, :], *rest))
    assert error(case, load_policy(case)) > TOLERANCE


def test_mistake_noise_reused_across_iterations() -> None:
    case = named_case("case_03")
    first = case.arrays["rng/noise"][:1]
    assert error(case, load_policy(case), noise=np.repeat(first, 3, axis=0)) > TOLERANCE


def test_mistake_clean_anchor_at_the_clean_end() -> None:
    case = named_case("case_02")
    policy = with_config(load_policy(case), lambda c: replace(c, gate=replace(c.gate, anchor_bucket=1000)))
    assert error(case, policy) > TOLERANCE


def test_mistake_projected_first_pass() -> None:
    case = named_case("case_02")
    policy = with_config(load_policy(case), lambda c: replace(c, gate=replace(c.gate, first_pass="projected")))
    assert error(case, policy) > TOLERANCE


@pytest.mark.parametrize("decoder", [{"rope_theta": 1e4}, {"rope": "bf16"}], ids=["theta", "bf16"])
def test_mistake_rotary_frequencies(decoder: dict[str, Any]) -> None:
    case = named_case("case_01")
    policy = with_config(load_policy(case), lambda c: replace(c, decoder=replace(c.decoder, **decoder)))
    assert error(case, policy) > TOLERANCE


def test_mistake_understanding_epsilon_in_the_action_stream() -> None:
    """The recorded checkpoints use one epsilon for both streams, so a random one stands in."""
    policy = small_policy(lambda d: replace(d, gen=replace(d.gen, norm_epsilon=1e-3)))
    gen = replace(policy.config.decoder.gen, norm_epsilon=policy.config.decoder.und.norm_epsilon)
    wrong = with_config(policy, lambda c: replace(c, decoder=replace(c.decoder, gen=gen)))
    assert worst(run_small(policy), run_small(wrong)) > TOLERANCE


def test_expected_gate_is_the_limit_of_many_directions() -> None:
    observed, anchor = torch.randn(3, 17, 24), torch.randn(3, 24)
    many = torch.randn(20_000, 24, generator=torch.Generator().manual_seed(3))
    expected = gating.transport_cost(observed, anchor, None)
    assert torch.allclose(gating.transport_cost(observed, anchor, many), expected, rtol=0.05)


def test_length_of_directions_does_not_matter() -> None:
    case = named_case("case_02")
    stretched = case.arrays["rng/mpg_directions"] * np.float32(7)
    assert error(case, load_policy(case), directions=stretched) <= TOLERANCE


# The prefix lock.


def test_locked_rows_come_out_as_they_went_in() -> None:
    case = named_case("case_04")
    delay = case.about["inference_delay"]
    actions = replay(case, load_policy(case)).actions
    assert np.array_equal(actions[:delay], case.arrays["in/prev_chunk"][:delay])


@pytest.mark.parametrize("rows", [1, 2, 3, 40])
def test_only_the_locked_rows_of_the_previous_chunk_matter(rows: int) -> None:
    """Shorter than the delay: padded by its last row. Longer than the chunk: cut."""
    case = named_case("case_04")
    given = np.resize(case.arrays["in/prev_chunk"], (rows, 200))
    full = given[np.minimum(np.arange(16), rows - 1)]
    policy = load_policy(case)
    assert np.array_equal(replay(case, policy, prev_chunk=given).actions, replay(case, policy, prev_chunk=full).actions)


def test_previous_chunk_is_padded_or_cut() -> None:
    rows = torch.arange(3.0)[:, None].expand(3, 200)
    assert fit_chunk(rows, 5)[:, 0].tolist() == [0, 1, 2, 2, 2]
    assert fit_chunk(rows, 2)[:, 0].tolist() == [0, 1]


def test_lock_is_ignored_unless_trained_asked_for_and_delayed() -> None:
    case = named_case("case_04")
    policy, chunk = load_policy(case), case.arrays["in/prev_chunk"]
    prefix, noise = case_prefix(case, policy), case.arrays["rng/noise"]
    locked, off = build_engine(policy, views=2), build_engine(policy, views=2, enable_rtc=False)
    untrained = with_config(policy, lambda c: replace(c, delay=replace(c.delay, trained=False)))
    free = locked.flow(prefix, noise).actions
    assert np.array_equal(locked.flow(prefix, noise, prev_chunk=chunk, delay=0).actions, free)
    assert np.array_equal(off.flow(prefix, noise, prev_chunk=chunk, delay=3).actions, free)
    ignoring = build_engine(untrained, views=2)
    assert np.array_equal(ignoring.flow(prefix, noise, prev_chunk=chunk, delay=3).actions, free)
    assert worst(locked.flow(prefix, noise, prev_chunk=chunk, delay=3).actions, free) > TOLERANCE


def test_a_delay_beyond_the_chunk_keeps_all_of_it() -> None:
    case = named_case("case_04")
    policy, chunk = load_policy(case), case.arrays["in/prev_chunk"]
    result = build_engine(policy, views=2).flow(
        case_prefix(case, policy), case.arrays["rng/noise"], prev_chunk=chunk, delay=99
    )
    assert np.array_equal(result.actions, chunk)


# Settings of the sampler.


def gated_config() -> PolicyConfig:
    return load_policy(named_case("case_02")).config


@pytest.mark.parametrize("off", [{"use_mpg": False}, {"mpg_lambda": 0}, {"mpg_refinement_iters": 0}])
def test_any_of_three_overrides_turns_the_gate_off(off: dict[str, Any]) -> None:
    assert choose_sampler(gated_config()).gate == "expectation"
    sampler = choose_sampler(gated_config(), off)
    assert (sampler.gate, sampler.iterations) == ("off", 1)


def test_a_gate_the_checkpoint_does_not_have_cannot_be_turned_on() -> None:
    assert choose_sampler(load_policy(named_case("case_01")).config, {"use_mpg": True}).gate == "off"


def test_every_override_reaches_the_sampler() -> None:
    overrides = {
        "num_inference_timesteps": 10,
        "mpg_lambda": 0.3,
        "mpg_num_projections": 5,
        "mpg_refinement_iters": 3,
        "mpg_gate_temperature": 0.5,
    }
    sampler = choose_sampler(gated_config(), overrides, directions=True)
    assert (sampler.flow_steps, sampler.iterations, sampler.gate) == (10, 4, "directions")
    assert (sampler.gate_lambda, sampler.gate_directions, sampler.gate_temperature) == (0.3, 5, 0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mpg_lamda": 0.1},
        {"num_inference_timesteps": 0},
        {"mpg_gate_temperature": 0},
        {"mpg_num_projections": 0},
    ],
)
def test_an_override_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OverrideError, match=next(iter(wrong))):
        choose_sampler(gated_config(), wrong)


# Bad inputs to the engine.


def small_policy(change: Callable[[DecoderConfig], DecoderConfig] = lambda d: d) -> Policy:
    und, gen = StreamConfig(24, 40), StreamConfig(16, 24)
    decoder = DecoderConfig(und, gen, layers=3, heads=4, kv_heads=2, head_dim=10, vocabulary=32, rope="fp32")
    vision = VisionConfig(width=16, ffn_width=24, layers=2, heads=2, image_size=28)
    return random_policy(PolicyConfig(vision=vision, decoder=change(decoder), chunk=12), seed=5)


def small_inputs(seed: int = 0) -> PolicyInputs:
    draw = np.random.default_rng(seed)
    return PolicyInputs(
        views=draw.integers(0, 256, (1, 28, 28, 3), dtype=np.uint8),
        token_ids=draw.integers(0, 32, 20),
        image_start=4,
        state_index=9,
        state=draw.standard_normal(200).astype(np.float32),
    )


def run_small(policy: Policy) -> NDArray[np.float32]:
    engine = build_engine(policy, views=1)
    noise = np.random.default_rng(1).standard_normal((1, 12, 200)).astype(np.float32)
    return engine.flow(engine.prefix(small_inputs()), noise).actions


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"views": np.zeros((2, 28, 28, 3), np.uint8)}, "views"),
        ({"views": np.zeros((1, 56, 56, 3), np.uint8)}, "views"),
        ({"state": np.full(200, np.nan, np.float32)}, "state"),
        ({"state": np.zeros(14, np.float32)}, "state"),
        ({"token_ids": np.full(20, 32)}, "token_ids"),
        ({"token_ids": np.full(20, -1)}, "token_ids"),
        ({"image_start": 9}, "image_start"),
        ({"state_index": 20}, "state_index"),
    ],
)
def test_bad_observations_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    engine = build_engine(small_policy(), views=1)
    with pytest.raises(EngineInputError, match=named):
        engine.prefix(replace(small_inputs(), **change))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"noise": np.zeros((2, 12, 200), np.float32)}, "noise"),
        ({"noise": np.full((1, 12, 200), np.inf, np.float32)}, "noise"),
        ({"delay": -1}, "delay"),
    ],
)
def test_bad_flow_inputs_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    engine = build_engine(small_policy(), views=1)
    prefix = engine.prefix(small_inputs())
    with pytest.raises(EngineInputError, match=named):
        engine.flow(prefix, **{"noise": np.zeros((1, 12, 200), np.float32), **change})


def test_missing_directions_and_a_broken_previous_chunk_are_refused() -> None:
    gated, locked = named_case("case_02"), named_case("case_04")
    with pytest.raises(EngineInputError, match="directions"):
        replay(gated, load_policy(gated), directions=None)
    for wrong in (np.zeros((0, 200)), np.zeros((4, 7)), np.full((4, 200), np.nan)):
        with pytest.raises(EngineInputError, match="prev_chunk"):
            replay(locked, load_policy(locked), prev_chunk=wrong.astype(np.float32))


# Training.


def random_observations(
    config: PolicyConfig, batch: int, views: int
) -> tuple[torch.Tensor, torch.Tensor, int, int, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    side, images = config.vision.image_size, views * config.vision.tokens_per_view
    ids = torch.randint(0, config.decoder.vocabulary, (batch, images + 15), generator=draw)
    pixels = torch.randn(batch, views, 3, side, side, generator=draw)
    return pixels, ids, 3, images + 6, torch.randn(batch, 200, generator=draw)


def test_draws_over_one_prefix_do_not_see_each_other() -> None:
    policy = small_policy()
    cache = policy.encode_prefix(*random_observations(policy.config, 2, 3))
    actions, bucket = torch.randn(2, 5, 12, 200), torch.randint(0, 1000, (2, 5, 12))
    together = policy.velocity(cache, actions, bucket)
    for draw in range(5):
        alone = policy.velocity(cache, actions[:, draw : draw + 1], bucket[:, draw : draw + 1])
        assert worst(alone[:, 0].detach(), together[:, draw].detach()) <= TOLERANCE


def test_observations_of_a_batch_do_not_see_each_other() -> None:
    policy = small_policy()
    pixels, ids, image_start, state_index, state = random_observations(policy.config, 3, 2)
    together = policy.encode_prefix(pixels, ids, image_start, state_index, state)
    alone = policy.encode_prefix(pixels[1:2], ids[1:2], image_start, state_index, state[1:2])
    for a, b in zip(together, alone, strict=True):
        assert worst(a.keys[1:2].detach(), b.keys.detach()) <= TOLERANCE
        assert worst(a.values[1:2].detach(), b.values.detach()) <= TOLERANCE


def test_rows_do_not_see_later_rows_and_the_prefix_never_sees_actions() -> None:
    policy = small_policy()
    cache = policy.encode_prefix(*random_observations(policy.config, 1, 1))
    actions, bucket = torch.randn(1, 1, 12, 200), torch.full((1, 1, 12), 250)
    changed = actions.clone()
    changed[:, :, 7:] += 1
    before, after = policy.velocity(cache, actions, bucket), policy.velocity(cache, changed, bucket)
    assert torch.equal(before[:, :, :7], after[:, :, :7])
    assert worst(before[:, :, 7].detach(), after[:, :, 7].detach()) > TOLERANCE


UNUSED_AT_LAST_LAYER = ("q_proj", "q_norm", "o_proj", "mlp", "post_attention_layernorm")


def is_unused(name: str, layers: int) -> bool:
    """What no action depends on: lm_head, the und norm, and the last und layer beyond its keys and values."""
    if name.startswith(f"language_model.layers.{layers - 1}.und."):
        return any(part in name for part in UNUSED_AT_LAST_LAYER)
    return name.startswith(("language_model.lm_head", "language_model.norm.und", "mpg."))


def test_a_fresh_policy_learns_in_every_weight_that_matters() -> None:
    config = small_policy().config
    policy = create_policy(config, seed=1)
    cache = policy.encode_prefix(*random_observations(config, 2, 2))
    velocity = policy.velocity(cache, torch.randn(2, 3, 12, 200), torch.randint(0, 1000, (2, 3, 12)))
    (velocity - torch.randn(2, 3, 12, 200)).square().mean().backward()
    for name, parameter in policy.named_parameters():
        if is_unused(name, config.decoder.layers):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_the_gate_gives_no_gradient_through_its_weight() -> None:
    gate = gating.ManifoldGate(small_policy().config.decoder)
    features, anchor = torch.randn(2, 12, 16), torch.randn(2, 24, requires_grad=True)
    gated = gate(features, anchor, None, strength=0.1, temperature=1.0)
    gated.features.sum().backward()
    assert anchor.grad is None
    assert gate.enhancement_proj.weight.grad is not None
    gate(features, anchor, None, strength=0.1, temperature=1.0, stop_gradient=False).features.sum().backward()
    assert anchor.grad is not None


def test_fresh_weights_depend_on_the_seed_alone() -> None:
    config = random_config(3, vocabulary=40)
    one, same, other = (create_policy(config, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["action_encoder.W1.weight"], other["action_encoder.W1.weight"])


@pytest.mark.parametrize("seed", range(4))
def test_parameter_counts_add_up(seed: int) -> None:
    policy = Policy(random_config(seed, vocabulary=40))
    counts = count_parameters(policy)
    assert counts["total"] == sum(p.numel() for p in policy.parameters())
    assert (counts["gate"] > 0) == policy.config.gate.present
    assert (counts["lm_head"] == 0) == policy.config.decoder.tied


# Parts that the recorded checkpoints do not vary.


def test_the_released_model_has_the_published_size() -> None:
    """Being-H0.5-2B as published, on no memory: 1.409 B und, 0.440 B gen, 0.30 B vision, 0.311 B embedding."""
    decoder = DecoderConfig(StreamConfig(2048, 6144), StreamConfig(1024, 3072), 28, 16, 8, 128, 151_936)
    with torch.device("meta"):
        policy = Policy(PolicyConfig(VisionConfig(1024, 4096, 24, 16, 224), decoder))
    counts = count_parameters(policy)
    millions = {name: round(count / 1e6) for name, count in counts.items()}
    assert (millions["und"], millions["gen"], millions["embedding"], millions["lm_head"]) == (1409, 440, 311, 311)
    assert 300 <= millions["vision"] <= 305


def test_bf16_frequencies_shift_phases_as_measured() -> None:
    """0.32 rad at position 280 for theta 1e6 and heads of 128."""
    stream = StreamConfig(8, 8)
    config = DecoderConfig(stream, stream, 1, 1, 1, 128, 8)
    exact, rounded = (Rotary(replace(config, rope=rope)).inverse_frequency for rope in ("fp32", "bf16"))
    assert float((280 * (exact - rounded)).abs().max()) == pytest.approx(0.32, abs=0.01)


@pytest.mark.parametrize(("select", "layers"), [(-1, 3), (-2, 2), (1, 1), (0, 0), (3, 3), (-4, 0)])
def test_select_layer_counts_hidden_states(select: int, layers: int) -> None:
    policy = small_policy()
    vision = replace(policy.config.vision, layers=3, select_layer=select)
    tower = random_policy(replace(policy.config, vision=vision), seed=2).vit_model
    hidden = tower.embeddings(torch.randn(1, 3, 28, 28))
    seen: list[int] = []
    for index, layer in enumerate(tower.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: seen.append(index))
    tower.encoder(hidden)
    assert seen == list(range(layers))


def test_pixel_shuffle_takes_a_square_row_by_row() -> None:
    patches = torch.arange(36).view(1, 36, 1)
    tokens = shuffle_pixels(patches, grid=6, side=2)[0]
    assert tokens.shape == (9, 4)
    assert tokens[0].tolist() == [0, 1, 6, 7]
    assert tokens[5].tolist() == [16, 17, 22, 23]


def test_views_are_normalised_per_channel() -> None:
    white = normalise_views(torch.full((2, 4, 4, 3), 255, dtype=torch.uint8))
    assert white.shape == (2, 3, 4, 4)
    assert white[0, :, 0, 0].tolist() == pytest.approx([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])


@pytest.mark.slow
def test_und_stream_is_qwen3() -> None:
    """Text alone, against another implementation: the state token stands last, so no text token can see it."""
    transformers = importlib.import_module("transformers")  # takes seconds
    policy = small_policy()
    decoder, config = policy.language_model, policy.config.decoder
    theirs = transformers.Qwen3Model(
        transformers.Qwen3Config(
            vocab_size=config.vocabulary,
            hidden_size=config.und.width,
            intermediate_size=config.und.ffn_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    )
    weights = {name.replace(".und.", "."): value for name, value in decoder.state_dict().items()}
    theirs.load_state_dict({name: weights[name] for name in theirs.state_dict()})
    ids = torch.randint(0, config.vocabulary, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        recorded = theirs(ids, use_cache=True).past_key_values
        ours: list[KeysValues] = decoder.encode_prefix(decoder.embed_tokens(ids), torch.randn(2, 1, 16), 30)
    for index, cache in enumerate(ours):
        assert worst(cache.keys[:, :, :30], recorded.layers[index].keys) <= TOLERANCE
        assert worst(cache.values[:, :, :30], recorded.layers[index].values) <= TOLERANCE
