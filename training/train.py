"""`onbeat train RECIPE.toml`: data in, a checkpoint in the published format out."""

import argparse
import json
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from onbeat.embodiment.errors import run_module
from onbeat.training.checkpoint import WEIGHTS_FILE, CheckpointError
from onbeat.training.fit import Fit, Losses
from onbeat.training.journal import Journal
from onbeat.training.memory import MIB
from onbeat.training.model.policy import count_parameters
from onbeat.training.parallel import joined, rank, world
from onbeat.training.plan import plan_lines, rehearse
from onbeat.training.prepare import Prepared, prepare, start_fit
from onbeat.training.recipe import Recipe, RecipeError, load_recipe
from onbeat.training.throughput import measure
from onbeat.training.validation import held_out_groups, measure_fit


def main(argv: Sequence[str] | None = None) -> int:
    """Fit a policy; returns the exit code."""
    options = _parser().parse_args(argv)
    recipe = load_recipe(options.recipe)
    torch.set_num_threads(recipe.fitting.threads)
    with joined():
        rehearsed = options.dry_run or options.profile
        told = plan(recipe, options) if rehearsed else train(recipe, options)
        first = rank() == 0
    if options.json and first:
        print(json.dumps({"recipe": recipe.describe(), **told}))
    return 0 if rehearsed or told["step"] == recipe.fitting.steps else 1


def train(recipe: Recipe, options: argparse.Namespace) -> dict[str, float]:
    """The run, or the rest of it; returns the last figures on held-out data."""
    if not options.resume:
        _refuse_to_overwrite(options.out)
    with own_folder(options.out) as out:
        prepared = prepare(recipe, options.data, out)
        fit = start_fit(recipe, prepared)
        if options.resume:
            fit.resume(options.out)
        _tell(plan_lines(fit, prepared, options.out, None))
        run(fit, prepared, out)
    return {"step": fit.step, **_measure(fit, prepared)}


@contextmanager
def own_folder(out: Path) -> Iterator[Path]:
    """Where this process writes: `out` for the first, a folder that is thrown away for those that share its work."""
    if rank() == 0:
        yield out
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


def plan(recipe: Recipe, options: argparse.Namespace) -> dict[str, object]:
    """Read and check everything, take a few steps to see how long they are, write nothing.

    profile: tell what of the machine they use, too, and where the rest goes.
    """
    if options.profile and world() > 1:
        raise RecipeError("--profile looks at one process: run it without torchrun")
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(recipe, options.data, Path(scratch))
        fit = start_fit(recipe, prepared)
        tried = rehearse(fit, prepared)
        _tell(plan_lines(fit, prepared, options.out, tried))
        profiled = _profile(fit) if options.profile else {}
    memory_mib = round(tried.memory.total / MIB, 1)
    figures = {"parameters": count_parameters(fit.policy), "step_s": tried.step_s, "memory_mib": memory_mib}
    return {"step": 0, **figures, **profiled}


def _profile(fit: Fit) -> dict[str, object]:
    measured = measure(fit)
    _tell(["", *measured.lines()])
    peak_share = measured.gflops / measured.big_gflops
    return {"samples_per_s": measured.samples_per_s, "peak_share": peak_share, "shares_of_time": measured.shares}


def run(fit: Fit, prepared: Prepared, out: Path) -> None:
    """Take the remaining steps; validate and write the checkpoint every `report_steps` and at the end.

    Asked to stop (Ctrl-C, SIGTERM), it finishes the step and writes all that it needs to go on.
    """
    steps = fit.fitting.steps
    bar = tqdm(total=steps, initial=fit.step, unit="step", smoothing=0.05, disable=rank() > 0)
    with Journal(out, fit.step) as journal, bar, StopRequest() as stop:
        while fit.step < steps and not stop.asked:
            losses = _advance(fit, journal)
            bar.set_postfix(flow=f"{losses.flow:.4f}", refresh=False)
            bar.update()
            if fit.step % fit.fitting.report_steps == 0 or fit.step == steps:
                held_out = _measure(fit, prepared)
                fit.save(out)
                bar.write(_line(journal.report(fit.step, held_out)), file=sys.stderr)
        if fit.step < steps:
            fit.save(out)
            bar.write(f"stopped at step {fit.step} of {steps}: go on with --resume", file=sys.stderr)


def _advance(fit: Fit, journal: Journal) -> Losses:
    began_s, rate = time.monotonic(), fit.rate
    losses = fit.advance()
    journal.step(fit.step, losses, fit.answers, rate, fit.fitting.batch / (time.monotonic() - began_s))
    return losses


class StopRequest:
    """Ctrl-C and SIGTERM as a question, so that no step is cut in two. Processes that train together stop at once
    instead: they would not agree on the step."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if world() == 1 and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self.asked = True


def _measure(fit: Fit, prepared: Prepared) -> dict[str, float]:
    return measure_fit(fit, held_out_groups(prepared.held_out), prepared.languages)


def _refuse_to_overwrite(out: Path) -> None:
    if (out / WEIGHTS_FILE).exists():
        raise CheckpointError(f"{out} holds a checkpoint already: go on from it with --resume, or give another --out")


def _line(row: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in row.items())


def _tell(lines: Sequence[str]) -> None:
    if rank() == 0:
        print("\n".join(lines), file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onbeat train",
        description="Fit a policy, a fresh one or a checkpoint, on demonstrations or on a mixture of datasets.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, help="TOML file, such as training/configs/so101_lift.toml")
    parser.add_argument(
        "--data", type=Path, default=Path("out/demonstrations"), help="demonstrations, where the recipe has no [data]"
    )
    parser.add_argument("--out", type=Path, default=Path("out/checkpoint"), help="checkpoint folder to write")
    parser.add_argument("--resume", action="store_true", help="go on from what is in --out")
    parser.add_argument(
        "--dry-run", action="store_true", help="read and check, tell plan, memory and time of a step, write nothing"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="as --dry-run, and tell the share of the machine's peak that a step reaches and where the rest goes",
    )
    parser.add_argument("--json", action="store_true", help="print recipe and figures as JSON on stdout")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_module("onbeat.training.train", main))
