"""Memory of a training step per GPU, for any network on any number of GPUs, without allocating it.

A step is taken on tensors that have shapes and no data, and every allocation and release is counted; what is cut among
GPUs is divided. How far that is from what a process really takes: docs/decisions/0032-scale.md.
"""

import argparse
import copy
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from onbeat.embodiment.errors import run_module
from onbeat.training.config import PolicyConfig
from onbeat.training.config_file import load_config
from onbeat.training.model.policy import Policy, Prefix, count_parameters, create_policy
from onbeat.training.parallel import follow, sharded_parts
from onbeat.training.recipe import load_recipe
from onbeat.training.recompute import recompute_layers

FLOAT = 4  # bytes: weights, gradients, moments and the average are float32 always
MIB = 2**20
WORDLESS = 8  # rows of an embedding that does not count
FEW = 2  # layers of a stack that are gone through one by one
IMAGE_START = 20
UNIFIED = 200


@dataclass(frozen=True, slots=True)
class Load:
    """What one GPU does in a step: observations, draws of each, views of each, words of the prompt.

    recompute: gradient checkpointing. half: matrix products in bfloat16.
    """

    batch: int
    draws: int
    views: int = 2
    words: int = 60
    recompute: bool = False
    half: bool = False


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU. gathered: whole weights that are there while they are used, where they are cut among GPUs.

    activations: the most that forward and backward hold at once, without gradients. On one GPU gradients take the place
    of activations one after the other, and `gradients` is what they are more at the end.
    """

    weights: int
    moments: int
    average: int
    gradients: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        """At the worst moment."""
        return self.weights + self.moments + self.average + self.gradients + self.gathered + self.activations


def estimate(config: PolicyConfig, passing: int, gpus: int) -> Memory:
    """Memory of each of some GPUs, when every weight is trained. passing: see `passing_peak`."""
    policy = shapes_of(config)
    weights = _bytes(policy.parameters())
    return Memory(
        weights=_share(weights, gpus),
        moments=_share(2 * weights, gpus),
        average=_share(weights, gpus),
        gradients=max(0, weights - passing) if gpus == 1 else _share(weights, gpus),
        gathered=0 if gpus == 1 else gathered_bytes(policy),
        activations=passing,
    )


def shapes_of(config: PolicyConfig) -> Policy:
    """The network on the meta device: shapes without memory."""
    with torch.device("meta"):
        return Policy(config)


def gathered_bytes(policy: Policy) -> int:
    """Whole weights of FSDP2: the policy's own all along, two layers, one of them on its way, a layer's gradients."""
    *layers, own = [_bytes(parameters) for parameters in sharded_parts(policy)]
    return own + 3 * max(layers)


def passing_peak(config: PolicyConfig, load: Load) -> int:
    """Bytes that forward and backward need beside weights and gradients, from few layers: each adds the same.

    The worst moment is on the way forward, when the way back begins, or at its end, when the embedding's gradient is
    made: each is continued by itself, as which of them is the worst depends on the depth.
    """
    vision, decoder = config.vision.depth, config.decoder.layers
    few = min(vision, FEW), min(decoder, FEW)
    least = counted_peaks(_cut(config, *few, WORDLESS), load)
    deeper = counted_peaks(_cut(config, few[0] + 1, few[1], WORDLESS), load) if vision > few[0] else least
    longer = counted_peaks(_cut(config, few[0], few[1] + 1, WORDLESS), load) if decoder > few[1] else least
    beyond = vision - few[0], decoder - few[1]
    ways = [a + beyond[0] * (v - a) + beyond[1] * (d - a) for a, v, d in zip(least, deeper, longer, strict=True)]
    return max(*ways, *counted_peaks(_cut(config, *few, config.decoder.vocabulary), load))


def counted_peaks(config: PolicyConfig, load: Load) -> tuple[int, int]:
    """On the way forward and on the way back of this depth, every allocation counted. Gradients leave once made."""
    with FakeTensorMode():
        policy, allocations = Policy(config), Allocations()
        for parameter in policy.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        if load.recompute:
            recompute_layers(policy)
        half = torch.autocast("cpu", torch.bfloat16) if load.half else nullcontext()
        with allocations:
            with half:
                loss = _forward(policy, load)
            forward, allocations.peak = allocations.peak, allocations.live
            loss.backward()
    return forward, allocations.peak


def _cut(config: PolicyConfig, vision: int, decoder: int, vocabulary: int) -> PolicyConfig:
    tower, dense = replace(config.vision, layers=vision, select_layer=-1), as_dense(config)
    return replace(dense, vision=tower, decoder=replace(dense.decoder, layers=decoder, vocabulary=vocabulary))


def as_dense(config: PolicyConfig) -> PolicyConfig:
    """A network without routes, which depend on data, that computes as much: K experts are one, K times as wide."""
    experts, decoder = config.decoder.experts, config.decoder
    if experts is None:
        return config
    gen = replace(decoder.gen, ffn_width=decoder.gen.ffn_width * experts.top_k)
    return replace(config, decoder=replace(decoder, gen=gen, experts=None))


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on, until they are gone. peak: the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage, 0)  # older than the counting, or counted already
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._note(storage)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size


def memory_lines(config: PolicyConfig, load: Load, gpus: Sequence[int] = (1, 4, 8)) -> list[str]:
    """A table for people: a row per number of GPUs, without and with gradient checkpointing."""
    heads = ("GPUs", "recompute", *Memory.__dataclass_fields__, "total")
    lines = [" ".join(f"{head:>11}" for head in heads) + "  MiB per GPU"]
    for recompute in (False, True):
        passing = passing_peak(config, replace(load, recompute=recompute))
        for count in gpus:
            memory = estimate(config, passing, count)
            cells = [f"{size / MIB:11,.0f}" for size in (*astuple(memory), memory.total)]
            lines.append(" ".join([f"{count:>11} {'yes' if recompute else 'no':>11}", *cells]))
    return lines


def part_lines(config: PolicyConfig) -> list[str]:
    """Parameters of each part, in millions."""
    counts = count_parameters(shapes_of(config))
    return [f"{part:>12} {count / 1e6:10.1f} M" for part, count in counts.items() if count]


def measured_peak(config: PolicyConfig, load: Load) -> int:
    """Bytes by which this process grew while it really took steps: the kernel's word. Linux; in a fresh process."""
    take_steps(_cut(config, 1, 1, WORDLESS), replace(load, batch=1))  # loads the libraries, whose pages count
    before = _resident("VmRSS")
    take_steps(config, load)
    return _resident("VmHWM") - before


def take_steps(config: PolicyConfig, load: Load, steps: int = 2) -> tuple[Policy, float]:
    """A policy after some optimiser steps on nothing, the first of which makes the moments, and the last loss."""
    policy, loss = create_policy(config, seed=0), torch.zeros(())
    average = copy.deepcopy(policy).requires_grad_(False)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=1e-4, fused=True)
    if load.recompute:
        recompute_layers(policy)
    for _ in range(steps):
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if load.half else nullcontext():
            loss = _forward(policy, load)
        loss.backward()
        optimiser.step()
        follow(average, policy, 0.99)
    return policy, loss.item()


def _resident(kind: str) -> int:
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows[kind].split()[0]) * 1024


def read_shape(path: Path, vocabulary: int) -> PolicyConfig:
    """The network of a recipe, or of a folder with a checkpoint's config.json. vocabulary: of a recipe's tokenizer."""
    return load_config(path) if path.is_dir() else load_recipe(path).network.configure(vocabulary)


def main(argv: Sequence[str] | None = None) -> int:
    """Print parameters and memory; returns the exit code."""
    options = _parser().parse_args(argv)
    config = read_shape(options.config, options.vocabulary)
    load = Load(options.batch, options.draws, options.views, options.words, half=options.half)
    precision = "bfloat16" if load.half else "float32"
    print("\n".join(part_lines(config)))
    print(f"\n{load.batch} observations a GPU x {load.draws} draws, {load.views} views, products in {precision}")
    print("\n".join(memory_lines(config, load, options.gpus)))
    for recompute in (False, True) if options.measure else ():
        measured = _in_a_fresh_process(config, replace(load, recompute=recompute))
        print(f"really taken on this CPU, recompute {'yes' if recompute else 'no'}: {measured / MIB:,.0f} MiB")
    return 0


def _in_a_fresh_process(config: PolicyConfig, load: Load) -> int:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measured_peak, config, load).result()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m onbeat.training.memory",
        description="Memory per GPU of a training step, reckoned without allocating it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="recipe (TOML), or a folder with config.json")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 4, 8], help="numbers of GPUs")
    parser.add_argument("--batch", type=int, default=8, help="observations per GPU and step")
    parser.add_argument("--draws", type=int, default=4, help="draws of each observation")
    parser.add_argument("--views", type=int, default=2, help="images of each observation")
    parser.add_argument("--words", type=int, default=60, help="text tokens of a prompt")
    parser.add_argument("--vocabulary", type=int, default=400, help="rows of the embedding, where a recipe is given")
    parser.add_argument("--measure", action="store_true", help="take steps on the CPU too, and tell how far it grew")
    parser.add_argument("--half", action="store_true", help="matrix products in bfloat16")
    return parser


def _forward(policy: Policy, load: Load) -> Tensor:
    vision, chunk = policy.config.vision, policy.config.chunk
    state_index = IMAGE_START + load.views * vision.tokens_per_view + 1
    prefix = Prefix(
        torch.zeros(load.batch, load.views, 3, vision.image_size, vision.image_size),
        torch.zeros(load.batch, state_index + 1 + max(load.words - IMAGE_START - 1, 1), dtype=torch.long),
        IMAGE_START,
        state_index,
        torch.zeros(load.batch, UNIFIED),
    )
    noisy = torch.zeros(load.batch, load.draws, chunk, UNIFIED)
    bucket = torch.zeros(noisy.shape[:-1], dtype=torch.long)
    refine = policy.mpg.project if policy.mpg else None
    velocity = policy.flows(policy.encode_prefixes([prefix]), noisy, bucket, refine).velocity
    return (velocity.float() - noisy).square().sum()


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(parameters: Iterable[Tensor]) -> int:
    return FLOAT * sum(parameter.numel() for parameter in parameters)


def _share(size: int, gpus: int) -> int:
    return -(-size // gpus)


if __name__ == "__main__":
    raise SystemExit(run_module("onbeat.training.memory", main))
