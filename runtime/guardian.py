"""The guardian: a small process that brings the arm to its end when the runtime is dead or hangs. It does nothing else.

    python -m onbeat.runtime.guardian '{"port": ..., ...}'        started by the runtime (`guard.py`)

It watches the loop's heartbeat. After `missed_beats` ticks without one, or STANDING_S where no tick is due, it makes
sure that the runtime is gone (a hung one is killed), takes the port's lock, which only a dead runtime lets go of, and
does what the robot file says: hold, relax or park; relax where the runtime said that a servo cannot hold. It never
writes to a port that somebody else has locked. Standard library and packets only: it starts fast, stays small, and
shares no code with what it guards.
"""

import fcntl
import json
import math
import os
import select
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onbeat.drivers.feetech.packets import OVERHEAD, decode_register, decode_status, encode_packet, reference_goals
from onbeat.drivers.feetech.tables import BROADCAST_ID, MAX_STEP, REGISTER, Instruction
from onbeat.runtime.heartbeat import DONE, GUARDED, Beat, Heartbeat

LOOK_S = 0.005
STANDING_S = 10.0  # from torque on to the first tick, between goals of a parking way, from an end that failed to exit
REPLY_S = 0.02
TRIES = 10
PARK_PERIOD_S = 0.02
SHORTEST_PARK_S = 0.5  # a way of a few degrees is no reason to hurry
PRIORITY = 55  # above the loop's 50: one that spins must not keep its guardian from acting
_PF_EXITING, _PF_SIGNALED = 0x4, 0x400  # include/linux/sched.h, the same since 2.6
KEEP_WHEN_MEMORY_IS_SHORT = "-900"

HOLD, RELAX, PARK = "hold", "relax", "park"  # as in robots.py


@dataclass(frozen=True, slots=True)
class GuardianConfig:
    """runtime_pid: whom to guard. period_s: of the loop. servo_ids, park_steps: one per joint, park_steps may be empty.

    park_steps_s: the fastest joint's speed on the way. reconnect_s: for how long in all the arm may be out of reach.
    """

    port: str
    baud_rate: int
    heartbeat: str
    runtime_pid: int
    period_s: float
    missed_beats: int
    on_exit: str
    servo_ids: tuple[int, ...]
    park_steps: tuple[int, ...] = ()
    park_steps_s: float = 300.0
    reconnect_s: float = 10.0


class Unreachable(Exception):
    """The port is gone or locked, or a servo does not answer; trying again may help."""


class Silence:
    """For how long no progress was seen, in time that this process was awake in.

    A pause of the whole machine stops the loop and its guardian alike, and is nobody's fault: between two looks no more
    than twice the planned time counts.
    """

    def __init__(self) -> None:
        self._silent_s, self._last = 0.0, Beat(0, 0, False)

    def after(self, beat: Beat, elapsed_s: float) -> float:
        """Take a look's beat, elapsed_s after the look before; returns the silence in s."""
        has_moved = beat != self._last
        self._last = beat
        self._silent_s = 0.0 if has_moved else self._silent_s + min(elapsed_s, 2 * LOOK_S)
        return self._silent_s


def watch(heartbeat: Heartbeat, runtime: "Runtime", limit_s: float) -> str | None:
    """Return when there is something to do: "RUNTIME_DEAD" or "RUNTIME_HUNG" of the fault table, None for nothing.

    limit_s: of silence, from a loop that ticks or a runtime that is gone.
    """
    silence, last_s = Silence(), time.monotonic()
    while True:
        beat, is_dead, now_s = heartbeat.look(), runtime.is_dead() or runtime.is_dying(), time.monotonic()
        if beat.phase == DONE or (is_dead and beat.phase != GUARDED):
            return None
        silent_s, last_s = silence.after(beat, now_s - last_s), now_s
        if is_dead and silent_s >= limit_s:
            return "RUNTIME_DEAD"
        if beat.phase == GUARDED and silent_s >= (limit_s if beat.is_ticking else STANDING_S):
            return "RUNTIME_HUNG"
        heartbeat.count_look()
        time.sleep(LOOK_S)


class Runtime:
    """The guarded process, by a descriptor that never means another one."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._fd = -1

    def is_dead(self, wait_s: float = 0.0) -> bool:
        return self._fd < 0 or bool(select.select([self._fd], [], [], wait_s)[0])

    def is_dying(self) -> bool:
        """Whether it was killed and the kernel still takes its memory apart, which holds its lock for that long."""
        try:
            flags = int(Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[6])
        except OSError:
            return True
        return bool(flags & (_PF_EXITING | _PF_SIGNALED))

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone: nobody may write beside the guardian."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)
        self.is_dead(5.0)


class Reach:
    """Whether the arm was ever reached, and for how long it may still be missed: what is done there does not count."""

    def __init__(self, limit_s: float) -> None:
        self._left_s, self._since_s, self.was_made = limit_s, time.monotonic(), False

    def note(self) -> None:
        """The bus took something, or a servo answered."""
        self._since_s, self.was_made = time.monotonic(), True

    def miss(self) -> None:
        """An attempt failed: the time since the last that did not, or since the last that did, is lost."""
        now_s = time.monotonic()
        self._left_s -= now_s - self._since_s
        self._since_s = now_s

    @property
    def is_lost(self) -> bool:
        """Whether that was all the time there is."""
        return self._left_s <= 0.0


class Port:
    """The servo bus, locked. Raises Unreachable."""

    def __init__(self, path: str, baud_rate: int, reach: Reach) -> None:
        self._reach = reach
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        except OSError as error:
            raise Unreachable(f"{path}: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _configure(self._fd, baud_rate)
        except (OSError, termios.error) as error:
            os.close(self._fd)
            raise Unreachable(f"{path}: {error}") from error

    def close(self) -> None:
        os.close(self._fd)

    def send(self, packet: bytes) -> None:
        """To all servos, which do not answer."""
        self._write(packet)
        self._reach.note()

    def _write(self, packet: bytes) -> None:
        try:
            os.write(self._fd, packet)
        except OSError as error:
            raise Unreachable(str(error)) from error

    def ask(self, servo_id: int, instruction: int, parameters: bytes, reply_size: int) -> bytes:
        """The parameters of one servo's reply, whatever its fault bits, within TRIES attempts."""
        for _ in range(TRIES):
            with suppress(BlockingIOError):
                os.read(self._fd, 4096)
            self._write(encode_packet(servo_id, instruction, parameters))
            _, reply = decode_status(self._receive(reply_size + OVERHEAD), servo_id, reply_size)
            if reply is not None:
                self._reach.note()
                return reply.parameters
            time.sleep(REPLY_S)
        self._reach.miss()
        raise Unreachable(f"servo {servo_id} does not answer")

    def _receive(self, length: int) -> bytes:
        data, deadline_s = b"", time.monotonic() + REPLY_S
        while len(data) < length and (left_s := deadline_s - time.monotonic()) > 0:
            if select.select([self._fd], [], [], left_s)[0]:
                try:
                    data += os.read(self._fd, length - len(data))
                except OSError as error:
                    raise Unreachable(str(error)) from error
        return data

    def read(self, servo_id: int, name: str) -> int:
        register = REGISTER[name]
        data = self.ask(servo_id, Instruction.READ, bytes((register.address, register.size)), register.size)
        return decode_register(name, data)

    def write(self, servo_id: int, name: str, value: int) -> None:
        self.ask(servo_id, Instruction.WRITE, bytes((REGISTER[name].address, value)), 0)


def _configure(fd: int, baud_rate: int) -> None:
    """Raw bytes, 8N1; the runtime had it so, a port that was plugged in again has not."""
    speed = getattr(termios, f"B{baud_rate}")
    control = termios.tcgetattr(fd)[6]
    flags = termios.CS8 | termios.CREAD | termios.CLOCAL
    termios.tcsetattr(fd, termios.TCSANOW, [0, 0, flags, 0, speed, speed, control])


def hold(port: Port, config: GuardianConfig) -> None:
    """The servos hold their last goal by themselves: make sure that they are there."""
    for servo_id in config.servo_ids:
        port.read(servo_id, "torque_enable")


def relax(port: Port, config: GuardianConfig) -> None:
    """Torque off: all at once, then servo by servo until each has confirmed; one that is silent keeps no other on."""
    address = bytes((REGISTER["torque_enable"].address, 1))
    data = b"".join(bytes((servo_id, 0)) for servo_id in config.servo_ids)
    port.send(encode_packet(BROADCAST_ID, Instruction.SYNC_WRITE, address + data))
    silent: list[str] = []
    for servo_id in config.servo_ids:
        try:
            port.write(servo_id, "torque_enable", 0)
        except Unreachable as error:
            silent.append(str(error))
    if silent:
        raise Unreachable(", ".join(silent))


def park(port: Port, config: GuardianConfig) -> None:
    """To the parking pose, on a smooth way from the last goals, then torque off. Raises NoWay before anything moves."""
    start = [port.read(servo_id, "goal_position") for servo_id in config.servo_ids]
    for goals in checked_way(start, config):
        port.send(reference_goals(list(config.servo_ids), goals))
        time.sleep(PARK_PERIOD_S)
    relax(port, config)


class NoWay(Exception):
    """The robot file's parking pose or speed makes no sense: the arm stays where it is, and holds."""


def checked_way(start: Sequence[int], config: GuardianConfig) -> Iterator[list[int]]:
    """`parking_way` to the robot file's pose. Raises NoWay."""
    end, speed = config.park_steps, config.park_steps_s
    if len(end) != len(start) or not all(0 <= step <= MAX_STEP for step in end) or not 0 < speed < math.inf:
        raise NoWay(f"there is no way to {end} at {speed} steps/s: correct park_q and park_speed_rad_s")
    return parking_way(start, end, speed)


def parking_way(start: Sequence[int], end: Sequence[int], steps_s: float) -> Iterator[list[int]]:
    """Goals in steps, one per PARK_PERIOD_S, all joints arriving together; no joint is faster than steps_s.

    The fifth-order way that starts and ends at rest; its peak speed is 15/8 of the mean.
    """
    farthest = max((abs(b - a) for a, b in zip(start, end, strict=True)), default=0)
    count = round(max(SHORTEST_PARK_S, farthest * 1.875 / steps_s) / PARK_PERIOD_S)
    for k in range(1, count + 1):
        t = k / count
        share = t**3 * (10 - 15 * t + 6 * t**2)
        yield [round(a + share * (b - a)) for a, b in zip(start, end, strict=True)]


ENDINGS: dict[str, Callable[[Port, GuardianConfig], None]] = {HOLD: hold, RELAX: relax, PARK: park}


def bring_to_end(config: GuardianConfig, on_exit: str, reach: Reach) -> None:
    """Do it, from the beginning again while the port or a servo is not there. Raises Unreachable, NoWay."""
    while True:
        try:
            with closing(Port(config.port, config.baud_rate, reach)) as port:
                ENDINGS[on_exit](port, config)
            return
        except Unreachable:
            reach.miss()
            if reach.is_lost:
                raise
        time.sleep(LOOK_S)


def act(config: GuardianConfig, on_exit: str) -> dict[str, Any]:
    """Bring the arm to its end; returns what was done, and why not all of what was asked.

    did: on_exit, "part" of it, or "nothing" where the bus was never reached. What makes no sense becomes "hold".
    """
    reach = Reach(config.reconnect_s)
    try:
        bring_to_end(config, on_exit, reach)
    except NoWay as error:
        return {**act(config, HOLD), "why": str(error)}
    except Unreachable as error:
        return {"did": "part" if reach.was_made else "nothing", "why": str(error)}
    return {"did": on_exit}


def say(**event: Any) -> None:
    """One line of JSON for the supervisor, should there still be one."""
    with suppress(OSError):
        os.write(1, (json.dumps({"event": "guardian", **event}) + "\n").encode())


def prepare() -> None:
    """Ask for what lets it act when all else is stuck; it works without."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(KEEP_WHEN_MEMORY_IS_SHORT)


def main(argv: Sequence[str] | None = None) -> int:
    """Guard one runtime. Exit code 0: nothing was to be done, or it was done; 1: not all of what was asked."""
    (text,) = sys.argv[1:] if argv is None else argv
    values: dict[str, Any] = json.loads(text)
    tuples = {name: tuple(values[name]) for name in ("servo_ids", "park_steps")}
    config = GuardianConfig(**{**values, **tuples})
    prepare()
    heartbeat, runtime = Heartbeat(Path(config.heartbeat)), Runtime(config.runtime_pid)
    fault = watch(heartbeat, runtime, config.missed_beats * config.period_s)
    heartbeat.unlink()
    if fault is None:
        return 0
    runtime.kill()
    began_s = time.monotonic()
    told = act(config, RELAX if heartbeat.is_limp else config.on_exit)
    say(fault=fault, **told, took_s=round(time.monotonic() - began_s, 3))
    return 1 if "why" in told else 0


if __name__ == "__main__":
    sys.exit(main())
