"""`onbeat train RECIPE.toml`: data in, a checkpoint in the published format out."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from onbeat.training.checkpoint import WEIGHTS_FILE, CheckpointError
from onbeat.training.fit import Fit
from onbeat.training.journal import Journal
from onbeat.training.parallel import joined, rank
from onbeat.training.plan import make_plan, measure_step
from onbeat.training.prepare import Prepared, prepare, start_fit
from onbeat.training.recipe import Recipe, load_recipe
from onbeat.training.tally import Tally
from onbeat.training.validation import held_out_groups, measure_fit


def main(argv: Sequence[str] | None = None) -> int:
    """Fit a policy; returns the exit code."""
    options = _parser().parse_args(argv)
    recipe = load_recipe(options.recipe)
    torch.set_num_threads(recipe.fitting.threads)
    with joined():
        told = rehearse(recipe, options.data, options.out) if options.dry_run else train(recipe, options)
        first = rank() == 0
    if options.json and first:
        print(json.dumps({"recipe": recipe.describe(), **told}))
    return 0


def train(recipe: Recipe, options: argparse.Namespace) -> dict[str, float]:
    """The run, or the rest of it; returns the last figures on held-out data."""
    if not options.resume:
        _refuse_to_overwrite(options.out)
    with own_folder(options.out) as out:
        prepared = prepare(recipe, options.data, out)
        fit = start_fit(recipe, prepared)
        if options.resume:
            fit.resume(options.out)
        _tell(make_plan(fit, prepared, options.out, None).lines)
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


def rehearse(recipe: Recipe, data: Path, out: Path) -> dict[str, object]:
    """Read and check everything, take a few steps to see how long they are, write nothing."""
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(recipe, data, Path(scratch))
        fit = start_fit(recipe, prepared)
        plan = make_plan(fit, prepared, out, measure_step(fit))
    _tell(plan.lines)
    return {"step": 0, "parameters": plan.parameters, "trained": plan.trained, "step_s": plan.step_s}


def run(fit: Fit, prepared: Prepared, out: Path) -> None:
    """Take the remaining steps; validate and write the checkpoint every `report_steps` and at the end."""
    fitting, tally, journal, began = fit.fitting, Tally(), Journal(out, fit.step), time.monotonic()
    with tqdm(total=fitting.steps, initial=fit.step, unit="step", smoothing=0.05, disable=rank() > 0) as progress:
        while fit.step < fitting.steps:
            at, rate = time.monotonic(), fit.rate
            losses = fit.advance()
            tally.add(fit.answers)
            journal.step(fit.step, losses, rate, fitting.batch / (time.monotonic() - at))
            progress.update()
            progress.set_postfix(flow=f"{losses.flow:.4f}", refresh=False)
            if fit.step % fitting.report_steps == 0 or fit.step == fitting.steps:
                row = {"step": fit.step, "elapsed_s": round(time.monotonic() - began, 1), **journal.means()}
                row |= {f"held_out_{name}": value for name, value in _measure(fit, prepared).items()}
                fit.save(out)
                journal.report(fit.step, row, tally.take())
                progress.write(_line(row), file=sys.stderr)
    journal.close()


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
        description="Fit a policy on recorded demonstrations.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, help="TOML file, such as training/configs/so101_lift.toml")
    parser.add_argument("--data", type=Path, default=Path("out/demonstrations"), help="folder of demonstrations")
    parser.add_argument("--out", type=Path, default=Path("out/checkpoint"), help="checkpoint folder to write")
    parser.add_argument("--resume", action="store_true", help="go on from what is in --out")
    parser.add_argument("--dry-run", action="store_true", help="read and check, time a few steps, write nothing")
    parser.add_argument("--json", action="store_true", help="print recipe and held-out losses as JSON on stdout")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
