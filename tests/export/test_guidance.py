"""The soft prefix: our own reference in NumPy, exactly nothing where it is off, and bundles that came before it."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from onbeat.export import flow_graph
from onbeat.export.graphs import write_graphs
from onbeat.export.prefix_graph import PrefixLayout
from onbeat.export.proof import Draw, draw_inputs
from onbeat.runtime.bundle import Manifest
from onbeat.runtime.engine import Engine, FlowResult, Guidance, GuidanceError
from onbeat.runtime.modes import ModeError, choose_mode
from onbeat.runtime.onnx_engine import OnnxEngine
from onbeat.runtime.prompt import Prompt
from onbeat.training.model.sampler import Pull, choose_sampler, integrate, pull_limit
from onbeat.training.random_checkpoint import random_config, random_policy
from onbeat.training.torch_engine import TorchEngine, describe_policy

VOCABULARY = 40
SEED = 4
Floats = NDArray[np.float32]


def reference_flow(velocity, noise, prev, weights, beta, steps):
    """Euler steps with the published formula, element by element, in double precision."""
    x = noise.astype(np.float64)
    for step in range(steps):
        t = step / steps
        v = velocity(x, t)
        limit = np.inf if t == 0 else (t**2 + (1 - t) ** 2) / (t * (1 - t))
        for row in range(len(x)):
            v[row] += min(beta, limit) * weights[row] * (prev[row] - (x[row] + (1 - t) * v[row]))
        x = x + v / steps
    return x


def toy_velocity(x, t):
    """Anything smooth in both."""
    return np.sin(2 * x) + t - 0.3 * x


@pytest.mark.parametrize("beta", [0.5, 3.0, 5.0])
def test_the_sampler_follows_the_formula(beta: float) -> None:
    rng = np.random.default_rng(0)
    noise, prev = rng.standard_normal((2, 7, 5))
    weights = np.array([1.0, 1.0, 0.8, 0.3, 0.1, 0.0, 0.0])
    pull = Pull(torch.from_numpy(prev), torch.from_numpy(weights), beta)
    found = integrate(
        lambda x, step: torch.from_numpy(toy_velocity(x.numpy(), step / 5)), torch.from_numpy(noise)[None], 5, pull=pull
    )
    expected = reference_flow(toy_velocity, noise, prev, weights, beta, 5)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-12)
    assert np.abs(found[0].numpy()[:2] - prev[:2]).max() < np.abs(found[0].numpy()[5:] - prev[5:]).max()


def test_the_largest_beta_reaches_the_previous_chunk_and_not_beyond() -> None:
    """From a velocity that does not change, T steps at beta = T bring a row of weight 1 onto its old place."""
    prev, noise = torch.full((1, 2, 3), 2.0), torch.zeros((1, 2, 3))
    path = [
        integrate(lambda x, _: torch.ones_like(x), noise, steps, pull=Pull(prev[0], torch.ones(2), float(steps)))
        for steps in (1, 4, 10)
    ]
    for reached in path:
        torch.testing.assert_close(reached, prev)


def test_the_gain_is_unlimited_at_the_noise_and_smallest_half_way() -> None:
    assert pull_limit(0) == np.inf
    assert pull_limit(0.5) == 2
    assert pull_limit(0.25) == pytest.approx(10 / 3) == pull_limit(0.75)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[OnnxEngine, OnnxEngine, TorchEngine, Draw]:
    """The graphs, graphs as they were before guidance, the network, and a question. The gate is on."""
    config = random_config(SEED, VOCABULARY)
    sampler = choose_sampler(config)
    assert sampler.gate != "off"
    policy = random_policy(config, SEED).eval()
    images = config.vision.tokens_per_view
    prompt = Prompt(np.arange(images + 9, dtype=np.int64) % VOCABULARY, 2, 2 + images)
    spec = describe_policy(config, sampler, 1)
    folders = [tmp_path_factory.mktemp(name) for name in ("now", "before")]
    write_graphs(policy, PrefixLayout(1, prompt.image_start, prompt.state_index), sampler, folders[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow_graph, "_guide_inputs", lambda graph, chunk: None)  # noqa: ARG005
        patch.setattr(flow_graph, "pull", lambda writer, velocity, x, time: velocity)  # noqa: ARG005
        write_graphs(policy, PrefixLayout(1, prompt.image_start, prompt.state_index), sampler, folders[1])
    now, before = (
        open_graphs(*pair, prompt) for pair in zip(folders, (spec, replace(spec, guidance=False)), strict=True)
    )
    draw = draw_inputs(np.random.default_rng(0), spec, prompt, 1)
    return now, before, TorchEngine(policy, spec, lock_prefix=True), draw


def open_graphs(folder: Path, spec, prompt: Prompt) -> OnnxEngine:
    layout = {"image_start": prompt.image_start, "state_index": prompt.state_index}
    return OnnxEngine(folder / "prefix.onnx", folder / "flow.onnx", spec, **layout)


def answer(engine: Engine, draw: Draw, guidance: Guidance | None, delay: int = 0) -> FlowResult:
    cache = engine.prefix(draw.inputs)
    how = {"directions": draw.directions, "prev_chunk": draw.prev_chunk, "delay": delay, "guidance": guidance}
    return engine.flow(cache, draw.noise, **how)


def guide(engine: Engine, weight: float, beta: float) -> Guidance:
    return Guidance(np.full(engine.spec.chunk, weight, np.float32), beta)


class TestEngines:
    @pytest.mark.parametrize("delay", [0, 3])
    @pytest.mark.parametrize(("weight", "beta"), [(0.0, 2.0), (1.0, 0.0), (0.0, 0.0)])
    def test_no_weight_or_no_beta_is_no_guidance_bit_for_bit(self, engines, weight, beta, delay) -> None:
        now, before, network, draw = engines
        plain = answer(before, draw, None, delay).actions
        assert (answer(now, draw, None, delay).actions == plain).all()
        assert (answer(now, draw, guide(now, weight, beta), delay).actions == plain).all()
        unguided = answer(network, draw, None, delay).actions
        assert (answer(network, draw, guide(network, weight, beta), delay).actions == unguided).all()

    def test_both_engines_agree_and_rows_come_closer(self, engines) -> None:
        now, _, network, draw = engines
        weights = np.linspace(1, 0, now.spec.chunk, dtype=np.float32)
        guidance = Guidance(weights, float(now.spec.sampler.flow_steps))
        found, expected = answer(now, draw, guidance), answer(network, draw, guidance)
        np.testing.assert_allclose(found.actions, expected.actions, atol=1e-5 * max(1, np.abs(expected.actions).max()))
        plain = answer(now, draw, None).actions
        assert np.abs(found.actions[0] - draw.prev_chunk[0]).max() < 0.5 * np.abs(plain[0] - draw.prev_chunk[0]).max()
        assert (found.actions[-1] != plain[-1]).any(), "rows see each other, so even a row of weight 0 answers"

    def test_one_guided_answer_does_not_linger_in_the_next(self, engines) -> None:
        now, _, _, draw = engines
        plain = answer(now, draw, None).actions
        assert (answer(now, draw, guide(now, 1.0, 2.0)).actions != plain).any()
        assert (answer(now, draw, None).actions == plain).all()

    @pytest.mark.parametrize("which", [0, 2])
    def test_what_cannot_be_followed_is_refused(self, engines, which) -> None:
        engine, draw = engines[which], engines[3]
        steps = engine.spec.sampler.flow_steps
        for bad, text in (
            (guide(engine, 1.0, steps + 0.1), "overshoots"),
            (guide(engine, 1.0, -0.1), "overshoots"),
            (guide(engine, 1.1, 1.0), "0 to 1"),
            (guide(engine, np.nan, 1.0), "0 to 1"),
            (Guidance(np.ones(2, np.float32), 1.0), "one per row"),
        ):
            with pytest.raises(GuidanceError, match=text):
                answer(engine, draw, bad)
        with pytest.raises(GuidanceError, match="give prev_chunk"):
            engine.flow(
                engine.prefix(draw.inputs), draw.noise, directions=draw.directions, guidance=guide(engine, 1, 1)
            )


class TestOlderBundles:
    def test_a_manifest_without_the_field_is_read_and_cannot_be_guided(self, golden_bundles: Path) -> None:
        path = next(golden_bundles.glob("*/manifest.json"))
        document = json.loads(path.read_text())
        assert document["policy"].pop("guidance") is True
        assert Manifest.from_json(document).policy.guidance is False
        assert Manifest.from_json(json.loads(path.read_text())).policy.guidance is True

    def test_they_answer_and_refuse_to_be_guided_with_the_remedy(self, engines) -> None:
        _, before, network, draw = engines
        difference = answer(before, draw, None).actions - answer(network, draw, None).actions
        assert np.abs(difference).max() < 1e-4
        with pytest.raises(GuidanceError, match="export the checkpoint again"):
            answer(before, draw, guide(before, 1.0, 1.0))
        with pytest.raises(ModeError, match="export the checkpoint again, or use --mode async"):
            choose_mode(before.spec, "guided")


class TestModes:
    def test_the_checkpoint_decides(self, engines) -> None:
        spec = replace(engines[0].spec, trained_delay=0)
        assert choose_mode(replace(spec, trained_delay=4)) == "locked"
        assert choose_mode(spec) == "guided"
        assert choose_mode(replace(spec, guidance=False)) == "async"

    def test_an_untrained_prefix_is_an_explicit_choice(self, engines) -> None:
        spec = replace(engines[0].spec, trained_delay=0)
        with pytest.raises(ModeError, match=r"not trained to continue a prefix.*--allow-untrained-prefix"):
            choose_mode(spec, "locked")
        assert choose_mode(spec, "locked", allow_untrained_prefix=True) == "locked"

    @pytest.mark.parametrize("asked", ["sync", "async", "guided"])
    def test_what_is_asked_for_is_what_runs(self, engines, asked: str) -> None:
        assert choose_mode(replace(engines[0].spec, trained_delay=4), asked) == asked

    def test_a_wrong_name_is_answered_with_the_right_ones(self, engines) -> None:
        with pytest.raises(ModeError, match="unknown mode 'rtc': choose from sync, async, locked, guided"):
            choose_mode(engines[0].spec, "rtc")


def test_the_spec_of_a_policy_says_that_it_can_be_guided(engines) -> None:
    assert asdict(engines[0].spec)["guidance"] is True
