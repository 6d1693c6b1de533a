"""What a run starts from: a checkpoint with additions answers as it did, and its own sizes and words are kept."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from onbeat.training.checkpoint import load_checkpoint
from onbeat.training.config import ExpertsConfig, RobotDelay
from onbeat.training.fit import Fit
from onbeat.training.freezing import Frozen
from onbeat.training.model.policy import Policy
from onbeat.training.prepare import prepare, start_fit
from onbeat.training.recipe import Adapters, Gate, Network, Recipe, RecipeError
from onbeat.training.start import continued_policy, open_gate


@pytest.fixture
def first(tiny_recipe: Recipe, demonstrations: Path, tmp_path: Path) -> Path:
    """A checkpoint that was trained for two steps."""
    torch.set_num_threads(1)
    recipe = replace(tiny_recipe, network=replace(tiny_recipe.network, und_width=24))
    fit = start_fit(recipe, prepare(recipe, demonstrations, tmp_path / "first"))
    fit.advance()
    fit.advance()
    fit.save(tmp_path / "first")
    return tmp_path / "first"


def continued(recipe: Recipe, first: Path, **network: object) -> Recipe:
    return replace(recipe, dataset="second", start_from=str(first), network=replace(Network(), **network))


def velocity(policy: Policy, *, gated: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels, state = torch.randn(2, 2, 3, 28, 28, generator=generator), torch.randn(2, 200, generator=generator)
    cache = policy.encode_prefix(pixels, torch.arange(1, 13).expand(2, -1), 3, 8, state)
    actions = torch.randn(2, 1, 4, 200, generator=generator)
    refine = policy.mpg.project if gated and policy.mpg is not None else None
    return policy.velocity(cache, actions, torch.full((2, 1, 4), 300), refine)


@torch.no_grad()
def test_experts_adapters_and_a_gate_are_added_without_a_change(tiny_recipe: Recipe, first: Path) -> None:
    recipe = continued(tiny_recipe, first, experts=ExpertsConfig(1, 3, 2), adapters=Adapters(), gate=Gate())
    policy, before = continued_policy(recipe), load_checkpoint(first)
    assert policy.config.decoder.experts == ExpertsConfig(1, 3, 2)
    assert policy.config.adapters
    assert policy.config.gate.present
    assert policy.config.delay == before.config.delay
    assert (velocity(policy, gated=True) - velocity(before)).abs().max() < 1e-5


@torch.no_grad()
def test_a_fresh_gate_lets_pass_what_it_gets_whatever_the_anchor(first: Path) -> None:
    config = load_checkpoint(first).config
    gate, features = open_gate(config, seed=1), torch.randn(2, 4, 24)
    assert torch.allclose(gate.project(features), features, atol=1e-5)
    assert torch.allclose(
        gate(features, torch.randn(2, 24), strength=0.5, temperature=1.0).features, features, atol=1e-5
    )
    narrow = replace(config, decoder=replace(config.decoder, und=replace(config.decoder.und, width=16)))
    with pytest.raises(RecipeError, match="narrower than the action stream"):
        open_gate(narrow, seed=1)


def test_a_size_beside_a_checkpoint_is_refused(tiny_recipe: Recipe, first: Path) -> None:
    with pytest.raises(RecipeError, match="layers is that of the checkpoint in start_from"):
        continued_policy(continued(tiny_recipe, first, layers=5))


def test_delays_of_the_recipe_replace_those_of_the_checkpoint(tiny_recipe: Recipe, first: Path) -> None:
    robot = RobotDelay(100, probabilities=(0.5, 0.5))
    recipe = replace(continued(tiny_recipe, first), delays={"so101": robot})
    delay = continued_policy(recipe).config.delay
    assert delay.longest == 1
    assert delay.robots == {"so101": robot}


def test_a_new_robot_is_trained_from_a_checkpoint_and_written_whole(
    tiny_recipe: Recipe, first: Path, demonstrations: Path, tmp_path: Path
) -> None:
    recipe = replace(continued(tiny_recipe, first, adapters=Adapters()), frozen=Frozen("new-robot"))
    prepared = prepare(recipe, demonstrations, tmp_path / "second")
    assert (tmp_path / "second" / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    assert [path.name for path in (tmp_path / "second").glob("*_metadata.json")] == ["second_metadata.json"]
    fit: Fit = start_fit(recipe, prepared)
    fit.advance()
    fit.save(tmp_path / "second")
    before, after = (load_checkpoint(folder).state_dict() for folder in (first, tmp_path / "second"))
    added = after.keys() - before.keys()
    assert added
    assert all(".adapter." in name for name in added)
    assert any(bool(after[name].any()) for name in added)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
