"""The parts of an HTML page about a run: one template, sections, tiles, tables and the charts that pages share.

Nothing is fetched from anywhere. `report_page.py` and `profile/profile_page.py` are made of these.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.runtime import chart
from onbeat.runtime.measures import figure, histogram, percentile
from onbeat.runtime.run_records import ChunkRecord, RunRecords
from onbeat.runtime.summary import LATENCY_HEADS, STAGES, Stage, latency_cells

COLUMNS = 900  # points drawn per curve: about one per pixel
BINS = 48
LABEL_PX = 72  # of the figure at a marker
LANE_PX = 26
TIMELINE_S = 2.0  # of the chunk timeline: long enough for many hand-overs, short enough to see rows
SHADES = 5  # of the age of an executed row
Report = Mapping[str, Any]


def fill(*, title: str, lead: str, error: str | None, tiles: Iterable[str], sections: Iterable[str]) -> str:
    """The page. tiles, sections: HTML; the others plain text."""
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    warning = f'<p class="error">The run ended early: {escape(error)}</p>' if error else ""
    return template.substitute(
        title=escape(title), lead=escape(lead), error=warning, tiles="".join(tiles), sections="".join(sections)
    )


def tile(value: str, unit: str, name: str, detail: str) -> str:
    """One figure that a reader wants to know first."""
    head = f"{escape(value)} <small>{escape(unit)}</small>"
    return f'<div class="tile"><b>{head}</b><span>{escape(name)}</span><i>{escape(detail)}</i></div>'


def section(heading: str, why: str, *content: str) -> str:
    """A card. content: HTML."""
    return f'<section><h2>{escape(heading)}</h2><p class="why">{escape(why)}</p>{"".join(content)}</section>'


def captioned(caption: str, detail: str, drawing: str) -> str:
    """A drawing with words over it."""
    return f"<figure><figcaption>{escape(caption)} <em>{escape(detail)}</em></figcaption>{drawing}</figure>"


def wide(drawing: str) -> str:
    """A drawing over the page's whole width, which scrolls on a narrow screen."""
    return f'<div class="wide">{drawing}</div>'


def wide_axes(duration_s: float, y_range: tuple[float, float], height: int = 190) -> chart.Axes:
    """Of a drawing over the whole of a run."""
    return chart.Axes(1060, height, (0.0, max(duration_s, 1e-3)), y_range)


def thinned(times: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    """As many points as can be drawn, each the largest of its stretch."""
    x, y = chart.peaks(times, values, COLUMNS)
    return x.tolist(), y.tolist()


def seconds(run: RunRecords, t_ns: Any) -> Any:
    """Seconds since the first tick, of a time or of an array of times."""
    ticks = run.ticks.start_ns
    return (t_ns - (int(ticks[0]) if len(ticks) else 0)) / 1e9


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], css: str = "") -> str:
    """Cells as HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table class="{css}"><tr>{head}</tr>{body}</table></div>'


def latency_table(
    stages: Mapping[str, Mapping[str, Any]],
    more_heads: Sequence[str] = (),
    more: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """The table of stages. stages: name -> figures, as in report.json. more: further cells by name."""
    rows = (
        (stage_cell(stage), *latency_cells(stages[stage.name]), *(more or {}).get(stage.name, ()))
        for stage in STAGES.values()
    )
    return table(("stage", *LATENCY_HEADS, *more_heads), rows)


def stage_cell(stage: Stage) -> str:
    """A stage's name and meaning."""
    return f"{escape(stage.name)}<em>{escape(stage.meaning)}</em>"


def stage_histograms(samples: Mapping[str, NDArray[np.int64]]) -> str:
    """A histogram per stage that has samples, ns by key of STAGES."""
    charts = "".join(_stage_histogram(STAGES[key].name, values) for key, values in samples.items() if len(values))
    return f'<div class="grid2">{charts}</div>'


def _stage_histogram(name: str, samples_ns: NDArray[np.int64]) -> str:
    samples = samples_ns / 1e6
    p50, p99 = (float(p) for p in np.percentile(samples, (50, 99)))
    digits = 2 if p99 >= 1 else 3
    bins = histogram(np.minimum(samples, max(p99 * 1.25, 1e-3)), min(BINS, max(8, len(samples) // 8)))
    axes = chart.Axes(340, 170, (float(bins.edges[0]), float(bins.edges[-1])), (0.0, float(bins.counts.max()) * 1.2))
    is_close = axes.x(p99) - axes.x(p50) < LABEL_PX
    drawing = chart.svg(
        axes,
        chart.grid(axes, x_label="ms", y_label="count", x_ticks=5, y_ticks=3),
        chart.bars(axes, bins.edges.tolist(), bins.counts.tolist(), "ink a"),
        chart.marker(axes, p50, "mark", f"p50 {figure(p50, digits)}", before=is_close or None),
        _tail_marker(axes, samples, digits),
        title=f"histogram of {name}",
    )
    return captioned(name, f"max {samples.max():.{digits}f} ms", drawing)


def _tail_marker(axes: chart.Axes, samples_ms: NDArray[np.float64], digits: int) -> str:
    """At the 99th percentile, or at the 95th where so few samples tell no more; "" where they do not tell that."""
    for percent in (99, 95):
        tail = percentile(samples_ms, percent)
        if tail is not None:
            return chart.marker(axes, tail, "mark", f"p{percent} {figure(tail, digits)}", depth=1)
    return ""


def lateness_over_time(run: RunRecords, duration_s: float, marks: Sequence[str] = ()) -> str:
    """The drawing: each point is the worst of its stretch of time. marks: more of chart's, on the same axes."""
    times, worst = chart.peaks(seconds(run, run.ticks.start_ns), (run.ticks.start_ns - run.ticks.due_ns) / 1e6, COLUMNS)
    axes = wide_axes(duration_s, (0.0, max(float(worst.max()) * 1.08, 0.1)))
    return chart.svg(
        axes,
        chart.grid(axes, x_label="time, s", y_label="lateness, ms", x_ticks=10),
        chart.line(axes, times.tolist(), worst.tolist(), "pen a thin"),
        *marks,
        title="tick lateness over time",
    )


def chunk_timeline(run: RunRecords) -> str:
    """TIMELINE_S from the middle of the run, a lane per chunk and one of what ran; "" when there was no chunk."""
    window = timeline_window(run)
    chunks = [c for c in run.chunks if c.chunk_id >= 0 and c.published_ns > window[0] and c.observed_ns < window[1]]
    if not chunks:
        return ""
    start, end = (seconds(run, t_ns) for t_ns in window)
    lanes = len(chunks) + 1
    axes = chart.Axes(1060, 44 + LANE_PX * lanes, (start, end), (float(lanes), 0.0))
    executed = executed_rows(run)
    oldest = max((_age_ns(run, c, k) for c in chunks for k in range(c.rows) if (c.chunk_id, k) in executed), default=1)
    drawing = chart.svg(
        axes,
        chart.grid(axes, x_label="time, s", y_label="chunk", x_ticks=12, y_ticks=0),
        *(_lane(axes, lane, chunk, run, executed, oldest) for lane, chunk in enumerate(chunks)),
        _what_ran(axes, lanes - 1, run, {chunk.chunk_id: chunk for chunk in chunks}, oldest),
        title="which rows of which chunk were executed when, and how old their observation was",
    )
    ages = [f"≤ {(k + 1) * oldest / SHADES / 1e6:.0f} ms" for k in range(SHADES)]
    ages[0] = f"row executed, its observation {ages[0]} old"
    return chart.legend([*ROWS, *((f"ink age{k}", words) for k, words in enumerate(ages))]) + wide(drawing)


TIMELINE_WORDS = (
    f"{TIMELINE_S:.0f} s from the middle of the run. Row 0 of a chunk is due at its observation (in mode sync, when it "
    "comes). When a chunk is published, what is past is skipped, and from its first own row on it replaces the chunk "
    "before: a dashed line is such a seam. The last lane is what ran, the darker the older its observation."
)
ROWS = (
    ("ink pale", "waiting since the capture of the observation"),
    ("ink b", "inference"),
    ("ink lock", "row locked to the chunk before"),
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


def _age_ns(run: RunRecords, chunk: ChunkRecord, k: int) -> int:
    """How old the observation behind row k gets while the row is in force."""
    return chunk.t0_ns + (k + 1) * run.policy_period_ns - chunk.observed_ns


def _lane(
    axes: chart.Axes, lane: int, chunk: ChunkRecord, run: RunRecords, executed: set[tuple[int, int]], oldest_ns: int
) -> str:
    observed, started, published = (seconds(run, t) for t in (chunk.observed_ns, chunk.started_ns, chunk.published_ns))
    thin = (lane + 0.30, lane + 0.10)
    hint = f"chunk {chunk.chunk_id}: inference {(published - started) * 1e3:.1f} ms, {chunk.delay} rows locked"
    return "".join(
        [
            *(_row(axes, lane, chunk, k, run, executed, oldest_ns) for k in range(chunk.rows)),
            chart.block(axes, (observed, started), thin, "ink pale"),
            chart.block(axes, (started, published), thin, "ink b", hint),
            chart.note(axes, axes.x_range[0], lane + 0.75, f"#{chunk.chunk_id} ", "end"),
        ]
    )


def _row(
    axes: chart.Axes,
    lane: int,
    chunk: ChunkRecord,
    k: int,
    run: RunRecords,
    executed: set[tuple[int, int]],
    oldest_ns: int,
) -> str:
    start = seconds(run, chunk.t0_ns + k * run.policy_period_ns)
    end = start + 0.94 * run.policy_period_ns / 1e9
    age_ns = _age_ns(run, chunk, k)
    if (chunk.chunk_id, k) in executed:
        css, state = _shade(age_ns, oldest_ns), f"executed, up to {age_ns / 1e6:.0f} ms old"
    else:
        css, state = ("ink lock", "locked") if k < chunk.delay else ("ink wash", "not executed")
    words = f"chunk {chunk.chunk_id}, row {k}: {state}"
    return chart.block(axes, (start, end), (lane + 0.92, lane + 0.36), css, words)


def _shade(age_ns: int, oldest_ns: int) -> str:
    return f"ink age{min(SHADES - 1, max(0, -(-age_ns * SHADES // max(oldest_ns, 1)) - 1))}"


def _what_ran(axes: chart.Axes, lane: int, run: RunRecords, chunks: Mapping[int, ChunkRecord], oldest_ns: int) -> str:
    """A block per stretch of ticks on the same row, and a line through all lanes where one chunk takes over."""
    ids, rows = run.ticks.chunk_id, run.ticks.row
    starts = np.flatnonzero(np.diff(ids, prepend=-2) | np.diff(rows, prepend=-2)).tolist()
    marks = [chart.note(axes, axes.x_range[0], lane + 0.85, "ran ", "end")]
    for first, last in zip(starts, [*starts[1:], len(ids) - 1], strict=False):
        chunk = chunks.get(int(ids[first]))
        if chunk is not None and rows[first] < chunk.rows:
            words = f"row {rows[first]} of chunk {chunk.chunk_id}, seen {_seen_ms(run, chunk, first):.0f} ms before"
            css = _shade(_age_ns(run, chunk, int(rows[first])), oldest_ns)
            begin, end = (seconds(run, int(run.ticks.start_ns[k])) for k in (first, last))
            marks.append(chart.block(axes, (begin, end), (lane + 0.95, lane + 0.30), css, words))
    return "".join(marks) + _seams(axes, run)


def _seen_ms(run: RunRecords, chunk: ChunkRecord, tick: int) -> float:
    return float(run.ticks.sent_ns[tick] - chunk.observed_ns) / 1e6


def _seams(axes: chart.Axes, run: RunRecords) -> str:
    taken = np.flatnonzero(np.diff(run.ticks.chunk_id, prepend=run.ticks.chunk_id[:1]))
    times = (seconds(run, run.ticks.start_ns[k]) for k in taken.tolist())
    return "".join(chart.marker(axes, t, "mark seam") for t in times if axes.x_range[0] <= t <= axes.x_range[1])


def as_words(value: Any) -> str:
    """A value of report.json, for people."""
    if isinstance(value, Mapping):
        return "<br>".join(f"{escape(str(k))}: {as_words(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(as_words, value))
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))
