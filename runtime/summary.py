"""The figures of a run: report.json, field by field, and the same as a table for the terminal."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.kernels.limit import ACCELERATION, HELD, POSITION, VELOCITY
from onbeat.runtime.flight.messages import CHUNK_STAGES
from onbeat.runtime.measures import figure, summarise_ns, text_table, wilson_interval
from onbeat.runtime.run_records import RunRecords, Truth
from onbeat.runtime.tick import FLAG_NAMES, REFUSED
from onbeat.runtime.timeline import REFUSALS

LIMIT_FLAGS = (POSITION, VELOCITY, ACCELERATION, REFUSED)


@dataclass(frozen=True, slots=True)
class Stage:
    """One row of the latency table. meaning: from when to when."""

    name: str
    meaning: str


# In the order of the data flow: the stages of an inference under their names in the records, then those of the loop.
# What profile compares, what report.json holds and what both pages draw are these.
STAGES = {
    "camera_age": Stage("camera age", "capture of the oldest frame to the start of the inference"),
    "observe": Stage("observe", "frames and joints to network inputs"),
    "prefix": Stage("vision + prefix", "images, instruction and state to K/V"),
    "flow": Stage("flow", "all flow steps, gate included"),
    "publish": Stage("publish", "actions to joint targets in the loop's buffer"),
    "inference": Stage("inference", "all of it: inference thread woken to chunk published"),
    "lateness": Stage("tick lateness", "deadline to the start of the tick"),
    "compute": Stage("tick compute", "look up, faults, limits, check"),
    "exchange": Stage("bus exchange", "sync write and sync read of all servos"),
    "frame_to_command": Stage("frame to command", "capture to the first command that a chunk of it gave"),
}


@dataclass(frozen=True, slots=True)
class Field:
    """One entry of report.json."""

    name: str
    unit: str
    meaning: str


FIELDS = (
    Field("started", "ISO 8601, wall clock", "when the run began"),
    Field("duration_s", "s", "first tick to last"),
    Field("robot", "name", "the robot config that ran"),
    Field("config", "object", "the effective config"),
    Field("versions", "name: version", "Python, Onbeat and the packages that matter for timing"),
    Field("git_commit", "hash or null", "of the checkout; null when installed from a package"),
    Field("bundle_sha256", "hash", "of the bundle's manifest, which carries the hash of every file"),
    Field("calibration_sha256", "hash or null", "of the calibration file"),
    Field("real_time", "what: got or not", "what the loop's thread asked of the operating system"),
    Field("error", "text or null", "why the run ended early"),
    Field("log_problems", "list", "what the flight log lacks, and why"),
    Field("instruction", "text", "what the policy was asked to do"),
    Field("rate_hz_wanted", "Hz", "control loop rate of the config"),
    Field("rate_hz", "Hz", "ticks that ran / duration"),
    Field("ticks", "count", "ticks that ran"),
    Field("missed_ticks", "count", "deadlines the loop counted as missed"),
    Field("missed_ticks_wire", "count or null", "goals that never came over the servo bus, seen by the twin"),
    Field("held_ticks", "count", "ticks on which no row of a chunk was due and the robot held its position"),
    Field("stages", "name: n, ms", "latency of every stage: n, p50_ms, p95_ms, p99_ms, p99_9_ms, max_ms"),
    Field("reaction", "n, ms", "capture of the observation to chunk published"),
    Field("chunks", "count", "chunks published in time"),
    Field("chunks_refused", "why: count", "chunks that never ran, by timeline.REFUSALS"),
    Field("policy_period_s", "s", "time between two rows of a chunk"),
    Field("mode", "name", "how chunks join: sync, async, locked or guided"),
    Field("delay_budget", "policy steps: chunks", "the delay d that a chunk was planned with"),
    Field("delay_used", "policy steps: chunks", "rows locked to the previous chunk when a chunk was sampled"),
    Field(
        "delay_executed",
        "policy steps: chunks",
        "rows from the observation on that ran as committed before it: those up to its seam, counted from ticks",
    ),
    Field("delay_exceeded", "count", "chunks whose executed delay was above the budget they were planned with"),
    Field("limit_events", "kind: count", "commands cut by a limit"),
    Field("faults", "kind: count", "bus and camera faults"),
    Field("attempts", "count", "tries at the task that ended, in success or by time; judged in the twin's world"),
    Field("successes", "count", "of these, the ones that succeeded"),
    Field("success_rate", "0..1 or null", "successes / attempts"),
    Field("success_interval", "0..1, 0..1", "Wilson 95 % interval of the success rate"),
)


def summarise(run: RunRecords) -> dict[str, Any]:
    """report.json: exactly the fields of FIELDS, in their order."""
    values = {**run.header, **_loop(run), **_inference(run), **_task(run.truth)}
    return {field.name: values[field.name] for field in FIELDS}


def _loop(run: RunRecords) -> dict[str, Any]:
    ticks = run.ticks
    duration_s = float(ticks.start_ns[-1] - ticks.start_ns[0]) / 1e9 if len(ticks.start_ns) > 1 else 0.0
    return {
        "duration_s": duration_s,
        "rate_hz": (len(ticks.start_ns) - 1) / duration_s if duration_s else None,
        "ticks": len(ticks.start_ns),
        "missed_ticks": run.missed_ticks,
        "missed_ticks_wire": _missed_on_the_wire(run),
        "held_ticks": int(np.count_nonzero(ticks.flags & HELD)),
        "stages": {STAGES[key].name: asdict(summarise_ns(samples)) for key, samples in stage_samples(run).items()},
        "limit_events": {FLAG_NAMES[flag]: int(np.count_nonzero(ticks.flags & flag)) for flag in LIMIT_FLAGS},
        "faults": dict(run.faults),
    }


def _missed_on_the_wire(run: RunRecords) -> int | None:
    start_ns = run.ticks.start_ns
    if run.truth is None or len(start_ns) == 0:
        return None
    goals_ns = run.truth.goals_ns  # the first is older than the loop: torque comes on with a goal where the arm is
    return missed_goals(goals_ns[goals_ns >= start_ns[0]], round(1e9 / run.header["rate_hz_wanted"]))


def missed_goals(goals_ns: NDArray[np.int64], period_ns: int) -> int:
    """How many goals did not come between the first and the last that did, by their times (G,).

    By the whole span, and not gap by gap: a goal that is late by a period's length was still sent.
    """
    if len(goals_ns) < 2:
        return 0
    due = round(int(goals_ns[-1] - goals_ns[0]) / period_ns) + 1
    return max(0, due - len(goals_ns))


def stage_samples(run: RunRecords) -> dict[str, NDArray[np.int64]]:
    """Every duration of every stage, ns, by its key in STAGES."""
    chunks, ticks = run.chunks, run.ticks
    return {
        **{key: np.array([chunk.stages_ns[key] for chunk in chunks], np.int64) for key in CHUNK_STAGES},
        "inference": np.array([chunk.published_ns - chunk.started_ns for chunk in chunks], np.int64),
        "lateness": ticks.start_ns - ticks.due_ns,
        "compute": ticks.compute_ns,
        "exchange": ticks.exchange_ns,
        "frame_to_command": np.array(list(frames_to_commands(run).values()), np.int64),
    }


def frames_to_commands(run: RunRecords) -> dict[int, int]:
    """Chunk id -> ns from the capture of its observation to the first command it was in force for, if it ever was."""
    ids, first = np.unique(run.ticks.chunk_id, return_index=True)
    sent_ns = dict(zip(ids.tolist(), run.ticks.sent_ns[first].tolist(), strict=True))
    taken = (chunk for chunk in run.chunks if chunk.chunk_id >= 0 and chunk.chunk_id in sent_ns)
    return {chunk.chunk_id: sent_ns[chunk.chunk_id] - chunk.observed_ns for chunk in taken}


def _inference(run: RunRecords) -> dict[str, Any]:
    chunks = run.chunks
    published = [chunk for chunk in chunks if chunk.chunk_id >= 0]
    executed = executed_delays(run)
    return {
        "reaction": asdict(summarise_ns([chunk.published_ns - chunk.observed_ns for chunk in chunks])),
        "chunks": len(published),
        "chunks_refused": _counts(REFUSALS[chunk.first_row] for chunk in chunks if chunk.chunk_id < 0),
        "policy_period_s": run.policy_period_ns / 1e9,
        "delay_used": _counts(chunk.delay for chunk in published),
        "delay_budget": _counts(chunk.budget for chunk in published),
        "delay_executed": _counts(executed.values()),
        "delay_exceeded": sum(executed.get(chunk.chunk_id, 0) > chunk.budget for chunk in published),
    }


def executed_delays(run: RunRecords) -> dict[int, int]:
    """Chunk id -> the rows of it that ran as something older had it, for chunks that ran.

    Of the first tick under a chunk, its row counts as well when it is one that repeats the old path.
    """
    ids, first = np.unique(run.ticks.chunk_id, return_index=True)
    begun = dict(zip(ids.tolist(), run.ticks.row[first].tolist(), strict=True))
    ran = {chunk.chunk_id: chunk.first_row for chunk in run.chunks if chunk.chunk_id in begun and chunk.chunk_id >= 0}
    return {chunk: begun[chunk] + (begun[chunk] < first_row) for chunk, first_row in ran.items()}


def _counts(values: Iterable[int] | Iterable[str]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def _task(truth: Truth | None) -> dict[str, Any]:
    tried = () if truth is None else truth.attempts
    successes = sum(attempt.success_ns is not None for attempt in tried)
    return {
        "attempts": len(tried),
        "successes": successes,
        "success_rate": successes / len(tried) if tried else None,
        "success_interval": list(wilson_interval(successes, len(tried))),
    }


def as_text(report: Mapping[str, Any]) -> str:
    """The end of a run on a terminal: a latency table and the figures that matter most."""
    stages = ((name, *latency_cells(latency)) for name, latency in report["stages"].items())
    latencies = text_table(("stage", *LATENCY_HEADS), stages)
    return f"{latencies}\n\n{text_table(('run', ''), headline(report))}"


LATENCY_HEADS = ("n", "p50 ms", "p95 ms", "p99 ms", "p99.9 ms", "max ms")


def latency_cells(latency: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of LATENCY_HEADS; a dash for what n samples cannot tell."""
    keys = ("p50_ms", "p95_ms", "p99_ms", "p99_9_ms", "max_ms")
    return (str(latency["n"]), *(figure(latency[key], 3 if (latency["p50_ms"] or 0) < 1 else 2) for key in keys))


def headline(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader wants to know first, (name, value with unit)."""
    low, high = report["success_interval"]
    inference = report["stages"][STAGES["inference"].name]
    return [
        ("loop rate", f"{figure(report['rate_hz'], 1)} Hz of {figure(report['rate_hz_wanted'], 0)} Hz"),
        (
            "missed ticks",
            f"{report['missed_ticks']} of {report['ticks']} (wire: {_or_dash(report['missed_ticks_wire'])})",
        ),
        (
            "inference p50 / p99",
            f"{figure(inference['p50_ms'], 1)} / {figure(inference['p99_ms'], 1)} ms",
        ),
        ("chunks beyond their delay budget", f"{report['delay_exceeded']} of {report['chunks']}"),
        ("ticks held", str(report["held_ticks"])),
        ("limit events", ", ".join(f"{kind} {count}" for kind, count in report["limit_events"].items()) or "none"),
        (
            "task success",
            f"{report['successes']} of {report['attempts']} ({100 * low:.0f}-{100 * high:.0f} %, Wilson 95 %)",
        ),
    ]


def _or_dash(value: Any) -> str:
    return "-" if value is None else str(value)
