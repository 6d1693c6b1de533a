"""What a step takes, reckoned: against what processes really take, and the released network's known figures."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from onbeat.training.config import DecoderConfig, ExpertsConfig, PolicyConfig, StreamConfig, VisionConfig
from onbeat.training.config_file import load_config
from onbeat.training.memory import (
    Allocations,
    Load,
    counted_peaks,
    estimate,
    main,
    passing_peak,
    take_steps,
)
from onbeat.training.model.policy import Policy, count_parameters

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
RELEASED = CONFIGS / "being_h05_2b"
ALLOCATOR_MIB = 150  # what kernels and the allocator take on top
SMALL = PolicyConfig(
    VisionConfig(32, 64, 1, 2, 28), DecoderConfig(StreamConfig(32, 64), StreamConfig(24, 48), 2, 2, 1, 16, 50), chunk=8
)
LOAD = Load(batch=4, draws=2)


def test_the_released_network_has_its_published_size() -> None:
    with torch.device("meta"):
        policy = Policy(load_config(RELEASED))
    counts = count_parameters(policy)
    published = {"und": 1.409e9, "gen": 0.440e9, "vision": 0.30e9, "embedding": 0.311e9, "lm_head": 0.311e9}
    assert {part: counts[part] for part in published} == pytest.approx(published, rel=0.015)
    assert counts["und"] == pytest.approx(1.409e9, rel=5e-4)
    assert counts["at work"] == pytest.approx(2.15e9, rel=0.02), "what control needs"
    tokens = 28 * 2 * 8 * 128 * 2
    decoder = policy.config.decoder
    assert tokens == 112 * 1024 == decoder.layers * 2 * decoder.kv_heads * decoder.head_dim * 2
    assert all(parameter.is_meta for parameter in policy.parameters())


def test_counting_follows_what_lives() -> None:
    older = torch.zeros(1000)
    with Allocations() as allocations:
        kept = older + 1
        assert allocations.live == 4000
        kept.view(10, 100).add_(1)
        older.mul_(2)
        assert allocations.live == 4000, "no view and no older tensor counts"
        gone = kept * 2
        del gone
        assert (allocations.live, allocations.peak) == (4000, 8000)


def test_backward_of_a_linear_layer_is_counted() -> None:
    layer, x = nn.Linear(100, 50, bias=False), torch.zeros(10, 100)
    with Allocations() as allocations:
        layer(x).square().sum().backward()
    assert allocations.live == 50 * 100 * 4, "the gradient"
    assert allocations.peak >= 50 * 100 * 4 + 10 * 50 * 4, "with the product's gradient"


# Activations are the most, then the embedding's gradient, then the weights in bfloat16 that autocast keeps on its way.
DEPTHS = [(50, LOAD), (50_000, LOAD), (50, Load(1, 1, views=1, words=22, recompute=True, half=True))]


@pytest.mark.slow
@pytest.mark.parametrize(("vocabulary", "load"), DEPTHS, ids=["activations", "embedding", "weights"])
def test_few_layers_tell_of_many(vocabulary: int, load: Load) -> None:
    decoder = replace(SMALL.decoder, layers=5, vocabulary=vocabulary)
    deep = replace(SMALL, vision=replace(SMALL.vision, layers=4), decoder=decoder)
    if load.half:
        wide = StreamConfig(128, 512)
        deep = replace(deep, decoder=replace(decoder, und=wide, gen=wide))
    assert passing_peak(deep, load) == pytest.approx(max(counted_peaks(deep, load)), rel=0.05)


@pytest.mark.slow
def test_what_grows_grows() -> None:
    alone = passing_peak(SMALL, LOAD)
    assert passing_peak(SMALL, replace(LOAD, batch=8)) == pytest.approx(2 * alone, rel=0.1)
    assert passing_peak(SMALL, replace(LOAD, recompute=True)) < 0.8 * alone
    routed = replace(SMALL, decoder=replace(SMALL.decoder, experts=ExpertsConfig(1, 4, 2)))
    assert passing_peak(routed, LOAD) > alone


def test_what_is_cut_is_divided() -> None:
    one, four = (estimate(SMALL, passing=10**6, gpus=gpus) for gpus in (1, 4))
    weights = 4 * sum(parameter.numel() for parameter in Policy(SMALL).parameters())
    assert (one.weights, one.moments, one.average, one.gathered) == (weights, 2 * weights, weights, 0)
    assert four.weights == four.gradients == four.average == weights / 4
    assert four.gathered > 4 * sum(p.numel() for p in Policy(SMALL).language_model.stack[0].parameters())
    assert four.activations == one.activations
    assert four.total == sum((four.weights, four.moments, four.average, four.gradients, four.gathered, 10**6))


@pytest.mark.slow
def test_it_is_what_a_process_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "network.toml"
    recipe.write_text(
        'embodiment = "so101"\ndataset = "d"\nseed = 1\n[network]\nvision_width = 192\nvision_layers = 2\n'
        "und_width = 192\ngen_width = 192\nund_ffn = 768\ngen_ffn = 768\nlayers = 3\n"
    )
    assert main([str(recipe), "--batch", "16", "--gpus", "1", "--measure"]) == 0
    lines = capsys.readouterr().out.splitlines()
    reckoned = [float(line.split()[-1].replace(",", "")) for line in lines if line.split()[:1] == ["1"]]
    measured = [float(line.split()[-2].replace(",", "")) for line in lines if line.startswith("really")]
    assert len(reckoned) == len(measured) == 2
    for taken, told in zip(measured, reckoned, strict=True):
        assert 0.9 * told < taken < 1.1 * told + ALLOCATOR_MIB


@pytest.mark.slow
def test_the_released_network_takes_a_step_at_reduced_depth() -> None:
    config = load_config(RELEASED)
    torch.set_num_threads(2)
    shallow = replace(
        config,
        vision=replace(config.vision, layers=1),
        decoder=replace(config.decoder, layers=1, vocabulary=500),
    )
    policy, loss = take_steps(shallow, Load(batch=1, draws=1, views=1, words=16), steps=1)
    assert 0 < loss < float("inf")
    without = {name for name, p in policy.named_parameters() if p.grad is None}
    past = ("q_proj", "q_norm", "o_proj", "mlp", "post_attention_layernorm")
    never = ("language_model.norm.und", "language_model.lm_head", "mpg.")
    idle = {name for name in without if not name.startswith(never)}
    assert all(name.startswith("language_model.layers.0.und.") and any(p in name for p in past) for name in idle)
    assert all(bool(p.grad.isfinite().all()) for p in policy.parameters() if p.grad is not None)
    assert sum(p.numel() for p in policy.parameters()) > 100e6
