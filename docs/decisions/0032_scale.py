"""The ratios of 0032-scale.md, side by side: python docs/decisions/0032_scale.py

One thread and its own CPU time, so that other work on the machine disturbs little.
"""

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from onbeat.training.model.policy import Policy, Prefix, create_policy
from onbeat.training.parallel import follow
from onbeat.training.recipe import load_recipe

RECIPE = Path(__file__).parents[2] / "training" / "configs" / "so101_lift.toml"
VOCABULARY, IMAGE_START, REPEATS, DRAWS = 400, 20, 7, 4
WORDS = (3, 5, 6, 8, 10, 12, 14, 18)  # of eight instructions
# Of attention alone: sequences of each length, the lengths, heads, their size.
ATTENTION = ((4, range(32, 47, 2), 4, 32), (4, range(24, 102, 11), 4, 32), (1, range(100, 293, 27), 16, 128))


def main() -> None:
    """Print a line per comparison: the second way's time as a part of the first's, and how far results are apart."""
    torch.set_num_threads(1)
    policy = create_policy(load_recipe(RECIPE).network.configure(VOCABULARY), seed=0)
    prefixes = [random_prefix(policy, 4, 2, words) for words in WORDS]
    mixed = [random_prefix(policy, 1, 1 + words % 2, words) for words in range(3, 19)]
    one = [random_prefix(policy, 32, 2, 8)]
    compare("32 observations, 8 lengths: packed / group by group", *passes(policy, prefixes))
    compare("32 observations, 8 lengths: packed / padded", padded(policy, prefixes), packed(policy, prefixes))
    compare("16 observations, all of different shapes: packed / one by one", *passes(policy, mixed))
    compare("32 observations of one shape: packed way / the same", *passes(policy, one))
    compare("4 draws: one prefix / a prefix for each", *prefix_once(policy, one[0]))
    compare("average: all at once / one by one", *averages(policy))
    compare("q, k, v of 1280 tokens: one product / three", *projections(policy))
    for size in ATTENTION:
        attend_in_all_ways(*size)


def compare(what: str, first: Callable[[], Tensor], second: Callable[[], Tensor]) -> None:
    times: tuple[list[float], list[float]] = [], []
    results = [first(), second()]
    for _ in range(REPEATS):
        for way, spent in zip((first, second), times, strict=True):
            began = time.thread_time()
            way()
            spent.append(time.thread_time() - began)
    ratio = min(times[1]) / min(times[0])
    apart = float((results[0] - results[1]).abs().max()) if results[0].shape == results[1].shape else float("nan")
    print(f"{what}: {ratio:.2f} of {min(times[0]) * 1e3:.1f} ms; apart {apart:.0e}")


def random_prefix(policy: Policy, batch: int, views: int, words: int) -> Prefix:
    vision = policy.config.vision
    index = IMAGE_START + views * vision.tokens_per_view + 1
    return Prefix(
        torch.randn(batch, views, 3, vision.image_size, vision.image_size),
        torch.randint(0, VOCABULARY, (batch, index + 1 + words)),
        IMAGE_START,
        index,
        torch.randn(batch, 200),
    )


def noisy(policy: Policy, batch: int, draws: int = DRAWS) -> tuple[Tensor, Tensor]:
    shape = batch, draws, policy.config.chunk
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, 200, generator=generator), torch.randint(0, 1001, shape, generator=generator)


def backward(policy: Policy, velocity: Tensor) -> Tensor:
    policy.zero_grad(set_to_none=True)
    velocity.square().mean().backward()
    return velocity.detach()


def packed(policy: Policy, prefixes: list[Prefix]) -> Callable[[], Tensor]:
    actions, bucket = noisy(policy, sum(len(prefix.state) for prefix in prefixes))
    return lambda: backward(policy, policy.flows(policy.encode_prefixes(prefixes), actions, bucket).velocity)


def passes(policy: Policy, prefixes: list[Prefix]) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    sizes = [len(prefix.state) for prefix in prefixes]
    actions, bucket = (whole.split(sizes) for whole in noisy(policy, sum(sizes)))

    def apart() -> Tensor:
        rows = zip(prefixes, actions, bucket, strict=True)
        return backward(policy, torch.cat([policy.velocity(policy.encode_prefix(*p), x, t) for p, x, t in rows]))

    return apart, packed(policy, prefixes)


def padded(policy: Policy, prefixes: list[Prefix]) -> Callable[[], Tensor]:
    """What padding costs: every prefix as long as the longest. Its results are of no use, masks come on top."""
    longest = max(prefix.token_ids.shape[1] for prefix in prefixes)
    ids = torch.cat([F.pad(prefix.token_ids, (0, longest - prefix.token_ids.shape[1])) for prefix in prefixes])
    pixels, state = (torch.cat([getattr(p, name) for p in prefixes]) for name in ("pixel_values", "state"))
    return packed(policy, [Prefix(pixels, ids, IMAGE_START, prefixes[0].state_index, state)])


def prefix_once(policy: Policy, prefix: Prefix) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    actions, bucket = noisy(policy, len(prefix.state))

    def each() -> Tensor:
        parts = zip(actions.split(1, 1), bucket.split(1, 1), strict=True)
        return backward(policy, torch.cat([policy.velocity(policy.encode_prefix(*prefix), x, t) for x, t in parts], 1))

    return each, packed(policy, [prefix])


def averages(policy: Policy) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    loop, together = copy.deepcopy(policy), copy.deepcopy(policy)
    newest = create_policy(policy.config, seed=5)

    @torch.no_grad()
    def one_by_one() -> Tensor:
        for average, new in zip(loop.parameters(), newest.parameters(), strict=True):
            average.lerp_(new, 0.1)
        return loop.action_encoder.W2.weight.detach().clone()

    def at_once() -> Tensor:
        follow(together, newest, 0.9)
        return together.action_encoder.W2.weight.detach().clone()

    return one_by_one, at_once


def projections(policy: Policy) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    attention, x = policy.language_model.stack[0].und.self_attn, torch.randn(32, 40, policy.config.decoder.und.width)
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]

    def three() -> Tensor:
        return backward(policy, torch.cat([F.linear(x, weight) for weight in weights], -1))

    def one() -> Tensor:
        return backward(policy, F.linear(x, torch.cat(weights)))

    return three, one


def attend_in_all_ways(count: int, lengths: Sequence[int], heads: int, size: int) -> None:
    """Print what causal attention of `count` sequences of each length takes, forward and backward, way by way."""
    groups = [torch.randn(count, heads, length, size) for length in lengths]
    singles = [one for group in groups for one in group.split(1)]
    longest, tokens = max(lengths), count * sum(lengths)
    row = torch.cat([one[0] for one in singles], 1)[None]
    owner = torch.repeat_interleave(torch.arange(len(singles)), torch.tensor([one.shape[2] for one in singles]))
    mask = (owner[:, None] == owner) & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    ways = {
        "by group": (groups, None),
        "sequence by sequence": (singles, None),
        "padded": ([torch.cat([F.pad(group, (0, 0, 0, longest - group.shape[2])) for group in groups])], None),
        "one row, masked": ([row], mask),
    }
    print(f"attention, {count} of each of {[*lengths]} tokens, {heads} heads x {size}:")
    for name, (batches, allowed) in ways.items():
        print(f"  {name}: {min(attend(batches, allowed) for _ in range(REPEATS)) * 1e3:.1f} ms")


def attend(batches: Sequence[Tensor], mask: Tensor | None) -> float:
    """Seconds of this thread for batches (B, heads, tokens, size), one after the other."""
    leaves = [batch.detach().requires_grad_() for batch in batches]
    began = time.thread_time()
    for x in leaves:
        F.scaled_dot_product_attention(x, x, x, attn_mask=mask, is_causal=mask is None).sum().backward()
    return time.thread_time() - began


if __name__ == "__main__":
    main()
