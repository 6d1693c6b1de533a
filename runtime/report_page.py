"""report.html: one page a person likes to read about a run: the task, the chunks, latency, the joints, every figure."""

import base64
import json
from collections.abc import Callable
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.runtime import chart
from onbeat.runtime.measures import figure
from onbeat.runtime.page import (
    COLUMNS,
    TIMELINE_WORDS,
    Report,
    as_words,
    captioned,
    chunk_timeline,
    fill,
    latency_table,
    lateness_over_time,
    seconds,
    section,
    stage_histograms,
    tile,
    wide,
    wide_axes,
)
from onbeat.runtime.run_records import Attempt, RunRecords
from onbeat.runtime.summary import FIELDS, STAGES, Field, stage_samples


def render(report: Report, run: RunRecords) -> str:
    """The page. report: as `summarise` returns it; run: its records."""
    return fill(
        title=f"Onbeat run, {report['robot']}",
        lead=lead(report),
        error=report["error"],
        tiles=_tiles(report),
        sections=(part(report, run) for part in SECTIONS),
    )


def lead(report: Report) -> str:
    """What ran, for how long, when."""
    asked = f"“{report['instruction']}”" if report["instruction"] else "no instruction"
    return f"{asked} · {figure(report['duration_s'], 1)} s · {report['started'] or 'start time unknown'}"


def _tiles(report: Report) -> list[str]:
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
    return [tile(str(value), unit, name, detail) for value, unit, name, detail in tiles]


def _on_the_wire(missed: int | None) -> str:
    return "not seen by a twin" if missed is None else f"seen on the wire: {missed}"


def _cameras(_: Report, run: RunRecords) -> str:
    if not run.pictures:
        return ""
    views = "".join(captioned(name, "", _picture(name, data)) for name, data in run.pictures.items())
    return section("What the policy saw", "The last camera frames of the run.", f'<div class="grid2">{views}</div>')


def _picture(name: str, data: bytes) -> str:
    kind = "jpeg" if data[:2] == b"\xff\xd8" else "png"
    return f'<img alt="{escape(name)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _task(report: Report, run: RunRecords) -> str:
    truth = run.truth
    if truth is None or len(truth.t_ns) == 0 or len(run.ticks.start_ns) == 0:
        return ""
    during = np.flatnonzero((truth.t_ns >= run.ticks.start_ns[0]) & (truth.t_ns <= run.ticks.start_ns[-1]))
    keep = during[chart.sparse(len(during), COLUMNS)]
    times, height_cm = seconds(run, truth.t_ns[keep]), 100 * truth.height_m[keep]
    axes = wide_axes(report["duration_s"], (0.0, max(6.0, float(height_cm.max(initial=0.0)) * 1.08)))
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
    return section("The task", words, key, wide(drawing))


def _shade(axes: chart.Axes, run: RunRecords, attempt: Attempt) -> str:
    start, end = seconds(run, attempt.start_ns), seconds(run, attempt.end_ns)
    css, verdict = ("ink lost", "no success") if attempt.success_ns is None else ("ink won", "success")
    return chart.block(axes, (start, end), axes.y_range, css, f"{start:.1f}-{end:.1f} s: {verdict}")


def _success(axes: chart.Axes, run: RunRecords, attempt: Attempt) -> str:
    if attempt.success_ns is None:
        return ""
    took_s = (attempt.success_ns - attempt.start_ns) / 1e9
    return chart.marker(axes, seconds(run, attempt.success_ns), "pen good", f"{took_s:.1f} s")


def _timeline(_: Report, run: RunRecords) -> str:
    drawing = chunk_timeline(run)
    return drawing and section("Chunk timeline: observation to command", TIMELINE_WORDS, drawing)


def _latency(report: Report, run: RunRecords) -> str:
    return section(
        "Latency, stage by stage",
        "Dashed lines: p50 and p99, or p95 where samples are few. What lies beyond the right edge is in the last bar. "
        "A dash: too few samples.",
        latency_table(report["stages"]),
        "<br>",
        stage_histograms(stage_samples(run)),
    )


def _lateness(report: Report, run: RunRecords) -> str:
    if len(run.ticks.start_ns) == 0:
        return ""
    words = (
        "How long after its deadline a tick began; each point is the worst of its stretch of time. A deadline whose "
        f"whole period of {1e3 / report['rate_hz_wanted']:.1f} ms is gone is missed, counted and never made up for."
    )
    return section("Tick lateness", words, wide(lateness_over_time(run, report["duration_s"])))


def _joints(report: Report, run: RunRecords) -> str:
    if len(run.ticks.start_ns) == 0:
        return ""
    charts = "".join(_joint(report, run, j) for j in range(len(run.joints)))
    key = chart.legend([("ink a", "target sent"), ("ink b", "measured")])
    words = "As sent to, and read from, the servo bus."
    return section("Joints: target and measured", words, key, f'<div class="grid2">{charts}</div>')


def _joint(report: Report, run: RunRecords, j: int) -> str:
    ticks, keep = run.ticks, chart.sparse(len(run.ticks.start_ns), COLUMNS)
    goal, measured = (np.degrees(series[keep, j]) for series in (ticks.goal_rad, ticks.position_rad))
    times = seconds(run, ticks.start_ns[keep]).tolist()
    axes = chart.Axes(340, 170, (0.0, max(report["duration_s"], 1e-3)), _padded(np.concatenate((goal, measured))))
    drawing = chart.svg(
        axes,
        chart.grid(axes, x_label="time, s", y_label="degrees", x_ticks=5),
        chart.line(axes, times, measured.tolist(), "pen b"),
        chart.line(axes, times, goal.tolist(), "pen a thin"),
        title=f"{run.joints[j]}: target and measured",
    )
    error_deg = float(np.sqrt(np.nanmean(np.degrees(ticks.goal_rad[:, j] - ticks.position_rad[:, j]) ** 2)))
    return captioned(run.joints[j].replace("_", " "), f"RMS difference {error_deg:.1f}°", drawing)


def _padded(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = max((high - low) * 0.08, 0.5)
    return low - margin, high + margin


def _facts(report: Report, _: RunRecords) -> str:
    rows = "".join(_fact(field, report[field.name]) for field in FIELDS if field.name not in ("config", "stages"))
    config = escape(json.dumps(report["config"], indent=2))
    return section(
        "Every figure",
        "As in report.json.",
        f'<table class="facts"><tr><th>field</th><th>value</th><th>meaning</th></tr>{rows}</table>',
        f"<details><summary>config: the effective one (object)</summary><pre>{config}</pre></details>",
    )


def _fact(field: Field, value: Any) -> str:
    meaning = escape(f"{field.meaning} ({field.unit})")
    return f"<tr><td>{field.name}</td><td>{as_words(value)}</td><td>{meaning}</td></tr>"


SECTIONS: tuple[Callable[[Report, RunRecords], str], ...] = (
    _task,
    _cameras,
    _timeline,
    _latency,
    _lateness,
    _joints,
    _facts,
)
