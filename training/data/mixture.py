"""How much of what is trained on: shares of kinds, robots thinned out, simulation capped; an order that keeps to it.

The plan is arithmetic on numbers of frames, printed before anything is trained. Over an epoch every source comes as
often as the plan says, to the sample, and evenly: of S sources, after any number of draws, one with share p is within
1 + p S of it.

N samples of a source, E draws of an epoch, B of a step on all processes together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from onbeat.embodiment.slots import suggest
from onbeat.training.data.layout import DataError
from onbeat.training.data.sample import KINDS, Draw, Source

SIMULATION, ROBOT = "simulation", "robot"
CAP = 0.26  # of all robot frames: the share of simulation in UniHand-2.0, arXiv 2601.12993


class MixtureError(DataError):
    """Shares that cannot be had from these sources."""


@dataclass(frozen=True, slots=True)
class Proportions:
    """What is asked for. kinds: weights of the kinds; without, each weighs as many frames as it keeps.

    keep: the share of its frames that a source comes with in an epoch, by the source's or the robot's name; 1 by
    default, above 1 to repeat. With weights of kinds, a source is thinned out in favour of others of its kind.
    simulation_cap: largest share of simulation among the frames of all robots, simulated or not. epoch: draws of an
    epoch; by default all frames that are kept.
    """

    kinds: Mapping[str, float] = field(default_factory=dict)
    keep: Mapping[str, float] = field(default_factory=dict)
    simulation_cap: float = CAP
    epoch: int | None = None


@dataclass(frozen=True, slots=True)
class Portion:
    """One source in the plan. kept: of its frames; draws: in an epoch."""

    name: str
    kind: str
    embodiment: str
    frames: int
    kept: int
    draws: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What an epoch is made of. asked_simulation: what its share would be without the cap."""

    portions: tuple[Portion, ...]
    simulation_cap: float
    asked_simulation: float

    @property
    def draws(self) -> int:
        return sum(portion.draws for portion in self.portions)

    @property
    def simulation(self) -> float:
        """Its share among the draws of robots."""
        return _share_of_simulation({kind: self.of_kind(kind) for kind in KINDS})

    def of_kind(self, kind: str) -> int:
        """Draws of a kind."""
        return sum(portion.draws for portion in self.portions if portion.kind == kind)

    def table(self) -> str:
        """For people, before the run."""
        head = f"{'source':<24}{'kind':<17}{'robot':<14}{'frames':>12}{'an epoch':>12}{'share':>8}{'passes':>8}"
        lines = [
            f"{p.name:<24}{p.kind:<17}{p.embodiment:<14}{p.frames:>12,}{p.draws:>12,}"
            f"{p.draws / self.draws:>8.1%}{p.draws / p.frames:>8.2f}"
            for p in self.portions
        ]
        capped = f" (capped at {self.simulation_cap:.0%}; asked {self.asked_simulation:.1%})"
        held = capped if self.asked_simulation > self.simulation_cap else f" (cap {self.simulation_cap:.0%})"
        return "\n".join([head, *lines, f"simulation among robot frames: {self.simulation:.1%}{held}"])


def plan_mixture(sources: Sequence[Source], proportions: Proportions, batch: int) -> Plan:
    """The plan of an epoch of whole batches. Raises MixtureError."""
    _check(sources, proportions)
    kept = [max(1, round(len(source) * _keep(source, proportions))) for source in sources]
    asked = {kind: sum(k for s, k in zip(sources, kept, strict=True) if s.kind == kind) for kind in KINDS}
    weights = {kind: proportions.kinds.get(kind, 0.0) if proportions.kinds else float(asked[kind]) for kind in KINDS}
    weights = {kind: weight if asked[kind] else 0.0 for kind, weight in weights.items()}
    epoch = max(1, (proportions.epoch or sum(kept)) // batch) * batch
    by_kind = _capped(weights, epoch, proportions.simulation_cap)
    draws = [0] * len(sources)
    for kind, count in by_kind.items():
        own = [i for i, source in enumerate(sources) if source.kind == kind]
        for i, part in zip(own, _apportion([kept[i] for i in own], count), strict=True):
            draws[i] = part
    portions = tuple(
        Portion(s.name, s.kind, s.embodiment, len(s), k, d) for s, k, d in zip(sources, kept, draws, strict=True)
    )
    return Plan(portions, proportions.simulation_cap, _share_of_simulation(weights))


class Mixture:
    """The draws of every step, a function of (seed, step) alone: a run may stop, go on, and be split among processes.

    Of a source that comes less than once, each epoch takes others; of one that comes more than once, every sample comes
    so often or once more. Weights (events) change that in proportion.
    """

    def __init__(self, sources: Sequence[Source], plan: Plan, *, batch: int, seed: int) -> None:
        assert plan.draws % batch == 0, (plan.draws, batch)
        self.sources, self.plan, self.batch, self.seed = sources, plan, batch, seed
        self.steps_per_epoch = plan.draws // batch
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    def draws(self, step: int) -> list[Draw]:
        """(B,) of step `step`, from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self.indices(epoch)
        rows = self._epoch[1][place * self.batch : (place + 1) * self.batch]
        return [Draw(source, sample) for source, sample in rows.tolist()]

    def indices(self, epoch: int) -> NDArray[np.int64]:
        """(E, 2): source and sample of every draw of an epoch, in order."""
        rng = np.random.default_rng((self.seed, epoch))
        drawn, times = [], []
        for number, (source, portion) in enumerate(zip(self.sources, self.plan.portions, strict=True)):
            samples = draw_samples(source.weights, portion.draws, rng)
            drawn.append(np.column_stack([np.full(len(samples), number), samples]))
            times.append((np.arange(len(samples)) + rng.random()) / max(len(samples), 1))
        order = np.argsort(np.concatenate(times), kind="stable")
        return np.concatenate(drawn)[order]


def draw_samples(weights: NDArray[np.float64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(count,) numbers of samples in random order; each comes as often as its weight says, rounded down or up.

    Systematic sampling over a random order: with equal weights, no sample twice before all came once.
    """
    order = rng.permutation(len(weights))
    reached = np.cumsum(weights[order])
    ticks = (np.arange(count) + rng.random()) * (reached[-1] / max(count, 1))
    places = np.minimum(np.searchsorted(reached, ticks, "right"), len(weights) - 1)
    return rng.permutation(order[places])


def _capped(weights: Mapping[str, float], epoch: int, cap: float) -> dict[str, int]:
    """Draws by kind. What simulation may not have goes to the robots."""
    draws = dict(zip(weights, _apportion(list(weights.values()), epoch), strict=True))
    robots = draws[SIMULATION] + draws[ROBOT]
    allowed = int(Fraction(cap).limit_denominator(10**6) * robots)  # rounded down, exactly
    if draws[SIMULATION] > allowed:
        if not weights[ROBOT]:
            raise MixtureError(
                f"simulation would be all robot frames, and at most {cap:.0%} may be: add a robot's data, or set "
                "simulation_cap = 1 to train on simulation alone"
            )
        draws |= {SIMULATION: allowed, ROBOT: robots - allowed}
    return draws


def _apportion(weights: Sequence[float], count: int) -> list[int]:
    """`count` in parts by weight, whole numbers (largest remainders)."""
    total = sum(weights)
    if not total:
        return [0] * len(weights)
    exact = [count * weight / total for weight in weights]
    parts = [int(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: parts[i] - exact[i])
    for i in by_remainder[: count - sum(parts)]:
        parts[i] += 1
    return parts


def _share_of_simulation(weights: Mapping[str, float]) -> float:
    robots = weights[SIMULATION] + weights[ROBOT]
    return weights[SIMULATION] / robots if robots else 0.0


def _keep(source: Source, proportions: Proportions) -> float:
    return proportions.keep.get(source.name, proportions.keep.get(source.embodiment, 1.0))


def _check(sources: Sequence[Source], proportions: Proportions) -> None:
    if not sources or not all(len(source) for source in sources):
        raise MixtureError("there is nothing to train on: give sources that hold samples")
    if len({source.name for source in sources}) != len(sources):
        raise MixtureError("two sources have one name: give each its own")
    named = {name for source in sources for name in (source.name, source.embodiment)}
    for name, share in proportions.keep.items():
        if name not in named:
            raise MixtureError(f"keep: there is no source or robot '{name}': {suggest(name, sorted(named))}")
        if not share > 0:
            raise MixtureError(f"keep: '{name}' is {share}: give a share above 0, or leave the source out")
    for kind, weight in proportions.kinds.items():
        if kind not in KINDS:
            raise MixtureError(f"kinds: there is no kind '{kind}': {suggest(kind, KINDS)}")
        if not weight >= 0:
            raise MixtureError(f"kinds: '{kind}' is {weight}: give a weight of 0 or more")
    if proportions.kinds and not any(proportions.kinds.get(source.kind, 0) for source in sources):
        raise MixtureError("kinds: no source is of a kind with a weight above 0: weigh one that is there")
    if not 0 <= proportions.simulation_cap <= 1:
        raise MixtureError(f"simulation_cap is {proportions.simulation_cap}: give a share between 0 and 1")
