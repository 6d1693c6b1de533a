"""What a run came to: its records gathered into report.json, a table for the terminal, and a page for a person.

`RunRecords` is what was recorded; `summarise` turns it into the figures that `FIELDS` lists.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.runtime.measures import figure, summarise_ns, text_table, wilson_interval

# T ticks, J joints, N samples.


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
    Field("instruction", "text", "what the policy was asked to do"),
    Field("rate_hz_wanted", "Hz", "control loop rate of the config"),
    Field("rate_hz", "Hz", "ticks that ran / duration"),
    Field("ticks", "count", "ticks that ran"),
    Field("missed_ticks", "count", "deadlines the loop counted as missed"),
    Field("missed_ticks_wire", "count or null", "goals that did not reach the servo bus in time, seen by the twin"),
    Field("held_ticks", "count", "ticks on which no row of a chunk was due and the robot held its position"),
    Field("stages", "name: n, ms", "latency of every stage: n, p50_ms, p95_ms, p99_ms, max_ms"),
    Field("inference", "n, ms", "inference thread woken to chunk published"),
    Field("reaction", "n, ms", "row 0 due (capture of the observation) to chunk published"),
    Field("chunks", "count", "chunks published"),
    Field("policy_period_s", "s", "time between two rows of a chunk"),
    Field("delay_used", "policy steps: chunks", "rows locked to the previous chunk when a chunk was sampled"),
    Field("delay_executed", "policy steps: chunks", "rows of the previous chunk that really ran after the observation"),
    Field("delay_exceeded", "count", "chunks that came later than the delay they were sampled for"),
    Field("limit_events", "kind: count", "commands cut by a limit"),
    Field("faults", "kind: count", "bus and camera faults"),
    Field("attempts", "count", "tries at the task that ended, in success or by time; judged in the twin's world"),
    Field("successes", "count", "of these, the ones that succeeded"),
    Field("success_rate", "0..1 or null", "successes / attempts"),
    Field("success_interval", "0..1, 0..1", "Wilson 95 % interval of the success rate"),
)

# Stage name -> what is timed, in the order of the data flow; all in ms.
STAGES = {
    "camera age": "middle of the exposure to observation",
    "observe": "frames and joints to network inputs",
    "vision + prefix": "images, instruction and state to K/V",
    "flow": "all flow steps, gate included",
    "publish": "actions to joint targets in the loop's buffer",
    "tick lateness": "deadline to the start of the tick",
    "bus exchange": "sync write + sync read",
}


@dataclass(frozen=True, slots=True)
class Ticks:
    """The loop, tick by tick. due_ns, start_ns, exchange_ns (T,) int64, monotonic clock / durations.

    goal_rad, position_rad (T, J) float64: sent and read. chunk, row (T,) int64: sequence of the chunk and the row
    executed, -1 when the robot held. limits: (T,) int64 bits in the order of LIMITS.
    """

    due_ns: NDArray[np.int64]
    start_ns: NDArray[np.int64]
    exchange_ns: NDArray[np.int64]
    goal_rad: NDArray[np.float64]
    position_rad: NDArray[np.float64]
    chunk: NDArray[np.int64]
    row: NDArray[np.int64]
    limits: NDArray[np.int64]


LIMITS = ("position", "velocity", "acceleration")


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """One chunk: observed at t0_ns (row 0 is due then), inferred from started_ns to published_ns.

    rows: its length; delay: rows locked to its predecessor; stages_ns: name of STAGES -> duration.
    """

    sequence: int
    t0_ns: int
    started_ns: int
    published_ns: int
    rows: int
    delay: int
    stages_ns: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at the task, from the twin's world. success_ns: when it was judged a success, None when it was not."""

    start_ns: int
    end_ns: int
    success_ns: int | None


@dataclass(frozen=True, slots=True)
class Truth:
    """What the twin knows. t_ns (N,) int64, height_m (N,) float64 of the cube over its rest."""

    t_ns: NDArray[np.int64]
    height_m: NDArray[np.float64]
    attempts: tuple[Attempt, ...]
    missed_writes: int | None


@dataclass(frozen=True, slots=True)
class RunRecords:
    """All that was recorded. header: the first record of the log; pictures: view name -> PNG or JPEG bytes."""

    header: Mapping[str, Any]
    joints: tuple[str, ...]
    policy_period_ns: int
    ticks: Ticks
    missed_ticks: int
    chunks: tuple[ChunkRecord, ...]
    faults: Mapping[str, int]
    truth: Truth
    pictures: Mapping[str, bytes]


def summarise(records: RunRecords) -> dict[str, Any]:
    """report.json: exactly the fields of FIELDS, in their order."""
    values = {**_identity(records), **_loop(records), **_inference(records), **_task(records.truth)}
    return {field.name: values[field.name] for field in FIELDS}


def _identity(records: RunRecords) -> dict[str, Any]:
    names = ("started", "robot", "config", "versions", "git_commit", "bundle_sha256", "instruction", "rate_hz_wanted")
    return {name: records.header.get(name) for name in names}


def _loop(records: RunRecords) -> dict[str, Any]:
    ticks = records.ticks
    duration_s = float(ticks.start_ns[-1] - ticks.start_ns[0]) / 1e9 if len(ticks.start_ns) > 1 else 0.0
    return {
        "duration_s": duration_s,
        "rate_hz": (len(ticks.start_ns) - 1) / duration_s if duration_s else None,
        "ticks": len(ticks.start_ns),
        "missed_ticks": records.missed_ticks,
        "missed_ticks_wire": records.truth.missed_writes,
        "held_ticks": int(np.count_nonzero(ticks.chunk < 0)),
        "stages": {name: asdict(summarise_ns(samples)) for name, samples in stage_samples(records).items()},
        "limit_events": {n: int(np.count_nonzero(ticks.limits >> b & 1)) for b, n in enumerate(LIMITS)},
        "faults": dict(records.faults),
    }


def stage_samples(records: RunRecords) -> dict[str, NDArray[np.int64]]:
    """Every duration of every stage of STAGES, ns."""
    ticks = records.ticks
    loop = {"tick lateness": ticks.start_ns - ticks.due_ns, "bus exchange": ticks.exchange_ns}
    return {name: loop[name] if name in loop else _chunk_stage(records.chunks, name) for name in STAGES}


def _chunk_stage(chunks: Iterable[ChunkRecord], name: str) -> NDArray[np.int64]:
    return np.array([chunk.stages_ns[name] for chunk in chunks if name in chunk.stages_ns], np.int64)


def _inference(records: RunRecords) -> dict[str, Any]:
    executed = executed_delays(records)
    used = {chunk.sequence: chunk.delay for chunk in records.chunks}
    exceeded = sum(delay > used[sequence] for sequence, delay in executed.items())
    chunks = records.chunks
    return {
        "inference": asdict(summarise_ns([chunk.published_ns - chunk.started_ns for chunk in chunks])),
        "reaction": asdict(summarise_ns([chunk.published_ns - chunk.t0_ns for chunk in chunks])),
        "chunks": len(chunks),
        "policy_period_s": records.policy_period_ns / 1e9,
        "delay_used": _counts(used.values()),
        "delay_executed": _counts(executed.values()),
        "delay_exceeded": exceeded,
    }


def executed_delays(records: RunRecords) -> dict[int, int]:
    """Chunk sequence -> the first of its rows that ran, which is how many rows of its predecessor ran in their place.

    Chunks that no tick executed are left out; so is the first one, which has no predecessor.
    """
    sequences, first = np.unique(records.ticks.chunk, return_index=True)
    rows = {int(s): int(records.ticks.row[i]) for s, i in zip(sequences, first, strict=True) if s >= 0}
    opening = min((chunk.sequence for chunk in records.chunks), default=-1)
    known = {chunk.sequence for chunk in records.chunks} - {opening}
    return {sequence: row for sequence, row in rows.items() if sequence in known}


def _counts(values: Iterable[int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def _task(truth: Truth) -> dict[str, Any]:
    attempts = len(truth.attempts)
    successes = sum(attempt.success_ns is not None for attempt in truth.attempts)
    return {
        "attempts": attempts,
        "successes": successes,
        "success_rate": successes / attempts if attempts else None,
        "success_interval": list(wilson_interval(successes, attempts)),
    }


def as_text(report: Mapping[str, Any]) -> str:
    """The end of a run on a terminal: a latency table and the figures that matter most."""
    stages = ((name, *_latency_cells(latency)) for name, latency in report["stages"].items())
    latencies = text_table(("stage", "n", "p50 ms", "p95 ms", "p99 ms", "max ms"), stages)
    return f"{latencies}\n\n{text_table(('run', ''), headline(report))}"


def _latency_cells(latency: Mapping[str, Any]) -> tuple[str, ...]:
    keys = ("p50_ms", "p95_ms", "p99_ms", "max_ms")
    return (str(latency["n"]), *(figure(latency[key]) for key in keys))


def headline(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader wants to know first, (name, value with unit)."""
    low, high = report["success_interval"]
    return [
        ("loop rate", f"{figure(report['rate_hz'], 1)} Hz of {figure(report['rate_hz_wanted'], 0)} Hz"),
        (
            "missed ticks",
            f"{report['missed_ticks']} of {report['ticks']} (wire: {_or_dash(report['missed_ticks_wire'])})",
        ),
        (
            "inference p50 / p99",
            f"{figure(report['inference']['p50_ms'], 1)} / {figure(report['inference']['p99_ms'], 1)} ms",
        ),
        ("chunks later than their delay", f"{report['delay_exceeded']} of {report['chunks']}"),
        ("ticks held", str(report["held_ticks"])),
        ("limit events", ", ".join(f"{kind} {count}" for kind, count in report["limit_events"].items()) or "none"),
        (
            "task success",
            f"{report['successes']} of {report['attempts']} ({100 * low:.0f}-{100 * high:.0f} %, Wilson 95 %)",
        ),
    ]


def _or_dash(value: Any) -> str:
    return "-" if value is None else str(value)


def write(folder: Path, records: RunRecords) -> dict[str, Any]:
    """Write report.json and report.html into `folder`; returns the report."""
    from onbeat.runtime import page

    report = summarise(records)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page.render(report, records), encoding="utf-8")
    return report
