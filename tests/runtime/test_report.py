"""A report says what the records say: figures by hand on small records, and a page that needs nothing from outside."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from html import unescape
from typing import Any

import numpy as np
import pytest

from onbeat.drivers.feetech.protocol import OK
from onbeat.drivers.twin.records import Recorder, TruthLine
from onbeat.kernels.limit import ACCELERATION, HELD, VELOCITY
from onbeat.runtime import report, report_page
from onbeat.runtime.flight.encoding import encode_frame, encode_rows
from onbeat.runtime.flight.messages import CHUNK_STAGES, FORMAT, LETTERS
from onbeat.runtime.flight.reader import LOG_FOLDER, NoLog
from onbeat.runtime.flight.writer import LogWriter
from onbeat.runtime.measures import summarise_ns
from onbeat.runtime.record import append_tick, new_tick_ring, take_ticks
from onbeat.runtime.run_records import Attempt, ChunkRecord, RunRecords, Ticks, Truth
from onbeat.runtime.summary import FIELDS, STAGES, as_text, missed_goals, stage_samples, summarise
from onbeat.runtime.tick import JointLimits, new_tick_state

MS, S = 1_000_000, 1_000_000_000
ZERO_NS = 50 * S
PERIOD_NS = 100 * MS
PNG = b"\x89PNG\r\n\x1a\n0000"
HEADER = {
    "started": "2026-11-24T12:00:00+0000",
    "robot": "so101-twin",
    "config": {"seconds": 4, "note": "<script>alert(1)</script>"},
    "versions": {"python": "3.11.2"},
    "git_commit": None,
    "bundle_sha256": "ab" * 32,
    "calibration_sha256": None,
    "log_problems": [],
    "real_time": {"SCHED_FIFO": "got"},
    "error": None,
    "instruction": "lift <the> cube & hold",
    "mode": "async",
    "rate_hz_wanted": 100.0,
}


def small_run(ticks: int = 400) -> RunRecords:
    """4 s at 100 Hz: a chunk every 200 ms of 8 rows, published 60 ms after its observation with 2 rows locked."""
    rng = np.random.default_rng(0)
    due = ZERO_NS + np.arange(ticks) * 10 * MS
    start = due + rng.integers(0, MS, ticks)
    goal = np.sin(np.arange(ticks) / 50)[:, None] * [1.0, 0.5]
    chunk_id = np.minimum((due - ZERO_NS - 100 * MS) // (200 * MS), 18)
    chunk_id = np.where(due < ZERO_NS + 100 * MS, -1, chunk_id)
    chunk_id = np.where((due >= ZERO_NS + 1100 * MS) & (due < ZERO_NS + 1200 * MS), 4, chunk_id)  # 5 takes over late
    row = np.where(chunk_id < 0, -1, (due - ZERO_NS - chunk_id * 200 * MS) // PERIOD_NS)
    flags = np.where(chunk_id < 0, HELD, 0)
    flags[50], flags[51] = VELOCITY, VELOCITY | ACCELERATION
    chunks = tuple(small_chunk(k) for k in range(19))
    return RunRecords(
        header=HEADER,
        joints=("shoulder_pan", "gripper"),
        policy_period_ns=PERIOD_NS,
        ticks=Ticks(
            due_ns=due,
            start_ns=start,
            compute_ns=np.full(ticks, 10_000),
            exchange_ns=rng.integers(MS, 2 * MS, ticks),
            goal_rad=goal,
            position_rad=goal + 0.01,
            chunk_id=chunk_id,
            row=row,
            flags=flags,
            faults=np.zeros(ticks, np.int64),
        ),
        missed_ticks=3,
        chunks=chunks,
        faults={"no_reply": 2},
        truth=Truth(
            t_ns=due[::10] - 300 * MS,
            height_m=np.linspace(0, 0.06, len(due[::10])),
            attempts=(
                Attempt(ZERO_NS, ZERO_NS + 2 * S, ZERO_NS + 2 * S),
                Attempt(ZERO_NS + 2 * S, ZERO_NS + 3 * S, None),
            ),
            goals_ns=np.concatenate(([ZERO_NS - 200 * MS], np.delete(due + 2 * MS, [10, 11, 200]))),
        ),
        pictures={"top": PNG, "wrist": b"\xff\xd8\xff0000"},
    )


def small_chunk(k: int) -> ChunkRecord:
    t0 = ZERO_NS + k * 200 * MS
    stages = {"camera_age": 20 * MS, "observe": 2 * MS, "prefix": 15 * MS, "flow": 22 * MS, "publish": MS}
    late = k == 18
    first_row = -1 if late else 3 if k == 5 else 2
    return ChunkRecord(-1 if late else k, t0, t0, t0 + 20 * MS, t0 + (60 + k) * MS, 8, 2, 2, first_row, stages)


def test_a_run_without_a_single_tick_has_a_report():
    full = small_run()
    empty = Ticks(*(np.empty((0, 2) if name.endswith("rad") else 0, np.int64) for name in Ticks.__slots__))
    bare = replace(full, ticks=empty, chunks=(), truth=None, pictures={}, faults={})
    figures = summarise(bare)
    assert figures["rate_hz"] is None
    assert figures["stages"]["flow"]["p50_ms"] is None
    assert (figures["attempts"], figures["success_rate"], figures["missed_ticks_wire"]) == (0, None, None)
    assert "Every figure" in report_page.render(figures, bare)
    assert "bus exchange" in as_text(figures)


def test_report_has_exactly_the_fields_of_the_table():
    figures = summarise(small_run())
    assert list(figures) == [field.name for field in FIELDS]
    assert all(field.unit and field.meaning for field in FIELDS)
    assert json.loads(json.dumps(figures)) == figures


def test_figures_are_those_of_the_records():
    figures = summarise(small_run())
    assert figures["rate_hz"] == pytest.approx(100, rel=1e-3)
    assert (figures["ticks"], figures["missed_ticks"], figures["held_ticks"]) == (400, 3, 10)
    assert figures["limit_events"] == {
        "position limit": 0,
        "velocity limit": 2,
        "acceleration limit": 1,
        "refused": 0,
    }
    assert (figures["chunks"], figures["chunks_refused"]) == (18, {"expired": 1})
    assert figures["delay_budget"] == {"2": 18}
    assert figures["delay_used"] == {"2": 18}
    assert figures["delay_executed"] == {"2": 17, "3": 1}
    assert figures["delay_exceeded"] == 1
    assert figures["stages"]["inference"]["p50_ms"] == pytest.approx(49)
    assert figures["reaction"]["max_ms"] == pytest.approx(78)
    assert (figures["attempts"], figures["successes"]) == (2, 1)
    assert figures["success_interval"] == pytest.approx([0.0945, 0.9055], abs=1e-4)
    assert figures["faults"] == {"no_reply": 2}


def test_every_stage_has_its_percentiles():
    run = small_run()
    stages = summarise(run)["stages"]
    assert list(stages) == [stage.name for stage in STAGES.values()]
    lateness = summarise_ns(run.ticks.start_ns - run.ticks.due_ns)
    assert stages["tick lateness"]["p99_ms"] == lateness.p99_ms
    assert stages["vision + prefix"]["p50_ms"] == 15.0
    assert len(stage_samples(run)["flow"]) == 19


@pytest.mark.parametrize(
    ("gaps_ms", "missed"), [([], 0), ([10], 0), ([19, 1], 0), ([20], 1), ([26, 4, 10], 1), ([10, 40, 10], 3)]
)
def test_goals_that_never_came_are_counted_and_late_ones_are_not(gaps_ms, missed):
    assert missed_goals(np.cumsum([0, *gaps_ms]) * MS, 10 * MS) == missed


def test_wire_count_is_of_the_twin_and_not_of_the_loop():
    run = small_run()
    assert summarise(run)["missed_ticks_wire"] == 3
    everything = replace(run, truth=replace(run.truth, goals_ns=run.ticks.due_ns))
    assert summarise(everything)["missed_ticks_wire"] == 0


def test_text_table_has_every_stage_and_headline():
    text = as_text(summarise(small_run()))
    for stage in STAGES.values():
        assert stage.name in text
    assert "1 of 2 (9-91 %, Wilson 95 %)" in text


def test_page_shows_every_field_stage_joint_and_view():
    run = small_run()
    html = unescape(report_page.render(summarise(run), run))
    for field in FIELDS:
        assert field.name == "stages" or f"<td>{field.name}</td>" in html or f"{field.name}:" in html, field
    for stage in STAGES.values():
        assert f"histogram of {stage.name}" in html
    for words in ("shoulder pan", "gripper", "data:image/png", "data:image/jpeg", "cube height, cm", "lateness, ms"):
        assert words in html, words


def test_page_asks_nothing_of_any_other_place():
    html = report_page.render(summarise(small_run()), small_run())
    assert not re.search(r"https?://|//[a-z]|@import|<script|<link|url\(", html.replace("</", "<"))
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)"', html))


def test_page_escapes_what_comes_from_outside():
    html = report_page.render(summarise(small_run()), small_run())
    assert "lift &lt;the&gt; cube &amp; hold" in html
    assert "alert(1)" in html
    assert "<script" not in html


def test_page_says_why_a_run_ended_early():
    run = replace(small_run(), header={**HEADER, "error": "servo 3 did not reply"})
    assert "ended early: servo 3 did not reply" in report_page.render(summarise(run), run)


def test_a_histogram_marks_no_percentile_that_its_samples_cannot_tell():
    def marks(n: int) -> set[str]:
        drawing = report_page.stage_histograms({"inference": np.arange(1, n + 1) * MS})
        return set(re.findall(r"p\d\d ", drawing))

    assert [marks(n) for n in (20, 100, 101)] == [{"p50 "}, {"p50 ", "p95 "}, {"p50 ", "p99 "}]


def test_timeline_shows_executed_and_locked_rows_of_the_middle():
    run = small_run()
    html = report_page.render(summarise(run), run)
    assert "chunk 9, row 1: executed, up to 200 ms old" in html
    assert "chunk 9, row 0: locked" in html
    assert "chunk 9, row 7: not executed" in html
    assert "chunk 0, row 1" not in html


LOG_HEADER = {
    "format": FORMAT,
    "started": "2026-11-24T12:00:00+0000",
    "started_ns": ZERO_NS,
    "config": {"instruction": "lift", "robot": {"name": "so101-twin"}},
    "joints": ["shoulder_pan"],
    "cameras": ["top"],
    "sizes": {**dict.fromkeys(LETTERS, 0), "J": 1, "V": 1, "C": 2},
    "mode": "async",
    "policy_period_ns": PERIOD_NS,
    "rate_hz": 100.0,
    "versions": {},
    "git_commit": None,
    "bundle_sha256": None,
    "calibration_sha256": None,
}
OUTCOME = {
    "status": {"missed": 7},
    "bus": {"ok": 900, "bad_checksum": 1, "no_reply": 0},
    "real_time": {},
    "error": None,
}


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(NoLog, match="give the folder"):
        report.write_report(tmp_path)


def test_reports_are_written_from_the_files_of_a_run(tmp_path, capsys):
    write_records(tmp_path)
    assert report.main([str(tmp_path)]) == 0
    assert "tick lateness" in capsys.readouterr().out
    figures = json.loads((tmp_path / report.REPORT_FILE).read_text())
    assert (figures["ticks"], figures["chunks"], figures["missed_ticks"]) == (3, 1, 7)
    assert figures["faults"] == {"bad_checksum": 1}
    assert (figures["attempts"], figures["successes"]) == (2, 1)
    assert figures["missed_ticks_wire"] == 1
    assert figures["stages"]["flow"]["max_ms"] == 5.0
    assert "<svg" in (tmp_path / report.PAGE_FILE).read_text()


def test_a_log_that_was_cut_short_has_a_report_that_says_so(tmp_path):
    write_records(tmp_path, outcome=None)
    figures = report.write_report(tmp_path)
    assert "without an outcome" in figures["error"]
    assert "cut short" in figures["log_problems"][0]
    assert (figures["ticks"], figures["missed_ticks"]) == (3, 0)


def write_records(folder, outcome: Mapping[str, Any] | None = OUTCOME) -> None:
    """Three ticks, one chunk, two attempts, three goals with a gap: through the writers of the daemon and the twin."""
    limits = JointLimits(*(np.array([bound]) for bound in (-1.0, 1.0, 3.0, 20.0, np.inf)))
    state = new_tick_state(limits, rate_hz=100.0, rows=2)
    state.measured_q[:] = state.command_q[:] = 0.1
    ring = new_tick_ring(1)
    for k in range(3):
        due_ns = ZERO_NS + k * 10 * MS
        state.record["number"] = k
        append_tick(ring, state, due_ns, due_ns + 5000, 10_000, MS, 10_000, OK)
    with LogWriter(folder / LOG_FOLDER, LOG_HEADER) as log:
        for message in encode_rows(take_ticks(ring)):
            log.write("/tick", message, ZERO_NS)
        stages = {f"{stage}_ns": 5 * MS for stage in CHUNK_STAGES}
        entry = {"chunk_id": 0, "published_ns": ZERO_NS + 9 * MS, "budget": 1, "delay": 0, "first_row": 1, "rows": 2}
        times = dict.fromkeys(("observed_ns", "t0_ns", "started_ns", "inferred_ns", "met_ns"), ZERO_NS)
        rest = {"number": 0, "executed": 1, "targets_rad": np.zeros((2, 1))}
        log.write_values("/chunk", {**entry, **times, **stages, **rest}, ZERO_NS)
        log.write("/camera/top", encode_frame(np.zeros((4, 4, 3), np.uint8), ZERO_NS, "top"), ZERO_NS)
        if outcome is not None:
            log.write_values("/outcome", outcome, ZERO_NS)
    twin = Recorder(folder / report.TWIN_FOLDER)
    events = ("attempt_started", "lifted", "attempt_started", "timed_out", "attempt_started")
    for k, event in enumerate(events):
        twin.add_truth(TruthLine(ZERO_NS + k * 5 * MS, 1, 0.01 * k, False, 0, 0, event))
    for t_ms in (0, 10, 30):
        twin.add_goals(ZERO_NS + t_ms * MS, [2048] * 6)
    twin.close({})
