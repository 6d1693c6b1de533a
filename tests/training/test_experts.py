"""Mixture of Flow: who chooses, what is chosen, what a gradient touches, and what is counted."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from onbeat.training.config import DecoderConfig, ExpertsConfig, PolicyConfig, StreamConfig, VisionConfig
from onbeat.training.model.decoder import RoutedStream
from onbeat.training.model.experts import Routing, balance_loss, choose, summarise
from onbeat.training.model.policy import Cache, Policy, count_parameters, create_policy
from onbeat.training.random_checkpoint import random_config, random_policy
from onbeat.training.recompute import recompute_layers

VOCABULARY, CHUNK = 40, 12
STATE_AT = 10  # of 14 tokens; the images stand at 2


def mixture_config(**changes: Any) -> PolicyConfig:
    """Three layers, the upper two with four experts each."""
    config = random_config(2, VOCABULARY)
    mixture = ExpertsConfig(**{"foundation_layers": 1, "count": 4, "top_k": 2, **changes})
    vision = replace(config.vision, image_size=28, select_layer=-1)
    return replace(config, vision=vision, chunk=CHUNK, decoder=replace(config.decoder, layers=3, experts=mixture))


def mixture(seed: int = 5, **changes: Any) -> Policy:
    return random_policy(mixture_config(**changes), seed)


def observations(batch: int, seed: int = 0) -> tuple[Tensor, Tensor, int, int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, 1, 3, 28, 28, generator=generator)
    ids = torch.randint(0, VOCABULARY, (batch, 14), generator=generator)
    return pixels, ids, 2, STATE_AT, torch.randn(batch, 200, generator=generator)


def questions(batch: int, draws: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    actions = torch.randn(batch, draws, CHUNK, 200, generator=generator)
    return actions, torch.randint(0, 1000, (batch, draws, CHUNK), generator=generator)


def routed(policy: Policy) -> list[RoutedStream]:
    return [layer.gen for layer in policy.language_model.stack if isinstance(layer.gen, RoutedStream)]


def scores(cache: Cache) -> list[Tensor]:
    return [layer.router for layer in cache if layer.router is not None]


def test_the_best_are_taken_with_weights_that_sum_to_one() -> None:
    logits = torch.tensor([[0.0, 3.0, -1.0, 2.0], [5.0, 0.0, 0.0, -5.0]])
    route = choose(logits, 2)
    assert route.chosen[0].tolist() == [1, 3]
    assert route.chosen[1, 0] == 0
    chances = logits.softmax(-1).gather(-1, route.chosen)
    torch.testing.assert_close(route.weights, chances / chances.sum(-1, keepdim=True))


def test_one_expert_alone_weighs_exactly_one_and_still_teaches_the_router() -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    route = choose(logits, 1)
    assert torch.equal(route.weights, torch.ones(5, 1))
    (route.weights * torch.arange(1.0, 6)[:, None]).sum().backward()
    assert logits.grad is not None
    assert (logits.grad.gather(1, route.chosen) > 0).all(), "more of what helps"
    assert logits.grad.sum(1).abs().max() < 1e-6


@pytest.mark.parametrize("routing", ["observation", "token"])
def test_draws_and_observations_are_routed_as_if_alone(routing: str) -> None:
    policy = mixture(routing=routing)
    pixels, ids, start, index, state = observations(3)
    actions, bucket = questions(3, 2)
    together = policy.velocity(policy.encode_prefix(pixels, ids, start, index, state), actions, bucket)
    for b in range(3):
        alone = policy.encode_prefix(pixels[b : b + 1], ids[b : b + 1], start, index, state[b : b + 1])
        for d in range(2):
            one = policy.velocity(alone, actions[b : b + 1, d : d + 1], bucket[b : b + 1, d : d + 1])
            torch.testing.assert_close(one[0, 0], together[b, d], atol=1e-5, rtol=0)


def test_by_observation_all_draws_take_the_experts_the_prefix_chose() -> None:
    policy = mixture()
    cache = policy.encode_prefix(*observations(3))
    routing = policy.flow(cache, *questions(3, 2)).routing
    assert routing is not None
    for layer, read in enumerate(scores(cache)):
        use = torch.zeros(3, 4).scatter(1, choose(read, 2).chosen, 0.5)
        assert torch.equal(routing.use[layer], use)
        torch.testing.assert_close(routing.probabilities[layer], read.softmax(-1))


def test_by_token_the_rows_of_a_chunk_choose_for_themselves() -> None:
    policy = mixture(routing="token")
    routing = policy.flow(policy.encode_prefix(*observations(1)), *questions(1, 1)).routing
    assert routing is not None
    assert ((routing.use > 0).sum(-1) > 2).any(), "more than one row's choice"
    torch.testing.assert_close(routing.use.sum(-1), torch.ones(2, 1))


def test_the_router_sees_images_state_and_instruction_but_not_the_actions() -> None:
    policy = mixture()
    pixels, ids, start, index, state = observations(1)
    before = scores(policy.encode_prefix(pixels, ids, start, index, state))
    other = ids.clone()
    other[0, STATE_AT + 1] = (other[0, STATE_AT + 1] + 1) % VOCABULARY
    for changed in (
        (pixels + 1, ids, start, index, state),
        (pixels, ids, start, index, state + 1),
        (pixels, other, start, index, state),
    ):
        after = scores(policy.encode_prefix(*changed))
        assert all((a - b).abs().max() > 1e-4 for a, b in zip(before, after, strict=True))


def test_a_prefix_that_ends_with_the_state_gives_the_router_nothing_to_read() -> None:
    pixels, ids, start, _, state = observations(1)
    with pytest.raises(AssertionError, match="router"):
        mixture().encode_prefix(pixels, ids, start, 13, state)


def test_the_state_token_takes_the_shared_path() -> None:
    policy = mixture()
    before = policy.encode_prefix(*observations(1))
    with torch.no_grad():
        for stream in routed(policy):
            for weight in stream.experts.parameters():
                weight.add_(1)
    after = policy.encode_prefix(*observations(1))
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(before, after, strict=True))
    with torch.no_grad():
        routed(policy)[0].mlp.down_proj.weight.add_(1)
    moved = policy.encode_prefix(*observations(1))
    assert (moved[2].keys - after[2].keys).abs().max() > 1e-3, "of a layer that others read"


@pytest.mark.parametrize("routing", ["observation", "token"])
@pytest.mark.parametrize("touch_all", [False, True])
def test_gradients_touch_only_chosen_experts(routing: str, touch_all: bool) -> None:
    policy = mixture(routing=routing, count=12 if routing == "token" else 4, top_k=1)
    for stream in routed(policy):
        stream.experts.touch_all = touch_all
    flow = policy.flow(policy.encode_prefix(*observations(1)), *questions(1, 2))
    assert flow.routing is not None
    flow.velocity.square().mean().backward()
    idle = 0
    for stream, use in zip(routed(policy), flow.routing.use[:, 0], strict=True):
        assert stream.router.weight.grad is not None
        assert stream.router.weight.grad.abs().max() > 0
        for share, expert in zip(use, stream.experts, strict=True):
            gradients = [weight.grad for weight in expert.parameters()]
            if share > 0:
                assert all(g is not None and g.abs().max() > 0 for g in gradients)
            elif touch_all:
                assert all(g is not None and not g.any() for g in gradients)
            else:
                assert gradients == [None] * 3
            idle += share == 0
    assert idle >= 2, "the test needs experts that are not chosen"


def test_load_is_balanced_where_it_is_even() -> None:
    even, one = torch.full((1, 8, 4), 0.25), torch.zeros(1, 8, 4).index_fill(2, torch.tensor(1), 1.0)
    for load, loss in ((even, 1.0), (one, 4.0)):
        parts = balance_loss(Routing(load, load, torch.zeros(1, 8)), load.mean(1))
        assert parts.shape == (8,)
        assert parts.mean().item() == pytest.approx(loss)


def test_balancing_takes_load_off_the_busiest_expert() -> None:
    logits = (torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) * 0.3).requires_grad_()
    with torch.no_grad():
        logits[:, 2] += 0.5
    routing = summarise([choose(logits, 1)], 64)
    balance_loss(routing, routing.use.mean(1)).mean().backward()
    assert logits.grad is not None
    assert logits.grad.mean(0).argmax() == 2


def test_balance_of_two_halves_is_that_of_the_whole() -> None:
    route = choose(torch.randn(10, 4, generator=torch.Generator().manual_seed(1)), 2)
    routing = summarise([route, route], 10)
    use = routing.use.mean(1)
    halves = [Routing(*(part[:, rows] for part in routing)) for rows in (slice(0, 3), slice(3, 10))]
    parts = torch.cat([balance_loss(half, use) for half in halves])
    torch.testing.assert_close(parts, balance_loss(routing, use))


def test_entropy_goes_from_nothing_to_the_logarithm_of_the_number_of_experts() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 50.0, 0.0, 0.0]])
    entropy = summarise([choose(logits, 1)], 2).entropy
    torch.testing.assert_close(entropy, torch.tensor([[math.log(4), 0.0]]), atol=1e-6, rtol=0)
    assert not entropy.requires_grad


@pytest.mark.parametrize("routing", ["observation", "token"])
def test_the_router_keeps_float32_where_products_are_coarser(routing: str) -> None:
    policy = mixture(routing=routing)
    full = policy.flow(policy.encode_prefix(*observations(2)), *questions(2, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = policy.encode_prefix(*observations(2))
        half = policy.flow(cache, *questions(2, 2))
    assert half.routing is not None
    assert {read.dtype for read in scores(cache)} == {half.routing.probabilities.dtype} == {torch.float32}
    assert (half.velocity - full.velocity).abs().max() < 0.3 * full.velocity.abs().max()
    half.velocity.float().square().mean().backward()


def test_layers_computed_again_give_the_same_gradients() -> None:
    gradients = []
    for again in (False, True):
        policy = mixture()
        if again:
            recompute_layers(policy)
        flow = policy.flow(policy.encode_prefix(*observations(2)), *questions(2, 2))
        assert flow.routing is not None
        loss = flow.velocity.square().mean() + balance_loss(flow.routing, flow.routing.use.mean(1)).mean()
        loss.backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_fresh_mixture_spreads_its_observations() -> None:
    policy = create_policy(mixture_config(top_k=1), seed=0)
    routing = policy.flow(policy.encode_prefix(*observations(32)), *questions(32, 1)).routing
    assert routing is not None
    assert ((routing.use.mean(1) > 0).sum(-1) >= 2).all()


def test_parameters_are_counted_by_part_and_by_what_a_chunk_reads() -> None:
    policy = mixture()
    counts, dense = count_parameters(policy), count_parameters(Policy(replace_experts(policy.config)))
    gen = policy.config.decoder.gen
    assert counts["experts"] == 2 * 4 * 3 * gen.width * gen.ffn_width
    assert counts["routers"] == 2 * 4 * policy.config.decoder.und.width
    assert counts["gen"] == dense["gen"]
    assert counts["at work"] == dense["at work"] + counts["experts"] // 2 + counts["routers"]


def replace_experts(config: PolicyConfig) -> PolicyConfig:
    return replace(config, decoder=replace(config.decoder, experts=None))


def test_the_released_size_as_a_mixture_of_flow() -> None:
    """On no memory: four experts above eight shared layers, two of them taken, beside the published 2.15 B at work."""
    decoder = DecoderConfig(StreamConfig(2048, 6144), StreamConfig(1024, 3072), 28, 16, 8, 128, 151_936)
    mixture = replace(decoder, experts=ExpertsConfig(foundation_layers=8, count=4, top_k=2))
    with torch.device("meta"):
        sizes = [
            count_parameters(
                Policy(PolicyConfig(VisionConfig(1024, 4096, 24, 16, 224), each, adapters=each is mixture))
            )
            for each in (decoder, mixture)
        ]
    dense, routed = ({name: round(count / 1e6) for name, count in counts.items()} for counts in sizes)
    assert (routed["experts"], routed["gen"], routed["und"]) == (755, dense["gen"], dense["und"])
    assert sizes[1]["routers"] == 20 * 4 * 2048
    assert sizes[1]["adapters"] == 3 * 200 * 1024 + 200
    assert (dense["at work"], dense["total"], routed["at work"], routed["total"]) == (2172, 2794, 2549, 3550)
    assert sizes[1]["at work"] - sizes[0]["at work"] == sizes[1]["experts"] // 2 + sizes[1]["routers"]
