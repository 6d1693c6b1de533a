"""Checkpoint folders in the published format: read strictly, written back so that a strict reader takes them."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from onbeat.embodiment.errors import OnbeatError
from onbeat.training.config import PolicyConfig
from onbeat.training.config_file import CONFIG_FILE, load_config, save_config
from onbeat.training.model.policy import Policy

WEIGHTS_FILE = "model.safetensors"
EMBEDDING = "language_model.model.embed_tokens.weight"
LM_HEAD = "language_model.lm_head.weight"
OLDER_STATE_ENCODER = "state_encoder."
STATE_ENCODER = "proprio_encoder_robot."
LISTED = 8  # names an error spells out before it counts the rest

# Our tensor names -> published ones, the first match only. `_mot_gen` marks the action stream's weights.
TO_PUBLISHED = tuple(
    (re.compile(pattern), published)
    for pattern, published in (
        (r"language_model\.layers\.(\d+)\.und\.", r"language_model.model.layers.\1."),
        (
            r"language_model\.layers\.(\d+)\.gen\.(mlp|experts|router|input_layernorm|post_attention_layernorm|self_attn\.\w+)\.",
            r"language_model.model.layers.\1.\2_mot_gen.",
        ),
        (r"language_model\.norm\.und\.", r"language_model.model.norm."),
        (r"language_model\.norm\.gen\.", r"language_model.model.norm_mot_gen."),
        (r"language_model\.embed_tokens\.", r"language_model.model.embed_tokens."),
        (r"state_encoder\.", STATE_ENCODER),
        (r"mpg\.(action_to_vlm_proj|vlm_to_action_proj)\.", r"\1."),
    )
)


class CheckpointError(OnbeatError):
    """The folder is no checkpoint, a file in it is damaged, or its tensors are not those of its config.json."""


def load_checkpoint(folder: Path | str, *, rope: str | None = None) -> Policy:
    """Build the policy of a checkpoint folder, float32. rope: "bf16" or "fp32", overrides config.json.

    Raises CheckpointError or ConfigError, naming the file, tensor or key that is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: give the folder of a checkpoint")
    config, tensors = load_config(folder, rope=rope), read_tensors(folder)
    if config.decoder.tied:
        _drop_tied_head(tensors)
    return build_policy(_fit_vocabulary(config, tensors), tensors)


def build_policy(config: PolicyConfig, tensors: Mapping[str, Tensor]) -> Policy:
    """A policy that owns `tensors` (published names). Raises CheckpointError on a missing, extra or misshapen one."""
    with torch.device("meta"):
        policy = Policy(config)
    state = policy.state_dict()
    published = {publish_name(name): name for name in state}
    expected = {theirs: state[ours] for theirs, ours in published.items()}
    problems = list(_differences(_shapes(expected), _shapes(tensors)))
    if problems:
        raise CheckpointError(
            f"the tensors are not those of config.json: {_enumerate(problems)}: "
            "download the checkpoint again, or correct its config.json"
        )
    policy.load_state_dict({published[name]: value.float() for name, value in tensors.items()}, assign=True)
    return policy


def save_checkpoint(policy: Policy, folder: Path | str) -> None:
    """Write config.json and model.safetensors, each whole or not at all. Tokenizer and metadata are the caller's."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {publish_name(name): value.detach().contiguous() for name, value in policy.state_dict().items()}
    if policy.config.decoder.tied:
        tensors[LM_HEAD] = tensors[EMBEDDING].clone()
    partial = folder / f".{WEIGHTS_FILE}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / WEIGHTS_FILE)
    save_config(policy.config, folder)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of all *.safetensors of a folder, by published name. Nothing else is ever read as weights."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no *.safetensors: give the folder of a checkpoint (no pickle is loaded)")
    tensors: dict[str, Tensor] = {}
    for path in files:
        for name, tensor in _read_file(path).items():
            if name in tensors:
                raise CheckpointError(
                    f"{path}: a second '{name}': remove the file that does not belong to the checkpoint"
                )
            tensors[name] = tensor
    return tensors


def companions(folder: Path) -> list[Path]:
    """What a checkpoint has besides its network: tokenizer and statistics, in the folder or in experiment_cfg."""
    found = [path for sub in (folder, folder / "experiment_cfg") for path in sorted(sub.glob("*"))]
    return [path for path in found if path.suffix in (".json", ".txt") and path.name != CONFIG_FILE]


def publish_name(name: str) -> str:
    """Our tensor name to the published one; most are the same."""
    for pattern, published in TO_PUBLISHED:
        if pattern.match(name):
            return pattern.sub(published, name, count=1)
    return name


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {_newer_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as problem:
        raise CheckpointError(f"{path} is damaged or truncated ({problem}): download it again") from None


def _newer_name(name: str) -> str:
    if name.startswith(OLDER_STATE_ENCODER):
        return STATE_ENCODER + name.removeprefix(OLDER_STATE_ENCODER)
    return name


def _fit_vocabulary(config: PolicyConfig, tensors: Mapping[str, Tensor]) -> PolicyConfig:
    """The embedding's row count comes from the file: tokens may have been added after config.json was written."""
    if EMBEDDING not in tensors or tensors[EMBEDDING].ndim == 0:
        return config
    return replace(config, decoder=replace(config.decoder, vocabulary=tensors[EMBEDDING].shape[0]))


def _drop_tied_head(tensors: dict[str, Tensor]) -> None:
    head, embedding = tensors.pop(LM_HEAD, None), tensors.get(EMBEDDING)
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise CheckpointError(
            f"config.json ties the embeddings but {LM_HEAD} differs from {EMBEDDING}: "
            "set llm_config.tie_word_embeddings to false"
        )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    yield from (f"missing {name}" for name in sorted(expected.keys() - found.keys()))
    yield from (f"extra {name}" for name in sorted(found.keys() - expected.keys()))
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            yield f"{name} has shape {found[name]}, not {expected[name]}"


def _enumerate(problems: list[str]) -> str:
    rest = len(problems) - LISTED
    return "; ".join(problems[:LISTED]) + (f"; and {rest} more" if rest > 0 else "")
