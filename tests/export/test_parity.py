"""Random networks of every shape: the exported graphs answer what the PyTorch network answers, to 1e-5."""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from onbeat.export.graphs import write_graphs
from onbeat.export.prefix_graph import PrefixLayout
from onbeat.export.proof import Draw, compare, draw_inputs
from onbeat.runtime.engine import SamplerSpec
from onbeat.runtime.onnx_engine import OnnxEngine
from onbeat.runtime.prompt import Prompt
from onbeat.training.config import PolicyConfig
from onbeat.training.model.sampler import choose_sampler
from onbeat.training.random_checkpoint import random_config, random_policy
from onbeat.training.torch_engine import TorchEngine, describe_policy

TOLERANCE = 1e-5
VOCABULARY = 40
SEEDS = range(20)


@dataclass(frozen=True, slots=True)
class Shape:
    """What one seed draws besides the weights."""

    config: PolicyConfig
    sampler: SamplerSpec
    views: int
    slots: NDArray[np.bool_]


def draw_shape(seed: int) -> Shape:
    config = random_config(seed, VOCABULARY)
    drawn = random.Random(seed + 1000)
    sampler = choose_sampler(config, directions=drawn.random() < 0.5)
    return Shape(config, sampler, drawn.randint(1, 3), np.random.default_rng(seed).random(200) < 0.3)


def draw_prompt(shape: Shape, seed: int) -> Prompt:
    """A prefix of random ids with the images and the state somewhere inside."""
    generator = np.random.default_rng(seed)
    before, between, after = generator.integers(1, 12, 3)
    images = shape.views * shape.config.vision.tokens_per_view
    ids = generator.integers(0, VOCABULARY, before + images + between + 1 + after)
    return Prompt(ids.astype(np.int64), int(before), int(before + images + between))


def open_both(shape: Shape, prompt: Prompt, seed: int, folder: Path) -> tuple[OnnxEngine, TorchEngine]:
    policy = random_policy(shape.config, seed).eval()
    spec = describe_policy(shape.config, shape.sampler, shape.views)
    layout = PrefixLayout(shape.views, prompt.image_start, prompt.state_index)
    write_graphs(policy, layout, shape.sampler, folder, shape.slots)
    exported = OnnxEngine(
        folder / "prefix.onnx",
        folder / "flow.onnx",
        spec,
        image_start=prompt.image_start,
        state_index=prompt.state_index,
    )
    return exported, TorchEngine(policy, spec, lock_prefix=True, slots=torch.from_numpy(shape.slots))


def longer(draw: Draw) -> Draw:
    """The same with a longer instruction: the graphs take every length."""
    ids = np.append(draw.inputs.token_ids, draw.inputs.token_ids[-2:])
    return replace(draw, inputs=replace(draw.inputs, token_ids=ids))


@pytest.mark.parametrize("seed", [pytest.param(s, marks=[pytest.mark.slow] if s >= 2 else []) for s in SEEDS])
def test_graphs_answer_what_the_network_answers(seed: int, tmp_path: Path) -> None:
    shape = draw_shape(seed)
    prompt = draw_prompt(shape, seed)
    exported, network = open_both(shape, prompt, seed, tmp_path)
    generator = np.random.default_rng(seed)
    free, locked, guided = (draw_inputs(generator, exported.spec, prompt, index) for index in range(3))
    assert guided.guidance is not None
    short = replace(locked, prev_chunk=locked.prev_chunk[:2], delay=5)
    long = replace(locked, prev_chunk=np.resize(locked.prev_chunk, (shape.config.chunk + 3, 200)), delay=3)
    for draw in (free, short, long, longer(free), guided, replace(guided, delay=0)):
        prefix, flow = compare(exported, network, draw)
        assert prefix <= TOLERANCE, shape
        assert flow <= TOLERANCE, shape


def test_seeds_cover_every_shape() -> None:
    shapes = [draw_shape(seed) for seed in SEEDS]
    decoders = [shape.config.decoder for shape in shapes]
    assert {shape.views for shape in shapes} == {1, 2, 3}
    assert {shape.sampler.gate for shape in shapes} == {"off", "directions", "expectation"}
    assert {4, 10} <= {shape.sampler.flow_steps for shape in shapes}
    assert {shape.config.chunk for shape in shapes} == {12, 13, 14, 15, 16}
    assert {shape.config.vision.select_layer for shape in shapes} >= {-1, -2}
    assert {shape.config.gate.first_pass for shape in shapes if shape.sampler.gate != "off"} == {
        "published",
        "projected",
    }
    assert {decoder.tied for decoder in decoders} == {decoder.rope == "bf16" for decoder in decoders} == {True, False}
    assert {decoder.und.width == decoder.gen.width for decoder in decoders} == {True, False}
    assert any(decoder.heads * decoder.head_dim != decoder.und.width for decoder in decoders)
    assert {decoder.heads // decoder.kv_heads for decoder in decoders} == {1, 2, 4}
    experts = [decoder.experts for decoder in decoders if decoder.experts is not None]
    assert len(experts) < len(decoders)
    assert {mixture.routing for mixture in experts} == {"observation", "token"}
    assert {mixture.top_k for mixture in experts} == {1, 2, 3}
    assert any(mixture.top_k < mixture.count and mixture.top_k > 1 for mixture in experts)
    assert {(shape.config.adapters, shape.config.idle_slots) for shape in shapes} == {
        (True, "noise"),
        (True, "zero"),
        (False, "noise"),
        (False, "zero"),
    }


def test_comparison_sees_a_small_change(tmp_path: Path) -> None:
    shape = draw_shape(0)
    prompt = draw_prompt(shape, 0)
    exported, network = open_both(shape, prompt, 0, tmp_path)
    draw = draw_inputs(np.random.default_rng(0), exported.spec, prompt, 0)
    network.policy.language_model.layers[0].gen.mlp.down_proj.weight.data[0, 0] += 1e-2  # pyright: ignore
    assert compare(exported, network, draw)[1] > TOLERANCE
