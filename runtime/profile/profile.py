"""`onbeat profile`: where the time goes, from a recorded run or from one that is driven now; two runs compared.

onbeat profile out/RUN                      table; profile.json and profile.html into the run's folder
onbeat profile --live --seconds 30 ...      drives first, with the arguments of `onbeat run`; a real arm wants --arm
onbeat profile --compare out/A out/B        a verdict per stage
onbeat profile out/RUN --trace run.pftrace  for ui.perfetto.dev
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.flight.reader import LOG_FOLDER
from onbeat.runtime.measures import figure, text_table
from onbeat.runtime.profile import compare, profile_page
from onbeat.runtime.profile.conditions import conditions_words
from onbeat.runtime.profile.figures import measure, spread_cells
from onbeat.runtime.profile.trace import write_trace
from onbeat.runtime.report import read_run
from onbeat.runtime.run import DaemonFailed, drive
from onbeat.runtime.run import parse as parse_run
from onbeat.runtime.run_records import RunRecords
from onbeat.runtime.summary import LATENCY_HEADS, STAGES, latency_cells

JSON_FILE, PAGE_FILE = "profile.json", "profile.html"


class ProfileRefused(OnbeatError):
    """What was asked cannot be done as it was asked."""


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """The command line. run_arguments: what `--live` hands on to `onbeat run`. into: where files go.

    again: further runs of what the first of `pair` is.
    """

    log: Path | None
    is_live: bool
    pair: tuple[Path, Path] | None
    again: tuple[Path, ...]
    trace: Path | None
    into: Path | None
    is_json: bool
    run_arguments: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 1 when there is nothing to profile, or when the run that was driven failed."""
    options = parse(argv)
    try:
        if options.pair is not None:
            return show_comparison(*options.pair, options)
        if options.log is not None:
            show_profile(options.log, options)
        else:
            profile_live(options)
    except OnbeatError as error:
        print(f"onbeat profile: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("onbeat profile: stopped before anything moved", file=sys.stderr)
        return 1
    return 0


def profile_live(options: ProfileOptions) -> None:
    """Drive as `onbeat run` does, then profile what there is of it. Raises OnbeatError, also when the run failed."""
    folder, failure = drive(parse_run(options.run_arguments), sys.stderr if options.is_json else sys.stdout)
    if failure is None or (folder / LOG_FOLDER).exists():
        show_profile(folder, options)
    if failure is not None:
        raise DaemonFailed(failure)


def show_profile(log: Path, options: ProfileOptions) -> None:
    """Measure, write the files, print. Raises NoLog, LogError, ProfileRefused."""
    run = read_run(log)
    profile = measure(run, str(log))
    folder = options.into or (log if log.is_dir() else log.parent)
    try:
        write_files(profile, run, folder)
        if options.trace is not None:
            write_trace(run, options.trace)
    except OSError as refusal:
        what = "another file with --trace" if refusal.filename == str(options.trace) else "a folder with --into"
        raise ProfileRefused(f"{refusal.filename} cannot be written ({refusal.strerror}): name {what}") from None
    if options.is_json:
        print(json.dumps(profile))
    else:
        print(f"\n{as_text(profile)}\n\n{folder / PAGE_FILE}")


def write_files(profile: Mapping[str, Any], run: RunRecords, folder: Path) -> None:
    """profile.json and profile.html. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON_FILE).write_text(json.dumps(profile, indent=2) + "\n", encoding="utf-8")
    (folder / PAGE_FILE).write_text(profile_page.render(profile, run), encoding="utf-8")


def show_comparison(a: Path, b: Path, options: ProfileOptions) -> int:
    """Raises NoLog, LogError."""
    run_a, run_b = read_run(a), read_run(b)
    profiles = [measure(run_a, str(a)), measure(run_b, str(b))]
    result = compare.compare(run_a, run_b, profiles, [read_run(log) for log in options.again])
    if options.is_json:
        print(json.dumps(compare.as_json(result)))
    else:
        print(f"A  {a}\nB  {b}\n\n{compare.as_text(result)}")
    return 0


def as_text(profile: Mapping[str, Any]) -> str:
    """The profile on a terminal: what it was taken under, the stages, what matters, the threads."""
    heads = ("stage", *LATENCY_HEADS, "A/A p50", "A/A tail")
    stages = ((name, *latency_cells(stage), *spread_cells(stage)) for name, stage in profile["stages"].items())
    parts = [
        "\n".join(f"{name:<12} {value}" for name, value in conditions_words(profile["conditions"])),
        text_table(heads, stages),
        text_table(("run", ""), headline(profile)),
    ]
    if profile["threads"]:
        parts.append(text_table(THREAD_HEADS, thread_rows(profile)))
    problems = "\n".join(f"incomplete: {problem}" for problem in profile["log_problems"])
    return "\n\n".join([*parts, *([problems] if problems else [])])


def headline(profile: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(what, value with unit)."""
    age, cold, memory = profile["action_age"], profile["cold"], profile["memory"]
    start = cold["stages"][STAGES["inference"].name]
    warm_up = ", ".join(f"{ms:.1f}" for ms in cold["warm_up_ms"]) or "-"
    yield "missed deadlines", f"{profile['missed_ticks']} of {profile['ticks']}"
    yield "delay d executed (chunks)", _counts(profile["delay_executed"])
    yield "delay d planned (chunks)", _counts(profile["delay_budget"])
    yield "chunks beyond their budget", f"{profile['delay_exceeded']} of {profile['chunks']}"
    yield "age of executed actions p50 / p99", f"{figure(age['p50_ms'], 1)} / {figure(age['p99_ms'], 1)} ms"
    yield "warm-up inferences, cold first", f"{warm_up} ms"
    yield f"first {cold['start_s']:g} s, apart: inference up to", f"{figure(start['max_ms'], 1)} ms"
    if memory is not None:
        yield "memory, peak", f"{memory['peak_bytes'] / 1e6:.0f} MB"
        yield "page faults, minor / major", f"{memory['minor_faults']} / {memory['major_faults']}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{steps} ({count})" for steps, count in counts.items()) or "-"


THREAD_HEADS: Final = ("thread", "cpu", "waiting for cpu", "minor faults", "major faults", "preempted")


def thread_rows(profile: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Shares of the run's time, and counts."""
    for name, used in profile["threads"].items():
        shares = (f"{100 * used[share]:.1f} %" for share in ("cpu_share", "wait_share"))
        yield (name, *shares, *(str(used[count]) for count in ("minor_faults", "major_faults", "preemptions")))


def parse(argv: Sequence[str] | None) -> ProfileOptions:
    """The command line; exits with 2 when it is none. What `--live` does not know is for `onbeat run`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, is_live = _parser(), "--live" in arguments
    if not is_live:
        parser.add_argument("log", type=Path, nargs="?", help="folder of a run, its log, or one file of it")
    known, rest = parser.parse_known_args(arguments) if is_live else (parser.parse_args(arguments), [])
    log = None if is_live else known.log
    if sum((log is not None, is_live, known.compare is not None)) != 1:
        parser.error("give one of: LOG, --live, --compare A B")
    if known.again and known.compare is None:
        parser.error("--again goes with --compare")
    return ProfileOptions(
        log=log,
        is_live=is_live,
        pair=None if known.compare is None else (known.compare[0], known.compare[1]),
        again=tuple(known.again),
        trace=known.trace,
        into=known.into,
        is_json=known.is_json,
        run_arguments=tuple(rest),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onbeat profile",
        usage="onbeat profile LOG | --live [arguments of onbeat run] | --compare A B [--again LOG ...]  [options]",
        description="Latency of every stage and tick, from a recorded run or from one that is driven now.",
        epilog="With --live every other argument goes to `onbeat run` (onbeat run --help).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--live", action="store_true", help="drive a run first, with the arguments of `onbeat run`")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two runs: a verdict per stage")
    parser.add_argument("--again", type=Path, nargs="+", default=[], metavar="LOG", help="further runs of what A is")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a Perfetto trace too")
    parser.add_argument("--into", type=Path, metavar="FOLDER", help=f"of {JSON_FILE} and {PAGE_FILE}; None: the log's")
    parser.add_argument("--json", action="store_true", dest="is_json", help="print the profile as JSON")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
