"""A Mixture of Flow in a bundle: what the flow reads, what the manifest says, and mistakes that the proof refuses."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onbeat.export import bundling, experts, flow_graph, graphs, prefix_graph, proof
from onbeat.export.bundling import Recipe, export_bundle
from onbeat.export.export import describe_export
from onbeat.export.prefix_graph import PrefixLayout
from onbeat.export.proof import draw_inputs
from onbeat.runtime.bundle import Bundle, load_bundle
from onbeat.runtime.engine import ExpertsSpec
from onbeat.runtime.language import PolicyLanguage
from onbeat.runtime.onnx_engine import OnnxEngine
from onbeat.runtime.prompt import Prompt
from onbeat.training.config import DelayConfig, ExpertsConfig, GateConfig, PolicyConfig, StreamConfig
from onbeat.training.random_checkpoint import random_config, random_policy, write_random_checkpoint
from onbeat.training.torch_engine import build_engine

COUNT, TOP_K = 5, 2
Function = Callable[..., Any]


def mixture_config(vocabulary: int, **changes: Any) -> PolicyConfig:
    """Three layers, the upper two with experts; gate, prefix lock and adapters on."""
    config = random_config(2, vocabulary)
    decoder = replace(
        config.decoder,
        gen=StreamConfig(16, 24),
        layers=3,
        experts=ExpertsConfig(**{"foundation_layers": 1, "count": COUNT, "top_k": TOP_K, **changes}),
    )
    gate = GateConfig(present=True, first_pass="projected", anchor_bucket=1000)
    vision = replace(config.vision, image_size=28, select_layer=-1)
    delay = DelayConfig(trained=True, simulated=6)
    config = replace(config, vision=vision, decoder=decoder, gate=gate, delay=delay, flow_steps=3)
    return replace(config, adapters=True, idle_slots="zero")


@pytest.fixture(scope="module")
def checkpoint(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    like = golden / "ckpt_a2/checkpoint"
    write_random_checkpoint(folder, 11, like, mixture_config(512))
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(recipe(checkpoint), tmp_path_factory.mktemp("bundle") / "out")


def recipe(checkpoint: Path) -> Recipe:
    language = PolicyLanguage.from_folder(checkpoint, embodiment="libero")
    return Recipe(checkpoint=checkpoint, name="mixture", language=language)


def test_the_manifest_says_so_and_is_read_again(bundle: Bundle) -> None:
    manifest = load_bundle(bundle.folder).manifest
    assert manifest.policy.experts == ExpertsSpec(layers=2, count=COUNT, top_k=TOP_K, routing="observation")
    assert describe_export(bundle, seconds=0.0)["experts"] == f"{TOP_K} of {COUNT}"
    assert manifest.policy.trained_delay == 5
    assert manifest.graphs["prefix"].outputs["experts_01"] == ["int64", [TOP_K]]
    assert manifest.graphs["flow"].inputs["expert_weights_02"] == ["float32", [TOP_K]]
    assert "experts_00" not in manifest.graphs["flow"].inputs
    assert manifest.proof.flow <= 1e-5


def test_the_flow_gathers_the_chosen_experts_once_for_all_its_steps(bundle: Bundle) -> None:
    graph = onnx.load(bundle.folder / "flow.onnx", load_external_data=False).graph
    stacked = {tensor.name: list(tensor.dims) for tensor in graph.initializer if "experts_mot_gen" in tensor.name}
    assert sorted(stacked.values()) == [[COUNT, 24, 16]] * 2 + [[COUNT, 48, 16]] * 2
    readers = [node for node in graph.node if set(node.input) & set(stacked)]
    assert [node.op_type for node in readers] == ["Gather"] * 4
    assert {node.input[1] for node in readers} == {"experts_01", "experts_02"}
    assert not any("layers.1.mlp_mot_gen" in tensor.name for tensor in graph.initializer), "the state's path"


def test_slots_of_other_robots_stay_at_zero_in_a_bundle(bundle: Bundle) -> None:
    engine, language = bundle.open_engine(), bundle.open_language()
    draw = draw_inputs(np.random.default_rng(0), engine.spec, language.prompt("lift the cube"), 0)
    noise = draw.noise.copy()
    actions = engine.flow(engine.prefix(draw.inputs), noise).actions
    used = np.zeros(200, np.bool_)
    for key in language.embodiment.action:
        used[key.start : key.stop] = True
    assert not actions[:, ~used].any()
    assert actions[:, used].all()
    noise[..., ~used] += 1
    assert np.array_equal(engine.flow(engine.prefix(draw.inputs), noise).actions, actions)


def shared_inputs() -> Prompt:
    ids = np.arange(20, dtype=np.int64)
    return Prompt(ids, 3, 12)


def write_engine(folder: Path, config: PolicyConfig, seed: int) -> OnnxEngine:
    engine = build_engine(random_policy(config, seed), views=2)
    prompt = shared_inputs()
    layout = PrefixLayout(2, prompt.image_start, prompt.state_index)
    graphs.write_graphs(engine.policy, layout, engine.spec.sampler, folder)
    return open_engine(folder, engine.spec)


def open_engine(folder: Path, spec: Any) -> OnnxEngine:
    prompt = shared_inputs()
    where = {"image_start": prompt.image_start, "state_index": prompt.state_index}
    return OnnxEngine(folder / "prefix.onnx", folder / "flow.onnx", spec, **where)


def poison(folder: Path, kept: dict[int, list[int]]) -> None:
    """Make every weight of the experts not in `kept` (by layer) a NaN, which any product would carry on."""
    weights = np.memmap(folder / "weights.bin", np.float32, "r+")
    for tensor in onnx.load(folder / "flow.onnx", load_external_data=False).graph.initializer:
        if "experts_mot_gen" in tensor.name:
            layer, size = int(tensor.name.split(".")[3]), math.prod(tensor.dims[1:])
            start = int({entry.key: entry.value for entry in tensor.external_data}["offset"]) // 4
            for index in set(range(COUNT)) - set(kept[layer]):
                weights[start + index * size : start + (index + 1) * size] = np.nan
    weights.flush()


@pytest.mark.parametrize("top_k", [pytest.param(1, marks=pytest.mark.slow), TOP_K])
def test_one_chunk_reads_the_weights_of_the_chosen_experts_alone(tmp_path: Path, top_k: int) -> None:
    """Weights that are not chosen may be anything, even no numbers: the chunk keeps every bit."""
    engine = write_engine(tmp_path, mixture_config(40, top_k=top_k), seed=3)
    draw = draw_inputs(np.random.default_rng(0), engine.spec, shared_inputs(), 0)
    cache = engine.prefix(draw.inputs)
    chosen = {layer: cache.arrays[f"experts_{layer:02d}"].tolist() for layer in (1, 2)}
    before = engine.flow(cache, draw.noise).actions
    assert [len(set(experts)) for experts in chosen.values()] == [top_k] * 2
    poison(tmp_path, chosen)
    poisoned = open_engine(tmp_path, engine.spec)
    after = poisoned.flow(poisoned.prefix(draw.inputs), draw.noise).actions
    assert np.array_equal(before, after)
    poison(tmp_path, {1: chosen[1][1:], 2: chosen[2]})
    broken = open_engine(tmp_path, engine.spec)
    assert not np.isfinite(broken.flow(broken.prefix(draw.inputs), draw.noise).actions).all(), "poison works"


@pytest.mark.slow
def test_adapters_cost_nothing_at_run_time(tmp_path: Path) -> None:
    adapted = mixture_config(40)
    nodes = []
    for name, config in (("with", adapted), ("without", replace(adapted, adapters=False))):
        (tmp_path / name).mkdir()
        write_engine(tmp_path / name, config, seed=4)
        models = [onnx.load(tmp_path / name / file, load_external_data=False) for file in ("prefix.onnx", "flow.onnx")]
        nodes.append([[node.op_type for node in model.graph.node] for model in models])
    assert nodes[0] == nodes[1]


# Mistakes in the graphs, each of which the exporter's own proof refuses.


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[[Function], Function]) -> None:
    patch.setattr(owner, name, change(getattr(owner, name)))


def weights_not_renormalised(patch: pytest.MonkeyPatch) -> None:
    def halved(take: Function) -> Function:
        def wrong(graph: Any, *rest: Any) -> experts.Mixture:
            mixture = take(graph, *rest)
            return replace(mixture, down=graph.op("Mul", mixture.down, graph.floats(0.9)))

        return wrong

    wrap(patch, experts, "_take_route", halved)


def router_reads_the_first_row(patch: pytest.MonkeyPatch) -> None:
    def first(publish: Function) -> Function:
        def wrong(graph: Any, decoder: Any, index: int, _: str) -> None:
            text = next(node.output[0] for node in graph._nodes if node.name.startswith("embed/Concat"))
            und = prefix_graph.understanding_stream(decoder)
            row = prefix_graph.cut(graph, text, 0, 1)
            publish(graph, decoder, index, prefix_graph.layers.input_norm(graph, LAYER.format(index), und, row))

        return wrong

    wrap(patch, experts, "publish_route", first)


def experts_swapped(patch: pytest.MonkeyPatch) -> None:
    def reversed_stack(stacked: Function) -> Function:
        def wrong(graph: Any, layer: str, count: int) -> tuple[str, str]:
            gate_up, down = stacked(graph, layer, count)
            order = graph.ints([1, 0, *range(2, COUNT)])
            return gate_up, graph.op("Gather", down, order, axis=0)

        return wrong

    wrap(patch, experts, "_stacked", reversed_stack)


def actions_take_the_shared_path(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, flow_graph.layers, "finish_layer", lambda finish: lambda *a: finish(*a[:5]))


def adapters_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(graphs, "fold_adapters", dict)


LAYER = "language_model.model.layers.{}"
MISTAKES = [
    weights_not_renormalised,
    router_reads_the_first_row,
    experts_swapped,
    actions_take_the_shared_path,
    adapters_forgotten,
]


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_exporter_refuses(
    mistake: Callable[[pytest.MonkeyPatch], None], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    with pytest.raises(proof.ProofFailed, match="differ"):
        bundling.export_bundle(recipe(checkpoint), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
