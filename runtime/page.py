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
from onbeat.runtime.report import FIELDS, STAGES, ChunkRecord, Field, RunRecords, stage_samples

COLUMNS = 900  # points drawn per curve: about one per pixel
BINS = 48
TIMELINE_S = 3.0  # of the chunk timeline: long enough for several hand-overs, short enough to see rows
Report = Mapping[str, Any]


def render(report: Report, records: RunRecords) -> str:
    """The page. report: as `summarise` returns it; records: of the same run."""
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    sections = "".join(section(report, records) for section in SECTIONS)
    title = f"Onbeat run, {report['robot']}"
    return template.substitute(title=escape(title), lead=_lead(report), tiles=_tiles(report), sections=sections)


def _lead(report: Report) -> str:
    asked = f"“{report['instruction']}”" if report["instruction"] else "no instruction"
    return escape(f"{asked} · {figure(report['duration_s'], 1)} s · {report['started'] or 'start time unknown'}")


def _tiles(report: Report) -> str:
    low, high = (100 * share for share in report["success_interval"])
    lateness, inference = report["stages"]["tick lateness"], report["inference"]
    tiles = (
        (report["successes"], f"of {report['attempts']}", "task success", f"95 %: {low:.0f}–{high:.0f} %"),
        (figure(report["rate_hz"], 1), "Hz", "loop rate", f"wanted {figure(report['rate_hz_wanted'], 0)} Hz"),
        (report["missed_ticks"], f"of {report['ticks']}", "missed ticks", _on_the_wire(report["missed_ticks_wire"])),
        (figure(lateness["p99_ms"]), "ms", "tick lateness, p99", f"max {figure(lateness['max_ms'])} ms"),
        (figure(inference["p50_ms"], 0), "ms", "inference, p50", f"p99 {figure(inference['p99_ms'], 0)} ms"),
        (report["delay_exceeded"], f"of {report['chunks']}", "chunks too late", "against their delay"),
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


def _cameras(_: Report, records: RunRecords) -> str:
    if not records.pictures:
        return ""
    views = "".join(_figure(name, "", _picture(name, data)) for name, data in records.pictures.items())
    return _section("What the policy saw", "The last camera frames of the run.", f'<div class="grid2">{views}</div>')


def _picture(name: str, data: bytes) -> str:
    kind = "jpeg" if data[:2] == b"\xff\xd8" else "png"
    return f'<img alt="{escape(name)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _success(report: Report, records: RunRecords) -> str:
    truth = records.truth
    if len(truth.t_ns) == 0:
        return ""
    zero = _zero_ns(records)
    height_cm = truth.height_m * 100
    axes = chart.Axes(1060, 190, (0.0, max(report["duration_s"], 1.0)), (0.0, max(6.0, float(height_cm.max()) * 1.08)))
    spans = [(a, ((a.start_ns - zero) / 1e9, (a.end_ns - zero) / 1e9)) for a in truth.attempts]
    blocks = (chart.block(axes, span, axes.y_range, "ink won" if a.success_ns else "ink lost",
                          f"{span[0]:.1f}-{span[1]:.1f} s: {'success' if a.success_ns else 'no success'}")
              for a, span in spans)  # fmt: skip
    wins = (chart.marker(axes, (a.success_ns - zero) / 1e9, "pen good", f"{(a.success_ns - a.start_ns) / 1e9:.1f} s")
            for a in truth.attempts if a.success_ns is not None)  # fmt: skip
    keep = chart.sparse(len(height_cm), COLUMNS)
    curve = chart.line(axes, ((truth.t_ns - zero) / 1e9)[keep].tolist(), height_cm[keep].tolist(), "pen a")
    grid = chart.grid(axes, x_label="time, s", y_label="cube height, cm", x_ticks=10)
    drawing = chart.svg(axes, *blocks, grid, curve, *wins, title="height of the cube over time, attempts shaded")
    words = "Judged in the simulated world, which the policy cannot see. A line marks a success, and after how long."
    key = chart.legend(
        [("ink a", "height of the cube over its rest"), ("ink won", "success"), ("ink lost", "no success")]
    )
    return _section("The task", words, key, f'<div class="wide">{drawing}</div>')


def _zero_ns(records: RunRecords) -> int:
    return int(records.ticks.start_ns[0]) if len(records.ticks.start_ns) else 0


def _timeline(_: Report, records: RunRecords) -> str:
    window = timeline_window(records)
    chunks = [c for c in records.chunks if c.published_ns > window[0] and c.t0_ns < window[1]]
    if not chunks:
        return ""
    rows_run = executed_rows(records)
    axes = chart.Axes(1060, 44 + 30 * len(chunks), _seconds(window, records), (float(len(chunks)), 0.0))
    lanes = (_lane(axes, lane, c, records, rows_run) for lane, c in enumerate(chunks))
    labels = (chart.note(axes, axes.x_range[0], i + 0.62, f"#{c.sequence}", "end") for i, c in enumerate(chunks))
    grid = chart.grid(axes, x_label="time, s", y_label="", x_ticks=12, y_ticks=1)
    key = chart.legend([
        ("ink pale", "observation captured, waiting for inference"), ("ink b", "inference"), ("ink a", "row executed"),
        ("ink wash", "row not executed: the chunk was not there yet, or the next one had come"),
    ])  # fmt: skip
    words = (
        f"{TIMELINE_S:.0f} s from the middle of the run. A chunk is stamped with the time of its observation; when it is "
        "published, rows that are past are skipped and the rows from there on replace those of the chunk before."
    )
    drawing = chart.svg(axes, grid, *lanes, *labels, title="which rows of which chunk were executed when")
    return _section("Chunk timeline: observation to command", words, key, f'<div class="wide">{drawing}</div>')


def timeline_window(records: RunRecords) -> tuple[int, int]:
    """TIMELINE_S from the middle of the run, ns."""
    start = records.ticks.start_ns
    middle = int(start[len(start) // 2]) if len(start) else 0
    half = round(TIMELINE_S / 2 * 1e9)
    return middle - half, middle + half


def executed_rows(records: RunRecords) -> set[tuple[int, int]]:
    """(chunk, row) pairs that at least one tick executed."""
    return set(zip(records.ticks.chunk.tolist(), records.ticks.row.tolist(), strict=True))


def _seconds(window_ns: tuple[int, int], records: RunRecords) -> tuple[float, float]:
    zero = _zero_ns(records)
    return (window_ns[0] - zero) / 1e9, (window_ns[1] - zero) / 1e9


def _lane(axes: chart.Axes, lane: int, c: ChunkRecord, records: RunRecords, rows_run: set[tuple[int, int]]) -> str:
    zero, period = _zero_ns(records), records.policy_period_ns
    rows = (_row(axes, lane, c, k, _seconds((c.t0_ns + k * period, c.t0_ns + (k + 1) * period), records),
                 (c.sequence, k) in rows_run) for k in range(c.rows))  # fmt: skip
    started, published = (c.started_ns - zero) / 1e9, (c.published_ns - zero) / 1e9
    waiting = chart.block(axes, ((c.t0_ns - zero) / 1e9, started), (lane + 0.30, lane + 0.12), "ink pale")
    hint = f"chunk {c.sequence}: inference {(published - started) * 1e3:.1f} ms, delay used {c.delay} policy steps"
    return "".join(rows) + waiting + chart.block(axes, (started, published), (lane + 0.30, lane + 0.12), "ink b", hint)


def _row(axes: chart.Axes, lane: int, c: ChunkRecord, k: int, span: tuple[float, float], executed: bool) -> str:
    gap = (span[1] - span[0]) * 0.06
    words = f"chunk {c.sequence}, row {k}: {'executed' if executed else 'not executed'}"
    css = "ink a" if executed else "ink wash"
    return chart.block(axes, (span[0], span[1] - gap), (lane + 0.88, lane + 0.36), css, words)


def _latency(report: Report, records: RunRecords) -> str:
    rows = "".join(_latency_row(name, report["stages"][name]) for name in STAGES)
    heads = "".join(f"<th>{name}</th>" for name in ("stage", "n", "p50, ms", "p95, ms", "p99, ms", "max, ms"))
    charts = "".join(_stage(name, samples) for name, samples in stage_samples(records).items() if len(samples))
    return _section(
        "Latency, stage by stage",
        "Dashed lines: p50 and p99. What lies beyond the right edge is counted in the last bar.",
        f"<table><tr>{heads}</tr>{rows}</table><br>",
        f'<div class="grid2">{charts}</div>',
    )


def _latency_row(name: str, latency: Mapping[str, Any]) -> str:
    cells = "".join(f"<td>{figure(latency[key])}</td>" for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms"))
    return f"<tr><td>{escape(name)}<em>{escape(STAGES[name])}</em></td><td>{latency['n']}</td>{cells}</tr>"


def _stage(name: str, samples_ns: NDArray[np.int64]) -> str:
    samples = samples_ns / 1e6
    p50, p99 = np.percentile(samples, (50, 99))
    shown = np.minimum(samples, max(p99 * 1.25, 1e-3))
    bins = histogram(shown, BINS)
    axes = chart.Axes(340, 170, (float(bins.edges[0]), float(bins.edges[-1])), (0.0, float(bins.counts.max()) * 1.12))
    drawing = chart.svg(
        axes,
        chart.grid(axes, x_label="ms", y_label="count", x_ticks=5, y_ticks=3),
        chart.bars(axes, bins.edges.tolist(), bins.counts.tolist(), "ink a"),
        chart.marker(axes, float(p50), "mark", f"p50 {p50:.2f}"),
        chart.marker(axes, float(p99), "mark", f"p99 {p99:.2f}", depth=1),
        title=f"histogram of {name}",
    )
    return _figure(name, f"max {samples.max():.2f} ms", drawing)


def _lateness(report: Report, records: RunRecords) -> str:
    ticks = records.ticks
    if len(ticks.start_ns) == 0:
        return ""
    lateness = (ticks.start_ns - ticks.due_ns) / 1e6
    xs, ys = chart.peaks((ticks.start_ns - _zero_ns(records)) / 1e9, lateness, COLUMNS)
    axes = chart.Axes(1060, 190, (0.0, max(report["duration_s"], 1e-3)), (0.0, max(float(ys.max()) * 1.08, 0.1)))
    grid = chart.grid(axes, x_label="time, s", y_label="lateness, ms", x_ticks=10)
    curve = chart.line(axes, xs.tolist(), ys.tolist(), "pen a thin")
    drawing = chart.svg(axes, grid, curve, title="tick lateness over time")
    period_ms = 1e3 / report["rate_hz_wanted"]
    words = (
        "How long after its deadline a tick began; each point is the worst of its stretch of time. A tick later than the "
        f"period of {period_ms:.1f} ms is missed, counted and never replayed."
    )
    return _section("Tick lateness", words, f'<div class="wide">{drawing}</div>')


def _joints(report: Report, records: RunRecords) -> str:
    if len(records.ticks.start_ns) == 0:
        return ""
    charts = "".join(_joint(report, records, j) for j in range(len(records.joints)))
    key = chart.legend([("ink a", "target sent"), ("ink b", "measured")])
    return _section(
        "Joints: target and measured",
        "As sent to, and read from, the servo bus.",
        key,
        f'<div class="grid2">{charts}</div>',
    )


def _joint(report: Report, records: RunRecords, j: int) -> str:
    ticks = records.ticks
    keep = chart.sparse(len(ticks.start_ns), COLUMNS)
    goal, measured = (np.degrees(series[keep, j]) for series in (ticks.goal_rad, ticks.position_rad))
    times = ((ticks.start_ns - _zero_ns(records)) / 1e9)[keep].tolist()
    axes = chart.Axes(340, 170, (0.0, max(report["duration_s"], 1e-3)), _padded(np.concatenate((goal, measured))))
    drawing = chart.svg(
        axes,
        chart.grid(axes, x_label="time, s", y_label="degrees", x_ticks=5),
        chart.line(axes, times, goal.tolist(), "pen a thin"),
        chart.line(axes, times, measured.tolist(), "pen b thin"),
        title=f"{records.joints[j]}: target and measured",
    )
    error = float(np.sqrt(np.nanmean((goal - measured) ** 2)))
    return _figure(records.joints[j].replace("_", " "), f"RMS difference {error:.1f}°", drawing)


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
        f"<details><summary>effective config</summary><pre>{config}</pre></details>",
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
    _success, _cameras, _timeline, _latency, _lateness, _joints, _facts,
)  # fmt: skip
