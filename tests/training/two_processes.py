"""What test_parallel.py runs by torchrun, and alone: a small network takes steps, in right ways and in wrong ones."""

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onbeat.training import parallel
from onbeat.training.checkpoint import save_checkpoint
from onbeat.training.config import DecoderConfig, ExpertsConfig, GateConfig, PolicyConfig, StreamConfig, VisionConfig
from onbeat.training.model.experts import balance_loss
from onbeat.training.model.policy import Policy, Prefix
from onbeat.training.random_checkpoint import random_policy

EARLY, LATER, STEPS = 5, 7, 20
VOCABULARY, CHUNK, DRAWS, LIMIT, RATE = 40, 4, 2, 0.5, 3e-4
GROUPS = ((1, 2, 3), (2, 1, 5), (1, 1, 9), (1, 2, 6))  # observations, views, words: 5 in all, so 3 for one process
MISTAKES = ("local-count", "local-norm", "untouched-moves")


class Step(NamedTuple):
    """One observation each: its prefix and what is asked. counted: very different numbers of entries."""

    prefixes: list[Prefix]
    noisy: Tensor
    bucket: Tensor
    target: Tensor
    counted: Tensor


def config(*, key_bias: bool = False) -> PolicyConfig:
    """Experts, gate, adapters, small. key_bias: of the vision tower, whose gradient is nothing but rounding."""
    experts = ExpertsConfig(1, 5, 1, "observation")
    decoder = DecoderConfig(StreamConfig(24, 32), StreamConfig(16, 24), 2, 4, 2, 8, VOCABULARY, experts=experts)
    vision = VisionConfig(16, 32, 2, 2, 28, qkv_bias=key_bias)
    return PolicyConfig(vision, decoder, chunk=CHUNK, gate=GateConfig(True), adapters=True)


def step_of(config: PolicyConfig, number: int, dtype: torch.dtype = torch.float32) -> Step:
    generator = torch.Generator().manual_seed(number)
    prefixes = [prefix for sizes in GROUPS for prefix in random_prefixes(config, *sizes, generator)]
    shape = len(prefixes), DRAWS, CHUNK, 200
    noisy, target = torch.randn(2, *shape, generator=generator).to(dtype)
    share = torch.linspace(0.05, 0.9, len(prefixes))[:, None, None, None]
    counted = torch.rand(shape, generator=generator) < share
    bucket = torch.randint(0, 1001, shape[:3], generator=generator)
    prefixes = [p._replace(pixel_values=p.pixel_values.to(dtype), state=p.state.to(dtype)) for p in prefixes]
    return Step(prefixes, noisy, bucket, target, counted)


def random_prefixes(
    config: PolicyConfig, count: int, views: int, words: int, generator: torch.Generator
) -> list[Prefix]:
    side, index = config.vision.image_size, 3 + views * config.vision.tokens_per_view
    return [
        Prefix(
            torch.randn(1, views, 3, side, side, generator=generator),
            torch.randint(0, VOCABULARY, (1, index + 1 + words), generator=generator),
            2,
            index,
            torch.randn(1, 200, generator=generator),
        )
        for _ in range(count)
    ]


class Run:
    """Weights, average and optimiser. mistake: what is done wrongly, None for nothing."""

    def __init__(self, policy: Policy, mistake: str | None = None) -> None:
        self.policy, self.mistake, self.losses = policy, mistake, list[list[float]]()
        self.dtype = next(policy.parameters()).dtype
        self.policy.vit_model.embeddings.requires_grad_(False)
        self.policy.language_model.layers[0].requires_grad_(False)
        self.average = copy.deepcopy(policy).requires_grad_(False)
        parallel.shard(self.policy)
        parallel.shard(self.average)
        trained = [p for p in policy.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.1, fused=True)

    def advance(self, step: Step) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.loss(step)
        loss.backward()
        if self.mistake != "untouched-moves":
            parallel.leave_untouched(self.policy)
        norm = self.clip()
        self.optimiser.step()
        parallel.follow(self.average, self.policy, 0.9)
        self.losses.append([float(parallel.global_sum(loss)), float(norm)])

    def loss(self, step: Step) -> Tensor:
        """This process's part of the mean over the whole batch."""
        rows = parallel.share(torch.arange(len(step.prefixes)))
        caches = self.policy.encode_prefixes([step.prefixes[row] for row in rows])
        assert self.policy.mpg is not None
        flow = self.policy.flows(caches, step.noisy[rows], step.bucket[rows], self.policy.mpg.project)
        counted = step.counted[rows]
        error = ((flow.velocity - step.target[rows]).square() * counted).sum()
        own = counted.sum()
        count = own * parallel.world() if self.mistake == "local-count" else parallel.global_sum(own)
        assert flow.routing is not None
        use = parallel.global_sum(flow.routing.use.sum(1)) / len(step.prefixes)
        return error / count + 0.01 * balance_loss(flow.routing, use).sum() / len(step.prefixes)

    def clip(self) -> Tensor:
        if self.mistake != "local-norm":
            return parallel.clip_gradients(self.policy.parameters(), LIMIT)
        shares = [nn.Parameter(torch.zeros_like(g)) for g in self.gradients()]
        for share, gradient in zip(shares, self.gradients(), strict=True):
            share.grad = gradient
        return nn.utils.clip_grad_norm_(shares, LIMIT)

    def gradients(self) -> list[Tensor]:
        return [parallel._local(p.grad) for p in self.policy.parameters() if p.grad is not None]

    def state(self) -> dict[str, Tensor]:
        """All that a step changes, under names that do not depend on the number of processes."""
        kept = self.optimiser.state
        moments = {f"{name}.{kind}": t for name, p in self.trained() for kind, t in kept.get(p, {}).items()}
        return {**self.weights(), **moments}

    def weights(self) -> dict[str, Tensor]:
        parts = {"policy": self.policy, "average": self.average}
        return {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}

    def likeness(self) -> dict[str, Tensor]:
        """For every tensor that `state` may have, one that is cut like it."""
        moments = {f"{name}.{kind}": p for name, p in self.trained() for kind in ("exp_avg", "exp_avg_sq")}
        return {**self.weights(), **moments, **{f"{name}.step": torch.zeros(()) for name, _ in self.trained()}}

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"moments.{name}", p) for name, p in self.policy.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.weights().items():
            tensor.copy_(state[name])
        for name, p in self.trained():
            kinds = [kind for kind in ("exp_avg", "exp_avg_sq", "step") if f"{name}.{kind}" in state]
            self.optimiser.state[p] = {kind: state[f"{name}.{kind}"] for kind in kinds}


def run_steps(run: Run, numbers: Sequence[int]) -> Run:
    for number in numbers:
        run.advance(step_of(run.policy.config, number, run.dtype))
    return run


def write(run: Run, out: Path, name: str) -> None:
    tensors = parallel.gather(run.state())
    if parallel.rank() == 0:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, out / f"{name}.safetensors")
        (out / f"{name}.json").write_text(json.dumps(run.losses))


def fresh(mistake: str | None = None) -> Run:
    return Run(random_policy(config(), seed=2), mistake)


def precise(out: Path) -> None:
    """All steps with a key bias in the vision tower, in float64, where rounding makes no step."""
    write(run_steps(Run(random_policy(config(key_bias=True), seed=2).double()), range(STEPS)), out, "precise")


def straight(out: Path) -> None:
    """All steps, written at three marks, once in shares; the average as a published checkpoint at the end."""
    run = run_steps(fresh(), range(EARLY))
    write(run, out, "early")
    parallel.save_shares(run.state(), out / "shares")
    write(run_steps(run, range(EARLY, LATER)), out, "later")
    write(run_steps(run, range(LATER, STEPS)), out, "last")
    weights = parallel.gather(run.average.state_dict())
    if parallel.rank() == 0:
        whole = Policy(config())
        whole.load_state_dict(weights)
        save_checkpoint(whole, out / "checkpoint")


def resumed(source: Path, *, shares: bool) -> Run:
    """From early to later, from what a run left, on however many processes that was."""
    run = fresh()
    like = run.likeness()
    gathered = {} if shares else load_file(source / "early.safetensors")
    run.restore(parallel.load_shares(source / "shares", like) if shares else parallel.spread(gathered, like))
    return run_steps(run, range(EARLY, LATER))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("source", type=Path, help="folder that `straight` filled before")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with parallel.joined():
        straight(options.out)
        precise(options.out)
        write(resumed(options.source, shares=True), options.out, "from-shares")
        write(resumed(options.source, shares=False), options.out, "from-gathered")
        for mistake in MISTAKES:
            write(run_steps(fresh(mistake), range(EARLY)), options.out, mistake)


if __name__ == "__main__":
    main()
