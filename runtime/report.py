"""What a run came to: report.json for scripts, report.html for a person, from the records in the run's folder.

python -m onbeat.runtime.report out/RUN
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onbeat.drivers.twin.records import TRUTH_FILE
from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime import page, record
from onbeat.runtime.daemon import FRAMES_FOLDER
from onbeat.runtime.provenance import bundle_hash, git_commit, versions
from onbeat.runtime.run_records import RunRecords, read_chunks, read_ticks, read_truth
from onbeat.runtime.summary import as_text, summarise

REPORT_FILE, PAGE_FILE = "report.json", "report.html"
TWIN_FOLDER = "twin"


class NoRecords(OnbeatError):
    """A folder that holds no run."""


def write_report(folder: Path) -> dict[str, Any]:
    """Write report.json and report.html beside the records of a run; returns the report. Raises NoRecords."""
    run = read_run(folder)
    report = summarise(run)
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / PAGE_FILE).write_text(page.render(report, run), encoding="utf-8")
    return report


def read_run(folder: Path) -> RunRecords:
    """The daemon's records and, where there was a twin, its truth (in the sub-folder `twin`). Raises NoRecords."""
    try:
        ticks, chunks, run = record.load(folder)
    except OSError as error:
        raise NoRecords(f"{folder} holds no run ({error}): give the folder that `onbeat run` printed") from None
    twin = folder / TWIN_FOLDER
    return RunRecords(
        header=header(run),
        joints=tuple(run["joints"]),
        policy_period_ns=run["policy_period_ns"],
        ticks=read_ticks(ticks),
        missed_ticks=run["status"]["missed"],
        chunks=read_chunks(chunks),
        faults={kind: count for kind, count in run["bus"].items() if kind != "ok" and count},
        truth=read_truth(twin) if (twin / TRUTH_FILE).exists() else None,
        pictures={path.stem: path.read_bytes() for path in sorted((folder / FRAMES_FOLDER).glob("*.png"))},
    )


def header(run: Mapping[str, Any]) -> dict[str, Any]:
    """What ran, from run.json and from this installation."""
    config = run["config"]
    return {
        "started": run["started"],
        "robot": run["robot"]["name"],
        "config": {**config, "robot": run["robot"]},
        "versions": versions(),
        "git_commit": git_commit(),
        "bundle_sha256": bundle_hash(Path(config["bundle"])),
        "real_time": run["real_time"],
        "error": run["error"],
        "instruction": config["instruction"],
        "mode": run["mode"],
        "rate_hz_wanted": run["robot"]["loop_rate_hz"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of a finished run again, and print its table."""
    parser = argparse.ArgumentParser(prog="python -m onbeat.runtime.report", description="Report on a finished run.")
    parser.add_argument("folder", type=Path, help="of a run")
    print(as_text(write_report(parser.parse_args(argv).folder)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
