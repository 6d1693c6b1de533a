"""`onbeat evaluate`: how often a policy succeeds, in simulated time, and how often without what it should depend on.

The controls take away one thing each: the images (`blank`), their truth (`shuffle`: another seed's cube is shown), and
what was learned (`random-weights`). A policy that works must fall to near chance under each.
"""

import argparse
import functools
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from onbeat.runtime.bundle import load_bundle
from onbeat.runtime.chunker import Policy
from onbeat.runtime.command_line import HelpWithDefaults
from onbeat.runtime.controls import redraw_weights
from onbeat.runtime.episode import AS_SEEN, BLANK, OTHER, Conditions, Outcome, Scene, run_episode
from onbeat.runtime.measures import figure, text_table, wilson_interval
from onbeat.runtime.modes import MODES
from onbeat.runtime.policy import load_policy
from onbeat.runtime.robots import ROBOTS, Robot, RobotError, load_robot
from onbeat.runtime.run import DEFAULT_BUNDLE, DEFAULT_INSTRUCTION
from onbeat.runtime.timeline import REFUSALS

FIRST_SEED = 100_000  # training uses seeds below
RANDOM_WEIGHTS = "random-weights"
SHOWN = {"none": AS_SEEN, "blank": BLANK, "shuffle": OTHER, RANDOM_WEIGHTS: AS_SEEN}
CONTROLS = tuple(SHOWN)

PolicyFactory = Callable[[], Policy]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Outcomes of one condition, in the order of the seeds. control: one of CONTROLS."""

    control: str
    conditions: Conditions
    outcomes: tuple[Outcome, ...]

    @property
    def successes(self) -> int:
        return sum(outcome.success_s is not None for outcome in self.outcomes)

    @property
    def rate(self) -> float:
        """Share of the seeds that succeeded, 0..1."""
        return self.successes / len(self.outcomes)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the rate."""
        return wilson_interval(self.successes, len(self.outcomes))


def evaluate(
    policy: PolicyFactory,
    seeds: Sequence[int],
    *,
    conditions: Conditions,
    robot: str = "so101-twin",
    control: str = "none",
    workers: int = 1,
    progress: Callable[[Outcome], None] | None = None,
) -> Evaluation:
    """Run every seed to its end. The same seeds, conditions and policy give the same outcomes, however many workers.

    policy: makes the policy, once in every worker process; with more than one worker it must pickle (a function of a
    module, or functools.partial of one). progress: called with each outcome, in the order of the seeds.
    """
    assert control in CONTROLS, control
    conditions = replace(conditions, shown=SHOWN[control])
    job = Job(policy, robot, conditions)
    outcomes = []
    for outcome in _outcomes(job, seeds, min(workers, len(seeds))):
        outcomes.append(outcome)
        if progress is not None:
            progress(outcome)
    return Evaluation(control, conditions, tuple(outcomes))


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker needs to know once."""

    policy: PolicyFactory
    robot: str
    conditions: Conditions

    def open(self) -> "Worker":
        return Worker(self, Scene(), load_simulated(self.robot), self.policy())


@dataclass(frozen=True, slots=True)
class Worker:
    """A scene and a policy that run one seed after the other."""

    job: Job
    scene: Scene
    robot: Robot
    policy: Policy

    def run(self, seed: int) -> Outcome:
        return run_episode(self.scene, self.robot, self.policy, seed, self.job.conditions)


def _outcomes(job: Job, seeds: Sequence[int], workers: int) -> Iterator[Outcome]:
    if workers <= 1:
        worker = job.open()
        with worker.scene:
            yield from map(worker.run, seeds)
        return
    # Spawned and not forked: a drawing context and ONNX Runtime's threads do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(functools.partial(_run_in_worker, job), seeds)


_worker: Worker | None = None  # one per process of the pool, which gives it nowhere else to stay


def _run_in_worker(job: Job, seed: int) -> Outcome:
    # Opened by the first seed and not by the pool's initialiser, whose errors a pool answers with new workers for ever.
    global _worker
    if _worker is None:
        _worker = job.open()
    return _worker.run(seed)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a bundle; 0 when every seed was run, 1 for a bundle or machine that cannot be used."""
    options = _parser().parse_args(argv)
    load_bundle(options.bundle)  # refused here, as the robot is, before any worker has started
    load_simulated(options.robot)
    controls = CONTROLS if options.control == "all" else tuple(dict.fromkeys(("none", options.control)))
    with tempfile.TemporaryDirectory() as scratch:
        evaluations = [_evaluate_bundle(options, control, Path(scratch)) for control in controls]
    document = as_json(evaluations)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(document + "\n", encoding="utf-8")
    print(document if options.json else as_text(evaluations))
    return 0


def load_simulated(name: str) -> Robot:
    """A robot that there is a world for. Raises RobotError for a real one, whose name would stand over the twin's."""
    robot = load_robot(name)
    if not robot.config.is_simulated:
        simulated = ", ".join(other.name for other in ROBOTS.values() if other.is_simulated)
        raise RobotError(f"{name} is a real arm, and success is measured in simulation: choose {simulated}")
    return robot


def _evaluate_bundle(options: argparse.Namespace, control: str, scratch: Path) -> Evaluation:
    folder = options.bundle
    if control == RANDOM_WEIGHTS:
        folder = redraw_weights(folder, scratch / RANDOM_WEIGHTS, seed=options.first_seed)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    return evaluate(
        functools.partial(load_policy, folder, allow_untrained_prefix=options.allow_untrained_prefix),
        seeds,
        robot=options.robot,
        conditions=Conditions(
            options.instruction,
            latency_ns=round(options.latency_ms * 1e6),
            timeout_ns=round(options.timeout_s * 1e9),
            mode=options.mode,
            allow_untrained_prefix=options.allow_untrained_prefix,
        ),
        control=control,
        workers=options.workers,
        progress=Progress(control, len(seeds)),
    )


class Progress:
    """A line on stderr per outcome, with the rate so far and the time that is left."""

    def __init__(self, control: str, total: int) -> None:
        self._control, self._total, self._begun_s = control, total, time.monotonic()
        self._done = self._successes = 0

    def __call__(self, outcome: Outcome) -> None:
        self._done += 1
        self._successes += outcome.success_s is not None
        left_s = (time.monotonic() - self._begun_s) / self._done * (self._total - self._done)
        verdict = "no success" if outcome.success_s is None else f"success after {outcome.success_s:.1f} s"
        rate = f"{self._successes} of {self._done} so far, {left_s:.0f} s left"
        print(f"{self._control}: seed {outcome.seed}: {verdict} ({rate})", file=sys.stderr, flush=True)


def as_json(evaluations: Sequence[Evaluation]) -> str:
    """A list with an object per control: rate, interval, conditions and every outcome."""
    return json.dumps([_as_object(evaluation) for evaluation in evaluations], indent=2)


def _as_object(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "control": evaluation.control,
        "seeds": len(evaluation.outcomes),
        "successes": evaluation.successes,
        "success_rate": evaluation.rate,
        "success_interval": list(evaluation.interval),
        "conditions": asdict(evaluation.conditions),
        "outcomes": [asdict(outcome) for outcome in evaluation.outcomes],
    }


def as_text(evaluations: Sequence[Evaluation]) -> str:
    """Every seed of the policy as it is, then a line per control."""
    whole = [evaluation for evaluation in evaluations if evaluation.control == "none"]
    return "\n\n".join([*map(seed_table, whole), rate_table(evaluations)])


def seed_table(evaluation: Evaluation) -> str:
    """A line per seed."""
    header = ("seed", "success after s", "cube up cm", "chunks", "held ticks", "limited ticks")
    rows = (
        (
            str(outcome.seed),
            figure(outcome.success_s),
            figure(100 * outcome.highest_m, 1),
            str(outcome.chunks),
            str(outcome.held_ticks),
            str(outcome.limited_ticks),
        )
        for outcome in evaluation.outcomes
    )
    return text_table(header, rows)


def rate_table(evaluations: Sequence[Evaluation]) -> str:
    """A line per control: how many succeeded, the rate with its interval, the delay that was really executed."""
    header = ("control", "successes", "rate %", "Wilson 95 %", "rows of the old chunk run: chunks")
    return text_table(header, map(_rate_row, evaluations))


def _rate_row(evaluation: Evaluation) -> tuple[str, ...]:
    low, high = evaluation.interval
    delays = sum((Counter(outcome.delays) for outcome in evaluation.outcomes), Counter())
    return (
        evaluation.control,
        f"{evaluation.successes} of {len(evaluation.outcomes)}",
        f"{100 * evaluation.rate:.0f}",
        f"{100 * low:.0f}-{100 * high:.0f}",
        ", ".join(f"{REFUSALS.get(rows, rows)}: {count}" for rows, count in sorted(delays.items())) or "-",
    )


def _parser() -> argparse.ArgumentParser:
    given = Conditions(DEFAULT_INSTRUCTION)
    parser = argparse.ArgumentParser(
        prog="onbeat evaluate",
        description="Measure a policy's success in simulated time.",
        formatter_class=HelpWithDefaults,
    )
    add = parser.add_argument
    add("--bundle", type=Path, default=DEFAULT_BUNDLE, help="folder made by `onbeat export`")
    add("--robot", default="so101-twin", help="the robot to simulate")
    add("--instruction", default=given.instruction, help="what the policy is asked to do")
    add("--seeds", type=_positive, default=50, help="how many worlds to try")
    add("--first-seed", type=int, default=FIRST_SEED, help="the first; training uses lower ones")
    add("--timeout-s", type=_not_negative, default=given.timeout_ns / 1e9, help="simulated: then a try has failed")
    add("--latency-ms", type=_not_negative, default=given.latency_ns / 1e6, help="simulated: observation to chunk")
    add("--mode", default="", help=f"how chunks join: {', '.join(MODES)}; empty: the checkpoint's own")
    add("--allow-untrained-prefix", action="store_true", help="keep rows that training never did")
    add("--control", choices=(*CONTROLS, "all"), default="none", help="also run with this taken away")
    add("--workers", type=_positive, default=2, help="processes that run seeds side by side")
    add("--json", action="store_true", help="print JSON for scripts")
    add("--out", type=Path, help="write the JSON there too")
    return parser


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a time")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value
