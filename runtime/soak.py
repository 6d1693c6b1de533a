"""`onbeat soak`: every row of the fault table, again and again, on the twin; judged by what came over the wire.

    a long run with faults   what clears by itself, in two lanes (policy and seams; wire, servos and cameras)
    one without              the control: nothing may fire but what the machine itself does
    short runs               what ends a run, each to its end

The limits are judged from the twin's record of goals, and every goal must be one that the runtime says it sent, when it
says it did. Faults come from a schedule that the seed makes, at the far end of the wire where they can.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from onbeat.drivers.twin.client import RunningTwin, start_twin
from onbeat.embodiment.slots import suggest
from onbeat.runtime.command_line import HelpWithDefaults
from onbeat.runtime.faults import Fault
from onbeat.runtime.robots import HOLD, RELAX, Robot, as_json, build_robot, load_robot
from onbeat.runtime.soak_reactions import made_of
from onbeat.runtime.soak_report import Story, Wire, as_text, judge
from onbeat.runtime.soak_runner import Runner, SoakFailed, Told
from onbeat.runtime.soak_schedule import ENDINGS, GUARDIANS, IN_TURN, TIMES, Due, Kind, all_lanes, end_of, schedule
from onbeat.runtime.soak_session import Act, Leg

CLEAR_OF_THE_TABLE_M = 0.05  # or a dive would press on it or the cube until servos give up: another fault
SHORT_S = 20.0
AGAIN = 2  # legs at most
BY_THE_MACHINE = (Fault.BUS_DEAD.name, Fault.RUNTIME_HUNG.name)  # what a machine that stands still for 0.3 s ends


def soak(options: "Options", folder: Path) -> dict[str, Any]:
    """All of it; returns the report."""
    rng, robot = np.random.default_rng(options.seed), soak_robot()
    dues = [due for due in all_lanes(rng, options.minutes * 60) if options.wants(due.kind.fault)]
    endings = [kind for kind in ENDINGS if options.wants(kind.fault) for _ in range(TIMES)]
    endings = [endings[k] for k in rng.permutation(len(endings))]  # whose process ends, and whose goes on, mixed
    seconds = options.minutes * 60
    with start_twin(folder / "twin", seed=options.seed, attempt_timeout_s=1e6) as twin:
        with Runner(twin, folder / "soak.log") as runner:
            legs = Legs(runner, robot, twin, options.seed, folder)
            main = legs.run("faults", max(seconds, end_of(dues)), dues, check_long)
            again = legs.run_again(main, [due.kind for due in dues], rng)
            control = legs.run("control", seconds, [], check_long)
            short = [legs.run_short(kind, rng) for kind in endings]
    wire = Wire.of(twin.run_dir, robot)
    story = Story(main, control, short, endings, again, frozenset(legs.hidden), legs.repeated)
    return {"seed": options.seed, **judge(story, wire, options.faults)}


def soak_robot() -> Robot:
    """The twin's arm, with a gate and further from the table."""
    config = load_robot("so101-twin").config
    low_m = (*config.tool_low_m[:2], CLEAR_OF_THE_TABLE_M)
    return build_robot(replace(config, min_gate=0.2, tool_low_m=low_m))


@dataclass(slots=True)
class Legs:
    """Makes and runs the legs on one twin. repeated: what a busy machine ended, and was run once more. hidden: faults
    that it kept from firing often enough. made: how soon each that was made was found, None: not in its own time."""

    runner: Runner
    robot: Robot
    twin: RunningTwin
    seed: int
    folder: Path
    repeated: list[Told] = field(default_factory=list)
    hidden: set[str] = field(default_factory=set)
    made: Callable[[Sequence[Told], float], Mapping[Kind, Sequence[float | None]]] = made_of

    def run(
        self, name: str, seconds: float, dues: Sequence[Due], check: Callable[[Told], None], on_exit: str = HOLD
    ) -> Told:
        """A leg; once more when the machine ended it, and nothing of its schedule. check: raises for what is no result.

        Raises SoakFailed.
        """
        leg = self._leg(name, seconds, dues, on_exit)
        told = self.runner.run(leg, dues)
        if told.ended_by in BY_THE_MACHINE and told.ended_by not in {due.kind.fault.name for due in dues}:
            self.repeated.append(told)
            told = self.runner.run(leg, dues)
        check(told)
        return told

    def run_again(self, main: Told, kinds: Sequence[Kind], rng: np.random.Generator) -> list[Told]:
        """Legs for what was made in the long one and did not fire often enough, as a busy machine hid it; few."""
        again: list[Told] = []
        while len(again) < AGAIN:
            made = self.made([main, *again], 1.0 / self.robot.config.loop_rate_hz)
            hidden = [kind for kind in dict.fromkeys(kinds) if sum(s is not None for s in made.get(kind, ())) < TIMES]
            if not hidden:
                break
            self.hidden |= {kind.fault.name for kind in hidden}
            dues = schedule([[kind for kind in group if kind in hidden] for group in IN_TURN], rng, 0.0)
            again.append(self.run("again", end_of(dues), dues, check_long))
        return again

    def run_short(self, kind: Kind, rng: np.random.Generator) -> Told:
        """A leg that ends by a fault. The arm relaxes where it is the guardian that has to see to it."""
        due = Due(kind, kind.slot_s + float(rng.uniform(0, 0.2)), int(rng.choice(kind.joints)))
        is_guardians = kind.fault in (*GUARDIANS, Fault.PORT_LOST, Fault.BUS_DEAD)
        self.runner.keep_spare()
        return self.run(kind.fault.name, SHORT_S, [due], lambda _: None, RELAX if is_guardians else HOLD)

    def _leg(self, name: str, seconds: float, dues: Sequence[Due], on_exit: str) -> Leg:
        config = replace(self.robot.config, port=self.twin.port, cameras=self.twin.frames, on_exit=on_exit)
        acts = tuple(Act(d.kind.kind, d.at_s, d.kind.lasts_s) for d in dues if d.kind.where == "seam")
        return Leg(name, as_json(config), seconds, self.seed, str(self.folder), acts)


def check_long(told: Told) -> None:
    """Raises SoakFailed for a long run that did not last: its figures would mean nothing."""
    if told.ended_by != Fault.STOP_REQUESTED.name:
        why = f"{told.ended_by} after {told.ended.get('ticks')} ticks: {told.ended.get('error')}"
        raise SoakFailed(f"leg {told.leg.name} ended early, by {why}: read soak.log, or give the machine to it alone")


@dataclass(frozen=True, slots=True)
class Options:
    """The command line. faults: the wanted ones."""

    minutes: float
    faults: frozenset[Fault]
    seed: int
    out: Path | None
    is_json: bool

    def wants(self, fault: Fault) -> bool:
        return fault in self.faults


def parse(argv: Sequence[str] | None) -> Options:
    """The command line, with its defaults and units."""
    parser = argparse.ArgumentParser(
        prog="onbeat soak",
        description="Make every fault of the table on the twin, and judge the arm by what came over its wire.",
        formatter_class=HelpWithDefaults,
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="of motion with faults, and as long without")
    parser.add_argument("--faults", default="all", help="'all', or names of the table with commas between")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule and of the motion")
    parser.add_argument("--out", type=Path, help="folder for soak.json and the twin's records")
    parser.add_argument("--json", action="store_true", dest="is_json", help="print the report as JSON")
    options = parser.parse_args(argv)
    return Options(options.minutes, wanted(options.faults), options.seed, options.out, options.is_json)


def wanted(text: str) -> frozenset[Fault]:
    """The faults that --faults names. Raises SoakFailed."""
    if text == "all":
        return frozenset(Fault)
    names = [name.strip().upper() for name in text.split(",")]
    unknown = [name for name in names if name not in Fault.__members__]
    if unknown:
        raise SoakFailed(f"there is no fault '{unknown[0]}': {suggest(unknown[0], Fault.__members__)}")
    return frozenset(Fault[name] for name in names)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit code 0 when every row fired, nothing violated a limit and both ends of the wire agree."""
    options = parse(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        result = soak(options, folder)
        if options.out is not None:
            (folder / "soak.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result) if options.is_json else as_text(result))
    return 0 if not result["problems"] else 1
