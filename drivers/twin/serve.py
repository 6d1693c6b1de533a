"""The twin process: physics in real time, six servos on a pty, cameras in a child process, and the truth written down.

    python -m onbeat.drivers.twin --seed 0 --run-dir out/twin

Prints one line of JSON when it is ready: {"port": ..., "frames": {view: ring name}, "pid": ...}. Ends on SIGTERM, and
with its parent.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onbeat.drivers.twin.frames import SHARED_MEMORY, RingWriter
from onbeat.drivers.twin.inject import UNPLUGGED, FaultyFarEnd, Injector
from onbeat.drivers.twin.lifeline import claim_realtime, end_with_parent, stop_on_signal
from onbeat.drivers.twin.line import ServoLine
from onbeat.drivers.twin.records import Recorder, TorqueLine, TruthLine
from onbeat.drivers.twin.referee import LIFT_M, Event, Referee
from onbeat.drivers.twin.servos import ServoBank

if TYPE_CHECKING:
    from onbeat.drivers.twin.world import World

PORT_LINK = "port"
PHYSICS_NS = 4_000_000
EXCHANGE_NS = 1_300_000  # goals to six servos and the state of all take 1.24 ms of a wire at 1 Mbaud
JUDGE_NS = 20_000_000
SAMPLE_NS = 100_000_000
PRIORITY = 60  # above the loop that drives the arm: real servos do not wait for a computer's other work
MAX_LAG_NS = 100_000_000  # beyond this the world's time is let go: real time has no second chance


@dataclass(frozen=True, slots=True)
class TwinSettings:
    """What a twin process is started with."""

    seed: int
    run_dir: Path
    frame_size: int = 112
    camera_rate_hz: float = 10.0
    has_cameras: bool = True
    attempt_timeout_s: float = 12.0
    is_paced: bool = True


class Twin:
    """The world, the bus and the referee of one process. The arm wakes up with torque on, holding where it is."""

    def __init__(self, world: "World", settings: TwinSettings) -> None:
        joints = world.position_rad.size
        self.settings = settings
        self.world = world
        self.recorder = Recorder(settings.run_dir)
        self.bank = ServoBank(range(1, joints + 1), self._note_goals)
        self.injector = Injector(settings.run_dir)
        self.far_end = FaultyFarEnd(self.bank, self.injector)
        self.line = ServoLine(self.far_end, paced=settings.is_paced)
        self._link_port()
        self.referee = Referee(round(settings.attempt_timeout_s * 1e9))
        self.snapshots = RingWriter(f"{ring_prefix()}-world", self.world.qpos_snapshot().nbytes)
        self.slipped_ns = 0
        self._goal_rad = np.zeros(joints)
        self._held = np.ones(joints, bool)
        self._sample_ns = self._judged_ns = 0
        self._steps = PHYSICS_NS // world.step_ns
        self._wake_servos()
        self._publish()

    def run(self, stop: threading.Event) -> None:
        """Serve and step in real time until `stop`: a reply under way goes before a step of the world."""
        claim_realtime(PRIORITY)
        next_ns = time.monotonic_ns()
        while not stop.is_set():
            next_ns += PHYSICS_NS
            self._plug_or_unplug()
            self.line.serve_until(next_ns, EXCHANGE_NS)
            self._advance()
            lag_ns = time.monotonic_ns() - next_ns
            if lag_ns > MAX_LAG_NS:
                self.slipped_ns += lag_ns
                next_ns += lag_ns

    def close(self) -> None:
        """Hang up and write the counts."""
        self.line.close()
        self.snapshots.close()
        attempts = {"attempts": self.referee.attempt, "lifted": self.referee.successes, "failed": self.referee.failures}
        self.recorder.close({**self.bank.counts, **attempts, "slipped_ns": self.slipped_ns})

    @property
    def port(self) -> str:
        """The path that stays when the cable is pulled and plugged in again."""
        return str(self.settings.run_dir.resolve() / PORT_LINK)

    def _plug_or_unplug(self) -> None:
        is_wanted = UNPLUGGED not in self.injector.look(time.monotonic_ns())
        if self.line.is_plugged and not is_wanted:
            Path(self.port).unlink()
            self.line.close()
        elif not self.line.is_plugged and is_wanted:
            self.line.plug()
            self._link_port()

    def _link_port(self) -> None:
        Path(self.port).unlink(missing_ok=True)
        Path(self.port).symlink_to(self.line.port)

    def _wake_servos(self) -> None:
        world = self.world
        self.bank.sense(world.position_rad, world.velocity_rad_s, world.load, 0)
        for servo in self.bank.servos:
            servo.put("goal_position", servo.get("present_position"))
            servo.put("torque_enable", 1)

    def _advance(self) -> None:
        """A step of servos and world, in stages: servos answer while they move."""
        for stage in (self._drive, *[self._step] * self._steps, self._show, self._judge):
            stage()
            self.line.serve_until(0)

    def _drive(self) -> None:
        self.far_end.mark_servos(time.monotonic_ns())
        self.bank.advance(PHYSICS_NS, self._goal_rad)
        held = self.bank.holding()
        if not np.array_equal(held, self._held):
            self.world.enable(held)
            self._held = held
            where = self.world.position_rad.round(5).tolist()
            self.recorder.add_torque(TorqueLine(time.monotonic_ns(), held.tolist(), where))
        self.world.set_goal_rad(self._goal_rad)

    def _step(self) -> None:
        self.world.step(self.world.step_ns)

    def _show(self) -> None:
        self.bank.sense(self.world.position_rad, self.world.velocity_rad_s, self.world.load, PHYSICS_NS)
        self._publish()

    def _publish(self) -> None:
        self.snapshots.publish(self.world.qpos_snapshot().view(np.uint8), time.monotonic_ns())

    def _note_goals(self, steps: list[int]) -> None:
        now_ns = time.monotonic_ns()
        self.recorder.add_goals(now_ns, steps)
        if self.referee.attempt == 0:
            self._write_truth(now_ns, self.referee.start_attempt(now_ns))

    def _judge(self) -> None:
        now_ns = time.monotonic_ns()
        if now_ns - self._judged_ns < JUDGE_NS:
            return
        self._judged_ns = now_ns
        event = self.referee.judge(now_ns, self.world.cube_height_m)
        if event is not None:
            self._write_truth(now_ns, event)
            self.world.place_cube(place_seed(self.settings.seed, self.referee.attempt))
            self._write_truth(now_ns, self.referee.start_attempt(now_ns))
        elif now_ns - self._sample_ns >= SAMPLE_NS:
            self._sample_ns = now_ns
            self._write_truth(now_ns, None)

    def _write_truth(self, now_ns: int, event: Event | None) -> None:
        height_m, referee = self.world.cube_height_m, self.referee
        line = TruthLine(
            t_ns=now_ns,
            attempt=referee.attempt,
            cube_height_m=round(height_m, 5),
            lifted=height_m >= LIFT_M,
            successes=referee.successes,
            failures=referee.failures,
            event=event,
        )
        self.recorder.add_truth(line)


class CameraProcess:
    """The child that draws. Its rings are unlinked here too, should it die."""

    def __init__(self, snapshots: str, views: Sequence[str], settings: TwinSettings) -> None:
        self.rings = {view: f"{ring_prefix()}-{view}" for view in views}
        command = [sys.executable, "-m", "onbeat.drivers.twin.cameras", "--snapshots", snapshots]
        command += ["--frames", ring_prefix(), "--frame-size", str(settings.frame_size)]
        command += ["--rate-hz", str(settings.camera_rate_hz), "--injections", str(settings.run_dir)]
        # One thread draws: the other core belongs to whoever drives the arm.
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "LP_NUM_THREADS": "1"})

    def wait_ready(self) -> str | None:
        """Wait for the first frames; returns what went wrong, or None."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            return f"the camera process ended with exit code {self._process.wait()}: its log says why"
        return json.loads(line).get("error")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
        for ring in self.rings.values():
            (SHARED_MEMORY / ring).unlink(missing_ok=True)


def ring_prefix() -> str:
    """Of the shared memory of this process; a name tells whose it is."""
    return f"onbeat-{os.getpid()}"


def place_seed(seed: int, attempt: int) -> int:
    """Where the cube goes after `attempt`: another place for every seed and attempt."""
    return int(np.random.default_rng([seed, attempt]).integers(2**31))


def parse(argv: Sequence[str] | None) -> TwinSettings:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m onbeat.drivers.twin", description="The simulated SO-101 on a pty.")
    parser.add_argument("--seed", type=int, default=0, help="of the start and every place of the cube (default 0)")
    parser.add_argument("--run-dir", type=Path, required=True, help="folder for truth.jsonl, wire.bin and twin.json")
    parser.add_argument("--frame-size", type=int, default=112, help="pixels, square (default %(default)s)")
    parser.add_argument("--camera-rate-hz", type=float, default=10.0, help="of both cameras (default %(default)s)")
    parser.add_argument("--no-cameras", action="store_true", help="servo bus and truth alone")
    parser.add_argument("--attempt-timeout-s", type=float, default=12.0, help="to lift the cube (default %(default)s)")
    parser.add_argument("--unpaced", action="store_true", help="replies do not wait for the wire")
    options = parser.parse_args(argv)
    return TwinSettings(
        seed=options.seed,
        run_dir=options.run_dir,
        frame_size=options.frame_size,
        camera_rate_hz=options.camera_rate_hz,
        has_cameras=not options.no_cameras,
        attempt_timeout_s=options.attempt_timeout_s,
        is_paced=not options.unpaced,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a twin until SIGTERM."""
    settings = parse(argv)
    end_with_parent()
    stop = stop_on_signal()
    try:
        from onbeat.drivers.twin.world import VIEWS, World
    except ModuleNotFoundError as missing:
        print(json.dumps({"error": f"{missing.name} is not installed: run `pip install 'onbeat[sim]'`"}), flush=True)
        return 1
    with ExitStack() as running:
        twin = running.enter_context(closing(Twin(World(settings.seed), settings)))
        rings: dict[str, str] = {}
        if settings.has_cameras:
            cameras = running.enter_context(closing(CameraProcess(twin.snapshots.name, VIEWS, settings)))
            rings, fault = cameras.rings, cameras.wait_ready()
            if fault is not None:
                print(json.dumps({"error": fault}), flush=True)
                return 1
        print(json.dumps({"port": twin.port, "frames": rings, "pid": os.getpid()}), flush=True)
        twin.run(stop)
    return 0
