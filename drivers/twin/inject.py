"""Faults at the far end of the wire and behind the lens, on demand: a file that the twin follows while it runs.

Whoever tests the runtime appends lines; the twin's two processes look at the file and do what the lines of the moment
say. The runtime knows nothing of it.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from onbeat.drivers.feetech.tables import Status
from onbeat.drivers.twin.servos import Answer, ServoBank

INJECTION_FILE = "inject.jsonl"
POLL_NS = 10_000_000

SILENCE, FLAKY, BAD_CHECKSUM, SHORT_REPLY = "silence", "flaky", "bad_checksum", "short_reply"
UNPLUGGED = "unplugged"
HOT, LOADED, STUCK = "hot", "loaded", "stuck"
STATUS_KINDS: Final = {
    "overload": Status.OVERLOAD,
    "overcurrent": Status.CURRENT,
    "overheat": Status.TEMPERATURE,
    "voltage": Status.VOLTAGE,
    "sensor": Status.SENSOR,
}
CAMERA_STOPPED, CAMERA_FROZEN, CAMERA_BLANK = "camera_stopped", "camera_frozen", "camera_blank"
CLOCK_STALLED, CLOCK_JUMPED = "clock_stalled", "clock_jumped"
KINDS = (
    *(SILENCE, FLAKY, BAD_CHECKSUM, SHORT_REPLY, UNPLUGGED, HOT, LOADED, STUCK, *STATUS_KINDS),
    *(CAMERA_STOPPED, CAMERA_FROZEN, CAMERA_BLANK, CLOCK_STALLED, CLOCK_JUMPED),
)
HOT_DEG_C = 66
JUMP_NS = 3_000_000_000


@dataclass(frozen=True, slots=True)
class Injection:
    """kind: of KINDS. from_ns, until_ns: monotonic clock. joint: of a servo's fault."""

    kind: str
    from_ns: int
    until_ns: int
    joint: int = 0

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind


def inject(folder: Path, injection: Injection) -> None:
    """Have the twin that writes into `folder` show a fault."""
    with (folder / INJECTION_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(injection)) + "\n")


class Injector:
    """What the file says is to be shown now. `look` costs a system call per POLL_NS."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / INJECTION_FILE
        self._offset, self._looked_ns = 0, 0
        self._known: list[Injection] = []
        self.present: dict[str, Injection] = {}

    def look(self, now_ns: int) -> dict[str, Injection]:
        """kind -> injection, of this moment."""
        if now_ns - self._looked_ns >= POLL_NS:
            self._looked_ns = now_ns
            self._known = [i for i in (*self._known, *self._news()) if i.until_ns > now_ns]
            self.present = {i.kind: i for i in self._known if i.from_ns <= now_ns}
        return self.present

    def _news(self) -> Iterator[Injection]:
        if not self._path.exists() or self._path.stat().st_size == self._offset:
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if line.endswith(b"\n"):
                    self._offset += len(line)
                    yield Injection(**json.loads(line))


class FaultyFarEnd:
    """A bank of servos whose replies, status, warmth and load are what the injector says."""

    def __init__(self, bank: ServoBank, injector: Injector) -> None:
        self._bank, self._injector, self._answers = bank, injector, 0

    def feed(self, data: bytes, now_ns: int = 0) -> Answer:
        """What the bank answers, spoilt on its way."""
        present = self._injector.look(now_ns)
        answer = self._bank.feed(data, now_ns)
        if not answer.data:
            return answer
        self._answers += 1
        if SILENCE in present or (FLAKY in present and self._answers % 2):
            return Answer(b"", answer.wire_ns)
        if SHORT_REPLY in present:
            return Answer(answer.data[:-3], answer.wire_ns)
        if BAD_CHECKSUM in present:
            return Answer(answer.data[:-1] + bytes((answer.data[-1] ^ 0x55,)), answer.wire_ns)
        return answer

    def mark_servos(self, now_ns: int) -> None:
        """Have the servos' registers show what the injector says of them, from the next step of the world on."""
        present = self._injector.look(now_ns)
        for j, servo in enumerate(self._bank.servos):
            mine = {kind for kind, injection in present.items() if injection.joint == j}
            servo.injected = Status(sum(bit for kind, bit in STATUS_KINDS.items() if kind in mine))
            servo.case_deg_c = HOT_DEG_C if HOT in mine else None
            servo.shown_load = 1.0 if LOADED in mine else None
            servo.is_stuck = STUCK in mine
