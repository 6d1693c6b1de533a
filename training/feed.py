"""Which observations come at which step, and the thread that has them ready: the same step gives the same batch always.

B observations of a step on all processes together.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

from onbeat.training.batch import Group, group_samples
from onbeat.training.data.sample import Draw, Sample, Source
from onbeat.training.parallel import share

AHEAD = 2  # steps that are read while one is computed


class Order(Protocol):
    """The observations of every step, a function of the step alone."""

    def draws(self, step: int) -> Sequence[Draw]:
        """(B,) of them."""
        ...


class EpochOrder:
    """One source, every observation once per epoch, in an order of the epoch's own."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self.count, self.batch, self.seed = count, min(batch, count), seed

    def draws(self, step: int) -> Sequence[Draw]:
        """Whole batches only: what is left of an epoch does not come in it."""
        per_epoch = self.count // self.batch
        order = torch.randperm(self.count, generator=stream(self.seed, -2 - step // per_epoch))
        start = (step % per_epoch) * self.batch
        return [Draw(0, index) for index in order[start : start + self.batch].tolist()]


class Feed:
    """Batches by step. loaders: threads that read ahead; 0 reads when asked."""

    def __init__(self, sources: Sequence[Source], order: Order, seed: int, loaders: int = 0) -> None:
        self.sources, self.order, self.seed = sources, order, seed
        self._pool = ThreadPoolExecutor(loaders, "samples") if loaders else None
        self._coming: dict[int, list[Future[Sample]]] = {}

    def embodiments(self, step: int) -> list[str]:
        """The robot of each observation of the whole batch: (B,)."""
        return [self.sources[draw.source].embodiment for draw in self.order.draws(step)]

    def groups(self, step: int) -> list[Group]:
        """This process's share of the batch."""
        rows = share(torch.arange(len(self.order.draws(step))))
        return group_samples(self._samples(step), rows)

    def _samples(self, step: int) -> list[Sample]:
        if self._pool is None:
            return [self._read(*place) for place in self._places(step)]
        for coming in range(step, step + 1 + AHEAD):
            if coming not in self._coming:
                self._coming[coming] = [self._pool.submit(self._read, *place) for place in self._places(coming)]
        samples = [future.result() for future in self._coming.pop(step)]
        self._coming = {coming: futures for coming, futures in self._coming.items() if coming > step}
        return samples

    def _places(self, step: int) -> Iterator[tuple[Draw, int, int]]:
        draws = self.order.draws(step)
        return ((draws[row], step, row) for row in share(torch.arange(len(draws))).tolist())

    def _read(self, draw: Draw, step: int, row: int) -> Sample:
        generator = np.random.default_rng((self.seed, step, row))
        return self.sources[draw.source].sample(draw.sample, generator)


SEED_STRIDE = 1_000_003  # a prime, so that the streams of neighbouring seeds do not meet


def stream(seed: int, number: int) -> torch.Generator:
    """A random generator of its own for each number: steps from 0, epochs and the rest below."""
    return torch.Generator().manual_seed((seed * SEED_STRIDE + number) % 2**63)
