"""Upcycling: a dense checkpoint becomes one with experts, with adapters, or both, that at first acts exactly as it did.

Every expert starts as the shared feed-forward of its layer; chosen weights sum to 1, so a mixture of copies is the
original. Adapters start at zero. Routers start small and random, so that different situations meet different experts.

    python -m onbeat.training.upcycle CHECKPOINT OUT --experts 4 --top-k 2 --foundation-layers 8 --adapters

Source: arXiv 2212.05055, sparse upcycling; docs/decisions/0029-mixture-of-flow.md.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from onbeat.embodiment.errors import OnbeatError
from onbeat.training.checkpoint import companions, load_checkpoint, save_checkpoint
from onbeat.training.config import ROUTINGS, ExpertsConfig, PolicyConfig
from onbeat.training.model.policy import Policy, create_policy

GEN = "language_model.layers.{layer}.gen"


class UpcycleError(OnbeatError):
    """The checkpoint has experts already, nothing is asked for, or OUT holds something."""


def upcycle(policy: Policy, experts: ExpertsConfig | None, *, adapters: bool = False, seed: int = 0) -> Policy:
    """A policy of its own weights that answers as `policy` does. experts: None to add none. Raises UpcycleError.

    seed: of the routers' first weights.
    """
    config = _extend(policy.config, experts, adapters=adapters)
    grown = create_policy(config, seed)  # for routers and adapters; all else is replaced
    dense = {name: tensor.detach().clone() for name, tensor in policy.state_dict().items()}
    state = {**grown.state_dict(), **dense}
    if experts is not None:
        state |= dict(_copies(config, dense))
    grown.load_state_dict(state)
    return grown


def _extend(config: PolicyConfig, experts: ExpertsConfig | None, *, adapters: bool) -> PolicyConfig:
    if experts is None and not adapters:
        raise UpcycleError("nothing to add: ask for experts, for adapters, or both")
    if experts is not None and config.decoder.experts is not None:
        raise UpcycleError("this checkpoint has experts already: start from the dense one")
    decoder = config.decoder if experts is None else replace(config.decoder, experts=experts)
    return replace(config, decoder=decoder, adapters=adapters or config.adapters)


def _copies(config: PolicyConfig, dense: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every expert's weights: those of its layer's shared feed-forward."""
    experts = config.decoder.experts
    assert experts is not None
    for layer in range(experts.foundation_layers, config.decoder.layers):
        stream = GEN.format(layer=layer)
        for part in ("gate_proj", "up_proj", "down_proj"):
            for index in range(experts.count):
                yield f"{stream}.experts.{index}.{part}.weight", dense[f"{stream}.mlp.{part}.weight"]


def upcycle_folder(
    source: Path, target: Path, experts: ExpertsConfig | None, *, adapters: bool = False, seed: int = 0
) -> Policy:
    """`upcycle` a checkpoint folder into an empty or new one, tokenizer and statistics included."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UpcycleError(f"{target} already exists: name another folder")
    policy = upcycle(load_checkpoint(source), experts, adapters=adapters, seed=seed)
    for path in companions(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    save_checkpoint(policy, target)
    return policy


def main(argv: Sequence[str] | None = None) -> int:
    """Upcycle; returns 0, or 1 when it could not be done."""
    arguments = parse_arguments(argv)
    experts = None
    try:
        if arguments.experts:
            experts = ExpertsConfig(
                arguments.foundation_layers, arguments.experts, arguments.top_k, arguments.routing, arguments.balance
            )
        policy = upcycle_folder(
            arguments.checkpoint, arguments.out, experts, adapters=arguments.adapters, seed=arguments.seed
        )
    except OnbeatError as problem:
        print(f"onbeat.training.upcycle: {problem}", file=sys.stderr)
        return 1
    print(f"{arguments.out}: {sum(weight.numel() for weight in policy.parameters()) / 1e6:.1f} M parameters")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Exits with code 2 on wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m onbeat.training.upcycle",
        description="Add experts or adapters to a dense checkpoint; before training it acts as it did.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder")
    parser.add_argument("out", type=Path, help="checkpoint folder to write")
    parser.add_argument("--experts", type=int, default=0, metavar="E", help="experts of a layer, 0 for none")
    parser.add_argument("--top-k", type=int, default=2, metavar="K", help="experts that a chunk takes in each layer")
    parser.add_argument("--foundation-layers", type=int, default=8, metavar="N", help="layers that stay shared")
    parser.add_argument("--routing", choices=ROUTINGS, default="observation", help="who chooses")
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    parser.add_argument("--adapters", action="store_true", help="add an adapter per unified slot")
    parser.add_argument("--seed", type=int, default=0, help="of the routers' first weights")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
