"""`onbeat train RECIPE.toml`: demonstrations in, a checkpoint in the published format out."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from onbeat.embodiment.metadata import save_statistics
from onbeat.embodiment.schema import load_embodiment
from onbeat.runtime.language import PolicyLanguage
from onbeat.training.checkpoint import WEIGHTS_FILE, CheckpointError
from onbeat.training.config_file import save_config
from onbeat.training.dataset import (
    Steps,
    action_slots,
    assemble_steps,
    measure_statistics,
    read_recordings,
    split_recordings,
)
from onbeat.training.fit import Fit, Losses, fresh_policy
from onbeat.training.model.policy import count_parameters
from onbeat.training.recipe import Recipe, load_recipe
from onbeat.training.text import fit_tokenizer, write_tokenizer

HISTORY_FILE = "history.jsonl"


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that a run needs before its first step. language: translates for the robot and for training alike."""

    language: PolicyLanguage
    instruction: str
    data: Steps
    held_out: Steps
    slots: Tensor
    vocabulary: int


def main(argv: Sequence[str] | None = None) -> int:
    """Fit a policy; returns the exit code."""
    options = _parser().parse_args(argv)
    recipe = load_recipe(options.recipe)
    torch.set_num_threads(recipe.fitting.threads)
    if not options.resume and not options.dry_run:
        _refuse_to_overwrite(options.out)
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(recipe, options.data, Path(scratch) if options.dry_run else options.out)
    fit = start_fit(recipe, prepared)
    if options.resume:
        fit.resume(options.out)
    _print_plan(fit, prepared)
    if not options.dry_run:
        run(fit, prepared, options.out)
    if options.json:
        print(json.dumps({"recipe": recipe.describe(), "step": fit.step, **measure_fit(fit, prepared)}))
    return 0


def prepare(recipe: Recipe, data: Path, out: Path) -> Prepared:
    """Read the demonstrations and write the checkpoint's tokenizer, statistics and config.json into `out`."""
    robot = load_embodiment(recipe.embodiment)
    recordings = read_recordings(data, robot, recipe.network.image_size)
    fitted, held_out = split_recordings(recordings.demonstrations, recipe.fitting.held_out, recipe.seed)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = fit_tokenizer(sentences(recipe, recordings.instruction))
    write_tokenizer(tokenizer, out)
    save_statistics(measure_statistics(fitted, robot, recipe.dataset), out)
    save_config(recipe.network.configure(tokenizer.get_vocab_size()), out)
    language = PolicyLanguage.from_folder(out, embodiment=robot, dataset=recipe.dataset)
    return Prepared(
        language,
        recordings.instruction,
        assemble_steps(fitted, language),
        assemble_steps(held_out, language),
        action_slots(robot),
        tokenizer.get_vocab_size(),
    )


def sentences(recipe: Recipe, instruction: str) -> list[str]:
    """The text around an observation, piece by piece as the prompt has it."""
    return [f"system\n{recipe.network.system_message}", "user\n", "assistant\n", "\n", instruction]


def start_fit(recipe: Recipe, prepared: Prepared) -> Fit:
    """A run at step 0."""
    policy = fresh_policy(recipe.network, prepared.vocabulary, recipe.seed, prepared.slots)
    prompt = prepared.language.prompt(prepared.instruction)
    return Fit(recipe, policy, prepared.data, prompt, prepared.slots)


def run(fit: Fit, prepared: Prepared, out: Path) -> None:
    """Take the remaining steps; validate and write the checkpoint every `report_steps` and at the end."""
    fitting, recent, began = fit.fitting, Recent(), time.monotonic()
    with tqdm(total=fitting.steps, initial=fit.step, unit="step", smoothing=0.05) as progress:
        while fit.step < fitting.steps:
            recent.add(fit.advance())
            progress.update()
            if fit.step % fitting.report_steps == 0 or fit.step == fitting.steps:
                row = {"step": fit.step, "elapsed_s": round(time.monotonic() - began, 1), **recent.take()}
                row |= {f"held_out_{name}": value for name, value in measure_fit(fit, prepared).items()}
                fit.save(out)
                append_history(out / HISTORY_FILE, row)
                progress.write(_line(row), file=sys.stderr)


def measure_fit(fit: Fit, prepared: Prepared) -> dict[str, float]:
    """Losses on the held-out demonstrations, and the sampled chunks' mean absolute error per action key.

    The errors are in the robot's units (rad for joints), over whole chunks and over their first halves.
    """
    validation = fit.validate(prepared.held_out)
    sampled, recorded = (_decode(chunks, prepared.language) for chunks in (validation.sampled, validation.recorded))
    figures = {"flow": validation.flow, "place": validation.place}
    for key, values in sampled.items():
        error = np.abs(values - recorded[key])
        figures |= {f"error_{key}": float(error.mean())}
        figures |= {f"error_{key}_first_half": float(error[:, : error.shape[1] // 2].mean())}
    return figures


def _decode(chunks: Tensor, language: PolicyLanguage) -> dict[str, NDArray[Any]]:
    """(B, C, A) as {key: (B, C, d)} in the robot's units."""
    decoded = language.decode(chunks.flatten(0, 1).numpy())
    return {key: values.reshape(*chunks.shape[:2], -1) for key, values in decoded.items()}


class Recent:
    """Means over the steps since the last report."""

    def __init__(self) -> None:
        self._rows: list[Losses] = []

    def add(self, losses: Losses) -> None:
        self._rows.append(losses)

    def take(self) -> dict[str, float]:
        """The means, and start anew."""
        means = torch.tensor(self._rows).mean(0).tolist()
        self._rows = []
        return dict(zip(Losses._fields, means, strict=True))


def _refuse_to_overwrite(out: Path) -> None:
    if (out / WEIGHTS_FILE).exists():
        raise CheckpointError(f"{out} holds a checkpoint already: go on from it with --resume, or give another --out")


def append_history(path: Path, row: dict[str, float]) -> None:
    """One line of JSON per report."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _line(row: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in row.items())


def _print_plan(fit: Fit, prepared: Prepared) -> None:
    parts = count_parameters(fit.policy)
    epochs = fit.fitting.steps * fit.fitting.batch / len(prepared.data)
    print(f"{len(prepared.data)} steps to fit, {len(prepared.held_out)} held out; {epochs:.1f} epochs", file=sys.stderr)
    print("parameters: " + "  ".join(f"{name} {count:,}" for name, count in parts.items()), file=sys.stderr)


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
    parser.add_argument("--dry-run", action="store_true", help="read and check everything, take no step")
    parser.add_argument("--json", action="store_true", help="print recipe and held-out losses as JSON on stdout")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
