"""What a run is going to do, told before it does it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onbeat.training.fit import Fit
from onbeat.training.freezing import FROZEN, PartRow, freezing_table
from onbeat.training.prepare import Prepared

WARM_UP, MEASURED = 1, 3  # steps


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What only trying tells. step_s: seconds per optimiser step."""

    step_s: float


def rehearse(fit: Fit) -> Rehearsal:
    """Take some steps; the run is of no use afterwards."""
    for _ in range(WARM_UP):
        fit.advance()
    began = time.monotonic()
    for _ in range(MEASURED):
        fit.advance()
    return Rehearsal((time.monotonic() - began) / MEASURED)


def plan_lines(fit: Fit, prepared: Prepared, out: Path, rehearsal: Rehearsal | None) -> list[str]:
    """Data, parts, cost where it was tried, and what is written."""
    sections = [
        _data_lines(fit, prepared),
        _part_lines(freezing_table(fit.policy, fit.recipe.frozen)),
        _step_lines(fit, rehearsal),
        [f"writes {out}: the checkpoint, resume/, history.jsonl, tensorboard/; every {fit.fitting.report_steps} steps"],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines).splitlines()


def _data_lines(fit: Fit, prepared: Prepared) -> list[str]:
    samples, held_out = (sum(map(len, sources)) for sources in (prepared.sources, prepared.held_out))
    passes = fit.fitting.steps * fit.fitting.batch / samples
    return [*prepared.table.splitlines(), f"{samples:,} samples, {passes:.1f} draws of each; {held_out:,} held out"]


def _part_lines(rows: Sequence[PartRow]) -> list[str]:
    total = sum(row.parameters for row in rows)
    trained = sum(row.parameters for row in rows if row.treatment != FROZEN)
    lines = [f"{'part':16}{'parameters':>16}  treatment"]
    lines += [f"{row.part:16}{row.parameters:>16,}  {row.treatment}" for row in rows]
    return [*lines, f"{'all':16}{total:>16,}  of which {trained:,} in trained parts"]


def _step_lines(fit: Fit, rehearsal: Rehearsal | None) -> list[str]:
    fitting = fit.fitting
    size = f"{fitting.steps} steps of {fitting.batch} observations x {fitting.draws} draws on {fitting.device}"
    lines = [f"{size}, products in {fitting.precision}"]
    if rehearsal is not None:
        rate, hours = fitting.batch / rehearsal.step_s, rehearsal.step_s * fitting.steps / 3600
        lines.append(
            f"{rehearsal.step_s:.3g} s a step (mean of {MEASURED}), {rate:.0f} samples/s, {hours:.2g} h in all"
        )
    return lines
