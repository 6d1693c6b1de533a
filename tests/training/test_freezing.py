"""What is frozen stays, bit for bit, and the optimiser holds nothing for it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from onbeat.training.fit import Fit
from onbeat.training.freezing import (
    ACTIVE_SLOTS,
    FROZEN,
    NAMES,
    PRESETS,
    TRAINED,
    FreezingError,
    Frozen,
    freeze,
    freezing_table,
    part_of,
)
from onbeat.training.model.policy import Policy, count_parameters, create_policy
from onbeat.training.prepare import prepare, start_fit
from onbeat.training.recipe import Adapters, ExpertsConfig, Gate, Recipe

Starter = Callable[[Frozen], Fit]


@pytest.fixture
def rich_recipe(tiny_recipe: Recipe) -> Recipe:
    """With experts, gate and adapters."""
    network = replace(
        tiny_recipe.network, und_width=24, experts=ExpertsConfig(1, 2, 1), gate=Gate(), adapters=Adapters()
    )
    return replace(tiny_recipe, network=network, fitting=replace(tiny_recipe.fitting, weight_decay=0.1))


@pytest.fixture
def start(rich_recipe: Recipe, demonstrations: Path, tmp_path: Path) -> Starter:
    prepared = prepare(rich_recipe, demonstrations, tmp_path)
    torch.set_num_threads(1)
    return lambda frozen: start_fit(replace(rich_recipe, frozen=frozen), prepared)


def rich_policy(recipe: Recipe) -> Policy:
    return create_policy(recipe.network.configure(vocabulary=20), seed=0)


def test_every_parameter_belongs_to_a_part_and_every_part_is_there(rich_recipe: Recipe) -> None:
    policy = rich_policy(rich_recipe)
    found = {part_of(name, policy.config) for name, _ in policy.named_parameters()}
    assert found == set(NAMES) - {"lm_head"}, "lm_head is tied to the embedding here"
    assert sum(row.parameters for row in freezing_table(policy, Frozen())) == count_parameters(policy)["total"]


def test_a_dense_network_has_no_foundation(tiny_recipe: Recipe) -> None:
    rows = {row.part: row.treatment for row in freezing_table(rich_policy(tiny_recipe), Frozen("freeze-vision"))}
    assert rows == dict.fromkeys(("understanding", "action", "heads", "embedding", "connector"), TRAINED) | {
        "vision": FROZEN
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_frozen_keeps_every_bit_and_the_rest_moves(preset: str, start: Starter) -> None:
    fit = start(Frozen(preset))
    before = {name: tensor.clone() for name, tensor in fit.policy.named_parameters()}
    average = {name: tensor.clone() for name, tensor in fit.average.named_parameters()}
    for _ in range(3):
        fit.advance()
    treatments = {name: Frozen(preset).treatment(part_of(name, fit.policy.config)) for name in before}
    kept = [name for name, p in fit.policy.named_parameters() if torch.equal(p, before[name])]
    assert set(kept) >= {name for name, treatment in treatments.items() if treatment == FROZEN}
    assert all(torch.equal(p, average[name]) for name, p in fit.average.named_parameters() if name in kept)
    trained = {name for name, treatment in treatments.items() if treatment != FROZEN}
    assert len(trained - set(kept)) > 0.7 * len(trained), "what is trained moves, but for what nothing depends on"
    held = {p for group in fit.optimiser.param_groups for p in group["params"]}
    assert {name for name, p in fit.policy.named_parameters() if p in held} == trained
    assert set(fit.optimiser.state) <= held


def test_a_new_robot_changes_the_adapters_of_its_own_slots_alone(start: Starter) -> None:
    fit = start(Frozen("new-robot"))
    # As if other robots had been trained before: their rows are not 0, and decay or momentum would show.
    with torch.no_grad():
        for name, parameter in fit.policy.named_parameters():
            if part_of(name, fit.policy.config) == "adapters":
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    before = {name: tensor.clone() for name, tensor in fit.policy.named_parameters()}
    for _ in range(3):
        fit.advance()
    active = torch.zeros(200, dtype=torch.bool)
    active[[18, *range(50, 55)]] = True
    adapters = 0
    for name, parameter in fit.policy.named_parameters():
        changed = (parameter != before[name]).nonzero()
        if part_of(name, fit.policy.config) == "adapters":
            adapters += 1
            assert set(changed[:, 0].tolist()) == set(active.nonzero().flatten().tolist()), name
        else:
            assert not len(changed), name
    assert adapters == 4


def test_parts_overrule_the_preset() -> None:
    frozen = Frozen("action-expert", {"understanding": TRAINED, "heads": FROZEN})
    treatments = {part: frozen.treatment(part) for part in NAMES}
    assert treatments["understanding"] == TRAINED
    assert treatments["heads"] == treatments["vision"] == FROZEN
    assert treatments["adapters"] == ACTIVE_SLOTS


def test_a_run_that_would_train_nothing_is_refused(tiny_recipe: Recipe) -> None:
    with pytest.raises(FreezingError, match="leaves nothing to train"):
        freeze(rich_policy(tiny_recipe), Frozen("new-robot"))
