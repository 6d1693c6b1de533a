"""`onbeat run`: the supervisor. Refuses what is wrong before anything moves, starts twin and daemon, watches, reports.

It alone sees both sides: the daemon's status and the twin's truth. It drives nothing itself.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from onbeat.drivers.twin.client import start_twin
from onbeat.drivers.twin.records import read_truth
from onbeat.embodiment.errors import OnbeatError
from onbeat.runtime.bundle import load_bundle
from onbeat.runtime.command_line import HelpWithDefaults
from onbeat.runtime.daemon import DaemonConfig
from onbeat.runtime.flight.encoding import FORMS, PNG
from onbeat.runtime.flight.reader import LOG_FOLDER
from onbeat.runtime.flight.view import LIVE, REMOTE, check_target
from onbeat.runtime.modes import MODES, choose_mode
from onbeat.runtime.report import PAGE_FILE, TWIN_FOLDER, write_report
from onbeat.runtime.robots import ROBOTS, Robot, RobotConfig, as_json, build_robot, limits_table, load_robot
from onbeat.runtime.summary import as_text

DEFAULT_BUNDLE = Path("bundles/so101-lift")
DEFAULT_INSTRUCTION = "lift the red cube"
FIRST_WORLD_SEED = 200_000  # training and `evaluate` use worlds below
LOG_FILE = "daemon.log"
LEAST_LOG_MB = 10
END_S = 20.0  # for the daemon, after it was asked to stop
GUARDIAN_DID = {
    "hold": "left the arm holding",
    "relax": "took torque off",
    "park": "parked the arm",
    "part": "lost the arm before it was done",
}
LIVE_PERIOD_S = 5.0  # between two live lines where they cannot overwrite each other


class RunRefused(OnbeatError):
    """Something is missing without which nothing may move."""


class DaemonFailed(OnbeatError):
    """The daemon ended by itself, with an error; the arm was brought to rest or holds its last goal."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The command line."""

    robot: str
    robot_file: Path | None
    bundle: Path
    seconds: float
    seed: int
    instruction: str
    port: str
    is_armed: bool
    out: Path
    is_json: bool
    threads: int
    mode: str = ""
    allow_untrained_prefix: bool = False
    log_budget_mb: float = 2000.0
    log_frames: str = PNG
    view: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0 after a run, also one that was stopped by Ctrl-C, and 1 after a failure."""
    options = parse(argv)
    try:
        return run(options)
    except OnbeatError as error:
        print(f"onbeat run: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("onbeat run: stopped before anything moved", file=sys.stderr)
        return 1


def run(options: RunOptions) -> int:
    """Check, drive, report. Raises OnbeatError."""
    folder, failure = drive(options, sys.stderr if options.is_json else sys.stdout)
    if (folder / LOG_FOLDER).exists():
        show_report(write_report(folder), folder, is_json=options.is_json)
    if failure is not None:
        raise DaemonFailed(failure)
    return 0


def drive(options: RunOptions, screen: TextIO) -> tuple[Path, str | None]:
    """Check and drive; returns the run's folder, and what went wrong. Raises OnbeatError before anything moves."""
    robot = check(options)
    print(f"{robot.config.name}: limits\n{limits_table(robot)}\n", file=screen)
    folder = new_run_folder(options.out)
    print("starting; on a new machine the control loop is compiled first, about half a minute", file=screen)
    with interrupts_raise(), devices(robot.config, options, folder) as config:
        return folder, supervise(daemon_config(config, options, folder), folder, screen)


def show_report(report: Mapping[str, Any], folder: Path, *, is_json: bool) -> None:
    """Print the end of a run; of one in which nothing moved there is nothing to print but JSON."""
    if is_json:
        print(json.dumps(report))
    elif report["ticks"]:
        print(f"\n{as_text(report)}\n\n{folder / PAGE_FILE}")


def check(options: RunOptions) -> Robot:
    """Refuse what can be known to be wrong before any process starts. Returns the robot, with the given port."""
    robot = load_robot(options.robot, options.robot_file)
    if options.port:
        robot = build_robot(replace(robot.config, port=options.port))
    if not robot.config.is_simulated:
        _check_real(robot.config, options)
    if not 0 < options.seconds < math.inf:
        raise RunRefused(f"--seconds {options.seconds}: give a time above 0")
    if options.view:
        check_target(options.view)
    if not LEAST_LOG_MB <= options.log_budget_mb < math.inf:
        raise RunRefused(f"--log-budget-mb {options.log_budget_mb:g}: give {LEAST_LOG_MB} or more")
    if options.threads < 1:
        raise RunRefused(f"--threads {options.threads}: give 1 or more")
    bundle = load_bundle(options.bundle)
    choose_mode(bundle.manifest.policy, options.mode, allow_untrained_prefix=options.allow_untrained_prefix)
    language = bundle.open_language(robot.embodiment)
    language.prompt(options.instruction)
    missing = [view for view in language.settings.views if view not in _views(robot)]
    if missing:
        raise RunRefused(f"the policy looks through camera '{missing[0]}': name it under [cameras] in --robot-file")
    return robot


def _check_real(config: RobotConfig, options: RunOptions) -> None:
    if not config.port:
        raise RunRefused(f"'{config.name}' is a real arm: give its port with --port (`ls /dev/serial/by-id`)")
    if not options.is_armed:
        raise RunRefused(f"'{config.name}' is a real arm and will move: clear its reach, then add --arm")
    if not _is_terminal(config.port):
        raise RunRefused(f"{config.port} is no serial port: choose one of `ls /dev/serial/by-id`")


def _is_terminal(port: str) -> bool:
    """Whether a device that could be a serial port is there; opening it and asking the servos comes later."""
    try:
        fd = os.open(port, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    except PermissionError:
        return True  # the bus driver has the remedy for that
    except OSError:
        return False
    try:
        return os.isatty(fd)
    finally:
        os.close(fd)


def _views(robot: Robot) -> Sequence[str]:
    return robot.embodiment.views if robot.config.is_simulated else list(robot.config.cameras)


def new_run_folder(out: Path) -> Path:
    """out/<time>, which did not exist before."""
    name = time.strftime("%Y%m%d-%H%M%S")
    candidates = (out / (name if k == 0 else f"{name}-{k}") for k in range(1000))
    folder = next(path for path in candidates if not path.exists())
    try:
        folder.mkdir(parents=True)
    except OSError as refusal:
        why = f"no run folder can be made in {out} ({refusal.strerror})"
        raise RunRefused(f"{why}: name another with --out") from refusal
    return folder


@contextmanager
def devices(config: RobotConfig, options: RunOptions, folder: Path) -> Iterator[RobotConfig]:
    """The robot's config with a port and cameras that are there: the twin's, while the block runs, or its own."""
    if not config.is_simulated:
        yield config
        return
    with start_twin(folder / TWIN_FOLDER, seed=FIRST_WORLD_SEED + options.seed) as twin:
        yield replace(config, port=twin.port, cameras=twin.frames)


def daemon_config(config: RobotConfig, options: RunOptions, folder: Path) -> DaemonConfig:
    """What the daemon is told."""
    return DaemonConfig(
        robot=as_json(config),
        bundle=str(options.bundle),
        instruction=options.instruction,
        seconds=options.seconds,
        seed=options.seed,
        run_dir=str(folder),
        threads=options.threads,
        mode=options.mode,
        allow_untrained_prefix=options.allow_untrained_prefix,
        log_budget_bytes=round(options.log_budget_mb * 1e6),
        log_frames=options.log_frames,
        view=options.view,
    )


def supervise(config: DaemonConfig, folder: Path, screen: TextIO) -> str | None:
    """Run the daemon to its end, with a live line; returns what went wrong. Signals end it with the arm at rest."""
    failure, guardian = None, ""
    with start_daemon(config, folder / LOG_FILE) as daemon, signals_stop(daemon):
        assert daemon.stdout is not None
        live = LiveLine(screen, folder / TWIN_FOLDER)
        for event in events_of(daemon.stdout):
            if event["event"] == "status":
                live.show(event)
            elif event["event"] == "error":
                failure = event["text"] if event["is_known"] else f"{event['text']}: read {folder / LOG_FILE}"
            elif event["event"] == "guardian":
                guardian = guardian_text(event)
        live.end()
        code = daemon.wait(END_S)
    if code and failure is None:
        failure = f"the daemon ended with exit code {code}: read {folder / LOG_FILE}"
    return f"{failure or 'the daemon ended'} ({guardian})" if guardian else failure


def events_of(lines: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    """What a daemon tells, line by line; what a library prints between is none of it."""
    for line in lines:
        with suppress(json.JSONDecodeError):
            event = json.loads(line)
            if isinstance(event, dict) and "event" in event:
                yield event


def guardian_text(event: Mapping[str, Any]) -> str:
    """What the guardian did, in words, and why not all that the robot file says."""
    did, why = GUARDIAN_DID.get(event["did"], "could not reach the arm"), event.get("why", "")
    return f"{event['fault']}: the guardian {did}{f', {why}' if why else ''}"


@contextmanager
def start_daemon(config: DaemonConfig, log_file: Path) -> Iterator["subprocess.Popen[str]"]:
    """The daemon's process, in a session of its own: a Ctrl-C reaches the supervisor alone, which tells it."""
    command = [sys.executable, "-m", "onbeat.runtime.daemon"]
    with log_file.open("w") as log:
        daemon = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    try:
        assert daemon.stdin is not None
        daemon.stdin.write(json.dumps(asdict(config)))
        daemon.stdin.close()
        yield daemon
    finally:
        end_process(daemon)


def end_process(process: "subprocess.Popen[str]") -> None:
    """Ask it to end, wait for the arm to rest, insist."""
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


@contextmanager
def interrupts_raise() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt as SIGINT does, so that everything opened is closed."""
    with _handling(lambda *_: signal.default_int_handler(signal.SIGINT, None)):
        yield


@contextmanager
def signals_stop(process: "subprocess.Popen[str]") -> Iterator[None]:
    """SIGINT and SIGTERM ask `process` to end; how the run then ends is its own affair."""
    with _handling(lambda *_: process.terminate()):
        yield


@contextmanager
def _handling(handler: Any) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class LiveLine:
    """How the run goes, on one line: overwritten on a terminal, every few seconds elsewhere."""

    def __init__(self, screen: TextIO, truth_folder: Path) -> None:
        self._screen, self._truth_folder = screen, truth_folder
        self._shown_s = float("-inf")

    def show(self, status: Mapping[str, Any]) -> None:
        is_terminal = self._screen.isatty()
        if not is_terminal and status["t_s"] - self._shown_s < LIVE_PERIOD_S:
            return
        self._shown_s = status["t_s"]
        start, end = ("\r\x1b[K", "") if is_terminal else ("", "\n")
        print(f"{start}{self.text(status)}", end=end, file=self._screen, flush=True)

    def text(self, status: Mapping[str, Any]) -> str:
        """The line for one status of the daemon."""
        rate, latency = status["rate_hz"], status["inference_p50_ms"]
        return (
            f"{status['t_s']:5.1f} s  loop {'-' if rate is None else f'{rate:.1f}'} Hz, {status['missed']} missed  "
            f"inference {'-' if latency is None else f'{latency:.0f}'} ms, {status['chunks']} chunks, "
            f"{status['late']} late  {self._successes()}"
        )

    def end(self) -> None:
        if self._screen.isatty():
            print(file=self._screen)

    def _successes(self) -> str:
        if not self._truth_folder.is_dir():
            return ""
        last = next(iter(deque(read_truth(self._truth_folder), maxlen=1)), None)
        return "no attempt yet" if last is None else f"lifted {last.successes} of {last.successes + last.failures}"


def parse(argv: Sequence[str] | None) -> RunOptions:
    """The command line, with its defaults and units."""
    parser = argparse.ArgumentParser(
        prog="onbeat run",
        description="Drive a robot, or the simulated twin, with a policy bundle.",
        formatter_class=HelpWithDefaults,
    )
    parser.add_argument("--robot", default="so101-twin", help=f"one of {', '.join(ROBOTS)}")
    parser.add_argument("--robot-file", type=Path, help="TOML file whose fields override the robot's")
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="folder of the policy")
    parser.add_argument("--seconds", type=float, default=30.0, help="of motion, s")
    parser.add_argument("--seed", type=int, default=0, help="of the policy's noise and of the twin's world")
    parser.add_argument("--instruction", default=DEFAULT_INSTRUCTION, help="what the policy is asked to do")
    parser.add_argument("--port", default="", help="servo bus of a real arm")
    parser.add_argument("--arm", action="store_true", dest="is_armed", help="a real arm may move")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the run's log and report")
    parser.add_argument("--threads", type=int, default=1, help="of the inference engine")
    parser.add_argument("--mode", default="", help=f"how chunks join: {', '.join(MODES)}; empty: the checkpoint's own")
    parser.add_argument("--allow-untrained-prefix", action="store_true", help="keep rows that training never did")
    parser.add_argument("--log-budget-mb", type=float, default=2000.0, help="of disk for the flight log, MB")
    parser.add_argument("--log-frames", choices=FORMS, default=PNG, help="how frames are kept; png loses nothing")
    parser.add_argument(
        "--view",
        nargs="?",
        const=LIVE,
        default="",
        metavar="TO",
        help=f"watch in Rerun: on this screen, into a file that ends in .rrd, or at {REMOTE[0]}HOST:9876/proxy",
    )
    parser.add_argument("--json", action="store_true", dest="is_json", help="print the report as JSON")
    return RunOptions(**vars(parser.parse_args(argv)))
