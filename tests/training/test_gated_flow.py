"""Training and sampling are one: the same question, asked by either, has the same answer."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from onbeat.training.config import DelayConfig, ExpertsConfig, GateConfig
from onbeat.training.losses import Drawn, flow_task
from onbeat.training.model import sampler
from onbeat.training.model.policy import Cache, Policy
from onbeat.training.model.sampler import Lock, choose_sampler, encode_anchor, sample_chunk
from onbeat.training.objective import training_refine
from onbeat.training.random_checkpoint import random_config, random_policy

VOCABULARY, CHUNK, STEPS, DIRECTIONS = 40, 12, 4, 8


def gated_policy(seed: int, first_pass: str, anchor_bucket: int) -> Policy:
    """With gate, prefix lock, experts and adapters; slots of other robots at zero."""
    config = random_config(2, VOCABULARY)
    gate = GateConfig(True, 0.3, 1.0, DIRECTIONS, first_pass=first_pass, anchor_bucket=anchor_bucket)
    decoder = replace(config.decoder, layers=2, experts=ExpertsConfig(1, 3, 2))
    vision = replace(config.vision, image_size=28, select_layer=-1)
    config = replace(config, vision=vision, chunk=CHUNK, decoder=decoder, gate=gate, flow_steps=STEPS, adapters=True)
    return random_policy(replace(config, delay=DelayConfig(True, 6), idle_slots="zero"), seed)


def prefix(policy: Policy) -> Cache:
    draw = torch.Generator().manual_seed(0)
    pixels, state = torch.randn(1, 1, 3, 28, 28, generator=draw), torch.randn(1, 200, generator=draw)
    return policy.encode_prefix(pixels, torch.randint(0, VOCABULARY, (1, 14), generator=draw), 2, 10, state)


def task_at(step: int, delay: int) -> tuple[Tensor, Tensor, Tensor]:
    """Actions (1, C, A), and what training makes of them at the time of a flow step: noisy and bucket, one draw."""
    draw = torch.Generator().manual_seed(step)
    slots = torch.rand(200, generator=draw) < 0.2
    actions = torch.randn(1, CHUNK, 200, generator=draw) * slots
    noise = torch.randn(1, 1, CHUNK, 200, generator=draw)
    drawn = Drawn(noise, torch.tensor([[step / STEPS]]), torch.tensor([[delay]]), torch.tensor([[False]]))
    task = flow_task(actions, slots.expand_as(actions), slots, drawn)
    return actions, task.noisy, task.bucket


@pytest.mark.parametrize(("first_pass", "anchor_bucket"), [("published", 0), ("projected", 1000)])
@pytest.mark.parametrize(("step", "delay"), [(0, 0), (1, 5), (3, 2)])
@torch.no_grad()
def test_sampling_on_a_perfect_result_asks_and_answers_as_training_does(
    first_pass: str, anchor_bucket: int, step: int, delay: int
) -> None:
    policy = gated_policy(5, first_pass, anchor_bucket)
    cache, (actions, noisy, bucket) = prefix(policy), task_at(step, delay)
    directions = torch.randn(STEPS, DIRECTIONS, policy.config.decoder.und.width)
    lock, spec = Lock(actions[0], delay), choose_sampler(policy.config, directions=True)
    buckets = sampler._row_buckets(STEPS, noisy, lock)
    assert torch.equal(buckets[step], bucket[:, 0])
    assert torch.equal(lock.apply(noisy[:, 0]), noisy[:, 0])
    anchor = encode_anchor(policy, actions)
    sampled = {
        True: sampler._first_velocity(policy, cache, buckets)(noisy[:, 0], step),
        False: sampler._gated_velocity(policy, cache, buckets, anchor, spec, directions, [])(noisy[:, 0], step),
    }
    for plain, expected in sampled.items():
        refine = training_refine(policy, actions, torch.tensor([[plain]]), directions[step])
        trained = policy.velocity(cache, noisy, bucket, refine)[:, 0]
        torch.testing.assert_close(trained, expected, atol=1e-6, rtol=0)
    assert (sampled[True] - sampled[False]).abs().max() > 1e-3, "the two passes differ"


@torch.no_grad()
def test_the_anchor_does_not_depend_on_noise_in_slots_of_other_robots() -> None:
    policy = gated_policy(6, "projected", 1000)
    cache, slots = prefix(policy), torch.arange(200) < 7
    spec = choose_sampler(policy.config)
    noise = torch.randn(2, 1, CHUNK, 200, generator=torch.Generator().manual_seed(1))
    one, other = noise, noise + ~slots
    first, second = (sample_chunk(policy, cache, spec, drawn, slots=slots) for drawn in (one, other))
    assert torch.equal(first.actions, second.actions)
    assert torch.equal(first.cost, second.cost)
    assert not first.actions[..., ~slots].any()
    published = replace(policy.config, idle_slots="noise")
    policy.config = published
    first, second = (sample_chunk(policy, cache, spec, drawn, slots=slots) for drawn in (one, other))
    assert (first.actions - second.actions)[..., slots].abs().max() > 1e-3, "as published, it does"
