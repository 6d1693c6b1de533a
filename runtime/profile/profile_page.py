"""profile.html: where the time goes between a frame and a command, how sure that is, and what the machine did."""

import json
from collections.abc import Callable, Mapping
from html import escape
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onbeat.runtime import chart, page
from onbeat.runtime.measures import figure, histogram
from onbeat.runtime.profile.figures import action_ages, after_start, spread_cells
from onbeat.runtime.profile.machine_page import Profile, faults_section, machine_section, under
from onbeat.runtime.run_records import RunRecords
from onbeat.runtime.summary import STAGES, executed_delays, frames_to_commands, stage_samples

WAY: Final = ("camera_age", "observe", "prefix", "flow", "publish")


def render(profile: Profile, run: RunRecords) -> str:
    """The page. profile: as `measure` returns it; run: its records."""
    return page.fill(
        title=f"Latency profile, {profile['robot']}",
        lead=_lead(profile),
        error=profile["error"],
        tiles=_tiles(profile),
        sections=(part(profile, run) for part in SECTIONS),
    )


def _lead(profile: Profile) -> str:
    when = profile["started"] or "start time unknown"
    return f"{profile['mode']} · {figure(profile['duration_s'], 1)} s · {when} · {profile['log']}"


def _tiles(profile: Profile) -> list[str]:
    command, inference, late = (
        profile["stages"][STAGES[k].name] for k in ("frame_to_command", "inference", "lateness")
    )
    delay = max((int(steps) for steps in profile["delay_executed"]), default=None)
    budget = max((int(steps) for steps in profile["delay_budget"]), default=None)
    return [
        page.tile(
            figure(command["p50_ms"], 0), "ms", "frame to command, p50", f"max {figure(command['max_ms'], 0)} ms"
        ),
        page.tile(figure(inference["p50_ms"], 1), "ms", "inference, p50", _by_itself(inference)),
        page.tile(figure(late["p99_ms"], 3), "ms", "tick lateness, p99", f"max {figure(late['max_ms'], 2)} ms"),
        page.tile(str(profile["missed_ticks"]), f"of {profile['ticks']}", "missed deadlines", _period(profile)),
        page.tile(_or_dash(delay), "steps", "largest delay d executed", f"budget up to {_or_dash(budget)}"),
        page.tile(figure(profile["action_age"]["p50_ms"], 0), "ms", "age of executed actions, p50", _oldest(profile)),
    ]


def _by_itself(stage: Mapping[str, Any]) -> str:
    spread = spread_cells(stage)[0]
    return f"A/A spread {spread if spread != '-' else 'not known'}"


def _period(profile: Profile) -> str:
    return f"a period is {1e3 / profile['rate_hz_wanted']:g} ms"


def _oldest(profile: Profile) -> str:
    return f"oldest {figure(profile['action_age']['max_ms'], 0)} ms"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _way(profile: Profile, run: RunRecords) -> str:
    """The way from a frame to a command, as a bar."""
    parts = way(after_start(run))
    if not parts:
        return ""
    total = sum(ms for _, ms in parts)
    period = profile["policy_period_ms"]
    axes = chart.Axes(1060, 96, (0.0, max(total * 1.02, period)), (0.0, 1.0))
    ends = np.cumsum([ms for _, ms in parts])
    css = ("ink pale", "ink d", "ink b", "ink a", "ink c", "ink wash")
    blocks = [
        chart.block(axes, (float(end - ms), float(end)), (0.12, 0.72), paint, f"{name}: {ms:.2f} ms")
        for (name, ms), end, paint in zip(parts, ends, css, strict=True)
    ]
    steps = range(1, int(axes.x_range[1] // period) + 1)
    drawing = chart.svg(
        axes,
        chart.grid(axes, x_label="ms since the capture of the frame, mean", y_label="", x_ticks=10, y_ticks=0),
        *blocks,
        *(chart.marker(axes, k * period, "mark", f"policy step {k}") for k in steps),
        title="mean time from the capture of a frame to the first command made from it",
    )
    key = chart.legend([(paint, f"{name} {ms:.1f} ms") for (name, ms), paint in zip(parts, css, strict=True)])
    words = f"On average {total:.0f} ms from the capture of a frame to the first command that its chunk gave."
    return page.section("From frame to command", words, key, page.wide(drawing), under(profile))


def way(run: RunRecords) -> list[tuple[str, float]]:
    """(part, mean ms) of the way from frame to command, of the chunks that ran; the parts add up to the whole of it."""
    reached = frames_to_commands(run)
    ran = [chunk for chunk in run.chunks if chunk.chunk_id in reached]
    if not ran:
        return []
    parts = [(STAGES[key].name, float(np.mean([chunk.stages_ns[key] for chunk in ran])) / 1e6) for key in WAY]
    whole = float(np.mean([reached[chunk.chunk_id] for chunk in ran])) / 1e6
    return [*parts, ("waiting for the seam and the tick", max(0.0, whole - sum(ms for _, ms in parts)))]


def _overview(profile: Profile, _: RunRecords) -> str:
    known = [stage for stage in profile["stages"].values() if stage["n"]]
    if not known:
        return ""
    limits = _decades_of(min(stage["p50_ms"] for stage in known), max(stage["max_ms"] for stage in known))
    cells = {
        name: (_range(limits, name, stage), ", ".join(spread_cells(stage))) if stage["n"] else ("", "")
        for name, stage in profile["stages"].items()
    }
    key = chart.legend([("ink b", "p50"), ("ink a", "to p95"), ("ink lock", "to p99"), ("ink pale", "to the largest")])
    return page.section(
        "Latency, stage by stage",
        "After the first second, which is counted apart. A/A: how far the p50 and the tail of halves of this run lie "
        "apart; less than that is no difference between two runs. A dash: too few samples to tell.",
        key,
        page.latency_table(profile["stages"], (_range_axis(limits), "A/A p50, tail"), cells),
        under(profile),
    )


RANGE_PX: Final = (190, 22)
MOST_DECADES: Final = 6  # whose figures stand side by side


def _decades_of(least_ms: float, most_ms: float) -> tuple[float, float]:
    """The logarithmic axis that holds both."""
    return float(np.floor(np.log10(max(least_ms, 1e-3)) - 0.05)), float(np.ceil(np.log10(max(most_ms, 1e-2))))


def _range_axis(limits: tuple[float, float]) -> str:
    ticks = chart.decades(limits)
    roomy = ticks if len(ticks) <= MOST_DECADES else ticks[::2]
    marks = (chart.strip_text(RANGE_PX, limits, x, text) for x, text in roomy)
    return chart.strip(RANGE_PX, *marks, title="ms, logarithmic")


def _range(limits: tuple[float, float], name: str, stage: Mapping[str, Any]) -> str:
    """One stage from its median to its largest, on the axis that all share."""
    p50, largest = _log(stage["p50_ms"]), _log(stage["max_ms"])
    p95 = largest if stage["p95_ms"] is None else _log(stage["p95_ms"])
    p99 = p95 if stage["p99_ms"] is None else _log(stage["p99_ms"])
    spans = ((p50, p95, "ink a"), (p95, p99, "ink lock"), (p99, largest, "ink pale"))
    blocks = (chart.strip_block(RANGE_PX, limits, (low, high), css) for low, high, css in spans)
    words = f"{name}: p50 {figure(stage['p50_ms'], 3)}, max {figure(stage['max_ms'], 3)} ms"
    return chart.strip(RANGE_PX, *blocks, chart.strip_dot(RANGE_PX, limits, p50, "ink b"), title=words)


def _log(value_ms: float) -> float:
    return float(np.log10(max(value_ms, 1e-4)))


def _histograms(profile: Profile, run: RunRecords) -> str:
    words = "Dashed: p50 and p99, or p95 where samples are few. What lies beyond the right edge is in the last bar."
    drawings = page.stage_histograms(stage_samples(after_start(run)))
    return page.section("How the times are spread", words, drawings, under(profile))


def _lateness(profile: Profile, run: RunRecords) -> str:
    late_ms = np.sort((run.ticks.start_ns - run.ticks.due_ns) / 1e6)
    if len(late_ms) == 0:
        return ""
    period_ms = 1e3 / profile["rate_hz_wanted"]
    marks = [_missed_mark(run, period_ms)]
    words = (
        "How long after its deadline a tick began. Above: the share of all ticks that were later than that. Below: the "
        f"worst of each stretch of time; a deadline whose whole period of {period_ms:g} ms is gone is missed (red)."
    )
    return page.section(
        "Tick lateness",
        words,
        page.wide(_later_than(late_ms, period_ms)),
        page.wide(page.lateness_over_time(run, profile["duration_s"], marks)),
        under(profile),
    )


def _later_than(late_ms: NDArray[np.float64], period_ms: float) -> str:
    """late_ms: (T,) ascending."""
    n = len(late_ms)
    ranks = np.unique(n - np.unique(np.geomspace(1, n, 400).astype(int)))
    x, y = np.log10(np.maximum(late_ms[ranks], 1e-4)), np.log10((n - ranks) / n)
    limits = (float(np.floor(x[0])), float(np.ceil(max(x[-1], np.log10(period_ms)))))
    axes = chart.Axes(1060, 230, limits, (float(np.floor(y[-1] - 1e-9)), 0.0))
    shares = [(k, f"{100 * 10.0**k:g} %") for k, _ in chart.decades(axes.y_range)]
    return chart.svg(
        axes,
        chart.grid(
            axes,
            x_label="lateness, ms, logarithmic",
            y_label="ticks later",
            x_ticks=chart.decades(limits),
            y_ticks=shares,
        ),
        chart.line(axes, x.tolist(), y.tolist(), "pen a"),
        chart.marker(axes, float(np.log10(period_ms)), "mark bad", f"one period, {period_ms:g} ms"),
        title="share of ticks that were later than a lateness",
    )


def _missed_mark(run: RunRecords, period_ms: float) -> str:
    """Red blocks along the foot of the drawing where deadlines were let go."""
    due = run.ticks.due_ns
    gone = np.flatnonzero(np.diff(due) > 1.5e6 * period_ms)
    top = (run.ticks.start_ns - due).max() / 1e6
    axes = page.wide_axes(float(due[-1] - due[0]) / 1e9, (0.0, max(float(top) * 1.08, 0.1)))
    spans = ((page.seconds(run, int(due[k])), page.seconds(run, int(due[k + 1]))) for k in gone.tolist())
    return "".join(chart.block(axes, span, (0.0, axes.y_range[1]), "ink bad", "deadline missed") for span in spans)


def _timeline(_: Profile, run: RunRecords) -> str:
    drawing = page.chunk_timeline(run)
    return drawing and page.section("Chunk timeline: which action came from which frame", page.TIMELINE_WORDS, drawing)


def _delay(profile: Profile, run: RunRecords) -> str:
    executed = executed_delays(run)
    ran = [c for c in run.chunks if c.chunk_id in executed and c.published_ns >= run.ticks.start_ns[0]]
    if not ran:
        return ""
    times = page.seconds(run, np.array([chunk.published_ns for chunk in ran]))
    steps = np.array([executed[chunk.chunk_id] for chunk in ran], np.float64)
    budget = np.array([chunk.budget for chunk in ran], np.float64)
    axes = page.wide_axes(profile["duration_s"], (0.0, float(max(steps.max(), budget.max())) + 0.6))
    over = steps > budget
    drawing = chart.svg(
        axes,
        chart.grid(axes, x_label="time, s", y_label="policy steps", x_ticks=10, y_ticks=_whole(axes.y_range[1])),
        chart.line(axes, *page.thinned(times, budget), "pen pale thick"),
        chart.line(axes, *page.thinned(times, steps), "pen a"),
        *(
            chart.dot(axes, float(t), float(s), "ink bad", "over budget")
            for t, s in zip(times[over], steps[over], strict=True)
        ),
        title="executed delay and its budget over time",
    )
    key = chart.legend([("ink a", "delay d, executed"), ("ink pale", "planned for"), ("ink bad", "over budget")])
    ages = action_ages(after_start(run))[1] / 1e6
    words = (
        f"Rows of a chunk that were past when it came, and what it was planned for: {profile['delay_exceeded']} of "
        f"{profile['chunks']} chunks came later than planned. Below: how old the observation behind each command was."
    )
    return page.section(
        "Delay against its budget, and the age of what ran", words, key, page.wide(drawing), _ages(ages)
    )


def _whole(most: float) -> list[tuple[float, str]]:
    step = max(1, int(most) // 5)
    return [(float(k), str(k)) for k in range(0, int(most) + 1, step)]


def _ages(ages_ms: NDArray[np.float64]) -> str:
    if len(ages_ms) == 0:
        return ""
    bins = histogram(ages_ms, page.BINS)
    axes = chart.Axes(1060, 170, (0.0, float(bins.edges[-1])), (0.0, float(bins.counts.max()) * 1.2))
    middle = float(np.median(ages_ms))
    drawing = chart.svg(
        axes,
        chart.grid(
            axes, x_label="age of the observation when its command was sent, ms", y_label="ticks", x_ticks=10, y_ticks=3
        ),
        chart.bars(axes, bins.edges.tolist(), bins.counts.tolist(), "ink a"),
        chart.marker(axes, middle, "mark", f"p50 {middle:.0f}"),
        title="histogram of the age of executed actions",
    )
    return page.wide(drawing)


def _cold(profile: Profile, _: RunRecords) -> str:
    cold, warm = profile["cold"], profile["stages"]
    took = [f"{ms:.1f} ms" for ms in cold["warm_up_ms"]]
    before = (
        f"Before the run the first inference took {took[0]}, the next {', '.join(took[1:]) or '-'}. " if took else ""
    )
    inference, late = (STAGES[key].name for key in ("inference", "lateness"))
    words = (
        f"{before}In the first {cold['start_s']:g} s of it an inference took up to "
        f"{figure(cold['stages'][inference]['max_ms'], 1)} ms, and a tick was up to "
        f"{figure(cold['stages'][late]['max_ms'], 2)} ms late. None of this is in the figures of the stages."
    )
    rows = (
        (
            escape(name),
            str(start["n"]),
            *(figure(value, 3) for value in (start["p50_ms"], start["max_ms"])),
            _p50(warm[name]),
        )
        for name, start in cold["stages"].items()
    )
    table = page.table(("stage", "n", "p50 ms", "max ms", "p50 ms afterwards"), rows)
    return page.section("Warm-up and cold start", words, _folded("stage by stage", table))


def _p50(stage: Mapping[str, Any]) -> str:
    return figure(stage["p50_ms"], 3)


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _facts(profile: Profile, _: RunRecords) -> str:
    names = ("bundle_sha256", "git_commit", "real_time", "versions", "conditions", "threads", "memory", "log_problems")
    table = page.table(("field", "value"), ((escape(n), page.as_words(profile[n])) for n in names), "facts")
    config = f"<pre>{escape(json.dumps(profile['config'], indent=2))}</pre>"
    return page.section("What ran", "As in profile.json.", _folded("facts", table), _folded("effective config", config))


SECTIONS: Final[tuple[Callable[[Profile, RunRecords], str], ...]] = (
    _way,
    _overview,
    _histograms,
    _lateness,
    _timeline,
    _delay,
    faults_section,
    machine_section,
    _cold,
    _facts,
)
