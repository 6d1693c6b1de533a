"""The mixture: what is planned is what is drawn, simulation stays under its cap, and a step is always the same."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from onbeat.training.data.mixture import Mixture, MixtureError, Proportions, draw_samples, plan_mixture
from onbeat.training.data.sample import Kind, Sample

BATCH = 16


@dataclass
class Fake:
    """A source of so many frames, and no samples."""

    name: str
    kind: Kind
    count: int
    embodiment: str = "so101"
    boosts: dict[int, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.count

    @property
    def weights(self) -> NDArray[np.float64]:
        weights = np.ones(self.count)
        weights[list(self.boosts)] = list(self.boosts.values())
        return weights

    def sample(self, index: int, generator: np.random.Generator) -> Sample:
        raise AssertionError((index, generator))


SOURCES = [
    Fake("hands", "human", 4000, "human_hand"),
    Fake("arm", "robot", 900),
    Fake("humanoid", "robot", 2100, "adam_u"),
    Fake("twin", "simulation", 5000),
    Fake("kitchen", "simulation", 3000, "robocasa"),
    Fake("pictures", "vision_language", 500, "none"),
]


def mixture(proportions: Proportions, sources=SOURCES, batch: int = BATCH, seed: int = 3) -> Mixture:
    return Mixture(sources, plan_mixture(sources, proportions, batch), batch=batch, seed=seed)


def count_kinds(indices: NDArray[np.int64], sources=SOURCES) -> Counter[str]:
    return Counter(sources[source].kind for source in indices[:, 0].tolist())


@pytest.mark.parametrize("cap", [0.0, 0.1, 0.26, 0.5])
@pytest.mark.parametrize("kinds", [{}, {"human": 1, "robot": 1, "simulation": 2, "vision_language": 0.2}])
@pytest.mark.parametrize("batch", [1, 16, 100])
def test_simulation_is_never_drawn_above_its_cap(cap: float, kinds: dict[str, float], batch: int) -> None:
    """Counted: over an epoch, and up to one batch at any moment of it."""
    mixed = mixture(Proportions(kinds=kinds, simulation_cap=cap), batch=batch)
    for epoch in range(2):
        kinds_drawn = [SOURCES[source].kind for source in mixed.indices(epoch)[:, 0].tolist()]
        simulated = np.cumsum([kind == "simulation" for kind in kinds_drawn])
        robots = np.cumsum([kind in ("simulation", "robot") for kind in kinds_drawn])
        assert simulated[-1] <= cap * robots[-1]
        assert bool((simulated <= cap * robots + max(batch, len(SOURCES))).all())
        assert cap == 0 or simulated[-1] > cap * robots[-1] - 1  # and it is used up


def test_the_plan_is_what_is_drawn() -> None:
    mixed = mixture(Proportions(kinds={"human": 3, "robot": 2, "simulation": 0.1, "vision_language": 1}))
    drawn = Counter(mixed.indices(0)[:, 0].tolist())
    assert [drawn[i] for i in range(len(SOURCES))] == [p.draws for p in mixed.plan.portions]
    assert mixed.plan.draws % BATCH == 0
    by_kind = count_kinds(mixed.indices(0))
    for kind, weight in {"human": 3, "robot": 2, "simulation": 0.1, "vision_language": 1}.items():
        assert by_kind[kind] / mixed.plan.draws == pytest.approx(weight / 6.1, abs=1e-3)


def test_without_weights_every_kept_frame_comes_once() -> None:
    sources = [Fake("a", "robot", 64), Fake("b", "human", 32)]
    drawn = mixture(Proportions(), sources).indices(0)
    assert sorted(map(tuple, drawn.tolist())) == [(0, i) for i in range(64)] + [(1, i) for i in range(32)]


def test_a_robot_is_thinned_out_and_others_come_in_turn() -> None:
    mixed = mixture(Proportions(keep={"adam_u": 0.1, "arm": 0.5}, simulation_cap=0.26))
    portions = {p.name: p for p in mixed.plan.portions}
    assert (portions["humanoid"].kept, portions["arm"].kept) == (210, 450)
    assert portions["humanoid"].draws / portions["arm"].draws == pytest.approx(210 / 450, rel=0.01)
    first, second = (set(map(tuple, mixed.indices(epoch).tolist())) for epoch in range(2))
    assert {i for s, i in first if s == 2} != {i for s, i in second if s == 2}


def test_every_source_is_near_its_share_at_any_moment() -> None:
    mixed = mixture(Proportions())
    sources = mixed.indices(0)[:, 0]
    for number, portion in enumerate(mixed.plan.portions):
        expected = np.arange(1, len(sources) + 1) * portion.draws / len(sources)
        near = 1 + len(SOURCES) * portion.draws / len(sources)
        assert np.abs(np.cumsum(sources == number) - expected).max() <= near


def test_frames_near_events_come_as_often_as_they_are_boosted() -> None:
    source = Fake("arm", "robot", 1000, boosts=dict.fromkeys(range(100), 4.0))
    drawn = np.concatenate([mixture(Proportions(), [source], batch=10).indices(epoch)[:, 1] for epoch in range(20)])
    counts = np.bincount(drawn, minlength=1000)
    assert counts[:100].mean() / counts[100:].mean() == pytest.approx(4.0, rel=0.02)
    assert counts[100:].min() > 0


@pytest.mark.parametrize("count", [0, 1, 7, 10, 25])
def test_no_sample_comes_twice_before_all_came_once(count: int) -> None:
    drawn = draw_samples(np.ones(10), count, np.random.default_rng(0))
    counts = np.bincount(drawn, minlength=10)
    assert len(drawn) == count
    assert counts.max() - counts.min() <= 1


def test_a_step_is_the_same_however_it_is_reached() -> None:
    straight, resumed = mixture(Proportions()), mixture(Proportions())
    steps = [straight.draws(step) for step in range(2 * straight.steps_per_epoch)]
    for step in (5, straight.steps_per_epoch + 3, 0):
        assert resumed.draws(step) == steps[step]
    assert all(len(draws) == BATCH for draws in steps)
    assert mixture(Proportions(), seed=4).draws(0) != steps[0]
    assert steps[0] != steps[straight.steps_per_epoch]


def test_ranks_share_a_step_without_overlap() -> None:
    draws = mixture(Proportions()).draws(7)
    shares = [mixture(Proportions()).draws(7)[rank::4] for rank in range(4)]
    assert sorted(draw for share in shares for draw in share) == sorted(draws)


def test_the_table_shows_the_cap() -> None:
    table = plan_mixture(SOURCES, Proportions(), BATCH).table()
    assert "simulation among robot frames: 26.0% (capped at 26%; asked 72.7%)" in table
    assert all(source.name in table for source in SOURCES)


def test_simulation_alone_must_be_asked_for() -> None:
    twin = [Fake("twin", "simulation", 100)]
    with pytest.raises(MixtureError, match="simulation_cap = 1"):
        plan_mixture(twin, Proportions(), BATCH)
    assert plan_mixture(twin, Proportions(simulation_cap=1), BATCH).simulation == 1


@pytest.mark.parametrize(
    ("proportions", "text"),
    [
        (Proportions(keep={"adam": 0.5}), "did you mean 'adam_u'"),
        (Proportions(keep={"arm": 0.0}), "above 0"),
        (Proportions(kinds={"robots": 1}), "did you mean 'robot'"),
        (Proportions(kinds={"robot": -1}), "0 or more"),
        (Proportions(kinds={"robot": 0}), "no source is of a kind"),
        (Proportions(simulation_cap=1.5), "between 0 and 1"),
    ],
)
def test_shares_that_cannot_be_had_are_refused(proportions: Proportions, text: str) -> None:
    with pytest.raises(MixtureError, match=text):
        plan_mixture(SOURCES, proportions, BATCH)


@pytest.mark.parametrize("sources", [[], [Fake("a", "robot", 0)], [Fake("a", "robot", 2), Fake("a", "human", 2)]])
def test_sources_that_cannot_be_mixed_are_refused(sources: list[Fake]) -> None:
    with pytest.raises(MixtureError):
        plan_mixture(sources, Proportions(), BATCH)
