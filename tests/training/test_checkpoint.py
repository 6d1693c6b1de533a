"""Checkpoint folders: strict loading that names what is wrong, and writing back."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from onbeat.embodiment.errors import OnbeatError
from onbeat.training.checkpoint import CheckpointError, load_checkpoint, publish_name, save_checkpoint
from onbeat.training.model.policy import Policy
from onbeat.training.random_checkpoint import random_config, write_random_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
PLAIN, GATED = (GOLDEN / name / "checkpoint" for name in ("ckpt_a1", "ckpt_a2"))
EMBEDDING, LM_HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a recorded checkpoint that may be damaged."""
    return Path(shutil.copytree(GATED, tmp_path / "checkpoint"))


def weights(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("source", [PLAIN, GATED], ids=["plain", "gated"])
def test_writing_back_gives_the_same_tensors_under_the_same_names(tmp_path: Path, source: Path) -> None:
    save_checkpoint(load_checkpoint(source), tmp_path)
    written, original = weights(tmp_path), weights(source)
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], original[name]) for name in original)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("seed", range(6))
def test_random_checkpoints_survive_the_disk(tmp_path: Path, seed: int) -> None:
    written = write_random_checkpoint(tmp_path, seed, like=PLAIN)
    read = load_checkpoint(tmp_path)
    assert read.config == written.config
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), written.parameters(), strict=True))
    assert {"tokenizer.json", "vocab.json", "libero_posttrain_metadata.json"} <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize("seed", range(6))
def test_published_names_are_distinct(seed: int) -> None:
    ours = list(Policy(random_config(seed, vocabulary=30)).state_dict())
    assert len({publish_name(name) for name in ours}) == len(ours)


def test_loaded_weights_can_be_trained(folder: Path) -> None:
    assert all(parameter.requires_grad for parameter in load_checkpoint(folder).parameters())


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.1.self_attn.q_proj_mot_gen.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
        "vit_model.encoder.layers.0.ls1",
        "proprio_encoder_robot.layer1.bias",
        "mpg.obs_proj.weight",
        "vlm_to_action_proj.bias",
        "language_model.model.embed_tokens.weight",
    ],
)
def test_a_missing_tensor_is_named(folder: Path, name: str) -> None:
    rewrite(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"missing {name}"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["language_model.model.layers.3.mlp.up_proj.weight", "extra", "state_encoder.layer3.bias"]
)
def test_an_extra_tensor_is_named(folder: Path, name: str) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(2)}))
    named = name.replace("state_encoder", "proprio_encoder_robot")
    with pytest.raises(CheckpointError, match=f"extra {named}"):
        load_checkpoint(folder)


def test_our_own_names_are_not_taken_for_published_ones(folder: Path) -> None:
    ours, theirs = "language_model.norm.gen.weight", "language_model.model.norm_mot_gen.weight"
    rewrite(folder, lambda tensors: tensors.update({ours: tensors.pop(theirs)}))
    with pytest.raises(CheckpointError, match=f"missing {theirs}; extra {ours}"):
        load_checkpoint(folder)


@pytest.mark.parametrize("shape", [(32, 65), (64, 32), (32,), ()])
def test_a_misshapen_tensor_is_named_with_both_shapes(folder: Path, shape: tuple[int, ...]) -> None:
    rewrite(folder, lambda tensors: tensors.update({"action_encoder.W2.weight": torch.zeros(shape)}))
    with pytest.raises(CheckpointError, match=r"action_encoder\.W2\.weight has shape \(.*\), not \(32, 64\)"):
        load_checkpoint(folder)


def test_a_scalar_embedding_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({EMBEDDING: torch.zeros(())}))
    with pytest.raises(CheckpointError, match="embed_tokens"):
        load_checkpoint(folder)


def test_many_problems_are_counted_not_listed(folder: Path) -> None:
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors)[:30]])
    with pytest.raises(CheckpointError, match="and 22 more"):
        load_checkpoint(folder)


def test_a_gate_the_config_does_not_announce_is_extra(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PLAIN, tmp_path / "checkpoint"))
    shutil.copy(GATED / "model.safetensors", folder)
    with pytest.raises(CheckpointError, match=r"extra action_to_vlm_proj\.bias"):
        load_checkpoint(folder)


@pytest.mark.parametrize("kept", [0, 7, 100, 200_000, -1])
def test_a_truncated_file_is_named(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or truncated"):
        load_checkpoint(folder)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="is no folder"):
        load_checkpoint(folder / "config.json")
    with pytest.raises(OnbeatError, match=r"holds no config\.json"):
        load_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        load_checkpoint(folder)


def test_the_older_name_of_the_state_encoder_is_read(folder: Path) -> None:
    def use_older_name(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("proprio_encoder_robot.")]:
            tensors[name.replace("proprio_encoder_robot", "state_encoder")] = tensors.pop(name)

    before = load_checkpoint(folder).state_dict()
    rewrite(folder, use_older_name)
    after = load_checkpoint(folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_shards_are_merged_and_a_tensor_in_two_of_them_is_refused(folder: Path) -> None:
    tensors = weights(folder)
    names, before = sorted(tensors), load_checkpoint(folder).state_dict()
    (folder / "model.safetensors").unlink()
    for index, part in enumerate((names[:50], names[50:])):
        save_file({name: tensors[name] for name in part}, folder / f"model-{index + 1:05}-of-00002.safetensors")
    after = load_checkpoint(folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    save_file({names[0]: tensors[names[0]]}, folder / "stray.safetensors")
    with pytest.raises(CheckpointError, match=f"a second '{names[0]}'"):
        load_checkpoint(folder)


def test_half_precision_files_become_float32(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: value.bfloat16() for name, value in tensors.items()}))
    assert {parameter.dtype for parameter in load_checkpoint(folder).parameters()} == {torch.float32}


def test_rows_of_the_embedding_come_from_the_file(folder: Path) -> None:
    def add_rows(tensors: Tensors) -> None:
        for name in (EMBEDDING, LM_HEAD):
            tensors[name] = torch.cat([tensors[name], torch.ones(5, 64)])

    rewrite(folder, add_rows)
    policy = load_checkpoint(folder)
    assert policy.config.decoder.vocabulary == 517
    assert policy.language_model.embed_tokens.weight.shape == (517, 64)


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    config = random_config(0, vocabulary=512)
    config = replace(config, decoder=replace(config.decoder, tied=True))
    write_random_checkpoint(tmp_path / "tied", 0, like=PLAIN, config=config)
    return tmp_path / "tied"


def test_a_tied_head_is_written_may_be_absent_and_must_be_the_embedding(tied: Path) -> None:
    tensors = weights(tied)
    assert torch.equal(tensors[LM_HEAD], tensors[EMBEDDING])
    assert load_checkpoint(tied).language_model.lm_head is None
    rewrite(tied, lambda tensors: tensors.pop(LM_HEAD))
    assert load_checkpoint(tied).language_model.lm_head is None
    rewrite(tied, lambda tensors: tensors.update({LM_HEAD: tensors[EMBEDDING] + 1}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        load_checkpoint(tied)


def test_rope_is_chosen_at_loading(folder: Path) -> None:
    bf16, fp32 = (load_checkpoint(folder, rope=rope).language_model.rotary for rope in ("bf16", "fp32"))
    assert not torch.equal(bf16.inverse_frequency, fp32.inverse_frequency)
