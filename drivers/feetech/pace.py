"""How long one exchange takes on the wire, what rate that permits, and the time-outs that keep it inside a tick.

An exchange is a sync write of the goals, a sync read request and one reply per servo, back to back:

    |<- goals 8 + 3 J ->|<- request 8 + J ->|<- replies 14 J ->|      bytes, ten bits each; six servos: 124

On top come the servos' return delays, the adapter (USB moves in frames of 1 ms) and what the tick does besides.
"""

from dataclasses import dataclass, replace

from onbeat.drivers.feetech.device import BusSettings, FeetechBus
from onbeat.drivers.feetech.protocol import OVERHEAD
from onbeat.drivers.feetech.tables import BITS_PER_BYTE, STATE_SIZE
from onbeat.embodiment.errors import OnbeatError

ADAPTER_NS = 1_000_000  # one USB frame, or a busy kernel's worker on a pty
TICK_NS = 500_000  # for everything of a tick that is no exchange, with a late start
PATIENCE = 3  # times what an exchange should take, before a reply is given up, where the period has room
SETTLE_NS = 500_000  # for what still comes after a fault: 50 byte times at 1 Mbaud


class RateTooHigh(OnbeatError):
    """The wire cannot carry an exchange per tick at the asked rate."""


@dataclass(frozen=True, slots=True)
class BusPace:
    """servos, baud_rate: of one bus. return_delays_ns: of all servos together, as their registers say."""

    servos: int
    baud_rate: int
    return_delays_ns: int = 0

    @classmethod
    def of(cls, bus: FeetechBus) -> "BusPace":
        """Of the servos that are there."""
        return cls(len(bus.joints), bus.settings.baud_rate, sum(bus.return_delay_ns))

    @property
    def bytes(self) -> int:
        """Of one exchange, both directions."""
        goals = OVERHEAD + 2 + 3 * self.servos
        request = OVERHEAD + 2 + self.servos
        return goals + request + self.servos * (OVERHEAD + STATE_SIZE)

    @property
    def wire_ns(self) -> int:
        """One exchange on the wire."""
        return self._bytes_ns + self.return_delays_ns

    @property
    def _bytes_ns(self) -> int:
        return self.bytes * BITS_PER_BYTE * 1_000_000_000 // self.baud_rate

    @property
    def highest_rate_hz(self) -> float:
        """At which a tick still holds an exchange."""
        return 1e9 / (self.wire_ns + ADAPTER_NS + TICK_NS)

    def check(self, rate_hz: float) -> None:
        """Raises RateTooHigh, with the figures."""
        if rate_hz > self.highest_rate_hz:
            delays = f"their return delays take {self.return_delays_ns / 1e3:.0f} us, " if self.return_delays_ns else ""
            remedy = "set every servo's register return_delay to 0, or " if self.return_delays_ns else "set "
            raise RateTooHigh(
                f"{rate_hz:g} Hz leaves {1e6 / rate_hz:.0f} us per tick, and one needs more: the {self.bytes} bytes of "
                f"{self.servos} servos take {self._bytes_ns / 1e3:.0f} us at {self.baud_rate} baud, {delays}"
                f"the adapter takes up to {ADAPTER_NS / 1e3:.0f} us, the rest of a tick {TICK_NS / 1e3:.0f} us: "
                f"{remedy}loop_rate_hz to {int(self.highest_rate_hz)} or less"
            )

    def fit(self, settings: BusSettings, rate_hz: float) -> BusSettings:
        """`settings` with time-outs such that an exchange that fails, retries and all, ends inside its tick.

        Where the period has room for one attempt only, the next tick is the retry: goals are sent in any case.
        """
        self.check(rate_hz)
        room_ns = round(1e9 / rate_hz) - TICK_NS
        timeout_ns = min(PATIENCE * (self.wire_ns + ADAPTER_NS), room_ns - SETTLE_NS)
        retries = min(settings.retries, room_ns // (timeout_ns + SETTLE_NS) - 1)
        return replace(settings, timeout_ms=timeout_ns / 1e6, settle_ms=SETTLE_NS / 1e6, retries=int(retries))
