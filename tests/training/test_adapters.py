"""Adapters per slot: nothing at first, a robot's own slots only, and nothing at run time."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from onbeat.training.checkpoint import publish_name
from onbeat.training.freezing import Frozen, decays, freeze
from onbeat.training.model.adapters import ADAPTER, SlotAdapter, activate_slots, fold_adapters
from onbeat.training.model.policy import Policy, count_parameters, create_policy
from onbeat.training.model.sampler import choose_sampler, sample_chunk
from onbeat.training.random_checkpoint import random_config, random_policy

VOCABULARY, STATE_AT = 40, 10
ARM, HAND, MANO = range(50, 57), range(20, 26), range(90, 200)
Observation = tuple[Tensor, Tensor, int, int, Tensor]


@pytest.fixture(scope="module")
def fresh() -> Policy:
    """A small network of all parts, its adapters at zero."""
    config = random_config(8, VOCABULARY)
    assert config.decoder.experts is not None
    vision = replace(config.vision, image_size=28, select_layer=-1)
    return create_policy(replace(config, vision=vision, chunk=6, adapters=True), seed=1)


def slots(*used: Iterable[int]) -> Tensor:
    chosen = torch.zeros(200, dtype=torch.bool)
    chosen[[slot for some in used for slot in some]] = True
    return chosen


def observation(state_slots: Tensor, batch: int = 2) -> Observation:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 1, 3, 28, 28, generator=draw)
    ids = torch.randint(0, VOCABULARY, (batch, 14), generator=draw)
    return pixels, ids, 2, STATE_AT, torch.randn(batch, 200, generator=draw) * state_slots


def actions(used: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 6, 200, generator=draw) * used, torch.full((2, 3, 6), 250)


def act(policy: Policy, state_slots: Tensor, used: Tensor) -> Tensor:
    """The velocity in the robot's slots."""
    with torch.no_grad():
        velocity = policy.velocity(policy.encode_prefix(*observation(state_slots)), *actions(used))
    return velocity[..., used]


def train(policy: Policy, state_slots: Tensor, used: Tensor, steps: int = 4) -> None:
    """As a run with the preset for new robots does: AdamW with weight decay, noise in every slot of the input."""
    freeze(policy, Frozen("new-robot"))
    activate_slots(policy, state_slots, used)
    named = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if decays(name, p, policy.config) is flag], "weight_decay": 0.1 * flag}
        for flag in (True, False)
    ]
    optimiser = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-2)
    everywhere = torch.ones(200, dtype=torch.bool)
    for step in range(steps):
        optimiser.zero_grad(set_to_none=True)
        cache = policy.encode_prefix(*observation(everywhere))
        velocity = policy.velocity(cache, *actions(everywhere, step))
        (velocity - 1).square().mean().backward()
        optimiser.step()


def copy_of(policy: Policy) -> Policy:
    copied = Policy(policy.config)
    copied.load_state_dict(policy.state_dict())
    return copied


def test_fresh_adapters_change_nothing(fresh: Policy) -> None:
    plain = Policy(replace(fresh.config, adapters=False))
    plain.load_state_dict({name: t for name, t in fresh.state_dict().items() if ADAPTER not in name})
    everything = torch.ones(200, dtype=torch.bool)
    assert torch.equal(act(plain, everything, everything), act(fresh, everything, everything))
    counts = count_parameters(fresh)
    assert counts["adapters"] == 3 * 200 * fresh.config.decoder.gen.width + 200
    assert counts["heads"] == count_parameters(plain)["heads"]


@pytest.mark.parametrize(
    ("state", "used"),
    [(slots(ARM), slots(ARM, [18])), (slots(ARM, HAND), slots(ARM, HAND)), (slots(MANO), slots(MANO))],
    ids=["arm", "arm and hand", "human hand"],
)
def test_a_new_robot_changes_its_active_slots_alone_bit_for_bit(fresh: Policy, state: Tensor, used: Tensor) -> None:
    """Adapters of earlier robots, the trained rows of theirs included, and all else keep every bit."""
    policy = copy_of(fresh)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ADAPTER in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    train(policy, state, used)
    for name, after in policy.state_dict().items():
        changed = (after != before[name]).reshape(len(after), -1).any(1)
        if ADAPTER in name:
            assert torch.equal(changed, state if name.startswith("state_encoder") else used), name
        else:
            assert not changed.any(), name


def test_an_inactive_slot_has_gradient_zero_even_where_its_input_is_not(fresh: Policy) -> None:
    policy = copy_of(fresh)
    activate_slots(policy, slots(ARM), slots(ARM))
    everything = torch.ones(200, dtype=torch.bool)
    cache = policy.encode_prefix(*observation(everything))
    policy.velocity(cache, *actions(everything)).square().mean().backward()
    banks = [module for module in policy.modules() if isinstance(module, SlotAdapter)]
    assert len(banks) == 3
    for bank in banks:
        for parameter in bank.parameters():
            assert parameter.grad is not None
            moved = parameter.grad.reshape(200, -1).abs().amax(1) > 0
            assert torch.equal(moved, slots(ARM))


def test_robots_that_share_a_slot_share_its_adapter_and_others_notice_nothing(fresh: Policy) -> None:
    policy = copy_of(fresh)
    freeze(policy, Frozen("new-robot"))  # before measuring: kernels, and their rounding, follow what needs a gradient
    sharing, apart = slots(range(55, 64)), slots(HAND)
    before = [act(policy, robot, robot) for robot in (sharing, apart)]
    train(policy, slots(ARM), slots(ARM))
    after = [act(policy, robot, robot) for robot in (sharing, apart)]
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])


def test_what_a_robot_samples_keeps_every_bit_while_another_is_trained(fresh: Policy) -> None:
    """With noise in all slots: those of others rest at zero."""
    policy = copy_of(fresh)
    policy.config = replace(fresh.config, idle_slots="zero")
    freeze(policy, Frozen("new-robot"))
    before = sample(policy, slots(HAND))
    train(policy, slots(ARM), slots(ARM))
    assert torch.equal(before, sample(policy, slots(HAND)))
    policy.config = replace(fresh.config, idle_slots="noise")
    assert not torch.equal(sample(policy, slots(HAND)), before), "as published, noise passes the arm's adapters"


@torch.no_grad()
def sample(policy: Policy, used: Tensor) -> Tensor:
    cache, spec = policy.encode_prefix(*observation(used)), choose_sampler(policy.config)
    noise = torch.randn(spec.iterations, 2, 6, 200, generator=torch.Generator().manual_seed(4))
    return sample_chunk(policy, cache, spec, noise, slots=used).actions[..., used]


def test_folded_adapters_are_a_dense_network_of_published_names_that_acts_alike() -> None:
    config = random_config(8, VOCABULARY)
    policy = random_policy(replace(config, adapters=True, decoder=replace(config.decoder, experts=None)), seed=3)
    plain = Policy(replace(policy.config, adapters=False))
    folded = fold_adapters(policy.state_dict())
    plain.load_state_dict(folded)
    named = fold_adapters({publish_name(name): tensor for name, tensor in policy.state_dict().items()})
    assert all(torch.equal(named[publish_name(name)], tensor) for name, tensor in folded.items())
    layers = (
        (policy.state_encoder.layer1, plain.state_encoder.layer1),
        (policy.action_encoder.W1, plain.action_encoder.W1),
    )
    x, h = torch.randn(5, 200), torch.randn(5, policy.config.decoder.gen.width)
    for adapted, dense in layers:
        torch.testing.assert_close(adapted(x), dense(x))
    torch.testing.assert_close(policy.action_decoder.layer2(h), plain.action_decoder.layer2(h))
    assert not torch.equal(plain.action_encoder.W1.weight, policy.action_encoder.W1.weight)


def test_a_width_equal_to_the_number_of_slots_is_folded_the_right_way_round() -> None:
    config = random_config(8, VOCABULARY)
    decoder = replace(config.decoder, gen=replace(config.decoder.gen, width=200))
    policy = random_policy(replace(config, adapters=True, decoder=decoder), seed=3)
    folded = fold_adapters(policy.state_dict())
    x = torch.randn(4, 200)
    for name, layer in (("action_encoder.W1", policy.action_encoder.W1), ("action_decoder.layer2", None)):
        layer = layer or policy.action_decoder.layer2
        dense = torch.nn.functional.linear(x, folded[f"{name}.weight"], folded[f"{name}.bias"])
        torch.testing.assert_close(layer(x), dense)
