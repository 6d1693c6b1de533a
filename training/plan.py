"""What a run is going to do, told before it does it."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from onbeat.training.fit import Fit
from onbeat.training.freezing import FROZEN, PartRow, freezing_table
from onbeat.training.memory import MIB, Load, Memory, estimate, passing_peak
from onbeat.training.parallel import world
from onbeat.training.prepare import Prepared

WARM_UP, MEASURED = 1, 3  # steps


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What only trying tells. step_s: seconds per optimiser step. memory: of each process's device."""

    step_s: float
    memory: Memory


def rehearse(fit: Fit, prepared: Prepared) -> Rehearsal:
    """Take some steps; the run is of no use afterwards."""
    memory = estimate_memory(fit, prepared)
    for _ in range(WARM_UP):
        fit.advance()
    began = time.monotonic()
    for _ in range(MEASURED):
        fit.advance()
    return Rehearsal((time.monotonic() - began) / MEASURED, memory)


def estimate_memory(fit: Fit, prepared: Prepared) -> Memory:
    """Of a step of this run, every tensor counted and none made. Moments and gradients are of what is trained alone."""
    fitting, config, views = fit.fitting, fit.policy.config, fit.objective.views
    load = Load(
        batch=math.ceil(fitting.batch / (world() * fitting.accumulate)),
        draws=fitting.draws,
        views=views,
        words=max(1, max(prepared.prompt_lengths()) - views * config.vision.tokens_per_view),
        recompute=fitting.recompute,
        half=fitting.precision == "bfloat16",
    )
    memory = estimate(config, passing_peak(config, load), world())
    rows = freezing_table(fit.policy, fit.recipe.frozen)
    share = _trained(rows) / sum(row.parameters for row in rows)
    return replace(memory, moments=int(memory.moments * share), gradients=int(memory.gradients * share))


def plan_lines(fit: Fit, prepared: Prepared, out: Path, rehearsal: Rehearsal | None) -> list[str]:
    """Data, parts, cost where it was tried, and what is written."""
    sections = [
        _data_lines(fit, prepared),
        _part_lines(freezing_table(fit.policy, fit.recipe.frozen)),
        _step_lines(fit, rehearsal),
        [] if rehearsal is None else _memory_lines(rehearsal.memory),
        [f"writes {out}: the checkpoint, resume/, history.jsonl, tensorboard/; every {fit.fitting.report_steps} steps"],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines).splitlines()


def _data_lines(fit: Fit, prepared: Prepared) -> list[str]:
    samples, held_out = (sum(map(len, sources)) for sources in (prepared.sources, prepared.held_out))
    passes = fit.fitting.steps * fit.fitting.batch / samples
    return [*prepared.table.splitlines(), f"{samples:,} samples, {passes:.1f} draws of each; {held_out:,} held out"]


def _part_lines(rows: Sequence[PartRow]) -> list[str]:
    total, trained = sum(row.parameters for row in rows), _trained(rows)
    lines = [f"{'part':16}{'parameters':>16}  treatment"]
    lines += [f"{row.part:16}{row.parameters:>16,}  {row.treatment}" for row in rows]
    return [*lines, f"{'all':16}{total:>16,}  of which {trained:,} in trained parts"]


def _trained(rows: Sequence[PartRow]) -> int:
    return sum(row.parameters for row in rows if row.treatment != FROZEN)


def _step_lines(fit: Fit, rehearsal: Rehearsal | None) -> list[str]:
    fitting = fit.fitting
    size = f"{fitting.steps} steps of {fitting.batch} observations x {fitting.draws} draws on {fitting.device}"
    lines = [f"{size}, products in {fitting.precision}"]
    if rehearsal is not None:
        rate, hours = fitting.batch / rehearsal.step_s, rehearsal.step_s * fitting.steps / 3600
        lines.append(
            f"{rehearsal.step_s:.3g} s a step (mean of {MEASURED}), {rate:.3g} samples/s, {hours:.2g} h in all"
        )
    return lines


def _memory_lines(memory: Memory) -> list[str]:
    parts = {field.name: getattr(memory, field.name) for field in fields(memory)}
    told = "  ".join(f"{name} {size / MIB:,.1f}" for name, size in parts.items() if size)
    return [f"MiB on each device: {told}  at the worst moment {memory.total / MIB:,.1f}"]
