"""From a checkpoint to a bundle: load, write the graphs, prove them, seal."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

import onbeat
from onbeat.embodiment.errors import OnbeatError
from onbeat.export.digest import digest_checkpoint
from onbeat.export.graphs import FLOW_FILE, PREFIX_FILE, write_graphs
from onbeat.export.prefix_graph import PrefixLayout
from onbeat.export.proof import TOLERANCE, prove
from onbeat.export.staging import staged_folder
from onbeat.runtime.bundle import (
    Bundle,
    CheckpointSource,
    GraphRecord,
    Manifest,
    Proof,
    hash_file,
    write_manifest,
)
from onbeat.runtime.language import PolicyLanguage
from onbeat.runtime.onnx_engine import OnnxEngine
from onbeat.runtime.prompt import Prompt
from onbeat.training.checkpoint import load_checkpoint
from onbeat.training.config import PolicyConfig
from onbeat.training.model.policy import Policy
from onbeat.training.start import slots_of
from onbeat.training.torch_engine import TorchEngine, build_engine

GATES = ("expectation", "directions", "off")
SAMPLE_INSTRUCTION = "pick up the cube"  # any: the graphs take every length


class WrongTokenizer(OnbeatError):
    """A tokenizer that does not belong to the checkpoint."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to export. name: of the checkpoint, recorded. rope: None for the checkpoint's own choice.

    overrides: of the sampler settings in config.json. gate: one of GATES.
    """

    checkpoint: Path
    name: str
    language: PolicyLanguage
    rope: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    gate: str = "expectation"
    tolerance: float = TOLERANCE


def export_bundle(recipe: Recipe, target: Path, *, replace: bool = False) -> Bundle:
    """Write the bundle `target`, whole or not at all. Raises OutputExists, CheckpointError, ProofFailed, ..."""
    with staged_folder(target, replace=replace) as folder:
        manifest = _fill(recipe, folder)
        write_manifest(manifest, folder)
    return Bundle(target, manifest)


def _fill(recipe: Recipe, folder: Path) -> Manifest:
    network = _open_network(recipe)
    prompt = recipe.language.prompt(SAMPLE_INSTRUCTION)
    check_vocabulary(recipe.language, network.policy.config)
    recipe.language.save(folder)
    layout = PrefixLayout(network.spec.views, prompt.image_start, prompt.state_index)
    write_graphs(
        network.policy, layout, network.spec.sampler, folder, slots_of(recipe.language.embodiment.action).numpy()
    )
    return Manifest(
        embodiment=recipe.language.settings.embodiment,
        checkpoint=CheckpointSource(recipe.name, digest_checkpoint(recipe.checkpoint)),
        rope=network.policy.config.decoder.rope,
        policy=network.spec,
        image_start=prompt.image_start,
        state_index=prompt.state_index,
        graphs={"prefix": describe_graph(folder / PREFIX_FILE), "flow": describe_graph(folder / FLOW_FILE)},
        proof=_prove(folder, network, prompt, recipe.tolerance),
        made_with=_versions(),
        files={path.name: hash_file(path) for path in sorted(folder.iterdir())},
    )


def check_vocabulary(language: PolicyLanguage, config: PolicyConfig) -> None:
    """Raise WrongTokenizer when the tokenizer can give a token that the embedding has no row for."""
    largest, rows = max(language.tokenizer.get_vocab().values()), config.decoder.vocabulary
    if largest >= rows:
        raise WrongTokenizer(
            f"the tokenizer has token {largest}, the checkpoint's embedding only {rows} rows: use the checkpoint's own"
        )


def _open_network(recipe: Recipe) -> TorchEngine:
    """The network with the recipe's sampler, keeping prefixes whatever it was trained for: the graphs can."""
    policy: Policy = load_checkpoint(recipe.checkpoint, rope=recipe.rope)
    overrides = {**recipe.overrides, **({"use_mpg": False} if recipe.gate == "off" else {})}
    views = len(recipe.language.settings.views)
    directions, slots = recipe.gate == "directions", slots_of(recipe.language.embodiment.action).numpy()
    engine = build_engine(policy, views=views, overrides=overrides, directions=directions, slots=slots)
    return replace(engine, lock_prefix=True)


def _prove(folder: Path, network: TorchEngine, prompt: Prompt, tolerance: float) -> Proof:
    exported = OnnxEngine(
        folder / PREFIX_FILE,
        folder / FLOW_FILE,
        network.spec,
        image_start=prompt.image_start,
        state_index=prompt.state_index,
    )
    return prove(exported, network, prompt, tolerance=tolerance)


def describe_graph(path: Path) -> GraphRecord:
    """What the manifest says of an ONNX file."""
    model = onnx.load(path, load_external_data=False)
    inputs, outputs = ({v.name: _describe_value(v) for v in side} for side in (model.graph.input, model.graph.output))
    return GraphRecord(path.name, model.opset_import[0].version, model.ir_version, inputs, outputs)


def _describe_value(value: onnx.ValueInfoProto) -> list[Any]:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return [str(dtype), [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]]


def _versions() -> dict[str, str]:
    return {
        "onbeat": onbeat.__version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
