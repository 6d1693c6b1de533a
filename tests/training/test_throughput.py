"""Operations by formula and as PyTorch counts them, and what is told of a run's speed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from onbeat.cli import main as onbeat
from onbeat.training.config import DecoderConfig, ExpertsConfig, PolicyConfig, StreamConfig, VisionConfig
from onbeat.training.flops import count_flops
from onbeat.training.model.policy import Policy, Prefix
from onbeat.training.random_checkpoint import random_policy
from onbeat.training.throughput import CPU_ATTENTION, PYTHON, WAITING, Products, count_step, kind_of, product_s

DECODER = DecoderConfig(StreamConfig(24, 32), StreamConfig(16, 40), 3, 4, 2, 8, 40)
CONFIG = PolicyConfig(VisionConfig(16, 32, 2, 2, 56, select_layer=-2), DECODER, chunk=5)
ROUTED = ExpertsConfig(1, 4, 2, "observation")
VIEWS, DRAWS, WORDS = 2, 3, 7
RECIPE = """
embodiment = "so101"
dataset = "tiny"
seed = 1
[network]
image_size = 28
layers = 1
vision_layers = 1
[fitting]
batch = 8
draws = 1
threads = 1
"""


def counted(policy: Policy) -> tuple[int, int]:
    """Of one observation's forward pass, and of its prefix alone, as PyTorch counts."""
    vision, chunk = policy.config.vision, policy.config.chunk
    index = 2 + VIEWS * vision.tokens_per_view
    pixels = torch.zeros(1, VIEWS, 3, vision.image_size, vision.image_size)
    prefix = Prefix(pixels, torch.zeros(1, index + WORDS, dtype=torch.long), 2, index, torch.zeros(1, 200))
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        cache = policy.encode_prefix(*prefix)
        first = counter.get_total_flops()
        policy.velocity(cache, torch.zeros(1, DRAWS, chunk, 200), torch.zeros(1, DRAWS, chunk, dtype=torch.long))
    return counter.get_total_flops(), first


@pytest.mark.parametrize("experts", [None, ROUTED, replace(ROUTED, routing="token", top_k=1)])
def test_the_formula_is_what_is_counted(experts: ExpertsConfig | None) -> None:
    config = replace(CONFIG, decoder=replace(DECODER, experts=experts))
    tokens = 2 + VIEWS * config.vision.tokens_per_view + WORDS
    flops = count_flops(config, views=VIEWS, tokens=tokens, draws=DRAWS)
    total, prefix = counted(random_policy(config, seed=1))
    assert flops.total == total
    by_observation = experts is not None and experts.routing == "observation"
    router = 2 * config.decoder.und.width * experts.count * 2 if experts else 0
    assert flops.views + flops.prefix == prefix - router, "the router reads the prefix"
    assert by_observation or experts is None or flops.flow > 0


def test_products_are_noted_by_size() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(10, 6)
    with Products() as products:
        layer(x)
        torch.bmm(torch.randn(3, 2, 5), torch.randn(3, 5, 7))
    assert dict(products.shapes) == {(10, 6, 4): 1, (2, 5, 7): 3}
    flops, shapes = count_step(lambda: layer(x).sum().backward())
    assert flops == 2 * 2 * 10 * 6 * 4
    assert sum(shapes.values()) == 2


class Event:
    """As much of a profiler's event as `kind_of` reads."""

    def __init__(self, name: str, cpu_parent: "Event | None" = None) -> None:
        self.name, self.cpu_parent = name, cpu_parent


def test_an_operation_is_of_the_kind_of_what_it_is_part_of() -> None:
    step = Event("Optimizer.step#AdamW.step")
    assert kind_of(Event("aten::mul", Event("aten::rms_norm"))) == "norms"
    assert kind_of(Event("aten::mm", Event("aten::linear"))) == "matrix products"
    assert kind_of(Event("aten::copy_", Event("aten::_fused_adamw_", step))) == "optimiser"
    assert kind_of(Event("aten::add", Event("aten::add_"))) == "other operations"


@pytest.mark.slow
def test_a_run_is_told_of(demonstrations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = tmp_path / "tiny.toml", tmp_path / "out"
    recipe.write_text(RECIPE)
    command = ["train", str(recipe), "--data", str(demonstrations), "--out", str(out), "--profile", "--json"]
    assert onbeat(command) == 0
    figures, lines = capsys.readouterr()
    told = json.loads(figures)
    shares = told["shares_of_time"]
    assert sum(shares.values()) == pytest.approx(1, abs=0.05)
    assert shares["matrix products"] > 0
    assert shares["optimiser"] > 0
    assert 0 < shares[WAITING] < 1
    assert shares[PYTHON] >= 0
    assert 0 < told["peak_share"] < 1
    assert told["samples_per_s"] > 0
    assert "samples/s" in lines
    assert "of what a product of" in lines
    assert not out.exists()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_product_is_timed_in_the_type_it_has_in_the_run(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: seen.append(a.dtype) or product(a, b, out=out))
    assert product_s((8, 4, 2), torch.empty(0, dtype=kind)) > 0
    assert set(seen) == {kind}
