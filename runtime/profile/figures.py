"""The figures of a profile, from the records of a run: profile.json, field by field.

Stages are those of `summary.STAGES`, computed there. What belongs to the profile alone stands here: the start counted
apart, how far each figure may move by itself, the ages of what was executed, and the machine beside it.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onbeat.kernels.limit import HELD
from onbeat.runtime.faults import Fault
from onbeat.runtime.measures import summarise_ns, supports
from onbeat.runtime.profile.conditions import conditions
from onbeat.runtime.profile.spread import cut, halves_spread
from onbeat.runtime.run_records import MachineRecords, RunRecords
from onbeat.runtime.summary import STAGES, Field, stage_samples, summarise

SCHEMA: Final = 1  # of profile.json; a higher one is written when a reader of this one would misread it
START_NS: Final = 1_000_000_000  # of a run, counted apart: caches and clocks are still cold
JUDGED: Final = (50.0, 95.0, 99.0)  # percentiles that runs are compared by

FIELDS: Final = (
    Field("schema", "number", "version of this table"),
    Field("log", "path", "what was read"),
    Field("log_problems", "list", "what the flight log lacks, and why"),
    Field("started", "ISO 8601, wall clock", "when the run began"),
    Field("duration_s", "s", "first tick to last"),
    Field("robot", "name", "the robot config that ran"),
    Field("instruction", "text", "what the policy was asked to do"),
    Field("mode", "name", "how chunks join"),
    Field("error", "text or null", "why the run ended early"),
    Field("config", "object", "the effective config"),
    Field("versions", "name: version", "Python, Onbeat and the packages that matter for timing"),
    Field("git_commit", "hash or null", "of the checkout that ran"),
    Field("bundle_sha256", "hash or null", "of the bundle's manifest"),
    Field("real_time", "what: got or not", "what the loop's thread asked of the operating system"),
    Field("conditions", "object", "machine, clocks, power mode, temperatures, throttling: null where not known"),
    Field("stages", "name: n, ms", "of every stage after the start; aa_*_ms: how far halves of this run lie apart"),
    Field("cold", "object, ms", "warm-up inferences, and the stages of the first second, counted apart"),
    Field("rate_hz_wanted", "Hz", "control loop rate of the config"),
    Field("rate_hz", "Hz", "ticks that ran / duration"),
    Field("ticks", "count", "ticks that ran"),
    Field("missed_ticks", "count", "deadlines whose whole period was gone"),
    Field("held_ticks", "count", "ticks on which no row of a chunk was due"),
    Field("policy_period_ms", "ms", "between two rows of a chunk"),
    Field("chunks", "count", "chunks published in time"),
    Field("chunks_refused", "why: count", "chunks that never ran"),
    Field("delay_budget", "policy steps: chunks", "the delay d that a chunk was planned with"),
    Field("delay_executed", "policy steps: chunks", "rows that ran as committed before the chunk came"),
    Field("delay_exceeded", "count", "chunks whose executed delay was above their budget"),
    Field("action_age", "n, ms", "capture of the observation to the command, of every tick that ran a chunk"),
    Field("threads", "name: object", "cpu_share, wait_share of the run; faults, preemptions: counts"),
    Field("memory", "object", "first_bytes, last_bytes, peak_bytes resident; minor_faults, major_faults: counts"),
    Field("faults", "kind: count", "bus and camera faults"),
)


def measure(run: RunRecords, log: str) -> dict[str, Any]:
    """profile.json: exactly the fields of FIELDS, in their order. log: what the records were read from."""
    report, warm = summarise(run), after_start(run)
    values = {
        **report,
        "schema": SCHEMA,
        "log": log,
        "conditions": conditions(run.machine),
        "stages": stages(warm),
        "cold": cold(run),
        "policy_period_ms": run.policy_period_ns / 1e6,
        "action_age": asdict(summarise_ns(action_ages(warm)[1])),
        "threads": threads(run.machine),
        "memory": memory(run.machine),
    }
    return {field.name: values[field.name] for field in FIELDS}


def after_start(run: RunRecords) -> RunRecords:
    """The run without its start."""
    return _between(run, _start_ends_ns(run), None)


def _start_ends_ns(run: RunRecords) -> int:
    return int(run.ticks.due_ns[0]) + START_NS if len(run.ticks.due_ns) else 0


def _between(run: RunRecords, from_ns: int | None, until_ns: int | None) -> RunRecords:
    """Its ticks due, and its chunks whose inference began, in a span of time."""
    low, high = (-(2**62) if from_ns is None else from_ns), (2**62 if until_ns is None else until_ns)
    keep = (run.ticks.due_ns >= low) & (run.ticks.due_ns < high)
    ticks = type(run.ticks)(**{name: getattr(run.ticks, name)[keep] for name in run.ticks.__slots__})
    return replace(run, ticks=ticks, chunks=tuple(chunk for chunk in run.chunks if low <= chunk.started_ns < high))


def stages(run: RunRecords) -> dict[str, dict[str, Any]]:
    """Name -> n, percentiles, and for each percentile that is judged how far halves of the run lie apart."""
    return {STAGES[key].name: _stage(samples) for key, samples in stage_samples(run).items()}


def _stage(samples_ns: NDArray[np.int64]) -> dict[str, Any]:
    blocks, known = cut(samples_ns), [p for p in JUDGED if supports(len(samples_ns) // 2, p)]
    spreads = {} if blocks is None else dict(zip(known, halves_spread(blocks, known) / 1e6, strict=True))
    apart = {spread_name(p): float(spreads[p]) if p in spreads else None for p in JUDGED}
    return {**asdict(summarise_ns(samples_ns)), **apart}


def spread_name(percent: float) -> str:
    """The A/A spread of a percentile in profile.json."""
    return f"aa_p{percent:g}_ms"


def spread_cells(stage: Mapping[str, Any]) -> tuple[str, str]:
    """For people: the A/A spread of the median, and of the largest percentile that is judged, as shares of them."""
    shares = [_share_of(stage, percent) for percent in JUDGED]
    tail = next((share for share in reversed(shares[1:]) if share is not None), None)
    return _plus_minus(shares[0]), _plus_minus(tail)


def _plus_minus(share: float | None) -> str:
    return "-" if share is None else f"±{100 * share:.{1 if share < 0.1 else 0}f} %"


def _share_of(stage: Mapping[str, Any], percent: float) -> float | None:
    spread, value = stage[spread_name(percent)], stage[f"p{percent:g}_ms"]
    return None if spread is None or not value else spread / value


def cold(run: RunRecords) -> dict[str, Any]:
    """What is in no other figure: the warm-up inferences, and the first second."""
    start = _between(run, None, _start_ends_ns(run))
    return {
        "warm_up_ms": [took_ns / 1e6 for took_ns in run.warm_up_ns],
        "start_s": START_NS / 1e9,
        "stages": {STAGES[key].name: asdict(summarise_ns(values)) for key, values in stage_samples(start).items()},
    }


def action_ages(run: RunRecords) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(when sent, how old the observation was) in ns of every tick that ran a row of a chunk."""
    observed = {chunk.chunk_id: chunk.observed_ns for chunk in run.chunks if chunk.chunk_id >= 0}
    ticks, ids = run.ticks, np.array(sorted(observed), np.int64)
    ran = np.isin(ticks.chunk_id, ids) & (ticks.flags & HELD == 0)
    sent_ns, chunk_id = ticks.sent_ns[ran], ticks.chunk_id[ran]
    seen_ns = np.array([observed[k] for k in ids.tolist()], np.int64)
    return sent_ns, sent_ns - seen_ns[np.searchsorted(ids, chunk_id)] if len(ids) else sent_ns


def threads(machine: MachineRecords | None) -> dict[str, dict[str, Any]]:
    """What each thread used between the first sample and the last; empty where nobody looked."""
    if machine is None or len(machine.samples) < 2:
        return {}
    span_ns = float(machine.samples["t_ns"][-1] - machine.samples["t_ns"][0])
    used = {name: machine.samples[name][-1] - machine.samples[name][0] for name in THREAD_COUNTS}
    return {
        name: {
            "cpu_share": float(used["cpu_ns"][k] / span_ns),
            "wait_share": float(used["wait_ns"][k] / span_ns),
            **{count: int(used[count][k]) for count in THREAD_COUNTS[2:]},
        }
        for k, name in enumerate(machine.about["threads"])
    }


THREAD_COUNTS: Final = ("cpu_ns", "wait_ns", "minor_faults", "major_faults", "sleeps", "preemptions")


def memory(machine: MachineRecords | None) -> dict[str, Any] | None:
    """Of the process; null where nobody looked."""
    if machine is None or len(machine.samples) == 0:
        return None
    resident = machine.samples["resident_bytes"]
    faults = {name: machine.samples[name] for name in ("minor_faults", "major_faults")}
    return {
        "first_bytes": int(resident[0]),
        "last_bytes": int(resident[-1]),
        "peak_bytes": int(resident.max()),
        **{name: int((counts[-1] - counts[0]).sum()) for name, counts in faults.items()},
    }


def fault_stretches(run: RunRecords, fault: Fault) -> list[tuple[int, int]]:
    """(first tick, last tick) of every stretch in which a fault was there, as places in the run's ticks."""
    edges = np.diff((run.ticks.faults >> int(fault) & 1).astype(np.int8), prepend=0, append=0)
    return list(zip(np.flatnonzero(edges > 0).tolist(), (np.flatnonzero(edges < 0) - 1).tolist(), strict=True))
