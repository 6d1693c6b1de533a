"""The figures of 0029: what a mixture costs in a training step and in a chunk, and what upcycling leaves unchanged.

    python docs/decisions/0029_mixture_of_flow.py

The network is of the size of training/configs/so101_lift.toml; everything on one thread, the variants take turns.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from onbeat.export.graphs import write_graphs
from onbeat.export.prefix_graph import PrefixLayout
from onbeat.runtime.engine import PolicyInputs
from onbeat.runtime.onnx_engine import OnnxEngine
from onbeat.training.config import ExpertsConfig
from onbeat.training.model.experts import Experts, Route
from onbeat.training.model.policy import Policy, create_policy
from onbeat.training.recipe import Network
from onbeat.training.torch_engine import build_engine
from onbeat.training.upcycle import upcycle

BATCH, DRAWS, REPEATS = 16, 4, 11
TOKENS, IMAGE_START, STATE_AT = 60, 4, 45
VARIANTS = {
    "dense": None,
    "E 4, K 1": ExpertsConfig(1, 4, 1),
    "E 4, K 2": ExpertsConfig(1, 4, 2),
    "E 16, K 2": ExpertsConfig(1, 16, 2),
    "E 4, K 2, by token": ExpertsConfig(1, 4, 2, "token"),
}


def main() -> None:
    torch.set_num_threads(1)
    dense = create_policy(Network(system_message="").configure(400), seed=0)
    policies = {name: upcycle(dense, experts) if experts else dense for name, experts in VARIANTS.items()}
    print_table("training step, forward and backward of the actions, ms", {n: stepper(p) for n, p in policies.items()})
    with patch.object(Experts, "forward", all_experts):
        name = "E 16, K 2"
        print_table("the same, every expert computed for every row, ms", {name: stepper(policies[name])})
    with tempfile.TemporaryDirectory() as folder:
        engines = {name: export(policy, Path(folder, str(k))) for k, (name, policy) in enumerate(policies.items())}
        print_table("flow of one chunk in ONNX Runtime, ms", {n: asker(e) for n, e in engines.items()})
        reference = asker(engines["dense"])()
        for name, engine in engines.items():
            print(f"{name:<20} {np.abs(asker(engine)() - reference).max():.1e} from the dense one")


def print_table(title: str, runs: Mapping[str, Callable[[], object]]) -> None:
    print(f"\n{title}: smallest / median of {REPEATS}")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    for name, spent in times.items():
        print(f"{name:<20} {min(spent):8.1f} {float(np.median(spent)):8.1f}")


def stepper(policy: Policy) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(BATCH, 2, 3, 112, 112, generator=generator)
    ids = torch.randint(0, 400, (BATCH, TOKENS), generator=generator)
    with torch.no_grad():
        cache = policy.encode_prefix(pixels, ids, IMAGE_START, STATE_AT, torch.randn(BATCH, 200, generator=generator))
    actions = torch.randn(BATCH, DRAWS, policy.config.chunk, 200, generator=generator)
    bucket = torch.full(actions.shape[:3], 300)

    def step() -> None:
        policy.zero_grad(set_to_none=True)
        policy.velocity(cache, actions, bucket).square().mean().backward()

    return step


def all_experts(self: Experts, x: Tensor, route: Route) -> Tensor:
    """What grouping saves: every expert for every row."""
    weights = torch.zeros_like(route.logits).scatter(1, route.chosen, route.weights)
    parts = [weights[:, k, None, None] * expert(x) for k, expert in enumerate(self)]
    return torch.stack(parts).sum(0)


def export(policy: Policy, folder: Path) -> OnnxEngine:
    folder.mkdir()
    engine = build_engine(policy, views=2)
    write_graphs(engine.policy, PrefixLayout(2, IMAGE_START, STATE_AT), engine.spec.sampler, folder)
    where = {"image_start": IMAGE_START, "state_index": STATE_AT}
    return OnnxEngine(folder / "prefix.onnx", folder / "flow.onnx", engine.spec, **where)


def asker(engine: OnnxEngine) -> Callable[[], np.ndarray]:
    draw, side = np.random.default_rng(0), engine.spec.image_size
    views = draw.integers(0, 256, (2, side, side, 3), np.uint8)
    ids = draw.integers(0, 400, TOKENS)
    state = draw.standard_normal(200).astype(np.float32)
    cache = engine.prefix(PolicyInputs(views, ids, IMAGE_START, STATE_AT, state))
    noise = draw.standard_normal((engine.spec.sampler.iterations, engine.spec.chunk, 200)).astype(np.float32)
    return lambda: engine.flow(cache, noise).actions


if __name__ == "__main__":
    main()
