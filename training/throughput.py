"""How fast a run trains, what of the machine's matrix products that uses, and where the rest goes."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from onbeat.training.batch import Group
from onbeat.training.feed import Feed
from onbeat.training.fit import Fit

BIG = 1536  # side of a matrix product large enough to show the machine's peak
REPEATS = 5
GIGA = 1e9

# Where time goes, by how the names of operations begin, or of what they are part of; the first kind that fits.
KINDS: Mapping[str, tuple[str, ...]] = {
    "optimiser": ("Optimizer.step", "aten::_foreach", "aten::_fused_adamw"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product"),
    "norms": ("aten::_fused_rms_norm", "aten::rms_norm", "aten::native_layer_norm", "aten::layer_norm"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::convolution", "aten::mkldnn"),
    "activations": ("aten::silu", "aten::gelu", "aten::relu", "aten::threshold"),
    "copies": ("aten::cat", "aten::copy_", "aten::clone", "aten::index", "aten::fill_", "aten::zero", "aten::slice"),
}
OTHER, WAITING, PYTHON = "other operations", "waiting for data", "Python and dispatch"

Shape = tuple[int, int, int]  # rows, inner, columns of a product


@dataclass(frozen=True, slots=True)
class Throughput:
    """Measured on this machine, in one process. samples: observations of one step.

    flops: of one step, counted. products_s: what its matrix products alone take, each at its own size; big_gflops: what
    the machine does at a large one. shares: of a step's time, by kind, summing to 1.
    """

    step_s: float
    samples: int
    flops: int
    products_s: float
    big_gflops: float
    shares: Mapping[str, float]

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.step_s

    @property
    def gflops(self) -> float:
        """Billions of operations per second, all told."""
        return self.flops / self.step_s / GIGA

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.samples_per_s:.1f} samples/s, {self.step_s * 1e3:.1f} ms a step of {self.samples}",
            f"{self.flops / self.samples / 1e6:.1f} MFLOP a sample, {self.gflops:.1f} GFLOP/s",
            f"{self.gflops / self.big_gflops:6.1%} of what a product of {BIG} x {BIG} x {BIG} reaches, "
            f"{self.big_gflops:.1f} GFLOP/s",
            f"{self.products_s / self.step_s:6.1%} of the time is what its matrix products take alone, by size",
            *(f"{share:6.1%} {kind}" for kind, share in sorted(self.shares.items(), key=lambda item: -item[1])),
        ]


def measure(fit: Fit, steps: int = 6) -> Throughput:
    """Take steps of a run, which is of no use afterwards. The first ones warm up."""
    fit.advance()
    flops, shapes = count_step(fit.advance)
    fit.feed = timed = TimedFeed(fit.feed)
    step_s = _timed(lambda: [fit.advance() for _ in range(steps)]) / steps
    waited = timed.waited_s / steps
    like = torch.empty(0, device=fit.device, dtype=getattr(torch, fit.fitting.precision))
    return Throughput(
        step_s,
        sum(len(group) for group in timed.last),
        flops,
        sum(count * product_s(shape, like) for shape, count in shapes.items()),
        2 * BIG**3 / product_s((BIG, BIG, BIG), like) / GIGA,
        shares_of_time(fit.advance, waited / step_s),
    )


class TimedFeed(Feed):
    """A feed that tells how long the trainer waited for it. last: the groups it gave last."""

    def __init__(self, feed: Feed) -> None:
        self.__dict__.update(feed.__dict__)
        self.waited_s, self.last = 0.0, list[Group]()

    def groups(self, step: int) -> list[Group]:
        """As the feed's own."""
        began = time.perf_counter()
        self.last = super().groups(step)
        self.waited_s += time.perf_counter() - began
        return self.last


def count_step(step: Callable[[], object]) -> tuple[int, Counter[Shape]]:
    """Operations of a step as PyTorch counts them, and its matrix products by size."""
    with Products() as products, FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        step()
    return counter.get_total_flops(), products.shapes


class Products(TorchDispatchMode):
    """Notes the sizes of all matrix products while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[Shape] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        operands = OPERANDS.get(func)
        if operands is not None:
            left, right = args[operands], args[operands + 1]
            batch = left.shape[0] if left.ndim == 3 else 1
            self.shapes[left.shape[-2], left.shape[-1], right.shape[-1]] += batch
        return func(*args, **(kwargs or {}))


aten = torch.ops.aten
OPERANDS: Mapping[Any, int] = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1}


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(
    grad: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def product_s(shape: Shape, like: Tensor) -> float:
    """Seconds of one matrix product of this size, the best of a few. like: of what type and where."""
    rows, inner, columns = shape
    left, right = (torch.randn_like(like.new_empty(size)) for size in ((rows, inner), (inner, columns)))
    out = like.new_empty(rows, columns)
    return min(_timed(lambda: torch.mm(left, right, out=out)) for _ in range(REPEATS))


class Operation(Protocol):
    """What is read of a profiler's event. cpu_parent: the operation that it is part of."""

    @property
    def name(self) -> str: ...
    @property
    def cpu_parent(self) -> "Operation | None": ...


# On a GPU the time of an operation is that of its kernels.
TRACED = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
SPENT = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"


def shares_of_time(step: Callable[[], object], waiting: float) -> dict[str, float]:
    """What each kind of operation takes of a step, by itself. waiting: the share that went to waiting for data."""
    with profile(activities=TRACED) as profiler:
        whole_us = _timed(step) * 1e6
    spent: Counter[str] = Counter()
    for event in profiler.events() or ():
        if event.name.startswith(("aten::", "Optimizer.step")):
            spent[kind_of(event)] += getattr(event, SPENT)
    shares = {kind: (1 - waiting) * spent[kind] / whole_us for kind in (*KINDS, OTHER)}
    return {**shares, WAITING: waiting, PYTHON: max(0.0, 1 - waiting - sum(shares.values()))}


def kind_of(event: Operation) -> str:
    """The first kind of the table that an operation, or anything it is part of, belongs to."""
    names, at = [event.name], event.cpu_parent
    while at is not None:
        names.append(at.name)
        at = at.cpu_parent
    return next((kind for kind, begins in KINDS.items() if any(name.startswith(begins) for name in names)), OTHER)


def _timed(run: Callable[[], object]) -> float:
    """Seconds, all kernels that it started ended."""
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
