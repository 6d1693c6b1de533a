"""What a run came to: report.json for scripts, report.html for a person, from the flight log in the run's folder.

python -m onbeat.runtime.report out/RUN
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onbeat.drivers.twin.records import TRUTH_FILE
from onbeat.runtime import report_page
from onbeat.runtime.flight.reader import Log, read_log
from onbeat.runtime.run_records import (
    CHUNK_FIELDS,
    STAGE_FIELDS,
    TICK_FIELDS,
    MachineRecords,
    RunRecords,
    read_chunks,
    read_ticks,
    read_truth,
)
from onbeat.runtime.summary import as_text, summarise

REPORT_FILE, PAGE_FILE = "report.json", "report.html"
TWIN_FOLDER = "twin"


def write_report(folder: Path) -> dict[str, Any]:
    """Write report.json and report.html beside the log of a run; returns the report. Raises NoLog, LogError."""
    run = read_run(folder)
    report = summarise(run)
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / PAGE_FILE).write_text(report_page.render(report, run), encoding="utf-8")
    return report


def read_run(folder: Path) -> RunRecords:
    """The flight log and, where there was a twin, its truth (in the sub-folder `twin`). Raises NoLog, LogError."""
    log, twin = read_log(folder), folder / TWIN_FOLDER
    outcome: Mapping[str, Any] = log.outcome or {}
    pictures = {camera: log.last_picture(camera) for camera in log.cameras}
    return RunRecords(
        header=header(log),
        joints=tuple(log.header["joints"]),
        policy_period_ns=log.header["policy_period_ns"],
        ticks=read_ticks(log.records("/tick", *TICK_FIELDS)),
        missed_ticks=outcome["status"]["missed"] if outcome else missed_ticks(log),
        chunks=read_chunks(log.records("/chunk", *CHUNK_FIELDS, *STAGE_FIELDS)),
        faults={kind: count for kind, count in outcome.get("bus", {}).items() if kind != "ok" and count},
        truth=read_truth(twin) if (twin / TRUTH_FILE).exists() else None,
        pictures={camera: picture for camera, picture in pictures.items() if picture is not None},
        warm_up_ns=tuple(outcome.get("warm_up_ns", ())),
        machine=machine_records(log),
    )


def header(log: Log) -> dict[str, Any]:
    """What ran, by names of summary.FIELDS."""
    told, outcome = log.header, log.outcome or {}
    config = told["config"]
    return {
        "started": told["started"],
        "robot": config["robot"]["name"],
        "config": config,
        "versions": told["versions"],
        "git_commit": told["git_commit"],
        "bundle_sha256": told["bundle_sha256"],
        "calibration_sha256": told["calibration_sha256"],
        "real_time": outcome.get("real_time", {}),
        "error": outcome.get("error") if outcome else "the log ends without an outcome: the process was killed",
        "log_problems": list(log.problems),
        "instruction": config.get("instruction", ""),
        "mode": told["mode"],
        "rate_hz_wanted": told["rate_hz"],
    }


def machine_records(log: Log) -> MachineRecords | None:
    """The machine beside the loop, None when nobody looked at it."""
    about = log.header.get("machine")
    return MachineRecords(about, log.records("/machine")) if about and "/machine" in log.topics else None


def missed_ticks(log: Log) -> int:
    """Deadlines between the first and the last tick that no tick had, of a log whose loop did not tell."""
    ticks = log.records("/tick", "due_ns", "number")
    if len(ticks) == 0:
        return 0
    due = round(float(ticks["due_ns"][-1] - ticks["due_ns"][0]) * log.header["rate_hz"] / 1e9)
    return due - int(ticks["number"][-1] - ticks["number"][0])


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of a finished run again, and print its table."""
    parser = argparse.ArgumentParser(prog="python -m onbeat.runtime.report", description="Report on a finished run.")
    parser.add_argument("folder", type=Path, help="of a run")
    print(as_text(write_report(parser.parse_args(argv).folder)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
