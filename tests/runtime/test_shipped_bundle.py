"""The bundle in the repository: small, whole, for the recipe beside it, and able to lift what it sees and only that."""

import functools
from pathlib import Path

import pytest

from onbeat.runtime.bundle import load_bundle
from onbeat.runtime.episode import Conditions
from onbeat.runtime.evaluate import evaluate
from onbeat.runtime.policy import load_policy
from onbeat.runtime.run import DEFAULT_INSTRUCTION
from onbeat.training.demonstrations import INSTRUCTION
from onbeat.training.recipe import load_recipe

ROOT = Path(__file__).parents[2]
BUNDLE, RECIPE = ROOT / "bundles" / "so101-lift", ROOT / "training" / "configs" / "so101_lift.toml"
MOST_BYTES = 20_000_000
SEEDS = range(300_000, 300_006)  # no other measurement uses these


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in BUNDLE.iterdir()) < MOST_BYTES


def test_it_is_what_the_recipe_makes() -> None:
    spec, network = load_policy(BUNDLE).spec, load_recipe(RECIPE).network
    config = network.configure(vocabulary=1)
    assert (spec.image_size, spec.chunk) == (network.image_size, network.chunk)
    assert spec.tokens_per_view == config.vision.tokens_per_view
    assert spec.trained_delay == config.delay.longest
    assert spec.sampler.flow_steps == network.flow_steps
    assert load_bundle(BUNDLE).manifest.embodiment == load_recipe(RECIPE).embodiment


def test_it_is_asked_for_what_it_was_taught() -> None:
    assert DEFAULT_INSTRUCTION == INSTRUCTION


@pytest.mark.slow
def test_it_lifts_the_cube_it_sees_and_none_in_the_dark() -> None:
    """Measured 50 seeds of each in bundles/README.md; here enough to notice a bundle or a runtime that broke."""
    policy = functools.partial(load_policy, BUNDLE)
    conditions = Conditions(DEFAULT_INSTRUCTION)
    assert evaluate(policy, SEEDS, conditions=conditions).successes >= 4
    assert evaluate(policy, SEEDS[:3], conditions=conditions, control="blank").successes <= 1
