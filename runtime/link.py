"""What the loop exchanges joints with, in one form for compiled code: a servo bus, or actuators behind a mailbox.

A bus is a file descriptor that the loop itself writes and reads. Whatever only Python can call (a simulator, a vendor's
SDK, a fake) gets a thread that serves it, and the loop takes the newest answer without waiting.
"""

import os
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import numpy as np

from onbeat.drivers.feetech.device import BusSettings, FeetechBus, JointCalibration, allocate_wire
from onbeat.drivers.feetech.errors import BusError, GoalRefused, PortLost, ServoFault
from onbeat.drivers.feetech.exchange import Wire, exchange_joints
from onbeat.drivers.feetech.pace import BusPace
from onbeat.drivers.feetech.protocol import GOAL_REFUSED, NO_REPLY, OK, PORT_LOST, SERVO_FAULT
from onbeat.drivers.interfaces import Actuators, JointState
from onbeat.kernels.compiled import compiled
from onbeat.runtime.mailbox import ActuatorBox, exchange_mailbox, new_actuator_box, put_answer, take_goal

NO_BUS: Final = -1  # as a file descriptor: the mailbox counts
WAIT_MS: Final = 100  # for a goal, before a serving thread looks whether it should end


class Link(NamedTuple):
    """wire: where goals go and joints come, with a port of NO_BUS when `box` is the way. joints are read from wire."""

    wire: Wire
    box: ActuatorBox


@compiled
def exchange(link, goal_rad, now_ns):
    """Send goals (J,) rad and read the joints into link.wire; returns a fault code as `exchange_joints`."""
    if link.wire.fd == NO_BUS:
        return exchange_mailbox(link.box, link.wire, goal_rad, now_ns)
    return exchange_joints(link.wire, goal_rad, True, True)


class Explains(Protocol):
    """What can say in words what an exchange that failed was about."""

    def error_of(self, outcome: int) -> Exception: ...


@dataclass(frozen=True, slots=True)
class Linked:
    """A link, and who explains its faults."""

    link: Link
    explains: Explains


@contextmanager
def link_to(actuators: Actuators, *, rate_hz: float) -> Iterator[Linked]:
    """A link for the length of a block. Raises RateTooHigh for a bus that cannot carry the rate.

    The exchanges of a bus get time-outs that end inside a tick; those of its own methods stay as patient as they were.
    """
    if isinstance(actuators, FeetechBus):
        yield Linked(bus_link(actuators, rate_hz), actuators)
        return
    with ActuatorServer(actuators) as server:
        yield Linked(server.link, server)


def bus_link(bus: FeetechBus, rate_hz: float) -> Link:
    """The wire of a bus with the time-outs of a loop. Raises RateTooHigh."""
    settings = BusPace.of(bus).fit(bus.settings, rate_hz)
    limits = np.array([settings.timeout_ms * 1e6, settings.settle_ms * 1e6, settings.retries], np.int64)
    return Link(bus.wire._replace(limits=limits), new_actuator_box(len(bus.joints)))


def mailbox_link(joints: int, wake_fd: int = -1) -> Link:
    """A link without a bus."""
    servos = {f"joint {k}": JointCalibration(k) for k in range(joints)}
    return Link(allocate_wire(NO_BUS, servos, BusSettings()), new_actuator_box(joints, wake_fd))


class ActuatorServer:
    """Serves a mailbox with actuators that Python calls, in a thread of its own, for the length of a `with` block.

    Goals that come while the actuators are busy are passed over: the newest is the one that is written. A fault is
    shown to the loop as one of the bus would be; whatever else the actuators raise, as a port that is gone.
    """

    def __init__(self, actuators: Actuators) -> None:
        self.error: BaseException | None = None
        self._actuators = actuators
        self._wake_fd = os.eventfd(0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="actuators")
        joints = len(actuators.joints)
        self.link = mailbox_link(joints, self._wake_fd)
        self._goal = np.zeros(joints)
        self._state = JointState(0, np.zeros(joints), np.zeros(joints), np.zeros(joints))

    def __enter__(self) -> "ActuatorServer":
        self._actuators.read(self._state)
        take_goal(self.link.box, self._goal)  # compiled here, not in the loop's first ticks
        self._answer(OK)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        os.close(self._wake_fd)

    def error_of(self, outcome: int) -> Exception:
        """What the actuators raised last, or that they gave no answer in time."""
        if isinstance(self.error, Exception):
            return self.error
        return NoAnswer(f"the actuators gave no answer in time (fault {outcome & 15})")

    def _serve(self) -> None:
        self._leave_the_loop()
        waiting = select.poll()
        waiting.register(self._wake_fd, select.POLLIN)
        while not self._stop.is_set():
            if waiting.poll(WAIT_MS):
                os.eventfd_read(self._wake_fd)
                self._exchange()

    def _leave_the_loop(self) -> None:
        """Run on every processor of the process, as an ordinary thread: the loop that started this one has its own.

        Not before others: what is called is somebody else's code, and one that spins would take a processor from
        cameras, inference and guardian for as long as it likes. Nor would it help, as the thread needs the interpreter,
        which whoever has it does not give to priority. The loop does without an answer for STALE_NS.
        """
        os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))

    def _exchange(self) -> None:
        while not take_goal(self.link.box, self._goal):
            pass
        try:
            self._actuators.write(self._goal)
            self._actuators.read(self._state)
        except BaseException as error:
            self.error = error
            self._answer(_code_of(error), error.status if isinstance(error, ServoFault) else 0)
            return
        self._answer(OK)

    def _answer(self, outcome: int, status: int = 0) -> None:
        """status: bits of a servo, of whichever; its error does not say which."""
        state = self._state
        self.link.wire.status[:] = status
        put_answer(self.link.box, state.t_ns, outcome, state.position_rad, state.velocity_rad_s, state.load)


def _code_of(error: BaseException) -> int:
    """The fault code that an exchange on a bus would have had."""
    if isinstance(error, ServoFault):
        return SERVO_FAULT
    if isinstance(error, GoalRefused):
        return GOAL_REFUSED
    return NO_REPLY if isinstance(error, BusError) and not isinstance(error, PortLost) else PORT_LOST


class NoAnswer(BusError):
    """Actuators behind a mailbox were silent for too long."""

    remedy = "see what keeps the simulator or SDK, or give it a processor of its own"
