"""Prefixes of different lengths in one pass: what comes out is what each gives alone, and so are the gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from onbeat.training.config import DecoderConfig, ExpertsConfig, PolicyConfig, StreamConfig, VisionConfig
from onbeat.training.model.packing import join, split, stack, unstack
from onbeat.training.model.policy import Policy, Prefix
from onbeat.training.random_checkpoint import random_policy

VOCABULARY, DRAWS, CHUNK, IMAGE_START = 40, 3, 4, 2
GROUPS = ((1, 2, 1), (3, 1, 4), (2, 2, 9), (1, 1, 4))  # observations, views, tokens of the instruction
ROUNDING = 1e-6  # of the largest value: float32 sums in another order; the smallest mistake here moves 1e-3


@pytest.fixture(params=[None, "observation", "token"], ids=["dense", "observation", "token"])
def policy(request: pytest.FixtureRequest) -> Policy:
    torch.set_num_threads(1)
    experts = None if request.param is None else ExpertsConfig(1, 4, 2, request.param)
    return random_policy(config_with(experts), seed=1)


def config_with(experts: ExpertsConfig | None) -> PolicyConfig:
    decoder = DecoderConfig(StreamConfig(24, 32), StreamConfig(16, 24), 3, 4, 2, 8, VOCABULARY, experts=experts)
    return PolicyConfig(VisionConfig(16, 32, 1, 2, 28), decoder, chunk=CHUNK)


def prefixes_of(config: PolicyConfig) -> list[Prefix]:
    generator = torch.Generator().manual_seed(5)
    return [random_prefix(config, *sizes, generator) for sizes in GROUPS]


def random_prefix(config: PolicyConfig, batch: int, views: int, words: int, generator: torch.Generator) -> Prefix:
    side, index = config.vision.image_size, IMAGE_START + views * config.vision.tokens_per_view + 1
    return Prefix(
        torch.randn(batch, views, 3, side, side, generator=generator),
        torch.randint(0, VOCABULARY, (batch, index + 1 + words), generator=generator),
        IMAGE_START,
        index,
        torch.randn(batch, 200, generator=generator),
    )


def double(prefix: Prefix) -> Prefix:
    return prefix._replace(pixel_values=prefix.pixel_values.double(), state=prefix.state.double())


def random_actions(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    noisy = torch.randn(batch, DRAWS, CHUNK, 200, generator=generator)
    return noisy, torch.randint(0, 1001, noisy.shape[:-1], generator=generator)


def one_by_one(policy: Policy, prefixes: list[Prefix], noisy: Tensor, bucket: Tensor) -> Tensor:
    singles = [
        Prefix(p.pixel_values[i : i + 1], p.token_ids[i : i + 1], p.image_start, p.state_index, p.state[i : i + 1])
        for p in prefixes
        for i in range(len(p.state))
    ]
    rows = zip(singles, noisy.split(1), bucket.split(1), strict=True)
    return torch.cat([policy.velocity(policy.encode_prefix(*p), x, t) for p, x, t in rows])


def gradients(policy: Policy, velocity: Tensor) -> dict[str, Tensor]:
    policy.zero_grad(set_to_none=True)
    (velocity * torch.linspace(-1, 1, velocity.numel()).view_as(velocity)).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


def test_packed_is_one_by_one(policy: Policy) -> None:
    prefixes = prefixes_of(policy.config)
    noisy, bucket = random_actions(sum(size for size, _, _ in GROUPS))
    packed = policy.flows(policy.encode_prefixes(prefixes), noisy, bucket).velocity
    alone = one_by_one(policy, prefixes, noisy, bucket)
    assert apart(packed, alone) <= ROUNDING * float(alone.detach().abs().max())


def test_so_are_the_gradients_of_every_weight(policy: Policy) -> None:
    """In float64, where a sum in another order is off by less than anything wrong could be."""
    policy.double()
    prefixes = [double(prefix) for prefix in prefixes_of(policy.config)]
    noisy, bucket = random_actions(sum(size for size, _, _ in GROUPS))
    ours = gradients(policy, policy.flows(policy.encode_prefixes(prefixes), noisy.double(), bucket).velocity)
    theirs = gradients(policy, one_by_one(policy, prefixes, noisy.double(), bucket))
    largest = max(float(g.abs().max()) for g in theirs.values())
    assert ours.keys() == theirs.keys()
    assert {n: d for n in ours if (d := apart(ours[n], theirs[n])) > 1e-12 * largest} == {}


def test_no_group_sees_another(policy: Policy) -> None:
    prefixes = prefixes_of(policy.config)
    before = policy.encode_prefixes(prefixes)
    changed = [prefixes[0], prefixes[1]._replace(state=prefixes[1].state + 1.0), *prefixes[2:]]
    after = policy.encode_prefixes(changed)
    for group in (0, 2, 3):
        assert all(torch.equal(a.keys, b.keys) for a, b in zip(before[group], after[group], strict=True))
    assert apart(before[1][-1].keys, after[1][-1].keys) > 1e-3


def test_the_router_is_told_for_the_right_observations(policy: Policy) -> None:
    if policy.config.decoder.experts is None:
        pytest.skip("a dense network routes nothing")
    prefixes = prefixes_of(policy.config)
    noisy, bucket = random_actions(sum(size for size, _, _ in GROUPS))
    together = policy.flows(policy.encode_prefixes(prefixes), noisy, bucket).routing
    first = policy.flow(policy.encode_prefix(*prefixes[1]), noisy[1:4], bucket[1:4]).routing
    assert together is not None
    assert first is not None
    assert torch.equal(together.use[:, 1:4], first.use)
    assert apart(together.probabilities[:, 1:4], first.probabilities) < ROUNDING


def test_several_draws_of_one_prefix_are_draws_alone(policy: Policy) -> None:
    prefix = prefixes_of(policy.config)[1]
    noisy, bucket = random_actions(3)
    together = policy.velocity(policy.encode_prefix(*prefix), noisy, bucket)
    draws = zip(noisy.split(1, dim=1), bucket.split(1, dim=1), strict=True)
    alone = torch.cat([policy.velocity(policy.encode_prefix(*prefix), x, t) for x, t in draws], dim=1)
    assert apart(together, alone) <= ROUNDING * float(together.detach().abs().max())


def test_groups_come_back_as_they_went_in() -> None:
    groups = [torch.randn(2, 3, 5), torch.randn(1, 7, 5), torch.randn(4, 1, 5)]
    row = join(groups)
    assert row.shape == (1, 17, 5)
    back = split(row, [(2, 3), (1, 7), (4, 1)])
    assert all(torch.equal(a, b) and b.data_ptr() >= row.data_ptr() for a, b in zip(groups, back, strict=True))
    assert join(groups[:1]) is groups[0]
    assert split(groups[0], [(2, 3)])[0] is groups[0]
    states = [torch.randn(2, 5), torch.randn(3, 5)]
    assert all(torch.equal(a, b) for a, b in zip(states, unstack(stack(states), [2, 3]), strict=True))


def test_a_prefix_that_ends_with_the_state_has_nothing_for_a_router() -> None:
    policy = random_policy(config_with(ExpertsConfig(1, 4, 2, "observation")), seed=1)
    prefix = prefixes_of(policy.config)[0]
    ended = prefix._replace(token_ids=prefix.token_ids[:, : prefix.state_index + 1])
    with pytest.raises(AssertionError, match="ends what the router reads"):
        policy.encode_prefix(*ended)
    dense = random_policy(replace(policy.config, decoder=replace(policy.config.decoder, experts=None)), seed=1)
    assert len(dense.encode_prefix(*ended)) == 3
