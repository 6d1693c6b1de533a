"""What a run is going to do, told before it does it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onbeat.training.fit import Fit
from onbeat.training.freezing import FROZEN, PartRow, freezing_table
from onbeat.training.model.policy import count_parameters
from onbeat.training.prepare import Prepared

WARM_UP, MEASURED = 1, 3  # steps


@dataclass(frozen=True, slots=True)
class Plan:
    """lines: what is printed. step_s: seconds per optimiser step, None where it was not measured."""

    lines: tuple[str, ...]
    parameters: dict[str, int]
    trained: int
    step_s: float | None


def make_plan(fit: Fit, prepared: Prepared, out: Path, step_s: float | None) -> Plan:
    """Of a run that stands at its first step."""
    rows = freezing_table(fit.policy, fit.recipe.frozen)
    trained = sum(row.parameters for row in rows if row.treatment != FROZEN)
    lines = [*_data_lines(fit, prepared), "", *_part_lines(rows), "", *_time_lines(fit, step_s), *_writes(out)]
    return Plan(tuple(lines), count_parameters(fit.policy), trained, step_s)


def measure_step(fit: Fit) -> float:
    """Seconds per step, by taking some; the run is of no use afterwards."""
    for _ in range(WARM_UP):
        fit.advance()
    began = time.monotonic()
    for _ in range(MEASURED):
        fit.advance()
    return (time.monotonic() - began) / MEASURED


def _data_lines(fit: Fit, prepared: Prepared) -> list[str]:
    held_out = sum(len(source) for source in prepared.held_out)
    epochs = fit.fitting.steps * fit.fitting.batch / sum(len(source) for source in prepared.sources)
    return [prepared.table, f"{held_out:,} samples held out; {epochs:.1f} times as many draws as samples"]


def _part_lines(rows: Sequence[PartRow]) -> list[str]:
    lines = [f"{'part':16} {'parameters':>14}  treatment"]
    lines += [f"{row.part:16} {row.parameters:>14,}  {row.treatment}" for row in rows]
    return [*lines, f"{'total':16} {sum(row.parameters for row in rows):>14,}"]


def _time_lines(fit: Fit, step_s: float | None) -> list[str]:
    fitting = fit.fitting
    size = f"{fitting.steps} steps of {fitting.batch} observations x {fitting.draws} draws on {fitting.device}"
    if step_s is None:
        return [size]
    hours = step_s * fitting.steps / 3600
    rate = fitting.batch / step_s
    return [f"{size}: {step_s:.3g} s a step (mean of {MEASURED}), {rate:.0f} samples/s, {hours:.2g} h"]


def _writes(out: Path) -> list[str]:
    return [f"writes {out}: checkpoint, resume/, history.jsonl, tensorboard/"]
