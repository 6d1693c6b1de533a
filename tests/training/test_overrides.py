"""Overrides of the sampler that are of no use are refused by name, before a network runs."""

from dataclasses import replace
from pathlib import Path

import pytest

from onbeat.training.config import PolicyConfig
from onbeat.training.config_file import load_config
from onbeat.training.model.sampler import OverrideError, choose_sampler


@pytest.fixture
def config(golden: Path) -> PolicyConfig:
    return load_config(golden / "ckpt_a2/checkpoint")


@pytest.mark.parametrize("value", [None, "x", "2", [1], float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["mpg_lambda", "num_inference_timesteps", "use_mpg", "mpg_refinement_iters"])
def test_an_override_that_is_no_number_is_named(config: PolicyConfig, name: str, value: object) -> None:
    with pytest.raises(OverrideError, match=f"{name} is .*: give a number"):
        choose_sampler(config, {name: value})  # pyright: ignore[reportArgumentType]


def test_fewer_than_no_refinements_are_refused(config: PolicyConfig) -> None:
    with pytest.raises(OverrideError, match="mpg_refinement_iters is -1: give at least 0"):
        choose_sampler(config, {"mpg_refinement_iters": -1})
    assert choose_sampler(config, {"mpg_refinement_iters": 0}).gate == "off"
    off = replace(config, gate=replace(config.gate, refinements=0))
    assert choose_sampler(off, {"mpg_refinement_iters": 1}).iterations == 2
