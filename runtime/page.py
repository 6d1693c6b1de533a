"""report.html: one page a person likes to read, with nothing fetched from anywhere."""

import base64
import json
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.runtime import chart
from onbeat.runtime.measures import figure, histogram
from onbeat.runtime.run_records import Attempt, ChunkRecord, RunRecords
from onbeat.runtime.summary import FIELDS, LATENCY_HEADS, STAGES, Field, Stage, latency_cells, stage_samples

COLUMNS = 900  # points drawn per curve: about one per pixel
BINS = 48
LANE_PX = 26
TIMELINE_S = 2.0  # of the chunk timeline: long enough for many hand-overs, short enough to see rows
Report = Mapping[str, Any]


def render(report: Report, run: RunRecords) -> str:
    """The page. report: as `summarise` returns it; run: its records."""
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    sections = "".join(section(report, run) for section in SECTIONS)
    title = f"Onbeat run, {report['robot']}"
    return template.substitute(
        title=escape(title), lead=_lead(report), error=_error(report), tiles=_tiles(report), sections=sections
    )


def _lead(report: Report) -> str:
    asked = f"“{report['instruction']}”" if report["instruction"] else "no instruction"
    return escape(f"{asked} · {figure(report['duration_s'], 1)} s · {report['started'] or 'start time unknown'}")


def _error(report: Report) -> str:
    return f'<p class="error">The run ended early: {escape(report["error"])}</p>' if report["error"] else ""


def _tiles(report: Report) -> str:
    low, high = (100 * share for share in report["success_interval"])
    lateness, inference = (report["stages"][STAGES[key].name] for key in ("lateness", "inference"))
    tiles = (
        (report["successes"], f"of {report['attempts']}", "task success", f"95 %: {low:.0f}–{high:.0f} %"),
        (figure(report["rate_hz"], 1), "Hz", "loop rate", f"wanted {figure(report['rate_hz_wanted'], 0)} Hz"),
        (report["missed_ticks"], f"of {report['ticks']}", "missed ticks", _on_the_wire(report["missed_ticks_wire"])),
        (figure(lateness["p99_ms"]), "ms", "tick lateness, p99", f"max {figure(lateness['max_ms'])} ms"),
        (figure(inference["p50_ms"], 0), "ms", "inference, p50", f"p99 {figure(inference['p99_ms'], 0)} ms"),
        (
            report["delay_exceeded"],
            f"of {report['chunks']}",
            "chunks beyond their delay",
            f"refused: {sum(report['chunks_refused'].values())}",
        ),
    )
    return "".join(_tile(f"{value} <small>{unit}</small>", name, detail) for value, unit, name, detail in tiles)


def _on_the_wire(missed: int | None) -> str:
    return "not seen by a twin" if missed is None else f"seen on the wire: {missed}"


def _tile(value: str, name: str, detail: str) -> str:
    return f'<div class="tile"><b>{value}</b><span>{escape(name)}</span><i>{escape(detail)}</i></div>'


def _section(heading: str, why: str, *content: str) -> str:
    return f'<section><h2>{escape(heading)}</h2><p class="why">{escape(why)}</p>{"".join(content)}</section>'


def _figure(caption: str, detail: str, drawing: str) -> str:
    return f"<figure><figcaption>{escape(caption)} <em>{escape(detail)}</em></figcaption>{drawing}</figure>"


def _cameras(_: Report, run: RunRecords) -> str:
    if not run.pictures:
        return ""
    views = "".join(_figure(name, "", _picture(name, data)) for name, data in run.pictures.items())
    return _section("What the policy saw", "The last camera frames of the run.", f'<div class="grid2">{views}</div>')


def _picture(name: str, data: bytes) -> str:
    kind = "jpeg" if data[:2] == b"\xff\xd8" else "png"
    return f'<img alt="{escape(name)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _task(report: Report, run: RunRecords) -> str:
    truth = run.truth
    if truth is None or len(truth.t_ns) == 0 or len(run.ticks.start_ns) == 0:
        return ""
    during = np.flatnonzero((truth.t_ns >= run.ticks.start_ns[0]) & (truth.t_ns <= run.ticks.start_ns[-1]))
    keep = during[chart.sparse(len(during), COLUMNS)]
    times, height_cm = _seconds(run, truth.t_ns[keep]), 100 * truth.height_m[keep]
    axes = _wide_axes(report, (0.0, max(6.0, float(height_cm.max(initial=0.0)) * 1.08)))
    drawing = chart.svg(
        axes,
        *(_shade(axes, run, attempt) for attempt in truth.attempts),
        chart.grid(axes, x_label="time, s", y_label="cube height, cm", x_ticks=10),
        chart.line(axes, times.tolist(), height_cm.tolist(), "pen a"),
        *(_success(axes, run, attempt) for attempt in truth.attempts),
        title="height of the cube over time, attempts shaded",
    )
    words = "Judged in the simulated world, which the policy cannot see. A line marks a success, and after how long."
    key = chart.legend([("ink a", "height of the cube"), ("ink won", "success"), ("ink lost", "no success")])
    return _section("The task", words, key, f'<div class="wide">{drawing}</div>')


def _shade(axes: chart.Axes, run: RunRecords, attempt: Attempt) -> str:
    start, end = _seconds(run, attempt.start_ns), _seconds(run, attempt.end_ns)
    css, verdict = ("ink lost", "no success") if attempt.success_ns is None else ("ink won", "success")
    return chart.block(axes, (start, end), axes.y_range, css, f"{start:.1f}-{end:.1f} s: {verdict}")


def _success(axes: chart.Axes, run: RunRecords, attempt: Attempt) -> str:
    if attempt.success_ns is None:
        return ""
    took_s = (attempt.success_ns - attempt.start_ns) / 1e9
    return chart.marker(axes, _seconds(run, attempt.success_ns), "pen good", f"{took_s:.1f} s")


def _seconds(run: RunRecords, t_ns: Any) -> Any:
    """Seconds since the first tick, of a time or of an array of times."""
    ticks = run.ticks.start_ns
    return (t_ns - (int(ticks[0]) if len(ticks) else 0)) / 1e9


def _wide_axes(report: Report, y_range: tuple[float, float], height: int = 190) -> chart.Axes:
    return chart.Axes(1060, height, (0.0, max(report["duration_s"], 1e-3)), y_range)


def _timeline(_: Report, run: RunRecords) -> str:
    window = timeline_window(run)
    chunks = [c for c in run.chunks if c.chunk_id >= 0 and c.published_ns > window[0] and c.observed_ns < window[1]]
    if not chunks:
        return ""
    executed = executed_rows(run)
    start, end = (_seconds(run, t_ns) for t_ns in window)
    axes = chart.Axes(1060, 44 + LANE_PX * len(chunks), (start, end), (float(len(chunks)), 0.0))
    drawing = chart.svg(
        axes,
        chart.grid(axes, x_label="time, s", y_label="chunk", x_ticks=12, y_ticks=0),
        *(_lane(axes, lane, chunk, run, executed) for lane, chunk in enumerate(chunks)),
        title="which rows of which chunk were executed when",
    )
    words = (
        f"{TIMELINE_S:.0f} s from the middle of the run. Row 0 of a chunk is due at its observation (in mode sync, "
        "when it comes). When a chunk is published, what is past is skipped, and from its first own row on it replaces "
        "the chunk before."
    )
    return _section(
        "Chunk timeline: observation to command", words, chart.legend(ROWS), f'<div class="wide">{drawing}</div>'
    )


ROWS = (
    ("ink pale", "waiting since the capture of the observation"),
    ("ink b", "inference"),
    ("ink lock", "row locked to the chunk before"),
    ("ink a", "row executed"),
    ("ink wash", "row past before the chunk came, or replaced by the next"),
)


def timeline_window(run: RunRecords) -> tuple[int, int]:
    """TIMELINE_S from the middle of the run, ns."""
    start = run.ticks.start_ns
    middle = int(start[len(start) // 2]) if len(start) else 0
    half = round(TIMELINE_S / 2 * 1e9)
    return middle - half, middle + half


def executed_rows(run: RunRecords) -> set[tuple[int, int]]:
    """(chunk, row) pairs that were in force in at least one tick."""
    return set(zip(run.ticks.chunk_id.tolist(), run.ticks.row.tolist(), strict=True))


def _lane(axes: chart.Axes, lane: int, chunk: ChunkRecord, run: RunRecords, executed: set[tuple[int, int]]) -> str:
    observed, started, published = (_seconds(run, t) for t in (chunk.observed_ns, chunk.started_ns, chunk.published_ns))
    thin = (lane + 0.30, lane + 0.10)
    hint = f"chunk {chunk.chunk_id}: inference {(published - started) * 1e3:.1f} ms, {chunk.delay} rows locked"
    return "".join(
        [
            *(_row(axes, lane, chunk, k, run, executed) for k in range(chunk.rows)),
            chart.block(axes, (observed, started), thin, "ink pale"),
            chart.block(axes, (started, published), thin, "ink b", hint),
            chart.note(axes, axes.x_range[0], lane + 0.75, f"#{chunk.chunk_id} ", "end"),
        ]
    )


def _row(
    axes: chart.Axes, lane: int, chunk: ChunkRecord, k: int, run: RunRecords, executed: set[tuple[int, int]]
) -> str:
    start = _seconds(run, chunk.t0_ns + k * run.policy_period_ns)
    end = start + 0.94 * run.policy_period_ns / 1e9
    if (chunk.chunk_id, k) in executed:
        css, state = "ink a", "executed"
    else:
        css, state = ("ink lock", "locked") if k < chunk.delay else ("ink wash", "not executed")
    words = f"chunk {chunk.chunk_id}, row {k}: {state}"
    return chart.block(axes, (start, end), (lane + 0.92, lane + 0.36), css, words)


def _latency(report: Report, run: RunRecords) -> str:
    rows = "".join(_latency_row(stage, report["stages"][stage.name]) for stage in STAGES.values())
    heads = "".join(f"<th>{name}</th>" for name in ("stage", *LATENCY_HEADS))
    charts = "".join(_stage(STAGES[key].name, samples) for key, samples in stage_samples(run).items() if len(samples))
    return _section(
        "Latency, stage by stage",
        "Dashed lines: p50 and p99. What lies beyond the right edge is counted in the last bar.",
        f'<div class="wide"><table><tr>{heads}</tr>{rows}</table></div><br>',
        f'<div class="grid2">{charts}</div>',
    )


def _latency_row(stage: Stage, latency: Mapping[str, Any]) -> str:
    cells = "".join(f"<td>{cell}</td>" for cell in latency_cells(latency))
    return f"<tr><td>{escape(stage.name)}<em>{escape(stage.meaning)}</em></td>{cells}</tr>"


def _stage(name: str, samples_ns: NDArray[np.int64]) -> str:
    samples = samples_ns / 1e6
    p50, p99 = (float(p) for p in np.percentile(samples, (50, 99)))
    bins = histogram(np.minimum(samples, max(p99 * 1.25, 1e-3)), min(BINS, max(8, len(samples) // 8)))
    axes = chart.Axes(340, 170, (float(bins.edges[0]), float(bins.edges[-1])), (0.0, float(bins.counts.max()) * 1.2))
    drawing = chart.svg(
        axes,
        chart.grid(axes, x_label="ms", y_label="count", x_ticks=5, y_ticks=3),
        chart.bars(axes, bins.edges.tolist(), bins.counts.tolist(), "ink a"),
        chart.marker(axes, p50, "mark", f"p50 {p50:.2f}"),
        chart.marker(axes, p99, "mark", f"p99 {p99:.2f}", depth=1),
        title=f"histogram of {name}",
    )
    return _figure(name, f"max {samples.max():.2f} ms", drawing)


def _lateness(report: Report, run: RunRecords) -> str:
    ticks = run.ticks
    if len(ticks.start_ns) == 0:
        return ""
    times, worst = chart.peaks(_seconds(run, ticks.start_ns), (ticks.start_ns - ticks.due_ns) / 1e6, COLUMNS)
    axes = _wide_axes(report, (0.0, max(float(worst.max()) * 1.08, 0.1)))
    drawing = chart.svg(
        axes,
        chart.grid(axes, x_label="time, s", y_label="lateness, ms", x_ticks=10),
        chart.line(axes, times.tolist(), worst.tolist(), "pen a thin"),
        title="tick lateness over time",
    )
    words = (
        "How long after its deadline a tick began; each point is the worst of its stretch of time. A deadline whose "
        f"whole period of {1e3 / report['rate_hz_wanted']:.1f} ms is gone is missed, counted and never made up for."
    )
    return _section("Tick lateness", words, f'<div class="wide">{drawing}</div>')


def _joints(report: Report, run: RunRecords) -> str:
    if len(run.ticks.start_ns) == 0:
        return ""
    charts = "".join(_joint(report, run, j) for j in range(len(run.joints)))
    key = chart.legend([("ink a", "target sent"), ("ink b", "measured")])
    words = "As sent to, and read from, the servo bus."
    return _section("Joints: target and measured", words, key, f'<div class="grid2">{charts}</div>')


def _joint(report: Report, run: RunRecords, j: int) -> str:
    ticks, keep = run.ticks, chart.sparse(len(run.ticks.start_ns), COLUMNS)
    goal, measured = (np.degrees(series[keep, j]) for series in (ticks.goal_rad, ticks.position_rad))
    times = _seconds(run, ticks.start_ns[keep]).tolist()
    axes = chart.Axes(340, 170, (0.0, max(report["duration_s"], 1e-3)), _padded(np.concatenate((goal, measured))))
    drawing = chart.svg(
        axes,
        chart.grid(axes, x_label="time, s", y_label="degrees", x_ticks=5),
        chart.line(axes, times, measured.tolist(), "pen b"),
        chart.line(axes, times, goal.tolist(), "pen a thin"),
        title=f"{run.joints[j]}: target and measured",
    )
    error_deg = float(np.sqrt(np.nanmean(np.degrees(ticks.goal_rad[:, j] - ticks.position_rad[:, j]) ** 2)))
    return _figure(run.joints[j].replace("_", " "), f"RMS difference {error_deg:.1f}°", drawing)


def _padded(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = max((high - low) * 0.08, 0.5)
    return low - margin, high + margin


def _facts(report: Report, _: RunRecords) -> str:
    rows = "".join(_fact(field, report[field.name]) for field in FIELDS if field.name not in ("config", "stages"))
    config = escape(json.dumps(report["config"], indent=2))
    return _section(
        "Every figure",
        "As in report.json.",
        f'<table class="facts"><tr><th>field</th><th>value</th><th>meaning</th></tr>{rows}</table>',
        f"<details><summary>config: the effective one (object)</summary><pre>{config}</pre></details>",
    )


def _fact(field: Field, value: Any) -> str:
    meaning = escape(f"{field.meaning} ({field.unit})")
    return f"<tr><td>{field.name}</td><td>{_value(value)}</td><td>{meaning}</td></tr>"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "<br>".join(f"{escape(str(k))}: {_value(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


SECTIONS: tuple[Callable[[Report, RunRecords], str], ...] = (
    _task,
    _cameras,
    _timeline,
    _latency,
    _lateness,
    _joints,
    _facts,
)
