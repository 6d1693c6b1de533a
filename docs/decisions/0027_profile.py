"""How often `onbeat profile --compare` is wrong: on made-up latencies, and on recorded runs with a slower stage.

python docs/decisions/0027_profile.py [--trials 100] [RUN ...]
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onbeat.runtime.measures import text_table
from onbeat.runtime.profile.figures import JUDGED, after_start
from onbeat.runtime.profile.spread import SAME, SLOWER, UNKNOWN, judge
from onbeat.runtime.report import read_run
from onbeat.runtime.summary import STAGES, stage_samples

PLANTED = (1.05, 1.1, 1.2)
CASES = ((150, 0.3), (300, 0.8), (6000, 0.5), (6000, 0.95))  # samples, and how much of each is that of the one before


def latencies(rng: np.random.Generator, count: int, rho: float) -> NDArray[np.float64]:
    """Log-normal round 10 with a spread of 15 %, and one in a hundred later by 10 on average."""
    noise, series = rng.standard_normal(count), np.empty(count)
    series[0] = noise[0]
    for k in range(1, count):
        series[k] = rho * series[k - 1] + np.sqrt(1 - rho * rho) * noise[k]
    return 10 * np.exp(0.15 * series) + (rng.random(count) < 0.01) * rng.exponential(10, count)


def made_up(trials: int) -> Iterator[tuple[str, ...]]:
    """Shares of trials: told to differ though they are the same, and found though it is planted."""
    for count, rho in CASES:
        rng, wrong, found = np.random.default_rng(0), np.zeros(len(JUDGED)), np.zeros((len(PLANTED), len(JUDGED)))
        for _ in range(trials):
            a, b = latencies(rng, count, rho), latencies(rng, count, rho)
            wrong += [j.verdict not in (SAME, UNKNOWN) for j in judge(a, b, JUDGED)]
            found += [[j.verdict == SLOWER for j in judge(a, factor * b, JUDGED)] for factor in PLANTED]
        for k, percent in enumerate(JUDGED):
            shares = (f"{100 * value / trials:.0f} %" for value in (wrong[k], *found[:, k]))
            yield (f"{count} samples, rho {rho}", f"p{percent:g}", *shares)


def recorded(runs: Sequence[Path]) -> Iterator[tuple[str, ...]]:
    """Over all pairs of runs of the same: how many medians are told to differ, without and with the others as `again`.

    The last columns: a stage of B made slower by so much, found in how many of the pairs.
    """
    samples = [stage_samples(after_start(read_run(run))) for run in runs]
    for key, stage in STAGES.items():
        pairs = list(permutations(range(len(samples)), 2))
        alone = [judge(samples[a][key], samples[b][key], JUDGED[:1])[0].verdict for a, b in pairs]
        rest = [[of[key] for k, of in enumerate(samples) if k not in pair] for pair in pairs]
        beside = [
            judge(samples[a][key], samples[b][key], JUDGED[:1], others)[0].verdict
            for (a, b), others in zip(pairs, rest, strict=True)
        ]
        planted = [
            sum(judge(of[key], factor * of[key], JUDGED[:1])[0].verdict == SLOWER for of in samples)
            for factor in PLANTED
        ]
        counts = (sum(verdict != SAME for verdict in verdicts) for verdicts in (alone, beside))
        yield (stage.name, *(f"{n} of {len(pairs)}" for n in counts), *(f"{n} of {len(samples)}" for n in planted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="*", help="folders of runs of the same")
    parser.add_argument("--trials", type=int, default=100)
    options = parser.parse_args()
    found = [f"found, {factor - 1:+.0%}" for factor in PLANTED]
    print(text_table(("made up", "figure", "wrongly differs", *found), made_up(options.trials)))
    if len(options.runs) > 1:
        heads = ("recorded, p50", "differs, alone", "differs, others as --again", *found)
        print(f"\n{text_table(heads, recorded(options.runs))}")


if __name__ == "__main__":
    main()
